"""Importing a module of the user's own: the code that runs is the code that is known by its digest.

What a ``python:`` backbone computes is decided, beside its weights, by the source of its module and of every module of
the user's that this one imports, near or far: their digests are in the fingerprint. They are found by reading import
statements, wherever in a file they stand; what lies in the standard library or in site-packages is a library, and its
version is recorded but not hashed. The bytes that were hashed are the bytes that are compiled: no ``.pyc`` is asked,
and a module that this Python imported before and that was edited since is imported again.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from featurecache.errors import UnknownBackbone, first_line

_OURS = ("featurecache", "heads")
_ROOT = Path(__file__).parents[2]  # where these lie
_LIBRARIES = {"site-packages", "dist-packages"}
_STANDARD = Path(sysconfig.get_path("stdlib"))
_named: set[Path] = set()  # files of the modules that somebody named in this process
_compiled: dict[str, tuple[Path, bytes]] = {}  # module -> the file and source that this process compiled


@contextlib.contextmanager
def import_user_module(name: str) -> Iterator[tuple[ModuleType, dict[str, str]]]:
    """(the module, name -> BLAKE2b-128 of its source and of the user's modules that it imports).

    Looked for in the current folder first, then in ``sys.path``; inside the block imports find both too. Raises
    UnknownBackbone where there is none, or it fails.
    """
    folder, finder = os.getcwd(), _Finder()
    sys.path.insert(0, folder)  # a console script does not look where it is started
    sys.meta_path.insert(0, finder)
    try:
        module = _import(name, finder)
        sources = sorted(finder.sources.items())
        yield module, {name: hashlib.blake2b(source, digest_size=16).hexdigest() for name, (_, source) in sources}
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(folder)


def import_once(name: str) -> ModuleType:
    """The module of a head, which is imported once a process. Raises UnknownBackbone as `import_user_module`."""
    if name not in sys.modules:
        with import_user_module(name):
            pass
    if file := getattr(sys.modules[name], "__file__", None):
        _named.add(Path(file))
    return sys.modules[name]


def user_line(error: BaseException) -> str | None:
    """``nets.py, line 7: ValueError: what it says``, where an error came through code in the folder of a module that
    the user named; None elsewhere."""
    folders = {file.parent for file in _named}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        ours = path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in (*_OURS, "cli.py")
        if any(map(path.is_relative_to, folders)) and not ours and not _LIBRARIES & set(path.parts):
            return f"{path.name}, line {frame.lineno}: {first_line(error)}"
    return None


def _import(module: str, finder: _Finder) -> ModuleType:
    importlib.invalidate_caches()
    try:
        finder.sources = user_sources(module)
        _named.update(file for file, _ in finder.sources.values())
        if any(_compiled.get(name) != source for name, source in finder.sources.items() if name in sys.modules):
            for name in finder.sources:
                sys.modules.pop(name, None)
                package, _, last = name.rpartition(".")
                if hasattr(sys.modules.get(package), last):  # `from package import last` would find it there
                    delattr(sys.modules[package], last)
        if module in finder.sources:
            return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises; a script may parse its arguments
        raise UnknownBackbone(
            f"the module {module} cannot be imported ({user_line(error) or first_line(error)})"
        ) from error
    raise UnknownBackbone(f"there is no {module.replace('.', '/')}.py in this folder or in PYTHONPATH")


def user_sources(module: str) -> dict[str, tuple[Path, bytes]]:
    """Module name -> (file, its bytes): ``module`` itself and what it imports of the user's own. Nothing is run."""
    sources: dict[str, tuple[Path, bytes]] = {}
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if not name or name in seen or name.partition(".")[0] in _OURS:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])  # a package is run before what lies in it
        spec = _spec(name)
        path = Path(spec.origin) if spec is not None and spec.origin and spec.has_location else Path()
        library = _LIBRARIES & set(path.parts) or path.is_relative_to(_STANDARD)
        if path.suffix == ".py" and (name == module or not library):
            sources[name] = path, path.read_bytes()
            waiting += _imported_names(name, *sources[name])
    return sources


def _spec(name: str) -> ModuleSpec | None:
    """Where a module would be imported from; unlike importlib's own this neither runs its packages nor believes
    ``sys.modules``, which may hold another folder's module of that name."""
    package, folders = name.rpartition(".")[0], None
    if package:
        above = _spec(package)
        if above is None or above.submodule_search_locations is None:
            return None
        folders = list(above.submodule_search_locations)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    return next((spec for finder in finders if (spec := finder.find_spec(name, folders)) is not None), None)


def _imported_names(name: str, path: Path, source: bytes) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                with contextlib.suppress(ImportError):  # beyond the top: running it will say so
                    base = importlib.util.resolve_name("." * node.level + base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


class _Finder:
    """Finds the user's modules; importlib asks it before anything else."""

    def __init__(self) -> None:
        self.sources: dict[str, tuple[Path, bytes]] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in self.sources:
            return None
        file, source = self.sources[name]
        return importlib.util.spec_from_file_location(name, file, loader=_AsRead(name, str(file), source))


class _AsRead(SourceFileLoader):
    """Runs the bytes that were hashed."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        _compiled[fullname] = Path(self.path), self.source
        code: CodeType = self.source_to_code(self.source, self.path)
        return code
