"""Triton's 1-bit kernel in the interpreter: wide memory, all its tiles, and which of them runs."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_interpret.py runs this file", allow_module_level=True)

from bitkernels import reference
from bitkernels.backends.triton import configs, gemm, plan, tuning
from bitkernels_tests.backends.triton.test_interpret import (  # noqa: F401
    FLOATS,
    as_interpreted,
    emulated_ptx,
    kernel,
    same,
)
from bitkernels_tests.cases import LAYOUTS, ConvCase, reals
from bitkernels_tests.triton_interpreter import language_patched_once  # noqa: F401


@pytest.mark.parametrize("dtype,columns", [
    *zip(FLOATS, (72, 72, 64), strict=True),
    *(pytest.param(*case, marks=pytest.mark.every)
      for case in zip(FLOATS, (64, 64, 72), strict=True))])
def test_b1_reads_and_writes_wide(dtype, columns, monkeypatch):
    """Channels-last tensors of whole eighths of channels; also those that must not be read so:
    views at odd addresses, planes, a zero that is expanded."""
    case = ConvCase(batch=1, channels=64, out_channels=columns, size=(3, 4))
    args = *case.words(), case.channels, *case.args
    wide, of = [], gemm.wide
    monkeypatch.setattr(gemm, "wide", lambda t: wide.append(of(t)) or wide[-1])
    vectors = {name: reals(columns + 1)[1:] for name in (
        "bias", "shift_in", "slope", "shift_out", "sign_shift")}
    shape = case.output_shape
    odd = reals(1 + torch.Size(shape).numel(), dtype=torch.float16)[1:]
    residuals = [(LAYOUTS["channels_last"](reals(*shape, dtype=kind)), True)
                 for kind in FLOATS]
    residuals += [(odd.view(shape[0], *shape[2:], columns).permute(0, 3, 1, 2), False),
                  (reals(*shape, dtype=torch.bfloat16), False),
                  (torch.zeros(1, dtype=torch.float16).expand(shape), False)]
    for residual, expected_wide in residuals:
        kw = dict(vectors, scale=reals(columns) / 64, residual=residual, packed=True)
        got = kernel("packed_conv2d")(*args, **kw, real=True, dtype=dtype, inner="b1")
        out, signs = reference.packed_conv2d(*args, **kw, real=True, dtype=torch.float32)
        same(got, (as_interpreted(out, dtype), signs))
        assert wide == [True, expected_wide]
        wide.clear()


@pytest.mark.parametrize("case", (
    ConvCase(batch=1, channels=256, out_channels=64, size=(4, 5)),
    ConvCase(batch=2, channels=256, out_channels=9, size=(7, 5), kernel=(2, 3), stride=(2, 1),
             padding=(1, 2), dilation=(1, 2), pad_value=1),
    ConvCase(batch=1, channels=512, groups=2, out_channels=128, size=(3, 3))), ids=str)
@pytest.mark.parametrize("tile", (configs.b1(4, 2, lines=1), configs.b1(8, 1)), ids=str)
def test_tiles_that_do_not_run_unasked(tile, case):
    words, weight_words = case.words()
    args = words, weight_words, case.channels, *case.args
    kw = dict(pad_value=case.pad_value, dtype=torch.int32, real=True, packed=True)
    with tuning.fixed(tile):
        got = kernel("packed_conv2d")(*args, **kw, inner="b1")
    same(got, reference.packed_conv2d(*args, **kw))


@pytest.mark.parametrize("columns", (64, 72))
@pytest.mark.parametrize("dtype", (torch.int16, torch.int32))
def test_b1_writes_wide_integers(dtype, columns):
    case = ConvCase(batch=1, channels=64, out_channels=columns, size=(3, 4))
    args = *case.words(), case.channels, *case.args
    got, _ = kernel("packed_conv2d")(*args, real=True, dtype=dtype, inner="b1")
    same(got, reference.packed_conv2d(*args, real=True, dtype=torch.int32)[0].to(dtype))


def test_choice_of_tile(monkeypatch):
    """What was measured: on sm_90 the smallest, or a call's own. Else the largest that fills it."""
    layer = configs.Size(256 * 14 * 14, 256, 9, 8)
    flat = configs.Size(8192, 8192, 1, 256, flat=True)
    assert configs.fixed_tile("b1", "sm80", layer) == configs.B1[0]
    assert configs.fixed_tile("b1", "sm80", layer._replace(rows=8 * 14 * 14)) == configs.B1[2]
    assert configs.fixed_tile("b1", "sm80", flat) == configs.B1_FLAT[0]
    assert configs.fixed_tile("b1", "sm90", layer) == configs.B1[2]
    assert configs.fixed_tile("b1", "sm90", flat) == configs.B1_FLAT[2]
    monkeypatch.setitem(configs.MEASURED, ("sm90", 256, 9, 8, "real"), configs.b1(4, 2))
    assert configs.fixed_tile("b1", "sm90", layer) == configs.B1[1]
    assert configs.fixed_tile("b1", "sm80", layer) == configs.B1[0]
    for call, tile in configs.MEASURED.items():
        assert tile in (*configs.B1, *configs.B1_FLAT), call


def test_reciprocals():
    """Every divisor of a size class, at the ends of its multiples and of the range."""
    for d in (*range(1, 300), 2**15 - 1, 2**15 + 1, 2**16, 2**30 + 1, 2**31 - 1):
        magic, shift = gemm.reciprocal(d)
        assert -2**31 <= magic < 2**31 and 0 <= shift < 32
        last = (2**31 - 1) // d * d
        for n in (0, 1, d - 1, d, d + 1, last - 1, last, 2**31 - 1):
            if 0 <= n < 2**31:
                assert ((n * (magic % 2**32) >> 32) + n) >> shift == n // d


def test_choice_of_inner_product():
    big, kw = configs.Size(10**5, 256, 9, 8), dict(whole=True, addressable=True)
    assert plan.choose("sm90", big, **kw).inners == ("b1", "int8", "popc")
    for family in ("sm100", "hip"):
        assert plan.choose(family, big, **kw).inners == ("int8", "popc")
    assert plan.choose("sm90", big, False, True).inners == ("popc",)
    assert plan.choose("sm90", big, True, False).inners == ("popc",)
    assert plan.choose("sm90", big._replace(taps=49), **kw).inners == ("int8", "popc")
    assert plan.choose("sm90", big._replace(rows=4), **kw).inners == ("popc",)
