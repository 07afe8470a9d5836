"""Operations in processes that may be killed: a server that has imported everything and has no second thread forks one
child for each. (A fresh interpreter takes seconds to import torch; a fork of pytest itself may hang in OpenMP.)

    forks = shared()
    answer = forks.run("extract", data=..., fault={"at": 12, "do": "kill"})

As a program: the server. A line of JSON in: job, arguments, fault, folder that is watched; a line out.
"""

from __future__ import annotations

if __name__ == "__main__":
    import failpoints  # before all others: they take functions of os by name

import atexit
import faulthandler
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

LONGEST = 150.0  # seconds of one operation: more is a hang
AT_ONCE = 2
ONE_THREAD = {  # pyarrow, which scikit-learn imports where it is installed, has a thread that frees memory
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """``value``: what the job returned, or None; ``error``: "Class: message" of what it raised. ``code``: as of
    `subprocess`; a child that was killed has none of the others."""

    code: int
    value: Any = None
    error: str | None = None
    events: list[tuple[str, str, str]] = field(default_factory=list, repr=False)
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGALRM)


class Forks:
    """Client. Jobs that are started before others are awaited run at the same time."""

    def __init__(self) -> None:
        here = Path(__file__).resolve()
        path = os.pathsep.join([str(here.parents[2]), str(here.parents[1]), *filter(None, sys.path)])
        self._server = subprocess.Popen(
            [sys.executable, str(here)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            assert self._said() == "ready"
        except BaseException:  # else it ends as a warning in whichever test runs when it is collected
            self.close()
            raise

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def _said(self) -> Any:
        assert self._server.stdout
        line = self._server.stdout.readline()
        assert line, "the server of the forks ended; run `python tests/support/forks.py` to see why"
        return json.loads(line)

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin
        self._server.stdin.write(json.dumps(request, default=str) + "\n")
        return self._said()

    def start(
        self, job: str, /, *, fault: dict[str, Any] | None = None, after: float | None = None,
        copy_of: Path | None = None, **arguments: Any,
    ) -> int:  # fmt: skip
        """``after``: killed so many seconds later. ``copy_of``: what ``cache`` is made from first."""
        request = {"arguments": arguments, "fault": fault, "after": after, "copy_of": copy_of}
        number: int = self._ask(start=job, **request)
        return number

    def wait(self, number: int) -> Answer:
        answer = self._ask(wait=number)
        assert not (stacks := answer.pop("hung")), f"a process hung:\n{stacks}"
        return Answer(**answer)

    def run(self, job: str, /, **arguments: Any) -> Answer:
        return self.wait(self.start(job, **arguments))

    def all(self, job: str, /, many: Iterable[dict[str, Any]]) -> list[Answer]:
        """The same job many times, two at once."""
        answers, running = [], deque[int]()
        for arguments in many:
            if len(running) == AT_ONCE:
                answers.append(self.wait(running.popleft()))
            running.append(self.start(job, **arguments))
        return answers + [self.wait(number) for number in running]

    def done(self, job: str, /, **arguments: Any) -> Any:
        """The value of a job that has to come to its end."""
        answer = self.run(job, **arguments)
        assert answer.code == 0 and answer.error is None, (job, answer)
        return answer.value


@functools.cache
def shared() -> Forks:
    """One server for all test modules: it takes seconds to start."""
    forks = Forks()
    atexit.register(forks.close)
    return forks


# ---------------------------------------------------------------------------------------------- the server


@dataclass
class _Child:
    pid: int
    pipe: int
    begun: float


def main() -> None:
    import torch
    import tqdm

    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # it would be a thread
    from support import fault_jobs

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print do not answer
    with tempfile.TemporaryDirectory() as home:
        fault_jobs.warm(home)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"
    stacks = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the server)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    answers.write('"ready"\n')
    running: dict[int, _Child] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            child = _fork(request)
            running[child.pid] = child
            answers.write(f"{child.pid}\n")
        else:
            answers.write(json.dumps(_finish(running.pop(request["wait"]), stacks)) + "\n")


def _fork(request: dict[str, Any]) -> _Child:
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Child(pid, read, time.monotonic())
    os.close(read)
    code = 1
    try:
        os.close(0)
        _work(request, write)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _work(request: dict[str, Any], write: int) -> None:
    from featurecache.errors import FeatureCacheError
    from support import fault_jobs

    arguments = request["arguments"]
    if request["copy_of"]:
        fault_jobs.copy(request["copy_of"], arguments["cache"])
    if request["fault"] is not None:
        failpoints.arm(arguments["cache"], request["fault"])
    if request["after"] is not None:
        signal.setitimer(signal.ITIMER_REAL, max(request["after"], 1e-6))  # nothing handles it: the end
    answer: dict[str, Any] = {}
    start = time.monotonic()
    try:
        answer["value"] = getattr(fault_jobs, request["start"])(**arguments)
    except FeatureCacheError as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_REAL, 0)
    answer |= {"events": failpoints.events, "seconds": time.monotonic() - start}
    with os.fdopen(write, "w") as pipe:
        json.dump(answer, pipe)


def _finish(child: _Child, stacks: IO[str]) -> dict[str, Any]:
    """``hung``: the stacks of all threads of a child that had to be killed."""
    text, hung = b"", ""
    while True:
        left = child.begun + LONGEST - time.monotonic()
        if not hung and not select.select([child.pipe], [], [], max(0.0, left))[0]:
            stacks.seek(0)
            stacks.truncate()
            os.kill(child.pid, signal.SIGUSR1)
            time.sleep(2)
            stacks.seek(0)
            hung = stacks.read() or "it does not answer"
            os.kill(child.pid, signal.SIGKILL)
        piece = os.read(child.pipe, 1 << 16)
        if not piece:
            break
        text += piece
    os.close(child.pipe)
    code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    return {"code": code, "hung": hung, **(json.loads(text) if code == 0 else {})}


if __name__ == "__main__":
    main()
