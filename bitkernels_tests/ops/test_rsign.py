"""rsign: sign(x + shift) and its estimators against explicit autograd in float64."""

from __future__ import annotations

import pytest
import torch

from bitkernels import reference
from bitkernels_tests import oracles
from bitkernels_tests.cases import DTYPES, FORMATS, LAYOUTS, reals

ops = torch.ops.bitkernels
SHAPES = ((2, 7), (0, 3), (3, 33, 5), (2, 7, 4, 5), (1, 40, 1, 1), (2, 5, 3, 4, 2))


def column(vector, x):
    return vector.view(-1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(shape, dtype, device):
    x, shift = reals(*shape, dtype=dtype, device=device), reals(shape[1], device=device)
    y = ops.rsign(x, shift)
    wide = x.double() if dtype == torch.float64 else x.float()
    negative = (wide + column(shift, x)) < 0
    assert y.dtype == dtype and torch.equal(y, torch.where(negative, -1.0, 1.0).to(dtype))
    assert torch.equal(y, reference.rsign(x, shift))


def test_edges(device):
    """x = -shift is +1 as is NaN; the shift is added before any rounding to the input's type."""
    x = torch.tensor([[0.5, float("nan"), 1.0, -1.0, -float("inf")]], device=device)
    shift = torch.tensor([-0.5, 0.0, -1 - 2**-20, 1.0, 3.0], device=device)
    for dtype in DTYPES:
        assert ops.rsign(x.to(dtype), shift).tolist() == [[1, 1, -1, 1, -1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    x, shift = LAYOUTS[layout](reals(3, 5, 4, 6, device=device)), reals(5, device=device)
    y = ops.rsign(x, shift)
    assert y.stride() == (x if layout == "channels_last" else x.contiguous()).stride()
    assert torch.equal(y, ops.rsign(x.contiguous(), shift))


@pytest.mark.parametrize("estimator,clip", [
    ("ste_sign", 1.0), ("ste_sign", 1.25), ("ste_sign", None), ("approx_sign", None),
    ("swish_sign", None), ("identity", None), ("none", None)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(estimator, clip, shape, device):
    x, shift = reals(*shape, device=device), reals(shape[1], device=device).round(decimals=1)
    x[..., -1:] = -x[..., -1:].round()
    grad = reals(*shape, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, shift)]
    ops.rsign(*leaves, estimator=estimator, clip=clip, beta=3.0).backward(grad)
    wide = (x + column(shift, x)).double().requires_grad_()
    oracles.sign(wide, estimator, clip, 3.0).backward(grad.double())
    if estimator == "none":
        assert all(t.grad is None for t in leaves) and not wide.grad.any()
        return
    torch.testing.assert_close(leaves[0].grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    reduce = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(leaves[1].grad.double(), wide.grad.sum(reduce), rtol=1e-4,
                               atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["ste_sign", "approx_sign", "swish_sign", "identity"])
def test_gradient_dtypes(dtype, estimator, device):
    """Gradients keep their tensor's dtype; the shift's is summed in its own."""
    x = reals(3, 6, 9, 9, dtype=dtype, device=device)
    shift = reals(6, device=device)
    grad = reals(3, 6, 9, 9, dtype=dtype, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, shift)]
    ops.rsign(*leaves, estimator=estimator).backward(grad)
    wide = (x.double() + column(shift, x)).requires_grad_()
    oracles.sign(wide, estimator).backward(grad.double())
    assert leaves[0].grad.dtype == dtype and leaves[1].grad.dtype == torch.float32
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(leaves[0].grad.double(), wide.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(leaves[1].grad.double(), wide.grad.sum((0, 2, 3)), rtol=tolerance,
                               atol=30 * tolerance)


def per_sample(x, dtype=torch.float32):
    return reals(*x.shape[:2], *[1] * (x.dim() - 2), device=x.device).round(decimals=1).to(dtype)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 70, 9), (2, 64, 5, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shifts_of_each_sample(shape, dtype, device):
    """(N, C, 1, ..., 1): the same as one call a sample with its own (C,)."""
    x = reals(*shape, dtype=dtype, device=device)
    for layout in LAYOUTS.values() if len(shape) == 4 else (lambda t: t,):
        given = layout(x)
        for shift in (per_sample(x), per_sample(x, torch.float64), per_sample(x).mT.mT * 2):
            y = ops.rsign(given, shift)
            each = [ops.rsign(given[n : n + 1], shift[n].flatten()) for n in range(len(x))]
            assert torch.equal(y, torch.cat(each or [y]))
            assert torch.equal(y, reference.rsign(given, shift))


def test_shifts_of_each_sample_that_are_strided(device):
    x, wide = reals(3, 6, 4, 5, device=device), reals(6, 3, 2, 1, device=device)
    shift = wide.transpose(0, 1)[:, :, 1:]
    assert not shift.is_contiguous()
    assert torch.equal(ops.rsign(x, shift), ops.rsign(x, shift.contiguous()))


@pytest.mark.parametrize("estimator,clip", [("ste_sign", 1.25), ("ste_sign", None),
                                            ("approx_sign", None), ("swish_sign", None),
                                            ("identity", None), ("none", None)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_each_sample(estimator, clip, shape, device):
    """The shift's gradient has the shape of the shift."""
    x = reals(*shape, device=device)
    for format in FORMATS if len(shape) == 4 else (torch.contiguous_format,):
        leaves = [t.clone(memory_format=format).requires_grad_() for t in (x, per_sample(x))]
        grad = reals(*shape, device=device)
        ops.rsign(*leaves, estimator=estimator, clip=clip, beta=3.0).backward(grad)
        wide = (leaves[0] + leaves[1]).detach().double().requires_grad_()
        oracles.sign(wide, estimator, clip, 3.0).backward(grad.double())
        if estimator == "none":
            assert all(t.grad is None for t in leaves)
            continue
        torch.testing.assert_close(leaves[0].grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
        assert leaves[0].grad.is_contiguous(memory_format=format)
        torch.testing.assert_close(leaves[1].grad.double(),
                                   wide.grad.sum_to_size(leaves[1].shape), rtol=1e-4, atol=1e-4)


def test_dynamic_thresholds_train_their_network(device):
    """Shifts computed from the input, as of input-dependent RSign: the gradient reaches both."""
    x = reals(3, 4, 5, 6, device=device).requires_grad_()
    dense = torch.nn.Linear(4, 4).to(device)
    shift = dense(x.mean((2, 3)))[:, :, None, None]
    ops.rsign(x, shift, estimator="identity").square().sum().backward()
    ops.rsign(x, shift.detach(), estimator="identity").sum().backward()
    assert dense.weight.grad.abs().sum() > 0 and x.grad.shape == x.shape


def test_large_arguments_have_finite_gradients(device):
    x = torch.tensor([[-3e4, -300.0, 300.0, 3e4]], device=device).requires_grad_()
    ops.rsign(x, torch.zeros(4, device=device), estimator="swish_sign").sum().backward()
    assert x.grad.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("estimator", ("ste_sign", "approx_sign", "identity"))
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradient_of_an_image_has_its_memory_format(format, estimator, device):
    x = torch.randn(2, 5, 3, 4, device=device).contiguous(memory_format=format).requires_grad_()
    shift = torch.randn(5, device=device)
    for grad_format in FORMATS:
        grad = torch.ones_like(x, memory_format=grad_format)
        y = ops.rsign(x, shift, estimator=estimator)
        assert torch.autograd.grad(y, x, grad)[0].stride() == x.stride()


def test_only_the_shift_trains(device):
    x, shift = reals(2, 3, 4, device=device), torch.zeros(3, device=device, requires_grad=True)
    ops.rsign(x, shift, estimator="identity").sum().backward()
    assert shift.grad.tolist() == [8.0] * 3 and x.grad is None


def test_ste_keeps_the_mask_alone(device):
    x = reals(2, 64, 8, device=device).requires_grad_()
    shift = torch.zeros(64, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.rsign(x * 1, shift, estimator="ste_sign")
    assert sum(t.numel() for t in kept if t.dtype == torch.int32) * 32 == x.numel()
    assert all(t.numel() <= 64 for t in kept)


def test_double_backward_refuses(device):
    x = reals(2, 3, 4, device=device).requires_grad_()
    y = ops.rsign(x, torch.zeros(3, device=device))
    g, = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()


@pytest.mark.parametrize("shape", ((2, 70, 0, 6), (2, 70, 5, 0), (0, 70, 5, 6), (2, 70, 1, 6)),
                         ids=str)
def test_of_a_part_of_an_image_the_result_lies_as_its_fake_does(shape, device):
    """Contiguous is also a part without elements, whose strides are those of the whole."""
    whole = reals(2, 70, 5, 6, device=device)
    zero = torch.zeros(70, device=device)
    for x in (whole, whole.to(memory_format=torch.channels_last), whole.transpose(2, 3)):
        part = x[tuple(slice(n) for n in shape)]
        fake = torch.empty_strided(part.shape, part.stride(), device="meta")
        for op, args in ((ops.rsign, (zero,)), (ops.rprelu, (zero, zero, zero))):
            assert op(part, *args).stride() == op(fake, *(t.to("meta") for t in args)).stride()
