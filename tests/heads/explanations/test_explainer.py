"""What an explainer refuses in one sentence, before it computes or where an image turns out to be none."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from featurecache.errors import BadOption, NotInCache
from heads.explanations.explainer import Explainer

IMAGE = SimpleNamespace(name="a.png", digest=b"0" * 32, data=b"")


def explainer(kind: str = "features") -> Explainer:
    config = {"spec": {"kind": kind}, "provenance": {}, "view": {"label": "imported/old"}}
    own = {"classes": ("a", "b"), "task": "binary", "calibration": SimpleNamespace(temperature=1.0)}
    run = SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2)), config=config, **own)
    return Explainer(run, SimpleNamespace(view=lambda run: None))


def test_a_network_on_pixels_has_no_gradient_of_tokens():
    with pytest.raises(BadOption, match="--method gradient is for heads on tokens"):
        explainer("pixels").maps("contribution", [IMAGE], np.zeros(1, int), "gradient")


def test_an_imported_view_has_no_backbone_for_other_images():
    with pytest.raises(NotInCache, match="imported/old was imported, and its backbone is not known"):
        explainer().features([IMAGE], "cls")


def test_an_image_that_the_backbone_cannot_read_is_named():
    broken = explainer()
    broken.__dict__["_backbone"] = SimpleNamespace(rows=lambda *_: (torch.zeros(0, 2), [(0, "it is cut short")]))
    with pytest.raises(BadOption, match=r"a\.png cannot be read: it is cut short"):
        broken.features([IMAGE], "cls")
