"""Groups of images that belong to one person: columns known by name, persons in paths, and columns that only look so.

A group is never in two drawn splits. Known names are taken, the most encompassing first; a column that repeats where
ids do not and looks like an id is named, so that nobody draws across it unknowingly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from featurecache.formatting import abbreviated
from featurecache.sources.labels import role_columns
from featurecache.sources.vocabulary import is_missing, words_of

# A folder of a path that is a person: patient00001 (CheXpert), p10000032 (MIMIC-CXR), subject-3.
_PERSON = re.compile(r"(?:(?:patient|subject|person|participant|subj|sub|pat|case)[-_ ]?|p)\d+", re.IGNORECASE)
_EYE = re.compile(r"(.+)[-_ ](?:left|right|od|os)", re.IGNORECASE)  # EyePACS: 10_left, 10_right
_ID_WORDS = frozenset(("id", "ids", "uid", "number", "nr", "mrn", "accession", "barcode", "code", "person", "owner"))
_NUMBERED = frozenset(("case", "study", "exam", "series", "lesion"))  # in their bare form
_FEWEST, _SHARE = 3, 200  # a column of ids has at least so many values, and one in so many rows


def groups_in_paths(paths: Sequence[str]) -> tuple[list[str], str] | None:
    """The person of each image by its path, and what was understood; None where paths do not say it of all, or no
    person has two images."""
    folders = [path.replace("\\", "/").split("/")[:-1] for path in paths]
    persons = [next((part for part in reversed(parts) if _PERSON.fullmatch(part)), "") for parts in folders]
    if all(persons) and len(set(persons)) < len(persons) and len(set(persons)) > 1:
        return persons, "groups are the persons in the paths"
    stems = [re.sub(r"\.\w+$", "", path.replace("\\", "/").split("/")[-1]) for path in paths]
    eyes = [match[1] if (match := _EYE.fullmatch(stem)) else "" for stem in stems]
    if all(eyes) and 1 < len(set(eyes)) < len(eyes):
        return eyes, "groups are the persons of two eyes, by the names of the images"
    return None


def group_columns(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """The columns that may be the groups by their names; one called case or study has to number some, not to say yes
    and no or to name two cohorts."""
    kinds = {name: {cell for cell in cells if not is_missing(cell)} for name, cells in columns.items()}
    return role_columns("group", [n for n in columns if n.strip().lower() not in _NUMBERED or len(kinds[n]) >= _FEWEST])


def repeated_ids(columns: Mapping[str, Sequence[str]], labels: Sequence[object]) -> list[str]:
    """Those of further columns that look like ids and stand beside several images each."""
    found = []
    for name, cells in columns.items():
        kinds = Counter(cell for cell in cells if not is_missing(cell))
        repeats = _FEWEST <= len(kinds) < sum(kinds.values()) and len(kinds) * _SHARE >= len(cells)
        if repeats and _looks_like_ids(name, kinds) and len(set(zip(labels, cells, strict=True))) > len(set(labels)):
            found.append(name)
    return found


def repeated_ids_note(names: Sequence[str]) -> str:
    each = "stands" if len(names) == 1 else "stand"
    return (
        f"{abbreviated(names, 3)} {each} beside several images each, and may be of one person or lesion: --column "
        f"group={names[0]} keeps such images in one split."
    )


def _looks_like_ids(name: str, kinds: Mapping[str, int]) -> bool:
    codes = all(re.fullmatch(r"(?=.*\d)(?=.*[^\W\d])\S+", cell) for cell in kinds)  # letters and digits: HAM_0000118
    return bool(_ID_WORDS & set(words_of(name))) or (codes and len(kinds) > 2 * _FEWEST)
