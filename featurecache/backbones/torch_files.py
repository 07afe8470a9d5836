"""What ``torch.save`` wrote, read without running anything that is in it.

torch's own reader (``weights_only``) refuses a file for every object that is no tensor: the ``argparse.Namespace`` and
the numpy numbers that training scripts leave beside the weights. Here an inert stand-in takes the place of each: it
drops what it is given, and no class or function that a file names is ever looked up.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch


class StandIn:
    """For whatever a file names; a subclass for each, called as the file calls it."""

    def __new__(cls, *arguments: Any) -> StandIn:
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
    inert: list[Any] = [(type(name, (StandIn,), {}), name) for name in names]
    with torch.serialization.safe_globals(inert):
        return torch.load(path, map_location="cpu", weights_only=True)


def refusal(error: Exception) -> str:
    """The reason out of what torch's reader says, which begins with advice to run the file's code."""
    found = re.search(r"(WeightsUnpickler error: |\n\n)([^\n]+?)(\. |\.?\n|$)", str(error).replace("\n\n\n", "\n\n"))
    return found[2] if found else f"{type(error).__name__}: {error}".splitlines()[0]
