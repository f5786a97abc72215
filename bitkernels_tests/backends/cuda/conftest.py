"""What the tests of csrc/cuda share."""

from __future__ import annotations

import pytest
import torch

from bitkernels.backends.cuda import dispatch, launch
from bitkernels_tests import cuda_emulator


@pytest.fixture
def emulated(monkeypatch):
    """The emulator in the driver's place, as a GPU of two multiprocessors."""
    dispatch.clear()
    driver = cuda_emulator.EmulatedDriver(seed=torch.randint(1000, ()).item())
    monkeypatch.setattr(launch, "_driver", driver)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    yield driver
    dispatch.clear()
