"""int8_conv2d and int8_linear against loops over single elements, and where int8 could go wrong."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bitkernels import reference

ops = torch.ops.bitkernels


def quantized(x: float, steps: float) -> int:
    """By Python's round, which is half to even, of a product rounded to float32."""
    v = float(torch.tensor(x, dtype=torch.float32) * torch.tensor(steps, dtype=torch.float32))
    return 0 if math.isnan(v) else round(max(-127.0, min(127.0, v)))


def by_hand(x, weight, scale, bias, steps, stride, pad, dilation, groups):
    top, bottom, left, right = pad
    n, _, height, width = x.shape
    cout, per_group, kh, kw = weight.shape
    oh = (height + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (width + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = torch.zeros(n, cout, oh, ow)
    for i, o, r, c in itertools.product(range(n), range(cout), range(oh), range(ow)):
        total, first = 0, o // (cout // groups) * per_group
        for k, u, v in itertools.product(range(per_group), range(kh), range(kw)):
            at = r * stride[0] - top + u * dilation[0], c * stride[1] - left + v * dilation[1]
            if 0 <= at[0] < height and 0 <= at[1] < width:
                total += quantized(float(x[i, first + k, at[0], at[1]]), steps) * int(
                    weight[o, k, u, v])
        value = torch.tensor(total, dtype=torch.int32).float() * scale[o]
        y[i, o, r, c] = value if bias is None else value + bias[o]
    return y


@pytest.mark.parametrize("shape, cout, kernel, stride, pad, dilation, groups", [
    ((1, 5, 6, 5), 7, (3, 2), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    ((2, 6, 5, 7), 4, (2, 3), (2, 1), (0, 2, 3, 1), (1, 2), 2),
    ((1, 17, 4, 4), 18, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    ((1, 3, 3, 3), 2, (1, 1), (1, 1), (2, 0, 0, 1), (1, 1), 1)])
@pytest.mark.parametrize("steps", [1.0, 37.3])
def test_convolutions(shape, cout, kernel, stride, pad, dilation, groups, steps):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 16).round() / 2  # halves, for steps of 1
    x.view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    weight = torch.randint(-128, 128, (cout, shape[1] // groups, *kernel)).to(torch.int8)
    scale, bias = torch.randn(cout), torch.randn(cout)
    for b in (None, bias):
        wanted = by_hand(x, weight, scale, b, steps, stride, pad, dilation, groups)
        got = ops.int8_conv2d(x, weight, scale, b, steps, stride, pad, dilation, groups)
        assert torch.equal(got, wanted)
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_halves_go_to_even_and_what_is_out_of_range_to_its_end():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 3e38, -200.0, math.nan, math.inf,
                      -math.inf])
    got = ops.int8_linear(x[:, None], torch.ones(1, 1, dtype=torch.int8), torch.ones(1), None, 1.0)
    assert got[:, 0].tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -127, 0, 127, -127]


def test_the_longest_sums():
    """Beyond 2^31 on the way, where 128 is added to activations; rounded once in the end."""
    most = 132104
    for value in (-128, 127):
        weight = torch.full((3, most), value, dtype=torch.int8)
        got = ops.int8_linear(torch.ones(most), weight, torch.ones(3), None, 127.0)
        assert torch.equal(got, torch.tensor(127 * value * most, dtype=torch.int32).float().expand(
            3))


def test_scale_and_bias_are_two_roundings():
    weight = torch.ones(1, 3, dtype=torch.int8)
    scale, bias = torch.tensor([1 + 2.0**-23]), torch.tensor([-3.0])
    got = ops.int8_linear(torch.ones(1, 3), weight, scale, bias, 1.0)
    fused = 3 * (1 + 2.0**-23) - 3
    assert got.item() == float(scale * 3) - 3 and got.item() != fused


def test_many_channels_and_tiles():
    torch.manual_seed(1)
    x = torch.randn(2, 70, 9, 11)
    weight = torch.randint(-127, 128, (150, 70, 3, 3)).to(torch.int8)
    scale = torch.rand(150)
    a = (x * 30.0).clamp(-127, 127).round().double()
    dot = torch.nn.functional.conv2d(a, weight.double(), padding=1)
    got = ops.int8_conv2d(x, weight, scale, None, 30.0, padding=1)
    assert torch.equal(got, dot.float() * scale.view(-1, 1, 1))


def test_compiled_and_exported():
    weight = torch.randint(-127, 128, (8, 4, 3, 3)).to(torch.int8)

    class Net(torch.nn.Module):
        def forward(self, x):
            return ops.int8_conv2d(x, weight, torch.ones(8), None, 20.0, padding=1).relu()

    x = torch.randn(2, 4, 5, 5)
    wanted = Net()(x)
    assert torch.equal(torch.compile(Net(), fullgraph=True, backend="eager")(x), wanted)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Net(), (x,), dynamic_shapes={"x": {0: batch}})
    assert torch.equal(program.module()(x[:1]), wanted[:1])


def test_multiply_adds_are_counted():
    from bitkernels.counting.operators import macs, of_signs

    conv, linear = ops.int8_conv2d.default, ops.int8_linear.default
    args = (torch.randn(2, 6, 5, 4), torch.zeros(8, 3, 3, 2, dtype=torch.int8), torch.ones(8), None,
            1.0, (1,), (0,), (1,), 2)
    assert macs(conv, args, {}, conv(*args)) == 2 * 3 * 3 * 8 * 3 * 3 * 2
    args = torch.randn(2, 3, 6), torch.zeros(8, 6, dtype=torch.int8), torch.ones(8), None, 1.0
    assert macs(linear, args, {}, linear(*args)) == 2 * 3 * 8 * 6
    assert not of_signs(conv) and not of_signs(linear)


def test_a_sum_of_one_product_is_no_negative_zero(device):
    """0 * -5 is 0 in integers, times a scale 0 with the scale's sign."""
    x, scale = torch.zeros(1, 1, 1, 2, device=device), torch.tensor([0.5, -0.5], device=device)
    weight = torch.full((2, 1, 1, 1), -5, dtype=torch.int8, device=device)
    for y in (ops.int8_conv2d(x, weight, scale, None, 127.0),
              reference.int8_conv2d(x, weight, scale, None, 127.0, (1,), (0,), (1,), 1)):
        assert y.eq(0).all() and y.signbit()[0].flatten(1).any(1).tolist() == [False, True]
    for y in (ops.int8_linear(x[..., :1], weight.view(2, 1), scale, None, 127.0),
              reference.int8_linear(x[..., :1], weight.view(2, 1), scale, None, 127.0)):
        assert y.eq(0).all() and y.signbit().flatten().tolist() == [False, True]
