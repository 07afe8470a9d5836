"""The README says true things: its tables are those of the dicts, its commands and its Python run.

``python tests/test_readme.py`` writes the tables anew.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli

README = Path(__file__).parent.parent / "README.md"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def backbones() -> str:
    from featurecache.backbones.aliases import ALIASES

    rows = []
    for name, alias in ALIASES.items():
        where = f"`{alias.id}`" if alias.id else "only with `--random-weights`"
        size = [f"{alias.parameters / 1e6:.1f} M", str(alias.width), str(alias.tokens), str(alias.input)]
        rows.append([f"`{name}`", where, *size, alias.licence, alias.source])
    return markdown(["name", "is", "parameters", "width", "tokens", "pixels", "licence", "source"], rows)


def outputs() -> str:
    what = {
        "cls": ("[N,D]", "row 0 of `tokens`, as the library returns it; refused where there is no class token"),
        "pooler": (
            "[N,D]",
            "the checkpoint's own trained pooled vector; refused where its weights are not in the checkpoint",
        ),
        "gap": ("[N,C]", "a CNN's vector as its own classifier receives it"),
        "mean": ("[N,D]", "mean of the patch tokens, without any prefix token"),
        "tokens": (
            "[N,T,D]",
            "the whole `last_hidden_state`, prefix tokens first; a CNN's last feature map, [N,h·w,C]",
        ),
        "tokens-257": ("[N,257,D]", "the article's resize of the [D,T] matrix (`tokens-N`: any N)"),
        "tokens-16x16": ("[N,P+16·16,D]", "the patch grid resized in two dimensions, prefix kept (`tokens-HxW`)"),
    }
    from featurecache.outputs import NAMES

    assert tuple(what) == NAMES
    return markdown(["output", "shape", "what"], [[f"`{name}`", *about] for name, about in what.items()])


def sources() -> str:
    from featurecache.sources import SOURCES

    return markdown(["`--data`", "what"], [[source.form, source.about] for source in SOURCES.values()])


def heads() -> str:
    from heads.models.catalogue import heads_table
    from heads.reports.text import HEADS_HEADER, heads_rows

    return markdown(HEADS_HEADER, [[f"`{name}`", *about] for name, *about in heads_rows(heads_table())])


def networks() -> str:
    from heads.models.catalogue import networks_table

    rows = []
    for row in networks_table():
        counts = "; ".join(f"{count:,} (C = {c}, {size} px)" for c, size, count in row["parameters"])
        settings = ", ".join(
            f"{key.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
            for key, value in row["settings"].items() if key != "optimizer"
        )  # fmt: skip
        settings = f"{row['settings']['optimizer']}, {settings}"
        rows.append([f"`{row['network']}`", row["what"], str(row["image_size"]), counts, settings, row["reference"]])
    return markdown(["--arch", "what", "pixels", "parameters", "settings, as published", "from"], rows)


def studies() -> str:
    from heads.studies.spec import STUDIES

    rows = [[f"`featurecache study {name}`", about] for name, (_, about) in STUDIES.items()]
    return markdown(["type", "to know"], rows)


def metrics() -> str:
    from heads.metrics.classification import METRICS

    rows = [[f"`{key}`", metric.title, "higher" if metric.higher else "lower"] for key, metric in METRICS.items()]
    return markdown(["`--select`", "metric", "better"], rows)


TABLES = {
    "studies": studies,
    "backbones": backbones,
    "outputs": outputs,
    "sources": sources,
    "heads": heads,
    "networks": networks,
    "metrics": metrics,
}


def with_tables(text: str) -> str:
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), name
        text = pattern.sub(lambda match, table=table: f"{match[1]}\n{table()}\n\n{match[2]}", text)  # type: ignore[misc]
    return text


def test_the_tables_are_those_of_the_dicts() -> None:
    text = README.read_text()
    assert with_tables(text) == text, "python tests/test_readme.py writes them anew"


def test_every_file_of_ours_that_it_names_is_there() -> None:
    named = re.findall(r"`((?:featurecache|heads|benchmarks)/[\w/]+\.py)`", README.read_text())
    assert len(set(named)) > 8
    assert [path for path in named if not (README.parent / path).is_file()] == []


def commands() -> list[str]:
    return re.findall(r"^    (featurecache .+)$", README.read_text(), re.MULTILINE)


def test_every_command_has_options_that_exist() -> None:
    assert len(commands()) > 8
    for command in commands():
        words = shlex.split(command)[1:]
        subcommand = cli.main.commands[words[0]]
        subcommand.make_context(words[0], words[1:], resilient_parsing=False)


def test_the_commands_that_need_no_weights_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = README.read_text().split("These run as they stand")[1].split("\n## ")[0]
    runnable = re.findall(r"^    (featurecache .+)$", block, re.MULTILINE)
    assert len(runnable) > 5
    for command in runnable:
        result = CliRunner().invoke(cli.main, shlex.split(command)[1:])
        assert result.exit_code == 0, (command, result.output)


def test_the_python_of_the_library_section_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert (tmp_path / "runs" / "second" / "metrics.json").exists()


def test_the_demo_runs_as_shown_and_its_table_is_the_readmes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.main, ["demo"])
    assert result.exit_code == 0, result.output
    shown = {line.strip().split("  ")[0] for line in README.read_text().splitlines() if re.search(r"0\.\d{3}$", line)}
    for name in ("chance", "majority class", "pixels, logistic regression", "linear on cls", "large on tokens-257"):
        assert name in shown
        assert name in result.stdout
    assert "these numbers show that the tool works, not what a backbone can do" in result.stdout
    table = result.stdout.split("what it costs")[0]
    accuracy = {line.split("  ")[0]: float(line.split()[-2]) for line in table.splitlines() if "0." in line}
    assert accuracy["chance"] == pytest.approx(0.1)
    assert accuracy["pixels, logistic regression"] > 0.93
    assert accuracy["linear on cls"] < 0.75 < 0.9 < accuracy["large on tokens"]


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
