"""packed_max_pool2d against F.max_pool2d on the signs as real numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bitkernels import reference
from bitkernels_tests import oracles
from bitkernels_tests.cases import POOL_CASES, PoolCase, words_of
from bitkernels_tests.properties import assume, given, settings, st

ops = torch.ops.bitkernels


def pooled_signs(words, case):
    """Packed signs of F.max_pool2d; a window without a tap in the image gives -inf, bit 0."""
    signs = torch.from_numpy(oracles.unpack(words, case.channels)).float().movedim(-1, 1)
    pooled = F.max_pool2d(signs, case.kernel, case.stride or None, case.padding, case.dilation,
                          case.ceil_mode)
    return oracles.pack(oracles.sign_bits(pooled, 1)).to(words.device)


def sparse_words(case, device="cpu"):
    """Words with few bits set, so that windows of both outcomes are frequent."""
    bits = torch.rand(case.batch, *case.size, case.channels) < 0.15
    return reference.pack_bits(bits).to(device)


@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_maximum_of_signs(case, device):
    words = sparse_words(case, device)
    expected = pooled_signs(words, case)
    out = ops.packed_max_pool2d(words, *case.args)
    assert out.dtype == torch.int32 and out.is_contiguous()
    assert out.shape == expected.shape and torch.equal(out, expected)
    assert torch.equal(reference.packed_max_pool2d(words, *case.args), expected)
    assert ops.packed_max_pool2d(words.to("meta"), *case.args).shape == expected.shape


def test_window_of_padding_alone(device):
    """Taps at -1 and 1 of an image of one pixel: nothing to take the maximum of."""
    case = PoolCase((2, 2), (1, 1), (1, 1), (2, 2), size=(1, 1), channels=33)
    words = words_of(2, 1, 1, 33, device=device)
    expected = pooled_signs(words, case)
    assert not expected.any()
    assert torch.equal(ops.packed_max_pool2d(words, *case.args), expected)


@pytest.mark.parametrize("shape,out", [((2, 0, 5, 1), (2, 1, 3, 1)), ((0, 0, 3, 2), (0, 1, 2, 2)),
                                       ((1, 0, 0, 2), (1, 1, 1, 2))], ids=str)
def test_images_without_pixels(shape, out, device):
    """Their windows are padding alone."""
    words = torch.empty(shape, dtype=torch.int32, device=device)
    window = (2, 2), (2, 2), (1, 1)
    for pool in (ops.packed_max_pool2d, reference.packed_max_pool2d):
        assert torch.equal(pool(words, *window), torch.zeros(out, dtype=torch.int32, device=device))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_generated_windows(data):
    def pairs(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel = pairs(1, 4)
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    case = PoolCase(kernel, pairs(1, 3), padding, pairs(1, 2), data.draw(st.booleans()),
                    pairs(1, 9), data.draw(st.integers(1, 70)), data.draw(st.integers(0, 2)))
    assume(all(s + 2 * p > d * (k - 1) for s, p, d, k in
               zip(case.size, padding, case.dilation, kernel, strict=True)))
    words = sparse_words(case)
    assert torch.equal(ops.packed_max_pool2d(words, *case.args), pooled_signs(words, case))


def test_strided_words(device):
    view = words_of(4, 9, 10, 70, device=device).transpose(1, 2)[::2, 1:]
    out = ops.packed_max_pool2d(view, (3, 3), (2, 2), (1, 1))
    assert torch.equal(out, ops.packed_max_pool2d(view.contiguous(), (3, 3), (2, 2), (1, 1)))
    case = PoolCase((3, 3), (2, 2), (1, 1), size=(9, 9), channels=70)
    assert torch.equal(out, pooled_signs(view, case))
