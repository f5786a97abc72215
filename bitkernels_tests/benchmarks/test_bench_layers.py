"""benchmarks/bench_layers.py: what it counts, and its table."""

from __future__ import annotations

import pytest

from bitkernels.backends import cpu
from bitkernels_tests import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_layers

    return bench_layers


def test_taps_inside_the_image(bench):
    assert bench.inside(7, 3, 1, 1, 1, 7) == 3 * 7 - 2
    assert bench.inside(8, 3, 2, 1, 1, 4) == 3 * 4 - 1
    assert bench.inside(8, 1, 1, 0, 1, 8) == 8
    assert bench.inside(5, 3, 1, 2, 2, 5) == 3 * 5 - 4


def test_limit_is_by_operations(bench):
    """9 operations of an epilogue for 16 outputs, 3 for 512 products."""
    parts = ("scale", "bias", "residual", "shift_in", "slope", "shift_out", "words")
    shape = bench.Shape(1, 128, 128, 56, 1, parts, 512 * 128, 512)
    assert shape.operations() == 9
    assert shape.limit() == pytest.approx(3 * 128 / (3 * 128 + 9 * 32))


@pytest.mark.skipif(bool(cpu.why_not), reason="needs the C++ engine")
def test_table(bench, capsys):
    bench.main(["quicknet_small", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    found = [line.split(" | ")[:2] for line in lines if line.startswith("| 3x3")]
    assert ["| 3x3:64->64@28", "3"] in found and ["| 3x3:512->512@7", "3"] in found
