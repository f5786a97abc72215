"""The reference against values written by hand: it is the oracle of the other tests."""

from __future__ import annotations

import pytest
import torch

from bitkernels import reference
from bitkernels.ops._contract import outputs
from bitkernels_tests.cases import DTYPES

NAN, INF = float("nan"), float("inf")
VALUES = [0.0, -0.0, NAN, 1.0, -1.0, INF, -INF, 1.25, -1.25, -1e-7]
SIGNS = [1, 1, 1, 1, -1, 1, -1, 1, -1, -1]
WORD = sum(1 << i for i, sign in enumerate(SIGNS) if sign > 0)


@pytest.fixture(params=DTYPES, ids=str)
def x(request):
    return torch.tensor(VALUES, dtype=request.param)


def test_every_sign_is_plus_one_unless_below_zero(x):
    """NaN and both zeros are +1, in each operator that takes signs."""
    zeros = torch.zeros(len(VALUES))
    assert reference.sign(x).tolist() == SIGNS
    assert reference.sign_pack(x).tolist() == [WORD]
    assert reference.sign_pack(x, zeros).tolist() == [WORD]
    assert reference.sign_pack_mask(x, 1.0)[0].tolist() == [WORD]
    assert reference.rsign(x[None], zeros).tolist() == [SIGNS]
    assert reference.unpack(torch.tensor([WORD]).int(), len(VALUES)).tolist() == SIGNS


def test_the_clip_includes_its_bound(x):
    inside = [True, True, False, True, True, False, False, False, False, True]
    words = reference.sign_pack_mask(x, 1.0)[1]
    assert reference.unpack_bits(words, len(VALUES)).tolist() == inside
    grad = torch.full_like(x, 3.0)
    kept = [3.0 if one else 0.0 for one in inside]
    assert reference.estimator_grad(grad, x, "ste_sign", 1.0, 5.0).tolist() == kept
    assert reference.mask_grad(grad, words).tolist() == kept


def test_slopes_of_the_estimators(x):
    """Zero at NaN and far away; at 0 they are 2 and beta."""
    def slopes(name):
        return reference.estimator_grad(torch.ones_like(x), x, name, None, 5.0)

    approx, swish = slopes("approx_sign").tolist(), slopes("swish_sign")
    assert approx[:9] == [2, 2, 0, 0, 0, 0, 0, 0, 0] and abs(approx[9] - 2) < 1e-5
    assert swish[[0, 1]].tolist() == [5, 5] and swish[[2, 5, 6]].tolist() == [0, 0, 0]
    assert slopes("ste_sign").tolist() == slopes("identity").tolist() == [1] * len(VALUES)


def test_the_last_bit_of_a_word_is_its_sign():
    bits = torch.zeros(64, dtype=torch.bool)
    bits[[0, 31, 32]] = True
    assert reference.pack_bits(bits).tolist() == [1 - 2**31, 1]
    assert torch.equal(reference.unpack_bits(reference.pack_bits(bits), 64), bits)


def test_packed_signs_of_an_epilogue():
    """Of the value before it is rounded to a type; of the integer by thresholds."""
    dot = torch.tensor([[2, 0, -2]], dtype=torch.int32)
    tiny = torch.full((3,), -1e-9)
    kw = dict(real=True, packed=True, sign_shift=None, threshold=None)
    y, words = outputs(dot, 1, dtype=torch.float16, bias=tiny, **kw)
    assert words.tolist() == [[0b001]] and y.tolist() == [[2, 0, -2]]
    bounds = torch.tensor([[2, 1, -2], [5, 5, -2]], dtype=torch.int32)
    kw["threshold"] = bounds
    assert outputs(dot, 1, dtype=None, **kw)[1].tolist() == [[0b101]]
