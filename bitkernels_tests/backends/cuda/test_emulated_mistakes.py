"""Mistakes in csrc/cuda, one at a time, that the emulator must notice: what a GPU would not
forgive, or forgives on most days.

All are compiled into one library; the number of one of them switches it on.
"""

from __future__ import annotations

import pytest
import torch

from bitkernels.backends.cuda import kernels, launch, settled
from bitkernels_tests import cuda_emulator
from bitkernels_tests.backends.cuda.test_emulated import INT32, bounds_of
from bitkernels_tests.cases import ConvCase, dyadic, words_of
from bitkernels_tests.kernel_mutations import Run, survivors

if not cuda_emulator.available():
    pytest.skip(f"no C++ compiler ({cuda_emulator.COMPILER})", allow_module_level=True)

# As a `Mutation` each.
MUTATIONS = (
    ("a copy that nothing waits for", "mma_gemm.cuh", "copy_async_wait<STAGES - 2>();",
     "if (MUTANT == 1) copy_async_wait<STAGES - 1>(); else copy_async_wait<STAGES - 2>();"),
    ("no barrier before a stage is filled again", "mma_gemm.cuh", "sync_threads();  // the step",
     "if (MUTANT != 2) sync_threads();  // the step"),
    ("no swizzle", "layout.cuh", "(byte >> 4) ^ row", "(byte >> 4) ^ (MUTANT == 3 ? 0 : row)"),
    ("a stage left too early", "wgmma_ring.cuh", "wgmma_wait<1>();",
     "if (MUTANT == 4) wgmma_wait<2>(); else wgmma_wait<1>();"),
    ("the wrong parity", "bulk_gemm.cuh", "at.parity ^ 1", "at.parity ^ (MUTANT != 5)"),
    ("a stage that is never left", "wgmma_ring.cuh",
     "    leave(before);\n  }", "    if (MUTANT != 6) leave(before);\n  }"),
    ("the accumulators of the tile before", "wgmma_ring.cuh", "accumulate || k > 0",
     "accumulate || k > 0 || MUTANT == 7"),
    ("more registers taken than given", "bulk_gemm.cuh", "give_registers<PRODUCER_REGISTERS>();",
     "if (MUTANT == 8) give_registers<64>(); else give_registers<PRODUCER_REGISTERS>();"),
    ("a fragment of other rows", "mma_gemm.cuh", "warp_m * WM + 16 * f + 8 * h + lane / 4;",
     "warp_m * WM + 16 * f + 8 * (MUTANT == 9 ? 1 - h : h) + lane / 4;"),
    ("pixels that are read before all are there", "resident.cuh",
     "sync_some(own_barrier(group()), 128);",
     "if (MUTANT != 10) sync_some(own_barrier(group()), 128);"),
    ("pixels that nothing waits for", "resident.cuh", "if (!BOXES) copy_async_wait<0>();\n      if",
     "if (!BOXES && MUTANT != 11) copy_async_wait<0>();\n      if"),
    ("fragments replaced while products still read them", "resident.cuh", "wgmma_wait<1>();",
     "if (MUTANT == 12) wgmma_wait<2>(); else wgmma_wait<1>();"),
    ("no fence after the filters are stored", "resident.cuh", "fence_async();",
     "if (MUTANT != 13) fence_async();"),
    ("filters and bounds that nothing waits for", "resident.cuh", "return sync_threads_any(both)",
     "return MUTANT == 14 ? both : sync_threads_any(both)"),
    ("words in the order of memory", "layout.cuh",
     "unit() == 8 ? within / 2", "unit() == (MUTANT == 15 ? 7 : 8) ? within / 2"),
    ("filters in the order of memory", "layout.cuh", "return row / 32 * 32 +",
     "if (MUTANT == 16) return row;\n  return row / 32 * 32 +"),
    ("halves of a word the other way round", "filters.cuh", "+ q % 2 * 2;",
     "+ (MUTANT == 17 ? 1 - q % 2 : q % 2) * 2;"),
    ("no zeros around the lines", "pixels.cuh", "after / right * WP + LEAD + W",
     "after / right * WP + LEAD + (MUTANT == 18 ? W + 1 : W)"),
    ("upper bounds that do not flip", "filters.cuh", "ballot(flip)",
     "ballot(flip && MUTANT != 19)"),
    ("both bounds taken for one", "filters.cuh", "return both;",
     "return both && MUTANT != 20;"),
    ("lines of the image before", "pixels.cuh", "begin + i + (HP - PT)",
     "begin + i + (HP - PT) - (MUTANT == 21)"),
    ("totals read before all are there", "resident.cuh", "n0) {\n    sync_threads();",
     "n0) {\n    if (MUTANT != 22) sync_threads();"),
    ("sums of rows past the last", "outputs.cuh", "if (MOMENTS && m < p.rows)",
     "if (MOMENTS && (MUTANT == 23 || m < p.rows))"),
    ("bounds rounded down", "epilogue.cuh", "2 * parity + 3)",
     "2 * parity + 3 * (MUTANT != 24))"),
    ("a table that knows no parity", "gemm_epilogue.cuh", "(pa & 1) * Slot::TABLE",
     "(MUTANT == 25 ? 0 : pa & 1) * Slot::TABLE"),
    ("values of other channels", "gemm_epilogue.cuh", "c % 8 / 2 * 4 + c % 16 / 8 * 2",
     "(MUTANT == 26 ? c % 4 * 4 + c % 16 / 4 / 2 * 2 : c % 8 / 2 * 4 + c % 16 / 8 * 2)"),
    ("bytes of other lanes", "epilogue.cuh", "t & 1 ? 0x3715 : 0x6240",
     "(t & 1) != (MUTANT == 27) ? 0x3715 : 0x6240"),
    ("fields of other channels", "gemm_epilogue.cuh", "0x0000F0F0", "(MUTANT == 28 ? 0 : 0xF0F0)"),
    ("upper bounds that are not flipped", "gemm_epilogue.cuh", "words[g] ^= load",
     "if (MUTANT != 29) words[g] ^= load"),
    ("no second bound", "gemm_epilogue.cuh", "if (between) {", "if (between && MUTANT != 30) {"),
    ("ones past the last channel", "epilogue.cuh", "if (!there || low",
     "if (!there && MUTANT != 31 || low"),
    ("bounds that overflow", "epilogue.cuh", "low > most || high < -most)",
     "MUTANT != 32 && (low > most || high < -most))"),
    ("corrections read before prepare has ended", "bulk_gemm.cuh", "    dependency_wait();",
     "    if (MUTANT != 33) dependency_wait();"),
    ("a slot filled while it is in use", "bulk_gemm.cuh", "      barrier_wait(used(n)",
     "      if (MUTANT != 34) barrier_wait(used(n)"),
    ("a slot read before it is filled", "bulk_gemm.cuh", "      barrier_wait(brought(n)",
     "      if (MUTANT != 35) barrier_wait(brought(n)"),
    ("window counts that nothing waits for", "gemm_epilogue.cuh", "    copy_async_wait<0>();",
     "    if (MUTANT != 36) copy_async_wait<0>();"),
    ("rows of another strip", "gemm_epilogue.cuh", "const int r = row + 64 * s + lane / 4 + 8 * h;",
     "const int r = row + 64 * (MUTANT == 37 ? 0 : s) + lane / 4 + 8 * h;"),
    ("inputs read before the kernel before has ended", "resident.cuh", "    dependency_wait();",
     "    if (MUTANT != 38) dependency_wait();"),
    ("a sum that borrows from its neighbour", "gemm_epilogue.cuh", "within + 0x8000",
     "within + (MUTANT == 39 ? 0 : 0x8000)"),
    ("halves of other quarters", "gemm_epilogue.cuh", "+ quarter % 2;",
     "+ quarter % 2 * (MUTANT != 40);"),
    ("entries that do not fit into a half", "gemm_epilogue.cuh", "entry > most ? most",
     "entry > most && MUTANT != 41 ? most"),
    ("signs of other channels", "signs.cuh", "0x01010101u << k",
     "0x01010101u << (MUTANT == 42 ? 7 - k : k)"),
    ("labels of the other strip", "resident.cuh", "shuffle(label, row)",
     "shuffle(label, MUTANT == 43 ? row % 16 : row)"),
    ("windows of the other strip", "pixels.cuh", "first = 16 * strip",
     "first = MUTANT == 44 ? 0 : 16 * strip"),
    ("one strip's signs from the other's counts", "resident.cuh", "signs(acc[0],",
     "signs(acc[MUTANT == 45 ? STRIPS - 1 : 0],"),
    ("a strip that nothing waits for", "resident.cuh", "if (batches() == 1) {",
     "if (MUTANT == 46) {\n          } else if (batches() == 1) {"),
    ("rows of the other strip", "outputs.cuh", "(16 * s + 8 * h) * COUT",
     "(16 * (MUTANT == 47 ? 0 : s) + 8 * h) * COUT"),
    ("rows past the last stored", "outputs.cuh", "return m < p.rows && (COUT",
     "return (m < p.rows || MUTANT == 48) && (COUT"),
    ("signs of rows past the last", "signs.cuh", "store_if(m < p.rows &&",
     "store_if((m < p.rows || MUTANT == 49) &&"),
    ("inputs read before the kernel before has ended, where filters may be", "resident.cuh",
     "if (settled) limits", "if (settled && MUTANT != 50) limits"),
    ("filters read that the kernel before writes", "resident.cuh", "!BOXES && p.settled;",
     "!BOXES && (p.settled || MUTANT == 51);"),
)
# Rows, columns and channels by kernel: several tiles for every group, several turns of the ring.
SIZES = {"mma_64x32": (300, 130, 6144),
         "bulk_128x128": (300, 130, 6144), "bulk_256x128": (600, 140, 3072),
         "resident_64x64": (700, 130, 2560),
         "resident_128x64": (1500, 130, 1152)}


def test_the_emulator_notices_what_a_gpu_would_not_forgive(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    runs = []
    for kernel in (kernels.ALL[name] for name in SIZES):
        rows, columns, channels = SIZES[kernel.name]
        args = words_of(rows, channels), words_of(columns, channels), channels
        runs.append(Run(kernel, "packed_linear", args, INT32))
        if kernel.bulk:
            kw = dict(threshold=bounds_of(columns, channels), real=False, packed=True)
            runs.append(Run(kernel, "packed_linear", args, kw))
    case = ConvCase(channels=64, out_channels=70, size=(9, 7), batch=7)
    args = *case.words(), 64, *case.args
    threshold = bounds_of(198, 576)[:, 128:].contiguous()  # every kind, in one tile
    threshold[1, ::5] = threshold[0, ::5] + 3
    kw = dict(threshold=threshold, real=False, packed=True)
    moments = dict(pad_value=0, out_channels=None, relu=True, dtype=torch.int16)
    for name in ("resident_64x64", "resident_128x64"):
        runs += [Run(kernels.ALL[name], "packed_conv2d", args, kw),
                 Run(kernels.ALL[name], "packed_conv2d_moments", args, moments)]
    case = ConvCase(channels=64, out_channels=72, size=(9, 7), batch=7)  # 8 channels at once
    kw = dict(dtype=torch.float16, packed=True, scale=dyadic(72), slope=dyadic(72),
              residual=dyadic(*case.output_shape, dtype=torch.float16))
    words, filters = case.words()
    settled.add(filters)
    runs.append(Run(kernels.ALL["resident_128x64"], "packed_conv2d",
                    (words, filters, 64, *case.args), kw))
    assert not survivors(MUTATIONS, runs, monkeypatch)
