"""A processor that claims to be a GPU, for the benchmarks: half types, backends, warm times.

`cuda` is csrc/cuda on the emulator, by the real plan and launchers; `triton` is the processor's own
backend.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bitkernels.backends.cuda import dispatch, launch
from bitkernels.backends.cuda.recent import Recent
from bitkernels.backends.trust import Usable
from bitkernels_tests import ROOT, cuda_emulator

BENCHMARKS = ROOT / "benchmarks"
KERNEL = "mma_64x32"
BANDWIDTH = 1e9


def install(monkeypatch, unusable: str | None = None) -> cuda_emulator.EmulatedDriver:
    """Makes it the device of every benchmark; returns the driver that csrc/cuda runs on.

    `unusable` says why csrc/cuda does not run.
    """
    if not cuda_emulator.available():
        pytest.skip(f"no C++ compiler ({cuda_emulator.COMPILER})")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    class Pretended(common.CpuDevice):
        backends, batches, compiles = common.GpuDevice.backends, (1, 2), False
        baseline, int8 = "bf16", (torch.qint8, 0)
        reals, rivals = common.GpuDevice.reals, common.GpuDevice.rivals
        measure_warm = common.CpuDevice.measure
        peak_rate = common.GpuDevice.peak_rate

        def set_threads(self, threads):
            pass

        def copy_bandwidth(self):
            return BANDWIDTH

        def popcount_rate(self):
            return None

        def peak_memory(self, call):
            return 1

    driver = cuda_emulator.EmulatedDriver()
    monkeypatch.setattr(dispatch, "usable", Usable())
    for module, name in ((dispatch, "_plans"), (launch, "_loaded")):
        monkeypatch.setattr(module, name, Recent(64))
    monkeypatch.setattr(common, "pick_device", lambda name: Pretended())
    monkeypatch.setattr(dispatch, "why_unusable", lambda device: unusable)
    monkeypatch.setattr(dispatch, "_trusted", lambda *arguments: True)
    monkeypatch.setattr(launch, "_driver", driver)
    monkeypatch.setattr(launch, "peak", lambda device: (lambda: None, 10**6))
    monkeypatch.setenv("BITKERNELS_CUDA_KERNEL", KERNEL)
    for name in dispatch.OPS:
        monkeypatch.setattr(torch.ops.bitkernels, name, _routed(name))
    return driver


def _routed(name: str):
    """The operator as a GPU dispatches it: csrc/cuda first, then what runs here."""
    here = getattr(torch.ops.bitkernels, name)

    def overload(which: str, real: bool, packed: bool):
        def call(*args, **kw):
            found = dispatch.attempt(name, args, {"real": real, "packed": packed, **kw})
            if found is None:
                return getattr(here, which)(*args, **kw)
            return found if real and packed else found[0] if real else found[1]

        return call

    kinds = {"default": (True, False), "packed": (False, True), "both": (True, True)}
    return SimpleNamespace(**{which: overload(which, *kind) for which, kind in kinds.items()})
