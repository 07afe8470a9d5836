"""Files of weights: find them on the hub, in a cache or a folder, read them without running code, know them by digest.

``.safetensors``, or what ``torch.save`` wrote. torch's own reader (``weights_only``) refuses a file for every object
that is no tensor: the ``argparse.Namespace`` and the numpy numbers that training scripts leave beside the weights. Here
an inert placeholder takes the place of each; no class or function that a file names is ever looked up.

`weights_digest` is hashed into fingerprints: another order, spelling or selection of tensors is another store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from featurecache.backbones.state_dicts import StateDict, first_names, select_state_dict
from featurecache.errors import FeatureCacheError, UnknownBackbone, WeightsDoNotFit, WeightsNotFound, first_line
from featurecache.files.atomic import refuse_special
from featurecache.files.records import check_part_of_a_run
from featurecache.formatting import shell_word, shell_words

REACH = 4.0  # seconds the hub has to answer before the local cache is used instead
STALL = 10.0  # seconds a server may stay silent
_SETTINGS = ["config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json"]
_SAFE = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_BIN = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
_OPEN_CLIP = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
_IN_FOLDER = (*_SAFE[:2], *_BIN[:2], *_OPEN_CLIP)  # in the order of preference
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def weights_unavailable(what: str, fetch: str, place: str, cache: str = "HF_HOME") -> WeightsNotFound:
    """The ways out when weights are neither at hand nor to be had: the command that ``fetch``es them to ``place`` on
    another machine, an existing cache, none."""
    return WeightsNotFound(
        f"the weights of {what} are not on this machine and the hub cannot be reached.\n"
        f"       where there is a network:  {fetch}\n"
        f"       then carry it here:  --weights {shell_word(place)}\n"
        f"       or:  {cache}=…   an existing hub cache        --random-weights   try the tool without them"
    )


def downloaded_file(url: str) -> Path:
    """Where torch.hub keeps a published file of weights, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def download_weights(url: str, title: str) -> Path:
    """A published file of weights, in torch.hub's folder or downloaded into it."""
    path = downloaded_file(url)
    if path.is_file():
        return path
    prefix, before = re.search(r"-([0-9a-f]{8,})\.", path.name), socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(STALL)  # torch.hub opens its connections without a limit
        with contextlib.redirect_stdout(sys.stderr):
            torch.hub.download_url_to_file(url, str(path), prefix[1] if prefix else None, progress=sys.stderr.isatty())
    except RuntimeError as error:
        raise WeightsNotFound(f"{url} came damaged ({error}); try again, or --weights FILE") from error
    except OSError as error:
        raise weights_unavailable(title, f"curl -LO {url}", path.name, "TORCH_HOME") from error
    finally:
        socket.setdefaulttimeout(before)
    return path


def snapshot(repo: str, revision: str | None = None, *, weights: bool = True) -> tuple[Path, str]:
    """(folder, commit) of a repository of the hub, or of its local cache where the hub does not answer.

    The hub is asked for the revision within a time limit first (its client has none of its own); the client's
    exceptions have no common root and changed their HTTP library twice, hence the wide ``except``.

    Raises:
        WeightsNotFound: neither the hub nor the local cache gives it.
        UnknownBackbone: the hub answers that there is no such repository or revision.
    """
    from huggingface_hub import HfApi

    is_commit = re.fullmatch("[0-9a-f]{40}", revision or "") is not None
    folder = _fetch(repo, revision, weights, offline=True) if is_commit else None
    if folder is not None:
        return folder, folder.name
    try:
        HfApi().repo_info(repo, revision=revision, timeout=REACH)
    except Exception as error:
        folder = _fetch(repo, revision, weights, offline=True)
        if folder is None:
            raise _hub_refusal(repo, revision, error) from error
        return folder, folder.name
    try:
        folder = _fetch(repo, revision, weights, offline=False)  # by name: only so the cache knows what it stands for
    except Exception as error:
        raise WeightsNotFound(f"{repo} could not be fetched from the hub: {first_line(error)}") from error
    if folder is None:
        raise WeightsNotFound(
            f"{repo} on the hub holds no {'weights' if weights else 'config.json'} of transformers or timm"
        )
    return folder, folder.name


def _fetch(repo: str, revision: str | None, weights: bool, *, offline: bool) -> Path | None:
    """The snapshot's folder, complete; None where it holds not what is needed. ``.bin`` only without safetensors,
    open_clip's files only without both."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    options = {"revision": revision, "local_files_only": offline, "etag_timeout": REACH}
    for patterns in [[*_SETTINGS, *kind] for kind in (_SAFE, _BIN, _OPEN_CLIP)] if weights else [_SETTINGS]:
        try:
            folder = Path(snapshot_download(repo, allow_patterns=patterns, **options))
        except (EntryNotFoundError, HFValidationError):
            if offline:
                return None
            raise
        settings = any((folder / name).is_file() for name in (_SETTINGS[0], _SETTINGS[-1]))
        if settings and (not weights or weights_file(folder) is not None):
            return folder
    return None


def _hub_refusal(repo: str, revision: str | None, error: Exception) -> FeatureCacheError:
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
        what = f"{repo} at revision {revision}" if revision else repo
        return UnknownBackbone(f"the hub has no {what}; if it is private, log in with: hf auth login")
    files, folder = '--include "*.json" --include "*.safetensors"', repo.rsplit("/", 1)[-1]
    words = ["hf", "download", repo, *(["--revision", revision] if revision else [])]
    return weights_unavailable(repo, f"{shell_words(words)} {files} --local-dir {shell_word(folder)}", f"{folder}/")


@contextlib.contextmanager
def library_errors(words: str, kind: type[FeatureCacheError] = WeightsDoNotFit) -> Iterator[None]:
    """Around a library's own call, or the reading of settings that a stranger wrote, and nothing else of ours: whatever
    is raised at what was not expected, as one sentence of ``kind``."""
    try:
        yield
    except (FeatureCacheError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of no common root
        raise kind(f"{words}: {first_line(error)}") from error


def split_weights(weights: str) -> tuple[Path, str]:
    """(path, name of one of the sets of weights in it) of ``FILE`` or ``FILE:NAME``."""
    path = Path(os.path.expanduser(weights))
    head, _, name = weights.rpartition(":")
    file = Path(os.path.expanduser(head))
    return (file, name) if head and name and not path.exists() and file.exists() else (path, "")


def existing_weights(path: Path | None) -> Path | None:
    """``path`` as it is. Raises WeightsNotFound; DamagedFile where it is a run's and not what was written."""
    if path is not None and not path.exists():
        raise WeightsNotFound(f"--weights {path}: there is no such file or folder")
    if path is not None:
        refuse_special(path)
        check_part_of_a_run(path)
    return path


def assumed_feeding(name: str, way: str) -> str:
    """What is said where a file of weights is fed as those of ``name``; ``way``: what would say otherwise."""
    return f"assumed, as {name} is fed: the file does not say; {way} would"


def weights_file(folder: Path) -> Path | None:
    """The file (or index of several) that holds the weights of a ``save_pretrained`` folder."""
    return next((folder / name for name in _IN_FOLDER if (folder / name).is_file()), None)


def read_checkpoint(path: Path, name: str = "") -> StateDict:
    """The weights of a folder, an index of several files, a ``.safetensors``, ``.bin`` or ``.pt``; of several sets of
    them in one file the one of this name.

    Raises:
        WeightsNotFound: nothing there.
        WeightsDoNotFit: not a file of tensors.
    """
    path = _file_at(path)
    if not path.is_file():
        raise WeightsNotFound(f"no weights at {path}; expected a folder, or a file ending in {', '.join(_SUFFIXES)}")
    if path.name.endswith(".index.json"):
        parts = [read_checkpoint(path.parent / part).tensors for part in sorted(set(_index(path).values()))]
        return select_state_dict(path, {key: value for part in parts for key, value in part.items()}, name)
    return select_state_dict(path, _content(path), name)


def tensor_names(path: Path) -> list[str]:
    """The names in a folder of weights; of safetensors without reading the tensors."""
    from safetensors import safe_open

    path = _file_at(path)
    if path.name.endswith(".index.json"):
        return list(_index(path))
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    return list(read_checkpoint(path).tensors)


def _index(path: Path) -> dict[str, str]:
    """Name of a tensor -> file beside the index that holds it. Raises WeightsDoNotFit."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {tensor: Path(file).name for tensor, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsDoNotFit(
            f'{path} is not an index of weights; expected {{"weight_map": {{name of a tensor: file}}}}'
        ) from error
    if not names or any(file.endswith(".index.json") for file in names.values()):
        raise WeightsDoNotFit(f"{path} names no files of weights in its weight_map; expected {_SUFFIXES[0]} or .bin")
    return names


def _file_at(path: Path) -> Path:
    """Of a folder its file of weights: one of the usual name, else the only one there is."""
    refuse_special(path)
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if file := weights_file(path) or (files[0] if len(files) == 1 else None):
        return file
    names = ", ".join(file.name for file in files[:4])
    what = f"{len(files)} files of weights ({names})" if files else "no file of weights"
    raise WeightsNotFound(f"{path} holds {what}; expected one, such as {_SAFE[0]}. --weights also takes one file")


def _content(path: Path) -> Any:
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except Exception as error:  # a damaged or hostile file fails in as many ways as there are
        raise WeightsDoNotFit(
            f"{path} cannot be read as weights ({refusal_reason(error)}); expected .safetensors, or a PyTorch file of "
            "tensors (code in files is never run)"
        ) from error


class PlaceholderClass:
    """For whatever a file names; a subclass for each, called as the file calls it."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_torch_file(path: Path) -> Any:
    """Tensors and what holds them, with placeholders for all else. Raises whatever torch's reader does."""
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
    match = re.search(r"(WeightsUnpickler error: |\n\n)([^\n]+?)(\. |\.?\n|$)", str(error).replace("\n\n\n", "\n\n"))
    return match[2] if match else first_line(error)


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """BLAKE2b-128 (hex) of names, dtypes, shapes and bytes, in the order of the names."""
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode())
        h.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def weights_identity(title: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What identifies the tensors that decide features. Raises WeightsDoNotFit: numbers that are none (NaN)."""
    bad = [
        name for name, t in tensors.items() if t.is_floating_point() and "mask" not in name and not t.isfinite().all()
    ]
    if bad:
        raise WeightsDoNotFit(
            f"the weights of {title} hold NaN or infinite numbers in {first_names(bad)}; every feature would be one. "
            "Such a training has diverged: give an earlier checkpoint"
        )
    return {"blake2b": weights_digest(tensors)}
