"""A wheel and an sdist, as `python -m build` makes them, work where nothing but their dependencies is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TOP = Path(__file__).parent.parent


def left_out(folder: str, names: list[str]) -> set[str]:
    """What is no source: hidden files and what is built, and at the top what commands write."""
    built = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "_build", "build", "dist")(folder, names)
    return built | ({"cache", "runs"} if Path(folder) == TOP else set())


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def built(source: Path, out: Path, *forms: str) -> list[Path]:
    run(sys.executable, "-m", "build", "--no-isolation", *forms, "--outdir", out, source, cwd=source)
    return sorted(out.iterdir())


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith(("RECORD", "WHEEL"))}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel) of the working tree."""
    pytest.importorskip("build", reason="build is not installed")
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(TOP, folder / "source", ignore=left_out)
    wheel, sdist = built(folder / "source", folder / "dist", "--sdist", "--wheel")
    return (sdist, wheel) if sdist.name.endswith(".tar.gz") else (wheel, sdist)


def test_the_wheel_holds_the_packages_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    names = set(content(distributions[1]))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"featurecache", "heads", "cli.py"}
    assert {"featurecache/py.typed", "heads/py.typed", "featurecache/probes/photo.jpg"} <= names
    modules = [path for top in ("featurecache", "heads") for path in TOP.glob(f"{top}/**/*.py")]
    sources = {path.relative_to(TOP).as_posix() for path in modules} | {"cli.py"}
    assert {name for name in names if name.endswith(".py")} == sources
    assert any(name.endswith("LICENSE") for name in names)


def test_the_sdist_builds_the_same_wheel(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = distributions
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    assert {"README.md", "CHANGELOG.md", "LICENSE", "NOTICE", "docs", "tests"} <= set(os.listdir(source))
    (again,) = built(source, tmp_path / "dist", "--wheel")
    assert content(again) == content(wheel)


def test_the_installed_wheel_runs_the_demo(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment that sees this one's packages, but not this checkout."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    seen = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    # their own .pth files, as of editable installs, are not read
    (site / "dependencies.pth").write_text("\n".join(seen))
    install = ("install", "--no-deps", "--no-index", distributions[1])
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    code = "import featurecache, heads, cli; print(featurecache.__file__, cli.__file__)"
    where = run(python, "-c", code, cwd=tmp_path)
    assert where.count(str(site)) == 2
    assert "these numbers show that the tool works" in run(home / "bin/featurecache", "demo", cwd=tmp_path)
    assert (tmp_path / "runs/demo-report/report.html").is_file()
