"""Augmentation: copies of training images, drawn once and stored, ``--copies 2 --augment flip,rotate10,shift0.1``.

An augmentation is a list of steps. They are done in their order by torchvision's operations on the decoded image,
uint8 [3,H,W], before the backbone's own preprocessing. What a step leaves open (whether to flip, by how many degrees)
is drawn from the digest of the copy alone: BLAKE2b-128 of the canonical JSON of [digest of the image, augmentation,
number of the copy]. So a copy has the same pixels in any order, batch, thread or process, and may be made again years
later. It keeps the label of its image: flips are to be left out where the side decides (organs, eyes, hands, writing).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import BadOption, CacheError, nearest
from featurecache.files.records import canonical_json
from featurecache.formatting import exact_number
from featurecache.images import decoding
from featurecache.images.headers import EncodedImage

if TYPE_CHECKING:
    import torch

RULES = 1  # raised when a step makes other pixels than before
MOST_VIEWS = 10_000


def _around(middle: float, amount: float, drawn: float) -> float:
    """``drawn`` in [0, 1) spread evenly over middle ± amount."""
    return middle + amount * (2 * drawn - 1)


def _rotate(tv: Any, image: torch.Tensor, amount: float, drawn: Sequence[float]) -> Any:
    """Without ``fill``, which is black too but darkens the border twice (torchvision 0.26, `_apply_grid_transform`)."""
    return tv.rotate(image, _around(0, amount, drawn[0]), interpolation=tv.InterpolationMode.BILINEAR)


def _shift(tv: Any, image: torch.Tensor, amount: float, drawn: Sequence[float]) -> Any:
    """By whole pixels, so nothing is interpolated: a crop that begins outside is filled with black."""
    height, width = image.shape[-2:]
    down, right = (round(_around(0, amount * side, u)) for side, u in zip((height, width), drawn, strict=True))
    return tv.crop(image, -down, -right, height, width)


def _scale(tv: Any, image: torch.Tensor, amount: float, drawn: Sequence[float]) -> Any:
    how = {"angle": 0.0, "translate": [0, 0], "scale": _around(1, amount, drawn[0]), "shear": [0.0, 0.0]}
    return tv.affine(image, **how, interpolation=tv.InterpolationMode.BILINEAR)


@dataclass(frozen=True)
class Operation:
    """One word of ``--augment``. ``make`` takes torchvision's functional operations, the image uint8 [3,H,W], the
    amount and the numbers drawn, in [0, 1)."""

    form: str  # as it is typed
    about: str
    amount: str | None  # what the number behind the word is; None: there is none
    most: float  # the number is above 0 and at most this
    settled: dict[str, Any]  # what else decides the pixels
    draws: int
    make: Callable[[Any, torch.Tensor, float, Sequence[float]], torch.Tensor]


_HALF, _BLACK = {"probability": 0.5}, {"outside": "black"}
_BILINEAR = {"interpolation": "bilinear", **_BLACK}
# To add a step: an entry. Its words are in the key of every copy; a change of one raises RULES.
OPERATIONS: dict[str, Operation] = {
    "flip": Operation(
        "flip", "left and right exchanged, in half of the copies", None, 0, _HALF, 1,
        lambda tv, image, amount, drawn: tv.horizontal_flip(image) if drawn[0] < 0.5 else image,
    ),
    "vflip": Operation(
        "vflip", "top and bottom exchanged, in half of the copies", None, 0, _HALF, 1,
        lambda tv, image, amount, drawn: tv.vertical_flip(image) if drawn[0] < 0.5 else image,
    ),
    "rotate": Operation("rotate10", "turned by up to 10 degrees either way", "degrees", 180, _BILINEAR, 1, _rotate),
    "shift": Operation("shift0.1", "moved by up to a tenth of height and width", "fraction", 0.99, _BLACK, 2, _shift),
    "scale": Operation("scale0.1", "enlarged or made smaller by up to a tenth", "fraction", 0.9, _BILINEAR, 1, _scale),
    "brightness": Operation(
        "brightness0.2", "times 0.8 to 1.2", "fraction", 1, {}, 1,
        lambda tv, image, amount, drawn: tv.adjust_brightness(image, _around(1, amount, drawn[0])),
    ),
    "contrast": Operation(
        "contrast0.2", "contrast times 0.8 to 1.2", "fraction", 1, {}, 1,
        lambda tv, image, amount, drawn: tv.adjust_contrast(image, _around(1, amount, drawn[0])),
    ),
}  # fmt: skip
_FORMS = ", ".join(kind.form for kind in OPERATIONS.values())


@dataclass(frozen=True)
class AugmentationStep:
    word: str
    amount: float = 0.0  # 0 where the word takes none

    def __post_init__(self) -> None:
        if self.word not in OPERATIONS:
            raise BadOption(
                f'--augment: no step is called "{self.word}".{nearest(self.word, OPERATIONS)} There are {_FORMS}.'
            )
        kind = OPERATIONS[self.word]
        if kind.amount is None and self.amount:
            raise BadOption(f'--augment: "{self}": {self.word} takes no number.')
        if kind.amount and not 0 < self.amount <= kind.most:
            raise BadOption(
                f'--augment: "{self}": behind {self.word} stands a number ({kind.amount}) above 0 and at most '
                f"{kind.most:g}, such as {kind.form}."
            )

    def __str__(self) -> str:
        return self.word + (exact_number(self.amount) if self.amount else "")

    def to_dict(self) -> dict[str, Any]:
        kind = OPERATIONS[self.word]
        return {"step": self.word, **({kind.amount: self.amount} if kind.amount else {}), **kind.settled}


@dataclass(frozen=True)
class Augmentation:
    """Steps and the seed of what they draw. `str` gives the words again."""

    steps: tuple[AugmentationStep, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        words = [step.word for step in self.steps]
        twice = next((word for word in words if words.count(word) > 1), None)
        if not words or twice:
            what = f"{twice} stands there twice" if twice else "it names no step"
            raise BadOption(f"--augment: {what}; expected some of {_FORMS}, each once.")
        if not 0 <= self.seed < 1 << 63:
            raise BadOption(f"--augment-seed is {self.seed}; a whole number from 0 on is expected.")

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))

    def to_dict(self) -> dict[str, Any]:
        return {"rules": RULES, "seed": self.seed, "steps": [step.to_dict() for step in self.steps]}

    @classmethod
    def from_dict(cls, record: Any) -> Augmentation:
        """Raises CacheError for any other record than `to_dict` makes."""
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
            amounts = [(r["step"], r.get(OPERATIONS[r["step"]].amount, 0)) for r in record["steps"]]
            augmentation = cls(tuple(AugmentationStep(word, float(n)) for word, n in amounts), record["seed"])
            if canonical_json(augmentation.to_dict()) == canonical_json(record):
                return augmentation
        raise CacheError(f"its copies were made by steps that this featurecache has not ({str(record)[:200]!a}).")

    def digests(self, images: np.ndarray, copy: int) -> np.ndarray:
        """Of images S32 [n] the digests of copy number ``copy`` (1 …), S32 [n]."""
        behind = f'",{canonical_json(self.to_dict())},{copy}]'.encode()
        keys = (b'["' + digest + behind for digest in images.tolist())
        return np.array([hashlib.blake2b(key, digest_size=16).hexdigest() for key in keys], "S32")

    def apply(self, image: torch.Tensor, digest: bytes) -> torch.Tensor:
        """uint8 [3,H,W] → the copy of that ``digest``, of the same shape, colours interleaved in memory."""
        from torchvision.transforms.v2 import functional

        for number, step in enumerate(self.steps):
            kind = OPERATIONS[step.word]
            image = kind.make(functional, image, step.amount, uniform_draws(digest, number, kind.draws))
        return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)

    def copy_of(self, data: EncodedImage, digest: bytes) -> np.ndarray:
        """An image as its source has it → its copy of that ``digest``, uint8 [H,W,3]."""
        return self.apply(decoding.decode(data), digest).permute(1, 2, 0).numpy()


def uniform_draws(digest: bytes, step: int, count: int) -> list[float]:
    """``count`` numbers in [0, 1) for step number ``step`` of a copy: 53 bits each of BLAKE2b, so of no library's
    generator, whose stream may change."""
    drawn = hashlib.blake2b(b"%s %d" % (digest, step), digest_size=8 * count, person=b"augment").digest()
    return [(value >> 11) / (1 << 53) for value in np.frombuffer(drawn, "<u8").tolist()]


def parse_augmentation(text: str, seed: int = 0) -> Augmentation:
    """``flip,rotate10,shift0.1`` as an Augmentation. Raises BadOption."""
    steps = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([A-Za-z]+)(\d+\.?\d*|\.\d+)?", word)
        if match is None:
            raise BadOption(f'--augment: "{word}" is no step. There are {_FORMS}.')
        steps.append(AugmentationStep(match[1].lower(), float(match[2] or 0)))
    return Augmentation(tuple(steps), seed)


@dataclass(frozen=True)
class AugmentedCopies:
    """What a view says of its copies: how they were made, and how many an image has."""

    augmentation: Augmentation
    views: int

    def __str__(self) -> str:
        copies = "1 copy" if self.views == 1 else f"{self.views:,} copies"
        return f"{copies} by {self.augmentation}, seed {self.augmentation.seed}"

    def to_dict(self) -> dict[str, Any]:
        return {"views": self.views, "augment": self.augmentation.to_dict()}

    @classmethod
    def from_dict(cls, record: Any) -> AugmentedCopies:
        if not isinstance(record, dict) or set(record) != {"views", "augment"} or type(record["views"]) is not int:
            raise CacheError(f"what it says of its augmented copies is no record of them ({str(record)[:200]!a}).")
        if not 0 < record["views"] <= MOST_VIEWS:
            raise CacheError(f"it says that an image has {record['views']} augmented copies.")
        return cls(Augmentation.from_dict(record["augment"]), record["views"])


def augmentation_of(views: int | None, augment: str | None, seed: int) -> AugmentedCopies | None:
    """What ``--copies``, ``--augment`` and ``--augment-seed`` say together; None: no copies, or as they were."""
    if not views and (augment is not None or seed):
        option = "--augment" if augment is not None else "--augment-seed"
        raise BadOption(
            f"{option} needs the number of copies of each training image: --copies 2 --augment flip,rotate10"
        )
    if not views:
        return None
    if not 0 < views <= MOST_VIEWS:
        raise BadOption(f"--copies is {views}; a number from 0 to {MOST_VIEWS:,} is expected.")
    if augment is None:
        raise BadOption(f"--copies {views} needs --augment: how the copies are to differ, some of {_FORMS}.")
    return AugmentedCopies(parse_augmentation(augment, seed), views)


@dataclass(frozen=True)
class AugmentationPlan:
    """The copies among the images of an extraction. Distinct images have the numbers 0 … first − 1; copy c of the j-th
    of ``sources`` [S] has the number first + (c − 1)·S + j."""

    augmented: AugmentedCopies
    sources: np.ndarray = field(repr=False)  # int64 [S], ascending: numbers of the images that have copies
    first: int

    def __len__(self) -> int:
        return len(self.sources) * self.augmented.views

    def source(self, number: int) -> int:
        """The image that a number is, or is a copy of."""
        return number if number < self.first else int(self.sources[(number - self.first) % len(self.sources)])

    def numbers(self, images: np.ndarray, copy: int) -> np.ndarray:
        """Of images [n] that are among the sources, the numbers of copy ``copy``."""
        return self.first + (copy - 1) * len(self.sources) + np.searchsorted(self.sources, images)

    def with_copies(self, images: np.ndarray) -> np.ndarray:
        """A column of distinct images [first] continued for their copies."""
        return np.concatenate([images, *[images[self.sources]] * self.augmented.views])

    def digests(self, images: np.ndarray) -> np.ndarray:
        """S32 [first] continued by the digests of the copies."""
        of, numbers = self.augmented.augmentation, range(1, self.augmented.views + 1)
        return np.concatenate([images, *(of.digests(images[self.sources], copy) for copy in numbers)])
