"""Small pretrained networks that tests train on, keep for ``extract`` and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from heads.models.catalogue import baseline_info, make_network
from heads.models.finetune import classifier_state, extract_options, load_finetuned, save_backbone
from heads.settings import Settings
from support import checkpoints

KINDS = ("vit", "deit", "dinov2", "clip_vision", "siglip", "beit", "resnet", "convnext")
FOLDERS = {kind: getattr(checkpoints, f"save_{kind}") for kind in KINDS}


def made(name: str, classes: int = 3, **options: Any) -> Any:
    side, generator = options.pop("image_size", None) or baseline_info(name).image_size, options.pop("generator", None)
    return make_network(Settings(name, **options), side, classes, generator)


def vit(folder: Path, **options: Any) -> Any:
    return made(f"finetune:hf:{checkpoints.save_vit(folder)}", **options)


def pixels(model: Any, count: int = 4, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *model.preprocess.size), generator=generator).float()


def trained(model: Any, steps: int = 2) -> Any:
    """After some steps on noise, in eval mode."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    x, y = pixels(model), torch.tensor([0, 1, 2, 0])
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def saved(model: Any, tmp_path: Path) -> Any:
    """Written into the folder ``tuned`` and read again."""
    assert save_backbone(model, tmp_path / "tuned") == extract_options(tmp_path / "tuned")
    return load_finetuned(tmp_path / "tuned", classifier_state(model), classes=3)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
