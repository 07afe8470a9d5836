"""Progress of a sweep: a bar that moves by steps, each as long as it takes, and an eta of what has happened so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from featurecache.formatting import work_bar
from heads.sweeps.plan import PlannedFamily


class SweepBar:
    """``todo``: how many heads of a family are missing, ``seconds``: what one takes if it does not stop early. What one
    that did has left counts as done, so the pace of the bar, and its eta, are those of heads that stop early too."""

    def __init__(self, todo: dict[PlannedFamily, int], seconds: dict[PlannedFamily, float], progress: bool) -> None:
        self.seconds, self.done, self.heads = seconds, 0, sum(todo.values())
        self.bar = work_bar(sum(seconds[family] * count for family, count in todo.items()), "ablate", progress)
        self._count(0)

    @contextmanager
    def training(self, family: PlannedFamily, count: int) -> Iterator[Callable[[float], object]]:
        """While so many heads are trained together; what it gives takes the share of all their steps that was done."""
        whole, begin = self.seconds[family] * count, self.bar.n
        yield lambda share: self.bar.update(share * whole)
        self.bar.update(begin + whole - self.bar.n)
        self._count(count)

    def skip(self, family: PlannedFamily, count: int) -> None:
        """Heads that need no training."""
        self.bar.update(self.seconds[family] * count)
        self._count(count)

    def _count(self, heads: int) -> None:
        self.done += heads
        self.bar.set_postfix_str(f"{self.done:,} of {self.heads:,} heads", refresh=False)
