"""The Triton kernels of test_interpret.py, which runs this file, beyond 2^31 elements."""

from __future__ import annotations

import importlib
import mmap
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_interpret.py runs this file", allow_module_level=True)

from bitkernels import reference
from bitkernels.backends.triton import dispatch, elementwise, selfcheck
from bitkernels_tests.backends.triton.test_interpret import (  # noqa: F401
    CPU,
    emulated_ptx,
    kernel,
    same,
)
from bitkernels_tests.cases import LAYOUTS, dyadic, reals, words_of
from bitkernels_tests.triton_interpreter import language_patched_once  # noqa: F401


@pytest.fixture(scope="module")
def unbacked():
    """2^32 numbers of 2 bytes around an address, of which only touched pages exist."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        pytest.skip("this system maps no memory before it is used")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    yield torch.frombuffer(mmap.mmap(-1, 2**33, flags=flags), dtype=torch.float16)


def test_offsets_beyond_32_bits(unbacked):
    """Images 2^30 elements apart: in 32 bits the third one's offset is negative."""
    def far(t):
        strides = (2**30, *t.stride()[1:])
        return unbacked.as_strided(t.shape, strides, 2**31 - place.pop()).copy_(t)

    shift, slope, last = (reals(40) for _ in range(3))
    for layout in ("contiguous", "channels_last"):
        near = [LAYOUTS[layout](reals(3, 40, 3, 5, dtype=torch.float16)) for _ in range(3)]
        place = [2**16, 2**17, 2**18]
        x, grad, add = map(far, near)
        words = words_of(3, 3, 5, 40)
        for op, args, other in (
                ("sign_pack", (x, shift, 1), near), ("sign_pack_mask", (x, 0.7, None, 1), near),
                ("mask_grad", (grad, words, 1), near[1:]), ("rsign", (x, shift), near),
                ("rprelu", (x, shift, slope, last), near),
                ("rprelu_backward", (grad, x, shift, slope), (near[1], near[0])),
                ("sign_backward", (grad, x, shift, add, "approx_sign", None, 5.0),
                 (near[1], near[0], shift, near[2]))):
            beside = list(args)
            for i, arg in enumerate(args):
                if isinstance(arg, torch.Tensor) and arg.dim() == 4 and len(arg) == 3 \
                        and arg.dtype == torch.float16:
                    beside[i] = other[i]
            same(kernel(op)(*args), kernel(op)(*beside))
        words, filters = words_of(45, 70), words_of(40, 70)
        residual = dyadic(3, 40, 3, 5, dtype=torch.float16)
        place = [2**16]
        args = words.view(3, 3, 5, -1), filters.view(40, 1, 1, -1), 70
        same(kernel("packed_conv2d")(*args, residual=far(residual), inner="popc"),
             reference.packed_conv2d(*args, residual=residual))


@pytest.mark.parametrize("op", dispatch.OPERATORS)
def test_every_kernel_takes_64_bit_offsets(op, monkeypatch):
    """The same results as with 32 bits, also where a loop carries the offset."""
    inner = "popc" if op in dispatch.PRODUCTS else None
    for name in (f"{kernel(op).__module__}", elementwise.__name__):
        module = importlib.import_module(name)
        if hasattr(module, "wide"):
            monkeypatch.setattr(module, "wide", lambda *tensors: True)
    assert selfcheck.failure(op, inner, CPU) is None
