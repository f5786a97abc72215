"""Builds the CPU engine `bitkernels._C`; everything else about the package is in pyproject.toml.

The engine uses the LibTorch stable ABI and Python's limited API, so one binary serves torch >= 2.11
and Python >= 3.10. An install that lacks the means to build it stops with one line that names what
is missing. BITKERNELS_NO_EXT=1 asks for pure Python; where no engine can be built, on Windows and
free-threaded Python, that needs no asking. The version of such an install ends in +pure: the
version is all that pip shows of an install that succeeds.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

import setuptools
from setuptools import Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.errors import ModuleError

TORCH_TARGET = "0x020b000000000000"  # torch 2.11
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno", "-g0"]
COMPILERS = "install g++ >= 11 or clang++ >= 14, or set CXX to one"
# What an old compiler or an incomplete one lacks first.
PROBE = """
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <optional>
#include <string_view>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
__attribute__((target("avx512f,avx512vpopcntdq"))) __m512i count(__m512i x) {
  return _mm512_popcnt_epi32(x);
}
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
typedef float F __attribute__((vector_size(32)));
typedef int I __attribute__((vector_size(32)));
F convert(I x) { return __builtin_convertvector(x, F); }
std::optional<std::string_view> cxx17;
"""
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
WHEEL_COMMANDS = {"dist_info", "bdist_wheel", "editable_wheel"}


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


def pure_python() -> bool:
    """Whether the engine is unwanted, or cannot be built on this platform at all."""
    return (os.environ.get("BITKERNELS_NO_EXT", "0") != "0" or os.name == "nt"
            or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))


def obstacle() -> str | None:
    """What keeps this machine from building the engine, and the remedy; None if nothing does."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return "torch is not installed here; pip install torch, then use --no-build-isolation"
    torch_headers = Path(torch.origin).parent / "include"
    if not (torch_headers / "torch/csrc/stable/library.h").exists():
        return f"{torch_headers} has no stable ABI headers; install torch >= 2.11"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "no Python.h; install the headers of this Python (python3-dev)"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not any(shutil.which(word) for word in compiler):
        return f"no C++ compiler ({' '.join(compiler)}); install g++ or clang++, or set CXX"
    return compiler_obstacle(compiler, torch_headers)


def compiler_obstacle(compiler: list[str], torch_headers: Path) -> str | None:
    """What the compiler lacks that the engine uses: tried, since versions say little."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        command = [*compiler, *shlex.split(os.environ.get("CXXFLAGS", "")), "-std=c++17",
                   "-fsyntax-only", f"-I{torch_headers}", f"-I{sysconfig.get_path('include')}",
                   str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    error = next((line for line in lines if "error" in line), lines[0])
    return f"{' '.join(compiler)} cannot compile the engine ({error.strip()}); {COMPILERS}"


def extension() -> dict:
    """Arguments to setup() for the extension; torch is imported only here."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    engine = CppExtension(
        "bitkernels._C",
        sorted({*glob("csrc/torch/*.cpp"), *glob("csrc/cpu/*.cpp"), *glob("csrc/network/*.cpp")}
               - {"csrc/network/thread_pool.cpp"}),  # here the threads are torch's
        depends=[*glob("csrc/*/*.h"), *glob("csrc/*.h"), *glob("csrc/*/*.inc")],
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


def refuse(reason: str) -> None:
    raise SystemExit(f"bitkernels: {reason}")


def builds_wheels() -> bool:
    try:
        return bool(Distribution().get_command_class("bdist_wheel"))
    except ModuleError:
        return False


def build_arguments() -> dict:
    if WHEEL_COMMANDS & set(sys.argv) and not builds_wheels():
        refuse(f"setuptools {setuptools.__version__} builds no wheels by itself; "
               "pip install 'setuptools>=77' wheel")
    arguments: dict = {"cmdclass": {"build_py": BuildPy}}
    if pure_python():
        if WHEEL_COMMANDS & set(sys.argv):  # pip then says that it installed bitkernels-X+pure
            arguments["options"] = {"egg_info": {"tag_build": "+pure"}}
        return arguments
    if not BUILD_COMMANDS & set(sys.argv):
        return arguments
    reason = obstacle()
    if reason:
        refuse(f"the CPU engine cannot be built here: {reason}. For an install in pure Python, "
               "correct and slow on CPUs, set BITKERNELS_NO_EXT=1.")
    return extension()


# The licence is not in pyproject.toml: setuptools before 77 refuses the form that later ones want.
setup(license="Apache-2.0", **build_arguments())
