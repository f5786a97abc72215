"""Resident kernels whose filters and lines come by bulk copies, on the emulator: against the
reference, and with deliberate mistakes."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitkernels import reference
from bitkernels.backends import replay
from bitkernels.backends.cuda import kernels, launch, maps, selfcheck
from bitkernels.backends.cuda.spec import Spec
from bitkernels_tests import cuda_emulator
from bitkernels_tests.backends.cuda.test_emulated import (
    INT32,
    PARTS,
    bounds_of,
    check,
    parts_of,
)
from bitkernels_tests.cases import CONV_CASES, ConvCase, reals, words_of
from bitkernels_tests.kernel_mutations import Run, survivors

if not cuda_emulator.available():
    pytest.skip(f"no C++ compiler ({cuda_emulator.COMPILER})", allow_module_level=True)

KERNELS = [k for k in kernels.RESIDENT if k.bulk]
KERNEL = kernels.ALL["resident_64x64_bulk"]


@pytest.fixture(autouse=True)
def driver(emulated):
    return emulated


def taken(args, kw, kernel=KERNEL, op="packed_conv2d") -> bool:
    return kernel in launch.taking((kernel.family,), op, args, kw)


# Beside CONV_CASES, whose images are few pixels: all sizes of a pixel that change the layout, tiles
# inside one image and over many, strides, dilations, uneven padding, filters that no map brings.
CASES = (
    *(ConvCase(channels=c, out_channels=n, size=(9, 8), batch=3)
      for c, n in ((32, 32), (64, 64), (96, 33), (128, 96), (192, 40), (256, 160), (384, 32),
                   (512, 64))),
    ConvCase(channels=128, out_channels=128, size=(16, 16)),  # tiles of whole images
    ConvCase(channels=256, out_channels=64, size=(7, 7), batch=5),
    ConvCase(channels=64, out_channels=70, size=(20, 14), batch=2),
    ConvCase(channels=64, out_channels=32, size=(3, 4), batch=9),
    ConvCase(channels=256, out_channels=32, size=(14, 13), stride=(2, 2), batch=4),
    ConvCase(channels=128, out_channels=64, size=(11, 12), stride=(1, 3), padding=(2, 0)),
    ConvCase(channels=128, out_channels=32, size=(12, 10), dilation=(2, 3), padding=(3, 2)),
    ConvCase(channels=128, out_channels=32, size=(9, 8), padding=(2, 0, 1, 3), pad_value=-1),
    ConvCase(channels=128, out_channels=32, size=(9, 8), padding=(0, 2, 3, 0)),
    ConvCase(channels=256, out_channels=32, size=(9, 7), kernel=(1, 1), padding=(0,)),
    ConvCase(channels=256, out_channels=32, size=(9, 7), kernel=(2, 5), padding=(1, 2)),
    ConvCase(channels=1024, out_channels=96, size=(5, 5), kernel=(1, 1), padding=(0,), batch=4),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_geometry(case):
    args = *case.words(), case.channels, *case.args
    kw = dict(pad_value=case.pad_value, **INT32)
    assert taken(args, kw)
    check("packed_conv2d", KERNEL, args, kw)


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_small_images(case):
    args = *case.words(), case.channels, *case.args
    kw = dict(pad_value=case.pad_value, **INT32)
    if not taken(args, kw):
        line = 4 * args[0].shape[-1] * case.size[1]
        oh, ow = case.output_shape[2:]
        most = max(case.channels * case.kernel[0] * case.kernel[1], 1)
        assert (line % 16 or oh * ow < 11 or case.groups > 1 or case.pad_value == 1
                or most > 2000 or max(*case.kernel, *case.padding) > 6)
        pytest.skip("outside the class of this kernel")
    check("packed_conv2d", KERNEL, args, kw)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k is not KERNEL], ids=lambda k: k.name)
def test_other_tiles(kernel):
    for case in (ConvCase(channels=256, out_channels=160, size=(7, 7), batch=5),
                 ConvCase(channels=64, out_channels=200, size=(9, 8), batch=3)):
        args = *case.words(), case.channels, *case.args
        check("packed_conv2d", kernel, args, INT32)
        kw = dict(threshold=bounds_of(case.out_channels, 64), real=False, packed=True)
        check("packed_conv2d", kernel, args, kw)


@pytest.mark.parametrize("channels,cout", ((64, 45), (128, 64), (256, 96)))
def test_signs(channels, cout):
    """Thresholds of all kinds, of one bound only, and none; alone and beside real values."""
    case = ConvCase(channels=channels, out_channels=cout, size=(7, 6), batch=4)
    args = *case.words(), channels, *case.args
    bounds = bounds_of(cout, 9 * channels)
    for threshold in (bounds, torch.stack([bounds[0], torch.full_like(bounds[0], 2**31 - 1)])):
        check("packed_conv2d", KERNEL, args, dict(threshold=threshold, real=False, packed=True))
    check("packed_conv2d", KERNEL, args, dict(real=False, packed=True))
    check("packed_conv2d", KERNEL, args, dict(INT32, packed=True))


@pytest.mark.parametrize("dtype,cout,channels_last", [*itertools.product(
    (torch.float32, torch.float16), (21, 96), (True, False))], ids=str)
def test_epilogue(dtype, cout, channels_last):
    case = ConvCase(channels=128, out_channels=cout, size=(7, 6))
    parts = parts_of(PARTS, case.output_shape, cout, dtype)
    check("packed_conv2d", KERNEL, (*case.words(), 128, *case.args),
          dict(parts, dtype=dtype, packed=True, channels_last=channels_last))


def test_what_is_not_taken():
    case = ConvCase(channels=64, out_channels=32, size=(9, 8))
    words, filters = case.words()
    args = words, filters, 64, *case.args
    assert taken(args, INT32)
    unaligned = torch.cat([words.flatten()[:2], words.flatten()])[2:].view_as(words)
    assert unaligned.data_ptr() % 16 and not taken((unaligned, *args[1:]), INT32)
    narrow = ConvCase(channels=64, out_channels=32, size=(9, 7))  # lines of 56 bytes
    assert not taken((*narrow.words(), 64, *narrow.args), INT32)
    wide = ConvCase(channels=64, out_channels=32, size=(1, 300))  # boxes of 302 elements
    assert not taken((*wide.words(), 64, *wide.args), INT32)
    tiny = ConvCase(channels=64, out_channels=32, size=(2, 2), batch=9)  # 16 images a tile
    assert not taken((*tiny.words(), 64, *tiny.args), INT32)
    assert not taken((words_of(300, 128), words_of(64, 128), 128), INT32, op="packed_linear")


def test_filters_that_are_not_aligned_are_copied_by_the_kernel():
    case = ConvCase(channels=128, out_channels=32, size=(9, 8))
    words, filters = case.words()
    unaligned = torch.cat([filters.flatten()[:1], filters.flatten()])[1:].view_as(filters)
    args = words, unaligned, 128, *case.args
    assert unaligned.data_ptr() % 16 and taken(args, INT32)
    check("packed_conv2d", KERNEL, args, INT32)
    check("packed_conv2d", KERNEL, (words, reference.tile_weight(filters), 128, *case.args),
          dict(INT32, out_channels=32))


@pytest.mark.parametrize("h,w", ((8, 8), (7, 7), (6, 10), (14, 14), (28, 28), (9, 56)))
def test_boxes_are_no_larger_than_needed(h, w):
    """Every tile's windows lie in the boxes, and some tile needs all of their lines."""
    for kh, sh in ((3, 1), (1, 2), (5, 1)):
        oh, ow = -(-h // sh), w
        spec = Spec(chunk=16, pixel=32, k_bytes=32 * kh, channels=256, cout=64, kh=kh, h=h, w=w,
                    oh=oh, ow=ow, sh=sh).boxed(64)
        needed, images = 0, 0
        for start in range(0, 64 * oh * ow, 64):
            last = start + 63
            images = max(images, last // (oh * ow) - start // (oh * ow) + 1)
            for image in range(start // (oh * ow), last // (oh * ow) + 1):
                first = start % (oh * ow) // ow if image == start // (oh * ow) else 0
                end = min(last - image * oh * ow, oh * ow - 1) // ow
                needed = max(needed, (end - first) * sh + kh)
        assert (spec.box_lines, spec.boxes) == (needed, images)


def moments(run, words, filters, sums):
    return run("packed_conv2d_moments", words, filters, 128, (1, 1), (1, 1), (1, 1), 1, sums=sums)


def test_moments_and_repeated_launches(driver):
    """The maps of a recorded launch follow the addresses."""
    kept = []
    for number in range(5):
        words, filters = words_of(3, 7, 6, 128), words_of(64, 3, 3, 128)
        kept += [words, filters]  # no address is used twice
        dot, found = replay.call(lambda op, *args, **kw: getattr(launch, op)(KERNEL, *args, **kw),
                                 moments, words, filters, True)
        want, expected = reference.packed_conv2d_moments(
            words, filters, 128, (1, 1), (1, 1), (1, 1), 1, pad_value=0, out_channels=None,
            relu=False, dtype=torch.int16)
        assert torch.equal(dot, want) and torch.equal(found, expected), number
    assert [type(entry) for entry in replay._recordings.values()] == [replay._Recording]


def test_real_values_of_the_next_call_at_the_same_address():
    """Nothing but addresses and sizes is kept of a call."""
    case = ConvCase(channels=128, out_channels=64, size=(7, 6))
    words, filters = case.words()
    args = words, filters, 128, *case.args
    for _ in range(2):
        check("packed_conv2d", KERNEL, args, dict(dtype=torch.float32, scale=reals(64)))
        words.bitwise_not_(), filters.bitwise_xor_(0x5555)


@pytest.mark.parametrize("op", ("packed_conv2d", "packed_conv2d_moments"))
def test_the_check_at_first_use_sees_both_maps(op, driver, monkeypatch):
    assert selfcheck.failure(op, KERNEL, torch.device("cpu")) is None
    assert any(kernel is KERNEL and maps.filters(spec, KERNEL.bn) for kernel, spec in
               driver.functions)


def in_memory_order(right: maps.Geometry) -> maps.Geometry:
    k = right.strides[0]
    return maps.Geometry(1, (k, 32 * right.sizes[4]), (k,), (128, 32 * right.box[4]), True)


def swapped(which: int):
    """Two dimensions the other way round."""
    def wrong(right: maps.Geometry) -> maps.Geometry:
        strides, sizes = list(right.strides), list(right.sizes)
        for values, at in ((strides, which), (sizes, which + 1)):
            values[at], values[at + 1] = values[at + 1], values[at]
        return right._replace(sizes=tuple(sizes), strides=tuple(strides))

    return wrong


@pytest.mark.parametrize("name,change", (("filters", in_memory_order), ("filters", swapped(1)),
                                         ("lines", swapped(0)), ("lines", swapped(2))))
def test_maps_in_another_order_are_noticed(name, change, monkeypatch):
    case = ConvCase(channels=256, out_channels=64, size=(7, 6), batch=3)
    args = *case.words(), 256, *case.args
    want, right = reference.packed_conv2d(*args, **INT32)[0], getattr(maps, name)
    assert torch.equal(launch.packed_conv2d(KERNEL, *args, **INT32)[0], want)
    monkeypatch.setattr(maps, name, lambda *args: change(right(*args)))
    try:
        got = launch.packed_conv2d(KERNEL, *args, **INT32)[0]
    except RuntimeError as error:
        assert "another rank" in str(error)
    else:
        assert not torch.equal(got, want)


# As a `Mutation` each.
MUTATIONS = (
    ("a line off by one", "pixels.cuh", "(box ? 0 : from.line) - PT",
     "(box ? 0 : from.line) - PT + (MUTANT == 1)"),
    ("the second image from where the first began", "pixels.cuh", "(box ? 0 : from.line)",
     "(box && MUTANT != 2 ? 0 : from.line)"),
    ("bytes of the other boxes forgotten", "pixels.cuh", "boxes * box_bytes());",
     "(MUTANT == 3 ? 1 : boxes) * box_bytes());"),
    ("an image too few", "pixels.cuh", "last >= box * (OH * OW)",
     "last - (MUTANT == 4 ? 40 : 0) >= box * (OH * OW)"),
    ("no zeros before a box", "pixels.cuh", "i < boxes * each",
     "i < (MUTANT == 5 ? 0 : boxes * each)"),
    ("boxes that nothing waits for", "resident.cuh", "if (BOXES) barrier_wait(fetched",
     "if (BOXES && MUTANT != 6) barrier_wait(fetched"),
    ("the wrong parity", "resident.cuh", "barrier_wait(fetched(group(), buffer), parity)",
     "barrier_wait(fetched(group(), buffer), parity ^ (MUTANT == 7))"),
    ("a parity that follows the buffer", "resident.cuh", "parity ^= buffer,",
     "parity = MUTANT == 8 ? parity ^ 1 : parity ^ buffer,"),
    ("filters that nothing waits for", "resident.cuh", "if (BOXES) barrier_wait(filled",
     "if (BOXES && MUTANT != 9) barrier_wait(filled"),
    ("bytes of a tile of filters forgotten", "filters.cuh", "tiles * rows * 128);",
     "(tiles - (MUTANT == 10)) * rows * 128);"),
    ("filters of the block before", "filters.cuh", "0, 0, 0, n0 / 32, barrier",
     "0, 0, 0, MUTANT == 11 ? 0 : n0 / 32, barrier"),
    ("barriers used before they are there", "resident.cuh",
     "sync_some(own_barrier(GROUPS - 1), 128);",
     "if (MUTANT != 12) sync_some(own_barrier(GROUPS - 1), 128);"),
    ("copies before the kernel before has ended", "resident.cuh", "    dependency_wait();",
     "    if (MUTANT != 13) dependency_wait();"),
    ("planes as far apart as those of lines", "layout.cuh", "(BOXES ? BOX_LINES * WP",
     "(BOXES && MUTANT != 14 ? BOX_LINES * WP"),
    ("filters that are not made visible", "resident.cuh", "fence_async();",
     "if (MUTANT != 15) fence_async();"),
    ("the second image's windows in the first", "layout.cuh", "images > 0 ? images * BOX_STEP",
     "images > 0 && MUTANT != 16 ? images * BOX_STEP"),
    ("taps past the image", "masks.cuh", "kh < KH - h.past",
     "kh < KH - (MUTANT == 17 ? 0 : h.past)"),
    ("masks in the order of memory", "masks.cuh", "((piece ^ row) & 7)",
     "((MUTANT == 18 ? piece : piece ^ row) & 7)"),
    ("filters of the other warpgroup", "filters.cuh", "group * 512",
     "(MUTANT == 19 ? 0 : group * 512)"),
    ("a table that nothing waits for", "resident.cuh", "    sync_threads();\n    work(",
     "    if (MUTANT != 20) sync_threads();\n    work("),
    ("bounds that nothing waits for", "resident.cuh", "return sync_threads_any(both)",
     "return MUTANT == 21 ? true : sync_threads_any(both)"),
    ("classes of other rows", "masks.cuh", "8 * pass + row - 7",
     "8 * pass + row - 7 - (MUTANT == 22)"),
    ("masks of the first product for all", "filters.cuh", "product / each * each",
     "product / each * each * (MUTANT != 23)"),
    ("taps cut off at one side only", "masks.cuh", "(KW - w.before - w.past)",
     "(KW - w.before - (MUTANT == 24 ? 0 : w.past))"),
    ("classes past the first nine forgotten", "resident.cuh", "pass < mask_passes()",
     "pass < (MUTANT == 25 ? 1 : mask_passes())"),
    ("masks of the pass before", "resident.cuh", "store_masks(pass)",
     "store_masks(pass - (MUTANT == 26))"),
    ("masks replaced while they are multiplied", "resident.cuh",
     "if (pass > 0) {\n        sync_threads();",
     "if (pass > 0) {\n        if (MUTANT != 27) sync_threads();"),
    ("masks multiplied before all are stored", "resident.cuh",
     "fence_async();\n        sync_threads();",
     "fence_async();\n        if (MUTANT != 28) sync_threads();"),
    ("zeros past K that are read", "filters.cuh", "there && (4 * product + 3 < units()",
     "there && (MUTANT == 29 || 4 * product + 3 < units()"),
    ("halves of other channels", "filters.cuh", "(thread & 192) / 32",
     "(thread & (MUTANT == 30 ? 64 : 192)) / 32"),
    ("channels without a bound that do not flip", "filters.cuh", "flip ? end : low",
     "flip && MUTANT != 31 ? end : low"),
)


def test_the_emulator_notices_what_a_gpu_would_not_forgive(monkeypatch):
    runs = []
    for case in (ConvCase(channels=256, out_channels=160, size=(7, 6), batch=30),
                 ConvCase(channels=128, out_channels=64, size=(16, 8), batch=9),
                 ConvCase(channels=64, out_channels=70, size=(9, 8), batch=7)):
        args = *case.words(), case.channels, *case.args
        threshold = bounds_of(case.out_channels, 9 * case.channels)
        signs = dict(threshold=threshold, real=False, packed=True)
        runs += [Run(KERNEL, "packed_conv2d", args, kw) for kw in (INT32, signs)]
    # Two warpgroups make the table, of 25 classes: three passes.
    case = ConvCase(channels=64, out_channels=128, size=(8, 8), kernel=(5, 5), padding=(2,))
    signs = dict(threshold=bounds_of(128, 1600), real=False, packed=True)
    runs.append(Run(kernels.ALL["resident_64x128_bulk"], "packed_conv2d",
                    (*case.words(), 64, *case.args), signs))
    assert not survivors(MUTATIONS, runs, monkeypatch, seeds=4)
