"""The house: imports run down its layers, no circle, modules of a readable size, names that mean one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (  # from the lowest to the highest; what stands in one tuple does not know each other
    ("featurecache.errors", "featurecache.formatting", "featurecache.arithmetic"),
    ("featurecache.files", "featurecache.outputs"),
    ("featurecache.images",),
    ("featurecache.sources", "featurecache.backbones", "featurecache.store"),
    ("featurecache.extraction",),
    ("featurecache.maintenance",),
    ("featurecache.commands",),
    ("heads.settings", "heads.stratify", "heads.memory"),
    ("heads.metrics",),
    ("heads.task", "heads.models"),
    ("heads.pixel_view",),
    ("heads.splits",),
    ("heads.runs", "heads.alignment"),
    ("heads.evaluation",),
    ("heads.inference",),
    ("heads.training", "heads.explanations"),
    ("heads.sweeps",),
    ("heads.reports",),
    ("heads.api",),
    ("heads.studies",),
    ("heads.commands",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
PUBLIC = ("featurecache", "heads")  # the two lazy tables: names of everything, imported when first used
MODULES, LINES, MODULE_LINES = 178, 41_705, 400  # a change that makes them more says why
SAME_NAME = {"load", "main"}  # what a module calls its entry


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every module outside tests and benchmarks."""
    paths = [path for package in PUBLIC for path in (ROOT / package).rglob("*.py")]
    return {dotted(path): ast.parse(path.read_text()) for path in [*paths, ROOT / "cli.py"]}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str | None:
    """The layer's entry that a module belongs to; ``featurecache`` and ``heads`` alone are in none."""
    parts = module.replace("featurecache.__main__", "cli").split(".")
    return next((name for k in range(len(parts), 0, -1) if (name := ".".join(parts[:k])) in LEVEL), None)


def imports(tree: ast.AST) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every import of a module of ours with the module it names: those in functions and for types too."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else node.module for name in below]
        for name in dict.fromkeys(names):
            if name in modules() and isinstance(node, ast.Import | ast.ImportFrom):
                yield node, name


@cache
def arrows() -> dict[str, set[str]]:
    below = {name: tree for name, tree in modules().items() if name not in PUBLIC}
    return {name: {target for _, target in imports(tree)} - {name} for name, tree in below.items()}


def test_every_module_has_a_room() -> None:
    assert [name for name in modules() if name not in PUBLIC and room(name) is None] == []


def test_imports_run_down() -> None:
    up = [
        f"{source} -> {target}"
        for source, targets in arrows().items()
        for target in sorted(targets)
        if (here := room(source)) and (there := room(target)) and here != there and LEVEL[here] <= LEVEL[there]
    ]
    assert up == []


def test_no_circle_between_modules() -> None:
    waiting = {name: set(targets) for name, targets in arrows().items()}
    while leaves := [name for name, targets in waiting.items() if not targets & waiting.keys()]:
        for name in leaves:
            del waiting[name]
    assert {name: sorted(targets & waiting.keys()) for name, targets in waiting.items()} == {}


def test_own_modules_are_imported_at_the_top() -> None:
    """Except where something must not be loaded: by commands, and by heads that go back to images."""
    hidden = []
    for name, tree in modules().items():
        if name in (*PUBLIC, "cli") or ".commands" in name:
            continue
        top = {id(node) for node in tree.body}
        for node, target in imports(tree):
            back = name.startswith("heads") and target.startswith("featurecache")
            if id(node) not in top and not back:
                hidden.append(f"{name}:{node.lineno} {target}")
    assert hidden == []


def test_no_module_is_longer_than_400_lines() -> None:
    length = {name: len(source_of(name).splitlines()) for name in modules()}
    assert {name: lines for name, lines in length.items() if lines > MODULE_LINES} == {}


def test_the_house_is_no_larger_than_planned() -> None:
    more_than_a_docstring = [name for name, tree in modules().items() if len(tree.body) > 1]
    lines = sum(len(source_of(name).splitlines()) for name in modules())
    print(f"{len(more_than_a_docstring)} modules, {lines:,} lines")
    assert len(more_than_a_docstring) <= MODULES
    assert lines <= LINES


def source_of(name: str) -> str:
    base = ROOT.joinpath(*name.split("."))
    return (base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py").read_text()


def test_a_public_name_means_one_thing() -> None:
    """No class or public function of one name in two modules; commands carry their command's name."""
    homes: dict[str, list[str]] = defaultdict(list)
    for name, tree in modules().items():
        if name == "cli" or ".commands" in name:
            continue
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if public or isinstance(node, ast.ClassDef):
                homes[node.name].append(name)
    assert {name: where for name, where in homes.items() if len(where) > 1 and name not in SAME_NAME} == {}


def test_an_arrow_that_runs_up_is_seen() -> None:
    """The checks themselves: also in functions and for types."""
    code = "def f():\n    from heads import task\n\nif TYPE_CHECKING:\n    from heads.runs.run import Run\n"
    assert [target for _, target in imports(ast.parse(code))] == ["heads.task", "heads.runs.run"]
