"""The calls of the CUDA driver, received by C functions with the driver's own prototypes."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from bitkernels.backends.cuda import compiler, kernels
from bitkernels.backends.cuda.driver import Driver, DriverError
from bitkernels.backends.cuda.spec import Params, linear_spec
from bitkernels_tests import cuda_emulator

if not cuda_emulator.available():
    pytest.skip(f"no C compiler ({cuda_emulator.COMPILER})", allow_module_level=True)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    library = tmp_path / "libcuda_stub.so"
    subprocess.run([cuda_emulator.COMPILER, "-x", "c", "-shared", "-fPIC", "-w", "-o", library,
                    cuda_emulator.FOLDER / "driver_stub.c"], check=True)
    monkeypatch.setattr(compiler, "compile",
                        lambda *a, **k: compiler.Binary(b"\x7fELF and so on", ""))
    found = Driver(str(library))
    found.lib.stub_seen.restype = ctypes.c_uint64
    return found


def test_a_launch_arrives_as_it_was_meant(driver):
    kernel = kernels.BULK[0]
    assert driver.version() == (13, 1)
    driver.bind(0)
    function = driver.build(kernel, linear_spec(4, 8, 128, 16), "sm_90a")
    words = torch.zeros(300, 4, dtype=torch.int32)
    map = driver.tensor_map(words, 300, 16, 128)
    assert list(map.opaque[:5]) == [words.data_ptr(), 16, 300, 16, 128]
    params = Params(words=words.data_ptr(), rows=300)
    driver.launch(function, 77, kernel.threads, kernel.shared, 0x7FFF12345678, params, map, map)
    seen = [driver.lib.stub_seen(i) for i in range(7)]
    assert seen == [kernel.shared, 77, kernel.threads, kernel.shared, 0x7FFF12345678,
                    words.data_ptr(), 128]


def test_code_that_does_not_load_is_compiled_once_more(driver, monkeypatch):
    asked = []

    def compile(*source, renew):
        asked.append(renew)
        good = renew and len(asked) == 2
        return compiler.Binary(b"\x7fELF" if good else b"of another driver", "log" if renew else "")

    monkeypatch.setattr(compiler, "compile", compile)
    arguments = kernels.BULK[0], linear_spec(4, 8, 128, 16), "sm_90a"
    assert driver.build(*arguments) and asked == [False, True]
    with pytest.raises(DriverError, match="cuModuleLoadData: invalid argument"):
        driver.build(*arguments)
    assert asked == [False, True] * 2


def test_an_error_says_which_call_and_why(driver):
    with pytest.raises(DriverError, match=r"cuDeviceGet: invalid argument \(1\)"):
        driver.bind(3)
    with pytest.raises(DriverError, match="cuTensorMapEncodeTiled: invalid argument"):
        driver.tensor_map(torch.zeros(300, 3, dtype=torch.int32), 300, 12, 128)


def test_a_machine_without_the_driver():
    with pytest.raises(OSError):
        Driver("libcuda_that_is_not_there.so")
