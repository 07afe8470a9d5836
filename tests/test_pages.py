"""The pages say true things: their tables are those of the dicts, their links lead somewhere, what they show runs.

Of a ``console`` block each command runs, and each line that is shown below it has to come, up to its numbers; "…" is
for lines that are left out. Of ``python`` blocks all run (one that begins with the name of a file is written into it),
of indented commands the options have to exist: they need weights, data or a network.

``python tests/test_pages.py`` writes the tables anew.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.command import call

import cli

TOP = Path(__file__).parent.parent
SESSION = ("start", "extract", "networks", "train", "statistics", "cache", "format", "offline", "extend")  # in order
PAGES = {path.relative_to(TOP).as_posix(): path for path in [*TOP.glob("*.md"), *TOP.glob("docs/**/*.md")]}
MOST_LINES = {
    "README.md": 180, "docs/start.md": 150, "docs/extract.md": 250, "docs/train.md": 250, "docs/statistics.md": 200,
    "docs/cache.md": 200, "docs/format.md": 200, "docs/offline.md": 80, "docs/extend.md": 200, "docs/networks.md": 100,
}  # fmt: skip


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


OUTPUTS = {
    "cls": ("[N,D]", "row 0 of `tokens`, as the library returns it; refused where there is no class token"),
    "pooler": (
        "[N,D]",
        "the checkpoint's own trained pooled vector; refused where its weights are not in the checkpoint",
    ),
    "gap": ("[N,C]", "a CNN's vector as its own classifier receives it"),
    "mean": ("[N,D]", "mean of the patch tokens, without any prefix token"),
    "tokens": ("[N,T,D]", "the whole `last_hidden_state`, prefix tokens first; a CNN's last feature map, [N,h·w,C]"),
    "tokens-257": ("[N,257,D]", "the article's resize of the [D,T] matrix (`tokens-N`: any N)"),
    "tokens-16x16": ("[N,P+16·16,D]", "the patch grid resized in two dimensions, prefix kept (`tokens-HxW`)"),
}


def outputs() -> str:
    from featurecache.outputs import NAMES

    assert tuple(OUTPUTS) == NAMES
    return markdown(["output", "shape", "what"], [[f"`{name}`", *about] for name, about in OUTPUTS.items()])


def sources() -> str:
    from featurecache.sources import SOURCES

    return markdown(["`--data`", "what"], [[source.form, source.about] for source in SOURCES.values()])


def augmentation() -> str:
    from featurecache.images.augmentation import OPERATIONS

    return markdown(["`--augment`", "what"], [[f"`{kind.form}`", kind.about] for kind in OPERATIONS.values()])


def heads() -> str:
    from heads.models.catalogue import heads_table
    from heads.reports.text import HEADS_HEADER, heads_rows

    return markdown(HEADS_HEADER, [[f"`{name}`", *about] for name, *about in heads_rows(heads_table())])


def networks() -> str:
    from heads.models.catalogue import networks_table

    rows = []
    for row in networks_table():
        counts = "; ".join(f"{count:,} (C = {c}, {size} px)" for c, size, count in row["parameters"])
        words = {key.replace("_", " "): f"{v:g}" if isinstance(v, float) else v for key, v in row["settings"].items()}
        named = (key if value is True else f"{key} {value}" for key, value in words.items() if key != "optimizer")
        settings = ", ".join([words["optimizer"], *named])
        rows.append([f"`{row['network']}`", row["what"], str(row["image_size"]), counts, settings, row["reference"]])
    return markdown(["--arch", "what", "pixels", "parameters", "settings, as published", "from"], rows)


def studies() -> str:
    from heads.studies.recipes import STUDIES

    rows = [[f"`featurecache study {name}`", study.question] for name, study in STUDIES.items()]
    return markdown(["type", "to know"], rows)


def metrics() -> str:
    from heads.settings import METRICS

    rows = [[f"`{key}`", metric.title, "higher" if metric.higher else "lower"] for key, metric in METRICS.items()]
    return markdown(["`--select`", "metric", "better"], rows)


TABLES = (studies, backbones, outputs, sources, augmentation, heads, networks, metrics)
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    made = {table.__name__: table for table in TABLES}
    return TABLE.sub(lambda match: f"{match[1]}\n{made[match[2]]()}\n\n{match[3]}", text)


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_dicts(page: str) -> None:
    text = PAGES[page].read_text()
    assert with_tables(text) == text, "python tests/test_pages.py writes them anew"


def test_every_table_is_on_a_page() -> None:
    there = {match[2] for path in PAGES.values() for match in TABLE.finditer(path.read_text())}
    assert there == {table.__name__ for table in TABLES}


def test_no_page_is_too_long() -> None:
    lines = {page: len(PAGES[page].read_text().splitlines()) for page in MOST_LINES}
    assert {page: count for page, count in lines.items() if count > MOST_LINES[page]} == {}


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_no_link_is_dead(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            there = PAGES[page].parent / path if path else PAGES[page]
            assert there.is_file(), target
            assert not anchor or anchor in anchors(there.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_ours_that_is_named_is_there(page: str) -> None:
    named = re.findall(r"`((?:featurecache|heads|benchmarks|tests|docs)/[\w/.]*)`", PAGES[page].read_text())
    assert [path for path in named if not (TOP / path).exists()] == []


def commands(text: str) -> list[str]:
    return re.findall(r"^(?:    |\$ )(featurecache [a-z].*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_options_that_exist(page: str) -> None:
    for command in commands(PAGES[page].read_text()):
        words = shlex.split(command)[1:]
        subcommand = cli.main.commands[words[0]]
        subcommand.make_context(words[0], words[1:], resilient_parsing=False)


def test_every_network_of_the_field_has_a_name_that_its_library_knows() -> None:
    from featurecache.backbones import check_name

    text = PAGES["docs/networks.md"].read_text()
    names = [name for name in re.findall(r"`(?:--backbone )?([\w-]+:[^ `]+)", text) if not name.startswith("hf")]
    assert len(names) > 6
    for name in names:
        check_name(name)


def test_every_command_is_on_a_page() -> None:
    text = "\n".join(path.read_text() for path in PAGES.values())
    assert [name for name in cli.main.commands if f"featurecache {name}" not in text] == []


def write_small_npz(path: Path) -> None:
    """160 images where PneumoniaMNIST has 5,856; as there, some are copies of another."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 100), ("val", 30), ("test", 30)):
        labels = np.arange(1, count + 1)[:, None] % 2
        images = rng.integers(0, 160, (count, 28, 28))
        images[:, 6:22, 6:22] += (rng.normal(25 * labels, 8)[:, :, None]).astype(int)
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": labels}
    arrays["train_images"][[4, 5]] = arrays["train_images"][[0, 1]]
    arrays["test_images"][[4, 5]] = arrays["test_images"][[0, 1]]
    arrays["val_images"][[4, 5]] = arrays["train_images"][[2, 3]]
    np.savez(path, **arrays)


def stable(line: str) -> str:
    """What of a line is the same with other images on another machine."""
    line = re.sub(r"-[0-9a-f]{8}\b", "-#", line).replace("vit-demo-…", "vit-demo-#")
    line = line.replace("proportions by Wilson; ", "")  # where one is 0 or 1
    line = re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?", "#", line)
    line = re.sub(r"# ([kMG]?B|s|min)\b", "# unit", line).replace("# of #", "#")
    return re.sub(r"\s+", " ", line).strip()


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content), in order."""
    return re.findall(r"^```(python|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def play(page: Path, *, numbers: bool = False) -> list[str]:
    """Do all that a page shows, in the working directory; what of it is not as shown."""
    wrong: list[str] = []
    for language, content in blocks(page.read_text()):
        if language == "console":
            for command, shown in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", content, re.MULTILINE):
                wrong += differs(command, shown.splitlines(), numbers)
        elif named := re.match(r"# (\w+\.py), ", content):
            Path(named[1]).write_text(content)
        else:
            try:
                exec(compile(content, page.name, "exec"), {"__name__": page.stem})
            except Exception as error:
                wrong.append(f"{page.name}: {error!r} in\n\n{content}")
    return wrong


def differs(command: str, shown: list[str], numbers: bool) -> list[str]:
    """A line that is shown below a command and does not come when it runs."""
    result = call(*shlex.split(command)[1:])
    if result.exit_code != any(line.startswith("error:") for line in shown):
        return [f"{command}\n\nends with {result.exit_code}: {result.output} {result.exception!r}"]
    written = result.output.splitlines()
    for line in shown:
        match = line if line == "…" else next((each for each in written if stable(each) == stable(line)), None)
        if match is None:
            return [f"{command}\n\ndoes not write\n\n{line}\n\nthere, but\n\n{result.output}"]
        measured = [[float(value) for value in re.findall(r"\b\d\.\d{3}\b", each)] for each in (line, match)]
        if numbers and measured[1] != pytest.approx(measured[0], abs=0.05):
            return [f"{command}\n\nwrites\n\n{match}\n\nand not\n\n{line}"]
    return []


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for variable in ("FEATURECACHE_DIR", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    write_small_npz(tmp_path / "pneumoniamnist.npz")
    return tmp_path


def unpack() -> None:
    """The images, by the snippet that unpacks them."""
    snippet = next(content for language, content in blocks(PAGES["docs/start.md"].read_text()) if language == "python")
    exec(compile(snippet, "start.md", "exec"), {})


@pytest.mark.integration
def test_the_readme_runs_as_it_stands(here: Path) -> None:
    unpack()
    assert play(TOP / "README.md") == []
    assert (here / "runs/second/metrics.json").exists()


@pytest.mark.integration
def test_the_pages_run_as_they_stand(here: Path) -> None:
    assert [wrong for name in SESSION for wrong in play(TOP / f"docs/{name}.md")] == []
    assert all((here / file).is_file() for file in ("sheet.png", "runs/ablate-chest-1/report.html"))
    own = ["info --backbone python:my_networks:chest_net"]
    own += ["train-head --head python:my_heads:Squeezed --features vit-demo/chest --epochs 1 --no-controls"]
    for command in own:
        result = call(*shlex.split(command))
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_the_numbers_shown_are_those_of_the_real_images(here: Path, real_data: Path) -> None:
    (here / "pneumoniamnist.npz").write_bytes((real_data / "pneumoniamnist.npz").read_bytes())
    unpack()
    assert play(TOP / "README.md", numbers=True) == []


@pytest.mark.integration
def test_the_demo_says_what_its_numbers_are_worth(here: Path) -> None:
    result = call("demo")
    assert result.exit_code == 0, result.output
    assert "these numbers show that the tool works, not what a backbone can do" in result.stdout
    table = result.stdout.split("what it costs")[0]
    accuracy = {line.split("  ")[0]: float(line.split()[-2]) for line in table.splitlines() if "0." in line}
    assert accuracy["chance"] == pytest.approx(0.1)
    assert accuracy["linear on cls"] < 0.95 < accuracy["pixels, logistic regression"]
    assert accuracy["large on tokens"] > 0.9


if __name__ == "__main__":
    for each in PAGES.values():
        each.write_text(with_tables(each.read_text()))
