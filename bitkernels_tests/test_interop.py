"""Arrays of other libraries through DLPack: values, and that nothing is copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitkernels import interop, reference
from bitkernels_tests.cases import reals, words_of


class Foreign:
    """An array that has DLPack and nothing else; results come back by its module's from_dlpack."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **kw):
        return self.tensor.__dlpack__(**kw)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_pack_and_unpack_numpy():
    x = reals(4, 5, 70)
    words = interop.pack(x.numpy())
    assert isinstance(words, np.ndarray) and words.dtype == np.int32
    assert torch.equal(torch.from_numpy(words), reference.sign_pack(x))
    back = interop.unpack(words, 70)
    assert isinstance(back, np.ndarray)
    assert torch.equal(torch.from_numpy(back), reference.sign(x))


def test_axis_and_shift():
    x, shift = reals(2, 70, 5), reals(70)
    words = interop.pack(x.numpy(), shift.numpy(), axis=1)
    assert torch.equal(torch.from_numpy(words), reference.sign_pack(x, shift, 1))
    assert interop.unpack(words, 70, axis=1).shape == (2, 70, 5)


@pytest.mark.parametrize("unsigned", (False, True))
def test_multiply(unsigned):
    a, w = words_of(9, 100), words_of(7, 100)
    arrays = [t.numpy().view(np.uint32) if unsigned else t.numpy() for t in (a, w)]
    got = interop.multiply(*arrays, 100)
    want = reference.packed_linear(a, w, 100, dtype=torch.int32)[0]
    assert got.dtype == np.int32 and torch.equal(torch.from_numpy(got), want)
    scale, bias = reals(7), reals(7)
    got = interop.multiply(*arrays, 100, scale=scale.numpy(), bias=bias.numpy())
    want = reference.packed_linear(a, w, 100, scale=scale, bias=bias)[0]
    assert torch.equal(torch.from_numpy(got), want)


def test_tensors_come_back_as_tensors():
    x = reals(3, 40).requires_grad_()
    words = interop.pack(x)
    assert torch.equal(words, reference.sign_pack(x.detach())) and not words.requires_grad


def test_nothing_is_copied(monkeypatch):
    x = np.ones((2, 64), dtype=np.float32)
    seen = []
    real = interop._tensor

    def spy(name, array):
        seen.append(real(name, array))
        return seen[-1]

    monkeypatch.setattr(interop, "_tensor", spy)
    words = interop.pack(x)
    assert seen[0].data_ptr() == x.ctypes.data
    interop.unpack(words, 64)
    assert seen[1].data_ptr() == words.ctypes.data


def test_any_dlpack(monkeypatch):
    import bitkernels_tests.test_interop as here

    monkeypatch.setattr(interop.importlib, "import_module",
                        lambda name: type("library", (), {"from_dlpack": Foreign}))
    words = interop.pack(here.Foreign(reals(3, 40)))
    assert type(words).__name__ == "Foreign" and words.tensor.shape == (3, 2)


def test_what_has_no_dlpack_is_refused():
    with pytest.raises(TypeError, match="array must have __dlpack__.*got list"):
        interop.pack([1.0, -1.0])


def test_arrays_that_run_backwards_are_refused():
    """torch.from_dlpack ends the process at these."""
    x, words = reals(3, 70).numpy(), words_of(3, 70).numpy()
    for call in (lambda: interop.pack(x[::-1]), lambda: interop.pack(x[:, ::-1]),
                 lambda: interop.pack(x, x[0, ::-1]), lambda: interop.unpack(words[::-1], 70),
                 lambda: interop.multiply(words, words[::-1], 70)):
        with pytest.raises(ValueError, match="must have strides of at least 0.*got strides"):
            call()
    for turned in (x[:1][::-1], x[::2], x.T):  # a single row has no direction
        want = reference.sign_pack(torch.from_numpy(turned.copy()))
        assert torch.equal(torch.from_numpy(interop.pack(turned)), want)


@pytest.mark.cuda
def test_cupy():
    cupy = pytest.importorskip("cupy")
    x = reals(300, 640)
    words = interop.pack(cupy.asarray(x.numpy()))
    assert isinstance(words, cupy.ndarray)
    got = interop.multiply(words, words, 640)
    packed = reference.sign_pack(x)
    want = reference.packed_linear(packed, packed, 640, dtype=torch.int32)[0]
    assert torch.equal(torch.from_numpy(cupy.asnumpy(got)), want)
