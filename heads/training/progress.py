"""Progress of a training: the table of epochs at the terminal, and what it comes to in a line.

Every epoch is in ``history.csv``. Of a network each has a line as soon as it is done. Of heads, whose epochs mostly
take milliseconds, one has that took long or ends a silence, and in the end all of them together.
"""

from __future__ import annotations

import time

from heads.models.catalogue import is_baseline
from heads.settings import METRICS, Settings
from heads.task import Say

LONG, SILENCE = 1.0, 2.0  # seconds of an epoch of a head that has a line, and without a line
ACCURACY = ("top1", "label_accuracy")  # columns train_… and val_…, of classes and of labels: no threshold is in them
Row = dict[str, float]


class EpochTable:
    """Says the epochs of one head as they come: called with each line of its history and whether it stops there."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self.settings, self.say = settings, say
        self.network = is_baseline(settings.head)
        self.begin = self.last = time.monotonic()
        self.best: Row = {}
        self.began = False

    def __call__(self, row: Row, stop: bool) -> None:
        self.best = row if row["best"] else self.best
        if self.network or row["seconds"] >= LONG or time.monotonic() - self.last >= SILENCE:
            if not self.began:
                self.say(_header(self.settings.select, "label" if "val_label_accuracy" in row else "top-1"))
            self.say(_line(row, self.settings))
            self.last, self.began = time.monotonic(), True
        if stop or row["epoch"] >= self.settings.epochs:
            self._finish(row, stop)

    def _finish(self, row: Row, stop: bool) -> None:
        if not self.network:
            took, best = time.monotonic() - self.begin, _summary(self.best, self.settings.select)
            self.say(f"epochs     {row['epoch']:.0f} in {took:.1f} s; best {self.best['epoch']:.0f}: {best}")
        elif stop and row["epoch"] < self.settings.epochs:
            self.say(f"stopped    no better on val for {self.settings.patience} epochs")


def path_line(history: list[Row], chosen: int, select: str) -> str:
    """What came of the settings that a solved head tries; ``chosen``: the place of its own, from 1."""
    best = history[chosen - 1]
    own = [name for name in best if name not in ("epoch", "best", "seconds") and not name.startswith("val_")]
    values = ", ".join(f"{name} {best[name]:g}" for name in own)
    among = f" of {len(history)} tried" if len(history) > 1 else ""
    return f"solved     {f'{values}{among}: ' if values else ''}{_summary(best, select)}"


def _summary(row: Row, select: str) -> str:
    parts = [f"{name.replace('_', ' ')} {row[name]:.3f}" for name in ("train_loss", "val_loss") if name in row]
    if select != "loss":
        parts.append(f"val {METRICS[select].title} {row[f'val_{select}']:.3f}")
    return ", ".join(parts)


def _header(select: str, right: str) -> str:
    """``right``: what counts as right without a threshold; "accuracy" is the measure at the threshold of val."""
    measure = "" if select == "loss" else f"  {METRICS[select].title:>6}"
    return f"epochs     train loss {right}  val loss {right}{measure}        lr  patience"


def _line(row: Row, settings: Settings) -> str:
    right = {split: next(row[f"{split}_{n}"] for n in ACCURACY if f"{split}_{n}" in row) for split in ("train", "val")}
    select = settings.select
    measure = "" if select == "loss" else f"  {row[f'val_{select}']:>{max(6, len(METRICS[select].title))}.3f}"
    without = f"{row['wait']:.0f} of {settings.patience}" if settings.patience else ""
    epoch = f"epoch {row['epoch']:2.0f}"
    return (
        f"{epoch:<9}  {row['train_loss']:>10.3f} {right['train']:.3f} {row['val_loss']:>9.3f} "
        f"{right['val']:.3f}{measure}  {row['lr']:>8.3g}  {'best' if row['best'] else without:<8}  "
        f"{row['seconds']:.1f} s"
    )
