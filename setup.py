"""Builds the CPU engine `bitkernels._C`; everything else about the package is in pyproject.toml.

The engine uses the LibTorch stable ABI and Python's limited API, so one binary serves torch >= 2.11
and Python >= 3.10. Without the means to build it the install is pure Python and says so in one
line; an error in compiling it is an error.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TORCH_TARGET = "0x020b000000000000"  # torch 2.11
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno", "-g0"]
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


class BuildPy(build_py):
    """Takes csrc/cuda along, which is compiled where it runs. A checkout reads it in its place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._cuda_sources():
                self.mkpath(os.path.dirname(target))
                self.copy_file(source, target)

    def _cuda_sources(self) -> list[tuple[str, str]]:
        folder = os.path.join(self.build_lib, "bitkernels", "backends", "cuda", "csrc")
        return [(path, os.path.join(folder, os.path.basename(path)))
                for path in sorted(glob("csrc/cuda/*.cuh"))]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(t for _, t in self._cuda_sources())]


def obstacle() -> str | None:
    """What keeps this machine from building the extension, and the remedy; None if nothing does."""
    if os.environ.get("BITKERNELS_NO_EXT", "0") != "0":
        return "BITKERNELS_NO_EXT is set; unset it"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python has no limited API; use the ordinary build"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed here; install it and build with --no-build-isolation"
    torch_dir = Path(importlib.util.find_spec("torch").origin).parent
    if not (torch_dir / "include/torch/csrc/stable/library.h").exists():
        return f"{torch_dir} has no stable ABI headers; install torch >= 2.11"
    if os.name == "nt":
        return "the engine needs gcc or clang, which torch does not build with on Windows"
    compiler = os.environ.get("CXX", "c++").split()
    if not any(shutil.which(word) for word in compiler):
        return f"no C++ compiler ({' '.join(compiler)}); install g++ or clang++, or set CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "no Python.h; install the headers of this Python (python3-dev)"
    return None


def extension() -> dict:
    """Arguments to setup() for the extension; torch is imported only here."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = set(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    sources -= set(glob("csrc/cpu/kernel_test*.cpp"))
    engine = CppExtension(
        "bitkernels._C",
        sorted(sources),
        depends=glob("csrc/*.h") + glob("csrc/cpu/*.h") + glob("csrc/cpu/*.inc"),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args={"cxx": FLAGS},
        py_limited_api=True,
    )
    return {
        "ext_modules": [engine],
        "cmdclass": {"build_ext": BuildExtension, "build_py": BuildPy},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def build_arguments() -> dict:
    pure = {"cmdclass": {"build_py": BuildPy}}
    if not BUILD_COMMANDS & set(sys.argv):
        return pure
    reason = obstacle()
    if reason is None:
        return extension()
    print(f"bitkernels: installing without the C++ CPU engine: {reason}, then install again.",
          file=sys.stderr)
    return pure


setup(**build_arguments())
