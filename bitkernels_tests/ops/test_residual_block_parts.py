"""The parts of `binary_residual_block`: integers and elementwise passes against the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import bitkernels.nn as bnn
from bitkernels import reference
from bitkernels_tests import oracles
from bitkernels_tests.cases import CONV_CASES, DTYPES, LAYOUTS, dyadic, reals
from bitkernels_tests.ops import test_residual_block as whole

ops = torch.ops.bitkernels


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_dots_and_moments(case, device):
    words, weight_words = case.words(device=device)
    stride, padding, dilation, groups = case.args
    dot = oracles.conv2d_dot(words, weight_words, case)
    for relu in (False, True):
        got, moments = ops.packed_conv2d_moments(
            words, weight_words, case.channels, stride, padding, dilation, groups,
            pad_value=case.pad_value, relu=relu)
        assert torch.equal(got.cpu().int(), dot)
        d = (dot.relu() if relu else dot).long()
        expected = torch.stack([t.sum((0, 2, 3)) for t in (d, d * d, torch.ones_like(d))])
        assert torch.equal(moments.cpu(), expected)


@pytest.mark.parametrize("products, dtype", [
    (23170, torch.int16), (23171, torch.int16), (32767, torch.int16), (32768, torch.int32),
    (70000, torch.int32)])
@pytest.mark.parametrize("alike", [1, -1])
def test_moments_of_the_largest_dots(products, dtype, alike):
    """Every product +1, or every one -1: squares and sums of squares beyond 32 bits."""
    pixels, cout = 53, 17
    words = reference.pack_bits(torch.ones(1, 1, pixels, products, dtype=torch.bool))
    bits = torch.full((cout, 1, 1, products), alike > 0)
    tiles = ops.tile_weight(reference.pack_bits(bits))
    dot, moments = ops.packed_conv2d_moments(words, tiles, products, out_channels=cout)
    assert dot.dtype == dtype and (dot == alike * products).all()
    assert moments.tolist() == [[v] * cout for v in (
        alike * pixels * products, pixels * products**2, pixels)]


@pytest.mark.parametrize("dot_type", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 16, 37])
def test_passes_equal_the_reference(channels, dtype, dot_type, device):
    """Each element bit for bit, in every layout; sums but for their order."""
    shape = (3, channels, 5, 6)
    kw = dict(device=device)
    vectors = [reals(channels, **kw) for _ in range(6)]
    dot = torch.randint(-99, 99, shape, dtype=dot_type, **kw)
    x, g = (reals(*shape, dtype=dtype, **kw) for _ in range(2))
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    other = torch.float64 if dtype == torch.float64 else torch.bfloat16
    for relu, change, act in itertools.product(
            (False, True), (LAYOUTS["channels_last"], LAYOUTS["sliced"]), (0, 1)):
        d, x_, g_ = change(dot), change(x), change(g)
        parts = vectors[2:5] if act else [None] * 3
        assert torch.equal(
            ops.residual_block_forward(d, x_, *vectors[:2], *parts, relu),
            reference.residual_block_forward(d, x_, *vectors[:2], *parts, relu))
        arguments = g_, d, x_, *vectors[:2], *parts[:2], vectors[5], relu
        out, sums = ops.residual_block_backward(*arguments)
        expected, total = reference.residual_block_backward(*arguments)
        assert torch.equal(out, expected) and sums.shape == total.shape
        size = reference.residual_block_backward(
            g_.abs(), d, x_, *vectors[:2], *parts[:2], vectors[5], relu)[1].abs().max() + 600
        assert (sums - total).abs().max() <= limit * size
        arguments = g_, d, *vectors[:3], vectors[5], relu, other
        assert torch.equal(ops.residual_block_norm_backward(*arguments),
                           reference.residual_block_norm_backward(*arguments))


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("estimator", ["ste_sign", "approx_sign", "swish_sign", "identity"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign_backward_equals_the_reference(estimator, dtype, finite, device):
    shape, kw = (3, 37, 5, 6), dict(device=device)
    x, add = (reals(*shape, dtype=dtype, **kw) for _ in range(2))
    grads = {reals(*shape, dtype=t, **kw) for t in (
        (torch.float64,) if dtype == torch.float64 else (torch.float32, torch.bfloat16))}
    # tanh and cosh are the library's, some units in the last place apart
    near = dict(rtol=1e-2 if x.element_size() == 2 else 1e-5, atol=1e-5)
    inf = float("inf")
    for change, shift, added, g in itertools.product(
            (LAYOUTS["contiguous"], LAYOUTS["channels_last"], LAYOUTS["sliced"]),
            (None, dyadic(37, **kw)), (None, add), grads):
        g[0, :3, 0] = torch.tensor([[inf], [-inf], [float("nan")]]) if not finite else 1.0
        arguments = g, change(x), shift, added
        kw = dict(estimator=estimator, clip=0.75, beta=3.0)
        out, total = ops.sign_backward(*arguments, **kw)
        expected, sums = reference.sign_backward(*arguments, **kw)
        if estimator == "swish_sign":
            torch.testing.assert_close(out, expected, **near, equal_nan=True)
        else:
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(total, sums, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("rows, channels", [(16500, 257), (70, 20_000)])
def test_sums_over_many_rows_or_channels_are_right_for_any_threads(rows, channels, keeps_threads):
    """More rows than the tasks take at once, and rows that are longer than a task."""
    x, grad = dyadic(rows, channels), dyadic(rows, channels)
    shift, slope = dyadic(channels), dyadic(channels)
    value = (x + shift).double()
    expected = (grad.double() * (value.abs() <= 1)).sum(0), (grad * value * (value <= 0)).sum(0)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        total = ops.sign_backward(grad, x, shift, None, estimator="ste_sign")[1]
        slopes = ops.rprelu_backward(grad, x, shift, slope)[2]
        assert torch.equal(total, expected[0])
        assert torch.equal(slopes, expected[1].float())


def test_statistics_round_to_the_nearest(device):
    """As Python's floats, on which no library of vectors rounds in its own way."""
    channels, eps = 3000, 1e-5
    d = torch.randint(-99, 99, (60, channels))
    moments = torch.stack((d.sum(0), (d * d).sum(0), torch.full((channels,), 60)))
    vectors, _, _ = ops.residual_block_statistics(
        moments.to(device), None, None, None, eps, torch.float32)
    expected = []
    for total, squares, count in moments.t().tolist():
        center = total / count
        slope = 1 / math.sqrt(squares / count - center * center + eps)
        expected.append((center, slope, slope, slope, -(slope * center), count))
    assert vectors.t().tolist() == [list(map(float, row)) for row in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["plain", "reactnet", "reactnet_down", "quicknet_scaled",
                                  "padded_ones", "groups"])
def test_kept_dot_products_change_no_bit(name, dtype, device):
    """And are what is kept besides, two bytes each."""
    case, parts, options = whole.BLOCKS[name]
    results, kept = [], []
    for recompute in (True, False):
        torch.manual_seed(3)
        tensors = whole.operands(case, parts, dtype, device)
        parameters = [t for n, t in tensors.items() if n not in ("input", "residual")]

        def call(recompute=recompute, tensors=tensors):
            return whole.call(case, tensors, recompute=recompute, **options)

        kept.append(whole.saved_bytes(call, parameters))
        outputs = call()
        whole.weighted(outputs[0]).backward()
        results.append([*outputs, *(t.grad for t in tensors.values())])
    assert all(map(torch.equal, *results))
    assert kept[1].pop(torch.int16) == 2 * outputs[0].numel()
    assert kept[0] == kept[1]


@pytest.mark.parametrize("recompute, convolutions", [(True, 2), (False, 1)])
def test_kept_dot_products_are_not_computed_again(recompute, convolutions):
    block = bnn.BinaryResidualBlock(
        bnn.BinaryConv2d(32, 32, 3, padding=1, bias=False), torch.nn.BatchNorm2d(32),
        act=torch.nn.PReLU(32), recompute=recompute)
    assert ("recompute=False" in repr(block)) is not recompute
    with torch.profiler.profile() as profile:
        block(torch.randn(2, 32, 4, 4, requires_grad=True)).sum().backward()
    found = {e.key: e.count for e in profile.key_averages()}
    assert found["bitkernels::packed_conv2d_moments"] == convolutions
