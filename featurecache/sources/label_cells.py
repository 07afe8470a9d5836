"""Label cells of text: classes, several findings in one cell, one-hot columns, uncertain ones; what is no class.

N rows, L labels. ``labels_of_columns`` reads the label columns of a table:

- one column of names or whole numbers: its distinct values are the classes; spellings that differ in case, Unicode form
  or spaces are one class;
- one column whose cells hold several findings (``Effusion|Mass``, ``['mass', 'effusion']``): labels beside each other,
  "No Finding" alone a row of zeros. ``;`` and ``,`` divide only where their parts also stand alone, so that a class
  called ``mass, benign`` stays one;
- several columns of 1 and 0: labels beside each other, or, where each row has exactly one 1, classes;
- -1 beside 1 and 0 is "uncertain" (CheXpert, Irvin et al. 2019, arXiv:1901.07031, section 3, compares what to make of
  it): ignored unless ``--uncertain zero`` or ``one`` says otherwise.

Ages, measurements and captions are no classes; whoever means them as classes says so.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featurecache.errors import BadOption, Reading, SeveralReadings, SourceError
from featurecache.formatting import abbreviated, counted
from featurecache.sources.labels import class_labels, finite_number, several_labels
from featurecache.sources.vocabulary import LETTER_CASE, YES_NO, in_order, is_missing, one_spelling, spelling_key

UNCERTAIN = {"ignore": np.nan, "zero": 0.0, "one": 1.0}  # --uncertain
SIGNS = ("|", ";", ",")  # between the findings of a cell
NO_FINDING = frozenset(("no finding", "no findings", "nofinding", "normal", "none", "healthy"))
# Fewest different values that are looked at for being no classes, and most different numbers that may be some.
_FEWEST, _MOST_NUMBERS = 10, 30
_MOST_OTHERS = 6  # other columns that a question names
_MEASURED = "a measurement"
_MEASURES = {
    "age", "ages", "year", "years", "weight", "height", "width", "size", "length", "area", "volume", "score", "mm",
    "cm", "ml", "kg", "bmi",
}  # fmt: skip


@dataclass(frozen=True)
class LabelOptions:
    """How labels are to be read, as far as a user says it."""

    task: str | None = None
    uncertain: str | None = None  # ignore, zero, one
    letter_case: str | None = None  # ignore, keep: whether names that differ in it alone are one class

    def __post_init__(self) -> None:
        for name, choices in (("uncertain", tuple(UNCERTAIN)), ("letter_case", LETTER_CASE)):
            if (value := getattr(self, name)) not in (None, *choices):
                raise SourceError(f"--{name.replace('_', '-')} is {', '.join(choices)}, not {value!r}.")

    def refuse_unused(self, what: str) -> None:
        """Raises BadOption where labels are not text, of which alone these options say anything."""
        for name in ("uncertain", "letter_case"):
            if getattr(self, name):
                option = f"--{name.replace('_', '-')}"
                raise BadOption(
                    f"{option} is about labels that are text, of a table or by names; {what}. Leave it out."
                )


@dataclass
class LabelColumns:
    """The label columns of a table, how they are asked to be read, and what was understood."""

    where: str  # the table and the column, for sentences
    row: Callable[[int], str]
    how: LabelOptions = LabelOptions()
    splits: Sequence[str] = ()
    remarks: list[str] = field(default_factory=list)
    others: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)  # further columns of the table
    assumed: str | None = None  # what -1 was read as, where there was one


def labels_of_columns(columns: Mapping[str, Sequence[str]], reading: LabelColumns) -> tuple[np.ndarray, list[str]]:
    """int64 [N] or float32 [N, L], and the classes; what was understood is in ``reading``. Raises SourceError."""
    if len(columns) > 1:
        return _one_hot(several_labels_of_text(columns, reading), list(columns), reading)
    ((name, cells),) = columns.items()
    plain = {cell: _plain(cell) for cell in set(cells)}
    if reading.how.task == "multilabel" and all(_truth(value) is not None for value in plain.values() if value):
        return several_labels_of_text(columns, reading), [name]
    values = [plain[cell] for cell in cells]
    if reading.how.task in (None, "multilabel"):
        findings, sign = several_findings(values, reading)
        if findings is not None:
            return _labels_of_findings(name, findings, sign, reading)
    values = _without_uncertain(name, values, reading)
    chosen, notes = one_spelling(Counter(values), f"the column {name!r} of {reading.where}", reading.how.letter_case)
    reading.remarks += [note.rstrip(".") for note in notes]
    return labels_of_text([chosen[value] for value in _yes_or_no(values, reading)], name, reading)


# -- one column


def labels_of_text(values: Sequence[str], name: str, reading: LabelColumns) -> tuple[np.ndarray, list[str]]:
    """int64 [N] and the classes in their order: the different values; empty is none. With splits, a class has to occur
    in train: a head cannot learn what it never sees."""
    refuse_no_classes(values, name, reading)
    splits = reading.splits or [""] * len(values)
    has_train = "train" in splits
    shown = {value for value, split in zip(values, splits, strict=True) if split == "train" or not has_train} - {""}
    for index, value in enumerate(values):
        if value and value not in shown:
            wrong = f'the label "{value}" is in no train row (there: {abbreviated(sorted(shown)) or "none"})'
            raise SourceError(f"{reading.row(index)}: {wrong}. Correct it, or put images of that class into train.")
    classes = in_order(shown, None, None, reading.where)
    return class_labels(values, classes), classes


def _plain(cell: str) -> str:
    """A cell as it is compared: nothing where it is missing, and 1 for 1.0, which pandas makes of whole numbers beside
    an empty cell."""
    return "" if is_missing(cell) else re.sub(r"^([-+]?\d+)\.0+$", r"\1", cell)


def _truth(cell: str) -> float | None:
    """1 or 0 for yes and no; -1 for uncertain; None for another cell."""
    value = YES_NO.get(cell.lower())
    number = finite_number(cell) if value is None else value
    return -1.0 if cell.lower() == "uncertain" else number if number in (-1, 0, 1) else None


def _without_uncertain(name: str, values: list[str], reading: LabelColumns) -> list[str]:
    """The values with what -1 stands for in a column of numbers: none, or the class 0 or 1."""
    kinds = set(values) - {""}
    numbers = {finite_number(kind) for kind in kinds}
    if "-1" not in kinds or None in numbers or min(number or 0.0 for number in numbers) < -1:
        return values
    if kinds == {"-1", "1"} and reading.how.uncertain is None:
        if reading.how.task is not None:
            return values
        words = {"ignore": "no label", "zero": "0", "one": "1"}
        uncertain = [Reading(f"-1 is uncertain, read as {word}", {"uncertain": key}) for key, word in words.items()]
        raise SeveralReadings(
            f"the column {name!r} of {reading.where} holds 1 and -1: two classes (--task binary), or is -1 uncertain "
            "(--uncertain ignore, zero or one)?",
            [Reading("1 and -1 are two classes", {"task": "binary"}), *uncertain],
        )
    meaning = reading.how.uncertain or "ignore"
    if meaning != "ignore" and not kinds <= {"-1", "0", "1"}:
        raise SourceError(
            f"--uncertain {meaning} is about labels of 1, 0 and -1; the column {name!r} of {reading.where} holds "
            f"{abbreviated(sorted(kinds))}."
        )
    _remark_uncertain(values.count("-1"), meaning, reading)
    return [{"ignore": "", "zero": "0", "one": "1"}[meaning] if value == "-1" else value for value in values]


def _remark_uncertain(count: int, meaning: str, reading: LabelColumns) -> None:
    reading.assumed = meaning
    read_as = {"ignore": "unknown (--uncertain zero or one reads it otherwise)", "zero": "0", "one": "1"}[meaning]
    reading.remarks.append(f"-1 ({counted(count, 'cell')}) is read as {read_as}")


def _yes_or_no(values: list[str], reading: LabelColumns) -> list[str]:
    """One word for each of yes and no where a column mixes several (``1``, ``yes``, ``True``)."""
    counts = Counter(value for value in values if value)
    truths = {value: YES_NO.get(value.lower()) for value in counts}
    words = {value.lower() for value in counts}
    if None in truths.values() or len(words) < 3 or any(len(word) == 1 and word.isalpha() for word in words):
        return values
    chosen = {
        truth: max((v for v in counts if truths[v] == truth), key=lambda v: counts[v]) for truth in truths.values()
    }
    reading.remarks.append(f"{abbreviated(sorted(counts))} are read as {' and '.join(sorted(chosen.values()))}")
    return [chosen[truths[value]] if value else "" for value in values]


def refuse_no_classes(values: Sequence[str], name: str, reading: LabelColumns) -> None:
    """Refuses ages, measurements and captions as classes, unless the task says that they are some. Raises
    SeveralReadings: each value is one, or the labels are in another column."""
    if reading.how.task is not None or not (meant := _no_classes(name, values)):
        return
    present = [value for value in values if value]
    kinds, what = sorted(set(present)), "numbers" if meant == _MEASURED else "texts"
    others = {other: {_plain(str(cell)) for cell in cells} - {""} for other, cells in reading.others.items()}
    like = [o for o, cells in reading.others.items() if len(others[o]) > 1 and not _no_classes(o, cells, fewest=2)]
    raise SeveralReadings(
        f"the label column {name!r} of {reading.where} holds {len(kinds):,} different {what} in {len(present):,} rows "
        f"({abbreviated(kinds, 3)}): {meant}, no classes? Labels are classes here; regression is not offered. "
        "--task multiclass takes each for a class, --column label=NAME names another column.",
        [
            Reading(f"each of the {len(kinds):,} {what} is a class", {"task": "multiclass"}),
            *(
                Reading(f"the labels are in {other} ({abbreviated(others[other], 3)})", {"columns": {"label": other}})
                for other in like[:_MOST_OTHERS]
            ),
        ],
    )


def _no_classes(name: str, values: Sequence[Any] | np.ndarray, fewest: int = _FEWEST) -> str:
    """What a column with at least so many different values holds that are no classes; nothing where they may be."""
    present = [cell for value in values if (cell := _plain(str(value)))]
    kinds = set(present)
    if len(kinds) < fewest:
        return ""
    counted = [number for kind in kinds if (number := finite_number(kind)) is not None]
    is_number = len(counted) == len(kinds)
    fractions = is_number and any(number != int(number) for number in counted)
    runs = is_number and not fractions and min(counted) in (0, 1) and max(counted) - min(counted) == len(kinds) - 1
    measured = bool(_MEASURES & set(re.findall(r"[a-z]+", name.lower())))
    many = is_number and len(kinds) > _MOST_NUMBERS and (measured or not runs)
    if not (fractions or many or 2 * len(kinds) > len(present)):
        return ""
    return _MEASURED if is_number else "captions or ids"


# -- several findings in one cell


def several_findings(values: Sequence[str], reading: LabelColumns) -> tuple[list[list[str] | None] | None, str]:
    """The findings of each cell (None: missing) and the sign between them; no findings where cells hold one class each.
    With the task multilabel each cell holds at least one. Raises SourceError where a sign may divide or not."""
    filled = set(values) - {""}
    lists = {cell: _list(cell) for cell in filled}
    if filled and all(several is not None for several in lists.values()):
        return [lists[value] if value else None for value in values], "[]"
    asked = reading.how.task == "multilabel"
    for sign in SIGNS:
        parts = {cell: [part.strip() for part in cell.split(sign) if part.strip()] for cell in filled}
        joined = {cell for cell in filled if len(parts[cell]) > 1}
        if joined and (asked or sign == "|" or _recombine(parts, joined, sign, reading)):
            return [parts[value] if value else None for value in values], sign
    return ([[value] if value else None for value in values], "") if asked else (None, "")


def _recombine(parts: dict[str, list[str]], joined: set[str], sign: str, reading: LabelColumns) -> bool:
    """Whether all that a sign divides also stands alone or in other cells."""
    alone = {part for cell in parts.keys() - joined for part in parts[cell]}
    uses = Counter(part for cell in joined for part in set(parts[cell]))
    if not all(part in alone or uses[part] > 1 for part in uses):
        return False
    if alone & uses.keys():
        return True
    raise SeveralReadings(
        f'{reading.where} has labels like "{min(joined)}": one class, or several findings divided by "{sign}"? Say '
        "--task multiclass for classes, --task multilabel for findings.",
        [
            Reading("each cell is one class", {"task": "multiclass"}),
            Reading(f'findings divided by "{sign}"', {"task": "multilabel"}),
        ],
    )


def _list(cell: str) -> list[str] | None:
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return [str(entry).strip() for entry in value] if isinstance(value, list) else None


def _labels_of_findings(
    name: str, findings: Sequence[list[str] | None], sign: str, reading: LabelColumns
) -> tuple[np.ndarray, list[str]]:
    """float32 [N, L] of 1 and 0; NaN rows where the cell is missing; "No Finding" alone is a row of zeros."""
    rows = [None if row is None else [part for part in row if not is_missing(part)] for row in findings]
    counts = Counter(part for row in rows for part in row or ())
    chosen, notes = one_spelling(counts, f"the column {name!r} of {reading.where}", reading.how.letter_case)
    rows = [None if row is None else [chosen[part] for part in row] for row in rows]
    names = {part for row in rows for part in row or ()}
    mixed = {part for row in rows if row and len(set(row)) > 1 for part in row}
    nothing = {part for part in names - mixed if spelling_key(part.replace("_", " ")) in NO_FINDING}
    classes = sorted(names - nothing)
    place = {part: number for number, part in enumerate(classes)}
    numbers = [None if row is None else [place[part] for part in row if part in place] for row in rows]
    how = "lists" if sign == "[]" else f'divided by "{sign}"' if sign else "one a row"
    none = f"; {abbreviated(sorted(nothing))} is a row without any" if nothing else ""
    reading.remarks += [
        *(note.rstrip(".") for note in notes),
        f"{name} holds several findings, {how}: {len(classes):,} labels{none}",
    ]
    return several_labels(numbers, len(classes)), classes


# -- several columns


def several_labels_of_text(columns: Mapping[str, Sequence[str]], reading: LabelColumns) -> np.ndarray:
    """float32 [N, L]: 1, 0, NaN for unknown; -1 as ``uncertain`` has it. Raises SourceError."""
    meaning = reading.how.uncertain or "ignore"
    labels = np.empty((len(columns), len(next(iter(columns.values())))), np.float32)
    for number, (name, cells) in enumerate(columns.items()):
        values = {cell: np.nan if is_missing(cell) else _truth(cell) for cell in set(cells)}
        if None in values.values():
            index = next(k for k, cell in enumerate(cells) if values[cell] is None)
            wrong = f'{reading.row(index)}: {name!r} is "{cells[index]}", expected 1 or 0, -1 where it is uncertain'
            raise SourceError(f"{wrong}, or nothing where it is not known.")
        labels[number] = [values[cell] for cell in cells]
    uncertain, blank = int((labels == -1).sum()), int(np.isnan(labels).sum())
    if uncertain:
        labels[labels == -1] = UNCERTAIN[meaning]
        _remark_uncertain(uncertain, meaning, reading)
    if blank:
        reading.remarks.append(f"empty cells of labels ({blank:,}) are unknown")
    return labels.T.copy()


def _one_hot(labels: np.ndarray, names: list[str], reading: LabelColumns) -> tuple[np.ndarray, list[str]]:
    """Several label columns as they are, or as classes: where each row has exactly one 1, or the task asks for it. A
    row without any cell has no class."""
    known, asked = ~np.isnan(labels), reading.how.task in ("binary", "multiclass", "ordinal")
    wrong = np.flatnonzero(known.any(1) & ~(known.all(1) & (np.nansum(labels, 1) == 1)))
    if reading.how.task in ("multilabel", "unlabelled") or not known.any() or (len(wrong) and not asked):
        return labels, names
    if len(wrong):
        there = ", ".join(f"{name} {value:g}" for name, value in zip(names, labels[wrong[0]], strict=True))
        raise SourceError(
            f"{reading.row(int(wrong[0]))} has {there}: for the task {reading.how.task} each row needs exactly one 1. "
            "--task multilabel takes the columns for labels beside each other."
        )
    found = np.argmax(np.nan_to_num(labels), 1)
    how = "each row has exactly one 1 (--task multilabel takes them for labels)"
    reading.remarks.append(f"the columns {abbreviated(names, 3)} are classes: {how}")
    return np.where(known.any(1), found, -1), names


def one_hot_columns(columns: Mapping[str, Sequence[str] | np.ndarray]) -> list[str]:
    """Those of further columns that hold 1 and 0 alone, where each row has exactly one 1 among them; else none."""
    ones = {name: np.asarray(cells) for name, cells in columns.items() if isinstance(cells, np.ndarray)}
    ones = {name: cells for name, cells in ones.items() if np.isin(cells, (0, 1)).all()}
    return list(ones) if len(ones) > 1 and (np.sum(list(ones.values()), 0) == 1).all() else []
