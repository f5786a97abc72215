"""`python -m bitkernels doctor`: what is installed here, which kernels would run and why."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch

import bitkernels
from bitkernels.backends import cpu
from bitkernels.backends.answer import registered
from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.cuda import launch, plan

FEATURES = ("popcnt", "avx2", "avx512_bw", "avx512_vl", "avx512_vpopcntdq", "avx512_bitalg",
            "avx512_vnni", "avx_vnni", "neon", "sve")
DISTRIBUTIONS = {"triton": ("triton", "pytorch-triton-rocm", "triton-windows"),
                 "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
                 "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}
TRAINING = (("safetensors", "safetensors"), ("tqdm", "tqdm"), ("sklearn", "scikit-learn"),
            ("tensorboard", "tensorboard"))
# Those of docs/environment.md, and the values of the switches, which take any other without a word.
VARIABLES: dict[str, tuple[str, ...]] = {
    "BITKERNELS_CPU": (), "BITKERNELS_TRITON": ("0", "1"), "BITKERNELS_TRITON_INNER": (),
    "BITKERNELS_TRITON_AUTOTUNE": ("0", "1"), "BITKERNELS_CUDA": ("0", "1"),
    "BITKERNELS_CUDA_KERNEL": (), "BITKERNELS_ONE_PASS": ("0", "1"), "BITKERNELS_CACHE_DIR": (),
    "BITKERNELS_WEIGHTS_DIR": (), "BITKERNELS_NO_EXT": ("0", "1"), "BITKERNELS_TEST_DEVICE": (),
    "BITKERNELS_TEST_SHARD": ()}
DESCRIPTION = """\
What is installed here, which kernels would run and why, and what would help.

  python -m bitkernels doctor
  BITKERNELS_CPU=avx2 python -m bitkernels doctor    what follows from a variable

Please put the output into bug reports.
"""


def installed_version(names: tuple[str, ...]) -> str:
    """From the metadata of the distribution, so that nothing heavy is imported."""
    found = {d.name: d.version for d in map(_distribution, names) if d is not None}
    return ", ".join(f"{v} ({n})" for n, v in found.items()) or "not installed"


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def report() -> list[tuple[str, str]]:
    rows = [
        ("bitkernels", f"{bitkernels.__version__} in {Path(bitkernels.__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    rows += [(name, installed_version(names)) for name, names in DISTRIBUTIONS.items()]
    rows += [("variables", ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items())
                                     if k.startswith("BITKERNELS_")) or "none set")]
    return rows + cpu_rows() + gpu_rows()


def cpu_rows() -> list[tuple[str, str]]:
    found = torch.cpu.get_capabilities()
    features = " ".join(name for name in FEATURES if found.get(name))
    rows = [("cpu", f"{found.get('cpu_name', platform.machine())}: {features or '-'}")]
    if cpu.why_not is None:
        rows.append(("cpu kernels", ", ".join(
            name if supported else f"{name} (not on this CPU)"
            for name, supported in cpu.kernels())))
    elif importlib.util.find_spec("bitkernels._C") is None:
        rows.append(("cpu engine", "not built"))
    try:
        return [*rows, ("runs on cpu", cpu.summary())]
    except RuntimeError as error:  # BITKERNELS_CPU names no kernel of this machine
        return [*rows, ("runs on cpu", f"nothing: {str(error).splitlines()[0]}")]


def cuda_row() -> tuple[str, str]:
    """Of the kernels that are compiled by NVRTC where they run."""
    measured = ", ".join(f"{arch} ({entry['gpu']}, {entry['date']})"
                         for arch, entry in plan.table().items())
    asked = {"1": "; all asked for by BITKERNELS_CUDA=1", "0": "; none, by BITKERNELS_CUDA=0"}
    said = (f"measured on {measured}" if measured
            else "none proven on any GPU yet, BITKERNELS_CUDA=1 opts in")
    said += asked.get(cuda.mode(), "")
    if torch.cuda.is_available():
        reason = cuda.why_unusable(torch.device("cuda", torch.cuda.current_device()))
        said += f"; not here: {reason}" if reason else "; they compile and load here"
    return "cuda kernels", said


def gpu_rows() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("gpu", "none"), cuda_row()]
    rows = [cuda_row()]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"gpu {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, "
                                     f"{gpu.total_memory / 2**30:.0f} GiB"))
    fast = registered("packed_conv2d", "CUDA")
    return [*rows, ("runs on gpu", "csrc/cuda where it has a kernel for the call, else "
                    "bitkernels.backends.triton" if fast
                    else "reference (slow, plain PyTorch): no GPU backend is loaded")]


def remedies() -> list[str]:
    """What would make this installation faster or more complete, one line each."""
    found = []
    if cpu.why_not and os.environ.get("BITKERNELS_CPU") == cpu.REFERENCE:
        found.append("BITKERNELS_CPU=reference turns the CPU engine off: unset it")
    elif cpu.why_not:
        found.append("the CPU engine is missing, and operators run in plain PyTorch. "
                     f"{cpu.remedy()}")
    try:
        cpu.summary()
    except RuntimeError as error:
        found.append(str(error).splitlines()[0])
    for name, value in sorted(os.environ.items()):
        values = VARIABLES.get(name)
        if name.startswith("BITKERNELS_") and values is None:
            found.append(f"{name} is not read; there are {', '.join(VARIABLES)}")
        elif value and values and value not in values:
            found.append(f"{name} must be {' or '.join(values)}, got {value!r}")
    if not torch.cuda.is_available() and torch.version.cuda is None and torch.version.hip is None \
            and shutil.which("nvidia-smi"):
        found.append("there is an NVIDIA driver, but this torch is built for CPUs: install the "
                     "CUDA build of torch")
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        found.append("there is a GPU, but no Triton, without which the slow reference runs on it: "
                     "pip install triton")
    if torch.cuda.is_available() and (said := cuda_remedy()):
        found.append(said)
    missing = [name for module, name in TRAINING if importlib.util.find_spec(module) is None]
    if missing:
        found.append(f"only to train by recipes, and for its data and plots: pip install "
                     f"{' '.join(missing)}")
    return found


def cuda_remedy() -> str | None:
    """Of a GPU that csrc/cuda has kernels for and does not run on: what that costs, and why."""
    device = torch.device("cuda", torch.cuda.current_device())
    arch, reason = launch.architecture(device), cuda.why_unusable(device)
    if arch is None or reason is None:
        return None
    gains = plan.gains(arch)
    if not gains:
        return f"csrc/cuda (on {arch} by BITKERNELS_CUDA=1 alone) does not run here: {reason}"
    return (f"csrc/cuda, on {arch} {min(gains):.1f} to {max(gains):.1f} times as fast as Triton in "
            f"{len(gains)} measured calls and those near them, does not run here: {reason}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION


def main(options: argparse.Namespace) -> int:
    rows = report()
    rows += [("to do" if i == 0 else "", line) for i, line in enumerate(remedies() or ["nothing"])]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0
