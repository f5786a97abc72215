"""The calls of the CUDA driver, received by C functions with the driver's own prototypes."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from bitkernels.backends.cuda import compiler, kernels, maps
from bitkernels.backends.cuda.driver import Driver, DriverError
from bitkernels.backends.cuda.spec import Params, linear_spec
from bitkernels_tests import cuda_emulator
from bitkernels_tests.driver_stub import StubDriver

if not cuda_emulator.available():
    pytest.skip(f"no C compiler ({cuda_emulator.COMPILER})", allow_module_level=True)

KERNEL, SPEC = kernels.BULK[0], linear_spec(4, 8, 128, 16)


@pytest.fixture
def driver(monkeypatch) -> StubDriver:
    monkeypatch.setattr(compiler, "compile",
                        lambda *a, **k: compiler.Binary(b"\x7fELF and so on", ""))
    return StubDriver()


def in_a_thread(call):
    """What a call returns, or raises, in a thread that nothing ran in before."""
    found: list = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def launch(driver, function, words=None, shared=KERNEL.shared) -> None:
    params = Params(rows=300) if words is None else Params(words=words.data_ptr(), rows=300)
    driver.launch(function, 77, KERNEL.threads, shared, 0x7FFF12345678, params)


def test_a_launch_arrives_as_it_was_meant(driver):
    assert driver.version() == (13, 1)
    driver.bind(0)
    function = driver.build(KERNEL, SPEC, "sm_90a")
    words = torch.zeros(300, 4, dtype=torch.int32)
    with driver.watching(words):
        launch(driver, function, words)
    assert driver.seen() == [KERNEL.shared, 77, KERNEL.threads, KERNEL.shared, 0x7FFF12345678,
                             words.data_ptr()]


class Encoded(ctypes.Structure):
    """What the stub puts into a map (emulator/tensor_map.h)."""

    _fields_ = [("base", ctypes.c_uint64), ("size", ctypes.c_uint64 * 5),
                ("stride", ctypes.c_uint64 * 4), ("box", ctypes.c_uint16 * 5),
                ("element", ctypes.c_uint8), ("rank", ctypes.c_uint8),
                ("swizzled", ctypes.c_uint8)]


def encoded(driver, address: int, geometry: maps.Geometry) -> tuple:
    found = Encoded.from_buffer_copy(driver.tensor_map(address, geometry))
    rank = found.rank
    return found.base, maps.Geometry(
        found.element, tuple(found.size[:rank]), tuple(found.stride[:rank - 1]),
        tuple(found.box[:rank]), bool(found.swizzled))


BATCHED = maps.Geometry(8, (28, 14, 3), (224, 3136), (30, 4, 1))
FIVE = maps.Geometry(1, (16, 14, 14, 2, 3), (32, 448, 16, 6272), (16, 15, 8, 2, 1))


@pytest.mark.parametrize("geometry", (
    maps.matrix(300, 16, 128), BATCHED, FIVE, maps.Geometry(4, (36, 2), (144,), (4, 2)),
    maps.Geometry(1, (288, 2, 4, 4, 5), (288, 2304, 576, 9216), (128, 2, 4, 4, 4), True)), ids=str)
def test_maps_arrive_as_they_were_meant(driver, geometry):
    """And are kept by address and geometry."""
    words = torch.zeros(5000, dtype=torch.int32)
    assert geometry.legal and encoded(driver, words.data_ptr(), geometry) == (
        words.data_ptr(), geometry)
    first = driver.tensor_map(words.data_ptr(), geometry)
    assert driver.tensor_map(words.data_ptr(), geometry) is first
    for other in (words.data_ptr() + 16, geometry), (words.data_ptr(), geometry._replace(
            sizes=(*geometry.sizes[:-1], geometry.sizes[-1] + 1))):
        assert encoded(driver, *other) == other and driver.tensor_map(*other) is not first


@pytest.mark.parametrize("geometry", (
    BATCHED._replace(strides=(224, 3144)), BATCHED._replace(strides=(224, 2**40)),
    BATCHED._replace(box=(258, 4, 1)), BATCHED._replace(box=(29, 4, 1)),
    BATCHED._replace(box=(30, 0, 1)), BATCHED._replace(sizes=(28, 0, 3)),
    BATCHED._replace(sizes=(28, 14, 2**32 + 1))), ids=str)
def test_maps_that_are_not_legal_are_refused(driver, geometry):
    assert not geometry.legal
    with pytest.raises(DriverError, match="cuTensorMapEncodeTiled of .*: invalid argument"):
        driver.tensor_map(4096, geometry)


def test_maps_at_addresses_that_are_not_aligned_are_refused(driver):
    with pytest.raises(DriverError, match="at 0x1008: invalid argument"):
        driver.tensor_map(4096 + 8, BATCHED)
    with pytest.raises(DriverError, match="invalid argument"):  # a swizzle is of 128 bytes
        driver.tensor_map(4096, BATCHED._replace(swizzled=True))


def test_an_early_launch_is_the_same_launch(driver):
    """By cuLaunchKernelEx, whose structures are laid out as in cuda.h."""
    driver.bind(0)
    function = driver.build(KERNEL, SPEC, "sm_90a")
    words = torch.zeros(300, 4, dtype=torch.int32)
    params = Params(words=words.data_ptr(), rows=300)
    with driver.watching(words):
        for early in (False, True):
            driver.launch(function, 77, KERNEL.threads, KERNEL.shared, 0x7FFF12345678, params,
                          early=early)
            assert driver.seen() == [KERNEL.shared, 77, KERNEL.threads, KERNEL.shared,
                                     0x7FFF12345678, words.data_ptr()]
            assert driver.early == early
        with pytest.raises(DriverError, match="cuLaunchKernelEx: invalid argument"):
            driver.launch(function, 77, KERNEL.threads, KERNEL.shared + 16, 0, params, early=True)


def test_a_thread_without_a_context_gets_the_devices(driver):
    driver.bind(0)
    function = driver.build(KERNEL, SPEC, "sm_90a")
    for call in (lambda: launch(driver, function), lambda: driver.build(KERNEL, SPEC, "sm_90a")):
        with pytest.raises(DriverError, match="invalid device context"):
            in_a_thread(call)

    def bound() -> None:
        driver.bind(0)
        launch(driver, function)

    in_a_thread(bound)
    assert driver.launches == 1


def test_the_context_that_a_thread_has_stays(driver):
    driver.bind(1)
    driver.bind(0)
    function = driver.build(KERNEL, SPEC, "sm_90a")

    def other() -> None:
        driver.bind(0)
        launch(driver, function)

    with pytest.raises(DriverError, match="invalid resource handle"):
        in_a_thread(other)
    launch(driver, function)


def test_what_a_driver_would_not_forgive(driver):
    driver.bind(0)
    function = driver.build(KERNEL, SPEC, "sm_90a")
    words = torch.zeros(300, 4, dtype=torch.int32)
    with pytest.raises(DriverError, match="an illegal memory access"):
        launch(driver, function, words)
    with driver.watching(words), pytest.raises(DriverError, match="invalid argument"):
        launch(driver, function, words, shared=KERNEL.shared + 16)


def test_code_that_does_not_load_is_compiled_once_more(driver, monkeypatch):
    asked = []

    def compile(*source, renew):
        asked.append(renew)
        good = renew and len(asked) == 2
        return compiler.Binary(b"\x7fELF" if good else b"of another driver", "log" if renew else "")

    monkeypatch.setattr(compiler, "compile", compile)
    arguments = KERNEL, SPEC, "sm_90a"
    driver.bind(0)
    assert driver.build(*arguments) and asked == [False, True]
    with pytest.raises(DriverError, match="cuModuleLoadData: invalid argument"):
        driver.build(*arguments)
    assert asked == [False, True] * 2


def test_an_error_says_which_call_and_why(driver):
    with pytest.raises(DriverError, match=r"cuDeviceGet: invalid argument \(1\)"):
        driver.bind(3)
    with pytest.raises(DriverError, match="cuTensorMapEncodeTiled of .*12.*: invalid argument"):
        driver.tensor_map(torch.zeros(300, 3, dtype=torch.int32).data_ptr(),
                          maps.matrix(300, 12, 128))


def test_a_machine_without_the_driver():
    with pytest.raises(OSError):
        Driver("libcuda_that_is_not_there.so")
