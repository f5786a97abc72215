"""What the trained operators share: slopes of estimators, in the form that suits the shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitkernels.ops._contract import estimator_grad
from bitkernels.ops._training import (
    SHORT_PLANE,
    Estimators,
    estimated_grad,
    finish_in_one,
    finish_weight_grad,
)

ops = torch.ops.bitkernels


class Shapes(TorchDispatchMode):
    """The shapes that sign_backward is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ops.sign_backward.default:
            self.seen.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def test_a_weight_is_rows_to_its_estimator():
    """Its taps are planes so short that sums by channel would take most of the time."""
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3, requires_grad=True)
    out = ops.binary_conv2d(x, weight)
    with Shapes() as shapes:
        out.sum().backward()
    assert shapes.seen == [(4, 72)] and weight.grad.shape == weight.shape


@pytest.mark.parametrize("side,last,expected", [
    (7, False, (2, 3 * 49)), (7, True, (2, 3, 7, 7)), (15, False, (2, 3, 15, 15)),
    (15, True, (2, 3, 15, 15))])
def test_planes_that_are_long_stay(side, last, expected):
    assert 7 * 7 < SHORT_PLANE < 15 * 15
    x, grad = torch.randn(2, 2, 3, side, side)
    if last:
        x = x.to(memory_format=torch.channels_last)
    with Shapes() as shapes:
        estimated_grad(grad, x, "approx_sign", 5.0)
    assert shapes.seen == [expected]


@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (2, 3, 300), (3, 5, 3, 3), (2, 3, 15, 15),
                                   (2, 0, 3, 3), (0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 2, 15, 15)])
@pytest.mark.parametrize("estimator,clip", [("ste_sign", 0.5), ("ste_sign", None),
                                            ("approx_sign", None), ("identity", None)])
def test_every_form_gives_the_slopes_of_the_contract(shape, estimator, clip):
    x, grad = torch.randn(2, *shape)
    for at in (x, x.flip(0) if shape else x, x.movedim(0, -1).contiguous().movedim(-1, 0)
               if shape else x):  # the last one: a stride that is no image's
        found = estimated_grad(grad, at, estimator, 5.0, clip)
        assert torch.equal(found, estimator_grad(grad, at, estimator, clip, 5.0))


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("estimator", ("ste_sign", "approx_sign", "identity", "none"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_a_weight_is_finished_alike_by_one_operator_and_by_many(estimator, dtype, last):
    """As on a GPU, and as on a CPU; the scale's gradient but for the order of its sum."""
    weight = torch.randn(12, 40, 3, 3)
    if last:
        weight = weight.to(memory_format=torch.channels_last)
    grad, scale = torch.randn(12, 40, 3, 3).to(dtype), torch.rand(12)
    words = ops.sign_pack(weight, None, 1)
    for scaled, given, wanted in itertools.product((True, False), (scale, None), (True, False)):
        train = Estimators(weight_estimator=estimator, weight_clip=0.75, scale_weight_grad=scaled)
        args = True, given is not None and wanted
        expected = finish_weight_grad(grad, weight, words, given, train, *args)
        found = finish_in_one(grad, weight, given, train, *args)
        for have, want in zip(found, expected, strict=True):
            assert (have is None) == (want is None)
        if expected[0] is not None:
            assert torch.equal(found[0], expected[0]) and found[0].stride() == weight.stride()
        if expected[1] is not None:
            torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)
