"""The kernels of csrc/cuda, run thread by thread on the CPU by the emulator, against the reference.

Launchers, plans and arguments are the real ones; only the driver is replaced. Every launch runs
under another random order of threads and of asynchronous copies.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from bitkernels import reference
from bitkernels.backends.cuda import dispatch, kernels, launch, selfcheck
from bitkernels_tests import cuda_emulator
from bitkernels_tests.cases import CONV_CASES, ConvCase, dyadic, reals, words_of

if not cuda_emulator.available():
    pytest.skip(f"no C++ compiler ({cuda_emulator.COMPILER})", allow_module_level=True)

SMALL = tuple(kernels.ALL[name] for name in ("mma_64x32", "resident_64x64", "resident_128x64"))
# Resident kernels with bulk copies: test_resident_bulk.py; in turn: test_turns.py.
LARGE = [k for k in kernels.ALL.values()
         if k not in (*SMALL, *kernels.TURNS, kernels.PREPARE) and not (k.resident and k.bulk)]
INT32 = dict(dtype=torch.int32)


@pytest.fixture(autouse=True)
def driver(emulated):
    return emulated


def check(op: str, kernel, args, kw) -> None:
    want = getattr(reference, op)(*args, **kw)
    got = getattr(launch, op)(kernel, *args, **kw)
    for w, g in zip(want, got, strict=True):
        assert (w is None) == (g is None)
        if w is not None:
            assert g.shape == w.shape and g.stride() == w.stride()
            assert torch.equal(w, g)


@pytest.mark.parametrize("kernel", SMALL, ids=lambda k: k.name)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_conv_geometry(case, kernel):
    words, filters = case.words()
    args, kw = (words, filters, case.channels, *case.args), dict(pad_value=case.pad_value, **INT32)
    if kernel not in launch.taking((kernel.family,), "packed_conv2d", args, kw):
        large = case.channels > 512 or 9 in case.padding or 7 in case.kernel
        assert case.groups > 1 or case.pad_value == 1 or (kernel.resident and large)
        pytest.skip("outside the class of this kernel")
    check("packed_conv2d", kernel, args, kw)


@pytest.mark.parametrize("kernel", LARGE, ids=lambda k: k.name)
def test_conv_large_tiles(kernel):
    for case in (ConvCase(channels=128, out_channels=72, size=(9, 8), batch=3),
                 ConvCase(channels=100, out_channels=33, size=(7, 7), stride=(2, 2)),
                 ConvCase(channels=512, out_channels=40, size=(5, 4), kernel=(1, 1), padding=(0,))):
        words, filters = case.words()
        args = words, filters, case.channels, *case.args
        takes = kernel in launch.taking((kernel.family,), "packed_conv2d", args, INT32)
        assert takes != (kernel in kernels.BULK), "matrices are no images, also of 16 bytes a pixel"
        if takes:
            check("packed_conv2d", kernel, args, INT32)


@pytest.mark.parametrize("kernel", [*SMALL, *LARGE], ids=lambda k: k.name)
@pytest.mark.parametrize("rows,cout,channels", ((1, 1, 1), (300, 70, 640), (129, 300, 1024),
                                                (33, 257, 1408)), ids=str)
def test_linear(rows, cout, channels, kernel):
    """More tiles than blocks, more steps than stages, and less than one of each."""
    words, filters = words_of(rows, channels), words_of(cout, channels)
    args, kw = (words, filters, channels), dict(INT32, packed=True)
    if kernel not in launch.taking((kernel.family,), "packed_linear", args, kw):
        assert kernel.bulk and words.shape[-1] % 4 or kernel.resident and channels > 1000
        pytest.skip("outside the class of this kernel")
    check("packed_linear", kernel, args, kw)
    check("packed_linear", kernel, (words.view(*batch_of(rows), -1), filters, channels), kw)


def batch_of(rows: int) -> tuple[int, ...]:
    """Dimensions of so many rows."""
    return (3, rows // 3) if rows % 3 == 0 else (1, 1, rows)


PARTS = ("clamp_min", "clamp_max", "scale", "bias", "residual", "slope", "shift_in", "shift_out",
         "sign_shift")


def parts_of(names, shape, channels, dtype) -> dict:
    parts = {name: dyadic(channels) for name in names if not name.startswith("clamp")}
    if "residual" in names:
        parts["residual"] = dyadic(*shape, dtype=dtype)
    if "clamp_min" in names:
        parts["clamp_min"] = -11.5
    if "clamp_max" in names:
        parts["clamp_max"] = 20.0
    return parts


@pytest.mark.parametrize("kernel", SMALL, ids=lambda k: k.name)
@pytest.mark.parametrize("channels_last", (True, False))
@pytest.mark.parametrize("dtype,cout", [*itertools.product(
    (torch.float32, torch.float16, torch.bfloat16), (8, 21, 70, 96))], ids=str)
def test_epilogue(dtype, cout, channels_last, kernel):
    case = ConvCase(channels=64, out_channels=cout, size=(5, 6))
    words, filters = case.words()
    parts = parts_of(PARTS, case.output_shape, cout, dtype)
    check("packed_conv2d", kernel, (words, filters, 64, *case.args),
          dict(parts, dtype=dtype, packed=True, channels_last=channels_last))


@pytest.mark.parametrize("kernel", SMALL, ids=lambda k: k.name)
@pytest.mark.parametrize("names", ((), ("scale",), ("bias",), ("residual",), ("slope",),
                                   ("shift_in", "slope"), ("slope", "shift_out"), ("clamp_min",),
                                   ("clamp_max", "bias"), ("sign_shift",)), ids=str)
def test_parts_of_the_epilogue(names, kernel):
    words, filters = words_of(70, 96), words_of(38, 96)
    parts = parts_of(names, (70, 38), 38, torch.float32)
    for real in (True, False):
        kw = {k: v for k, v in parts.items() if real or k != "dtype"}
        check("packed_linear", kernel, (words, filters, 96), dict(kw, real=real, packed=True))


@pytest.mark.parametrize("kernel", SMALL, ids=lambda k: k.name)
def test_real_values_round_once_a_step(kernel):
    """Values whose fused multiply-add would round otherwise."""
    words, filters = words_of(65, 320), words_of(33, 320)
    parts = {name: reals(33) * 1.1 for name in ("scale", "bias", "slope", "shift_in", "shift_out")}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check("packed_linear", kernel, (words, filters, 320),
              dict(parts, residual=reals(65, 33, dtype=dtype), dtype=dtype))


@pytest.mark.parametrize("kernel", SMALL, ids=lambda k: k.name)
def test_both_zeros_are_bounds(kernel):
    words, filters = words_of(70, 96), words_of(38, 96)
    for bounds in (dict(clamp_min=-0.0), dict(clamp_max=-0.0), dict(clamp_min=0.0)):
        kw = dict(bounds, dtype=torch.float32)
        got, _ = launch.packed_linear(kernel, words, filters, 96, **kw)
        want, _ = reference.packed_linear(words, filters, 96, **kw)
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("kernel", SMALL, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_nan_stays_nan(dtype, kernel):
    """Those that arithmetic makes too, whose bits are all set on a GPU."""
    bias = reals(38).index_fill(0, torch.tensor([1, 20]), float("nan"))
    got, _ = launch.packed_linear(kernel, words_of(70, 96), words_of(38, 96), 96, bias=bias,
                                  slope=reals(38), dtype=dtype)
    assert torch.equal(got.isnan(), bias.isnan().expand(70, 38))


@pytest.mark.parametrize("kernel", SMALL, ids=lambda k: k.name)
def test_threshold(kernel):
    words, filters = words_of(70, 200), words_of(45, 200)
    low = torch.randint(-30, 10, (45,), dtype=torch.int32)
    threshold = torch.stack([low, low + torch.randint(-2, 60, (45,), dtype=torch.int32)])
    threshold[:, :2] = torch.tensor([[-2**31, 2**31 - 1], [2**31 - 1, -2**31]])
    check("packed_linear", kernel, (words, filters, 200),
          dict(threshold=threshold, real=False, packed=True))


def bounds_of(cout: int, channels: int) -> torch.Tensor:
    """Thresholds of every kind, next to each other and 128 of each."""
    spread = max(2, int(channels ** 0.5))
    low = torch.randint(-spread, spread, (cout,), dtype=torch.int32)
    high = low + torch.randint(0, spread, (cout,), dtype=torch.int32)
    least, most = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    kinds = torch.arange(cout) % 12
    low[(kinds == 0) | (torch.arange(cout) < 128)] = least  # only an upper bound
    high[(kinds == 1) | (torch.arange(cout) >= 256)] = most  # only a lower one
    low[kinds == 2], high[kinds == 2] = least, most
    low[kinds == 3], high[kinds == 3] = most, least
    low[kinds == 4], high[kinds == 4] = most, most
    low[kinds == 5], high[kinds == 5] = least, least
    low[kinds == 6], high[kinds == 6] = 3, 2
    low[kinds == 7], high[kinds == 7] = least + 1, -1
    low[kinds == 8], high[kinds == 8] = 1, most - 1
    return torch.stack([low, high])


@pytest.mark.parametrize("kernel", kernels.BULK, ids=lambda k: k.name)
@pytest.mark.parametrize("rows,cout,channels", ((200, 45, 200), (300, 400, 128), (130, 256, 384),
                                                (77, 320, 1152)), ids=str)
def test_signs_by_table(rows, cout, channels, kernel):
    """Thresholds of all kinds, none, and beside real values; whole tiles and cut ones."""
    channels = -(-channels // 128) * 128
    args = words_of(rows, channels), words_of(cout, channels), channels
    bounds = bounds_of(cout, channels)
    for threshold in (bounds, torch.stack([bounds[0], torch.full_like(bounds[0], 2**31 - 1)])):
        check("packed_linear", kernel, args, dict(threshold=threshold, real=False, packed=True))
    check("packed_linear", kernel, args, dict(real=False, packed=True))
    check("packed_linear", kernel, args, dict(INT32, packed=True))


@pytest.mark.parametrize("kernel", kernels.BULK, ids=lambda k: k.name)
@pytest.mark.parametrize("cout", (21, 70, 264, 256))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_epilogue_of_matrices(dtype, cout, kernel):
    rows = 150
    words, filters = words_of(rows, 128), words_of(cout, 128)
    parts = parts_of(PARTS, (rows, cout), cout, dtype)
    for kw in (dict(dtype=dtype), dict(parts, dtype=dtype, packed=True),
               dict(parts, real=False, packed=True)):
        check("packed_linear", kernel, (words, filters, 128), kw)


@pytest.mark.parametrize("kernel", kernels.BULK, ids=lambda k: k.name)
@pytest.mark.parametrize("names", (("scale",), ("bias",), ("residual",), ("shift_in", "slope"),
                                   ("slope", "shift_out"), ("clamp_min",), ("sign_shift",)),
                         ids=str)
def test_parts_of_the_epilogue_of_matrices(names, kernel):
    for cout in (256, 36):
        words, filters = words_of(70, 128), words_of(cout, 128)
        parts = parts_of(names, (70, cout), cout, torch.float32)
        for real in (True, False):
            kw = {k: v for k, v in parts.items() if real or k != "dtype"}
            check("packed_linear", kernel, (words, filters, 128), dict(kw, real=real, packed=True))


def test_views_are_taken_as_they_lie():
    """Offsets that are not aligned, strides, tiled filters, a residual in another layout."""
    words = words_of(40, 260)[1:]
    filters = words_of(33, 256)
    for offset in (0, 1, 2):
        part = words.flatten()[offset:offset + 34 * 8].view(34, 8)
        check("packed_linear", SMALL[0], (part, filters, 256), INT32)
        check("packed_linear", SMALL[1], (part, filters, 256), INT32)
    check("packed_linear", SMALL[0], (words[:, ::1][::2], words_of(9, 260), 260), INT32)
    tiled = reference.tile_weight(filters)
    check("packed_linear", SMALL[0], (words_of(5, 256), tiled, 256),
          dict(INT32, out_channels=33))
    case = ConvCase(channels=64, out_channels=24)
    a, w = case.words()
    scale = dyadic(25)[1:]
    for residual in (dyadic(*case.output_shape),
                     dyadic(*case.output_shape).to(memory_format=torch.channels_last),
                     dyadic(*case.output_shape[:-1], 7)[..., 1:]):
        check("packed_conv2d", SMALL[0], (a, w, 64, *case.args),
              dict(residual=residual, scale=scale))
    check("packed_conv2d", SMALL[0], (a, reference.tile_weight(w), 64, *case.args),
          dict(INT32, out_channels=24))


@pytest.mark.parametrize("channels", (31999, 32000, 32128))
@pytest.mark.parametrize("kernel", kernels.BULK, ids=lambda k: k.name)
def test_signs_of_the_largest_counts(kernel, channels, driver):
    """Two sums in a word up to K = 32000, one past it: rows of ones and of none, bounds at the ends
    and beside them."""
    words = reference.sign_pack(torch.tensor([[1.0], [-1.0]]).expand(2, channels))
    rows = torch.cat([words, words_of(3, channels)])
    ends = torch.tensor([-channels - 1, -channels, -channels + 1, -1, 0, 1, channels - 1, channels,
                         channels + 1], dtype=torch.int32)
    low, high = (t.reshape(-1) for t in torch.meshgrid(ends, ends, indexing="ij"))
    columns = len(low)
    filters = torch.cat([words, words_of(1, channels)]).repeat(columns, 1)[:3 * columns]
    threshold = torch.stack([low, high]).repeat_interleave(3, 1).contiguous()
    kw = dict(threshold=threshold, real=False, packed=True)
    got = launch.packed_linear(kernel, rows, filters, channels, **kw)[1]
    assert torch.equal(got, reference.packed_linear(rows, filters, channels, **kw)[1])


@pytest.fixture
def chosen(driver, monkeypatch):
    """Runs a call as the plan chooses; the kernels launched and what explain says."""
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    monkeypatch.setattr(dispatch, "why_unusable", lambda device: None)

    def run(op, *args):
        kw = dict(INT32, real=True, packed=True)
        dispatch.attempt(op, args, kw)  # checks the kernel
        before = len(driver.launched)
        for got, want in zip(dispatch.attempt(op, args, kw), getattr(reference, op)(*args, **kw),
                             strict=True):
            assert torch.equal(got, want)
        return driver.launched[before:], str(dispatch.explain(op, *args, real=True))

    return run


def test_the_plan_runs_and_checks_itself(chosen):
    launched, why = chosen("packed_linear", words_of(300, 4096), words_of(130, 4096), 4096)
    assert launched[0] == "prepare" and launched[1].startswith("bulk_")
    assert launched[1] in why and "unproven" in why


@pytest.mark.parametrize("cout", (64, 200))
def test_a_convolution_on_hopper_is_one_launch(cout, chosen):
    case = ConvCase(channels=128, out_channels=cout, size=(9, 9), batch=3)
    (launched,), why = chosen("packed_conv2d", *case.words(), 128, *case.args)
    assert launched.startswith("resident") and launched in why


@pytest.mark.parametrize("op", dispatch.OPS)
def test_selfcheck_covers_every_kernel(op, driver):
    for kernel in SMALL:
        assert selfcheck.failure(op, kernel, torch.device("cpu")) is None


@pytest.mark.parametrize("kernel", kernels.BULK, ids=lambda k: k.name)
def test_selfcheck_turns_every_block_over(kernel, driver):
    (words, filters, _), _, _ = selfcheck.many_tiles(kernel, torch.device("cpu"))
    tiles = -(-len(words) // kernel.bm) * -(-len(filters) // kernel.bn)
    assert tiles > 3 * launch.multiprocessors(torch.device("cpu"))
    assert selfcheck.failure("packed_linear", kernel, torch.device("cpu")) is None


@pytest.mark.parametrize("kernel", [k for k in kernels.RESIDENT if k.sums and not k.bulk],
                         ids=lambda k: k.name)
def test_squares_of_the_longest_sums(kernel):
    """Every product +1 or every one -1, more than registers hold of two tiles of 128 rows."""
    case = ConvCase(channels=448, out_channels=64, size=(6, 6), kernel=(5, 5), padding=(2, 2),
                    batch=30)
    words, filters = (torch.zeros_like(t) for t in case.words())  # -1, as the padding is
    filters[::2] = -1
    args = words, filters, 448, *case.args
    assert kernel in launch.taking(("resident",), "packed_conv2d_moments", args, {})
    check("packed_conv2d_moments", kernel, args, dict(pad_value=-1, out_channels=None, relu=False,
                                                      dtype=torch.int16))
