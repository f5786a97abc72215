"""What a part has found, a line of JSON each, written at once: a kill loses nothing.

A process whose GPU context an error has broken cannot go on: `Record.broken` notes what broke it
and starts the process anew, which finds what is done already.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


def read(path: Path) -> Iterator[dict]:
    """Whole lines of a file; none if it is not there."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # the last one, of a process that was killed
                continue


def rows(folder: Path, part: str) -> list[dict]:
    """Of all files of a part."""
    return [row for path in sorted(folder.glob(f"{part}.jsonl")) + sorted(
        folder.glob(f"{part}-*.jsonl")) for row in read(path)]


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:300]


class Record:
    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        earlier = list(read(self.path))
        self.done = {row["key"] for row in earlier if "key" in row}
        self.bad = {row["broken"] for row in earlier if "broken" in row}

    def add(self, **row: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def broken(self, what: str, error: BaseException) -> None:
        """Ends this process, which begins again without `what`."""
        self.add(broken=what, error=message(error))
        if what in self.bad:  # it was left out already: nothing helps
            raise error
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def context_works() -> bool:
    """Whether the GPU still answers after an error."""
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def faulty(folder: Path) -> tuple[set[str], set[tuple[str, str]]]:
    """Of `correct`: kernels that hung or broke the GPU; (kernel, call) that differed or failed.

    Triton's may have been compiling when the time was over: it counts as slow.
    """
    bad: set[str] = set()
    wrong: set[tuple[str, str]] = set()
    for kernel, found in by_kernel(rows(folder, "correct")).items():
        if hung(found) and not kernel.startswith("triton"):
            bad.add(kernel)
        for row in found:
            if row.get("broken"):
                bad.add(kernel)
            elif row.get("wrong"):
                wrong.add((kernel, row["key"]))
    return bad, wrong


def by_kernel(found: Iterable[dict]) -> dict[str, list[dict]]:
    sorted_: dict[str, list[dict]] = {}
    for row in found:
        sorted_.setdefault(row["kernel"], []).append(row)
    return sorted_


def hung(found: list[dict]) -> str | None:
    """The call in which a kernel's check was killed, by its last line."""
    return found[-1].get("begun") if found else None
