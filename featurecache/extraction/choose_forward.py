"""Choosing the forward pass: which way is fastest on this machine within the precision's tolerance, by measurement.

Candidates on a CPU are the library's forward as it is, the same with float32 products by oneDNN (where these are exact
here, which on a CPU with AMX they are not), and a graph of OpenVINO; on a GPU of NVIDIA the library's and the same
compiled. Each computes the probe images; the fastest one and the library also the first batch of the job. It is chosen
where it differs from the library's own float32 by at most

    fp32: 10⁻⁵ of the length;   bf16: 1.1 times what torch's bfloat16 differs by, and 1.5·10⁻²

What is chosen is kept in the store's plan with all speeds, and in the machine's state for other stores. A conversion
takes seconds, compiling a minute: they are tried in jobs of more than ``LONG`` seconds, or where a measurement is
remembered. Shorter ones take oneDNN's products where one of them gains by it, else the library's. What the chosen way
computed meanwhile is not computed again.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from featurecache.arithmetic import GAIN, onednn_gain
from featurecache.backbones.base import Backbone
from featurecache.errors import BadOption, Drift, ForwardUnavailable
from featurecache.extraction.canary import check_canary, probe_pixels
from featurecache.extraction.forward import ForwardRunner, is_out_of_memory
from featurecache.extraction.openvino_graph import has_openvino, is_user_code, pass_key
from featurecache.extraction.pipeline import decode_many
from featurecache.files.machine_state import read_state, state_key, write_state
from featurecache.files.records import are_candidates
from featurecache.formatting import device_title, duration, images_per_second
from featurecache.images.headers import EncodedImage
from featurecache.outputs import Output
from featurecache.store.store import Store

LONG = {"cpu": 60.0, "cuda": 600.0}  # seconds of the library's forward that are worth a conversion; compiling
SHORT, COMPILING = 0.3, 60.0  # seconds that a remembered way has to save: a graph's loading, compiled again each time
FP32_ERROR, BF16_ERROR, BF16_RATIO = 1e-5, 1.5e-2, 1.1
PROBED = 4  # batches: jobs of no more are not measured at all
QUICK = 0.25  # seconds for the probe images: a network that takes longer is not timed on more than these
PROBES, FIRST = 0, 1  # the batches of a measurement
WORTH = 1.05  # gain of a product by oneDNN: a forward pass gains less than its products

Candidates = dict[str, dict[str, float]]  # way -> {"images_per_s", "error"}: relative L2 against the library's float32


@dataclass(frozen=True)
class ForwardChoice:
    """How a store computes: the ``way``, and the speeds and errors it was chosen by; None where none was measured."""

    way: str = "library"
    candidates: Candidates | None = None
    images_per_s: float | None = None  # of this way, in this job
    bf16_images_per_s: float | None = None  # what --precision bf16 would make of a long fp32 job
    notes: tuple[str, ...] = ()  # what was refused, and why
    parts: tuple[str, ...] = ()  # that a graph or compiled network gives: last bits depend on them

    def record(self) -> dict[str, Any]:
        """What the plan of the store says."""
        parts = {"parts": list(self.parts)} if self.way in ("openvino", "compiled") else {}
        return {"forward": self.way, **({"candidates": self.candidates} if self.candidates else {}), **parts}

    def lines(self, images: int) -> list[str]:
        """For people: what was refused, all speeds, and what bf16 would make of so many ``images``."""
        lines, speed, bf16 = list(self.notes), self.images_per_s, self.bf16_images_per_s
        if self.candidates:
            each = [(way, figures["images_per_s"], figures["error"]) for way, figures in self.candidates.items()]
            speeds = [
                f"{way} {images_per_second(rate)}" + f", off by {error:.1g}" * (error > 0) for way, rate, error in each
            ]
            lines.append(f"{self.way}, by measurement: {'; '.join(speeds)}")
        if speed and bf16 and bf16 > 1.3 * speed:
            lines.append(
                f"--precision bf16, another store, would take {duration(images / bf16)}: {images_per_second(bf16)}"
            )
        return lines


@dataclass(frozen=True)
class ForwardSetting:
    """What a forward pass is chosen for: a network on a device, in batches of B, of these parts; and the job."""

    backbone: Backbone
    precision: str
    device: torch.device
    batch_size: int
    threads: int
    parts: tuple[str, ...]
    images: int  # to be computed

    def runner(self, way: str) -> ForwardRunner:
        return ForwardRunner(
            self.backbone, self.precision, self.device, self.batch_size, way, self.parts, self.threads
        )  # fmt: skip

    @property
    def key(self) -> str:
        of = pass_key(self.backbone, self.parts, self.precision, self.batch_size, self.threads)
        return of if self.device.type == "cpu" else state_key(of=of, device=device_title(self.device))

    @property
    def is_tiny(self) -> bool:
        """Not worth a look; on an accelerator one pass says at least whether the batch fits."""
        return self.device.type == "cpu" and self.images <= PROBED * self.batch_size

    def ways(self) -> list[str]:
        """Candidates. User code may branch on its data, which a converter cannot see: only on request."""
        if self.device.type == "cuda":
            return ["library", *["compiled"] * (not is_user_code(self.backbone))]
        if self.device.type != "cpu" or self.precision == "fp16":
            return ["library"]
        onednn = ["onednn"] if self.precision == "fp32" and onednn_gain() > WORTH else []
        return ["library", *onednn, *(["openvino"] if has_openvino() and not is_user_code(self.backbone) else [])]


def is_fixed(plan: dict[str, Any]) -> bool:
    """Whether the forward pass of a plan was measured; that of short jobs was not."""
    return "candidates" in plan


class FirstImages:
    """The probe images and the first batch of a job, as canary and pipeline will make them: uint8 [b,3,h,w]."""

    def __init__(
        self, backbone: Backbone, rows: Sequence[int] | np.ndarray, read: Callable[[int], EncodedImage]
    ) -> None:
        self._backbone, self._rows, self._read = backbone, rows, read

    def batches(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of at most ``size`` images; the job's batch is black where it has fewer."""
        decoded = decode_many(self._read, (int(row) for row in self._rows[:size]), self._backbone.preprocess, 2)
        first = torch.zeros(size, 3, *self._backbone.image_size, dtype=torch.uint8)
        for place, image in enumerate(image for _, image, _ in decoded if isinstance(image, torch.Tensor)):
            first[place] = image
        return probe_pixels(self._backbone)[:size], first


def choose_for_store(
    setting: ForwardSetting, images: FirstImages, store: Store | None, outputs: Sequence[Output], measure: bool,
    requested: str,
) -> tuple[ForwardRunner, ForwardChoice]:  # fmt: skip
    """`choose_forward` by the store's plan. Another way than the store's has to agree with its probe images, else its
    own is taken where it can be had; what was ``requested`` is left to the run to compare. A batch that the device has
    no memory for is halved before the store's first run fixes it. Raises ForwardUnavailable."""
    planned, halved = (store.plan or {}).get(setting.device.type) if store else None, list[str]()
    while True:
        try:
            runner, choice = choose_forward(setting, images, planned, measure, requested)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            halved.append(f"{setting.device} has not the memory for batches of {setting.batch_size}: halved")
            setting = _with_half_the_batch(setting, bool(planned), error)
    own = (planned or {}).get("forward", "library")
    if store is not None and planned is not None and requested == "auto" and runner.way != own:
        try:
            check_canary(store, setting.backbone, runner, outputs, write=False)
        except Drift as drift:
            why = f"{runner.way} does not agree with what the store holds: {str(drift).splitlines()[0]}"
            with contextlib.suppress(ForwardUnavailable):
                runner, choice = setting.runner(own), ForwardChoice(own, notes=(*choice.notes, why))
    return runner, replace(choice, parts=setting.parts, notes=(*halved, *choice.notes))


def _with_half_the_batch(setting: ForwardSetting, fixed: bool, error: RuntimeError) -> ForwardSetting:
    """Before a store's first run fixes it. Raises ForwardUnavailable."""
    if fixed or setting.batch_size == 1:
        why = "this store computes in batches of" if fixed else "not even for a batch of"
        raise ForwardUnavailable(
            f"{setting.device} has not the memory for {setting.backbone.name}: {why} {setting.batch_size}. Free some "
            "of it, or take another device (--device cpu)."
        ) from error
    return replace(setting, batch_size=setting.batch_size // 2)


def choose_forward(
    setting: ForwardSetting, images: FirstImages, planned: dict[str, Any] | None, measure: bool, requested: str
) -> tuple[ForwardRunner, ForwardChoice]:
    """The runner of a store's forward pass, and why it is this one: as ``requested``; as the store ``planned``, where
    that was measured or hardly anything is to be done; as this machine remembers; by measurement in long jobs
    (``measure``); by oneDNN's products where they gain; else the library's.

    Raises BadOption where a ``requested`` way is not to be had or not accurate."""
    notes: list[str] = []
    known = ForwardChoice("library") if requested == "library" else None
    own = planned.get("forward", "library") if planned else None
    if planned and own and (is_fixed(planned) or setting.is_tiny) and requested in ("auto", own):
        known = ForwardChoice(own, planned.get("candidates"))
    known = known or _remembered(setting, requested)
    if known is not None:
        try:
            runner = setting.runner(known.way)
            if not setting.is_tiny:
                trial = _Trial(setting, runner, images.batches(setting.batch_size))
                known = replace(known, images_per_s=trial.compute(FIRST).rate)
            return runner, known
        except ForwardUnavailable as error:
            notes.append(f"{error}. The library's forward is used, where the probe images agree")
            measure = requested != "auto"
    library = setting.runner("library")
    if requested == "auto" and setting.is_tiny:
        return library, ForwardChoice(notes=tuple(notes))
    batches, quick, trials = images.batches(setting.batch_size), "library", dict[str, _Trial]()
    if requested == "auto" and own in (None, "onednn") and "onednn" in setting.ways() and onednn_gain() > GAIN:
        quick, trials["onednn"] = "onednn", _Trial(setting, "onednn", batches).compute(PROBES)
    looks = [PROBES] if setting.device.type == "cpu" else [PROBES, FIRST]  # an accelerator is fast on many images
    trials["library"] = _Trial(setting, library, batches).compute(*looks)
    is_long = measure and len(setting.ways()) > 1 and setting.images >= LONG[setting.device.type] * trials[quick].rate
    if requested != "auto" or is_long:
        return _measured(setting, requested, trials, batches)
    if trials[quick].error(trials["library"]) > FP32_ERROR:
        quick = "library"
    trial = trials[quick].compute(FIRST)
    return trial.runner, ForwardChoice(quick, images_per_s=trial.rate, notes=tuple(notes))


class _Trial:
    """A way as it is measured on the probe images and the first batch: what it makes of them, which it will not compute
    again, and images/s, of the fastest pass."""

    def __init__(
        self, setting: ForwardSetting, way: str | ForwardRunner, batches: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self.runner = setting.runner(way) if isinstance(way, str) else way
        self.rate, self._parts, self._batches = 0.0, set(setting.parts), batches
        self._given: dict[int, dict[str, torch.Tensor]] = {}

    def compute(self, *numbers: int) -> _Trial:
        for number in numbers:
            if number not in self._given:
                self._given[number], seconds = self._pass(number)
                self.runner.remember(self._batches[number], self._given[number], seconds)
        return self

    def measure(self, number: int) -> _Trial:
        """A graph makes its kernels in the first pass of each shape: it computes the batch once more."""
        self.compute(PROBES, number)
        if self.runner.way == "openvino":
            self._pass(number)
        return self

    def _pass(self, number: int) -> tuple[dict[str, torch.Tensor], float]:
        if self.runner.device.type != "cpu":  # the first pass starts an accelerator, and chooses kernels for the shape
            self.runner.parts_of(self._batches[number], self._parts)
        start = time.perf_counter()
        rows = {part: rows.cpu() for part, rows in self.runner.parts_of(self._batches[number], self._parts).items()}
        seconds = time.perf_counter() - start
        self.rate = max(self.rate, len(self._batches[number]) / seconds)
        return rows, seconds

    def error(self, exact: _Trial) -> float:
        """|given − exact|₂ / |exact|₂ over the batches that both have, of the part where it is largest."""
        errors, both = [], self._given.keys() & exact._given.keys()
        for part in self._parts:
            pairs = [(self._given[number][part].double(), exact._given[number][part].double()) for number in both]
            size = sum(float(b.square().sum()) for _, b in pairs)
            errors.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs) / max(size, 1e-60)))
        return max(errors)


def _measured(
    setting: ForwardSetting, requested: str, trials: dict[str, _Trial], batches: tuple[torch.Tensor, torch.Tensor]
) -> tuple[ForwardRunner, ForwardChoice]:
    """All ways are timed on the first batch, of a slow network on a CPU on the probe images, which are fewer; the
    fastest one is compared on both. ``trials`` holds the library's way and is filled with the others."""
    library, notes = trials["library"], []
    exact = library if setting.precision == "fp32" else _Trial(replace(setting, precision="fp32"), "library", batches)
    sample = PROBES if setting.device.type == "cpu" and len(batches[PROBES]) > QUICK * library.rate else FIRST
    for way in setting.ways() if requested == "auto" else ("library", requested):
        try:
            trials[way] = (trials.get(way) or _Trial(setting, way, batches)).measure(sample)
        except ForwardUnavailable as error:
            notes.append(str(error))
    candidates: Candidates = {}
    for way in sorted(trials, key=lambda way: -trials[way].rate) if requested == "auto" else [requested] * (not notes):
        for trial in (exact, library, trials[way]):
            trial.compute(PROBES, FIRST)
        errors = {each: trial.error(exact) for each, trial in trials.items()}
        candidates = {
            each: {"images_per_s": round(trials[each].rate, 3), "error": error}
            for each, error in errors.items() if math.isfinite(error)
        }  # fmt: skip
        if way in candidates and _is_accurate(way, candidates, setting.precision):
            break
    else:
        why = notes[0] if notes else f"it differs by {trials[requested].error(exact):.2g} from the library's float32"
        raise BadOption(f"--forward {requested}: {why}. --forward auto takes what is accurate and fast.")
    notes += [f"{each} gives no numbers" for each in trials if each not in candidates]
    if requested == "auto" and library.rate > trials[way].rate:  # on its first batch
        way = "library"
    write_state("forward", setting.key, {"candidates": candidates})
    bf16 = None
    if setting.precision == "fp32" and requested == "auto":
        other = replace(setting, precision="bf16")
        bf16 = _Trial(other, way if way == "openvino" else "library", batches).measure(sample).rate
    return trials[way].runner, ForwardChoice(way, candidates, trials[way].rate, bf16, tuple(notes))


def _remembered(setting: ForwardSetting, requested: str) -> ForwardChoice | None:
    """What was measured on this machine before, for this or another store, where it is worth its loading."""
    if len(setting.ways()) == 1:
        return None
    candidates: Candidates = (read_state("forward", setting.key) or {}).get("candidates", {})
    if not are_candidates(candidates):
        return None
    speed = {way: figures["images_per_s"] for way, figures in candidates.items()}
    accurate = [way for way in candidates if speed[way] and _is_accurate(way, candidates, setting.precision)]
    way = max(accurate, key=lambda way: speed[way]) if requested == "auto" else requested
    if way not in accurate:
        return None
    saved = setting.images * (1 / speed["library"] - 1 / speed[way])
    least = {"library": 0.0, "compiled": COMPILING}.get(way, SHORT)
    return ForwardChoice(way, candidates) if requested != "auto" or saved >= least else None


def _is_accurate(way: str, candidates: Candidates, precision: str) -> bool:
    most = FP32_ERROR if precision == "fp32" else min(BF16_ERROR, BF16_RATIO * candidates["library"]["error"])
    return way == "library" or candidates[way]["error"] <= most
