"""Loaded kernels that go, and those that must not, on a driver that refuses what is unloaded."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from bitkernels.backends.cuda import compiler, dispatch, kernels, launch
from bitkernels.backends.cuda.driver import DriverError, Loaded
from bitkernels.backends.cuda.recent import Recent
from bitkernels_tests import cuda_emulator
from bitkernels_tests.cases import words_of
from bitkernels_tests.driver_stub import StubDriver

if not cuda_emulator.available():
    pytest.skip(f"no C compiler ({cuda_emulator.COMPILER})", allow_module_level=True)

CPU = torch.device("cpu")
KERNEL = kernels.ALL["mma_64x32"]  # and `prepare` for each shape


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(compiler, "compile", lambda *a, **k: compiler.Binary(b"\x7fELF", ""))
    launch.clear()
    stub = StubDriver()
    monkeypatch.setattr(launch, "_driver", stub)
    monkeypatch.setattr(launch._loaded, "most", 4)
    monkeypatch.setattr(Loaded, "_kept", set())
    yield stub
    launch.clear()
    dispatch.clear()


def call(driver, channels: int) -> None:
    words, filters = words_of(70, channels), words_of(40, channels)
    with driver.watching(words, filters):
        launch.packed_linear(KERNEL, words, filters, channels)


def names() -> set[int]:
    return {spec.channels for _, spec, _ in launch._loaded._entries}


def test_the_least_recent_shapes_are_unloaded(driver):
    for channels in (32, 64, 32, 96):
        call(driver, channels)
    assert names() == {32, 96} and driver.unloaded == 2
    call(driver, 64)  # loaded anew
    assert names() == {64, 96} and driver.launches == 2 * 5


def test_what_is_unloaded_is_refused(driver):
    """By this file's driver: what the other tests rely on."""
    driver.bind(0)
    spec = launch.linear_spec(1, 8, 32, 4)
    loaded = driver.build(KERNEL, spec, "sm_90a")
    driver.unload(*loaded._end.peek()[2])
    assert driver.unloaded == 1
    with pytest.raises(DriverError, match="invalid resource handle"):
        driver.launch(loaded, 1, KERNEL.threads, 0, 0, launch.Params())


def test_what_a_graph_has_captured_stays(driver, monkeypatch):
    call(driver, 32)
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    call(driver, 32)
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    captured = [kernel for kernel in launch._loaded._entries.values() if kernel.captured]
    assert len(captured) == 2
    for channels in range(64, 320, 32):
        call(driver, channels)
    assert 32 in names() and len(launch._loaded) == 2 + 4
    launch.clear()
    gc.collect()
    monkeypatch.setattr(launch, "_driver", driver)
    for kernel in captured:  # as the graph replays it
        driver.launch(kernel, 1, KERNEL.threads, 0, 0, launch.Params())


def test_a_kernel_in_use_is_not_unloaded_under_its_launch(driver, monkeypatch):
    """Other threads displace it between its look-up and its launch."""
    bind = driver.bind

    def displaced(index: int) -> None:
        monkeypatch.setattr(driver, "bind", bind)
        bind(index)
        other = threading.Thread(target=lambda: [call(driver, c) for c in (64, 96, 128)])
        other.start()
        other.join()

    call(driver, 32)
    monkeypatch.setattr(driver, "bind", displaced)
    call(driver, 32)
    assert 32 not in names()


def test_it_is_unloaded_in_its_own_context(driver, monkeypatch):
    monkeypatch.setattr(launch, "_index", lambda device: 1)
    thread = threading.Thread(target=lambda: call(driver, 32))
    thread.start()
    thread.join()
    monkeypatch.setattr(launch, "_index", lambda device: 0)
    call(driver, 64)
    call(driver, 96)
    assert names() == {64, 96} and driver.unloaded == 2
    call(driver, 64)  # this thread's context is what it was


def test_beside_a_capture_of_another_thread(driver):
    """Loading does not end it, and what cannot be waited for stays loaded."""
    call(driver, 32)
    call(driver, 64)
    with driver.capture_elsewhere():
        call(driver, 96)
    assert driver.unloaded == 0 and names() == {64, 96}


def test_recent():
    table: Recent[int, str] = Recent(2, lambda value: value == "kept")
    for key, value in ((1, "kept"), (2, "b"), (3, "c"), (4, "d")):
        table.put(key, value)
    assert [table.get(key) for key in (1, 2, 3, 4)] == ["kept", None, "c", "d"]
    table.put(5, "kept")
    assert len(table) == 4, "what is kept takes no room from the others"
    table.get(3)
    table.put(6, "e")
    assert [table.get(key) for key in (3, 4, 5, 6)] == ["c", None, "kept", "e"]
    table.clear()
    assert len(table) == 0


def test_plans_are_few(monkeypatch):
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    monkeypatch.setattr(dispatch, "why_unusable", lambda device: None)
    dispatch.clear()
    monkeypatch.setattr(dispatch._plans, "most", 3)
    for rows in range(1, 9):
        dispatch._plan("packed_linear", (words_of(rows, 64), words_of(8, 64), 64), {}, CPU)
    assert len(dispatch._plans) == 3
    dispatch.clear()
