"""What the heads of a family said of their test images, in an order that is the same for every head on those images.

Rows are ordered by digest, labels and id, so heads on other views of the same images, extracted in any order by any
backbone, can be compared image by image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from heads.intervals import Part
from heads.weighted import Said

if TYPE_CHECKING:
    from heads.answers import Answers
    from heads.families import Family
    from heads.runs import Run


@dataclass(frozen=True)
class Heard:
    """The sets of test images of one family, and for each the runs with their answers in the common order."""

    parts: tuple[Part, ...]
    runs: tuple[tuple[Run, ...], ...]
    answers: tuple[tuple[Answers, ...], ...]

    @property
    def grouped(self) -> bool:
        return all(answers.grouped for same in self.answers for answers in same)


def ordered(answers: Answers) -> tuple[Answers, str]:
    """The same in the common order, and a word that is equal for equal images with equal labels."""
    y = answers.y.reshape(len(answers.ids), -1)
    columns = [np.array(answers.ids), *np.nan_to_num(y.T[::-1].astype(np.float64), nan=-1), answers.digests]
    order = np.lexsort(columns)
    text = answers.digests[order].tobytes() + y[order].astype(np.float64).tobytes()
    rows = {name: getattr(answers, name)[order] for name in ("digests", "clusters", "y", "raw", "z")}
    word = hashlib.blake2b(text, digest_size=16).hexdigest()
    return replace(answers, ids=[answers.ids[i] for i in order], **rows), word


def said_of(run: Run, answers: Answers) -> Said:
    return Said(run.task, answers.z, answers.y, run.positive, run.calibration.thresholds)


def hear(pairs: Iterable[tuple[Run, Answers]]) -> Heard:
    """From runs and what each said of images it was not trained on."""
    found: dict[str, list[tuple[Run, Answers]]] = {}
    for run, answers in pairs:
        mine, key = ordered(answers)
        found.setdefault(key, []).append((run, mine))
    parts = []
    for key, same in found.items():
        trained = float(np.mean([run.config["splits"]["images"]["train"] for run, _ in same]))
        parts.append(Part(key, same[0][1].clusters, tuple(said_of(*pair) for pair in same), trained))
    runs = tuple(tuple(run for run, _ in same) for same in found.values())
    return Heard(tuple(parts), runs, tuple(tuple(answers for _, answers in same) for same in found.values()))


def hear_test(family: Family) -> Heard:
    return hear((run, run.answers("test")) for run in family.runs)


def same_clusters(heard: Sequence[Heard]) -> list[Heard]:
    """One division into clusters for each set of images: that with the fewest, where views know of groups or do not."""
    best: dict[str, Part] = {}
    for part in (part for each in heard for part in each.parts):
        if part.key not in best or part.units.count < best[part.key].units.count:
            best[part.key] = part
    return [
        replace(each, parts=tuple(replace(part, clusters=best[part.key].clusters) for part in each.parts))
        for each in heard
    ]
