"""sign_pack, sign_pack_mask, mask_grad and unpack against numpy.packbits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitkernels import reference
from bitkernels_tests import oracles
from bitkernels_tests.cases import DTYPES, LAYOUTS, reals, word_count
from bitkernels_tests.properties import given, settings, st

ops = torch.ops.bitkernels
CHANNELS = (1, 2, 31, 32, 33, 63, 64, 65, 100, 257, 4096)
SPECIAL = (0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1.0, -1.0)


def assert_words(words, bits, device):
    """words are exactly the packed bits, their tail 0, contiguous."""
    expected = oracles.pack(bits).to(device)
    assert words.dtype == torch.int32 and words.is_contiguous() and words.device == expected.device
    assert words.shape == expected.shape and torch.equal(words, expected)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_signs_of_every_width(channels, dim, device):
    shape = [3, 2, 5]
    shape[dim] = channels
    x = reals(*shape, device=device)
    assert_words(ops.sign_pack(x, None, dim), oracles.sign_bits(x, dim), device)
    assert torch.equal(reference.sign_pack(x, None, dim), ops.sign_pack(x, None, dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_dtypes_and_layouts(dtype, layout, dim, device):
    x = LAYOUTS[layout](reals(3, 37, 4, 5, dtype=dtype, device=device))
    assert_words(ops.sign_pack(x, None, dim), oracles.sign_bits(x, dim), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, device):
    tiny = torch.finfo(dtype).smallest_normal
    denormal = tiny * torch.finfo(dtype).eps
    values = torch.tensor([*SPECIAL, tiny, -tiny, denormal, -denormal], dtype=torch.float64)
    expected = [1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0]
    x = values.to(device, dtype)
    assert (x[-2:] != 0).all(), "denormals must reach the operator"
    for repeat in (1, 3):
        assert_words(ops.sign_pack(x.repeat(repeat)), np.array(expected * repeat, bool), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shift_is_added_in_float32(dtype, device):
    """A shift beneath the input's own resolution still moves the sign."""
    x = torch.tensor([[1.0, 1.0, -1.0, 0.0, 2.0]], dtype=dtype, device=device)
    shift = torch.tensor([-1.0, -1.0 - 2**-20, 1.0, -2.0**-20, -2.0], device=device)
    assert_words(ops.sign_pack(x, shift), np.array([[1, 0, 1, 0, 1]], bool), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_shift_of_each_dim(layout, dim, device):
    x = LAYOUTS[layout](reals(4, 35, 3, 6, device=device))
    shift = reals(x.shape[dim], device=device)
    moved = x.movedim(dim, -1) + shift
    assert_words(ops.sign_pack(x, shift, dim), oracles.sign_bits(moved, -1), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shifts_of_each_sample(layout, dim, dtype, device):
    """Of the input's rank, N in dimension 0, C in dim, else 1; as one call a sample."""
    x = LAYOUTS[layout](reals(3, 35, 4, 70, dtype=dtype, device=device))
    shift = reals(*(s if i in (0, dim % 4) else 1 for i, s in enumerate(x.shape)), device=device)
    wide = x.double() if dtype == torch.float64 else x.float()
    bits = oracles.sign_bits(wide + shift, dim)
    assert_words(ops.sign_pack(x, shift, dim), bits, device)
    assert torch.equal(reference.sign_pack(x, shift, dim), ops.sign_pack(x, shift, dim))
    words, mask = ops.sign_pack_mask(x, 0.75, shift, dim)
    assert_words(words, bits, device)
    inside = np.moveaxis((wide + shift).abs().cpu().numpy() <= 0.75, dim, -1)
    assert_words(mask, inside, device)
    each = [ops.sign_pack(x[n : n + 1], shift[n].flatten(), dim) for n in range(3)]
    assert torch.equal(words, torch.cat(each))


@pytest.mark.parametrize("shape,dim", [((300, 40), 1), ((1, 33, 2), 1), ((0, 5, 2), 1),
                                       ((2, 3, 4, 2, 33), -1), ((70, 3, 200), 1)])
def test_shifts_of_each_sample_of_other_ranks(shape, dim, device):
    x = reals(*shape, device=device)
    shift = reals(*(s if i in (0, dim % x.dim()) else 1 for i, s in enumerate(shape)),
                  device=device)
    assert_words(ops.sign_pack(x, shift, dim), oracles.sign_bits(x + shift, dim), device)


@pytest.mark.parametrize("shape,dim", [((0, 33, 2, 2), 1), ((2, 33, 0, 2), 1), ((5,), 0),
                                       ((40,), -1), ((0, 7), 1), ((2, 3, 2, 2, 34), -1)])
def test_empty_and_other_ranks(shape, dim, device):
    x = reals(*shape, device=device)
    words = ops.sign_pack(x, None, dim)
    rest = [s for i, s in enumerate(shape) if i != dim % len(shape)]
    assert words.shape == (*rest, word_count(shape[dim]))
    assert_words(words, oracles.sign_bits(x, dim), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [0.0, 1.0, 1.25, float("inf")])
@pytest.mark.parametrize("dim", [1, -1])
def test_mask_is_inclusive_of_the_clip(dtype, clip, dim, device):
    x = reals(3, 70, 4, dtype=dtype, device=device)
    x[0, :8, 0] = torch.tensor(SPECIAL, device=device)
    x[1, :2, 1] = torch.tensor([1.25, -1.25], device=device)
    words, mask = ops.sign_pack_mask(x, clip, None, dim)
    assert_words(words, oracles.sign_bits(x, dim), device)
    inside = np.moveaxis(np.abs(x.cpu().double().numpy()) <= clip, dim, -1)
    assert not inside.all() and inside.any(), "NaN is outside, 0 inside every clip"
    assert_words(mask, inside, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_of_shifted_input(layout, device):
    x = LAYOUTS[layout](reals(3, 33, 4, 2, device=device))
    shift = reals(33, device=device)
    moved = x.movedim(1, -1) + shift
    words, mask = ops.sign_pack_mask(x, 0.75, shift, 1)
    assert_words(words, oracles.sign_bits(moved, -1), device)
    assert_words(mask, moved.abs().cpu().numpy() <= 0.75, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_mask_grad(dtype, layout, dim, device):
    grad = LAYOUTS[layout](reals(4, 37, 3, 5, dtype=dtype, device=device))
    bits = np.random.default_rng(3).random(np.moveaxis(np.empty(grad.shape), dim, -1).shape) < 0.5
    out = ops.mask_grad(grad, oracles.pack(bits).to(device), dim)
    mask = torch.from_numpy(np.moveaxis(bits, -1, dim).copy()).to(device)
    assert out.dtype == dtype and torch.equal(out, torch.where(mask, grad, 0.0).to(dtype))


def test_mask_grad_stops_nan_and_inf(device):
    grad = torch.tensor([[float("nan"), float("inf"), -2.0, float("inf")]], device=device)
    words = oracles.pack(np.array([[0, 0, 0, 1]], bool)).to(device)
    assert ops.mask_grad(grad, words).tolist() == [[0.0, 0.0, 0.0, float("inf")]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unpack(dtype, channels, dim, device):
    bits = np.random.default_rng(channels).random((2, 3, 4, channels)) < 0.5
    x = ops.unpack(oracles.pack(bits).to(device), channels, dtype, dim)
    signs = torch.from_numpy(np.where(np.moveaxis(bits, -1, dim), 1.0, -1.0))
    assert x.dtype == dtype and torch.equal(x.cpu(), signs.to(dtype))


def test_unpack_takes_strided_words(device):
    words = oracles.pack(np.random.default_rng(0).random((6, 4, 90)) < 0.5).to(device)
    view = words.transpose(0, 1)[::2, 1:]
    assert torch.equal(ops.unpack(view, 90), ops.unpack(view.contiguous(), 90))
    assert torch.equal(ops.unpack(words[:0], 90), torch.empty(0, 4, 90, device=device))


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 70), min_size=1, max_size=3), data=st.data())
def test_round_trip(shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = reals(*shape)
    signs = torch.where(x < 0, -1.0, 1.0)
    words = ops.sign_pack(x, None, dim)
    assert torch.equal(ops.unpack(words, shape[dim], torch.float32, dim), signs)
    assert torch.equal(ops.sign_pack(signs, None, dim), words)
