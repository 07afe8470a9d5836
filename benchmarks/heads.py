"""Training heads, beside the plain way to train each and the machine's own products.

    python benchmarks/heads.py [--rounds 5] [--only large,many,linear,switch]

Every line is measured in one run, interleaved; medians of the rounds, as ratios. ``large``: one epoch of N × 197 × 768
float16 from a view, batch 32, beside a DataLoader over h5py rows with the article's module; then 16 heads on shared
batches, beside one after another in memory. ``linear``: 10,000 × 768, six classes, batch 256.
``switch``: heads, ridge and fine-tuning with float32 products by oneDNN, beside the same without.
"""

# ruff: noqa: E402  this folder has to leave sys.path first

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, in which `heads` would be this file

from benchmarks.reading import token_view
from featurecache.arithmetic import onednn_is_exact
from heads.models.catalogue import make_head
from heads.models.solvers import ridge
from heads.settings import Settings
from heads.task import SplitData, load_features
from heads.training import engine
from heads.training.batches import CrossEntropy, PlainBatches
from heads.training.engine import arithmetic_for, make_trainer, run_epoch, work_of_a_step

Ways = dict[str, Callable[[], object]]


class Rows(Dataset):
    """The plain way: a row of an HDF5 file for every item."""

    def __init__(self, path: Path, labels: np.ndarray) -> None:
        self.features, self.labels = h5py.File(path, "r")["tokens"], labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.features[i]).float().T, int(self.labels[i])


def article(tokens: int, width: int) -> nn.Module:
    """The article's model 2, on [B, D, T]."""
    return nn.Sequential(nn.Linear(tokens, 256), nn.ReLU(), nn.Flatten(), nn.Linear(width * 256, 2))


def plain_epoch(model: nn.Module, batches, lr: float = 1e-3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def ours(head: str, count: int, features, shape, classes: int, batch: int, epochs: int = 1, **more) -> None:
    """``count`` heads of different seeds and learning rates, trained together."""
    settings = [Settings(head, seed=k, lr=1e-4 * 1.1**k, batch_size=batch, **more) for k in range(count)]
    own = [torch.Generator().manual_seed(each.seed) for each in settings]
    models = [make_head(head, shape, classes, each) for each in own]
    heads = make_trainer(models, [CrossEntropy(classes)] * count, own, settings)
    order = PlainBatches(len(features), batch, 0)
    with arithmetic_for(work_of_a_step(models[0], settings, shape)):
        for _ in range(epochs):
            run_epoch(heads, features, order.epoch())


def measure(ways: Ways, rounds: int) -> dict[str, float]:
    """Median seconds of each way; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in taken.items()}


def show(title: str, found: dict[str, float]) -> None:
    base = next(iter(found.values()))
    print(title)
    for name, seconds in found.items():
        print(f"  {name:44s} {seconds:8.3f} s   {base / seconds:6.2f} ×")


def products(features, count: int, batch: int) -> None:
    """The matrix products of `large` alone: W1 x and its gradient, for every batch."""
    _, tokens, width = features.x.shape
    weight, x, hidden = torch.randn(256, tokens), torch.randn(batch, tokens, width), torch.randn(batch, 256, width)
    first = torch.empty(batch, tokens, 256)
    with arithmetic_for(math.inf):
        for _ in range(count * len(features) // batch):
            torch.bmm(weight.expand(batch, -1, -1), x, out=hidden)
            torch.bmm(x, hidden.transpose(1, 2), out=first)


def large(rounds: int, rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        view = token_view(Path(folder), rows, 2)
        labels = np.arange(rows) % 2
        features = load_features(view, "tokens", np.arange(rows), labels)
        memory = features.x.float().transpose(1, 2)
        many = [(memory[places], features.y[places]) for places in torch.randperm(rows).split(32)]
        bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ways: Ways = {
            "DataLoader over h5py rows, the article's module": lambda: plain_epoch(
                article(197, 768), DataLoader(Rows(view.path, labels), 32, shuffle=True)
            ),
            "large": partial(ours, "large", 1, features, (197, 768), 2, 32),
            "its matrix products alone": partial(products, features, 1, 32),
        }
        if bf16:
            ways["large, bf16"] = partial(ours, "large", 1, features, (197, 768), 2, 32, precision="bf16")
        show(f"large, one epoch of {rows:,} × 197 × 768, batch 32", measure(ways, rounds))
        if not bf16:
            print("  (this CPU has no products in bf16)")
        ways = {
            "16 heads one after another, in memory": lambda: [plain_epoch(article(197, 768), many) for _ in range(16)],
            "16 heads on shared batches": partial(ours, "large", 16, features, (197, 768), 2, 32),
            "their matrix products alone": partial(products, features, 16, 32),
        }
        if bf16:
            ways["16 heads, bf16"] = partial(ours, "large", 16, features, (197, 768), 2, 32, precision="bf16")
        show(f"16 large heads, one epoch of {rows:,}", measure(ways, max(1, rounds // 5)))


def vectors(count: int = 10_000):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(count, 768)).astype("float32"))
    y = torch.arange(count) % 6
    return SplitData(x, y)


def many(rounds: int) -> None:
    features = vectors()

    def one_by_one() -> None:
        for k in range(100):
            model, optimizer = nn.Linear(768, 6), None
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4 * 1.1**k)
            for places in torch.randperm(len(features)).split(256):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(features.x[places]), features.y[places]).backward()
                optimizer.step()

    weight = torch.randn(600, 768)

    def alone() -> None:
        for places in torch.randperm(len(features)).split(256):
            x = features.x[places]
            (x @ weight.T).T @ x

    ways: Ways = {
        "100 linear heads one after another, in memory": one_by_one,
        "100 linear heads together": partial(ours, "linear", 100, features, (768,), 6, 256),
        "their matrix products alone": alone,
    }
    show("100 linear heads, one epoch of 10,000 × 768, 6 classes, batch 256", measure(ways, rounds))


def linear(rounds: int) -> None:
    features = vectors()

    def loader() -> None:
        model = nn.Linear(768, 6)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(10):
            for x, y in DataLoader(TensorDataset(features.x, features.y), 256, shuffle=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

    ways: Ways = {
        "DataLoader over a TensorDataset": loader,
        "linear": partial(ours, "linear", 1, features, (768,), 6, 256, epochs=10),
    }
    show("one linear head, 10 epochs of 10,000 × 768, 6 classes, batch 256", measure(ways, rounds))


def with_switch(way: Callable[[], object], is_on: Callable[[], bool] = onednn_is_exact) -> None:
    """Whether it gains or not."""
    own, engine.onednn_is_faster = engine.onednn_is_faster, is_on
    try:
        way()
    finally:
        engine.onednn_is_faster = own


def without_switch(way: Callable[[], object]) -> None:
    """The same with float32 products by the library."""
    with_switch(way, lambda: False)


def tuned(images: torch.Tensor, lora: int | None) -> Callable[[], object]:
    """A step of fine-tuning a ViT-B/16, whole or by LoRA."""
    from featurecache.backbones import load_backbone
    from heads.models.adapters import add_lora

    model = load_backbone("torchvision:vit_b_16", random_weights=True).model.requires_grad_(lora is None)
    if lora:
        add_lora(model, lora)
    head, trained = nn.Linear(768, 2), [each for each in model.parameters() if each.requires_grad]

    def step() -> None:
        with arithmetic_for(math.inf):
            loss = head(model(images, {"tokens"})["tokens"][:, 0]).square().mean()
            torch.autograd.grad(loss, trained, allow_unused=True)

    return step


def solved(features: SplitData) -> None:
    with arithmetic_for(math.inf):
        ridge(features.x, features.y.numpy(), "multiclass", 6, print)


def switch(rounds: int, rows: int) -> None:
    """Heads with their products by oneDNN, beside the same without."""
    y, images = torch.arange(rows) % 2, torch.randn(8, 3, 224, 224)
    tokens, wide = SplitData(torch.randn(rows, 197, 768).half(), y), vectors()
    ways = {
        f"attention, an epoch of {rows} × 197 × 768": partial(ours, "attention", 1, tokens, (197, 768), 2, 32),
        "mlp, an epoch of 10,000 × 768, batch 256": partial(ours, "mlp", 1, wide, (768,), 6, 256),
        "16 mlp": partial(ours, "mlp", 16, wide, (768,), 6, 256),
        "ridge on 10,000 × 768": partial(solved, wide),
        "fine-tuning ViT-B/16, 8 images": tuned(images, None),
        "the same by LoRA of rank 8": tuned(images, 8),
    }
    for name, way in ways.items():
        both: Ways = {"by the library": partial(without_switch, way), "by oneDNN": partial(with_switch, way)}
        show(name, measure(both, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=960, help="of tokens")
    parser.add_argument("--only", default="large,many,linear")
    given = parser.parse_args()
    for name in given.only.split(","):
        {
            "large": partial(large, given.rounds, given.rows), "many": partial(many, given.rounds),
            "linear": partial(linear, given.rounds), "switch": partial(switch, given.rounds, given.rows),
        }[name]()  # fmt: skip


if __name__ == "__main__":
    main()
