"""binary_conv_transpose2d is F.conv_transpose2d of signs exactly, its gradients are autograd's."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from bitkernels import reference
from bitkernels.ops._phases import phases
from bitkernels_tests import oracles
from bitkernels_tests.cases import DTYPES, FORMATS, LAYOUTS, dyadic, reals, signed, words_of
from bitkernels_tests.properties import given, settings, st

ops = torch.ops.bitkernels

# Tensors too small for threads, which would cost more than all the rest.
pytestmark = pytest.mark.usefixtures("one_thread")

# (input (N, Cin, H, W), weight (Cin, Cout / groups, kh, kw), stride, padding, output_padding,
# groups, dilation)
CASES = (
    ((2, 6, 5, 4), (6, 4, 3, 3), (1,), (0,), (0,), 1, (1,)),
    ((2, 33, 5, 4), (33, 7, 3, 3), (2,), (1,), (1,), 1, (1,)),
    ((2, 64, 4, 4), (64, 32, 2, 2), (2,), (0,), (0,), 1, (1,)),
    ((2, 70, 3, 5), (70, 5, 4, 4), (2,), (1,), (0,), 2, (1,)),
    ((1, 96, 4, 3), (96, 2, 5, 3), (3, 2), (2, 1), (1, 1), 3, (1,)),
    ((2, 20, 4, 5), (20, 3, 3, 2), (2, 3), (1, 0), (2, 0), 1, (3, 2)),  # gcd(stride, dilation) 1
    ((2, 20, 4, 5), (20, 3, 3, 2), (4, 6), (1, 2), (0, 1), 1, (2, 4)),  # 2, with empty phases
    ((2, 12, 3, 4), (12, 1, 1, 2), (3,), (0, 1), (1, 2), 4, (1,)),  # kernel smaller than stride
    ((2, 8, 4, 4), (8, 1, 3, 3), (2,), (1,), (1,), 8, (1,)),  # depthwise
    ((2, 5, 1, 1), (5, 6, 4, 4), (1,), (0,), (0,), 1, (1,)),
    ((2, 5, 7, 6), (5, 6, 3, 3), (1,), (4,), (0,), 1, (2,)),  # padding beyond the kernel's reach
    ((2, 5, 3, 6), (5, 6, 1, 3), (2,), (1, 3), (0,), 1, (1,)),  # the input is cropped
    ((2, 5, 1, 1), (5, 6, 1, 1), (1,), (1,), (3,), 1, (4,)),  # nothing but output padding
    ((1, 1, 4, 4), (1, 1, 3, 3), (2,), (1,), (0,), 1, (1,)),
    ((0, 6, 5, 4), (6, 4, 3, 3), (2,), (1,), (0,), 2, (1,)),
)


def tensors_of(case, device, dtype=torch.float32):
    """(input, weight, bias, scale); bias and scale dyadic."""
    cout = case[1][1] * case[5]
    return (reals(*case[0], dtype=dtype, device=device),
            reals(*case[1], dtype=dtype, device=device),
            dyadic(cout, device=device), dyadic(cout, device=device).abs() + 0.25)


def dots(x, w, case):
    return F.conv_transpose2d(signed(x).double(), signed(w).double(), None, *case[2:])


def column(vector):
    return vector.view(-1, 1, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, device):
    x, w, bias, scale = tensors_of(case, device)
    expected = dots(x, w, case).float()
    assert torch.equal(ops.binary_conv_transpose2d(x, w, None, *case[2:]), expected)
    y = ops.binary_conv_transpose2d(x, w, bias, *case[2:], scale=scale)
    assert torch.equal(y, expected * column(scale) + column(bias))
    assert y.stride() == expected.contiguous().stride()


def test_values_over_a_grid(device):
    """Every stride with every dilation, padding and output padding, along both axes at once."""
    axes = [(k, s, p, op, d, n) for k, s, p, op, d, n in itertools.product(
        (1, 2, 3, 5), (1, 2, 3, 4), (0, 1, 3), (0, 1, 3), (1, 2, 3, 4), (1, 2, 4))
        if op < max(s, d) and (n - 1) * s - 2 * p + d * (k - 1) + op >= 0]
    order = torch.randperm(len(axes), generator=torch.Generator().manual_seed(1)).tolist()
    assert len(axes) > 900
    for first, second in zip(axes, (axes[i] for i in order), strict=True):
        k, s, p, op, d, n = zip(first, second, strict=True)
        x, w = reals(1, 4, *n, device=device), reals(4, 1, *k, device=device)
        y = ops.binary_conv_transpose2d(x, w, None, s, p, op, 2, d)
        expected = F.conv_transpose2d(signed(x), signed(w), None, s, p, op, 2, d)
        assert torch.equal(y, expected), (first, second)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_values_of_random_geometries(data):
    def axes(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(2))

    groups, per_in, per_out = (data.draw(st.integers(1, n)) for n in (3, 40, 20))
    kernel, stride, dilation, size = axes(1, 5), axes(1, 5), axes(1, 5), axes(1, 6)
    output_padding = tuple(data.draw(st.integers(0, max(s, d) - 1))
                           for s, d in zip(stride, dilation, strict=True))
    padding = tuple(
        data.draw(st.integers(0, ((n - 1) * s + d * (k - 1) + o) // 2))
        for n, s, d, k, o in zip(size, stride, dilation, kernel, output_padding, strict=True))
    case = ((2, groups * per_in, *size), (groups * per_in, per_out, *kernel), stride, padding,
            output_padding, groups, dilation)
    x, w, bias, _ = tensors_of(case, "cpu")
    y = ops.binary_conv_transpose2d(x, w, bias, *case[2:])
    assert torch.equal(y, dots(x, w, case).float() + column(bias))


@pytest.mark.parametrize("kernel,stride,padding,output_padding,dilation", [
    (3, 2, 1, 1, 1), (5, 3, 2, 0, 2), (4, 6, 1, 3, 4), (1, 3, 0, 2, 1), (2, 4, 3, 0, 2)])
def test_phases_partition_the_taps(kernel, stride, padding, output_padding, dilation):
    """Each tap belongs to one phase, and is where the definition says: y = i s - p + k d."""
    found = phases(kernel, stride, padding, output_padding, dilation)
    taps = [k for phase in found for k in range(kernel)[phase.taps]]
    assert sorted(taps) == list(range(kernel))
    for phase in found:
        for i, k in enumerate(reversed(range(kernel)[phase.taps])):
            read = phase.start + i * phase.dilation  # by this tap, for the phase's first output
            assert read * stride - padding + k * dilation == phase.first


def test_strides_far_beyond_the_kernel(device):
    """There is no work for phases that have no taps."""
    x, w = reals(1, 3, 1, 2, device=device), reals(3, 2, 2, 1, device=device)
    geometry = (2**31 - 1, 100), (0, 3), (7, 99), 1, (1, 1)
    y = ops.binary_conv_transpose2d(x, w, None, *geometry)
    assert torch.equal(y, F.conv_transpose2d(signed(x), signed(w), None, *geometry))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_packed_equals_reference(case, channels_last, device):
    (n, cin, height, width), (_, per_group, *kernel) = case[:2]
    cout, groups = per_group * case[5], case[5]
    args = (words_of(n, height, width, cin, device=device),
            words_of(cout, *kernel, cin // groups, device=device), cin, *case[2:])
    scale, bias = dyadic(cout, device=device), reals(cout, device=device)
    for kw in (dict(dtype=torch.int32), dict(bias=bias), dict(scale=scale, dtype=torch.float16),
               dict(scale=scale, bias=bias.double(), dtype=torch.float64)):
        y = ops.packed_conv_transpose2d(*args, channels_last=channels_last, **kw)
        expected = reference.packed_conv_transpose2d(*args, channels_last=channels_last, **kw)
        assert y.dtype == expected.dtype and torch.equal(y, expected)
        assert y.stride() == expected.stride()


def test_pixels_without_taps_are_the_bias(device):
    x, w = reals(2, 4, 3, 3, device=device), reals(4, 2, 1, 1, device=device)
    bias, scale = torch.tensor([0.1, -3.0], device=device), torch.tensor([2.0, 3.0], device=device)
    y = ops.binary_conv_transpose2d(x, w, bias, (3,), scale=scale, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 2, 7, 7)
    reached = torch.zeros(7, 7, dtype=torch.bool, device=device)
    reached[::3, ::3] = True
    expected = column(bias).bfloat16().expand(2, 2, 7, 7)
    assert torch.equal(y[:, :, ~reached], expected[:, :, ~reached])
    assert not torch.equal(y[:, :, reached], expected[:, :, reached])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [None, torch.float16, torch.float32])
def test_scale_and_bias_run_in_float32(dtype, out, device):
    case = CASES[3]
    x, w, _, scale = tensors_of(case, device, dtype)
    bias = reals(10, dtype=dtype, device=device)
    y = ops.binary_conv_transpose2d(x, w, bias, *case[2:], scale=scale, dtype=out)
    expected = dots(x, w, case).float() * column(scale) + column(bias.float())
    assert torch.equal(y, expected.to(out or dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", (CASES[0], CASES[1]), ids=str)
def test_layouts(layout, case, device):
    x, w, bias, _ = tensors_of(case, device)
    x = LAYOUTS[layout](x)
    y = ops.binary_conv_transpose2d(x, w, bias, *case[2:])
    assert torch.equal(y, dots(x, w, case).float() + column(bias))
    last = layout == "channels_last"
    assert y.is_contiguous(memory_format=FORMATS[last]) or not last


def test_unbatched_and_autocast(device):
    x, w, bias, _ = tensors_of(CASES[1], device)
    y = ops.binary_conv_transpose2d(x, w, bias, *CASES[1][2:])
    assert torch.equal(ops.binary_conv_transpose2d(x[0], w, bias, *CASES[1][2:]), y[0])
    x = x - 1e-9  # a cast of the input would change signs
    with torch.autocast(device.type, torch.bfloat16):
        cast = ops.binary_conv_transpose2d(x, w, bias, *CASES[1][2:])
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, ops.binary_conv_transpose2d(x, w, bias, *CASES[1][2:]).bfloat16())


def emulated(case, tensors, grad, scale_weight_grad=True, **kw):
    """Output and gradients (input, weight, bias, scale) of the float emulation, in float64."""
    x, w, bias, scale = (None if t is None else t.detach().double().requires_grad_()
                         for t in tensors)
    groups = case[5]
    estimators = [{key.removeprefix(part): value for key, value in kw.items()
                   if key.startswith(part) or key == "beta"} for part in ("input_", "weight_")]
    signs = oracles.sign(w, **estimators[1])
    if scale is not None:
        rows = scale.view(groups, 1, -1, 1, 1).expand(-1, len(w) // groups, -1, 1, 1).flatten(0, 1)
        factor = rows.detach() if not scale_weight_grad else rows
        # Without scale_weight_grad the signs' gradient leaves the scale out.
        signs = signs * factor if scale_weight_grad else (
            signs + (signs.detach() * rows - signs.detach()))
    y = F.conv_transpose2d(oracles.sign(x, **estimators[0]), signs, bias, *case[2:])
    leaves = [t for t in (x, w, bias, scale) if t is not None]
    return y, torch.autograd.grad(y, leaves, grad.double(), allow_unused=True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kw", [
    {}, dict(input_clip=0.5, weight_clip=None), dict(input_estimator="approx_sign"),
    dict(input_estimator="swish_sign", weight_estimator="swish_sign", beta=3.0),
    dict(input_estimator="identity", weight_estimator="approx_sign")], ids=str)
@pytest.mark.parametrize("parts", ["plain", "full", "detached"])
def test_gradients(case, kw, parts, device):
    """Those of F.conv_transpose2d on straight-through signs."""
    kw = {"scale_weight_grad": parts != "detached", **kw}
    tensors = tensors_of(case, device)
    if parts == "plain":
        tensors = (*tensors[:2], None, None)
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    y = ops.binary_conv_transpose2d(*leaves[:3], *case[2:], scale=leaves[3], **kw)
    grad = reals(*y.shape, device=device)
    expected_y, expected = emulated(case, tensors, grad, **kw)
    torch.testing.assert_close(y.double(), expected_y)
    leaves = [t for t in leaves if t is not None]
    for ours, want, leaf in zip(torch.autograd.grad(y, leaves, grad), expected, leaves,
                                strict=True):
        assert ours.dtype == leaf.dtype and ours.shape == leaf.shape
        torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_dtypes(dtype, device):
    case = CASES[3]
    tensors = tensors_of(case, device, dtype)
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = ops.binary_conv_transpose2d(*leaves[:3], *case[2:], scale=leaves[3])
    grad = dyadic(*y.shape, dtype=dtype, device=device)
    _, expected = emulated(case, tensors, grad)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    for ours, want, leaf in zip(torch.autograd.grad(y, leaves, grad), expected, leaves,
                                strict=True):
        assert ours.dtype == leaf.dtype
        assert (ours.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1), (1, 3)], ids=str)
def test_only_some_train(wanted, device):
    case = CASES[4]
    tensors = tensors_of(case, device)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    y = ops.binary_conv_transpose2d(*leaves[:3], *case[2:], scale=leaves[3])
    grad = reals(*y.shape, device=device)
    y.backward(grad)
    _, expected = emulated(case, tensors, grad)
    for i, (leaf, want) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(leaf.grad.double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("estimator", ["ste_sign", "approx_sign"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradient_of_an_image_has_its_memory_format(format, estimator, device):
    x, w, *_ = tensors_of(CASES[1], device)
    x = x.contiguous(memory_format=format).requires_grad_()
    y = ops.binary_conv_transpose2d(x, w, None, *CASES[1][2:], input_estimator=estimator)
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].stride() == x.stride()


def test_backward_keeps_bits_only(device):
    x = reals(2, 64, 8, 8, device=device).requires_grad_()
    w = reals(64, 32, 3, 3, device=device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.binary_conv_transpose2d(x * 1, w, None, (2,), (1,))
    assert all(t.dtype == torch.int32 for t in kept if t is not w)
    assert sum(t.numel() for t in kept if t is not w) * 32 == 2 * x.numel()


def test_double_backward_refuses(device):
    x, w, *_ = (t.requires_grad_() for t in tensors_of(CASES[0], device))
    y = ops.binary_conv_transpose2d(x, w)
    g, = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="binary_conv_transpose2d has no second"):
        g.sum().backward()


def test_compiles_for_every_size(device):
    """One graph for all batches and image sizes, equal to eager, forward and backward."""
    torch._dynamo.reset()

    def run(x, w, bias):
        return ops.binary_conv_transpose2d(x, w, bias, (2,), (1,), (1,), 2)

    _, w, bias, _ = tensors_of(CASES[3], device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for shape in ((2, 70, 3, 6), (3, 70, 6, 8), (5, 70, 7, 9)):
        leaves = [t.clone().requires_grad_() for t in (reals(*shape, device=device), w, bias)]
        for dim in (0, 2, 3):
            torch._dynamo.mark_dynamic(leaves[0], dim)
        with torch._dynamo.config.patch(error_on_recompile=shape[0] > 2):
            y = compiled(*leaves)
        expected = run(*leaves)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        grad = reals(*y.shape, device=device)
        for ours, want in zip(torch.autograd.grad(y, leaves, grad),
                              torch.autograd.grad(expected, leaves, grad), strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size,stride,padding", [
    ((3, 32, 4, 1), (1, 2), (1, 0)), ((3, 4, 5, 1), (1, 2), (1, 1)),
    ((1, 32, 2, 1), (2, 2), (0, 1)),
], ids=str)
@pytest.mark.parametrize("channels", (1, 4))
def test_gradients_of_images_one_pixel_wide(channels, size, stride, padding, dtype, device):
    """PyTorch's convolution of a CPU is wrong there, for one channel in mixed memory formats, and
    in bfloat16 for taps that meet padding alone."""
    x, weight = reals(*size, device=device), reals(size[1], channels, 3, 3, device=device)
    x, weight = (t.to(dtype).requires_grad_() for t in (x, weight))
    y = ops.binary_conv_transpose2d(x, weight, None, stride, padding, input_clip=None,
                                    weight_clip=None)
    grad = dyadic(*y.shape, device=device).to(dtype)
    y.backward(grad)
    leaves = [signed(t.detach().double()).requires_grad_() for t in (x, weight)]
    F.conv_transpose2d(*leaves, None, stride, padding).backward(grad.double())
    tolerance = 2 ** -7 if dtype == torch.bfloat16 else 1e-6
    for got, want in zip((x, weight), leaves, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=tolerance, atol=tolerance)
