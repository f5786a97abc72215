"""Python programs in processes that are forked from one that has torch, whose import costs more
than most of them. Where a start from nothing is what is tested, `subprocess` starts one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch"])


def _main(arguments: tuple[str, ...], env: dict[str, str], cwd: str, output: str) -> None:
    import torch

    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", torch.get_num_threads())))
    what, *rest = arguments
    sys.path[:0] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    if what == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif what == "-m":
        sys.argv = list(rest)
        sys.path.insert(0, cwd)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, os.path.dirname(os.path.abspath(what)))
        runpy.run_path(what, run_name="__main__")


class Program:
    """As `subprocess.Popen` of `python` with these arguments, its output captured as text."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None,
                 cwd: str | os.PathLike | None = None) -> None:
        self._output = tempfile.TemporaryDirectory()
        env = dict(os.environ if env is None else env)
        self._process = CONTEXT.Process(target=_main, args=(
            tuple(map(str, arguments)), env, os.fspath(cwd or os.getcwd()), self._output.name))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"not done after {timeout} s")
        said = [Path(self._output.name, name) for name in ("stdout", "stderr")]
        out, err = (path.read_text() if path.exists() else "" for path in said)
        return out, err


def run(*arguments: str, env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike | None = None,
        timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of `python` with these arguments, its output captured as text."""
    program = Program(*arguments, env=env, cwd=cwd)
    out, err = program.communicate(timeout)
    assert program.returncode is not None
    return subprocess.CompletedProcess(arguments, program.returncode, out, err)


def spawn(function: Callable[..., None], arguments: tuple) -> None:
    """As `torch.multiprocessing.spawn` of two processes."""
    import torch.multiprocessing

    torch.multiprocessing.start_processes(function, arguments, 2, start_method="forkserver")
