"""Heads trained together: each is what it is alone; gradients, schedules and optimisers against torch's own."""

from __future__ import annotations

import copy
import platform
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fake_view import label_view, toy_view
from support.runs import train_head
from torch import nn

from featurecache.arithmetic import cpu_multiplies_bf16, exact_arithmetic, onednn_is_exact, onednn_products
from featurecache.errors import BadOption, ProtocolError
from featurecache.images.augmentation import augmentation_of
from heads.models.catalogue import make_head
from heads.settings import Settings
from heads.task import SplitData, Standardize, task_of
from heads.training import engine, job, large, loop
from heads.training.batches import (
    BLOCK,
    BalancedBatches,
    BinaryCrossEntropy,
    CrossEntropy,
    PlainBatches,
    StackedLoss,
    loss_and_prior,
    sample_versions,
    shuffle_rows,
)
from heads.training.engine import SequentialTrainer, StackedTrainer, make_trainer
from heads.training.job import prepare_training
from heads.training.large import LargeSteps
from heads.training.train import train_together


def several(head: str) -> list[Settings]:
    """Settings that differ in everything that heads trained together may differ in."""
    kinds = [
        {"lr": 1e-2}, {"lr": 3e-4, "seed": 3}, {"weight_decay": 0.1}, {"weight_decay": 0.2, "optimizer": "adamw"},
        {"dropout": 0.3, "seed": 1}, {"dropout": 0.0}, {"label_smoothing": 0.1}, {"schedule": "cosine"},
        {"schedule": "plateau", "lr": 3e-2}, {"schedule": "linear", "warmup": 0.3}, {"clip_norm": 0.1}, {"epochs": 4},
    ]  # fmt: skip
    return [Settings(head, **({"epochs": 6, "patience": 2, "split_seed": 5} | kind)) for kind in kinds]


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("labels", [False, True], ids=["classes", "labels"])
def test_a_head_of_a_stack_is_the_head_alone(head, labels):
    settings = several(head)
    view = label_view(n=160, labels=3, unknown=0.3) if labels else toy_view(n=160, classes=3, noise=2.0)
    job = prepare_training(view, settings[0])
    together = train_together(job, settings)
    assert labels or len({each.epoch for each in together}) > 1, "heads that leave at different times are wanted here"
    for one, each in zip(settings, together, strict=True):
        (alone,) = train_together(job, [one])
        assert alone.epoch == each.epoch
        for name, weight in alone.model.state_dict().items():
            scale = float(weight.abs().max())
            torch.testing.assert_close(each.model.state_dict()[name], weight, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_written_out_gradients_are_those_of_autograd(smoothing, weighted):
    torch.manual_seed(0)
    weight = torch.tensor([0.5, 2.0, 1.0]) if weighted else None
    labels = torch.tensor([[1.0, torch.nan, 0.0], [torch.nan, 1.0, 1.0], [0.0, 0.0, torch.nan], [1.0, 1.0, 0.0]])
    for loss, y in ((CrossEntropy, torch.tensor([0, 2, 1, 2])), (BinaryCrossEntropy, labels)):
        one = loss(3, weight, smoothing)
        z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        double = loss(3, None if weight is None else weight.double(), smoothing)
        wanted = torch.stack([double(each, y.double() if y.is_floating_point() else y) for each in z])
        (gradient,) = torch.autograd.grad(wanted.sum(), z)
        losses, dz = StackedLoss([one, one])(z.detach().transpose(1, 2), y)
        torch.testing.assert_close(losses, wanted.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(dz.transpose(1, 2), gradient, rtol=1e-6, atol=1e-7)


def test_class_weights_are_torchs_and_are_taken_back_from_the_logits():
    view = toy_view(n=200, splits="given", noise=2.0)
    view.labels[:80] = 0
    task = task_of(view)
    y = torch.from_numpy(task.labels)
    loss, correction = loss_and_prior(task, y, Settings("linear", class_weights=True))
    share = np.bincount(task.labels) / len(y)
    z = torch.randn(200, 2)
    wanted = nn.functional.cross_entropy(z, y, weight=torch.from_numpy(1 / share).float())
    torch.testing.assert_close(loss(z, y), wanted)
    np.testing.assert_allclose(correction, np.log(share * 2))
    assert not Settings("linear", class_weights=True).balanced(False)


def test_a_head_that_fails_leaves_the_others_alone():
    view = toy_view(n=200, splits="given", noise=2.0)
    view.features["cls"] = view.features["cls"].float() * 1e3
    settings = [Settings("linear", epochs=3, select="loss", lr=lr) for lr in (1e-3, 1e38, 1e-2)]
    good, failed, fine = train_together(prepare_training(view, settings[0]), settings)
    assert isinstance(failed, ProtocolError) and "not finite any more in epoch 1" in str(failed)
    alone = train_head(view, "linear", epochs=3, select="loss", lr=1e-2, optimizer="adam", schedule="constant")
    torch.testing.assert_close(fine.model.ln.weight, alone.model.ln.weight)
    assert good.epoch >= 1


def test_finished_heads_take_no_more_steps(monkeypatch):
    sizes, step = [], StackedTrainer.step
    monkeypatch.setattr(StackedTrainer, "step", lambda self, *a: sizes.append(len(self)) or step(self, *a))
    settings = [  # the second creeps on
        Settings("linear", epochs=30, patience=2, lr=lr, select="loss") for lr in (0.3, 1e-4)
    ]
    fits = train_together(prepare_training(toy_view(n=200, splits="given", noise=3.0), settings[0]), settings)
    assert sizes[0] == 2 and sizes[-1] == 1
    assert len(fits[0].history) < len(fits[1].history) == 30


def test_the_way_is_the_faster_one_for_each_kind_of_head():
    for head, kind in {"linear": StackedTrainer, "mlp": StackedTrainer, "large": SequentialTrainer}.items():
        own, shape = torch.Generator(), (5, 8) if head == "large" else (8,)
        assert type(make_trainer([make_head(head, shape, 2, own)], [CrossEntropy(2)], [own], [Settings(head)])) is kind


def test_bf16_is_near_fp32_and_not_it(monkeypatch):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no products in bf16, nor can oneDNN emulate them")
    monkeypatch.setattr(job, "cpu_multiplies_bf16", lambda: True)
    view = toy_view(n=200, splits="given", noise=2.0)
    for head in ("linear", "large"):
        exact, rough = (train_head(view, head, epochs=2, precision=p) for p in ("fp32", "bf16"))
        a, b = (torch.cat([w.flatten() for w in run.model.state_dict().values()]) for run in (exact, rough))
        assert 0 < float((a - b).norm() / a.norm()) < 0.05
    monkeypatch.setattr(job, "cpu_multiplies_bf16", lambda: False)
    with pytest.raises(BadOption, match="no fast products in bf16"):
        train_head(view, "linear", precision="bf16")


def test_a_cpu_that_would_emulate_bf16_does_not_multiply_it():
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if platform.machine() != "x86_64" or not flags:
        pytest.skip("flags of an x86 are read here")
    assert cpu_multiplies_bf16() == bool({"avx512_bf16", "amx_bf16"} & {*flags})


def test_features_beyond_the_budget_are_read_batch_by_batch_to_the_same_end(monkeypatch):
    view = toy_view(n=400, splits="given", noise=2.0)
    view.reads.clear()
    run = train_head(view, "large", epochs=2, ram=0.0)
    assert len(view.reads) > 20 and run.config["reading"].startswith("from the shards, 32 rows")
    kept = train_head(view, "large", epochs=2)
    assert kept.config["reading"] == "from memory"
    # the same order of batches from memory gives the same head, to the bit
    monkeypatch.setattr(loop, "BalancedBatches", lambda labels, *_: BalancedBatches(labels, 32, 0, 32))
    again = train_head(view, "large", epochs=2)
    assert (again.path / "head.safetensors").read_bytes() == (run.path / "head.safetensors").read_bytes()


def test_a_shuffle_by_blocks_is_a_permutation_that_stays_near():
    rows, rng = np.arange(64 * BLOCK), np.random.default_rng(0)
    near = shuffle_rows(rows, rng, 4 * BLOCK)
    assert sorted(near) == list(rows) and (near != rows).mean() > 0.99
    assert all(len(set(part // BLOCK)) <= 4 for part in near.reshape(-1, 4 * BLOCK))
    everywhere = [len(set(part // BLOCK)) for part in shuffle_rows(rows, rng, None).reshape(-1, 4 * BLOCK)]
    assert min(everywhere) > 40
    order = torch.cat(PlainBatches(len(rows), 32, 0, 4 * BLOCK).epoch())
    assert sorted(order.tolist()) == list(rows)


def test_every_image_shows_one_of_its_versions_in_an_epoch():
    n, rng = 50, np.random.default_rng(0)
    order = list(torch.arange(n).repeat(2).split(32))  # every image twice
    places = torch.cat(sample_versions(order, n, 3, rng))
    assert torch.equal(places % n, torch.cat(order))
    assert torch.equal(places[:n], places[n:]), "one version an epoch"
    assert set((places // n).tolist()) == {0, 1, 2}
    again = torch.cat(sample_versions(order, n, 3, rng))
    assert not torch.equal(places, again)
    x = torch.arange(3 * n).float()[:, None]
    features = SplitData(x, torch.arange(n), versions=3)
    batch, y = features.batch(places)
    assert torch.equal(batch[:, 0].long(), places) and torch.equal(y, places % n)
    assert torch.equal(torch.cat(list(features.chunks()))[:, 0], x[:n, 0])


def test_a_head_sees_copies_of_training_images_only_and_its_first_lines_say_so(monkeypatch):
    """A view of 200 images with two copies of each training image behind them."""
    view = toy_view(n=200, splits="given", noise=2.0)
    train = np.array([i for i, split in enumerate(view.splits) if split == "train"])
    place = {int(i): [int(i), 200 + k, 200 + len(train) + k] for k, i in enumerate(train)}
    noise = torch.randn(2 * len(train), 8, generator=torch.Generator().manual_seed(1)).half()
    view.features["cls"] = torch.cat([view.features["cls"], view.features["cls"][train].repeat(2, 1) + noise])
    view.versions, view.augmented = np.zeros(200, np.int32), augmentation_of(2, "flip", 0)
    view.copies = lambda rows: np.array([place.get(int(i), [int(i)] * 3) for i in rows]).reshape(-1, 3)
    asked, said = [], []
    view.tensor = lambda output, rows: asked.append(np.asarray(rows)) or view.features[output][torch.from_numpy(rows)]
    run = train_head(view, "linear", epochs=3, say=said.append)
    assert "copies     2 augmented of each training image; each epoch shows one of the 3" in said
    of_train, val, test = asked
    assert sorted(of_train) == sorted({*train, *range(200, 200 + 2 * len(train))})
    assert max(val.max(), test.max()) < 200
    view.versions = view.augmented = None
    assert not torch.equal(train_head(view, "linear", epochs=3).model.ln.weight, run.model.ln.weight)


@pytest.mark.parametrize("kind", ["two classes", "three classes", "two labels"])
@pytest.mark.parametrize("products", [nullcontext, onednn_products])
@pytest.mark.parametrize("size", [1, 4, 5, 8])  # of images; three go through at once
def test_the_gradients_of_large_are_those_of_autograd_in_float64(size, products, kind, monkeypatch):
    if products is onednn_products and not onednn_is_exact():
        pytest.skip("this CPU computes such products in bfloat16")
    monkeypatch.setattr(large, "AT_ONCE", 3 * 256 * 12)
    own = torch.Generator().manual_seed(0)
    classes = 3 if kind == "three classes" else 2
    model = make_head("large", (5, 12), classes, own)
    weight = torch.tensor([0.5, 2.0, 1.0])[:classes]
    x, y = torch.randn(size, 5, 12, generator=own), torch.randint(classes, (size,), generator=own)
    make = CrossEntropy if kind != "two labels" else BinaryCrossEntropy
    if kind == "two labels":
        y = torch.tensor([[1.0, torch.nan], [0.0, 1.0]] * 4)[:size]
    exact, double = copy.deepcopy(model).double(), make(classes, weight.double(), 0.1)
    wanted = double(exact(x.double()), y.double() if y.is_floating_point() else y)
    wanted.backward()
    steps = LargeSteps(model, "fp32")
    steps.load(torch.zeros(9, 5, 12))  # a larger batch was there before
    steps.load(x)
    with products():
        found, z = steps(model, StackedLoss([make(classes, weight, 0.1)]), y)
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(z.double(), exact(x.double()).detach(), rtol=0, atol=1e-6)
    for parameter, other in zip(model.parameters(), exact.parameters(), strict=True):
        close = 2e-6 * float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad.double(), other.grad, atol=close, rtol=0)


def test_heads_of_a_loop_are_what_they_are_alone_with_and_without_dropout(monkeypatch):
    monkeypatch.setattr(job, "cpu_multiplies_bf16", lambda: True)  # where oneDNN emulates it, slowly
    view = toy_view(n=200, splits="given", noise=2.0)
    for precision in ("fp32", "bf16") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("fp32",):
        settings = [Settings("large", epochs=2, precision=precision, **more) for more in ({}, {"dropout": 0.3})]
        together = train_together(prepare_training(view, settings[0]), settings)
        for one, fit in zip(settings, together, strict=True):
            (alone,) = train_together(prepare_training(view, one), [one])
            for name, weight in alone.model.state_dict().items():
                assert torch.equal(fit.model.state_dict()[name], weight)


def test_products_go_to_onednn_where_they_are_float32_and_faster(tmp_path, monkeypatch):
    state = partial(torch._C._get_fp32_precision_getter, "mkldnn", "matmul")
    with exact_arithmetic(2):
        for gain, work in ((2.0, 1e9), (2.0, 1e3), (1.1, 1e9), (0, 1e9)):
            way = "onednn" if gain > 1.3 and work > 1e6 else "library"
            monkeypatch.setenv("FEATURECACHE_STATE", str(tmp_path / str(gain)))
            monkeypatch.setattr(engine, "onednn_gain", lambda gain=gain: gain)
            for _ in range(2):  # what is trained later has the same bits
                assert engine.onednn_is_faster() is (gain > 1.3)
                monkeypatch.setattr(engine, "onednn_gain", lambda: pytest.fail("measured again"))
            with engine.arithmetic_for(work) as products:
                assert (products, torch.get_num_threads()) == (way, 2 if work > 1e6 else 1)
                assert (state() == "bf16") is (way == "onednn")
            assert state() == "ieee" and torch.get_num_threads() == 2
        with engine.arithmetic_for(1e9, "cuda") as products:
            assert products == "library"


@pytest.mark.parametrize("faster", [True, False])
def test_a_run_says_whose_products_it_was_trained_with(faster, monkeypatch):
    monkeypatch.setattr(engine, "onednn_is_faster", lambda: faster)
    monkeypatch.setattr(engine, "onednn_products", nullcontext)  # on this CPU they may be no float32
    monkeypatch.setattr(engine, "WORTH_DIVIDING", 10_000)
    view = toy_view(n=200, splits="given", noise=2.0)
    runs = [train_head(view, head, epochs=1) for head in ("large", "linear")]
    assert [run.config["products"] for run in runs] == ["onednn" if faster else "library", "library"]


@pytest.mark.parametrize("kind", ["none", "zscore", "l2"])
def test_batches_in_memory_that_stays_are_the_batches(kind):
    own = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, 4, generator=own).half()
    scale = Standardize.fit(kind, lambda: [x.float()])
    resident = SplitData(x, torch.arange(10), scale, versions=2)
    read = SplitData(None, torch.arange(10), scale, 2, lambda rows: x[torch.from_numpy(rows)])
    order, seen = [torch.tensor([3, 12, 19]), torch.tensor([4, 1])], set()
    memory = torch.empty(3, 4, 4, dtype=torch.bfloat16)
    for data in (resident, read, SplitData(x.float(), torch.arange(10), scale, versions=2)):
        for rows, (part, y) in zip(order, data.batches(order), strict=True):
            wanted, labels = data.batch(rows)
            assert torch.equal(part, wanted) and torch.equal(y, labels)
            seen.add(part.data_ptr())
        for rows, (part, _) in zip(order, data.batches(order, lambda count, _: memory[:count, :-1]), strict=True):
            assert torch.equal(part, data.batch(rows)[0].bfloat16()) and part.data_ptr() == memory.data_ptr()
    assert len(seen) <= 3 and torch.equal(x, resident.x), "one for each way, and what is stored stays"
