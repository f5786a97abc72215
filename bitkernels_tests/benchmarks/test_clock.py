"""benchmarks/gpu/clock.py without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import time

import pytest
import torch

from bitkernels.backends.cuda import launch
from bitkernels_tests import ROOT


@pytest.fixture
def clock(monkeypatch):
    for folder in ("", "gpu"):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / folder))
    return importlib.import_module("clock")


def test_the_second_half_counts(clock):
    early, late = "345, 90.10, 0x0000000000000001\n", "1290, 698.30, 0x0000000000000004\n"
    assert clock.read(early * 3 + late * 4) == {
        "MHz": 1290.0, "W": 698.3, "lowered by": ["0x0000000000000004"]}


@pytest.mark.parametrize("text", ["", "Unable to determine\n", "[N/A], [N/A], [N/A]\n"])
def test_a_gpu_that_does_not_say(clock, text):
    assert clock.read(text) == {}


def test_every_run_is_a_line(clock, monkeypatch, tmp_path, capsys):
    """With nvidia-smi's place taken, on tensors of this processor."""
    asked = []

    class Graph:
        def replay(self):
            time.sleep(1e-3)

    def captured(call, calls):
        call(0)
        return Graph()

    def packed_linear(kernel, words, filters, channels, *, real, packed):
        assert words.shape == filters.shape == (channels, channels // 32) and packed and not real
        asked.append((kernel.name, channels, bool(words.any())))

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1290, 698.30, 0x4'\necho '1300, 698.30, 0x4'\n"
                    "exec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(clock, "QUERY", (str(tool),))
    monkeypatch.setattr(clock, "captured", captured)
    monkeypatch.setattr(clock, "SECONDS", 0.2)
    monkeypatch.setattr(clock, "SIZES", (64,))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(launch, "packed_linear", packed_linear)
    operands = clock.operands
    zeros, randint = torch.zeros, torch.randint
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **kw: zeros(*a, **kw))
    monkeypatch.setattr(torch, "randint", lambda *a, device=None, **kw: randint(*a, **kw))
    assert operands("zeros", 64)[0].device.type == "cpu"
    clock.main([str(tmp_path / "out")])
    rows = [json.loads(line) for line in (tmp_path / "out" / "clock.jsonl").read_text().split("\n")
            if line]
    assert [(r["kernel"], r["size"], r["bits"] != "zeros") for r in rows] == asked
    assert len(rows) == 2 * len(clock.KERNELS)
    assert all(r["us"] > 0 and r["MHz"] == 1300.0 for r in rows)
    assert rows[0]["kernel"] in capsys.readouterr().out
