"""Compiles a Triton kernel for a GPU that is not there and reads its machine code."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        return subprocess.run([TOOLS / name, *options, path], check=True, capture_output=True,
                              text=True).stdout


@dataclass(frozen=True)
class Machine:
    """What the machine code says; the counts of hip are read from its assembly."""

    code: bytes | str  # a cubin, or the assembly
    registers: int
    spilled: int  # bytes of thread-local memory
    shared: int
    ir: str  # Triton's own, before any target

    @functools.cached_property
    def text(self) -> str:
        """The instructions. To disassemble takes longer than to compile a small kernel."""
        if isinstance(self.code, str):
            return self.code
        # Data flow is not analyzed, a quarter of the time: these kernels' text is the same.
        return tool("nvdisasm", "-c", "-ndf", cubin=self.code)

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.text))

    def offsets_of(self, bits: int) -> int:
        """How many pointers of tiles are reached by offsets of so many bits."""
        return len(re.findall(rf"tt\.addptr .*: tensor<.*, tensor<[^>]*xi{bits}>", self.ir))


def target(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm")), 32)


def compile_for(name: str, kernel, types: dict[str, str], **options) -> Machine:
    """`types` names every argument: '*i32' and so on, or a constexpr value (also None).

    Pointers count as 16-byte aligned, as torch's allocations are; a type 'i32:16' is a number
    that 16 divides.
    """
    signature, constants, attributes = {}, {}, {}
    for i, arg in enumerate(kernel.arg_names):
        value = types[arg]
        if not isinstance(value, str):
            signature[arg], constants[(i,)] = "constexpr", value
            continue
        signature[arg] = value.removesuffix(":16")
        if value.startswith("*") or value.endswith(":16"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    def current_target() -> GPUTarget:
        return target(name)

    current_target.__triton_builtin__ = True  # type: ignore[attr-defined]
    # Kernels ask for the GPU that is there what they may do.
    with mock.patch("triton.language.target_info.current_target", current_target):
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes),
                                  target=target(name), options=options)
    if name.startswith("gfx"):
        text = compiled.asm["amdgcn"]

        def number(key):
            return max(map(int, re.findall(rf"\.{key}:\s*(\d+)", text)), default=0)

        return Machine(text, number("vgpr_count"), number("vgpr_spill_count"),
                       compiled.metadata.shared, compiled.asm["ttir"])
    cubin = compiled.asm["cubin"]
    usage = tool("cuobjdump", "-res-usage", cubin=cubin)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1])
                               for key in ("REG", "STACK", "LOCAL"))
    return Machine(cubin, registers, max(stack, local), compiled.metadata.shared,
                   compiled.asm["ttir"])
