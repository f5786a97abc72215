"""Fixtures of the whole test-suite: a fixed seed, the devices to test, markers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import bitkernels  # noqa: F401

os.environ.setdefault("BITKERNELS_TRITON_AUTOTUNE", "0")  # fixed configurations, in children too


def available_devices() -> list[str]:
    """The devices under test: BITKERNELS_TEST_DEVICE (comma separated), or all there are."""
    chosen = os.environ.get("BITKERNELS_TEST_DEVICE")
    if chosen:
        return chosen.split(",")
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Skipped:
    """Writes the skipped tests and files, a line each, for `pytest @FILE` with what they lacked.
    Tests that run pytest write theirs, before the outer one does."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, set()

    def pytest_collectreport(self, report):
        self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.found.add(report.nodeid)

    def pytest_sessionfinish(self):
        self.path.write_text("".join(f"{test}\n" for test in sorted(self.found)))


def pytest_configure(config):
    if "SKIPPED_TESTS" in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skipped(Path(os.environ["SKIPPED_TESTS"])))
    # The tests' values hold exact zeros on purpose; nn/test_pack.py asks for the warning itself.
    config.addinivalue_line("filterwarnings", "ignore:.* of the weights are 0:UserWarning")
    for marker in ("cuda: needs an NVIDIA or AMD GPU, skipped without one",
                   "long: takes a minute, so it is the first to start",
                   "every: left out, as it differs little from its neighbours or takes minutes"):
        config.addinivalue_line("markers", marker)
    # Real gradients and their oracles are library calls: with all 24 bits of float32 on a GPU too.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(items):
    shard, count = map(int, os.environ.get("BITKERNELS_TEST_SHARD", "0/1").split("/"))
    items[:] = items[shard::count]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(params=available_devices())
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)


@pytest.fixture
def keeps_threads():
    """Puts the number of threads back after the test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread():
    """For tensors too small for threads, which cost more than all the rest of such tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def torchvision():
    """torchvision. One built for another build of torch imports once two operators have names.

    Its wheels on PyPI are built for CUDA; a torch for CPUs cannot load their operators, of which
    pictures and transforms use none.
    """
    library = None
    try:
        import torchvision
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    yield torchvision
