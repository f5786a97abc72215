"""The Triton kernels of test_interpret.py, which runs this file, on legal calls that are rare:
strides that say nothing, weights in any order of memory, numbers at the edge of a type."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_interpret.py runs this file", allow_module_level=True)

from bitkernels import reference
from bitkernels.backends.triton import dispatch, plan
from bitkernels.ops._record import OPERATORS
from bitkernels_tests.backends.triton.test_interpret import (  # noqa: F401
    emulated_ptx,
    kernel,
    same,
)
from bitkernels_tests.cases import dyadic, reals, words_of
from bitkernels_tests.triton_interpreter import language_patched_once  # noqa: F401

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("shape,strides", [((4, 3, 2, 1, 0), (27, 1, 486, 162, 162)),
                                           ((2, 3, 0, 5, 4), (7, 1, 3, 100, 9))], ids=str)
def test_no_elements_in_any_strides(shape, strides):
    """More runs of dimensions than two, which a copy would not change."""
    x, vector = torch.empty(1).as_strided(shape, strides), reals(3)
    words = words_of(*shape[:1], *shape[2:], 3)
    for op, args in (("sign_pack", (x, vector, 1)), ("sign_pack_mask", (x, 1.0, None, 1)),
                     ("mask_grad", (x, words, 1)), ("rsign", (x, vector)),
                     ("rprelu", (x, vector, vector, vector)),
                     ("rprelu_backward", (x, x, vector, vector)),
                     ("sign_backward", (x, x, vector, None, "ste_sign", 1.0, 5.0))):
        same(kernel(op)(*args), OPERATORS[op].reference(*args))


@pytest.mark.parametrize("inner", ("int8", "b1", "popc"))
def test_rows_of_one_word_with_any_stride(inner):
    """PyTorch counts them as contiguous, whatever the last stride is."""
    def odd(words):
        return words.as_strided(words.shape, (*words.stride()[:-1], 7))

    x, mask, filters = reals(5, 21), odd(words_of(5, 21)), odd(words_of(40, 21))
    assert mask.is_contiguous() and mask.stride(-1) == 7
    same(kernel("mask_grad")(x, mask, 1), reference.mask_grad(x, mask, 1))
    same(kernel("unpack")(mask, 21), reference.unpack(mask, 21))
    same(kernel("unpack")(mask[:0], 21), reference.unpack(mask[:0], 21))
    kw = dict(dtype=torch.int32, packed=True)
    same(kernel("packed_linear")(mask, filters, 21, **kw, inner=inner),
         reference.packed_linear(mask, filters, 21, **kw))


ORDERS = ((0, 3, 2, 1), (3, 0, 2, 1), (1, 2, 0, 3), (3, 2, 1, 0), (2, 3, 1, 0))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("room", (0, 3))
def test_latent_weights_in_any_order_of_memory(order, room):
    """Dense, and as a part of a larger tensor; gradients in another order."""
    sizes = [(5, 7, 3, 2)[d] for d in order]
    back = [order.index(d) for d in range(4)]
    weight = dyadic(*sizes[:3], sizes[3] + room)[..., :sizes[3]].permute(back)
    for grad in (dyadic(5, 7, 3, 2), dyadic(2, 3, 7, 5).permute(3, 2, 1, 0)):
        args = grad, weight, dyadic(5), "approx_sign", None, 5.0, True, True
        got = kernel("latent_weight_grad")(*args)
        same(got, OPERATORS["latent_weight_grad"].reference(*args))
        assert got[0].stride() == torch.empty_like(weight).stride()


def test_a_weight_without_an_estimator_has_a_gradient_of_0():
    """Of any gradient, in the bits of 0."""
    grad = torch.tensor([[NAN, INF, -INF, -1.0, -0.0]])
    got, of_scale = kernel("latent_weight_grad")(
        grad, dyadic(1, 5), None, "none", None, 5.0, True, False)
    assert not got.view(torch.int32).any() and not of_scale.numel()


def test_double_scales_are_cast_as_pytorch_casts():
    """By way of float32, where this one is a tie: 1, and not the next number of float16."""
    scale = torch.tensor([1 + 2**-11 + 2**-40], dtype=torch.float64)
    grad = torch.ones(1, 4, dtype=torch.float16)
    args = grad, dyadic(1, 4), scale, "identity", None, 5.0, True, False
    got, _ = kernel("latent_weight_grad")(*args)
    same(got, OPERATORS["latent_weight_grad"].reference(*args)[0])
    assert torch.equal(got, torch.ones(1, 4))


def test_float8_is_rounded_as_pytorch_rounds():
    """Every float16, and what the scale makes of some: ties, infinities, numbers below 2^-16."""
    every = torch.arange(2**16, dtype=torch.int32).short().view(torch.half).view(1, 64, 32, 32)
    every = torch.where(every.isnan(), 1.0, every).contiguous(memory_format=torch.channels_last)
    dot, one, zero = torch.zeros(every.shape, dtype=torch.int16), torch.ones(64), torch.zeros(64)
    op = "residual_block_norm_backward_float8"
    for scale in (None, torch.full((64,), 0.3)):
        args = (every, dot, one, zero, zero, zero, scale, False, torch.half)
        out, rounded = kernel(op)(*args)
        assert torch.equal(out, every)
        scaled = out if scale is None else (out.float() * scale.half()[0].float()).half()
        assert torch.equal(rounded.view(torch.uint8), scaled.to(torch.float8_e5m2).view(
            torch.uint8).contiguous(memory_format=torch.channels_last))
    every[0, 0, 0, 0] = NAN
    _, rounded = kernel(op)(every, dot, one, zero, zero, zero, None, False, torch.half)
    assert rounded.isnan().sum() == 1


@pytest.mark.parametrize("outputs,channels,kernel_size,size,padding,dilation", [
    (16, 5, (1, 1), (3, 3), (0, 0, 0, 0), (1, 1)),
    (48, 70, (3, 3), (9, 7), (1, 1, 1, 1), (1, 1)),  # two blocks of rows
    (160, 33, (3, 2), (6, 6), (2, 0, 1, 3), (2, 1)),  # two parts, the last of 32
    (128, 160, (2, 3), (4, 5), (0, 1, 2, 0), (1, 2))], ids=str)
@pytest.mark.parametrize("dtype", (torch.float8_e5m2, torch.half), ids=str)
def test_through_convolution_and_sign(outputs, channels, kernel_size, size, padding, dilation,
                                      dtype):
    """Against PyTorch's own gradient in float64, and sign_backward's reference of that."""
    generator = torch.Generator().manual_seed(outputs)
    reach = [n + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel_size[i] - 1)
             for i, n in enumerate(size)]
    grad = torch.randint(-3, 4, (2, outputs, *reach), generator=generator).to(dtype)
    words = words_of(outputs, *kernel_size, channels)
    x, add = (torch.randint(-8, 9, (2, channels, *size), generator=generator).half() / 4
              for _ in range(2))
    shift, scale = dyadic(channels), None if dtype != torch.half else torch.full((outputs,), -2.0)
    weight = reference.unpack(words, channels, torch.float64, 1)
    if scale is not None:
        weight = weight * -2.0
    inside = torch.zeros(2, channels, *size, dtype=torch.float64, requires_grad=True)
    top, bottom, left, right = padding
    padded = torch.nn.functional.pad(inside, (left, right, top, bottom))
    out = torch.nn.functional.conv2d(padded, weight, dilation=dilation)
    product, = torch.autograd.grad(out, inside, grad.double())
    call = grad, words, channels, scale, size
    rest = padding, dilation, torch.half
    op = kernel("packed_conv2d_sign_backward")
    alone, none = op(*call, None, None, None, *rest, "identity", 1.0, 5.0)
    assert torch.equal(alone.double(), product) and none.numel() == 0
    for estimator, clip, offset, more in (("ste_sign", 1.0, shift, add),
                                          ("identity", None, None, None),
                                          ("approx_sign", None, shift, None)):
        got = op(*call, x, offset, more, *rest, estimator, clip, 5.0)
        same(got, reference.sign_backward(product.float(), x, offset, more, estimator, clip, 5.0))


def test_which_gradients_go_through_in_one_pass():
    op = "packed_conv2d_sign_backward"
    for outputs, why in ((16, None), (24, "24 output channels, no multiple"), (0, "0 output")):
        grad = torch.zeros(1, outputs, 2, 2, dtype=torch.float8_e5m2)
        args = (grad, words_of(outputs, 1, 1, 5), 5, None, (2, 2), None, None, None, (0,) * 4,
                (1, 1), torch.half, "identity", 1.0, 5.0)
        found = plan.decide(op, args, {}, torch.device("cpu"))
        assert found.inners == ((None,) if why is None else ())
        assert (why or "the operator's kernel") in found.reason
        same(dispatch.run(op, *args), OPERATORS[op].reference(*args))
    for family in ("sm80", "sm86", "hip"):
        assert "no tensor core on float8" in plan._no_tile(family, *args[:5])
    assert plan._no_tile("sm80", grad.half().expand(1, 0, 2, 2), *args[1:5]).startswith("0 output")
