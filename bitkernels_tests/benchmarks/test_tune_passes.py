"""benchmarks/gpu/tune_passes.py without a GPU: bytes, candidates, results."""

from __future__ import annotations

import importlib
import json
import os
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled elsewhere", allow_module_level=True)

from bitkernels.backends.triton import dispatch, passes, sums
from bitkernels.ops._record import OPERATORS
from bitkernels_tests import ROOT


@pytest.fixture
def script(monkeypatch):
    for folder in ("", "gpu"):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / folder))
    return importlib.import_module


class Recorder:
    """In the place of a kernel: keeps the tensors that it got."""

    def __init__(self, seen: list[torch.Tensor]) -> None:
        self.seen = seen

    def __getitem__(self, grid):
        return lambda *args, **kw: self.seen.extend(a for a in args if isinstance(a, torch.Tensor))


@pytest.fixture
def moved(monkeypatch):
    """The bytes of what a pass reads and writes, beside vectors and partial sums."""
    seen: list[torch.Tensor] = []
    for name in dispatch.OPERATORS:
        module = importlib.import_module(
            f"bitkernels.backends.triton.{OPERATORS[name].file}")
        for kernel in [k for k in vars(module) if k.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Recorder(seen))
    monkeypatch.setattr(sums, "reduce_kernel", Recorder([]))

    activations = torch.float16, torch.int16, torch.int32, torch.int8, torch.uint8

    def count(call) -> int:
        seen.clear()
        call()
        return sum(t.numel() * t.element_size() for t in seen if t.dtype in activations)

    return count


@pytest.mark.parametrize("channels,side", [(64, 56), (256, 14)])
def test_every_pass_moves_each_activation_once(script, moved, channels, side):
    tune = script("tune_passes")
    assert set(tune.TRAFFIC) == set(passes.PASSES)
    operands = tune.Operands(channels, side, 8, "cpu")
    for name, per_element in tune.TRAFFIC.items():
        assert moved(operands.call(name)) == per_element * operands.x.numel(), name


def test_candidates_begin_with_the_present_tile(script):
    tune = script("tune_passes")
    for name, present in passes.PASSES.items():
        found = list(tune.candidates(name))
        assert found[0] == present and len(set(found)) == len(found) > 3
        assert (name in tune.WALK) == (len({tile.programs for tile in found}) > 1)
        assert name not in tune.SUMS or all(tile.programs for tile in found)


def test_the_best_is_right_and_the_fastest_over_all_shapes(script):
    tune = script("tune_passes")

    def row(elements, us, equal=True):
        return {**passes.Pass(elements)._asdict(), "us": us, "equal": equal}

    found = {"64@56": [row(1024, 10.0), row(2048, 8.0), row(4096, 1.0, False)],
             "256@14": [row(1024, 4.0), row(2048, 4.4), {"error": "no room"}]}
    tile, ratio = tune.best(found)
    assert tile == passes.Pass(2048)._asdict() and ratio == pytest.approx(0.95)
    assert tune.best({"64@56": [{"error": "no room"}]}) is None


def test_what_is_faster_is_written_into_the_source(script):
    tune, source = script("tune_passes"), Path(passes.__file__).read_text()
    faster = passes.PASSES["unpack"]._replace(elements=512, stages=2)
    chosen = {name: {**tile._asdict(), "time of the present": ratio}
              for name, tile, ratio in (("unpack", faster, 0.9), ("rsign", faster, 0.99))}
    space: dict = {"__name__": "passes"}
    exec(tune.write(chosen, source), space)
    assert space["PASSES"] == {**passes.PASSES, "unpack": faster}


class Pool:
    def __init__(self, processes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map_async(self, function, shares, size):
        assert len(shares) == shares[0][2]
        return types.SimpleNamespace(wait=lambda seconds: None, ready=lambda: True,
                                     successful=lambda: True)


def test_the_tuner_writes_what_it_measured(script, monkeypatch, tmp_path, capsys):
    tune = script("tune_passes")
    present = dict(passes.PASSES)
    monkeypatch.setattr(tune, "SHAPES", ((64, 4), (32, 2)))
    monkeypatch.setattr(tune, "BATCH", 2)
    monkeypatch.setattr(tune, "TURNS", 1 << 15)
    monkeypatch.setattr(tune.multiprocessing, "get_context",
                        lambda kind: types.SimpleNamespace(Pool=Pool))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
    called = []
    monkeypatch.setattr(tune.gpu_time, "graph",
                        lambda call, calls, repeats: [called.append(call()) or 1.0])
    monkeypatch.setattr(tune, "copy_rate", lambda elements: 4e12)
    real = tune.Operands
    monkeypatch.setattr(tune, "Operands", lambda c, side, n, device: real(c, side, n, "cpu"))
    monkeypatch.setattr(real, "call", lambda self, name: lambda: self.x)
    tune.main([str(tmp_path / "new"), "--only", "block_forward", "unpack"])
    record = json.loads((tmp_path / "new" / "passes.json").read_text())
    assert set(record["passes"]["unpack"]) == {"64@4", "32@2"}
    assert record["best"]["unpack"]["time of the present"] == 1.0
    assert len(called) == 2 * (len(list(tune.candidates("block_forward")))
                               + len(list(tune.candidates("unpack"))))
    assert passes.PASSES == present and "best unpack" in capsys.readouterr().out
