"""Tables of text: the numbers of runs, comparisons and sweeps in aligned columns, and the words for them on a page.

Every value comes from a record or a run; nothing is measured here. Runs and families stand best on val first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from featurecache.formatting import abbreviated, aligned, columns, number, one_line
from heads.evaluation.comparison import compare
from heads.evaluation.costs import COSTS, cost_rows, cost_text, devices_words, run_cost, run_cost_line
from heads.evaluation.families import families_of, run_setting, selection_key
from heads.metrics.classification import COMPARED, UNTRAINED, measure_name, title
from heads.reports.provenance import setting_words, train_command
from heads.runs.run import Run, is_pixels, name_of
from heads.settings import METRICS
from heads.splits import dropped_sentence, leaks_sentence
from heads.task import Leak

SHOWN = {  # measures of the final table, in order
    "binary": ("auroc", "ap", "sensitivity", "specificity", "ppv", "npv", "f1", "accuracy", "nll", "brier", "ece"),
    "multiclass": ("auroc", "ap", "accuracy", "top5", "balanced_accuracy", "macro_f1", "nll", "brier", "ece"),
    "ordinal": (
        "quadratic_kappa", "mae", "auroc", "ap", "accuracy", "balanced_accuracy", "macro_f1", "nll", "brier", "ece",
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
    rows = [["", "val", "test (read once)"]]
    for name in SHOWN[run.task]:
        if name in family["test"]:
            rows.append([title(name, run.task), number(run.metrics["val"].get(name)), interval(family["test"][name])])
    table = aligned(rows)
    if run.task == "binary":
        cut = run.calibration.thresholds[0]
        at = next((i for i, row in enumerate(rows) if row[0] == "sensitivity"), 0)
        table[at] += f"   of {one_line(run.config['positive'])} at {cut:.3f}, the threshold chosen on val"
    lines += [*table, how_made(record), f"Cost: {run_cost_line(run_cost(run))}."]
    lines += [one_line(sentence(words, record)) for words in [*record["warnings"], *family["warnings"]]]
    lines += _leak_lines(run)
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


def how_made(record: dict[str, Any]) -> str:
    """What the intervals are, in one line."""
    clusters = record["clusters"]
    of = f"{record['n_test']:,} images"
    if clusters["n"] < record["n_test"]:
        of = f"{clusters['n']:,} {'groups' if clusters['unit'] == 'group' else 'different images'} ({of})"
    methods = {test["method"] for family in record["families"] for test in family["test"].values()}
    words = [
        ("Wilson", "proportions by Wilson"),
        ("cluster bootstrap", "a stratified bootstrap of whole clusters"),
        ("bootstrap", "a stratified bootstrap"),
        ("corrected t", "Nadeau and Bengio's t over sets of test images"),
    ]
    there = [text for start, text in words if any((method or "").startswith(start) for method in methods)]
    return f"[95 % intervals on {of}: {'; '.join(there)}]" if there else f"[on {of}]"


def sentence(words: str, record: dict[str, Any]) -> str:
    """With a capital, unless it begins with the name of a head, and with its full stop."""
    named = any(words.startswith(family["name"]) for family in record["families"])
    begin = words if named else words[:1].upper() + words[1:]
    return begin if begin.endswith((".", "!", "?")) else begin + "."


def lab_table(record: dict[str, Any]) -> str:
    """A comparison's record: controls first, then the families, best on val first, ties by val NLL."""
    task, lead, shown = record["task"], measure_name(record["select"]), shown_measures(record)
    families = sorted(record["families"], key=lambda family: selection_key([family], record["select"]))
    spreads = shown_spreads(families)
    rows = [["", "parameters", f"val {title(lead, task)}", *(f"test {title(m, task)}" for m in shown)]]
    rows[0] += [f"± over {kind}" for kind in spreads]
    for control in record["controls"]:
        rows.append([control["name"], "", *_cells(control, lead, shown), *("" for _ in spreads)])
    for family in families:
        test = [interval(family["test"].get(m)) for m in shown]
        over = [number((family["spread"][kind] or {}).get(lead)) if family["spread"][kind] else "" for kind in spreads]
        name = one_line(family["name"])
        rows.append([name, f"{family['parameters']:,}", number(family["val"].get(lead)), *test, *over])
    lines = [*aligned(rows), how_made(record)]
    lines += [f"{control['name']}: {one_line(control['note'])}" for control in record["controls"] if control["note"]]
    lines += _against(record, families, lead)
    lines += cost_table([(family["name"], family) for family in families])
    lines += [line for family in families for line in _elsewhere(family, shown, task)]
    if record["test_seen"]:
        lines += _all_rows(record, lead)
    lines += [f"{one_line(family['name'])}: {one_line(words)}" for family in families for words in family["edges"]]
    warned = [*record["warnings"], *(w for family in families for w in family["warnings"])]
    lines += [one_line(sentence(words, record)) for words in warned]
    if record["untrained"]:
        lines.append(UNTRAINED)
    return "\n".join(lines)


def shown_measures(record: dict[str, Any]) -> list[str]:
    """Columns of a comparison: what was chosen by, then what the task is judged by."""
    ordered = dict.fromkeys([measure_name(record["select"]), *COMPARED[record["task"]]])
    return [m for m in ordered if m in record["measures"]]


def shown_spreads(families: Sequence[dict[str, Any]]) -> list[str]:
    """Columns of standard deviations: over what any family was repeated."""
    return [kind for kind in ("seeds", "repeats", "folds") if any((f["spread"] or {}).get(kind) for f in families)]


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
    compared = [(family, difference) for family in families if (difference := (family["difference"] or {}).get(lead))]
    if not compared:
        return []
    against = f"{title(lead, record['task'])} against {one_line(record['reference'])}"
    head = f"{against} (paired; p by Holm over {len(compared)}):"
    rows = [
        [
            f"  {one_line(family['name'])}",
            difference["words"],
            f"p {difference['p_holm']:.2g}",
            f"({difference['method']})",
        ]
        for family, difference in compared
    ]
    return ["", head, *aligned(rows, right=9)]


def _elsewhere(family: dict[str, Any], shown: Sequence[str], task: str) -> list[str]:
    return [
        f"{one_line(family['name'])} on {one_line(other['view'])}, {other['n']:,} images: "
        + ", ".join(f"{title(m, task)} {interval(other['test'].get(m))}" for m in shown)
        for other in family["external"]
    ]


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
    other = next(each for each in family["external"] if each["view"] == view)
    rows = [["", f"own test ({n_test:,})", f"{one_line(view)} ({other['n']:,})"]]
    for name in SHOWN[task]:
        if name in family["test"]:
            rows.append([title(name, task), interval(family["test"][name]), interval(other["test"].get(name))])
    return "\n".join([one_line(family["name"]), *aligned(rows)])


def _leak_lines(run: Run) -> list[str]:
    """What stands in two splits, and what was left out for it; a run may be from before either was recorded."""
    splits = run.config["splits"]
    leaks = [Leak(leak["kind"], tuple(leak["splits"]), leak["count"]) for leak in splits.get("leaks") or []]
    lines = [f"{leaks_sentence(leaks)}: these numbers may be too good."] if leaks else []
    return lines + ([f"{dropped_sentence(splits['dropped'])}."] if any((splits.get("dropped") or {}).values()) else [])


def comparison_table(runs: Sequence[Run], controls: Sequence[dict[str, Any]] | None = None) -> str:
    """Controls first, then the runs, best on val first: the first run's criterion, ties by val NLL.

    ``controls`` are by default those of the first run that has some. Runs that were not tested on the same images with
    the same classes are shown, and it is said.
    """
    if controls is None:
        controls = next((run.metrics["controls"] for run in runs if run.metrics["controls"]), [])
    task, key = runs[0].task, measure_name(runs[0].config["chosen"]["by"])
    shown = COMPARED[task]
    rows = [["", "parameters", f"val {title(key, task)}", *(f"test {title(m, task)}" for m in shown)]]
    for control in controls:
        rows.append([control["name"], "", *_cells(control, key, shown)])
    for run in _best_first(runs):
        rows.append([_name(run, runs), f"{run.config['parameters']:,}", *_cells(run.metrics, key, shown)])
    lines = aligned(rows)
    lines += [f"{control['name']}: {one_line(control['note'])}" for control in controls if control["note"]]
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


def runs_table(runs: Sequence[Run]) -> str:
    """A line per run: folder, head, features, the criterion on val and test, when."""
    if not runs:
        return "no runs yet; featurecache train-head makes one"
    rows = [["run", "head", "features", "criterion", "val", "test", "made"]]
    for run in runs:
        key = measure_name(run.config["chosen"]["by"])
        where = f"{run.config['view']['label']} {run.output}" + (" (untrained)" if run.untrained else "")
        val, test = (number(run.metrics[split].get(key)) for split in ("val", "test"))
        created = run.config["created"][:16].replace("T", " ")
        rows.append([str(run.path), run.head, where, METRICS[key].title, val, test, created])
    return "\n".join(aligned(rows, right=4))


def sweeps_table(sweeps: Sequence[Any]) -> str:
    """A line per sweep (`heads.sweeps.journal.Sweep`): folder, how many heads, the one that is best on val."""
    rows = [["sweep", "heads", "best on val", "criterion", "val"]]
    for sweep in sweeps:
        key, name, value = measure_name(sweep.record["select"]), "none finished yet", None
        if sweep.families:
            run = sweep.best
            name, value = f"{run.head} on {run.config['view']['label']} {run.output}", run.metrics["val"].get(key)
        rows.append([str(sweep.path), f"{len(sweep.rows):,}", one_line(name), METRICS[key].title, number(value)])
    return "\n".join(aligned(rows, right=4))


def head_table(described: dict[str, Any]) -> str:
    """The layers of a head, from ``architectures.describe_head``."""
    shape = "×".join(str(n) for n in described["shape"])
    takes = "images" if described["takes"] == "pixels" else "features"
    rows = [["layer", "", "gives", "parameters"], ["input", takes, f"[{shape}]", "0"]]
    for layer in described["layers"]:
        rows.append([layer["name"], layer["layer"], layer["gives"], f"{layer['parameters']:,}"])
    rows.append(["", "", "", f"{described['parameters']:,}"])
    first = f"{described['head']}: {described['what']}; {described['classes']} classes"
    return "\n".join([first, *aligned(rows, right=3)])


HEADS_HEADER = ["head", "what", "takes", "parameters", "from"]


def heads_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table of heads in words, from ``architectures.heads_table``; its header is ``HEADS_HEADER``."""
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
    images = " · ".join(f"{name} {n:,}" for name, n in (splits.get("images") or {}).items())
    shape = "×".join(str(n) for n in view["shape"])
    rows: list[tuple[str, Any]] = [
        ("run", f"{run.path}   {run.head}: {config['parameters']:,} parameters, made {_made(run)}"),
        ("images" if is_pixels(run) else "features", f"{view['label']} {run.output} [{shape}]"),
        ("classes", abbreviated(run.classes, 12)),
        ("setting", setting_words(run_setting(run))),
        ("splits", f"{images} ({splits.get('how')})"),
        ("chosen", f"epoch {config['chosen']['epoch']}, {chosen_words(run.task, [run])} on val"),
        ("again", train_command(run)),
    ]
    lines = columns((word, one_line(str(words))) for word, words in rows if words)
    return f"{lines}\n\n{final_table(run)}\n{columns([('files', f'{run.path}/   config.json has every setting')])}"


def _made(run: Run) -> str:
    return str(run.config["created"])[:16].replace("T", " ")


def filters_for(task: str) -> dict[str, Callable[..., Any]]:
    """What the templates call the functions below."""
    return {
        "num": number, "signed": signed, "pvalue": pvalue, "count": count_words, "percent": percent, "plural": plural,
        "cost": cost_text, "cost_title": lambda key: COSTS[key].column, "count_title": COUNTS.get,
        "setting": setting_words,
        "title": lambda m: title(m, task), "class_title": lambda m: title(m, "binary") if m in METRICS else m,
        "higher": lambda m: METRICS[m].higher,
    }  # fmt: skip


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def pvalue(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def count_words(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def plural(count: int | None, word: str) -> str:
    return f"{count or 1:,} {word}{'' if (count or 1) == 1 else 's'}"


def title_words(record: dict[str, Any], runs: Sequence[Run]) -> str:
    views = list(dict.fromkeys(run.config["view"]["label"] for run in runs))
    where = abbreviated(views, 3)
    families = record["families"]
    return f"{families[0]['name']}: {where}" if len(families) == 1 else f"{where}: {len(families)} heads compared"


def subtitle_words(record: dict[str, Any], runs: Sequence[Run]) -> str:
    classes = record["classes"]
    named = abbreviated(classes, 8)
    positive = f"; positive is {record['positive']}" if record["positive"] else ""
    word = "labels" if record["task"] == "multilabel" else "classes"
    whole = max(runs, key=lambda run: run.config["splits"].get("fraction") or 1.0)
    images = whole.config["splits"].get("images") or {}
    counts = " · ".join(f"{name} {n:,}" for name, n in images.items())
    return f"{record['task']}, {len(classes)} {word}: {named}{positive}. Images: {counts or record['n_test']}."


def chosen_words(task: str, runs: Sequence[Run]) -> str:
    """By which criteria epochs and settings were chosen."""
    criteria = dict.fromkeys(run.config["chosen"]["by"] for run in runs)
    return "by " + " or ".join("loss" if by == "loss" else title(by, task) for by in criteria)


def unit_words(record: dict[str, Any]) -> str:
    clusters = record["clusters"]
    if clusters["unit"] == "group":
        return f" of {clusters['n']:,} groups, which are what is drawn"
    return ""


def images_words(count: int, embeds: bool) -> str:
    if not embeds:
        return "It embeds no images."
    return f"It embeds {count:,} image{'' if count == 1 else 's'}, newly encoded, without the files' own metadata."
