"""`python -m bitkernels`: what is installed here, which kernels would run and why.

`python -m bitkernels train` trains a network by a recipe; see its --help.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

import bitkernels
from bitkernels.backends import cpu
from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.cuda import plan

FEATURES = ("popcnt", "avx2", "avx512_bw", "avx512_vl", "avx512_vpopcntdq", "avx512_bitalg",
            "neon", "sve")
DISTRIBUTIONS = {"triton": ("triton", "pytorch-triton-rocm", "triton-windows"),
                 "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}
REMEDY = ("not built; with a C++ compiler and torch installed, run pip install "
          "--no-build-isolation --force-reinstall --no-deps on the source")


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
        rows.append(("cpu engine", REMEDY))
    try:
        return [*rows, ("runs on cpu", cpu.explain())]
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
    fast = torch._C._dispatch_has_kernel_for_dispatch_key("bitkernels::packed_conv2d", "CUDA")
    return [*rows, ("runs on gpu", "csrc/cuda where it has a kernel for the call, else "
                    "bitkernels.backends.triton" if fast
                    else "reference (slow, plain PyTorch): no GPU backend is loaded")]


def main() -> None:
    if sys.argv[1:2] == ["train"]:  # its own imports are of no concern to the report
        from bitkernels.train import command

        train = argparse.ArgumentParser(prog="python -m bitkernels train")
        command.add_arguments(train)
        sys.exit(command.main(train.parse_args(sys.argv[2:])))
    parser = argparse.ArgumentParser(
        prog="python -m bitkernels", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-kernels", action="store_true",
                        help="print only the names of the CPU kernels that this machine runs")
    if parser.parse_args().cpu_kernels:
        print("\n".join(name for name, supported in cpu.kernels() if supported))
        return
    rows = report()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
