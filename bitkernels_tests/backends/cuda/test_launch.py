"""The launchers of csrc/cuda on a driver that refuses what a GPU's would."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitkernels.backends.cuda import compiler, dispatch, kernels, launch
from bitkernels.backends.cuda.driver import DriverError
from bitkernels_tests import cuda_emulator
from bitkernels_tests.backends.cuda.test_driver import in_a_thread
from bitkernels_tests.cases import ConvCase, dyadic, words_of
from bitkernels_tests.driver_stub import StubDriver

if not cuda_emulator.available():
    pytest.skip(f"no C compiler ({cuda_emulator.COMPILER})", allow_module_level=True)

CPU = torch.device("cpu")
KERNELS = [kernels.ALL[name] for name in ("mma_64x32", "resident_64x64", "bulk_128x128",
                                           "resident_64x64_bulk")]


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(compiler, "compile", lambda *a, **k: compiler.Binary(b"\x7fELF", ""))
    launch.clear()
    dispatch.clear()
    stub = StubDriver()
    monkeypatch.setattr(launch, "_driver", stub)
    yield stub
    launch.clear()
    dispatch.clear()


def linear(driver, kernel, channels=256, **kw):
    words, filters = words_of(70, channels), words_of(40, channels)
    with driver.watching(words, filters, *kw.values()):
        return launch.packed_linear(kernel, words, filters, channels, **kw)


def conv(driver, kernel, channels=128, **kw):
    case = ConvCase(channels=channels, out_channels=40)
    words, filters = case.words()
    with driver.watching(words, filters, *kw.values()):
        return launch.packed_conv2d(kernel, words, filters, channels, *case.args, **kw)


def launches(kernel) -> int:
    return 1 if kernel.resident else 2  # prepare and the product


CALLS = [(op, kernel) for op, kernel in itertools.product((linear, conv), KERNELS)
         if not kernel.bulk or kernel.resident == (op is conv)]


@pytest.mark.parametrize("op,kernel", CALLS, ids=lambda x: getattr(x, "__name__", None) or x.name)
def test_each_thread_gets_a_context(op, kernel, driver):
    """Autograd's threads and a server's have none; the first call compiles, the second does not."""
    for number in (1, 2):
        in_a_thread(lambda: op(driver, kernel))
        assert driver.launches == number * launches(kernel)
    assert not driver.bound
    op(driver, kernel)
    assert driver.bound and driver.launches == 3 * launches(kernel)


def test_the_peak_of_each_thread_gets_a_context(driver, monkeypatch):
    monkeypatch.setattr(launch, "_stream", lambda device: 9)
    with driver.watching():
        call, _ = launch.peak(CPU)
        in_a_thread(call)
        call()
    assert driver.launches == 2 and driver.seen()[4] == 9


def test_a_kernel_is_loaded_once_for_each_device(driver, monkeypatch):
    """A function of one device's context does not run in another's."""
    built = []
    build = driver.build
    monkeypatch.setattr(driver, "build", lambda *a: built.append(a[0].name) or build(*a))
    for index in (0, 1, 0, 1):
        monkeypatch.setattr(launch, "_index", lambda device, index=index: index)
        in_a_thread(lambda: linear(driver, KERNELS[0]))
    assert built == [KERNELS[0].name, "prepare"] * 2


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_only_kernels_that_wait_for_prepare_start_early(kernel, driver):
    (conv if kernel.resident else linear)(driver, kernel)
    assert driver.early == (kernel.bulk or kernel.resident)


@pytest.mark.parametrize("kernel", KERNELS[:2], ids=lambda k: k.name)
def test_every_pointer_is_of_a_tensor_that_lives(kernel, driver):
    """Also of the copies that the launcher makes of what does not lie as kernels read it."""
    def vector():
        return dyadic(80)[::2]

    parts = dict(scale=vector(), bias=vector(), slope=vector(), shift_in=vector(),
                 shift_out=vector(), sign_shift=vector())
    shape = ConvCase(channels=128, out_channels=40).output_shape
    residual = dyadic(*shape[:-1], shape[-1] + 1)[..., 1:]
    conv(driver, kernel, **parts, residual=residual, packed=True)
    low = torch.zeros(2, 80, dtype=torch.int32)[:, ::2]
    linear(driver, kernel, threshold=low, real=False, packed=True)
    assert driver.launches == 2 * launches(kernel)


def test_memory_that_is_gone_is_noticed(driver, monkeypatch):
    """By this file's driver: what the test above relies on."""
    ready = launch._aligned
    monkeypatch.setattr(launch, "_aligned", lambda t: _Gone(ready(t)))
    with pytest.raises(DriverError, match="illegal memory access"):
        linear(driver, KERNELS[0], residual=dyadic(70, 80)[:, ::2])


class _Gone:
    """The address and type of a tensor that is let go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.address = tensor.dtype, tensor.data_ptr()

    def data_ptr(self) -> int:
        return self.address
