"""binary_conv2d: forward exactly F.conv2d of signs, backward against explicit autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bitkernels import reference
from bitkernels_tests import oracles
from bitkernels_tests.cases import (
    CONV_CASES,
    DTYPES,
    FEW_CONV_CASES,
    FORMATS,
    LAYOUTS,
    ConvCase,
    dyadic,
    reals,
    signed,
)

ops = torch.ops.bitkernels
CASE = ConvCase(channels=37, out_channels=10, size=(6, 5))
ESTIMATORS = (("ste_sign", 1.0), ("ste_sign", 1.25), ("ste_sign", None), ("approx_sign", 1.0),
              ("swish_sign", None), ("identity", None), ("none", None))
NAMES = ("input", "weight", "bias", "scale")


def grads_of(op, case, tensors, grad, **kw):
    """Output and gradients of (input, weight, bias, scale) under the operator."""
    leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format)
              .requires_grad_() for t in tensors]
    x, w, b, s = leaves
    y = op(x, w, b, *case.args, pad_value=case.pad_value, scale=s, **kw)
    y.backward(grad.to(y))
    return y, [None if t is None else t.grad for t in leaves]


def emulated(case, tensors, grad, input_estimator="ste_sign", input_clip=1.0,
             weight_estimator="ste_sign", weight_clip=1.0, beta=5.0, scale_weight_grad=True):
    """The same in float64 by torch's own convolution."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    x, w, b, s = leaves
    weight = oracles.binary_weight(w, s, weight_estimator, weight_clip, beta, scale_weight_grad)
    y = oracles.padded_conv2d(oracles.sign(x, input_estimator, input_clip, beta), weight, b, case)
    y.backward(grad.double())
    return y, [None if t is None else t.grad for t in leaves]


def assert_grads(ours, expected, rtol=1e-5):
    """Equal up to float rounding; a gradient that is None is one of zeros."""
    for name, a, b in zip(NAMES, ours, expected, strict=True):
        if a is None:
            assert b is None or not b.any(), f"no gradient of {name}"
        else:
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * max(
                1.0, b.abs().max().item() if b.numel() else 0.0), msg=lambda m, n=name: f"{n}: {m}")


def tensors_of(case, device, dtype=torch.float32, scaled=True):
    x, w = case.reals(dtype, device)
    bias = dyadic(case.out_channels, dtype=dtype, device=device)
    scale = reals(case.out_channels, device=device).abs() + 0.25 if scaled else None
    return x, w, bias, scale


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_forward_is_conv2d_of_signs(case, device):
    x, w = case.reals(device=device)
    bias = dyadic(case.out_channels, device=device)
    y = ops.binary_conv2d(x, w, bias, *case.args, pad_value=case.pad_value)
    expected = oracles.padded_conv2d(signed(x).double(), signed(w).double(), bias.double(), case)
    assert y.dtype == torch.float32 and y.shape == case.output_shape
    assert torch.equal(y.double(), expected)
    trained = ops.binary_conv2d(x.requires_grad_(), w, bias, *case.args, pad_value=case.pad_value)
    assert trained.requires_grad and torch.equal(trained.detach(), y)


def test_special_values_are_signs(device):
    x = reals(2, 37, 6, 5, device=device)
    x[0, :4, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e-45])
    w = reals(10, 37, 3, 3, device=device)
    w[0, :4, 0, 0] = torch.tensor([float("nan"), -0.0, -float("inf"), -1e-45])
    assert torch.equal(ops.binary_conv2d(x, w), F.conv2d(signed(x), signed(w)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [None, torch.float16, torch.bfloat16, torch.float32])
def test_scale_and_bias_run_in_float32(dtype, out, device):
    x, w, _, scale = tensors_of(CASE, device, dtype)
    bias = reals(10, dtype=dtype, device=device)
    y = ops.binary_conv2d(x, w, bias, *CASE.args, scale=scale, dtype=out)
    dot = F.conv2d(signed(x).double(), signed(w).double(), None, *CASE.args).int()
    expected = reference.epilogue(dot, 1, scale=scale, bias=bias)
    assert torch.equal(y, expected.to(out or dtype))


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (4, 3), (2, 5)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (3,)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_string_padding(kernel, dilation, padding, device):
    x, w = reals(2, 20, 10, 13, device=device), reals(6, 20, *kernel, device=device)
    y = ops.binary_conv2d(x, w, None, (1,), padding, dilation)
    assert torch.equal(y, F.conv2d(signed(x), signed(w), None, 1, padding, dilation))
    if padding == "same":
        assert y.shape[2:] == x.shape[2:]


def test_same_padding_of_a_value_and_its_gradient(device):
    """An even kernel pads one more at the bottom and right; the padding has no gradient."""
    case = ConvCase(channels=20, out_channels=6, kernel=(2, 4), padding=(0, 1, 1, 2), pad_value=-1)
    tensors = tensors_of(case, device)
    grad = reals(*case.output_shape, device=device)

    def same(x, w, b, stride, _, dilation, groups, **kw):
        return ops.binary_conv2d(x, w, b, stride, "same", dilation, groups, **kw)

    y, ours = grads_of(same, case, tensors, grad)
    expected_y, expected = emulated(case, tensors, grad)
    torch.testing.assert_close(y.double(), expected_y)
    assert_grads(ours, expected)


def test_unbatched(device):
    x, w, bias, scale = tensors_of(CASE, device)
    y = ops.binary_conv2d(x[0], w, bias, *CASE.args, scale=scale)
    assert y.dim() == 3
    assert torch.equal(y, ops.binary_conv2d(x[:1], w, bias, *CASE.args, scale=scale)[0])
    one, many = x[0].clone().requires_grad_(), x[:1].clone().requires_grad_()
    grad = reals(*y.shape, device=device)
    ops.binary_conv2d(one, w, bias, *CASE.args).backward(grad)
    ops.binary_conv2d(many, w, bias, *CASE.args).backward(grad[None])
    assert one.grad.any() and torch.equal(one.grad, many.grad[0])


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_gradients_of_every_geometry(case, device):
    tensors = tensors_of(case, device)
    grad = reals(*case.output_shape, device=device)
    y, ours = grads_of(ops.binary_conv2d, case, tensors, grad)
    expected_y, expected = emulated(case, tensors, grad)
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-6, atol=1e-5)
    assert_grads(ours, expected)


@pytest.mark.parametrize("input_rule", ESTIMATORS, ids=str)
@pytest.mark.parametrize("weight_rule", ESTIMATORS, ids=str)
def test_gradients_of_every_estimator(input_rule, weight_rule, device):
    case = ConvCase(channels=12, out_channels=6, groups=2, padding=(0, 1, 2, 1), pad_value=1)
    tensors = tensors_of(case, device)
    tensors[0][0, 0, 0, :3] = torch.tensor([1.25, -1.25, 1.5], device=device)
    tensors[1][0, 0, 0, :3] = torch.tensor([1.25, -1.25, 1.5], device=device)
    conf = dict(input_estimator=input_rule[0], input_clip=input_rule[1],
                weight_estimator=weight_rule[0], weight_clip=weight_rule[1], beta=3.0)
    grad = reals(*case.output_shape, device=device)
    _, ours = grads_of(ops.binary_conv2d, case, tensors, grad, **conf)
    _, expected = emulated(case, tensors, grad, **conf)
    assert_grads(ours, expected)
    for i, rule in enumerate((input_rule, weight_rule)):
        assert (ours[i] is None) == (rule[0] == "none")


@pytest.mark.parametrize("case", FEW_CONV_CASES, ids=str)
@pytest.mark.parametrize("scale_weight_grad", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_of_scale_rules(case, scale_weight_grad, scaled, device):
    tensors = tensors_of(case, device, scaled=scaled)
    grad = reals(*case.output_shape, device=device)
    kw = dict(scale_weight_grad=scale_weight_grad)
    _, ours = grads_of(ops.binary_conv2d, case, tensors, grad, **kw)
    assert_grads(ours, emulated(case, tensors, grad, **kw)[1])
    assert (ours[3] is not None) == scaled


@pytest.mark.parametrize("wanted", [(i,) for i in range(4)] + [(0, 3), (1, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("weight_estimator", ["ste_sign", "none"])
def test_gradients_of_some_inputs(wanted, weight_estimator, device):
    tensors = tensors_of(CASE, device)
    grad = reals(*CASE.output_shape, device=device)
    expected = emulated(CASE, tensors, grad, weight_estimator=weight_estimator)[1]
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    x, w, b, s = leaves
    ops.binary_conv2d(x, w, b, *CASE.args, scale=s,
                      weight_estimator=weight_estimator).backward(grad)
    for i, leaf in enumerate(leaves):
        if i not in wanted or (i == 1 and weight_estimator == "none"):
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad.double(), expected[i], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype,rtol", [(torch.float64, 1e-6), (torch.bfloat16, 2e-2),
                                        (torch.float16, 3e-3)])
@pytest.mark.parametrize("case", [CASE, FEW_CONV_CASES[2]], ids=str)
def test_gradients_of_other_dtypes(dtype, rtol, case, device):
    tensors = tensors_of(case, device, dtype)
    grad = reals(*case.output_shape, dtype=dtype, device=device)
    y, ours = grads_of(ops.binary_conv2d, case, tensors, grad)
    assert y.dtype == dtype
    assert [t.dtype for t in ours] == [dtype, dtype, dtype, torch.float32]
    assert_grads(ours, emulated(case, tensors, grad)[1], rtol)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    x, w, bias, scale = tensors_of(CASE, device)
    x = LAYOUTS[layout](x)
    y = ops.binary_conv2d(x, w, bias, *CASE.args, scale=scale)
    assert torch.equal(y, ops.binary_conv2d(x.contiguous(), w, bias, *CASE.args, scale=scale))
    assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    leaf = x.detach().requires_grad_()
    grad = reals(*CASE.output_shape, device=device)
    ops.binary_conv2d(leaf, w, bias, *CASE.args, scale=scale).backward(grad)
    expected = emulated(CASE, (x, w, bias, scale), grad)[1][0]
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("estimator", ("ste_sign", "approx_sign", "identity"))
@pytest.mark.parametrize("pad", (dict(), dict(pad_value=1), dict(padding=(1, 0, 2, 1))), ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradient_of_the_input_has_its_memory_format(format, pad, estimator, device):
    case = replace(CASE, **pad)
    x = tensors_of(case, device)[0].contiguous(memory_format=format).requires_grad_()
    for grad_format in FORMATS:
        y = ops.binary_conv2d(x, reals(*case.weight_shape, device=device), None, *case.args,
                              pad_value=case.pad_value, input_estimator=estimator)
        grad = torch.ones_like(y, memory_format=grad_format)
        assert torch.autograd.grad(y, x, grad)[0].stride() == x.stride()


def test_channels_last_weight_gives_channels_last_output(device):
    x, w, *_ = tensors_of(CASE, device)
    y = ops.binary_conv2d(x, w.to(memory_format=torch.channels_last), None, *CASE.args)
    torch_y = F.conv2d(x, w.to(memory_format=torch.channels_last), None, *CASE.args)
    assert y.stride() == torch_y.stride()
    assert torch.equal(y, ops.binary_conv2d(x, w, None, *CASE.args))


def test_autocast(device):
    """Autocast sets the output's type; a cast of the input would round -1e-9 up to 0 in fp16."""
    x, w, bias, scale = tensors_of(CASE, device)
    x = (x - 1e-9).requires_grad_()
    x.data[0, 0] = -1e-9
    w = w.requires_grad_()
    expected = ops.binary_conv2d(x, w, bias, *CASE.args, scale=scale)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype):
            y = ops.binary_conv2d(x, w, bias, *CASE.args, scale=scale)
            kept = ops.binary_conv2d(x, w, bias, *CASE.args, scale=scale, dtype=torch.float32)
            same = ops.binary_conv2d(x, w, bias, (1,), "same", scale=scale)
            double = ops.binary_conv2d(x.double(), w.double())
        assert torch.equal(y, expected.to(dtype)) and torch.equal(kept, expected)
        assert same.dtype == dtype and double.dtype == torch.float64
        grads = torch.autograd.grad(y.float().sum(), (x, w))
        assert [g.dtype for g in grads] == [torch.float32, torch.float32]


def test_double_backward_refuses(device):
    x, w, *_ = tensors_of(CASE, device)
    x.requires_grad_()
    y = ops.binary_conv2d(x, w)
    g, = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()


@pytest.mark.parametrize("estimator,clip,bits", [("ste_sign", 1.0, 2), ("ste_sign", None, 1),
                                                 ("identity", None, 1), ("approx_sign", None, 33)])
def test_backward_keeps_bits(estimator, clip, bits, device):
    """Kept of the activation: signs, a mask where needed, the input itself only for |x|."""
    x = reals(2, 64, 8, 8, device=device).requires_grad_()
    w = reals(8, 64, 3, 3, device=device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.binary_conv2d(x * 1, w, input_estimator=estimator, input_clip=clip)
    activations = [t for t in kept if t.data_ptr() != w.data_ptr()]
    total = sum(t.numel() * t.element_size() for t in activations)
    assert total * 8 == bits * x.numel()
    reals_kept = [t for t in activations if t.dtype != torch.int32]
    assert len(reals_kept) == (estimator == "approx_sign")


def test_inference_mode_and_no_grad(device):
    x, w, bias, _ = tensors_of(CASE, device)
    expected = ops.binary_conv2d(x, w, bias)
    w.requires_grad_()
    with torch.no_grad():
        y = ops.binary_conv2d(x, w, bias)
    assert not y.requires_grad and torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(ops.binary_conv2d(x, w, bias), expected)


@pytest.mark.parametrize("case", (
    ConvCase(channels=33, out_channels=5, kernel=(2, 2), stride=(3, 3), padding=(1, 1),
             size=(5, 1)),
    ConvCase(channels=4, out_channels=4, kernel=(1, 3), stride=(2, 2), padding=(0, 1), size=(4, 1)),
    ConvCase(channels=16, out_channels=16, kernel=(3, 4), stride=(3, 3), padding=(1, 1, 1, 1),
             size=(1, 2)),
    ConvCase(channels=8, out_channels=8, kernel=(3, 3), stride=(1, 1), padding=(1, 1),
             size=(1, 1))), ids=str)
def test_a_tap_that_meets_padding_alone_has_no_gradient_in_bfloat16(case, device):
    """PyTorch's convolution backward of a CPU leaves it what was in memory."""
    for _ in range(4):
        x = reals(2, case.channels, *case.size, device=device).bfloat16()
        weight = reals(case.out_channels, case.channels, *case.kernel, device=device)
        weight = weight.bfloat16().requires_grad_()
        y = ops.binary_conv2d(x, weight, None, *case.args, weight_clip=None)
        grad = torch.randint(-2, 3, y.shape, device=device).bfloat16()
        y.backward(grad)
        leaf = signed(weight.detach().double()).requires_grad_()
        oracles.padded_conv2d(signed(x.double()), leaf, None, case).backward(grad.double())
        assert torch.equal(weight.grad.double(), leaf.grad)


@pytest.mark.parametrize("pad_value", (0, 1))
@pytest.mark.parametrize("channels,size", [(2, (5, 0)), (64, (0, 4))], ids=str)
def test_an_image_without_pixels_that_is_padded(channels, size, pad_value, device):
    """Forward it is its padding; PyTorch has no backward of it."""
    x = reals(2, channels, *size, device=device).requires_grad_()
    weight = reals(64, channels, 3, 3, device=device).requires_grad_()
    y = ops.binary_conv2d(x, weight, None, (1,), (2,), pad_value=pad_value, weight_clip=None)
    grad = dyadic(*y.shape, device=device)
    y.backward(grad)
    leaf = signed(weight.detach()).requires_grad_()
    padded = F.pad(signed(x.detach()), (2, 2, 2, 2), value=float(pad_value))
    want = F.conv2d(padded, leaf)
    want.backward(grad)
    assert torch.equal(y, want) and x.grad.shape == x.shape
    torch.testing.assert_close(weight.grad, leaf.grad)
