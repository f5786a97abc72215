"""packed_conv2d: its integer dot against numpy, its epilogue and outputs against the reference."""

from __future__ import annotations

import pytest
import torch

from bitkernels import reference
from bitkernels_tests import oracles
from bitkernels_tests.cases import (
    CONV_CASES,
    DTYPES,
    EPILOGUES,
    FEW_CONV_CASES,
    LAYOUTS,
    ConvCase,
    dyadic,
    epilogue_parts,
    reals,
    words_of,
)
from bitkernels_tests.properties import assume, given, settings, st

ops = torch.ops.bitkernels
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
CASE = ConvCase(channels=45, out_channels=19, padding=(1, 0, 2, 1), stride=(2, 1))


def dot_of(words, weight_words, case):
    return ops.packed_conv2d(words, weight_words, case.channels, *case.args,
                             pad_value=case.pad_value, dtype=torch.int32)


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_integer_dot(case, device):
    words, weight_words = case.words(device)
    expected = oracles.conv2d_dot(words, weight_words, case).to(device)
    dot = dot_of(words, weight_words, case)
    assert dot.shape == case.output_shape and dot.dtype == torch.int32
    assert torch.equal(dot, expected)
    assert torch.equal(expected, reference.dot_conv2d(
        words, weight_words, case.channels, *case.args, case.pad_value))
    assert dot_of(words.to("meta"), weight_words.to("meta"), case).shape == dot.shape


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_tiled_weight(case, device):
    words, weight_words = case.words(device)
    tiles = ops.tile_weight(weight_words, case.groups)
    assert torch.equal(tiles, reference.tile_weight(weight_words, case.groups))
    dot = ops.packed_conv2d(words, tiles, case.channels, *case.args, pad_value=case.pad_value,
                            out_channels=case.out_channels, dtype=torch.int32)
    assert torch.equal(dot, dot_of(words, weight_words, case))


def test_tile_layout(device):
    """Tile t holds channels 16 t .. 16 t + 15 of its group innermost, missing ones 0."""
    weight_words = words_of(2 * 18, 2, 3, 70, device=device)
    tiles = ops.tile_weight(weight_words, 2)
    assert tiles.shape == (4, 2, 3, 3, 16) and tiles.is_contiguous()
    for group in range(2):
        for channel in range(18):
            lane = tiles[2 * group + channel // 16, ..., channel % 16]
            assert torch.equal(lane, weight_words[18 * group + channel])
    assert not tiles[1::2, ..., 2:].any()


def test_tiles_of_whole_channels_need_no_out_channels(device):
    words, weight_words = ConvCase(channels=40, out_channels=32).words(device)
    dot = ops.packed_conv2d(words, weight_words, 40, dtype=torch.int32)
    tiled = ops.packed_conv2d(words, ops.tile_weight(weight_words), 40, dtype=torch.int32)
    assert torch.equal(dot, tiled)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_generated_shapes(data):
    def pairs(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    case = ConvCase(
        groups=groups, channels=groups * data.draw(st.integers(1, 80)),
        out_channels=groups * data.draw(st.integers(1, 20)), size=pairs(1, 8), kernel=pairs(1, 4),
        stride=pairs(1, 3), padding=(*pairs(0, 3), *pairs(0, 3)), dilation=pairs(1, 2),
        pad_value=data.draw(st.sampled_from([-1, 0, 1])), batch=data.draw(st.integers(0, 2)))
    assume(min(case.output_shape[2:]) > 0)
    words, weight_words = case.words()
    dot = dot_of(words, weight_words, case)
    assert torch.equal(dot, oracles.conv2d_dot(words, weight_words, case))


@pytest.mark.parametrize("case", FEW_CONV_CASES, ids=str)
@pytest.mark.parametrize("parts", EPILOGUES)
def test_epilogue(case, parts, device):
    words, weight_words = case.words(device)
    values = epilogue_parts(EPILOGUES[parts], case.output_shape, 1, device)
    y = ops.packed_conv2d(words, weight_words, case.channels, *case.args,
                          pad_value=case.pad_value, **values)
    dot = oracles.conv2d_dot(words, weight_words, case).to(device)
    assert y.dtype == torch.float32
    assert torch.equal(y, reference.epilogue(dot, 1, **values))


def test_epilogue_order(device):
    """clamp -> scale, bias -> residual -> shift, slope, shift; written out, on exact numbers."""
    words, weight_words = CASE.words(device)
    scale, bias, shift_in, slope, shift_out = (dyadic(19, device=device) for _ in range(5))
    residual = dyadic(*CASE.output_shape, device=device)
    y = ops.packed_conv2d(words, weight_words, 45, *CASE.args, clamp_min=-3.0, clamp_max=5.0,
                          scale=scale, bias=bias, residual=residual, shift_in=shift_in,
                          slope=slope, shift_out=shift_out)
    column = (-1, 1, 1)
    z = oracles.conv2d_dot(words, weight_words, CASE).to(device).double().clamp(-3, 5)
    z = z * scale.view(column) + bias.view(column) + residual + shift_in.view(column)
    z = z.clamp(min=0) + slope.view(column) * z.clamp(max=0) + shift_out.view(column)
    assert torch.equal(y.double(), z)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", DTYPES)
@pytest.mark.parametrize("parts", ["none", "all"])
def test_output_is_cast_last(dtype, parameters, parts, device):
    words, weight_words = CASE.words(device)
    values = epilogue_parts(EPILOGUES[parts], CASE.output_shape, 1, device, dtype=parameters)
    y = ops.packed_conv2d(words, weight_words, 45, *CASE.args, dtype=dtype, **values)
    dot = oracles.conv2d_dot(words, weight_words, CASE).to(device)
    assert torch.equal(y, reference.epilogue(dot, 1, **values).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_residual_layouts(dtype, layout, channels_last, device):
    words, weight_words = CASE.words(device)
    values = epilogue_parts(("scale", "residual"), CASE.output_shape, 1, device,
                            residual_dtype=dtype)
    values["residual"] = LAYOUTS[layout](values["residual"])
    y, signs = ops.packed_conv2d.both(words, weight_words, 45, *CASE.args, **values,
                                      channels_last=channels_last)
    dot = oracles.conv2d_dot(words, weight_words, CASE).to(device)
    expected = reference.epilogue(dot, 1, **values)
    assert torch.equal(y, expected)
    assert torch.equal(signs, oracles.pack(oracles.sign_bits(expected, 1)).to(device))


@pytest.mark.parametrize("case", FEW_CONV_CASES, ids=str)
@pytest.mark.parametrize("parts", ["none", "relu", "affine_residual", "all"])
@pytest.mark.parametrize("shifted", [False, True])
def test_real_packed_and_both_agree(case, parts, shifted, device):
    words, weight_words = case.words(device)
    values = epilogue_parts(EPILOGUES[parts], case.output_shape, 1, device)
    shift = dyadic(case.out_channels, device=device) if shifted else None
    args = (words, weight_words, case.channels, *case.args)
    values["pad_value"] = case.pad_value
    y = ops.packed_conv2d(*args, **values)
    packed = ops.packed_conv2d.packed(*args, **values, sign_shift=shift)
    both = ops.packed_conv2d.both(*args, **values, sign_shift=shift)
    assert torch.equal(both[0], y) and torch.equal(both[1], packed)
    moved = y if shift is None else y + shift.view(-1, 1, 1)
    assert torch.equal(packed, oracles.pack(oracles.sign_bits(moved, 1)).to(device))


def test_signs_are_of_the_value_before_its_cast(device):
    """1 + 2^-10 - (1 + 2^-11) > 0 in float32, and < 0 once the value is bfloat16."""
    words = words_of(1, 1, 1, 1, device=device)
    weight_words = words.clone()
    bias = torch.tensor([2.0**-10], device=device)
    shift = torch.tensor([-1 - 2.0**-11], device=device)
    y, signs = ops.packed_conv2d.both(words, weight_words, 1, bias=bias, sign_shift=shift,
                                      dtype=torch.bfloat16)
    assert y.item() == 1.0 and signs.item() == 1


def test_special_values_of_the_epilogue(device):
    words, weight_words = ConvCase(channels=33, out_channels=6).words(device)
    nan, inf = float("nan"), float("inf")
    values = dict(scale=torch.tensor([nan, inf, 0.0, -0.0, 1e38, 1.0], device=device),
                  bias=torch.tensor([0.0, 0.0, -0.0, 1.0, -inf, nan], device=device),
                  slope=torch.tensor([1.0, 0.0, -1.0, 0.0, -inf, 2.0], device=device))
    y, signs = ops.packed_conv2d.both(words, weight_words, 33, (1,), (1,), **values)
    dot = oracles.conv2d_dot(words, weight_words, ConvCase(channels=33, out_channels=6))
    expected = reference.epilogue(dot.to(device), 1, **values)
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(signs, oracles.pack(oracles.sign_bits(expected, 1)).to(device))


@pytest.mark.parametrize("case", FEW_CONV_CASES, ids=str)
def test_threshold(case, device):
    """Bit = lo <= dot <= hi per channel, with always, never and one-sided intervals."""
    words, weight_words = case.words(device)
    low = torch.randint(-8, 8, (case.out_channels,), dtype=torch.int64)
    high = low + torch.randint(-3, 12, (case.out_channels,))
    low[0::7], high[1::7] = INT_MIN, INT_MAX
    low[3::7], high[3::7] = INT_MAX, INT_MIN
    low[4::7], high[4::7] = INT_MIN, INT_MAX
    threshold = torch.stack([low, high]).int().to(device)
    packed = ops.packed_conv2d.packed(words, weight_words, case.channels, *case.args,
                                      pad_value=case.pad_value, threshold=threshold)
    dot = oracles.conv2d_dot(words, weight_words, case).long()
    bits = (dot >= low.view(-1, 1, 1)) & (dot <= high.view(-1, 1, 1))
    assert torch.equal(packed, oracles.pack(bits.movedim(1, -1).numpy()).to(device))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_memory_format(channels_last, dtype, device):
    words, weight_words = CASE.words(device)
    kw = dict(dtype=dtype, channels_last=channels_last)
    args = (words, weight_words, 45, *CASE.args)
    y = ops.packed_conv2d(*args, **kw)
    both, packed = ops.packed_conv2d.both(*args, **kw)
    n, c, h, w = y.shape
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    assert y.stride() == strides == both.stride() and torch.equal(y, both)
    assert packed.is_contiguous() and packed.shape == (n, h, w, 1)
    assert torch.equal(y, ops.packed_conv2d(*args, dtype=dtype))


def test_strided_operands(device):
    words = words_of(4, 9, 8, 70, device=device)[::2, 1:, ::2]
    weight_words = words_of(3, 3, 18, 70, device=device).movedim(2, 0)
    scale = reals(36, device=device)[::2]
    y = ops.packed_conv2d(words, weight_words, 70, scale=scale)
    assert torch.equal(y, ops.packed_conv2d(words.contiguous(), weight_words.contiguous(), 70,
                                            scale=scale.contiguous()))
    case = ConvCase(channels=70, out_channels=18, size=(8, 4), padding=(0,))
    dot = oracles.conv2d_dot(words, weight_words, case).to(device)
    assert torch.equal(y, dot * scale.view(-1, 1, 1))


def test_operands_are_not_written(device):
    words, weight_words = CASE.words(device)
    values = epilogue_parts(EPILOGUES["all"], CASE.output_shape, 1, device)
    kept = [t.clone() for t in (words, weight_words, values["residual"])]
    ops.packed_conv2d.both(words, weight_words, 45, *CASE.args, **values)
    after = (words, weight_words, values["residual"])
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))


def test_one_channel_with_unequal_strides(device):
    x, w = torch.randn(2, 1, 9, 4, device=device), torch.randn(8, 1, 3, 3, device=device)
    words, filters = ops.sign_pack(x, None, 1), ops.sign_pack(w, None, 1)
    dot = ops.packed_conv2d(words, filters, 1, (1, 2), dtype=torch.int32)
    expected = torch.nn.functional.conv2d(reference.sign(x.double()), reference.sign(w.double()),
                                          stride=(1, 2))
    assert torch.equal(dot, expected.int())
    assert torch.equal(reference.packed_conv2d(words, filters, 1, (1, 2), dtype=torch.int32)[0],
                       dot)


@pytest.mark.parametrize("arguments, message", [
    (dict(padding=[2**61, 0, 0, 0]), "padding must be below 2"),
    (dict(stride=[2**61, 1]), "stride must be below 2"),
    (dict(dilation=[2**62, 1]), "dilation must be below 2"),
    (dict(clamp_min=float("nan")), "clamp_min must be a number, got nan"),
])
def test_absurd_numbers(device, arguments, message):
    words = torch.zeros(1, 4, 4, 4, dtype=torch.int32, device=device)
    filters = torch.zeros(8, 1, 1, 4, dtype=torch.int32, device=device)
    for place in (device, "meta"):
        with pytest.raises(RuntimeError, match=f"packed_conv2d: {message}"):
            ops.packed_conv2d(words.to(place), filters.to(place), 128, **arguments)
