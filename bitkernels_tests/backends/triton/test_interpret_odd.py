"""The Triton kernels of test_interpret.py, which runs this file, on legal calls that are rare:
strides that say nothing, weights in any order of memory, numbers at the edge of a type."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_interpret.py runs this file", allow_module_level=True)

from bitkernels import reference
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
