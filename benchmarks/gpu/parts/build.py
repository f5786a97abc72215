"""Part build: the CPU engine, where it is not there and its headers and a compiler are.

It is built beside the tree, tried in a process of its own, and put into the package whole or not at
all: other parts run meanwhile, which use the reference on CPUs until then.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import Record

ROOT = Path(__file__).resolve().parents[3]
TRY = """
import torch, bitkernels
from bitkernels.backends import cpu
if cpu.active():
    args = torch.randn(3, 70), None, 1
    right = bitkernels.reference.sign_pack(*args)
    assert torch.equal(torch.ops.bitkernels.sign_pack(*args), right), "differs from the reference"
print(torch.__version__, cpu.active() or cpu.why_not)
"""


def tried(folder: Path) -> tuple[bool, str]:
    """(whether the extension of the package in this folder loads, what was said)."""
    done = subprocess.run([sys.executable, "-c", TRY], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(folder)}, check=False)
    said = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""])[-1]
    works = done.returncode == 0 and not any(
        word in said for word in ("is not built", "does not load", "reference"))
    return works, said


def build(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Of a copy of the sources, whose build folder is nobody else's."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (root / name).exists():
            shutil.copy(root / name, folder)
    for name in ("csrc", "bitkernels"):
        shutil.copytree(root / name, folder / name,
                        ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder,
                          capture_output=True, text=True, check=False,
                          env={**os.environ, "MAX_JOBS": str(max(1, (os.cpu_count() or 1) // 4))})


def run(folder: Path, root: Path = ROOT) -> None:
    record = Record(folder, "build")
    if importlib.util.find_spec("torch") is None:
        record.add(engine=False, said="torch is not installed")
        return
    works, said = tried(root)
    if works:
        record.add(engine=True, built=False, said=said)
        return
    start = time.time()
    record.add(engine=False, said=said)
    with tempfile.TemporaryDirectory() as made:
        done = build(root, Path(made))
        seconds = round(time.time() - start, 1)
        found = list(Path(made, "bitkernels").glob("_C*.so"))
        if done.returncode or not found:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if "rror" in line]
            record.add(engine=False, built=False, seconds=seconds,
                       said=" | ".join(lines[:3])[:600] or f"exit {done.returncode}")
            print(done.stdout[-20000:], done.stderr[-20000:], sep="\n")
            return
        works, said = tried(Path(made))
        if works:
            partial = root / "bitkernels" / f".{found[0].name}.{os.getpid()}"
            shutil.copy(found[0], partial)
            os.replace(partial, root / "bitkernels" / found[0].name)
        record.add(engine=works, built=True, seconds=seconds, said=said)
