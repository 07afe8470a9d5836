"""The classes of a finished run in another view, matched by name: never by place, and never by guess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import BadOption, nearest
from heads.data import has_label

if TYPE_CHECKING:
    from heads.pixels import AnyView
    from heads.runs import Run


@dataclass(frozen=True)
class Matched:
    """``labels`` of every row of the view, as the run counts its classes: int64 [N], -1 for none; of several labels
    float32 [N, L], NaN for unknown. ``left_out``: images of each class that the head does not know."""

    labels: np.ndarray
    members: dict[str, list[str]]  # class of the run -> what the view calls it
    left_out: dict[str, int]
    notes: tuple[str, ...]

    @property
    def usable(self) -> np.ndarray:
        return has_label(self.labels)

    def told(self, run: Run, rows: np.ndarray) -> list[dict[str, Any]]:
        """For each class of the run what it is called in the view, and how many of these rows it has."""
        y = self.labels[rows]
        counts = (y == 1).sum(axis=0) if y.ndim == 2 else np.bincount(y, minlength=len(run.classes))
        return [
            {"class": name, "in_view": self.members[name], "n": int(n)}
            for name, n in zip(run.classes, counts, strict=True)
        ]


def match_classes(run: Run, view: AnyView, given: Sequence[str] = ()) -> Matched:
    """``given``: "NAME=A,B" for a class of the run that the view calls otherwise, "NAME=" for one that it has not.
    Raises BadOption where a class is not found: a class under another name would be missing without a word."""
    if view.task == "unlabelled":
        raise BadOption(f"{view.label} carries no labels to evaluate against. featurecache predict needs none.")
    if (view.task == "multilabel") != (run.task == "multilabel"):
        raise BadOption(
            f"{run.path} is a {run.task} head and the labels of {view.label} are {view.task}: labels beside each other "
            "and classes that exclude each other do not match."
        )
    members = _members(run, view, _given(run, view, given))
    taken: dict[str, str] = {}
    for name, own in members.items():
        for word in own:
            if taken.setdefault(word, name) != name:
                raise BadOption(f"{word} of {view.label} cannot be both {taken[word]} and {name} of the run.")
    absent = [name for name, own in members.items() if not own]
    if len(members) - len(absent) < 2 and run.task != "multilabel":
        raise BadOption(f"{view.label} has fewer than two classes of the run; there is nothing to tell apart.")
    labels = _labels(run, view, members)
    left_out = _left_out(view, taken) if run.task != "multilabel" else {}
    notes = [f"{view.label} has no {name}: measures of that class are undefined" for name in absent]
    if left_out:
        count = sum(left_out.values())
        notes.append(f"{count:,} images of classes that the head does not know are left out ({_few(left_out)})")
    if unlabelled := int((~has_label(np.asarray(view.labels))).sum()):
        notes.append(f"{unlabelled:,} images carry no label and are left out")
    return Matched(labels, members, left_out, tuple(notes))


def _given(run: Run, view: AnyView, given: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, words = text.partition("=")
        if name not in run.classes or not equals:
            raise BadOption(
                f"--classes {text}: expected NAME=A,B with a class of the run ({', '.join(run.classes[:12])}) before "
                f"the = and what {view.label} calls it behind.{nearest(name, run.classes)}"
            )
        parts = [words] if words in view.classes else [word.strip() for word in words.split(",") if word.strip()]
        if unknown := [word for word in parts if word not in view.classes]:
            raise BadOption(
                f"--classes {text}: {view.label} has no class {unknown[0]!r}; it has {', '.join(view.classes[:12])}."
            )
        found[name] = parts
    return found


def _members(run: Run, view: AnyView, given: dict[str, list[str]]) -> dict[str, list[str]]:
    """Class of the run -> classes of the view: as given, of the same name, or those it was merged from in training."""
    merged = {}
    for text in run.config["settings"].get("classes") or ():
        name, _, words = text.partition("=")
        merged[name] = [word.strip() for word in words.split(",") if word.strip()]
    found = {}
    for name in run.classes:
        parts = [word for word in merged.get(name, ()) if word in view.classes]
        if name in given:
            found[name] = given[name]
        elif name in view.classes:
            found[name] = [name]
        elif parts:
            found[name] = parts
        else:
            raise BadOption(
                f"{view.label} has no class {name!r}, which {run.path} tells apart; it has "
                f"{', '.join(view.classes[:12])}.{nearest(name, view.classes)} --classes '{name}=…' says what it is "
                f"called there, --classes '{name}=' that there is none."
            )
    return found


def _labels(run: Run, view: AnyView, members: dict[str, list[str]]) -> np.ndarray:
    labels = np.asarray(view.labels)
    places = [[view.classes.index(word) for word in members[name]] for name in run.classes]
    if run.task == "multilabel":
        found = np.full((len(labels), len(places)), np.nan, dtype=np.float32)
        for c, own in enumerate(places):
            if own:
                column = labels[:, own]
                known = ~np.isnan(column)
                any_yes = (np.nan_to_num(column) == 1).any(axis=1)
                found[:, c] = np.where(any_yes, 1.0, np.where(known.all(axis=1), 0.0, np.nan))
        return found
    recode = np.full(len(view.classes) + 1, -1, dtype=np.int64)  # the last entry serves label -1
    for c, own in enumerate(places):
        recode[own] = c
    return recode[labels.astype(np.int64)]


def _left_out(view: AnyView, taken: dict[str, str]) -> dict[str, int]:
    labels = np.asarray(view.labels)
    counts = np.bincount(labels[labels >= 0], minlength=len(view.classes))
    return {name: int(n) for name, n in zip(view.classes, counts, strict=True) if name not in taken and n}


def _few(counts: dict[str, int]) -> str:
    words = [f"{name} {n:,}" for name, n in counts.items()]
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "")
