"""The kernels of csrc/cuda on the CPU: built with the host compiler, launched as on a GPU.

`EmulatedDriver` stands in for `bitkernels.backends.cuda.driver.Driver`, so that launchers, plans,
argument structs and kernels are all the ones that a GPU would see. See emulator/machine.h for what
the emulator delays, checks and reports.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import fields
from pathlib import Path

from bitkernels.backends.cuda import compiler, kernels
from bitkernels.backends.cuda.driver import MOST_MAPS, Driver, Loaded
from bitkernels.backends.cuda.recent import Recent
from bitkernels.backends.cuda.spec import Params, Spec

FOLDER = Path(__file__).parent / "emulator"
COMPILER = os.environ.get("CXX", "g++").split()[0]
SIZES = {0: 0, 1: 4, 2: 4, 3: 2, 4: 2, 5: 2}  # bytes of an element of spec.TYPES
NAMES = [f.name.upper() for f in fields(Spec)]


def available() -> bool:
    return shutil.which(COMPILER) is not None


def maps(kernel: kernels.Kernel) -> str:
    return ", maps[0], maps[1]" if kernel.bulk else ""


def _generated(chosen) -> dict[str, str]:
    spec = "#pragma once\n" + "".join(f"inline int {name};\n" for name in NAMES)
    spec += f"#define SPEC_CONSTANTS {', '.join('&' + name for name in NAMES)}\n"
    table = "".join(
        f'{{"{k.name}", [] {{ {k.type}::run(params{maps(k)}); }}, '
        f'{f"{k.type}::shared" if k.resident else "nullptr"}}},\n' for k in chosen)
    checks = f"static_assert(sizeof(Params) == {ctypes.sizeof(Params)});\n"
    for name, _ in Params._fields_:
        checks += f"static_assert(offsetof(Params, {name}) == {getattr(Params, name).offset});\n"
    for k in chosen:
        if k is not kernels.PREPARE:
            checks += f"static_assert({k.type}::THREADS == {k.threads});\n"
        if k is not kernels.PREPARE and not k.resident:
            checks += f"static_assert({k.type}::SHARED == {k.shared});\n"
    return {"spec.cuh": spec, "kernels.inc": table, "checks.inc": checks}


def build(sources: dict[str, str], chosen, optimize: bool = True) -> ctypes.CDLL:
    """Built once for all processes that ask for the same sources."""
    texts = {**sources, **{p.name: p.read_text() for p in FOLDER.iterdir()},
             **_generated((*chosen, kernels.PREPARE))}
    options = ["-std=c++20", "-O1" if optimize else "-O0", "-DBITKERNELS_EMULATED", "-I.", "-fPIC",
               "-shared", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    key = hashlib.sha256("\0".join([*options, *map("\0".join, sorted(texts.items()))]).encode())
    path = Path(tempfile.gettempdir()) / f"bitkernels-emulator-{os.getuid()}" / key.hexdigest()[:16]
    built = path / "emulator.so"
    if not built.exists():
        path.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (path / name).write_text(text)
        part = path / f"{os.getpid()}.so"
        subprocess.run([COMPILER, *options, "-o", part, "main.cpp", "machine.cpp"], cwd=path,
                       check=True)
        os.replace(part, built)
    loaded = ctypes.CDLL(str(built))
    loaded.emulate.restype = ctypes.c_char_p
    return loaded


@functools.cache
def library() -> ctypes.CDLL:
    return build(compiler.sources(), [k for k in kernels.ALL.values() if k is not kernels.PREPARE])


class Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_uint64), ("end", ctypes.c_uint64), ("writable", ctypes.c_bool),
                ("late", ctypes.c_bool)]


class EmulatedDriver(Driver):
    """Launches run at once; a launch that would fail, hang or leave its tensors raises. Tensor maps
    are those of `Driver`, by a driver that checks what it is given."""

    def __init__(self, seed: int = 0, built: ctypes.CDLL | None = None):
        self.library = self.lib = built or library()
        self._maps = Recent(MOST_MAPS)
        self.functions: list[tuple[kernels.Kernel, Spec]] = []
        self.launched: list[str] = []
        self.seed = seed

    def version(self) -> tuple[int, int]:
        return 99, 0

    def bind(self, index: int) -> None:
        pass

    def build(self, kernel: kernels.Kernel, spec: Spec, arch: str) -> Loaded:
        self.functions.append((kernel, spec))
        return Loaded(self, 0, len(self.functions) - 1, 0)

    def unload(self, module: int, context: int) -> None:
        pass

    def launch(self, loaded: Loaded, grid: int, block: int, shared: int, stream: int,
               params: Params, *maps: ctypes.Structure, early: bool = False) -> None:
        kernel, spec = self.functions[loaded.function]
        assert not early or kernel.resident or self.launched[-1] == kernels.PREPARE.name
        assert (block, shared) == (kernel.threads, kernel.shared_bytes(spec))
        self.launched.append(kernel.name)
        ranges = (Range * 20)()
        sizes = self._sizes(kernel, spec, params)
        for i, (name, (size, writable)) in enumerate(sizes.items()):
            begin = getattr(params, name) or 0
            ranges[i] = Range(begin, begin + (size if begin else 0), writable,
                              early and (kernel.resident or name in ("corr", "pa"))
                              and not (name == "filters" and params.settled))
        values = (ctypes.c_int * len(NAMES))(*(getattr(spec, name.lower()) for name in NAMES))
        self.seed += 1
        both = b"".join(bytes(m) for m in maps) if maps else None
        error = self.library.emulate(kernel.name.encode(), grid, block, shared,
                                     ctypes.byref(params), both, values, ranges, len(sizes),
                                     self.seed)
        if error is not None:
            raise RuntimeError(f"{kernel.name}: {error.decode()}")

    @staticmethod
    def _sizes(kernel, spec: Spec, p: Params) -> dict[str, tuple[int, bool]]:
        """Bytes of each tensor, and whether this kernel may write it."""
        preparing = kernel is kernels.PREPARE
        cells = p.rows * spec.cout
        found = {"words": (p.images * spec.h * spec.w * spec.pixel, False),
                 "filters": (spec.cout * spec.k_bytes, False),
                 "corr": (spec.classes * spec.cout * 4, preparing), "pa": (4 * p.rows, preparing)}
        if not preparing:
            found |= {"out": (cells * SIZES[spec.out_type], True),
                      "packed": (p.rows * -(-spec.cout // 32) * 4, True),
                      "residual": (cells * SIZES[spec.residual], False),
                      "threshold": (8 * spec.cout, False), "moments": (24 * spec.cout, True)}
            found |= {name: (4 * spec.cout, False) for name in (
                "scale", "bias", "shift_in", "slope", "shift_out", "sign_shift")}
        return found
