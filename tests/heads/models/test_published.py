"""The networks that are trained from pixels, against the same written out here with torch's own pieces."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from support.gradients import check_cam_layer
from torch import nn
from torch.nn import functional

from featurecache.errors import BadOption, UnknownHead
from heads.models.catalogue import BASELINES, baseline_info, is_baseline, load_network, make_network
from heads.models.common import count_parameters
from heads.settings import Settings
from heads.training.engine import Learner

PUBLISHED = [
    ("cnn-mindlina", 256, 2, 348_230),  # a stand-in: hers has 348,050
    ("cnn-medical-mnist", 224, 6, 3_438_342),
    ("cnn-cifar", 32, 10, 175_258),
    ("cnn-cifar", 32, 100, 181_108),
    ("cnn-cifar", 64, 200, 187_608),
    ("vit-cifar", 32, 10, 1_205_642),
    ("vit-cifar", 32, 100, 1_217_252),
    ("vit-cifar", 64, 200, 1_248_584),
]


def pixels(count: int, side: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).float()


def make(name: str, side: int = 32, classes: int = 3, seed: int = 0, **options: Any) -> Any:
    return make_network(Settings(name, **options), side, classes, torch.Generator().manual_seed(seed))


def stirred(name: str, side: int, classes: int) -> nn.Module:
    """Away from its beginning: no parameter at zero, statistics of BatchNorm that are some."""
    model = make(name, side, classes)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for _ in range(2):
            model.train()(pixels(4, side))
    return model.eval()


@pytest.mark.parametrize(("name", "side", "classes", "published"), PUBLISHED)
def test_parameters_are_as_many_as_published(name: str, side: int, classes: int, published: int) -> None:
    model = make(name, side, classes)
    assert count_parameters(model) == published
    assert all(key.startswith("network.") for key in model.state_dict())  # normalising is no part of the weights


def plain_cnn(name: str) -> nn.Sequential:
    """As the notebook, or the stand-in's docstring, has it."""
    mindlina, parts = name == "cnn-mindlina", list[nn.Module]()
    for before, after in ((3, 16), (16, 32), (32, 64)) if mindlina else ((3, 32), (32, 64), (64, 128)):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=not mindlina)
        parts += [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    parts += [nn.AdaptiveAvgPool2d(4 if mindlina else 7), nn.Flatten()]
    if mindlina:
        return nn.Sequential(*parts, nn.Linear(1024, 316), nn.ReLU(), nn.Linear(316, 2))
    first, second = (nn.Linear(6272, 512), nn.ReLU()), (nn.Linear(512, 256), nn.ReLU())
    return nn.Sequential(*parts, *first, nn.Dropout(0.5), *second, nn.Dropout(0.5), nn.Linear(256, 2))


@pytest.mark.parametrize(("name", "dropouts"), [("cnn-mindlina", [0.0]), ("cnn-medical-mnist", [0.5, 0.5])])
def test_a_plain_network_is_the_plain_sequence(name: str, dropouts: list[float]) -> None:
    model, plain, x = stirred(name, 64, 2), plain_cnn(name), pixels(3, 64)
    plain.load_state_dict(OrderedDict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    mean, std = ((0.5,) * 3,) * 2 if name == "cnn-mindlina" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    given = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(model(x), plain.eval()(given), rtol=1e-4, atol=1e-4)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == dropouts


def normed(x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return functional.batch_norm(x, *parts)


@pytest.mark.parametrize(("side", "mean"), [(32, 0.5), (64, None)])
def test_the_cifar_cnn_is_a_stem_and_six_residual_blocks(side: int, mean: float | None) -> None:
    model = stirred("cnn-cifar", side, 10)
    s = {key.removeprefix("network."): value for key, value in model.state_dict().items()}
    x = pixels(3, side)
    constants = [(0.5,) * 3] * 2 if mean else [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]
    middle, spread = (torch.tensor(c).view(3, 1, 1) for c in constants)
    out = normed(functional.conv2d((x / 255 - middle) / spread, s["stem.0.weight"], padding=1), s, "stem.1").relu()
    for at, stride in enumerate((1, 1, 2, 1, 2, 1)):
        b = f"blocks.{at}"
        inside = normed(functional.conv2d(out, s[f"{b}.conv1.weight"], stride=stride, padding=1), s, f"{b}.norm1")
        inside = normed(functional.conv2d(inside.relu(), s[f"{b}.conv2.weight"], padding=1), s, f"{b}.norm2")
        if at in (2, 4):
            kernel = s[f"{b}.shortcut.0.weight"]
            assert kernel.shape[2:] == (1, 1)
            out = normed(functional.conv2d(out, kernel, stride=stride), s, f"{b}.shortcut.1")
        out = (inside + out).relu()
    expected = out.mean((2, 3)) @ s["classifier.weight"].T + s["classifier.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [32, 64])
def test_the_cifar_vit_is_six_pre_norm_blocks_on_65_tokens(side: int) -> None:
    model = stirred("vit-cifar", side, 10)
    s = {key.removeprefix("network."): value for key, value in model.state_dict().items()}
    x, patch = pixels(3, side), side // 8
    given = model.preprocess.normalised(x)
    pieces = given.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).reshape(3, 64, -1)
    tokens = pieces @ s["patches.weight"].reshape(128, -1).T + s["patches.bias"]
    tokens = torch.cat([s["token"].expand(3, 1, 128), tokens], 1) + s["positions"]
    for at in range(6):
        b = f"blocks.{at}"
        seen = functional.layer_norm(tokens, (128,), s[f"{b}.norm1.weight"], s[f"{b}.norm1.bias"])
        projected = seen @ s[f"{b}.self_attn.in_proj_weight"].T + s[f"{b}.self_attn.in_proj_bias"]
        q, k, v = (part.view(3, 65, 8, 16).transpose(1, 2) for part in projected.chunk(3, 2))
        looked = ((q @ k.transpose(2, 3)) / 4).softmax(3) @ v  # 4: the root of 16 numbers a head
        looked = looked.transpose(1, 2).reshape(3, 65, 128)
        tokens = tokens + looked @ s[f"{b}.self_attn.out_proj.weight"].T + s[f"{b}.self_attn.out_proj.bias"]
        seen = functional.layer_norm(tokens, (128,), s[f"{b}.norm2.weight"], s[f"{b}.norm2.bias"])
        hidden = (seen @ s[f"{b}.linear1.weight"].T + s[f"{b}.linear1.bias"]).relu()
        tokens = tokens + hidden @ s[f"{b}.linear2.weight"].T + s[f"{b}.linear2.bias"]
    expected = tokens[:, 0] @ s["classifier.weight"].T + s["classifier.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def test_the_vit_begins_with_zero_token_and_positions_and_six_different_blocks() -> None:
    network: Any = make("vit-cifar").network
    assert not network.token.any() and not network.positions.any()
    first = [one.linear1.weight for one in network.blocks]
    assert not any(torch.equal(first[0], other) for other in first[1:])
    assert {part.p for part in network.modules() if isinstance(part, nn.Dropout)} == {0.1}


def test_the_vit_drops_out_after_its_positions_in_training_alone() -> None:
    network: Any = make("vit-cifar", dropout=0.5).network
    entering: list[torch.Tensor] = []
    network.blocks[0].register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        network.positions.fill_(1e3)  # no token is 0 by itself
        network.train()(torch.zeros(4, 3, 32, 32))
        network.eval()(torch.zeros(4, 3, 32, 32))
    dropped, whole = ((tokens == 0).float().mean() for tokens in entering)
    assert 0.45 < dropped < 0.55 and whole == 0


def test_a_generator_decides_the_weights_and_torchs_own_is_left_alone() -> None:
    def made(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in make("cnn-cifar", seed=seed).parameters()])

    before = torch.get_rng_state()
    assert torch.equal(made(1), made(1)) and not torch.equal(made(1), made(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", BASELINES)
def test_bytes_and_floats_give_the_same_and_the_pixels_given_stay_as_they_were(name: str) -> None:
    model, x = make(name).eval(), pixels(2, 32)
    before = x.clone()
    with torch.no_grad():
        assert torch.equal(model(x), model(x.to(torch.uint8)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", BASELINES)
def test_published_settings_are_settings_and_images_are_squashed_whole(name: str) -> None:
    info = baseline_info(name)
    settings = Settings.of(name, **info.settings)
    assert settings.optimizer == "adam" and settings.lr == 1e-3
    assert ("stand-in" in info.what) == (name == "cnn-mindlina")
    prepared = info.preprocess(info.image_size)
    assert prepared.size == (info.image_size, info.image_size) and prepared.mode == "squash"
    assert prepared.resized(torch.zeros(3, 50, 20, dtype=torch.uint8)).shape == (3, *prepared.size)


def test_weight_decay_as_published_is_that_of_plain_torch() -> None:
    """Adam(model.parameters(), weight_decay=1e-4): biases and norms too."""
    for decay_all, weak in ((True, {0.5}), (False, {0.5, 0.0})):
        settings = Settings("cnn-medical-mnist", weight_decay=0.5, decay_all=decay_all)
        model = make("cnn-medical-mnist")
        learner = Learner(model, functional.cross_entropy, torch.Generator(), settings)
        decay = {id(p): group["weight_decay"] for group in learner.optimizer.param_groups for p in group["params"]}
        assert set(decay.values()) == weak and len(decay) == len(list(model.parameters()))


def test_settings_of_the_studies() -> None:
    medical, cifar = (Settings.of(name, **BASELINES[name].settings) for name in ("cnn-medical-mnist", "vit-cifar"))
    assert (medical.weight_decay, medical.schedule, medical.epochs, medical.patience) == (1e-4, "plateau", 20, 5)
    assert (medical.batch_size, medical.select, medical.balance, medical.decay_all) == (32, "loss", False, True)
    assert (cifar.epochs, cifar.batch_size, cifar.patience, cifar.balance) == (10, 128, 0, False)
    assert cifar.augment == "flip,rotate10,shift0.1"


@pytest.mark.parametrize("name", BASELINES)
def test_grad_cam_finds_a_layer_whose_places_all_have_a_gradient(name: str) -> None:
    check_cam_layer(make(name, 64).eval(), pixels(2, 64))


def test_a_state_dict_is_read_back_and_another_networks_is_refused() -> None:
    model, x = stirred("vit-cifar", 32, 3), pixels(2, 32)
    again = load_network("vit-cifar", model.state_dict(), image_size=32, classes=3)
    assert not again.training and torch.equal(again(x), model(x))
    for wrong in ({"image_size": 64, "classes": 3}, {"image_size": 32, "classes": 4}):
        with pytest.raises(ValueError, match="numbers"):
            load_network("vit-cifar", model.state_dict(), **wrong)
    renamed = {key.replace("token", "taken"): value for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="taken"):
        load_network("vit-cifar", renamed, image_size=32, classes=3)


def test_sizes_that_no_file_stands_for_take_no_memory() -> None:
    with pytest.raises(ValueError, match=r"the network 26[\d,]+"):
        load_network("cnn-cifar", {"a": torch.zeros(3)}, image_size=32, classes=4_000_000_000)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cnn-cifar", {"dropout": 0.5}, "no dropout"),
        ("cnn-medical-mnist", {"dropout": 1.0}, "below 1"),
        ("vit-cifar", {"side": 36}, "multiple of 8"),
        ("vit-cifar", {"side": 4}, "multiple of 8"),
        ("cnn-mindlina", {"side": 7}, "at least 8"),
        ("cnn-cifar", {"lora": 4}, "--lora is for finetune"),
        ("cnn-cifar", {"rlrr": True}, "--rlrr is for finetune"),
        ("vit-cifar", {"weights": "a.pt"}, "--weights is for finetune"),
        ("vit-cifar", {"random_weights": True}, "--random-weights is for finetune"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadOption, match=said):
        make(name, **options)


def test_dropout_reaches_the_network() -> None:
    model = make("vit-cifar", dropout=0.3)
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == {0.3}
    make("cnn-cifar", dropout=0.0)  # none is what it has


def test_a_name_that_is_none_is_met_with_the_nearest() -> None:
    assert is_baseline("vit-cifar") and is_baseline("finetune:resnet50") and not is_baseline("linear")
    with pytest.raises(UnknownHead, match="Near: cnn-cifar"):
        baseline_info("cnn-cifer")
