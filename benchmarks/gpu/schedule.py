"""Parts of a run as processes with limits: what fits a budget, what is killed, what is recorded.

A part is a list of jobs, each a process in a session of its own, which is killed with everything
that it started when the part's time is over. Parts of one stage run at the same time; stages follow
one another. A job learns by the environment when it should have ended by itself (`end_of_job`), a
few seconds before it is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

END = "BITKERNELS_GPU_CHECK_END"
GRACE = 10.0  # seconds that a killed process gets to go; one that the GPU holds is left


@dataclass(frozen=True)
class Job:
    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """seconds: at most, where the budget has them. least: below this it is not started.
    first: parts of a lower number have their `least` kept for them by those before them.
    spans: whether the next stage may begin before it has ended."""

    name: str
    jobs: Callable[[], Sequence[Job]]  # asked when the part starts
    seconds: float
    least: float
    first: int
    at_once: int = 1
    margin: float = 4.0  # seconds before the limit by which a job should have ended by itself
    spans: bool = False


@dataclass(frozen=True)
class Ended:
    """A job's end. code: None where it was killed, or not started for lack of time (seconds 0)."""

    job: str
    seconds: float
    code: int | None

    @property
    def failed(self) -> str | None:
        if self.code == 0:
            return None
        if self.code is not None:
            return f"exit {self.code}"
        return f"killed after {self.seconds:.0f} s" if self.seconds else "no time left to start"


def end_of_job() -> float:
    """Seconds since the epoch at which this process should have ended by itself."""
    return float(os.environ.get(END, "inf"))


def run_job(job: Job, end: float, margin: float, log: Path, root: Path) -> Ended:
    start = time.time()
    if end - start < 1 or _stopping.is_set():
        return Ended(job.name, 0.0, None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        try:
            child = subprocess.Popen(
                job.command, cwd=root, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **job.environment, END: str(end - margin)})
        except OSError as error:
            file.write(f"{error}\n".encode())
            return Ended(job.name, time.time() - start, 127)
        _running.add(child)
        code: int | None = None
        try:
            code = child.wait(end - start)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also what an ended job left behind
            kill(child)
            _running.discard(child)
    return Ended(job.name, time.time() - start, code)


_running: set[subprocess.Popen] = set()
_stopping = threading.Event()


def kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)


def stop() -> None:
    """Ends a run early: what runs is killed, nothing more is started."""
    _stopping.set()
    for child in list(_running):
        kill(child)


def run_part(part: Part, seconds: float, logs: Path, root: Path) -> list[Ended]:
    end = time.time() + seconds
    jobs = part.jobs()
    if not jobs:
        return []

    def one(job: Job) -> Ended:
        name = part.name if job.name == part.name else f"{part.name}-{job.name}"
        return run_job(job, end, part.margin, logs / f"{name.replace('/', '_')}.txt", root)

    with ThreadPoolExecutor(min(part.at_once, len(jobs))) as pool:
        return list(pool.map(one, jobs))


def share(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds that a part gets of those left, 0 if it is not started.

    What comes later and matters more keeps its least.
    """
    kept = sum(other.least for other in later if other.first < part.first)
    seconds = min(part.seconds, left - kept)
    return seconds if seconds >= part.least else 0.0


def run(stages: Sequence[Sequence[Part]], budget: float, logs: Path, root: Path,
        each: Callable[[Part, float, list[Ended] | None], None]) -> None:
    """Runs the stages; `each` is told of every part: its seconds and what became of its jobs,
    None where it was not started."""
    _stopping.clear()
    end = time.time() + budget
    carried: list[tuple[Part, Future]] = []
    with ThreadPoolExecutor(sum(map(len, stages)) or 1) as pool:
        for number, stage in enumerate(stages):
            later = [part for rest in stages[number + 1:] for part in rest]
            left = end - time.time()
            started = []
            for part in stage:
                seconds = share(part, later, left)
                if seconds:
                    started.append((part, pool.submit(_timed, part, seconds, logs, root)))
                else:
                    each(part, 0.0, None)
            wait = [*carried, *(one for one in started if not one[0].spans)]
            carried = [one for one in started if one[0].spans]
            for part, future in wait:
                each(part, *future.result())
        for part, future in carried:
            each(part, *future.result())


def _timed(part: Part, seconds: float, logs: Path, root: Path) -> tuple[float, list[Ended]]:
    start = time.time()
    try:
        ended = run_part(part, seconds, logs, root)
    except Exception as error:  # a part whose jobs cannot even be listed
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{part.name}.txt").write_text(f"{type(error).__name__}: {error}\n")
        ended = [Ended(part.name, time.time() - start, 1)]
    return time.time() - start, ended
