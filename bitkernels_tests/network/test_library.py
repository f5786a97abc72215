"""The library without Python: its size, its start, and the program in C that classifies."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bitkernels import convert, load_converted, models, save_converted
from bitkernels_tests.converter.networks import shuffled

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").exists() or not shutil.which("make"),
                                reason="needs the checkout's Makefile")
SIDE = 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A small network and a picture."""
    folder = tmp_path_factory.mktemp("classify")
    torch.manual_seed(1)
    network = convert(shuffled(models.create_model("quicknet_small", num_classes=20)),
                      torch.randn(2, 3, SIDE, SIDE))
    save_converted(network, folder / "network.safetensors")
    pixels = bytes(random.Random(2).randrange(256) for _ in range(3 * SIDE * SIDE))
    (folder / "image.ppm").write_bytes(b"P6\n# noise\n%d %d\n255\n" % (SIDE, SIDE) + pixels)
    return folder


def built(target: str, *options: str, folder: str = "") -> Path:
    """The program that the Makefile makes; again only where a source is newer."""
    program = ROOT / "build" / (folder or target) / "classify"
    sources = [p for pattern in ("csrc/*.h", "csrc/cpu/*", "csrc/network/*", "examples/cpp/*",
                                 "Makefile") for p in ROOT.glob(pattern)]
    if not program.exists() or program.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        done = subprocess.run(["make", target, *options], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return program


def quickly_built() -> Path:
    """Apart from the user's, and at a level that costs less to compile; aarch64 has -O3."""
    return built("engine", "OPTIMIZE=-O0", "ENGINE_FOLDER=engine-tested", folder="engine-tested")


def logits_of(text: str) -> dict[int, float]:
    return {int(c): float(v) for c, v in re.findall(r"class (\d+) logit (\S+)", text)}


def arguments_of(folder: Path) -> tuple[Path, Path]:
    return folder / "network.safetensors", folder / "image.ppm"


def run(command, *options: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *arguments_of(folder), *options], capture_output=True,
                          text=True)


def expected(folder: Path) -> dict[int, float]:
    data = (folder / "image.ppm").read_bytes()[-3 * SIDE * SIDE:]
    image = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(SIDE, SIDE, 3)
    image = (image.permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    values, classes = load_converted(folder / "network.safetensors")(image)[0].topk(5)
    return dict(zip(classes.tolist(), values.tolist(), strict=True))


MEANS = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")


def check(command, folder: Path) -> None:
    done = run(command, *MEANS, "--threads", "2", "--repeats", "5", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "median of 5 runs" in done.stdout
    got, wanted = logits_of(done.stdout), expected(folder)
    assert got.keys() == wanted.keys()
    most = max(map(abs, wanted.values()))
    assert all(abs(got[c] - wanted[c]) < 1e-5 * most for c in got)


@pytest.mark.long
def test_classify(folder):
    program = quickly_built()
    assert program.stat().st_size < 3_280_000  # with -O3, which .ci/run looks at, 60 %
    check([program], folder)
    for arguments, message in (((folder / "missing", folder / "image.ppm"), "cannot be read"),
                               ((folder / "network.safetensors", __file__), "no binary PPM"),
                               ((folder / "network.safetensors",), "takes NETWORK"),
                               ((*arguments_of(folder), "--mean", "1"), "three numbers"),
                               ((*arguments_of(folder), "--what"), "unknown arguments")):
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr
    (folder / "small.ppm").write_bytes(b"P6 2 3 255\n" + bytes(18))
    done = subprocess.run([program, folder / "network.safetensors", folder / "small.ppm"],
                          capture_output=True, text=True)
    assert "the image is 3 high and 2 wide; the network takes 64 x 64" in done.stderr


def test_starts_at_once(folder):
    """From the start of the process to the end of its first result, 50 ms of processor time at
    most; the best of some, as the machine does other things too."""
    program, times = quickly_built(), []
    for _ in range(5):
        before = os.times()
        assert run([program], folder=folder).returncode == 0
        after = os.times()
        times.append(after.children_user + after.children_system
                     - before.children_user - before.children_system)
        if times[-1] < 0.05:
            break
        time.sleep(0.1)
    assert min(times) < 0.05


@pytest.mark.every
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
                    reason="needs a compiler and an emulator for aarch64")
def test_classify_on_aarch64(folder):
    program = built("engine-neon")
    assert program.stat().st_size < 2_000_000
    check(["qemu-aarch64", program], folder)
