"""rprelu and rprelu_backward against the composition of torch operators in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from bitkernels import reference
from bitkernels_tests import oracles
from bitkernels_tests.cases import DTYPES, LAYOUTS, dyadic, reals

ops = torch.ops.bitkernels
SHAPES = ((2, 7), (0, 3), (3, 33, 5), (2, 7, 4, 5), (1, 40, 1, 1), (2, 5, 3, 4, 2))


def tensors_of(shape, device, dtype=torch.float32, make=reals):
    x = make(*shape, dtype=dtype, device=device)
    vectors = [make(shape[1], device=device) for _ in range(3)]
    vectors[1][:2] = torch.tensor([0.0, -0.75])[: shape[1]]
    return x, *vectors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(shape, dtype, device):
    tensors = tensors_of(shape, device, dtype)
    y = ops.rprelu(*tensors)
    exact = oracles.rprelu(*(t.double() for t in tensors))
    assert y.dtype == dtype and torch.equal(y, reference.rprelu(*tensors))
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_on_exact_numbers(shape, device):
    tensors = tensors_of(shape, device, make=dyadic)
    assert torch.equal(ops.rprelu(*tensors).double(),
                       oracles.rprelu(*(t.double() for t in tensors)))


def test_one_rounding_a_step(device):
    """x + shift, times slope, plus shift: each rounded to float32, nothing fused."""
    x, a, s, b = tensors_of((64, 16, 5), device)
    a, s, b = (v.view(-1, 1) for v in (a, s, b))
    y = x + a
    y = torch.where(y > 0, y, y * s) + b
    assert torch.equal(ops.rprelu(x, *(v.flatten() for v in (a, s, b))), y)


def test_special_values(device):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, inf, -inf, -inf, -1.0, 0.0]], device=device)
    slope = torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0, 3.0], device=device)
    zero = torch.zeros(6, device=device)
    y = ops.rprelu(x, zero, slope, zero)[0].tolist()
    assert y[0] != y[0] and y[3] != y[3], "NaN stays NaN, as -inf times 0"
    assert y[1:3] + y[4:] == [inf, -inf, 2.0, 0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    x, *vectors = tensors_of((3, 5, 4, 6), device)
    x = LAYOUTS[layout](x)
    y = ops.rprelu(x, *vectors)
    assert y.stride() == (x if layout == "channels_last" else x.contiguous()).stride()
    assert torch.equal(y, ops.rprelu(x.contiguous(), *vectors))
    grad = LAYOUTS[layout](reals(3, 5, 4, 6, device=device))
    grads = ops.rprelu_backward(grad, x, *vectors[:2])
    plain = ops.rprelu_backward(grad.contiguous(), x.contiguous(), *vectors[:2])
    assert torch.equal(grads[0], plain[0])
    for a, b in zip(grads[1:], plain[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(shape, dtype, device):
    tensors = tensors_of(shape, device, dtype)
    grad = reals(*shape, dtype=dtype, device=device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    ops.rprelu(*leaves).backward(grad)
    wide = [t.double().requires_grad_() for t in tensors]
    oracles.rprelu(*wide).backward(grad.double())
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-5)
    for a, b in zip(leaves, wide, strict=True):
        assert a.grad.dtype == a.dtype
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=tolerance)


def test_gradient_at_zero_is_the_slope_s(device):
    """x + shift_in = 0 belongs to the negative side."""
    x = torch.tensor([[0.5, -0.5]], device=device, requires_grad=True)
    shift = torch.tensor([-0.5, 0.5], device=device)
    slope = torch.tensor([0.25, -3.0], device=device, requires_grad=True)
    ops.rprelu(x, shift, slope, shift).sum().backward()
    assert x.grad.tolist() == [[0.25, -3.0]] and slope.grad.tolist() == [0.0, 0.0]


def test_nan_reaches_the_slope_and_no_other_channel(device):
    x = torch.tensor([[float("nan"), -1.0]], device=device)
    slope = torch.tensor([0.5, 0.5], device=device, requires_grad=True)
    ops.rprelu(x, torch.zeros(2, device=device), slope, torch.zeros(2, device=device)).sum() \
        .backward()
    assert slope.grad[0].isnan() and slope.grad[1] == -1.0


def test_parameter_dtypes(device):
    x, *vectors = tensors_of((3, 6, 5), device)
    leaves = [v.to(d).requires_grad_() for v, d in
              zip(vectors, (torch.float16, torch.bfloat16, torch.float64), strict=True)]
    ops.rprelu(x, *leaves).sum().backward()
    assert [v.grad.dtype for v in leaves] == [torch.float16, torch.bfloat16, torch.float64]


def test_gradcheck(device):
    tensors = tensors_of((3, 4, 2), device, torch.float64)
    away = tensors[0].clamp(min=0.1) * torch.tensor([1.0, -1.0], device=device)
    x = (away - tensors[1].double().view(-1, 1)).requires_grad_()
    assert gradcheck(lambda x: ops.rprelu(x, *tensors[1:]), (x,), atol=1e-6)


@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_one_input(wanted, device):
    tensors = tensors_of((2, 4, 3), device)
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    ops.rprelu(*leaves).sum().backward()
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(4)]


def test_double_backward_refuses(device):
    x, *vectors = tensors_of((2, 3, 4), device)
    y = ops.rprelu(x.requires_grad_(), *vectors)
    g, = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()
