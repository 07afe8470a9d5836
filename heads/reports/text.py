"""Tables of text: the numbers of runs, comparisons and sweeps in aligned columns, and the words for them on a page.

Every value comes from a record or a run; nothing is measured here. Runs and families stand best on val first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from featurecache.formatting import abbreviated, aligned, columns, counted, number, one_line
from heads.evaluation.answer import signed_text
from heads.evaluation.comparison import compare
from heads.evaluation.costs import COSTS, cost_rows, cost_text, devices_words, run_cost, run_cost_line
from heads.evaluation.families import families_of, fraction_of, run_setting, shown_controls
from heads.evaluation.selection import selection_key
from heads.metrics.classification import COMPARED, UNTRAINED
from heads.reports.listing import made_words
from heads.reports.provenance import setting_words, split_counts, train_command
from heads.runs.run import Run, is_pixels, name_of
from heads.settings import METRICS, measure_name, title
from heads.splits import dropped_sentence, leaks_sentence
from heads.task import Leak

SHOWN = {  # measures of the final table, in order
    "binary": ("auroc", "ap", "sensitivity", "specificity", "ppv", "npv", "f1", "accuracy", "nll", "brier", "ece"),
    "multiclass": (
        "auroc", "ap", "accuracy", "top5", "macro_precision", "macro_recall", "macro_f1", "nll", "brier", "ece",
    ),
    "ordinal": (
        "quadratic_kappa", "mae", "auroc", "ap", "accuracy", "macro_precision", "macro_recall", "macro_f1", "nll",
        "brier", "ece",
    ),
    "multilabel": ("auroc", "ap", "sensitivity", "specificity", "f1", "accuracy", "nll", "brier", "ece"),
}  # fmt: skip
COUNTS = {"n": "images", "n_known": "known", "n_positive": "positive"}


def final_table(run: Run, record: dict[str, Any] | None = None) -> str:
    """Val and test of one run, test with intervals; with untrained weights the controls come first, and a sentence.
    ``record``: of its comparison, where that is known."""
    if record is None:
        record = compare(families_of([run])).record
    (family,) = record["families"]
    lines = [*comparison_table([run]).splitlines(), ""] if run.metrics["controls"] else []
    names = [name for name in SHOWN[run.task] if name in family["test"]]
    rows = [[title(m, run.task), number(run.metrics["val"].get(m)), interval(family["test"][m])] for m in names]
    table = aligned([["", "val", "test (read once)"], *rows])
    if run.task == "binary":
        cut = run.calibration.thresholds[0]
        at = names.index("sensitivity") + 1 if "sensitivity" in names else 0
        table[at] += f"   of {one_line(run.config['positive'])} at {cut:.3f}, the threshold chosen on val"
    lines += [*table, how_made(record), f"{family['calibration']['words']}.", f"Cost: {run_cost_line(run_cost(run))}."]
    lines += [one_line(sentence(warning, record)) for warning in [*record["warnings"], *family["warnings"]]]
    lines += leak_warnings([run])
    if any((run.config["splits"].get("dropped") or {}).values()):
        lines.append(f"{dropped_sentence(run.config['splits']['dropped'])}.")
    if run.untrained and not run.metrics["controls"]:
        lines.append(UNTRAINED)
    return "\n".join(lines)


def interval(test: dict[str, Any] | None) -> str:
    """``0.962 [0.948, 0.975]``; the value alone where it has no interval."""
    if test is None:
        return number(None)
    if test["low"] is None:
        return number(test["value"])
    return f"{number(test['value'])} [{number(test['low'])}, {number(test['high'])}]"


def how_made(record: dict[str, Any], view: str | None = None) -> str:
    """What the intervals are, in one line; with another ``view`` in two: of the own test, and of that on the view."""
    families, clusters, of = record["families"], record["clusters"], counted(record["n_test"], "image")
    if clusters["n"] < record["n_test"]:
        of = f"{counted(clusters['n'], 'group' if clusters['unit'] == 'group' else 'different image')} ({of})"
    own = [family["test"] for family in families]
    if view is None:
        return _intervals(f"on {of}", own)
    parts = [part for family in families for part in family["external"] if part["view"] == view]
    there = _intervals(f"of {one_line(view)} on {counted(parts[0]['n'], 'image')}", [part["test"] for part in parts])
    return f"{_intervals(f'of the own test on {of}', own)}\n{there}"


def _intervals(what: str, tests: Sequence[dict[str, Any]]) -> str:
    methods = {measured["method"] or "" for test in tests for measured in test.values()}
    meaning = {
        "Wilson": "proportions by Wilson",
        "cluster bootstrap": "a stratified bootstrap of whole clusters",
        "bootstrap": "a stratified bootstrap",
        "corrected t": "Nadeau and Bengio's t over sets of test images",
    }
    used = [text for start, text in meaning.items() if any(method.startswith(start) for method in methods)]
    return f"[95 % intervals {what}: {'; '.join(used)}]" if used else f"[{what}]"


def sentence(words: str, record: dict[str, Any]) -> str:
    """With a capital, unless it begins with the name of a head, and with its full stop."""
    named = any(words.startswith(family["name"]) for family in record["families"])
    begin = words if named else words[:1].upper() + words[1:]
    return begin if begin.endswith((".", "!", "?")) else begin + "."


def leak_warnings(runs: Sequence[Run]) -> list[str]:
    """One sentence where images stand in two splits: for each kind the most, as a part of train leaks less."""
    worst: dict[tuple[Any, ...], int] = {}
    for leak in (leak for run in runs for leak in run.config["splits"].get("leaks") or []):
        key = (leak["kind"], tuple(leak["splits"]))
        worst[key] = max(worst.get(key, 0), leak["count"])
    leaks = [Leak(kind, splits, count) for (kind, splits), count in worst.items()]
    return [f"{leaks_sentence(leaks)}: these numbers may be too good."] if leaks else []


def lab_table(record: dict[str, Any]) -> str:
    """A comparison's record: controls first, then the families, best on val first, ties by val NLL."""
    task, lead, shown = record["task"], measure_name(record["select"]), shown_measures(record)
    families = sorted(record["families"], key=lambda family: selection_key([family], record["select"]))
    spreads = shown_spreads(families, lead, task)
    rows = [(_header(lead, shown, task), list(spreads.values()))]
    rows += [(_control_row(control, lead, shown), [""] * len(spreads)) for control in record["controls"]]
    for family in families:
        test = [interval(family["test"].get(m)) for m in shown]
        over = [number(spread.get(lead)) if (spread := family["spread"][kind]) else "" for kind in spreads]
        name, value = one_line(family["name"]), number(family["val"].get(lead))
        rows.append(([name, f"{family['parameters']:,}", value, *test], over))
    table = aligned([[*row[:4], *over, *row[4:]] for row, over in rows])  # behind the test that it is the spread of
    lines = [*table, how_made(record), *_control_notes(record["controls"])]
    lines += _against(record, families, lead)
    lines += cost_table([(family["name"], family) for family in families])
    lines += [
        f"{one_line(family['name'])} on {one_line(other['view'])}, {counted(other['n'], 'image')}: "
        + ", ".join(f"{title(m, task)} {interval(other['test'].get(m))}" for m in shown)
        for family in families
        for other in family["external"]
    ]
    if record["test_seen"]:
        lines += _all_rows(record, lead)
    lines += [f"{one_line(family['name'])}: {one_line(edge)}" for family in families for edge in family["edges"]]
    warnings = [*record["warnings"], *(warning for family in families for warning in family["warnings"])]
    lines += [one_line(sentence(warning, record)) for warning in warnings]
    return "\n".join([*lines, UNTRAINED] if record["untrained"] else lines)


def _header(lead: str, shown: Sequence[str], task: str) -> list[str]:
    return ["", "parameters", f"val {title(lead, task)}", *(f"test {title(m, task)}" for m in shown)]


def _control_row(control: dict[str, Any], lead: str, shown: Sequence[str]) -> list[str]:
    return [control["name"], "", *_cells(control, lead, shown)]


def _control_notes(controls: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{control['name']}: {one_line(control['note'])}" for control in controls if control["note"]]


def shown_measures(record: dict[str, Any]) -> list[str]:
    """Columns of a comparison: what was chosen by, then what the task is judged by."""
    ordered = dict.fromkeys([measure_name(record["select"]), *COMPARED[record["task"]]])
    return [m for m in ordered if m in record["measures"]]


def shown_spreads(families: Sequence[dict[str, Any]], lead: str, task: str) -> dict[str, str]:
    """Columns of standard deviations of the leading measure: over what any family was repeated, with their names."""
    kinds = [kind for kind in ("seeds", "repeats", "folds") if any((f["spread"] or {}).get(kind) for f in families)]
    return {kind: f"± {title(lead, task)} over {kind}" for kind in kinds}


def cost_table(named: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Lines behind a comparison, in its order: what each costs, and once on what that was measured."""
    rows = cost_rows([(one_line(name), cost) for name, cost in named])
    where = devices_words([cost for _, cost in named])
    return ["", *aligned(rows), *([f"[ms/image: {one_line(where)}]"] if where else [])] if rows else []


def runs_cost(runs: Sequence[Run]) -> list[str]:
    """`cost_table` of runs, in the order of `comparison_table`."""
    return cost_table([(_name(run, runs), run_cost(run)) for run in _best_first(runs)])


def _best_first(runs: Sequence[Run]) -> list[Run]:
    """By the first run's criterion on val, ties by NLL."""
    return sorted(runs, key=lambda run: selection_key([run.metrics], runs[0].config["chosen"]["by"]))


def _against(record: dict[str, Any], families: Sequence[dict[str, Any]], lead: str) -> list[str]:
    """A line for each difference to the reference."""
    rows = [
        [f"  {one_line(family['name'])}", each["words"], f"p {each['p_holm']:.2g}", f"({each['method']})"]
        for family in families
        if (each := (family["difference"] or {}).get(lead))
    ]
    against = f"{title(lead, record['task'])} against {one_line(record['reference'] or '')}"
    return ["", f"{against} (paired; p by Holm over {len(rows)}):", *aligned(rows, right=9)] if rows else []


def _all_rows(record: dict[str, Any], lead: str) -> list[str]:
    """Every head that was trained, with the test that nobody should choose by."""
    rows = [["", "setting", "seed", "val", "test"]]
    for row in record["rows"]:
        setting = " ".join(f"{key} {value:g}" for key, value in row["setting"].items() if isinstance(value, float))
        val, test = (number((row[split] or {}).get(lead)) for split in ("val", "test"))
        rows.append([one_line(row["family"]), setting, str(row["seed"]), val, test])
    banner = f"TEST SEEN {record['test_seen']} TIMES: whoever chooses by the right-hand column has no test any more."
    return ["", banner, *aligned(rows, right=2)]


def external_table(family: dict[str, Any], view: str, task: str, n_test: int) -> str:
    """The internal test of a family beside its test on another view."""
    own, other = family["test"], next(each for each in family["external"] if each["view"] == view)
    rows = [["", f"own test ({n_test:,})", f"{one_line(view)} ({other['n']:,})"]]
    rows += [[title(m, task), interval(own[m]), interval(other["test"].get(m))] for m in SHOWN[task] if m in own]
    there = f"There: {other['calibration']['words']}."
    return "\n".join([one_line(family["name"]), *aligned(rows), there])


def comparison_table(runs: Sequence[Run]) -> str:
    """Controls first (`shown_controls`), then the runs, best on val first: the first run's criterion, ties by val NLL.
    Runs that were not tested on the same images with the same classes are shown, and it is said."""
    controls = shown_controls(runs, _best_first(runs)[:1])
    task, key = runs[0].task, measure_name(runs[0].config["chosen"]["by"])
    shown = COMPARED[task]
    rows = [_header(key, shown, task), *(_control_row(control, key, shown) for control in controls)]
    for run in _best_first(runs):
        rows.append([_name(run, runs), f"{run.config['parameters']:,}", *_cells(run.metrics, key, shown)])
    lines = [*aligned(rows), *_control_notes(controls)]
    if len({(run.config["splits"]["digest"], run.classes) for run in runs}) > 1:
        lines.append("Not all of these were tested on the same images and classes: their numbers do not compare.")
    if any(run.untrained for run in runs):
        lines.append(UNTRAINED)
    return "\n".join(lines)


def _cells(measured: dict[str, Any], key: str, shown: Sequence[str]) -> list[str]:
    val, test = measured["val"] or {}, measured["test"] or {}
    return [number(val.get(key)), *(number(test.get(m)) for m in shown)]


def _name(run: Run, runs: Sequence[Run]) -> str:
    view = run.config["view"]["label"]
    where = f" of {view}" if len({r.config["view"]["label"] for r in runs}) > 1 else ""
    return f"{name_of(run.head, run.output)}{where}"


def head_table(described: dict[str, Any]) -> str:
    """The layers of a head, from `heads.models.catalogue.describe_head`."""
    shape = "×".join(str(n) for n in described["shape"])
    takes = "images" if described["takes"] == "pixels" else "features"
    rows = [["layer", "", "gives", "parameters"], ["input", takes, f"[{shape}]", "0"]]
    rows += [[each["name"], each["layer"], each["gives"], f"{each['parameters']:,}"] for each in described["layers"]]
    first = f"{described['head']}: {described['what']}; {described['classes']} classes"
    return "\n".join([first, *aligned([*rows, ["", "", "", f"{described['parameters']:,}"]], right=3)])


HEADS_HEADER = ["head", "what", "takes", "parameters", "from"]


def heads_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table of heads in words, from `heads.models.catalogue.heads_table`; its header is ``HEADS_HEADER``."""
    counts = [f"{each['parameters']:,}" if each["parameters"] else "none: it keeps train" for each in records]
    named = zip(records, counts, strict=True)
    return [[each["head"], each["what"], each["takes"], count, each["reference"]] for each, count in named]


def heads_lines(records: Sequence[dict[str, Any]]) -> str:
    """A line per head: what it takes, its parameters, what it is and where it comes from."""
    rows = [[name, takes, count, f"{what} · {source}"] for name, what, takes, count, source in heads_rows(records)]
    return "\n".join(aligned(rows, right=(2,), indent=2))


def run_lines(run: Run) -> str:
    """What it is, how it came about and what it measured; config.json has the rest."""
    config = run.config
    view, splits = config["view"], config["splits"]
    shape = "×".join(str(n) for n in view["shape"])
    rows: list[tuple[str, Any]] = [
        ("run", f"{run.path}   {run.head}: {config['parameters']:,} parameters, made {made_words(run)}"),
        ("images" if is_pixels(run) else "features", f"{view['label']} {run.output} [{shape}]"),
        ("classes", abbreviated(run.classes, 12)),
        ("setting", setting_words(run_setting(run))),
        ("splits", f"{split_counts(run)} ({splits.get('how')})"),
        ("chosen", f"epoch {config['chosen']['epoch']}, {chosen_words(run.task, [run])} on val"),
        ("again", train_command(run)),
    ]
    lines = columns((name, one_line(str(value))) for name, value in rows if value)
    return f"{lines}\n\n{final_table(run)}\n{columns([('files', f'{run.path}/   config.json has every setting')])}"


def filters_for(task: str) -> dict[str, Callable[..., Any]]:
    """What the templates call the functions that write a value."""
    return {
        "num": number, "cost": cost_text, "setting": setting_words,
        "signed": lambda value: "–" if value is None else signed_text(value),
        "pvalue": lambda value: "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}",
        "count": lambda value: "–" if value is None else f"{value:,.0f}",
        "percent": lambda value: "–" if value is None else f"{100 * value:.3g} %",
        "plural": counted,
        "cost_title": lambda key: COSTS[key].column, "count_title": COUNTS.get,
        "title": lambda m: title(m, task), "class_title": lambda m: title(m, "binary") if m in METRICS else m,
        "higher": lambda m: METRICS[m].higher,
    }  # fmt: skip


def title_words(record: dict[str, Any], runs: Sequence[Run]) -> str:
    where = abbreviated(list(dict.fromkeys(run.config["view"]["label"] for run in runs)), 3)
    families = record["families"]
    return f"{families[0]['name']}: {where}" if len(families) == 1 else f"{where}: {len(families)} heads compared"


def subtitle_words(record: dict[str, Any], runs: Sequence[Run]) -> str:
    classes, positive = record["classes"], f"; positive is {record['positive']}" if record["positive"] else ""
    number_of = counted(len(classes), "label") if record["task"] == "multilabel" else f"{len(classes)} classes"
    counts = split_counts(max(runs, key=fraction_of)) or record["n_test"]
    return f"{record['task']}, {number_of}: {abbreviated(classes, 8)}{positive}. Images: {counts}."


def chosen_words(task: str, runs: Sequence[Run]) -> str:
    """By which criteria epochs and settings were chosen."""
    criteria = dict.fromkeys(run.config["chosen"]["by"] for run in runs)
    return "by " + " or ".join("loss" if by == "loss" else title(by, task) for by in criteria)
