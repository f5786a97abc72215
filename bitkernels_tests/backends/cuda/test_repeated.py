"""Launches of csrc/cuda that are remembered and repeated (backends/replay.py), on the emulator."""

from __future__ import annotations

import pytest
import torch

from bitkernels import reference
from bitkernels.backends import replay
from bitkernels.backends.cuda import kernels, launch
from bitkernels.ops._record import OPERATORS
from bitkernels_tests import cuda_emulator
from bitkernels_tests.cases import reals, words_of

if not cuda_emulator.available():
    pytest.skip(f"no C++ compiler ({cuda_emulator.COMPILER})", allow_module_level=True)

RESIDENT, TWO = kernels.ALL["resident_64x64"], kernels.ALL["mma_64x32"]
GEOMETRY = (1, 1), (1, 1), (1, 1), 1


@pytest.fixture(autouse=True)
def driver(emulated):
    return emulated


def block(run, words, filters, residual, scale, bias, slope):
    """Both outputs of a convolution with an epilogue."""
    return run("packed_conv2d", words, filters, 64, *GEOMETRY, dtype=torch.float16, packed=True,
               residual=residual, scale=scale, bias=bias, slope=slope, sign_shift=bias)


def moments(run, words, filters, sums):
    return run("packed_conv2d_moments", words, filters, 64, *GEOMETRY, sums=sums)


def by(kernel):
    return lambda op, *args, **kw: getattr(launch, op)(kernel, *args, **kw)


def new_data():
    residual = reals(1, 64, 5, 6).half().to(memory_format=torch.channels_last)
    return (words_of(1, 5, 6, 64), words_of(64, 3, 3, 64), residual, *(
        reals(64) for _ in range(3)))


def recorded() -> list:
    return [type(found).__name__ for found in replay._recordings.values()]


def test_an_epilogue(driver):
    for number in range(4):
        words, filters, residual, scale, bias, slope = new_data()
        got = replay.call(by(RESIDENT), block, words, filters, residual, scale, bias, slope)
        want = reference.packed_conv2d(
            words, filters, 64, *GEOMETRY, dtype=torch.float16, packed=True, residual=residual,
            scale=scale, bias=bias, slope=slope, sign_shift=bias)
        assert all(torch.equal(w, g) and w.stride() == g.stride()
                   for w, g in zip(want, got, strict=True)), number
    assert recorded() == ["_Recording"] and len(driver.launched) == 5


@pytest.mark.parametrize("sums", (True, False))
def test_moments(driver, sums):
    """Sums are added to zeros in every call."""
    for number in range(4):
        words, filters, *_ = new_data()
        dot, found = replay.call(by(RESIDENT), moments, words, filters, sums)
        want, expected = OPERATORS["packed_conv2d_moments"].reference(
            words, filters, 64, *GEOMETRY, pad_value=0, out_channels=None, relu=False,
            dtype=torch.int16)
        assert torch.equal(dot, want), number
        assert torch.equal(found, expected) if sums else found is None
    assert recorded() == ["_Recording"]


def test_what_takes_two_launches_runs_always(driver):
    words, filters, *rest = new_data()
    for _ in range(3):
        replay.call(by(TWO), block, words, filters, *rest)
    assert recorded() == ["str"] and len(driver.launched) == 6


def test_a_kernel_that_has_been_unloaded(driver):
    """It is loaded again by the call as it comes."""
    words, filters, *_ = new_data()
    for _ in range(3):
        first = replay.call(by(RESIDENT), moments, words, filters, True)
    launch._loaded.clear()
    for _ in range(3):
        again = replay.call(by(RESIDENT), moments, words, filters, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_captured_kernel_is_kept(driver, monkeypatch):
    words, filters, *_ = new_data()
    for _ in range(3):
        replay.call(by(RESIDENT), moments, words, filters, True)
    loaded, = launch._loaded._entries.values()
    assert not loaded.captured
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    replay.call(by(RESIDENT), moments, words, filters, True)
    assert loaded.captured
