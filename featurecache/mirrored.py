"""Where a flipped copy may mean something else than the image: a warning, never a refusal.

Whether a label depends on the side can be guessed from names only: classes called left and right (OS and OD for eyes),
or digits, letters and other writing. Where nothing is known of the images one general sentence is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from featurecache.augment import Augmentation

# Words in the names of classes, lower case, and of which flip they mean something else afterwards. Eyes: OD and OS.
SIDES = {
    "flip": {
        "left", "right", "l", "r", "os", "od", "lt", "rt", "lhs", "rhs", "sinistra", "dextra", "links", "rechts",
        "gauche", "droite", "izquierda", "derecha", "clockwise", "counterclockwise", "anticlockwise", "cw", "ccw",
    },
    "vflip": {"top", "bottom", "upper", "lower", "up", "down", "superior", "inferior", "above", "below"},
}  # fmt: skip
# Words in the name of the folder or file. MedMNIST's names (pneumoniamnist) are none of them.
WRITING = {
    "digit", "digits", "mnist", "emnist", "kmnist", "qmnist", "svhn", "letter", "letters", "character", "characters",
    "chars", "alphabet", "font", "fonts", "text", "ocr", "handwriting", "words", "plates", "signs", "gtsrb",
}  # fmt: skip
_CHARACTERS = 9  # classes of one character from which they are taken for writing; 0 and 1 alone are any two classes
_HOW = {"flip": "left to right", "vflip": "upside down"}
_SHOWN = 4  # names of classes in a sentence


def warnings(augmentation: Augmentation, classes: Sequence[str], source: dict[str, Any]) -> list[str]:
    """One sentence for each flip among the steps."""
    words = [step.word for step in augmentation.steps]
    return [_sentence(word, classes, str(source.get("data", ""))) for word in ("flip", "vflip") if word in words]


def _sentence(word: str, classes: Sequence[str], data: str) -> str:
    sided = [name for name in classes if SIDES[word] & set(_words_in(name))]
    if sided:
        return (
            f"{word} mirrors images {_HOW[word]} and keeps their labels, but {_shown(sided)} may depend on the side; "
            f"leave {word} out if so"
        )
    if _is_writing(classes, data):
        return f"{word} mirrors images {_HOW[word]}, and digits and letters are others then; leave {word} out"
    return (
        f"{word} mirrors images {_HOW[word]} and keeps their labels: leave it out where the side decides "
        "(organs, eyes, hands, writing)"
    )


def _is_writing(classes: Sequence[str], data: str) -> bool:
    single = sum(len(name.strip()) == 1 for name in classes)
    return single >= _CHARACTERS or bool(WRITING & set(_words_in(os.path.basename(data.rstrip("/")))))


def _words_in(name: str) -> Iterator[str]:
    """``LeftLung``, ``left_lung`` and ``lung L`` hold the words left, lung, l."""
    for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name):
        yield part.lower()


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
