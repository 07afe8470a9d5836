"""Whether what Grad-CAM looks at has a gradient at every place."""

from __future__ import annotations

from typing import Any

import torch


def check_cam_layer(model: Any, pixels: torch.Tensor) -> tuple[int, ...]:
    """The shape of what the layer of Grad-CAM gives; no place of it is without a gradient."""
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    hook = model.cam_layer.register_forward_hook(keep)
    model(pixels)[:, 1].sum().backward()
    hook.remove()
    (output,) = seen
    assert output.grad is not None
    if model.cam_grid is None:
        assert output.ndim == 4 and output.grad.abs().sum((1, 2, 3)).min() > 0
    else:
        prefix, h, w = model.cam_grid
        assert output.shape[1] == prefix + h * w and output.grad.abs().sum(2).min() > 0
    return tuple(output.shape)
