"""From JPEG to committed shards, beside a stock batched loop, one image at a time, and the bare forward pass.

    python benchmarks/extraction.py FOLDER [--network vit|resnet50|densenet121] [--images 66] [--rounds 5]
                                    [--ways stock,ours,cold,bf16,one,bare]

Untrained weights (speed does not depend on them), loaded from one file by all. Each round runs, one after the other and
in alternating order, with loading and conversion in their time:

    stock   batches of 16 (CNNs 32): PIL, the checkpoint's processor, the library's model, rows written by h5py
    ours    featurecache, as this machine remembers the network;   cold: with nothing remembered;   bf16: the former
    one     one PIL image at a time through processor and model, one dataset[i] = … a row
    bare    the library's model on ready tensors, batches of 8

The median of the rounds' ratios to ``stock`` is reported, and which forward pass was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import torch
import torchvision
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from featurecache.extraction import plan
from featurecache.formatting import device_title

Way = Callable[[], object]


def files(folder: Path, count: int) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return found[:: max(1, len(found) // count)][:count]


class Network:
    """A network in a file, and the two lines by which a script loads and runs it."""

    def __init__(self, name: str, home: Path) -> None:
        self.name, self.is_vit, self.file = name, name == "vit", home / ("vit" if name == "vit" else f"{name}.pt")
        if self.is_vit:
            ViTModel(ViTConfig()).save_pretrained(self.file)
            ViTImageProcessor().save_pretrained(self.file)
        else:
            torch.save(getattr(torchvision.models, name)().state_dict(), self.file)
        self.options = {"backbone": str(self.file)} if self.is_vit else {"backbone": name, "weights": str(self.file)}
        self.options |= {"outputs": "cls,tokens" if self.is_vit else "gap"}
        self.shape = (197, 768) if self.is_vit else (2048 if name == "resnet50" else 1024,)

    def load(self) -> Callable[[list[Image.Image]], torch.Tensor]:
        if self.is_vit:
            processor, model = ViTImageProcessor.from_pretrained(self.file), ViTModel.from_pretrained(self.file).eval()
            return lambda images: model(**processor(images=images, return_tensors="pt")).last_hidden_state
        model = getattr(torchvision.models, self.name)()
        model.load_state_dict(torch.load(self.file, weights_only=True))
        setattr(model, "fc" if self.name == "resnet50" else "classifier", torch.nn.Identity())
        look, model = torchvision.transforms._presets.ImageClassification(crop_size=224), model.eval()
        return lambda images: model(torch.stack([look(image) for image in images]))


def loop(network: Network, paths: list[Path], target: Path, batch: int) -> Way:
    def run() -> None:
        forward = network.load()
        with h5py.File(target, "w") as file, torch.no_grad():
            rows = file.create_dataset("features", (len(paths), *network.shape), "f2")
            for k in range(0, len(paths), batch):
                images = [Image.open(path).convert("RGB") for path in paths[k : k + batch]]
                rows[k : k + batch] = forward(images).numpy()

    return run


def ours(data: Path, network: Network, home: Path, cold: bool = False, precision: str = "fp32") -> Way:
    numbers = itertools.count()

    def run() -> object:
        cache, state = home / f"{precision}{cold}{next(numbers)}", os.environ["FEATURECACHE_STATE"]
        if cold:
            os.environ["FEATURECACHE_STATE"] = str(cache / "state")
        result = plan.extract(data, cache=cache, precision=precision, **network.options)
        os.environ["FEATURECACHE_STATE"] = state
        return json.loads((result.view.parent / "plan.json").read_text())["cpu"]["forward"]

    return run


def bare(network: Network, count: int) -> Way:
    model = ViTModel(ViTConfig()).eval() if network.is_vit else getattr(torchvision.models, network.name)().eval()
    pixels = torch.randn(8, 3, 224, 224)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(count // 8):
                model(pixels)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=["vit", "resnet50", "densenet121"], default="vit")
    parser.add_argument("--images", type=int, default=66)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="stock,ours,cold,bf16,one,bare")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        os.environ.setdefault("FEATURECACHE_STATE", str(home / "state"))
        (home / "data").mkdir()
        paths = files(given.folder, given.images)
        for k, path in enumerate(paths):
            (home / "data" / f"{k:05d}{path.suffix}").write_bytes(path.read_bytes())
        network = Network(given.network, home)
        ways: dict[str, Way] = {
            "stock": loop(network, paths, home / "stock.h5", 16 if network.is_vit else 32),
            "ours": ours(home / "data", network, home),
            "cold": ours(home / "data", network, home, cold=True),
            "bf16": ours(home / "data", network, home, precision="bf16"),
            "one": loop(network, paths, home / "one.h5", 1),
            "bare": bare(network, len(paths)),
        }
        print(f"{device_title('cpu')}, {torch.get_num_threads()} threads; {network.name}, {len(paths)} images")
        for way, precision in (("ours", "fp32"), ("bf16", "bf16")):
            if way in given.ways.split(","):  # what a long job would have measured
                remember(home / "data", network, home / f"first{precision}", precision)
        measure({name: ways[name] for name in given.ways.split(",")}, given.rounds, len(paths))


def remember(data: Path, network: Network, cache: Path, precision: str) -> None:
    result = plan.extract(data, cache=cache, forward="openvino", precision=precision, **network.options)
    candidates = json.loads((result.view.parent / "plan.json").read_text())["cpu"]["candidates"]
    print(
        precision, {name: f"{c['images_per_s']:.3g} images/s, error {c['error']:.2g}" for name, c in candidates.items()}
    )


def measure(ways: dict[str, Way], rounds: int, count: int) -> None:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        chosen = {}
        for name, way in list(ways.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            chosen[name] = way()
            taken[name].append(time.perf_counter() - start)
        print(f"after {number + 1} rounds:")
        for name, values in taken.items():
            ratio = statistics.median(base / value for base, value in zip(taken["stock"], values, strict=True))
            speed = count / statistics.median(values)
            print(f"{name:6s} {speed:7.2f} images/s   {ratio:5.2f} of stock   {chosen[name] or ''}", flush=True)


if __name__ == "__main__":
    main()
