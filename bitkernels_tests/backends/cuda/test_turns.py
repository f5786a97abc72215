"""Resident kernels whose warpgroups multiply in turn, on the emulator: against the reference, and
with deliberate mistakes in what turns add. No GPU has run them yet (`Kernel.measured_only`)."""

from __future__ import annotations

import pytest
import torch

from bitkernels.backends.cuda import dispatch, kernels, launch, selfcheck
from bitkernels_tests import cuda_emulator
from bitkernels_tests.backends.cuda.test_emulated import INT32, PARTS, bounds_of, check, parts_of
from bitkernels_tests.cases import CONV_CASES, ConvCase, dyadic, words_of
from bitkernels_tests.kernel_mutations import Run, survivors

if not cuda_emulator.available():
    pytest.skip(f"no C++ compiler ({cuda_emulator.COMPILER})", allow_module_level=True)

WIDE, TALL = kernels.ALL["resident_64x128_turns"], kernels.ALL["resident_128x64_turns"]
SIGNS = dict(real=False, packed=True)


@pytest.fixture(autouse=True)
def driver(emulated):
    return emulated


@pytest.mark.parametrize("kernel", kernels.TURNS, ids=lambda k: k.name)
@pytest.mark.parametrize("tiles", (1, 2, 3, 4, 5, 7, 8))
def test_any_number_of_tiles(tiles, kernel, monkeypatch):
    """Of a block: one, fewer than warpgroups, as many, and rounds that end with any of them."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    args = words_of(tiles * kernel.bm - 5, 640), words_of(kernel.bn - 3, 640), 640
    check("packed_linear", kernel, args, dict(threshold=bounds_of(kernel.bn - 3, 640), **SIGNS))


@pytest.mark.parametrize("kernel", kernels.TURNS, ids=lambda k: k.name)
def test_outputs(kernel):
    """Several blocks, of which some have a tile more and some share filters; every output."""
    case = ConvCase(channels=128, out_channels=kernel.bn + 9, size=(9, 8), batch=7)
    args = *case.words(), 128, *case.args
    check("packed_conv2d", kernel, args, dict(threshold=bounds_of(kernel.bn + 9, 1152), **SIGNS))
    parts = parts_of(PARTS, case.output_shape, kernel.bn + 9, torch.float16)
    check("packed_conv2d", kernel, args, dict(parts, dtype=torch.float16, packed=True))
    if kernel.sums:
        check("packed_conv2d_moments", kernel, args, dict(
            pad_value=0, out_channels=None, relu=True, dtype=torch.int16))


@pytest.mark.parametrize("kernel", (
    WIDE, pytest.param(TALL, marks=[pytest.mark.every])), ids=lambda k: k.name)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_geometry(case, kernel):
    args, kw = (*case.words(), case.channels, *case.args), dict(pad_value=case.pad_value, **INT32)
    if kernel not in launch.taking((kernel.family,), "packed_conv2d", args, kw):
        pytest.skip("outside the class of this kernel")
    check("packed_conv2d", kernel, args, kw)


@pytest.mark.parametrize("kernel", kernels.TURNS, ids=lambda k: k.name)
@pytest.mark.parametrize("channels", (16, 64, 256, 448))
def test_numbers_of_products(channels, kernel):
    """Fewer than are read together, as many as all sets of registers hold, and more."""
    case = ConvCase(channels=channels, out_channels=kernel.bn + 70, size=(9, 8), batch=7)
    check("packed_conv2d", kernel, (*case.words(), channels, *case.args), dict(INT32, packed=True))


@pytest.mark.parametrize("kernel", kernels.TURNS, ids=lambda k: k.name)
@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_check_at_first_use_gives_every_warpgroup_turns(op, kernel, driver, monkeypatch):
    """More tiles a block than warpgroups; and it looks at what they give."""
    cpu = torch.device("cpu")
    tiles = -(-selfcheck.many_rows(kernel, cpu) // kernel.bm)
    assert tiles > kernel.groups * launch.multiprocessors(cpu) / 2 and tiles % 2
    assert selfcheck.failure(op, kernel, cpu) is None
    if op == "packed_conv2d_moments" and not kernel.sums:
        return
    right = getattr(launch, op)

    def wrong(kernel, *args, **kw):
        found = right(kernel, *args, **kw)
        found[op != "packed_conv2d"][-1] += 1
        return found

    monkeypatch.setattr(selfcheck, "cases", lambda op: [])
    monkeypatch.setattr(launch, op, wrong)
    assert "over many" in selfcheck.failure(op, kernel, cpu)


# As a `Mutation` each.
MUTATIONS = (
    ("a first tile that waits for its turn", "resident.cuh", "sync_if(after,",
     "sync_if(after || MUTANT == 1,"),
    ("turns that nobody gives", "resident.cuh", "arrive_if(before,",
     "arrive_if(before && MUTANT != 2,"),
    ("turns in another order", "resident.cuh", "group() < GROUPS - 1 ? group() + 1 : 0",
     "MUTANT == 3 ? (group() + 2) % GROUPS : group() < GROUPS - 1 ? group() + 1 : 0"),
    ("a turn after the last tile", "resident.cuh", "start + stride / GROUPS < static_cast",
     "MUTANT == 4 || start + stride / GROUPS < static_cast"),
    ("turns of tiles that other blocks have", "resident.cuh", "stride / GROUPS <",
     "stride / GROUPS / (MUTANT == 5 ? 2 : 1) <"),
    ("turns at the barriers of a warpgroup's own threads", "resident.cuh",
     "return 1 + GROUPS + group;", "return 1 + (MUTANT == 6 ? 0 : GROUPS) + group;"),
    ("a barrier past the last", "resident.cuh", "{ return 1 + (MUTANT",
     "{ return (MUTANT == 7 ? 14 : 1) + (MUTANT"),
    ("turns that count one warpgroup", "resident.cuh", "turn_barrier(group()), 256",
     "turn_barrier(group()), MUTANT == 8 ? 128 : 256"),
    ("lanes that do not agree on whose turn it is", "resident.cuh", "group() > 0 || start",
     "(MUTANT == 9 ? lane() : group()) > 0 || start"),
    ("the last one taken for the first", "resident.cuh", "> 0 || start != first,",
     "> 0 || MUTANT == 10 || start != first,"),
    ("fragments replaced while products still read them", "resident.cuh",
     "wgmma_wait<1>();  // for those",
     "if (MUTANT == 11) wgmma_wait<2>(); else wgmma_wait<1>();  // for those"),
    ("fragments of another batch", "resident.cuh", "read(a[next % SETS], readers, next)",
     "read(a[next % SETS], readers, next - (MUTANT == 12))"),
    # The likely fault of those kernels that ended in cudaErrorIllegalInstruction on an H200.
    ("barrier 0 with a count and without", "resident.cuh", "    sync_threads();\n    work(",
     "    if (MUTANT == 13 && !making) sync_some(0, THREADS); else sync_threads();\n    work("),
)


def test_the_emulator_notices_what_a_gpu_would_not_forgive(monkeypatch):
    runs = []
    for rows in (900, 100):
        args = words_of(rows, 3200), words_of(40, 3200), 3200
        kw = dict(threshold=bounds_of(40, 3200), **SIGNS)
        runs.append(Run(WIDE, "packed_linear", args, kw))
    case = ConvCase(channels=64, out_channels=40, size=(9, 7), batch=9)
    kw = dict(dtype=torch.float16, packed=True, scale=dyadic(40))
    runs.append(Run(TALL, "packed_conv2d", (*case.words(), 64, *case.args), kw))
    assert not survivors(MUTATIONS, runs, monkeypatch)
