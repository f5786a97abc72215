"""fold_threshold against the float epilogue, at every dot product there is."""

import pytest
import torch

from bitkernels import reference
from bitkernels.thresholds import INT_MAX, INT_MIN, fold_threshold

ops = torch.ops.bitkernels
INF, NAN = float("inf"), float("nan")
SCALES = [1.0, -1.0, 0.0, -0.0, 0.3, -0.3, 1e-30, -1e30, INF, -INF, NAN, 1e-45]
BIASES = [0.0, -0.0, 0.5, -0.5, 2.0, -7.0, 100.0, -100.0, INF, -INF, NAN, 1e-45, -1e-45]


@pytest.mark.parametrize("clamp", [(None, None), (0.0, None), (-1.0, 1.0), (None, -3.0)])
@pytest.mark.parametrize("products", [1, 2, 9, 64])
def test_every_dot_product(products, clamp):
    scale, bias = (t.flatten() for t in torch.meshgrid(
        torch.tensor(SCALES), torch.tensor(BIASES), indexing="ij"))
    shift = torch.linspace(-2, 2, scale.numel())
    dot = torch.arange(-products, products + 1, dtype=torch.int32)
    grid = dot.unsqueeze(1).expand(-1, scale.numel())
    y = reference.epilogue(grid, 1, clamp_min=clamp[0], clamp_max=clamp[1], scale=scale, bias=bias)
    lo, hi = fold_threshold(products, clamp_min=clamp[0], clamp_max=clamp[1], scale=scale,
                            bias=bias, sign_shift=shift)
    assert torch.equal((grid >= lo) & (grid <= hi), ~(y + shift < 0))


def test_operator_gives_the_same_words():
    torch.manual_seed(0)
    x, w = torch.randn(2, 40, 7, 6), torch.randn(37, 40, 3, 3)
    scale, bias = torch.randn(37), torch.randn(37) * 10
    words, filters = ops.sign_pack(x, None, 1), ops.sign_pack(w, None, 1)
    real = ops.packed_conv2d.packed(words, filters, 40, padding=(1,), clamp_min=0.0, scale=scale,
                                    bias=bias)
    threshold = fold_threshold(360, clamp_min=0.0, scale=scale, bias=bias)
    assert torch.equal(
        ops.packed_conv2d.packed(words, filters, 40, padding=(1,), threshold=threshold), real)


def test_constant_signs_and_defaults():
    threshold = fold_threshold(5, scale=torch.zeros(2), bias=torch.tensor([1.0, -1.0]))
    assert threshold.tolist() == [[INT_MIN, INT_MAX], [INT_MAX, INT_MIN]]
    assert fold_threshold(5, out_channels=1).tolist() == [[0], [INT_MAX]]


@pytest.mark.parametrize("arguments, message", [
    (dict(products=0, scale=torch.ones(2)), "products must be an integer of at least 1, got 0"),
    (dict(products=9.5, out_channels=2), "products must be an integer of at least 1, got 9.5"),
    (dict(products=2**31, out_channels=2), "products must be an integer of at least 1 and below"),
    (dict(products=3), "out_channels must be given"),
    (dict(products=3, scale=torch.ones(2), bias=torch.ones(3)), r"bias must be of shape \(2,\)"),
    (dict(products=3, scale=torch.ones(2).int()), "scale must be float32"),
    (dict(products=3, scale=torch.ones(2), clamp_min=NAN), "clamp_min must be a number, got nan"),
    (dict(products=3, scale=torch.ones(2), clamp_max=NAN), "clamp_max must be a number, got nan"),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=f"bitkernels::fold_threshold: {message}"):
        fold_threshold(arguments.pop("products"), **arguments)
