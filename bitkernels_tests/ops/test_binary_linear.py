"""binary_linear: forward exactly F.linear of signs, backward against explicit autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bitkernels import reference
from bitkernels_tests import oracles
from bitkernels_tests.cases import DTYPES, LINEAR_CASES, LinearCase, dyadic, reals, signed

ops = torch.ops.bitkernels
CASE = LinearCase(37, 11, (2, 5))
ESTIMATORS = (("ste_sign", 1.0), ("ste_sign", 1.25), ("ste_sign", None), ("approx_sign", 1.0),
              ("swish_sign", None), ("identity", None), ("none", None))


def tensors_of(case, device, dtype=torch.float32, scaled=True):
    x, w = case.reals(dtype, device)
    scale = reals(case.out_channels, device=device).abs() + 0.25 if scaled else None
    return x, w, dyadic(case.out_channels, dtype=dtype, device=device), scale


def emulated(tensors, grad, input_estimator="ste_sign", input_clip=1.0,
             weight_estimator="ste_sign", weight_clip=1.0, beta=5.0, scale_weight_grad=True):
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    x, w, b, s = leaves
    weight = oracles.binary_weight(w, s, weight_estimator, weight_clip, beta, scale_weight_grad)
    y = F.linear(oracles.sign(x, input_estimator, input_clip, beta), weight, b)
    y.backward(grad.double())
    return y, [None if t is None else t.grad for t in leaves]


def check_gradients(tensors, grad, rtol=1e-5, **conf):
    """Compares all gradients with the emulation's; returns them."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    x, w, b, s = leaves
    y = ops.binary_linear(x, w, b, scale=s, **conf)
    y.backward(grad.to(y))
    expected_y, expected = emulated(tensors, grad, **conf)
    torch.testing.assert_close(y.double(), expected_y, rtol=max(rtol, 1e-6), atol=rtol)
    for leaf, e in zip(leaves, expected, strict=True):
        if leaf is None or leaf.grad is None:
            assert e is None or not e.any()
        else:
            assert leaf.grad.dtype == leaf.dtype
            largest = max(1.0, e.abs().max().item()) if e.numel() else 1.0
            torch.testing.assert_close(leaf.grad.double(), e, rtol=rtol, atol=rtol * largest)
    return [None if t is None else t.grad for t in leaves]


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_forward_is_linear_of_signs(case, device):
    x, w, bias, _ = tensors_of(case, device)
    y = ops.binary_linear(x, w, bias)
    assert y.dtype == torch.float32 and y.is_contiguous()
    assert torch.equal(y.double(), F.linear(signed(x).double(), signed(w).double(), bias.double()))
    trained = ops.binary_linear(x, w.requires_grad_(), bias)
    assert trained.requires_grad and torch.equal(trained.detach(), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [None, torch.float16, torch.bfloat16])
def test_scale_and_bias_run_in_float32(dtype, out, device):
    x, w, _, scale = tensors_of(CASE, device, dtype)
    bias = reals(11, dtype=dtype, device=device)
    dot = F.linear(signed(x).double(), signed(w).double()).int()
    y = ops.binary_linear(x, w, bias, scale=scale, dtype=out)
    assert torch.equal(y, reference.epilogue(dot, 2, scale=scale, bias=bias).to(out or dtype))


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_gradients_of_every_shape(case, device):
    check_gradients(tensors_of(case, device),
                    reals(*case.batch, case.out_channels, device=device))


@pytest.mark.parametrize("input_rule", ESTIMATORS, ids=str)
@pytest.mark.parametrize("weight_rule", ESTIMATORS, ids=str)
@pytest.mark.parametrize("scale_weight_grad", [True, False])
def test_gradients_of_every_rule(input_rule, weight_rule, scale_weight_grad, device):
    tensors = tensors_of(CASE, device)
    for t in tensors[:2]:
        t.view(-1)[:3] = torch.tensor([1.25, -1.25, 1.5], device=device)
    grads = check_gradients(
        tensors, reals(2, 5, 11, device=device), input_estimator=input_rule[0],
        input_clip=input_rule[1], weight_estimator=weight_rule[0], weight_clip=weight_rule[1],
        beta=3.0, scale_weight_grad=scale_weight_grad)
    for grad, rule in zip(grads, (input_rule, weight_rule), strict=False):
        assert (grad is None) == (rule[0] == "none")


@pytest.mark.parametrize("dtype,rtol", [(torch.float64, 1e-6), (torch.bfloat16, 2e-2),
                                        (torch.float16, 3e-3)])
def test_gradients_of_other_dtypes(dtype, rtol, device):
    check_gradients(tensors_of(CASE, device, dtype), reals(2, 5, 11, dtype=dtype, device=device),
                    rtol)


@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_one_input(wanted, device):
    tensors = tensors_of(CASE, device)
    grad = reals(2, 5, 11, device=device)
    expected = emulated(tensors, grad)[1]
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    x, w, b, s = leaves
    ops.binary_linear(x, w, b, scale=s).backward(grad)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i != wanted)
    torch.testing.assert_close(leaves[wanted].grad.double(), expected[wanted], rtol=1e-5,
                               atol=1e-4)


def test_strided_input(device):
    x = reals(37, 5, 6, device=device).permute(2, 1, 0)[::2]
    w = reals(37, 11, device=device).T
    y = ops.binary_linear(x, w)
    assert torch.equal(y, F.linear(signed(x), signed(w)))
    check_gradients((x, w, None, None), reals(3, 5, 11, device=device))


def test_autocast(device):
    x, w, bias, scale = tensors_of(CASE, device)
    x.view(-1)[::2] = -1e-9
    expected = ops.binary_linear(x, w, bias, scale=scale)
    with torch.autocast(device.type, torch.float16):
        y = ops.binary_linear(x, w, bias, scale=scale)
        double = ops.binary_linear(x.double(), w.double())
    assert torch.equal(y, expected.half()) and double.dtype == torch.float64


def test_double_backward_refuses(device):
    x, w, *_ = tensors_of(CASE, device)
    y = ops.binary_linear(x.requires_grad_(), w)
    g, = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()


@pytest.mark.parametrize("estimator,clip,bits", [("ste_sign", 1.0, 2), ("identity", None, 1),
                                                 ("swish_sign", None, 33)])
def test_backward_keeps_bits(estimator, clip, bits, device):
    x = reals(6, 128, device=device).requires_grad_()
    w = reals(8, 128, device=device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.binary_linear(x * 1, w, input_estimator=estimator, input_clip=clip)
    total = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() != w.data_ptr())
    assert total * 8 == bits * x.numel()
