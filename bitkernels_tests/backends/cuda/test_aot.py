"""Every kernel of csrc/cuda compiled by NVRTC for GPUs that are not there; machine code asserted.

What must show: the 1-bit tensor core, as often as the tile says; nothing in thread-local memory;
registers within the budget that the kernel's threads leave.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest

from bitkernels.backends.cuda import compiler, kernels
from bitkernels.backends.cuda.spec import conv_spec, linear_spec
from bitkernels_tests import sass

if sass.disassembler() is None:
    pytest.skip("no nvdisasm; it comes with Triton", allow_module_level=True)
try:
    compiler.version()
except Exception as error:
    pytest.skip(f"NVRTC does not load ({type(error).__name__}: {error})",
                allow_module_level=True)

FULL = dict(out_type=3, packed=1, residual=3, clamp_min=1, clamp_max=1, scale=1, bias=1,
            shift_in=1, slope=1, shift_out=1, sign_shift=1)
CONV = conv_spec((64, 256, 14, 14), (14, 14), (256, 3, 3, 8), 256, (1, 1), (1, 1, 1, 1), (1, 1), 16)
NARROW = conv_spec((64, 64, 28, 28), (56, 56), (64, 3, 3, 2), 64, (2, 2), (1, 1, 1, 1), (1, 1), 8)
LINEAR = linear_spec(256, 8192, 8192, 16)
SPECS = {"conv": replace(CONV, **FULL), "linear": replace(LINEAR, packed=1),
         "bounds": replace(LINEAR, packed=1, threshold=1),
         "long": replace(linear_spec(2048, 8192, 65536, 16), packed=1),
         "fp16": replace(LINEAR, out_type=3),
         "ragged": replace(linear_spec(260, 1000, 8320, 16), packed=1, out_type=3, scale=1, bias=1),
         "narrow": replace(NARROW, packed=1, threshold=1),
         "nchw": replace(NARROW, chunk=4, nhwc=0, **FULL)}


@functools.lru_cache(maxsize=16)  # what follows each other here asks for the same
def build(kernel: kernels.Kernel, spec, arch: str) -> tuple[list[str], int, int]:
    """(instructions, registers, spilled bytes)."""
    built = sass.build(kernel, spec, arch)
    return built.code, built.registers, built.spilled


def name_of(value) -> str:
    return getattr(value, "name", value)


MMA = [(k, arch, what) for k in kernels.MMA for arch, what in (
    ("sm_80", "conv"), ("sm_80", "linear"), ("sm_89", "narrow"))]
MMA += [(kernels.MMA[0], "sm_90a", "linear"), (kernels.MMA[1], "sm_80", "nchw"),
        (kernels.MMA[2], "sm_86", "linear")]


@pytest.mark.parametrize("kernel,arch,what", MMA, ids=name_of)
def test_mma(kernel, arch, what):
    code, registers, spilled = build(kernel, SPECS[what], arch)
    tile = [int(n) for n in re.findall(r"\d+", kernel.type)]
    products = (tile[2] // 16) * (tile[3] // 8) * 2
    found = sum("BMMA.168256.AND.POPC" in line for line in code)
    assert found > 0 and found % products == 0, "whole steps of K"
    assert sum("CALL" in line for line in code) <= 1, "emulated products, or broken-up shuffles"
    assert spilled == 0
    assert registers * kernel.threads * kernel.blocks <= 65536
    assert any("LDGSTS" in line for line in code)


@pytest.mark.parametrize("what", ("linear", "bounds", "fp16", "ragged"))
@pytest.mark.parametrize("kernel", kernels.BULK, ids=name_of)
def test_bulk(kernel, what):
    spec = SPECS[what]
    code, registers, spilled = build(kernel, spec, "sm_90a")
    strips, rest = int(re.findall(r"\d+", kernel.type)[1]), -(-(spec.k_bytes % 128) // 32)
    steps = spec.k_bytes // 128
    found = sum(f"BGMMA.64x{kernel.bn}x256.AND.POPC" in line for line in code)
    whole = found - strips * rest
    assert whole % (4 * strips) == 0 and (whole > 0) == (steps > 0), "whole steps, the rest once"
    assert registers * kernel.threads <= 65536
    assert spilled == 0
    assert sum("USETMAXREG" in line for line in code) == 2
    assert any("UTMALDG.2D" in line for line in code)


@pytest.mark.parametrize("what", ("linear", "long"))
@pytest.mark.parametrize("kernel", kernels.BULK, ids=name_of)
def test_signs_of_matrices_take_few_instructions(kernel, what):
    """No load from global memory. With two sums in a word, half an addition and half a permutation
    an output, and a quarter of what collects signs; else a sum and a shift, half of the sums on the
    multipliers."""
    code, _, _ = build(kernel, SPECS[what], "sm_90a")
    last = max(i for i, line in enumerate(code) if "BGMMA" in line)
    stored = max(i for i, line in enumerate(code) if "STG" in line)
    epilogue = code[last:stored]
    outputs = int(re.findall(r"\d+", kernel.type)[1]) * kernel.bn // 2  # of a lane
    assert not any("LDG" in line for line in epilogue)
    if what == "long":
        assert sum("SHF.L" in line for line in epilogue) >= outputs
        assert outputs // 2 <= sum("IADD3" in line for line in epilogue) < outputs
        assert len(epilogue) < 4 * outputs + 40  # and what a tile costs
    else:
        assert 0 < sum("PRMT" in line for line in epilogue) <= 3 * outputs // 4 + 16
        assert sum("LDS.128" in line for line in epilogue) <= outputs // 8 + 2
        assert len(epilogue) < 3.25 * outputs + 40


def layer(channels: int, size: int, stride: int = 1):
    """3x3, as in a ResNet, with the whole epilogue in the widest type."""
    out = (size - 1) // stride + 1
    words = channels // 32
    return replace(conv_spec((256, channels, out, out), (size, size), (channels, 3, 3, words),
                             channels, (stride, stride), (1, 1, 1, 1), (1, 1), min(16, 4 * words)),
                   **{**FULL, "out_type": 2, "residual": 2})


RESIDENT = {"linear": replace(linear_spec(64, 200, 2048, 16), packed=1),
            "64 chained": replace(NARROW, packed=1, threshold=1), "nchw": SPECS["nchw"],
            "64": layer(64, 56), "128": layer(128, 28, 2), "256": layer(256, 14),
            "512": layer(512, 7)}


@pytest.mark.parametrize("kernel,what", [
    # Every second shape of a kernel, every second kernel of a shape, of those that multiply in turn
    # one; the others in .ci/run.
    pytest.param(kernel, what, marks=[pytest.mark.every] if (
        what != "256" if kernel in kernels.TURNS else (i + j) % 2) else [])
    for i, kernel in enumerate((*kernels.RESIDENT, *kernels.TURNS))
    for j, what in enumerate(RESIDENT)], ids=name_of)
def test_resident(kernel, what):
    spec = RESIDENT[what]
    if kernel.bulk and what == "linear":
        pytest.skip("bulk copies are of lines of images")
    spec = kernel.placed(spec)
    code, registers, spilled = build(kernel, spec, "sm_90a")
    # Fragments in registers: the first operand after the accumulators is not a descriptor.
    product = re.compile(rf"BGMMA.64x{kernel.bn + 16}x256.AND.POPC R\d+, R\d+, gdesc")
    products = kernel.bm // 64 * -(-spec.k_bytes // 32)
    places = [i for i, line in enumerate(code) if product.search(line)]
    assert len(places) == products
    assert spilled == 0 and registers * kernel.threads <= 65536
    assert kernel.shared_bytes(spec) <= kernels.MOST_SHARED
    if kernel.bulk:  # of the boxes of the first tile and of the next, and of the filters
        by_map = kernel.maps(spec, 2**16 * spec.oh * spec.ow)[1] is not None
        copies = 2 * spec.boxes + by_map * -(-spec.k_bytes // 128)
        assert sum("UTMALDG" in line for line in code) == copies
        assert sum("UBLKCP" in line for line in code) == -(-spec.k_bytes // 128)  # of the masks
    else:
        assert any("LDGSTS" in line for line in code)
    assert any("LDS" in line for line in code)
    # Registers of products that run are not the compiler's.
    assert not sass.touched_in_flight(code)
    # A kernel that starts early looks at nothing before it has waited for the one before.
    waits = next(i for i, line in enumerate(code) if "ACQBULK" in line)
    assert not any(re.search(r"\b(LDG|STG|RED|ATOM|UTMALDG)", line) for line in code[:waits])
    # Of other threads than its own a warpgroup waits where it has turns, once before a tile's
    # products, and lets the next one go on, once behind them. A barrier's count is always the same.
    waited, given = ([i for i, line in enumerate(code) if re.search(what, line)] for what in (
        r"BAR\.SYNC\S* R\d+, 0x100 ", r"BAR\.ARV R\d+, 0x100 "))
    assert len(waited) == len(given) == (kernel in kernels.TURNS)
    assert all(w < places[0] and places[-1] < g for w, g in zip(waited, given, strict=True))
    assert sum(bool(re.search(r"BAR\.(SYNC|ARV)\S* R", line)) for line in code) == (
        1 + 2 * len(waited))
    assert not any(re.search(r"BAR\S* 0x0, 0x", line) for line in code)
    # The table is products of the filters with masks; nothing is counted or multiplied by mma.sync.
    assert sum("BGMMA.64x16x256" in line for line in code) == -(-spec.k_bytes // 32)
    assert not any(sass.opcode(line).startswith(("POPC", "BMMA")) for line in code)
    if spec.pixel % 16 == 0:
        assert sum("LDSM.16.M88.4" in line for line in code) == products


@pytest.mark.parametrize("arch", ("sm_80", "sm_89", "sm_90a"))
def test_prepare(arch):
    for spec in (CONV, NARROW, replace(LINEAR, windows=1)):
        code, registers, spilled = build(kernels.PREPARE, spec.for_preparation(), arch)
        assert spilled == 0 and registers <= 64
        assert any("POPC" in line for line in code)


def test_peak():
    code, _, spilled = build(kernels.PEAK_MMA, LINEAR, "sm_80")
    assert spilled == 0 and sum("BMMA" in line for line in code) % 32 == 0
    code, _, spilled = build(kernels.PEAK_WGMMA, LINEAR, "sm_90a")
    assert spilled == 0 and sum("BGMMA.64x256x256" in line for line in code) % 4 == 0


def test_shared_memory_fits():
    """99 KiB a block on sm_86 and sm_89, 163 KiB on sm_80, 227 KiB on sm_90."""
    assert all(k.shared <= 99 * 1024 for k in kernels.MMA)
    assert all(k.shared <= 227 * 1024 for k in kernels.BULK)


def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(compiler.CompileError, match="nowhere"):
        compiler.compile('#include "types.cuh"\nint x = nowhere;', LINEAR.header(), "sm_80",
                         cached=False)
