"""Weight files without pickle: reading, naming, digest, download, the sentence where there is none.

Find weights on the hub, in its local cache or in a folder; read them without running code; know them by digest.

``.safetensors``, or a PyTorch file by `featurecache.backbones.torch_files`. Never code from a repository.

What ``torch.save`` wrote, read without running anything that is in it.

torch's own reader (``weights_only``) refuses a file for every object that is no tensor: the ``argparse.Namespace`` and
the numpy numbers that training scripts leave beside the weights. Here an inert stand-in takes the place of each: it
drops what it is given, and no class or function that a file names is ever looked up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from featurecache.errors import FeatureCacheError, UnknownBackbone, WeightsDoNotFit, WeightsNotFound, first_line
from featurecache.formatting import abbreviated


def unwrapped(title: str, state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefix under which a training script keeps the network (``model.``, ``net.backbone.``)."""
    if not own or any(name in own for name in state):
        return state
    first = max(own, key=len)
    prefixes = [name.removesuffix(first) for name in state if name.endswith(f".{first}")]
    if len(prefixes) > 1:
        raise WeightsDoNotFit(
            f"the weights hold {title} {len(prefixes)} times, as {abbreviated(prefixes, 3)}; expected it once"
        )
    if not prefixes:
        return state
    return {name.removeprefix(prefixes[0]): value for name, value in state.items() if name.startswith(prefixes[0])}


STALL = 10.0  # seconds a server may stay silent


def fetched(url: str, title: str) -> Path:
    """A published file of weights, in torch.hub's folder or downloaded into it."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)
            with _time_limit(STALL), contextlib.redirect_stdout(sys.stderr):
                torch.hub.download_url_to_file(
                    url, str(path), prefix[1] if prefix else None, progress=sys.stderr.isatty()
                )
        except RuntimeError as error:
            raise WeightsNotFound(f"{url} came damaged ({error}); try again, or --weights FILE") from error
        except OSError as error:
            raise not_here(title, copy="FILE", cache="TORCH_HOME") from error
    return path


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """torch.hub opens its connections without one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


REACH = 4.0  # seconds the hub has to answer before the local cache is used instead
_SETTINGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
_SAFE = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_BIN = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
_IN_FOLDER = (_SAFE[0], _SAFE[1], _BIN[0], _BIN[1])  # in the order of preference
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put the state dict


def not_here(what: str, *, copy: str = "FOLDER", cache: str = "HF_HOME") -> WeightsNotFound:
    """The three ways out when weights are neither at hand nor to be had."""
    return WeightsNotFound(
        f"the weights of {what} are not on this machine and the hub cannot be reached.\n"
        f"       --weights {copy:8} a copy you have        {cache}=…   an existing hub cache        "
        "--random-weights   try the tool without them"
    )


def snapshot(repo: str, revision: str | None = None, *, weights: bool = True) -> tuple[Path, str]:
    """(folder, commit) of a repository of the hub, or of its local cache where the hub does not answer.

    The hub is asked for the revision within a time limit first (its client has none of its own); the client's
    exceptions have no common root and changed their HTTP library twice, hence the wide ``except``.

    Raises:
        WeightsNotFound: neither the hub nor the local cache gives it.
        UnknownBackbone: the hub answers that there is no such repository or revision.
    """
    from huggingface_hub import HfApi

    cached = _fetch(repo, revision, weights, offline=True) if _is_commit(revision) else None
    if cached is not None:
        return cached, cached.name
    try:
        HfApi().repo_info(repo, revision=revision, timeout=REACH)
    except Exception as error:
        cached = _fetch(repo, revision, weights, offline=True)
        if cached is None:
            raise _refusal(repo, revision, error) from error
        return cached, cached.name
    try:
        folder = _fetch(repo, revision, weights, offline=False)  # by name: only so the cache knows what it stands for
    except Exception as error:
        raise WeightsNotFound(f"{repo} could not be fetched from the hub: {first_line(error)}") from error
    if folder is None:
        raise WeightsNotFound(f"{repo} on the hub holds no {'weights' if weights else 'config.json'} of transformers")
    return folder, folder.name


def _is_commit(revision: str | None) -> bool:
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def _fetch(repo: str, revision: str | None, weights: bool, *, offline: bool) -> Path | None:
    """The snapshot's folder, complete; None where it holds not what is needed. ``.bin`` only without safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    for patterns in [[*_SETTINGS, *_SAFE], [*_SETTINGS, *_BIN]] if weights else [_SETTINGS]:
        try:
            folder = Path(
                snapshot_download(
                    repo, revision=revision, allow_patterns=patterns, local_files_only=offline, etag_timeout=REACH
                )
            )
        except (EntryNotFoundError, HFValidationError):
            if offline:
                return None
            raise
        if (folder / "config.json").is_file() and (not weights or weights_file(folder) is not None):
            return folder
    return None


def _refusal(repo: str, revision: str | None, error: Exception) -> FeatureCacheError:
    """What to say when the local cache has nothing and the hub answered with ``error``, or not at all."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return UnknownBackbone(f'"{repo}" cannot be the name of a repository; expected hf:<owner>/<name>')
    if isinstance(error, errors.GatedRepoError):
        return WeightsNotFound(
            f"the hub gives {repo} only to those who accepted its terms: accept them on its page and log in "
            "(hf auth login), or give a copy you have: --weights FOLDER"
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        asked = f"{repo} at revision {revision}" if revision else repo
        return UnknownBackbone(f"the hub has no {asked}; if it is private, log in with: hf auth login")
    return not_here(repo)


def weights_file(folder: Path) -> Path | None:
    """The file (or index of several) that holds the weights of a ``save_pretrained`` folder."""
    return next((folder / name for name in _IN_FOLDER if (folder / name).is_file()), None)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """name -> tensor, as in the file: a folder, an index of several files, ``.safetensors``, ``.bin``, ``.pt``.

    Raises:
        WeightsNotFound: nothing there.
        WeightsDoNotFit: not a file of tensors.
    """
    if path.is_dir():
        path = weights_file(path) or _only_file(path)
    if not path.is_file():
        raise WeightsNotFound(f"no weights at {path}; expected a folder, or a file ending in {', '.join(_SUFFIXES)}")
    if path.name.endswith(".index.json"):
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {key: value for name in names for key, value in read_state_dict(path.parent / Path(name).name).items()}
    return _tensors(path)


def tensor_names(path: Path) -> list[str]:
    """The names in a folder of weights; of safetensors without reading the tensors."""
    from safetensors import safe_open

    path = (weights_file(path) or _only_file(path)) if path.is_dir() else path
    if path.name.endswith(".index.json"):
        return list(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    return list(read_state_dict(path))


def _only_file(folder: Path) -> Path:
    files = sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES)
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} files of weights ({', '.join(f.name for f in files[:4])})" if files else "no file of weights"
    raise WeightsNotFound(f"{folder} holds {found}; expected one, such as {_SAFE[0]}. --weights also takes one file")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        data = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except Exception as error:  # a damaged or hostile file fails in as many ways as there are
        raise WeightsDoNotFit(
            f"{path} cannot be read as weights ({refusal_reason(error)}); expected .safetensors, or a PyTorch file of "
            "tensors (code in files is never run)"
        ) from error
    inner = _inner(path, data)
    if not isinstance(inner, Mapping) or not all(isinstance(k, str) for k in inner):
        raise WeightsDoNotFit(
            f"{path} holds a {type(inner).__name__}; expected a state dict, name by name a tensor: "
            "torch.save(network.state_dict(), FILE)"
        )
    state = {key: value for key, value in inner.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise WeightsDoNotFit(f"{path} holds no tensors; expected a state dict")
    parallel = all(key.startswith("module.") for key in state)  # saved from DataParallel
    return {key.removeprefix("module.") if parallel else key: value for key, value in state.items()}


def _inner(path: Path, data: Any) -> Any:
    """The state dict in what a training script has saved: under one of the usual names, else the only one there is."""
    if not isinstance(data, Mapping):
        return data
    usual = [data[key] for key in _WRAPPERS if isinstance(data.get(key), Mapping)]
    if usual or _holds_tensors(data):
        return usual[0] if usual else data
    held = [key for key, value in data.items() if isinstance(value, Mapping) and _holds_tensors(value)]
    if len(held) > 1:
        raise WeightsDoNotFit(
            f"{path} holds {len(held)} state dicts ({abbreviated(map(str, held), 3)}); save the one you mean"
        )
    return data[held[0]] if held else data


def _holds_tensors(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values.values())


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """BLAKE2b-128 (hex) of names, dtypes, shapes and bytes, in the order of the names."""
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode())
        h.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


class PlaceholderClass:
    """For whatever a file names; a subclass for each, called as the file calls it."""

    def __new__(cls, *arguments: Any) -> PlaceholderClass:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch_file(path: Path) -> Any:
    """Tensors and what holds them, with stand-ins for all else. Raises whatever torch's reader does."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # of a format before torch 1.6, or TorchScript
            names = []
        if not names:
            raise
    inert: list[Any] = [(type(name, (PlaceholderClass,), {}), name) for name in names]
    with torch.serialization.safe_globals(inert):
        return torch.load(path, map_location="cpu", weights_only=True)


def refusal_reason(error: Exception) -> str:
    """The reason out of what torch's reader says, which begins with advice to run the file's code."""
    found = re.search(r"(WeightsUnpickler error: |\n\n)([^\n]+?)(\. |\.?\n|$)", str(error).replace("\n\n\n", "\n\n"))
    return found[2] if found else f"{type(error).__name__}: {error}".splitlines()[0]
