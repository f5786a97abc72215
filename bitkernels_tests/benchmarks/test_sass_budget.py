"""benchmarks/sass_budget.py and kernel_model.py: how costs are counted, and the budgets that the
convolutions of csrc/cuda must keep."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bitkernels.backends.cuda import compiler, kernels
from bitkernels_tests import sass

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import kernel_model
import sass_budget

try:
    compiler.version()
except Exception as error:
    pytest.skip(f"NVRTC does not load ({type(error).__name__}: {error})",
                allow_module_level=True)
if sass.disassembler() is None:
    pytest.skip("no nvdisasm; it comes with Triton", allow_module_level=True)


def lines(text: str) -> list[str]:
    """Of a few instructions and labels, as nvdisasm writes them."""
    return [t if t.startswith(".L") else f"        /*0000*/    {t} ;" for t in text.split("\n")]


LOOP = lines("""MOV R0, R1
@P3 BRA `(.L_x_9)
STS [R0], R1
.L_x_9:
BAR.SYNC.DEFER_BLOCKING R13, 0x80
.L_x_1:
LDGSTS.E.BYPASS.128 [R7], desc[UR8][R8.64]
@!P0 BRA `(.L_x_1)
BGMMA.64x144x256.AND.POPC R24, R112, gdesc[UR4], RZ, !UPT
@P1 BRA `(.L_x_2)
BMMA.168256.AND.POPC R88, R168.ROW, R4.COL, R88
LDS.128 R4, [R8]
.L_x_2:
IADD3 R1, R2, R3, RZ
@P2 BRA `(.L_x_3)
STG.E desc[UR8][R14.64], R13
.L_x_3:
@!P4 BRA `(.L_x_9)
EXIT""")


def test_the_way_that_counts():
    """All copies and outputs, inner loops as often as they run, nothing that may be skipped."""
    flow = sass.Flow(LOOP)
    tiles, inner = flow.loops
    assert len(tiles.body) > len(inner.body) == 1
    once = flow.way(tiles.head, tiles.latches, tiles.body, lambda loop, cost: 3.0, tiles)
    assert once.ops == {"BAR.SYNC.DEFER_BLOCKING": 1, "LDGSTS.E.BYPASS.128": 3, "BRA": 3 + 3,
                        "BGMMA.64x144x256.AND.POPC": 1, "IADD3": 1, "STG.E": 1}
    assert once.pipes()["lsu"] == 4 and once.pipes()["alu"] == 1
    assert once.wavefronts() == 3 * 4 + 144 * 32 / 128 / 4
    table = flow.way(tiles.head, tiles.latches, tiles.body, lambda loop, cost: 1.0, tiles,
                     lambda cost: cost.work + cost.count("BMMA"))
    assert table.count("BMMA", "LDS") == 2


def test_no_way_is_an_error():
    flow = sass.Flow(LOOP)
    with pytest.raises(ValueError, match="no way"):
        flow.way(flow.loops[0].head, (0,), range(len(flow.blocks)), lambda loop, cost: 1.0)


R64, R128, TALL, TURNS = (kernels.ALL[name] for name in (
    "resident_64x64", "resident_64x128", "resident_128x64", "resident_64x128_turns"))


@pytest.mark.parametrize("kernel,channels,size,output,before,an_output", (
    (R128, 256, 14, "signs", 235, 2.8), (R64, 64, 56, "block", 180, 16.5),
    (TALL, 64, 56, "block", 225, 15.6), (TURNS, 256, 14, "signs", 235, 3)))
def test_convolutions_keep_their_budgets(kernel, channels, size, output, before, an_output):
    case = sass_budget.conv_case(kernel, channels, size, output)
    found = sass_budget.measure(case)
    assert found.spilled == 0 and not found.over
    # The design asks for 160 before the epilogue of 256@14; the machine code has 212.
    assert case.products / 2 < found.before.total <= before
    assert 2 < found.an_output <= an_output
    assert found.before.count("BGMMA") == case.products
    assert found.epilogue.count("BGMMA", "BMMA") == 0 and found.epilogue.count("STG") > 0
    assert found.before.count("LDSM") in (0, case.products)
    # What is over a budget says so.
    tight = replace(found, spilled=4)
    assert tight.over == ["spilled"] and "FAIL spilled" in sass_budget.line(tight, True)
    assert found.turns == (kernel is TURNS)
    # Half a batch takes less; both take at least their bytes and their products.
    rows = case.rows
    time, half = (kernel_model.predict(found, n)[0] for n in (rows, rows // 2))
    assert time > half > 0
    tiles = -(-rows // kernel.bm) * channels // kernel.bn
    assert time >= kernel_model.moved(case, rows) / kernel_model.COPY
    assert time >= (tiles // kernel_model.MULTIPROCESSORS * kernel_model.tensor(case)
                    / kernel_model.CLOCK)


@pytest.mark.parametrize("kernel,channels,size,mean", (
    ("resident_64x64_bulk", 64, 56, 150), ("resident_64x128_bulk", 128, 28, 133),
    ("resident_64x128_bulk", 256, 14, 140), ("resident4_64x64_bulk", 512, 7, 140)))
def test_warps_divide_the_prologue(kernel, channels, size, mean):
    case = sass_budget.conv_case(kernels.ALL[kernel], channels, size, "signs")
    found = sass_budget.measure(case)
    assert not found.over and found.mean_prologue <= mean
    assert sum(n for n, _ in found.roles.values()) == case.kernel.threads // 32
    costs = {name: cost for name, (_, cost) in found.roles.items()}
    # Only those that make the table multiply, and they bring nothing.
    assert costs["table"].count("BGMMA") == case.products
    assert costs["table"].count("UTMALDG", "UBLKCP") == 0
    assert all(cost.count("BGMMA") == 0 for name, cost in costs.items() if name != "table")
    tiles = -(-case.spec.k_bytes // 128)
    assert costs["filters"].count("UBLKCP") == tiles
    assert costs["lines"].count("UTMALDG") == case.spec.boxes
    assert costs["lines, barriers"].total > costs["lines"].total
    text = sass_budget.line(found, roles=True)
    assert all(name in text for name in costs)


def test_a_trap_ends_a_block():
    flow = sass.Flow(lines("@P0 BRA `(.L_x_2)\nEXIT\n.L_x_2:\nBPT.TRAP 0x1\nIADD3 R1, R2, R3, RZ"))
    trap = next(b for b in flow.blocks if b.ops == ["BPT.TRAP"])
    assert trap.next == []


def test_twice_the_rows_read_a_channel_once():
    """What a block's epilogue takes of shared memory for 64 rows."""
    short, tall = (sass_budget.measure(sass_budget.conv_case(k, 64, 56, "block"))
                   for k in (R64, TALL))
    assert tall.case.outputs == 2 * short.case.outputs
    assert tall.case.products == 2 * short.case.products
    assert tall.wavefronts <= 1.4 * short.wavefronts
    twice = replace(tall, epilogue=tall.epilogue.times(2))
    assert tall.over == [] and twice.over == ["output", "waves"]


def test_every_case_has_a_name_and_a_budget():
    names = [case.name for case in sass_budget.cases() if case.budget.an_output > 0]
    assert len(names) == len(set(names)) > 100
