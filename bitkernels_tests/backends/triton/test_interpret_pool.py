"""Triton's max pooling in the interpreter, for training: both kernels of the backward, all windows,
layouts and types; test_interpret.py runs this file."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_interpret.py runs this file", allow_module_level=True)

from bitkernels.backends.triton import max_pool2d_with_offsets as pooling
from bitkernels.backends.triton import passes
from bitkernels.ops._record import OPERATORS
from bitkernels_tests.backends.triton.test_interpret import (  # noqa: F401
    FLOATS,
    as_interpreted,
    emulated_ptx,
    same,
)
from bitkernels_tests.cases import LAYOUTS, PoolCase, reals
from bitkernels_tests.triton_interpreter import language_patched_once  # noqa: F401

FORWARD, BACKWARD = "max_pool2d_with_offsets", "max_pool2d_with_offsets_backward"
# Windows of padding alone and of more taps than are unrolled, strides beyond windows.
CASES = (
    PoolCase(), PoolCase((1, 1)), PoolCase((3, 3), (2, 2), (1, 1)),
    PoolCase((3, 2), (1, 2), (1, 1)),
    PoolCase((2, 2), (3, 3), (1, 1), ceil_mode=True, size=(5, 9)), PoolCase((3, 3), (1, 1), (1,)),
    PoolCase((2, 3), (2, 1), (0, 1), (3, 2)), PoolCase(batch=0),
    PoolCase((3, 3), (2, 2), (1, 1), (2, 1), ceil_mode=True, size=(9, 6)),
    PoolCase((2, 2), (1, 1), (1, 1), (2, 2), size=(1, 3)), PoolCase((2, 3), (4, 5), size=(13, 14)),
    PoolCase((5, 6), (2, 1), (2, 3), size=(6, 7)))


def both(op, *args):
    """(what the kernel gives, what the reference gives), of checked arguments."""
    call = OPERATORS[op].check(*args)
    promised = OPERATORS[op].fake(*call.args)
    got = getattr(pooling, op)(*call.args)
    for have, want in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, promised)),
                          strict=True):
        assert have.stride() == want.stride()
    return got, OPERATORS[op].reference(*call.args)


def check(x, grad_of, *args):
    """Forward, then backward of `grad_of` the outputs; returns the offsets."""
    (out, offsets), (want, want_offsets) = both(FORWARD, x, *args)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True, check_stride=False)
    same(offsets, want_offsets)
    grad = grad_of(out)
    got, _ = both(BACKWARD, grad, offsets, x.shape[2:], *args)
    _, expected = both(BACKWARD, grad.float(), offsets, x.shape[2:], *args)
    same(got, as_interpreted(expected, grad.dtype))
    return offsets


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_windows(case, layout):
    """Many equal maxima, NaN, infinities, a plane of -inf."""
    channels = 33 if layout == "channels_last" else 2  # of planes each is a program
    x = torch.randint(-3, 4, (min(case.batch, 1), channels, *case.size)).float()
    if x.numel():
        for value in (float("nan"), float("nan"), float("inf"), -0.0):
            x.view(-1)[torch.randint(x.numel(), (3,))] = value
        x[0, 0] = -float("inf")
    check(LAYOUTS[layout](x), torch.randn_like, *case.args)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_types(layout, dtype):
    """Also a gradient in another layout than the image."""
    x = LAYOUTS[layout](reals(2, 3, 5, 4, dtype=dtype))
    others = (LAYOUTS["channels_last"], LAYOUTS["transposed"]) if dtype == FLOATS[1] else ()
    for turned in (torch.clone, *others):
        check(x, lambda out, of=turned: of(torch.randn(out.shape).to(dtype)), (3, 3), (2, 2),
              (1, 1))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_pairs_of_elements_at_once(layout, dtype, monkeypatch):
    """As GPUs of sm_90 compare them: equal maxima, both zeros, NaN of both signs, infinities."""
    monkeypatch.setattr(pooling, "_compares_pairs", lambda family, dtype: True)
    x = torch.randint(-2, 3, (1, 40 if layout == "channels_last" else 2, 9, 8)).to(dtype)
    for value in (float("nan"), float("nan"), -float("nan"), float("inf"), -0.0, 0.0):
        x.view(-1)[torch.randint(x.numel(), (x.shape[1],))] = value
    x[0, 0] = -float("inf")
    (out, _), (want, _) = both(FORWARD, LAYOUTS[layout](x), (3, 3), (2, 2), (1, 1))
    assert torch.equal(out.signbit() & (out == 0), want.signbit() & (want == 0))
    check(LAYOUTS[layout](x), torch.randn_like, (3, 3), (2, 2), (1, 1))


def test_which_gpus_compare_pairs():
    half, brain, single = FLOATS[1], FLOATS[2], FLOATS[0]
    assert [dtype for dtype in (half, brain, single) if pooling._compares_pairs("sm90", dtype)] == [
        half, brain]
    assert pooling._compares_pairs("sm80", half) and pooling._compares_pairs("sm120", brain)
    assert not pooling._compares_pairs("sm89", brain)
    assert not any(pooling._compares_pairs(name, half) for name in ("hip", "interpret"))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("window", (((3, 3), (2, 2), (1, 1)), ((2, 2), (1, 1), (1, 1), (9, 7))))
def test_bytes_that_name_no_pixel(window, layout):
    call = OPERATORS[FORWARD].check(reals(1, 3, 8, 6), *window)
    shape = OPERATORS[FORWARD].fake(*call.args)[1].shape
    offsets = LAYOUTS[layout](torch.randint(10, shape, dtype=torch.uint8))
    got, want = both(BACKWARD, LAYOUTS[layout](reals(*shape)), offsets, (8, 6), *window)
    same(got, want)


@pytest.mark.parametrize("elements", (32, 256, 4096))
def test_tiles(elements, monkeypatch):
    """One pixel, some, and more than there are; channels of several blocks."""
    for name in ("max_pool2d", "max_pool2d_backward"):
        monkeypatch.setitem(passes.PASSES, name, passes.Pass(elements, columns=32))
    for layout, channels in (("contiguous", 2), ("channels_last", 40)):
        check(LAYOUTS[layout](reals(1, channels, 5, 6, dtype=torch.float16)), torch.randn_like,
              (3, 3), (2, 2), (1, 1))


def test_a_choice_of_kernels(monkeypatch):
    """Blocks of pixels in channels-last, where they are few; either gives the same."""
    ran, launch = [], pooling.launch
    monkeypatch.setattr(pooling, "launch", lambda kernel, *args, **kw: (
        ran.append(kernel.fn.__name__.removeprefix("max_pool2d_")), launch(kernel, *args, **kw)))
    x = LAYOUTS["channels_last"](reals(1, 2, 9, 9))
    for window, chosen in ((((3, 3), (2, 2), (1, 1)), "backward_blocks_kernel"),
                           (((3, 3), (1, 1), (1, 1)), "backward_blocks_kernel"),
                           (((2, 2), (4, 4)), "backward_kernel"),
                           (((8, 9), (1, 1)), "backward_kernel")):
        check(x, torch.randn_like, *window)
        check(x.contiguous(), torch.randn_like, *window)
        assert ran == ["kernel", chosen, chosen, "kernel", "backward_kernel", "backward_kernel"]
        ran.clear()
