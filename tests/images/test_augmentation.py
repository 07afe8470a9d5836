"""Steps of augmentation: each against torchvision's own transform, their words, digests and records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.command import call
from support.pictures import picture
from torchvision.transforms import v2

from featurecache.errors import BadOption
from featurecache.files.records import canonical_json
from featurecache.images.augmentation import (
    OPERATIONS,
    RULES,
    Augmentation,
    AugmentationStep,
    AugmentedCopies,
    augmentation_of,
    parse_augmentation,
    uniform_draws,
)

IMAGE = torch.from_numpy(np.array(picture(3, 41, 30))).permute(2, 0, 1)
BILINEAR = v2.InterpolationMode.BILINEAR


def moved(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    result = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for y in range(max(0, down), min(height, height + down)):
        for x in range(max(0, right), min(width, width + right)):
            result[:, y, x] = image[:, y - down, x - right]
    return result


REFERENCE = {  # torchvision's own transforms, held at one value
    "flip": lambda u: v2.RandomHorizontalFlip(float(u[0] < 0.5)),
    "vflip": lambda u: v2.RandomVerticalFlip(float(u[0] < 0.5)),
    "rotate30": lambda u: v2.RandomRotation((60 * u[0] - 30,) * 2, interpolation=BILINEAR, fill=None),
    "scale0.2": lambda u: v2.RandomAffine(0, scale=(0.8 + 0.4 * u[0],) * 2, interpolation=BILINEAR, fill=None),
    "brightness0.5": lambda u: v2.ColorJitter(brightness=(0.5 + u[0],) * 2),
    "contrast0.5": lambda u: v2.ColorJitter(contrast=(0.5 + u[0],) * 2),
    "shift0.2": lambda u: lambda image: moved(image, round(6 * (2 * u[0] - 1)), round(8.2 * (2 * u[1] - 1))),
}


@pytest.mark.parametrize("word", REFERENCE)
def test_each_step_is_torchvisions(word):
    copies = set()
    for number in range(6):
        digest, augmentation = f"{number:032x}".encode(), parse_augmentation(word)
        copy = augmentation.apply(IMAGE, digest)
        expected = REFERENCE[word](uniform_draws(digest, 0, OPERATIONS[augmentation.steps[0].word].draws))(IMAGE)
        assert torch.equal(copy, expected) and copy.dtype == torch.uint8
        copies.add(copy.numpy().tobytes())
    assert len(copies) == (2 if "flip" in word else 6)


def test_every_step_has_a_reference():
    assert {parse_augmentation(word).steps[0].word for word in REFERENCE} == set(OPERATIONS)


def test_steps_are_done_in_their_order():
    one, other = (
        parse_augmentation(words).apply(IMAGE, b"1" * 32) for words in ("rotate45,shift0.3", "shift0.3,rotate45")
    )
    assert not torch.equal(one, other)


def test_what_is_drawn_are_bits_of_blake2b_spread_evenly_and_each_copy_has_its_own():
    digests = parse_augmentation("shift0.1").digests(np.array([f"{k:032x}" for k in range(500)], "S32"), 1)
    values = np.array([uniform_draws(digest, 0, 2) for digest in digests.tolist()])
    bits = hashlib.blake2b(digests[7] + b" 0", digest_size=16, person=b"augment").digest()
    assert values[7].tolist() == [(int.from_bytes(bits[k : k + 8], "little") >> 11) / 2**53 for k in (0, 8)]
    assert scipy.stats.kstest(values.ravel(), "uniform").pvalue > 0.01
    assert abs(scipy.stats.pearsonr(values[:, 0], values[:, 1]).statistic) < 0.1
    assert len(np.unique(values)) == 1000


def test_the_digest_of_a_copy_knows_the_image_the_steps_the_copy_and_the_seed():
    images = np.array(["a" * 32, "b" * 32], "S32")
    kinds = [("flip,rotate10,shift0.1",), ("flip,rotate10,shift0.2",), ("rotate10,flip,shift0.1",)]
    kinds.append((*kinds[0], 1))
    digests = [parse_augmentation(*kind).digests(images, copy).tolist() for kind in kinds for copy in (1, 2)]
    assert len({digest for pair in digests for digest in pair}) == 16
    steps = [
        {"step": "flip", "probability": 0.5},
        {"step": "rotate", "degrees": 10.0, "interpolation": "bilinear", "outside": "black"},
        {"step": "shift", "fraction": 0.1, "outside": "black"},
    ]
    record = ["a" * 32, {"rules": 1, "seed": 0, "steps": steps}, 1]
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert digests[0][0] == hashlib.blake2b(text.encode(), digest_size=16).hexdigest().encode()


def steps_of(words: list[str]) -> st.SearchStrategy[tuple[AugmentationStep, ...]]:
    amounts = {word: st.floats(0.01, 0.89) if OPERATIONS[word].amount else st.just(0.0) for word in words}
    return st.tuples(*(st.builds(AugmentationStep, st.just(word), amounts[word]) for word in words))


STEPS = st.lists(st.sampled_from(list(OPERATIONS)), min_size=1, unique=True).flatmap(steps_of)


@given(st.builds(AugmentedCopies, st.builds(Augmentation, STEPS, st.integers(0, 2**62)), st.integers(1, 100)))
def test_the_record_gives_the_augmentation_again(copies):
    assert AugmentedCopies.from_dict(json.loads(canonical_json(copies.to_dict()))) == copies


def test_words_give_the_augmentation_again():
    augmentation = parse_augmentation(" Flip, rotate010.50 ,shift.1")
    assert str(augmentation) == "flip,rotate10.5,shift0.1"
    assert parse_augmentation(str(augmentation)) == augmentation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flop", 'no step is called "flop". Near: flip'),
        ("flip,rotate", "behind rotate stands a number (degrees) above 0 and at most 180, such as rotate10"),
        ("rotate200", "at most 180"),
        ("shift1.5", "at most 0.99"),
        ("shift0", "above 0"),
        ("flip2", "flip takes no number"),
        ("flip,vflip,flip", "flip stands there twice"),
        ("", "names no step"),
        (" , ", "names no step"),
        ("rotate-5", '"rotate-5" is no step'),
        ("rotate1e2", '"rotate1e2" is no step'),
    ],
)
def test_steps_that_are_not_understood(text, message):
    with pytest.raises(BadOption) as error:
        parse_augmentation(text)
    assert message in str(error.value)
    assert "takes no number" in message or any(kind.form in str(error.value) for kind in OPERATIONS.values())


@pytest.mark.parametrize(
    ("views", "text", "seed", "message"),
    [
        (None, "flip", 0, "--augment needs the number of copies"),
        (0, "flip", 0, "--augment needs the number of copies"),
        (None, None, 3, "--augment-seed needs"),
        (2, None, 0, "--copies 2 needs --augment"),
        (-1, "flip", 0, "--copies is -1"),
        (10_001, "flip", 0, "from 0 to 10,000"),
        (1, "flip", -1, "--augment-seed is -1"),
    ],
)
def test_options_that_contradict_each_other(views, text, seed, message):
    with pytest.raises(BadOption, match=message):
        augmentation_of(views, text, seed)


def test_a_mistake_is_found_before_anything_is_read(tmp_path: Path):
    done = call("extract", "--backbone", "none-there", "--data", tmp_path, "--copies", 1, "--augment", "flop")
    assert done.exit_code == 2
    assert "flip, vflip, rotate10, shift0.1, scale0.1, brightness0.2, contrast0.2" in done.output


def test_the_help_says_where_flips_are_wrong():
    assert "leave flips out where the side decides" in " ".join(call("extract", "--help", "copies").output.split())
    assert RULES == 1
