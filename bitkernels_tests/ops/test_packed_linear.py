"""packed_linear: its integer dot against numpy, its epilogue and outputs against the reference."""

from __future__ import annotations

import pytest
import torch

from bitkernels import reference
from bitkernels_tests import oracles
from bitkernels_tests.cases import (
    DTYPES,
    EPILOGUES,
    LINEAR_CASES,
    LinearCase,
    dyadic,
    epilogue_parts,
    words_of,
)
from bitkernels_tests.properties import given, settings, st

ops = torch.ops.bitkernels
FEW = (LinearCase(33, 7), LinearCase(100, 33, (2, 3)), LinearCase(64, 16, ()),
       LinearCase(5, 40, (0,)))


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_integer_dot(case, device):
    words, weight_words = case.words(device)
    expected = oracles.linear_dot(words, weight_words, case.channels).to(device)
    tiles = ops.tile_weight(weight_words)
    assert torch.equal(tiles, reference.tile_weight(weight_words))
    for dot in (
        ops.packed_linear(words, weight_words, case.channels, dtype=torch.int32),
        ops.packed_linear(words, tiles, case.channels, out_channels=case.out_channels,
                          dtype=torch.int32),
        reference.packed_linear(words, weight_words, case.channels, dtype=torch.int32)[0],
    ):
        assert dot.shape == (*case.batch, case.out_channels) and dot.dtype == torch.int32
        assert dot.is_contiguous() and torch.equal(dot, expected)


@settings(max_examples=50, deadline=None)
@given(channels=st.integers(1, 700), out=st.integers(1, 70), batch=st.integers(0, 9))
def test_generated_shapes(channels, out, batch):
    words, weight_words = words_of(batch, channels), words_of(out, channels)
    dot = ops.packed_linear(words, weight_words, channels, dtype=torch.int32)
    assert torch.equal(dot, oracles.linear_dot(words, weight_words, channels))


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("parts", EPILOGUES)
def test_epilogue(case, parts, device):
    words, weight_words = case.words(device)
    shape = (*case.batch, case.out_channels)
    values = epilogue_parts(EPILOGUES[parts], shape, -1, device)
    dot = oracles.linear_dot(words, weight_words, case.channels).to(device)
    expected = reference.epilogue(dot, dot.dim() - 1, **values)
    args = (words, weight_words, case.channels)
    assert torch.equal(ops.packed_linear(*args, **values), expected)
    for shift in (None, dyadic(case.out_channels, device=device)):
        y, signs = ops.packed_linear.both(*args, **values, sign_shift=shift)
        packed = ops.packed_linear.packed(*args, **values, sign_shift=shift)
        moved = expected if shift is None else expected + shift
        assert torch.equal(y, expected) and torch.equal(signs, packed)
        assert torch.equal(signs, oracles.pack(oracles.sign_bits(moved, -1)).to(device))


def test_epilogue_order(device):
    words, weight_words = LinearCase(50, 18, (4,)).words(device)
    scale, bias, shift_in, slope, shift_out = (dyadic(18, device=device) for _ in range(5))
    residual = dyadic(4, 18, device=device)
    y = ops.packed_linear(words, weight_words, 50, clamp_min=-6.0, clamp_max=6.0, scale=scale,
                          bias=bias, residual=residual, shift_in=shift_in, slope=slope,
                          shift_out=shift_out)
    z = oracles.linear_dot(words, weight_words, 50).to(device).double().clamp(-6, 6)
    z = z * scale + bias + residual + shift_in
    assert torch.equal(y.double(), z.clamp(min=0) + slope * z.clamp(max=0) + shift_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", DTYPES)
def test_output_is_cast_last(dtype, parameters, device):
    words, weight_words = LinearCase(77, 19, (5,)).words(device)
    values = epilogue_parts(EPILOGUES["all"], (5, 19), -1, device, parameters, parameters)
    y = ops.packed_linear(words, weight_words, 77, dtype=dtype, **values)
    dot = oracles.linear_dot(words, weight_words, 77).to(device)
    assert torch.equal(y, reference.epilogue(dot, 1, **values).to(dtype))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_threshold(case, device):
    words, weight_words = case.words(device)
    low = torch.randint(-9, 9, (case.out_channels,))
    high = low + torch.randint(-4, 9, (case.out_channels,))
    low[0::5], high[1::5] = -(2**31), 2**31 - 1
    low[2::5], high[2::5] = 2**31 - 1, -(2**31)
    packed = ops.packed_linear.packed(words, weight_words, case.channels,
                                      threshold=torch.stack([low, high]).int().to(device))
    dot = oracles.linear_dot(words, weight_words, case.channels).long()
    assert torch.equal(packed, oracles.pack(((dot >= low) & (dot <= high)).numpy()).to(device))


def test_strided_operands(device):
    words = words_of(4, 6, 70, device=device).transpose(0, 1)[::2]
    weight_words = words_of(36, 70, device=device).T.contiguous().T[::2]
    residual = dyadic(18, 4, 3, device=device).permute(2, 1, 0)
    y = ops.packed_linear(words, weight_words, 70, residual=residual)
    dot = oracles.linear_dot(words, weight_words, 70).to(device)
    assert y.is_contiguous() and torch.equal(y, dot + residual)


def test_bounds_beyond_float32_are_infinite(device):
    words, weight_words = LinearCase(33, 7, (3,)).words(device)
    for bounds in (dict(clamp_min=-1e308, clamp_max=1e39), dict(clamp_min=1e39),
                   dict(clamp_max=-1e308), dict(clamp_min=-float("inf"))):
        y = ops.packed_linear(words, weight_words, 33, **bounds)
        want = oracles.linear_dot(words, weight_words, 33).double().clamp(
            min=bounds.get("clamp_min"), max=bounds.get("clamp_max")).float()
        assert torch.equal(y.cpu(), want)
        assert torch.equal(y, reference.packed_linear(words, weight_words, 33, **bounds)[0])
