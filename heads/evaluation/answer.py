"""The answer of a comparison: one sentence about the head that val puts first, against the reference or, where that is
itself the reference, against all others. Whether it is better is what `difference` decided: by interval and Holm's p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featurecache.formatting import counted, number, signed
from heads.evaluation.selection import selection_key
from heads.settings import measure_name, title

NAMED = 2  # heads of a kind that are named, best on val first
VERDICTS = ("better", "worse", "no difference shown", "not tested on the same images")
Difference = dict[str, Any] | None


def answer_of(record: dict[str, Any]) -> str:
    """``large on tokens is better than linear on cls by 0.055 [0.020, 0.090] AUROC on 624 test images; than ridge on
    cls: no difference shown.`` From the record of a comparison, by the measure that chooses; of one head its value."""
    lead, reference = measure_name(record["select"]), record["reference"]
    best, *others = sorted(record["families"], key=lambda family: selection_key([family], record["select"]))
    name, measure, groups = best["name"], title(lead, record["task"]), record["clusters"]
    images = f"on {counted(record['n_test'], 'test image')}"
    if groups["unit"] == "group":
        images += f" of {counted(groups['n'], 'group')}"
    if not others:
        return _alone(best, lead, measure, images, record["controls"])
    difference = {family["name"]: (family["difference"] or {}).get(lead) for family in record["families"]}
    if name == reference:
        return _sentence(name, {each["name"]: _reversed(difference[each["name"]]) for each in others}, measure, images)
    first = _sentence(name, {reference: difference[name]}, measure, images)
    kinds = _by_verdict({each["name"]: difference[each["name"]] for each in others if each["name"] != reference})
    words = [f"{verdict}: {_listed(names)}" for verdict, names in kinds.items() if names]
    return f"{first} The others against {reference}: {'; '.join(words)}." if words else first


def _alone(best: dict[str, Any], lead: str, measure: str, images: str, controls: Sequence[dict[str, Any]]) -> str:
    test = (best["test"] or {}).get(lead) or {"value": None, "low": None}
    ends = "" if test["low"] is None else f" [{number(test['low'])}, {number(test['high'])}]"
    values = [f"{each['name']} {number((each['test'] or {}).get(lead))}" for each in controls]
    beside = f"; without a backbone: {', '.join(values)}" if values else ""
    return f"{best['name']}: {measure} {number(test['value'])}{ends} {images}{beside}."


def _sentence(name: str, against: dict[str, Difference], measure: str, images: str) -> str:
    """``against``: of each other head the difference of ``name`` to it."""
    better, worse, same, apart = _by_verdict(against).values()
    clauses = []
    for verdict, names in zip(VERDICTS, (better, worse), strict=False):
        sizes = [f"{each} by {_size(against[each])} {measure}" for each in names]
        clauses += [f"{verdict} than {_listed(sizes)}"] if names else []
    if clauses:
        clauses[0] = f"{name} is {clauses[0]} {images}"
        clauses += [f"than {_listed(same)}: no difference shown"] if same else []
    elif same:
        one = against[same[0]] if len(same) == 1 else None
        numbers = f": {_numbers(one)} {measure}" if one else f" in {measure}"
        _, comma, decides = one["words"].partition("], ") if one else ("", "", "")  # Holm's p, against the interval
        why = f"{comma[1:]}{decides}"
        clauses.append(f"between {name} and {_listed(same)} no difference is shown{numbers} {images}{why}")
    if apart:
        clauses.append(f"{'it' if clauses else name} was not tested on the images of {_listed(apart)}")
    sentence = "; ".join(clauses)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence.startswith("between ") else f"{sentence}."


def _by_verdict(differences: dict[str, Difference]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for name, each in differences.items():
        kinds[each["words"].split(":")[0] if each else VERDICTS[-1]].append(name)
    return kinds


def _reversed(difference: Difference) -> Difference:
    """The other head's to this one."""
    if difference is None:
        return None
    verdict, turned = difference["words"].split(":")[0], {"better": "worse", "worse": "better"}
    ends = {"value": -difference["value"], "low": -difference["high"], "high": -difference["low"]}
    return ends | {"words": turned.get(verdict, difference["words"])}


def _size(difference: Difference) -> str:
    """How much better or worse, without a sign."""
    assert difference
    low, high = sorted(abs(difference[end]) for end in ("low", "high"))
    return f"{number(abs(difference['value']))} [{number(low)}, {number(high)}]"


def _numbers(difference: Difference) -> str:
    assert difference
    value, low, high = (signed_text(difference[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def signed_text(value: float) -> str:
    """`signed` in a sentence or on a page: with a minus sign, no hyphen."""
    return signed(value).replace("-", "−")


def _listed(names: Sequence[str]) -> str:
    """``a, b and 3 more``."""
    if len(names) <= NAMED:
        return " and ".join(names)
    return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more"
