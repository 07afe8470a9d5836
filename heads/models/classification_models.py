"""Fine-tuned networks as models of transformers for image classification (``ViTForImageClassification``, …).

Such a model takes the network and, as its classifier, the head of the run with prior correction and temperature worked
in, so that ``pipeline("image-classification")`` gives the probabilities of ``featurecache predict``. Whether a class of
transformers is the same computation is not known of it but measured: its logits are compared with ours.

B batch, C classes, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from heads.metrics.calibration import Calibration

CLOSE = 1e-4  # of logits, absolute and relative: another order of the same sums


def calibrated(classifier: nn.Linear, calibration: Calibration) -> nn.Linear:
    """[B,D] -> calibrated logits [B,C]: (W x + b + correction) / temperature as one linear layer."""
    with torch.device("cpu"):
        layer = nn.Linear(classifier.in_features, classifier.out_features)
    correction = torch.tensor(calibration.correction, dtype=torch.float64)
    weight, bias = (value.detach().cpu().double() for value in (classifier.weight, classifier.bias))
    with torch.no_grad():
        layer.weight.copy_(weight / calibration.temperature)
        layer.bias.copy_((bias + correction) / calibration.temperature)
    return layer


def classification_model(
    network: Any, state: dict[str, torch.Tensor], classifier: nn.Linear, classes: Sequence[str], multilabel: bool,
    probe: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> Any:  # fmt: skip
    """The model of transformers that is ``network``, whose weights are ``state``, with ``classifier`` behind it; None
    where transformers has none that computes the same. ``probe``: pixels [B,3,h,w], normalised, and their vectors."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as kinds

    kind = kinds.get(type(network.config), None)
    if kind is None:
        return None
    config = copy.deepcopy(network.config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.problem_type = f"{'multi' if multilabel else 'single'}_label_classification"
    with torch.random.fork_rng():
        model = (kind[0] if isinstance(kind, tuple) else kind)(config).eval()
    behind = getattr(model, "classifier", nn.Identity())
    layers = [part for part in behind.modules() if isinstance(part, nn.Linear)]
    if len(layers) != 1 or layers[0].weight.shape != classifier.weight.shape:
        return None
    layers[0].load_state_dict(classifier.state_dict())
    x, vectors = probe()
    with torch.no_grad():
        try:
            model.base_model.load_state_dict(state)
            logits = model(x).logits
        except (RuntimeError, ValueError):  # other parts than ours, or another size of images
            return None
        return model if torch.allclose(logits, classifier(vectors), CLOSE, CLOSE) else None
