"""max_pool2d_with_offsets and its backward against PyTorch's max pooling on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.modules.utils import _pair

from bitkernels_tests.cases import DTYPES, FORMATS, LAYOUTS, POOL_CASES, PoolCase

ops = torch.ops.bitkernels
CASES = [case for case in POOL_CASES if case.channels <= 100]
STEM = (3, 3), (2, 2), (1, 1)
# Whose windows are padding alone in places: PyTorch writes beyond its memory in the backward.
NOTHING = PoolCase((2, 2), (1, 1), (1, 1), (2, 2), size=(1, 3), channels=3)


def torchs(x, case):
    """(maxima, offsets) by PyTorch's int64 indices, tap by tap."""
    if not x.numel():
        empty = torch.empty(ops.max_pool2d_with_offsets(x.to("meta"), *case.args)[0].shape)
        return empty, empty.byte()
    out, at = F.max_pool2d(x, case.kernel, case.stride or None, case.padding, case.dilation,
                           case.ceil_mode, return_indices=True)
    kernel, dilation, padding = (_pair(v if len(v) == 2 else v[0]) for v in (
        case.kernel, case.dilation, case.padding))
    stride = _pair((case.stride or kernel) if len(case.stride) != 1 else case.stride[0])
    offsets = torch.full(at.shape, 255, dtype=torch.uint8)
    for tap in range(kernel[0] * kernel[1]):
        rows, columns = (torch.arange(n) * s - p + i * d for n, s, p, i, d in zip(
            at.shape[2:], stride, padding, divmod(tap, kernel[1]), dilation, strict=True))
        inside = (columns >= 0) & (columns < x.shape[3])
        offsets[(at == rows.view(-1, 1) * x.shape[3] + columns) & inside] = tap
    return out, offsets


def images(case, dtype=torch.float32, device="cpu"):
    """With many equal maxima."""
    return torch.randint(-3, 4, (case.batch, case.channels, *case.size), device=device).to(dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_offsets_and_gradients(case, format, device):
    x = images(case, device=device).contiguous(memory_format=format)
    want, want_offsets = torchs(x.cpu(), case)
    leaf = x.clone().requires_grad_()
    out, offsets = ops.max_pool2d_with_offsets(leaf, *case.args)
    assert torch.equal(out.cpu(), want) and torch.equal(offsets.cpu(), want_offsets)
    assert offsets.dtype == torch.uint8 and offsets.stride() == out.stride()
    if x.numel():
        assert out.is_contiguous(memory_format=format)
        grad = torch.randn_like(out)
        (found,) = torch.autograd.grad(out, leaf, grad)
        there = x.cpu().clone().requires_grad_()
        want = F.max_pool2d(there, case.kernel, case.stride or None, *case.args[2:])
        (expected,) = torch.autograd.grad(want, there, grad.cpu())
        assert torch.equal(found.cpu(), expected)
        assert found.is_contiguous(memory_format=format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_types(layout, dtype, device):
    x = LAYOUTS[layout](torch.randn(3, 5, 6, 7, device=device).to(dtype))
    out, offsets = ops.max_pool2d_with_offsets(x, *STEM)
    want, want_offsets = torchs(x.cpu().contiguous(), PoolCase(*STEM))
    assert out.dtype == dtype and torch.equal(out.cpu(), want)
    assert torch.equal(offsets.cpu(), want_offsets)
    grad = LAYOUTS[layout](torch.randn(3, 5, 3, 4, device=device).to(dtype))
    found = ops.max_pool2d_with_offsets_backward(grad, offsets, (6, 7), *STEM)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    there = x.cpu().to(wide, memory_format=torch.contiguous_format).requires_grad_()
    (want,) = torch.autograd.grad(F.max_pool2d(there, *STEM), there, grad.cpu().to(wide))
    assert found.dtype == dtype and torch.equal(found.cpu(), want.to(dtype))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_not_a_number_and_infinities(format, device):
    """The last NaN, and where all is -inf the first tap in the image."""
    x = torch.randn(1, 2, 9, 9)
    x[0, 0, 4, 3:6], x[0, 1], x[0, 0, 0, 0] = float("nan"), -float("inf"), float("inf")
    out, offsets = ops.max_pool2d_with_offsets(
        x.to(device).contiguous(memory_format=format), *STEM)
    want, want_offsets = torchs(x, PoolCase(*STEM))
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=0, equal_nan=True,
                               check_stride=False)
    assert torch.equal(offsets.cpu(), want_offsets)
    assert offsets[0, 1, 0, :2].tolist() == [4, 3] and offsets[0, 1, 1, 1] == 0


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_windows_of_padding_alone(format, device):
    x = images(NOTHING, device=device).contiguous(memory_format=format).requires_grad_()
    out, offsets = ops.max_pool2d_with_offsets(x, *NOTHING.args)
    nowhere = offsets == 255
    assert nowhere.all()  # the rows of taps lie above and below the one line
    assert torch.equal(out, torch.full_like(out, -float("inf")))
    grad = torch.full_like(out, float("nan"))
    assert not torch.autograd.grad(out, x, grad)[0].any()


@pytest.mark.parametrize("case", (PoolCase(*STEM), NOTHING, PoolCase((2, 2), dilation=(3,))),
                         ids=str)
def test_bytes_that_name_no_pixel(case, device):
    """As of other windows: nothing is written beside the image, nor read by the gradient of it."""
    shape = ops.max_pool2d_with_offsets(images(case), *case.args)[1].shape
    offsets = torch.randint(256, shape, dtype=torch.uint8, device=device)
    grad = torch.randn(shape, dtype=torch.float64, device=device).requires_grad_()
    found = ops.max_pool2d_with_offsets_backward(grad, offsets, case.size, *case.args)
    kernel, stride, padding, dilation = (
        _pair(v if len(v) == 2 else v[0]) for v in (
            case.kernel, case.stride or case.kernel, case.padding, case.dilation))
    want, reached = torch.zeros(found.shape, dtype=grad.dtype), torch.zeros(shape)
    for n, c, oh, ow in torch.ones(shape).nonzero().tolist():
        tap = divmod(int(offsets[n, c, oh, ow]), kernel[1])
        y, x = (w * s - p + t * d for w, s, p, t, d in zip(
            (oh, ow), stride, padding, tap, dilation, strict=True))
        if tap[0] < kernel[0] and 0 <= y < case.size[0] and 0 <= x < case.size[1]:
            want[n, c, y, x] += grad.detach()[n, c, oh, ow].cpu()
            reached[n, c, oh, ow] = 1
    torch.testing.assert_close(found.detach().cpu(), want)
    assert torch.equal(torch.autograd.grad(found.sum(), grad)[0].cpu().float(), reached)


@pytest.mark.parametrize("window", [(STEM), ((2, 3), (1, 2), (1, 0), (2, 1), True)], ids=str)
def test_gradients_of_any_order(window, device):
    x = torch.randperm(2 * 2 * 6 * 5).view(2, 2, 6, 5).double().to(device).requires_grad_()
    assert gradcheck(lambda x: ops.max_pool2d_with_offsets(x, *window)[0], (x,))
    out, offsets = ops.max_pool2d_with_offsets(x, *window)
    grad = torch.randn_like(out).requires_grad_()

    def backward(grad):
        return ops.max_pool2d_with_offsets_backward(grad, offsets, (6, 5), *window)

    assert gradcheck(backward, (grad,)) and gradgradcheck(backward, (grad,))


def test_what_is_kept():
    """A byte an output; the offsets need no gradient."""
    x, kept = torch.randn(2, 3, 8, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, offsets = ops.max_pool2d_with_offsets(x, 2)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, (2, 3, 4, 4))]
    assert not offsets.requires_grad


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_whole(dynamic, device):
    def step(x):
        return ops.max_pool2d_with_offsets(x.sin(), *STEM)[0].cos()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 3, 8, 9, device=device).requires_grad_()
        for grad in (torch.randn(batch, 3, 4, 5, device=device),):
            want, found = (torch.autograd.grad(run(x), x, grad)[0] for run in (step, compiled))
            assert torch.equal(want, found)


def test_exports():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return ops.max_pool2d_with_offsets(x, *STEM)

    x = torch.randn(2, 3, 8, 9)
    program = torch.export.export(Pool(), (x,))
    assert "max_pool2d_with_offsets" in str(program.graph)
    for have, want in zip(program.module()(x), Pool()(x), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_offsets_that_name_no_tap_in_the_image_give_nothing(format, device):
    """A write outside the gradient, by PyTorch's kernel of a CPU, before they were looked at."""
    offsets = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 4, 4)
    offsets = offsets.contiguous(memory_format=format)
    grad = torch.ones(1, 16, 4, 4, device=device, dtype=torch.double, requires_grad=True)
    found = ops.max_pool2d_with_offsets_backward(grad, offsets, (7, 8), *STEM)
    want, named = torch.zeros(16, 7, 8), torch.zeros(16, 4, 4)
    for channel, y, x in torch.cartesian_prod(*map(torch.arange, (16, 4, 4))).tolist():
        tap = offsets[0, channel, y, x].item()
        row, column = (2 * at - 1 + tap_at for at, tap_at in zip((y, x), divmod(tap, 3),
                                                                 strict=True))
        if tap < 9 and 0 <= row < 7 and 0 <= column < 8:
            want[channel, row, column] += 1
            named[channel, y, x] = 1
    assert torch.equal(found[0].float().cpu(), want)
    (again,) = torch.autograd.grad(found.sum(), grad)
    assert torch.equal(again[0].float().cpu(), named)
