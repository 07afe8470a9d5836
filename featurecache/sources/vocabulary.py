"""Vocabulary of what people bring: names of splits, spellings of one class, words for missing, yes and no, order.

One place for every source, folders, tables, arrays and hubs: ``split_name("Train Set")`` is train, and beside each
other ``brain_train`` and ``brain_test`` are train and test, for a word that all of them share says nothing.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from featurecache.errors import Reading, SeveralReadings, SourceError, UnknownSourceName, nearest
from featurecache.formatting import abbreviated, counted, join_names, shell_word, shell_words

# What people call their splits -> what we call them.
SPLITS = {
    **dict.fromkeys(("train", "training", "trn", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "validating", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "te", "holdout"), "test"),
}
# FER2013's two test sets: one to choose on, one to read once (Goodfellow et al. 2013, arXiv:1307.0414).
_WHOLE = {"public test": "val", "private test": "test", "hold out": "test", "held out": "test"}
# Test where there is a val (Food-11), val where there is a test; alone nobody knows.
_EITHER = frozenset(("eval", "evaluation"))
# Words beside one of these that do not make it anything else; also without a sign between (trainset, testimages).
_FILLERS = {
    "set", "sets", "split", "splits", "data", "dataset", "datasets", "image", "images", "img", "imgs", "pic", "pics",
    "picture", "pictures", "photo", "photos", "file", "files", "folder", "folders", "sample", "samples", "subset",
    "part", "phase", "seg", "all", "full", "final", "x", "y", "jpg", "jpeg", "png",
}  # fmt: skip
_JOINED = re.compile(f"({'|'.join(SPLITS)})({'|'.join(word for word in sorted(_FILLERS) if len(word) > 2)})")
# The name of somebody: patient00001 (CheXpert), subject-3, case_2a.
PERSON = re.compile(
    r"(patient|pat|subject|subj|sub|case|person|participant|pid|donor|animal|mouse)(id)?[\W_]*\d\w*", re.IGNORECASE
)
# Cells that mean "not known", lower case. ``None`` is Python's; ``none`` may be a class (none, mild, severe).
MISSING = frozenset(("", "nan", "na", "n/a", "#n/a", "<na>", "null", "nat", "-", "?"))
LETTER_CASE = ("ignore", "keep")  # --letter-case
RARE, FEW_RARE = 2, 20  # images of a class whose name may be another's misspelt; more such classes are no misspellings
YES_NO = {
    **dict.fromkeys(("1", "1.0", "1.00", "true", "yes", "y", "t", "positive", "present"), 1.0),
    **dict.fromkeys(("0", "0.0", "0.00", "false", "no", "n", "f", "negative", "absent"), 0.0),
}


def words_of(name: str) -> list[str]:
    """The words of a name, lower case: divided at signs, between camelCase and before and after digits."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words: list[str] = []
    for word in re.findall(r"[^\W\d_]+|\d+", text.lower()):
        joined = _JOINED.fullmatch(word)
        words += joined.groups() if joined else [word]
    return words


def split_name(name: str, shared: Collection[str] = ()) -> str | None:
    """train, val or test for a name that means one of them and nothing else; ``shared`` words do not count."""
    words = [word for word in words_of(name) if word not in shared and not re.fullmatch(r"(19|20)\d\d", word)]
    if (whole := _WHOLE.get(" ".join(words))) is not None:
        return whole
    meant = {SPLITS[word] for word in words if word in SPLITS}
    rest = [word for word in words if word not in SPLITS and word not in _FILLERS]
    return meant.pop() if len(meant) == 1 and not rest else None


def split_names_of(names: Iterable[str]) -> dict[str, str]:
    """The split of each of some names that stand beside each other, for those that are one. Words that all of two or
    more of them share (``brain_train``, ``brain_test``) say nothing of a split."""
    names = list(dict.fromkeys(names))
    words = [set(words_of(name)) for name in names]
    shared = set.intersection(*words) - SPLITS.keys() if len(names) > 1 else set()
    splits = {name: split for name in names if (split := split_name(name, shared)) is not None}
    either = [
        name for name, own in zip(names, words, strict=True) if own & _EITHER and own - shared - _FILLERS <= _EITHER
    ]
    lacking = {"val", "test"} - set(splits.values())
    return splits | dict.fromkeys(either, *lacking) if len(either) == len(lacking) == 1 else splits


def hints_at_split(name: str) -> set[str]:
    """The splits whose words stand in a name, whatever stands beside them (``trainA``, ``test_tube``)."""
    return {SPLITS[word] for word in words_of(name) if word in SPLITS and len(word) > 2}


def is_missing(cell: str) -> bool:
    """Whether a cell, or what Python or R writes for one, says that nobody knows."""
    return cell.strip() == "None" or cell.strip().lower() in MISSING


# -- spellings of one class


def spelling_key(name: str, letter_case: str | None = None) -> str:
    """What the spellings of one class share: letters without case (unless it is to be kept), Unicode form, and outer or
    doubled spaces."""
    text = unicodedata.normalize("NFC", name)
    return unicodedata.normalize("NFC", " ".join((text if letter_case == "keep" else text.lower()).split()))


def refuse_letter_case(where: str, names: Sequence[str]) -> None:
    """Raises SeveralReadings: names that may be one class or two."""
    shown = " and ".join(map(repr if "".join(names).isascii() else ascii, names))
    raise SeveralReadings(
        f"{where} has {shown}: one class or two? --letter-case ignore takes one, --letter-case keep two.",
        [
            Reading(f"{shown} are one class", {"letter_case": "ignore"}),
            Reading(f"{shown} are two classes", {"letter_case": "keep"}),
        ],
    )


def one_spelling(
    names: Mapping[str, int], where: str, letter_case: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """Each name -> the spelling of its class that most rows have; and a sentence for each class of several spellings.
    ``names`` counts rows. ``letter_case``: whether names that differ in it alone are one class (ignore) or two (keep).
    Raises SeveralReadings where two spellings may be two classes: a single letter (``A``, ``a``)."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in names:
        spellings[spelling_key(name, letter_case)].append(name)
    chosen, notes = dict[str, str](), list[str]()
    for key, several in spellings.items():
        best = max(several, key=lambda name: (names[name], name == name.strip(), name))
        best = unicodedata.normalize("NFC", " ".join(best.split()))
        ways = {unicodedata.normalize("NFC", " ".join(name.split())) for name in several}
        if len(ways) > 1 and len(key) == 1 and letter_case is None:
            refuse_letter_case(where, sorted(ways))
        chosen |= dict.fromkeys(several, best)
        if len(several) > 1:
            shown = [(repr if len(ways) == len(several) else ascii)(name) for name in sorted(several)]
            notes.append(f"{' and '.join(shown)} are spellings of one class, {best}.")
    return chosen, notes


def near_names(counts: Mapping[str, int], several: bool = False) -> list[str]:
    """A sentence for each class of one or two images whose name may be another's misspelt; ``counts`` has the images of
    each class. ``several``: images have several labels, which training does not merge."""
    rare, notes = [name for name, n in counts.items() if 0 < n <= RARE], list[str]()
    for name in rare if len(rare) <= FEW_RARE else ():
        if other := next((other for other, n in counts.items() if n > RARE and _is_near(name, other)), None):
            classes = [f"{other}={other},{name}", *(each for each in counts if each not in (name, other))]
            words = shell_words(word for each in classes[:6] for word in ("--classes", each))
            way = "" if several or {*",="} & {*name, *other} else f", or train with {words}{' …' * (len(classes) > 6)}"
            there = f"{counted(counts[name], 'image')}. Near: {other} ({counts[other]:,})"
            notes.append(f"class {name} has {there}. If they are one, rename it in the data{way}")
    return notes


def _is_near(name: str, other: str) -> bool:
    """Whether two names differ by signs and spaces or by one letter of one word, which has five or more and begins with
    the same one (``typical``, ``atypical`` are two classes); never where they differ in a number."""
    a, b = words_of(name), words_of(other)
    if (whole := "".join(a)) == "".join(b):
        return len(whole) > 4 and spelling_key(name) != spelling_key(other)  # else they are two by --letter-case
    pairs = [pair for pair in zip(a, b, strict=False) if pair[0] != pair[1]]
    if len(a) != len(b) or len(pairs) > 1:
        return False
    one, two = pairs[0]
    same = sum(block.size for block in difflib.SequenceMatcher(None, one, two).get_matching_blocks())
    long = min(len(one), len(two)) > 4 and same >= max(len(one), len(two)) - 1
    return long and one[0] == two[0] and (one + two).isalpha()


# -- order


def in_order(classes: Collection[str], task: str | None, order: Sequence[str] | None, where: str) -> list[str]:
    """Classes in the order of their labels: ``order`` where it was given, numbers as numbers (``9``, ``10``; ``grade
    2``, ``grade 10``), else the alphabet. Raises SourceError where ordinal classes have no order, or ``order`` names
    others."""
    if order is not None:
        keys = {spelling_key(name): name for name in classes}
        if sorted(map(spelling_key, order)) != sorted(map(spelling_key, classes)):
            others = [name for name in order if spelling_key(name) not in keys]
            near = nearest(others[0], classes) if others else ""
            raise UnknownSourceName(
                f"--order names {abbreviated(list(order))}, and {where} has {abbreviated(sorted(classes))}; name each "
                f"class once, from the lowest to the highest.{near}"
            )
        return [name if name in classes else keys[spelling_key(name)] for name in order]
    numbers = {name: number for name in classes if (number := _number_in(name)) is not None}
    alike = len({text for text, _ in numbers.values()}) == 1 and len(numbers) == len(classes)
    if alike and len({number for _, number in numbers.values()}) == len(numbers):
        return sorted(classes, key=lambda name: numbers[name][1])
    if task == "ordinal" and len(classes) > 2:
        raise SourceError(
            f"{where} has the classes {abbreviated(sorted(classes), 8)}, and their names are no numbers: say their "
            f"order from the lowest to the highest, --order {shell_word(join_names(sorted(classes)[:3]))},…"
        )
    return sorted(classes, key=lambda name: (_plain(name) is None, _plain(name) or 0.0, name))


def _plain(name: str) -> float | None:
    return float(name) if re.fullmatch(r"[-+]?\d+(\.\d+)?", name) else None


def _number_in(name: str) -> tuple[str, float] | None:
    """The text around the one number of a name (grade 2, KL3, 10), and the number; a minus only at its beginning."""
    parts = re.fullmatch(r"(-(?=\d)|\D*)(\d+(?:\.\d+)?)(\D*)", name)
    if parts is None:
        return None
    below = parts[1] == "-"
    return spelling_key(("" if below else parts[1]) + " " + parts[3]), float(("-" if below else "") + parts[2])
