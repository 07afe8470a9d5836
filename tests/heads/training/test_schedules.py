"""Learning rates, clipping and what is noted and said of every epoch, against torch's own and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.fake_view import label_view, toy_view
from support.runs import train_head
from torch import nn
from torch.optim import lr_scheduler

from featurecache import formatting
from heads.models.catalogue import make_head
from heads.settings import Settings
from heads.task import load_features
from heads.training import loop, progress
from heads.training.batches import PlainBatches
from heads.training.job import prepare_training
from heads.training.loop import Schedule
from heads.training.train import train_together

CHAINS = {  # of 8 epochs of 5 steps, of which 10 steps warm up
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 1e-12, total_iters=30),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_schedules_are_those_of_torch_step_by_step(kind):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    warm = lr_scheduler.LinearLR(optimizer, 1 / 11, 1.0, total_iters=10)
    theirs = lr_scheduler.SequentialLR(optimizer, [warm, CHAINS[kind](optimizer)], milestones=[10])
    ours, rates = Schedule(Settings("linear", lr=0.4, epochs=8, schedule=kind, warmup=0.25)), []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    np.testing.assert_allclose(np.concatenate([ours.rates(epoch, 5) for epoch in range(1, 9)]), rates, rtol=1e-9)
    assert ours.by_step and 0 < ours.rates(1, 5)[0] < 0.4


def test_plateau_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, "min", factor=0.5, patience=3)
    ours = Schedule(Settings("linear", lr=0.4, epochs=8, schedule="plateau"))
    for epoch, loss in enumerate([1.0, 0.9, 0.95, 0.9, 0.89999, 0.91, 0.9, 0.95]):
        assert ours.rates(epoch + 1, 5) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step(loss)
        ours.after(loss)
    assert ours.rates(1, 5)[0] < 0.4 and not ours.by_step


SHAPED = {"schedule": "linear", "warmup": 1 / 3, "clip_norm": 0.3, "weight_decay": 0.1, "label_smoothing": 0.1}


@pytest.mark.parametrize("options", [{}, SHAPED, SHAPED | {"optimizer": "adamw"}], ids=["plain", "shaped", "adamw"])
@pytest.mark.parametrize("head", ["large", "linear", "mlp", "mean-linear", "cls+mean"])
def test_heads_are_those_of_a_plain_torch_loop(head, options):
    """Also with a schedule by steps, clipping, smoothing, and decay on weights only; those on fixed vectors of tokens,
    which are computed once, as stepped through all tokens."""
    view = toy_view(n=200, splits="given", noise=2.0, tokens=5, prefix=("cls",), grid=(2, 2))
    settings = Settings(head, epochs=3, balance=False, select="loss", standardize="none", dropout=0.0, **options)
    job = prepare_training(view, settings)
    (fit,) = train_together(job, [settings])
    model = make_head(head, job.input, 2, torch.Generator().manual_seed(0), dropout=0.0)
    data = load_features(view, job.output, job.splits.rows("train"), job.task.labels)
    weights, others = ([p for p in model.parameters() if (p.ndim > 1) is decays] for decays in (True, False))
    groups = [{"params": weights, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = (torch.optim.AdamW if "optimizer" in options else torch.optim.Adam)(groups)
    batches, total = PlainBatches(len(data), 32, 0), 0
    steps = -(-len(data) // 32)
    for _ in range(3):
        for x, y in map(data.batch, batches.epoch()):
            ramp = (total + 1) / (steps + 1) if total < steps else 1 - (total - steps) / (2 * steps)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (ramp if options else 1)
            total += 1
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y, label_smoothing=settings.label_smoothing).backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
            optimizer.step()
    assert fit.epoch == 3 and fit.history[-1]["lr"] == pytest.approx(1e-3 / (2 * steps) if options else 1e-3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(fit.model.state_dict()[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("head", "labels"), [("linear", False), ("linear", True), ("large", False)])
def test_accuracy_on_train_is_that_of_the_logits_before_each_step(head, labels):
    view = label_view(n=160, labels=3, unknown=0.3) if labels else toy_view(n=160, classes=3, noise=2.0)
    settings = Settings(head, epochs=1, batch_size=500, balance=False, select="loss", standardize="none")
    job = prepare_training(view, settings)
    (fit,) = train_together(job, [settings])
    model = make_head(head, job.input, 3, torch.Generator().manual_seed(0))
    data = load_features(view, job.output, job.splits.rows("train"), job.task.labels)
    z, y = model(data.batch(torch.arange(len(data)))[0]).detach(), data.y
    known = ~y.isnan()
    wanted = (((z > 0) == (y == 1))[known] if labels else (z.argmax(1) == y)).float().mean()
    assert fit.history[0]["train_label_accuracy" if labels else "train_top1"] == pytest.approx(float(wanted))
    assert {"lr", "train_loss", "val_loss", "wait"} <= fit.history[0].keys()


@pytest.mark.parametrize(("head", "seconds"), [("cnn-cifar", 0.1), ("large", 2.0), ("linear", 0.1)])
def test_epochs_of_networks_and_long_ones_have_a_line_each_quick_ones_one_together(head, seconds):
    lines = []
    table = progress.EpochTable(Settings(head, epochs=9, patience=2), lines.append)
    row = {"lr": 1e-3, "train_loss": 0.5, "train_top1": 0.7, "val_loss": 0.4, "val_auroc": 0.9, "val_top1": 0.8}
    for epoch, best in ((1, 1), (2, 0), (3, 0)):
        table(row | {"epoch": epoch, "best": best, "wait": epoch - 1, "seconds": seconds}, epoch == 3)
    together = "epochs     3 in 0.0 s; best 1: train loss 0.500, val loss 0.400, val AUROC 0.900"
    if head == "linear":
        assert lines == [together]
        return
    assert [line.replace(f"{seconds} s", "2.0 s") for line in lines] == [
        "epochs     train loss top-1  val loss top-1   AUROC        lr  patience",
        "epoch  1        0.500 0.700     0.400 0.800   0.900     0.001  best      2.0 s",
        "epoch  2        0.500 0.700     0.400 0.800   0.900     0.001  1 of 2    2.0 s",
        "epoch  3        0.500 0.700     0.400 0.800   0.900     0.001  2 of 2    2.0 s",
        "stopped    no better on val for 2 epochs" if head == "cnn-cifar" else together,
    ]


def test_a_bar_counts_the_batches_of_an_epoch(monkeypatch):
    bars = []

    def bar(total, what, shown):
        bars.append((what, shown, made := formatting.batch_bar(total, what, False)))
        made.update = lambda n: bars.append(n)
        return made

    monkeypatch.setattr(loop, "batch_bar", bar)
    run = train_head(toy_view(n=200, splits="given"), "linear", epochs=2, progress=True)
    steps = -(-run.config["splits"]["images"]["train"] // 32)
    assert bars.count(1) == 2 * steps and bars[0][:2] == ("epoch 1 of 2", True)
