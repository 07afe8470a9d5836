"""The canary's reference: what a store's first runs made of the probe images, in ``canary.safetensors``.

Read and written as numpy arrays, without torch: `verify` reads it too. What it is compared with is in the extraction's
canary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from featurecache.errors import DamagedFile
from featurecache.files.atomic import refuse_links, write_whole
from featurecache.store.store import Store

_LARGEST = 1 << 30  # bytes; four images of all layers of the largest networks stay far below
_RENEW = "featurecache repair makes it again, after comparing rows of the store with what this machine computes."


def canary_path(store: Store) -> Path:
    return store.path / "canary.safetensors"


def reference_hash(arrays: Mapping[str, np.ndarray], made_by: Mapping[str, str]) -> str:
    """Of ``pixels`` uint8 [4,3,h,w] and rows [4, ...] by output, and of the versions that made them."""
    digest = xxhash.xxh3_128(json.dumps(made_by, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} torch.{array.dtype} {list(array.shape)}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def read_reference(store: Store) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """``pixels`` and the rows by output, and what made them; None where the store has none yet. Raises DamagedFile."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = canary_path(store)
    refuse_links(path)
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _LARGEST or not path.is_file():
            raise ValueError("it is no small file")
        data = path.read_bytes()  # once: safe_open would open it twice, and it may be replaced in between
        arrays = load(data)
        notes = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        made_by = json.loads(notes["made_by"])
        fine = "pixels" in arrays and reference_hash(arrays, made_by) == notes["hash"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} cannot be read ({error}). {_RENEW}") from error
    if not fine:
        raise DamagedFile(f"{path} is damaged: its content does not match its hash. {_RENEW}")
    return arrays, made_by


def write_reference(store: Store, arrays: Mapping[str, np.ndarray], made_by: Mapping[str, str]) -> None:
    from safetensors.numpy import save

    notes = {"made_by": json.dumps(made_by, sort_keys=True), "hash": reference_hash(arrays, made_by)}
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_whole(canary_path(store), save(whole, notes), inside=store.path)
