"""benchmarks/bench_models.py on tiny networks: every provider, files, a GPU that is pretended."""

from __future__ import annotations

import copy
import csv
import json
import math
import sys
import types

import pytest
import torch
from torch import nn

import bitkernels
from bitkernels import models
from bitkernels.models.bnext import BNext
from bitkernels.quantizers import SteSign
from bitkernels_tests import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import bench_models
import larq_interpreter
import model_networks
import model_providers
import record
import resident

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """QuickNet, MobileNetV2 and their emulation in a few layers; nothing is compiled."""
    def network(name):
        return models.QuickNet(10, blocks=(1, 1), filters=(32, 64))

    monkeypatch.setattr(model_networks, "create_model", network)
    monkeypatch.setattr(model_networks, "INVERTED", ((1, 8, 1, 1), (2, 8, 2, 2)))
    monkeypatch.setattr(torch, "compile", lambda module, **kw: module)
    monkeypatch.setattr(bench_models, "COMPILING", math.inf)


def test_all_providers_and_files(tmp_path, capsys):
    rows = bench_models.main(["--quick", "--compile", "--models", "quicknet", "mobilenet_v2",
                              "--threads", "1", "--size", "32", "--budget", "1", "--device", "cpu",
                              "--output", str(tmp_path)])
    providers = ["converted", "model", "emulation", "emulation compiled", "emulation bf16",
                 "emulation bf16 compiled", "fp32", "fp32 compiled", "bf16", "bf16 compiled",
                 "int8"]
    assert [row.provider for row in rows if row.batch == 1][:len(providers)] == providers
    assert {row.batch for row in rows} == {1, 2} and not any(row.wrong for row in rows)
    by_name = {(row.provider, row.batch): row for row in rows}
    assert by_name["converted", 1].file_bytes < by_name["emulation", 1].file_bytes
    assert by_name["converted", 1].close == "8/8"
    assert by_name["int8", 1].file_bytes < by_name["fp32", 1].file_bytes / 2
    assert all(0 < row.least <= row.times.p50 and row.images > 0 for row in rows)
    said = capsys.readouterr().out
    assert "quicknet" in said and f"wrote {tmp_path}/models.csv" in said
    with (tmp_path / "models.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows)
    fastest = min(float(line["p50"]) for line in written if line["batch"] == "1"
                  and line["kernel_provider"].startswith("emulation"))
    ours = next(line for line in written if line["kernel_provider"] == "converted")
    assert float(ours["over_fastest_emulation"]) == pytest.approx(fastest / float(ours["p50"]),
                                                                  rel=1e-3)
    found = json.loads((tmp_path / "models.json").read_text())
    assert {"device", "torch", "notes"} <= set(found["environment"])
    assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_late_is_not_compiled(monkeypatch):
    notes: dict[str, str] = {}
    network = model_providers.binary("quicknet", 32, 2, bench_models.common.CpuDevice())
    found = model_providers.candidates(network, 1, True, notes, lambda: True)
    assert list(found) == ["converted", "model", "emulation", "emulation bf16"]
    assert "quicknet emulation bf16 batch 1" in notes["not compiled for lack of time"]


def test_what_cannot_be_imported_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    notes: dict[str, str] = {}
    found = model_providers.real("mobilenet_v2", 32, 2, bench_models.common.CpuDevice(), True,
                                 notes)
    assert "int8" in found.forms and "int8 pt2e" not in found.forms
    assert notes["int8 pt2e left out"].startswith("ModuleNotFoundError")


class Off(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, x):
        return self.model(x) * 1.01


def test_wrong_logits_fail(monkeypatch):
    monkeypatch.setattr(model_networks, "emulation", Off)
    with pytest.raises(SystemExit, match="logits differ from the model's: quicknet emulation"):
        bench_models.main(["--quick", "--models", "quicknet", "--threads", "1", "--size", "32",
                           "--budget", "0.2", "--device", "cpu"])


@pytest.mark.parametrize("make", [
    lambda: models.ReActNet18(10, blocks=(1, 1), channels=(32, 64)),
    lambda: models.BiRealNet(10, blocks=(1, 1), channels=(32, 64)),
    lambda: BNext(10, channels=(32, 64, 64), stem="cifar")])
def test_the_emulation_is_the_network(make):
    torch.manual_seed(0)
    model = model_networks.with_statistics(make(), 32)
    emulated = model_networks.emulation(model)
    assert not [m for m in emulated.modules() if type(m).__module__.startswith("bitkernels.nn")
                and not isinstance(m, (bitkernels.nn.NoShortcut, SteSign))]
    images = torch.randn(8, 3, 32, 32)
    near = [bench_models.common.close(a, b, 1e-4)
            for a, b in zip(emulated(images), model(images), strict=True)]
    assert sum(near) >= 6


def test_the_memory_of_a_call_is_counted():
    if resident.peak(lambda: None) is None:
        pytest.skip("this system does not tell the memory of a process")
    small, large = (resident.peak(lambda n=n: torch.ones(n)) for n in (1 << 10, 1 << 25))
    assert small < 8 << 20 and large > 100 << 20


INTERPRETER = """#!{python}
import json, sys
if "{fails}": sys.exit("no module named tensorflow")
print(json.dumps({{"file_bytes": 7, "peak_bytes": 5, "versions": {{"larq": "1"}}}}), flush=True)
for line in sys.stdin:
    print(flush=True)
"""


@pytest.mark.parametrize("fails", ["", "yes"])
def test_larqs_interpreter_answers_through_a_pipe(tmp_path, fails):
    python = tmp_path / "python"
    python.write_text(INTERPRETER.format(python=sys.executable, fails=fails))
    python.chmod(0o755)
    notes: dict[str, str] = {}
    with model_providers.larq(str(python), "quicknet", tmp_path, 1, 1, notes) as found:
        if fails:
            assert not found and "no module named tensorflow" in notes["larq left out"]
            return
        assert list(found) == ["larq", "larq xnnpack"] and notes["larq"] == "larq 1"
        one = found["larq"]
        assert one.call() == "\n" and one.file_bytes == 7
        assert model_providers.peak_memory(bench_models.common.CpuDevice(), one) == 5
    with model_providers.larq(str(python), "birealnet18", tmp_path, 1, 1, notes) as found:
        assert not found  # not in Larq Zoo's list here
    assert "larq-compute-engine" in larq_interpreter.PACKAGES


class Replayed:
    """In the place of a CUDA graph."""

    def __init__(self, call):
        self.replay = call


def test_a_gpu_replays_graphs(monkeypatch):
    notes: dict[str, str] = {}
    network = model_providers.binary("quicknet", 32, 2, types.SimpleNamespace(type="cpu"))

    def captured(call, calls):
        if "bf16" in notes:
            raise RuntimeError("cannot capture\nthis")
        return Replayed(lambda: call(0))

    monkeypatch.setattr(bench_models.gpu_time, "captured", captured)
    device = bench_models.common.CpuDevice()
    calls = model_providers.candidates(network, 2, False, notes, lambda: False)
    found = bench_models.as_graphs(calls, device, notes)
    assert list(found) == ["converted", "model", "emulation", "emulation bf16"]
    assert torch.equal(found["converted"].call(), calls["converted"].call())
    notes["bf16"] = ""
    assert bench_models.as_graphs(calls, device, notes) == {}
    assert notes["converted in a CUDA graph"] == "cannot capture"


def test_the_part_of_the_gpu_check(clock, tmp_path, monkeypatch):
    from parts import models as part

    monkeypatch.setattr(part.common, "GpuDevice", part.common.CpuDevice)
    monkeypatch.setattr(part, "SIZE", 32)
    monkeypatch.setattr(part, "BATCH", 2)
    part.run(tmp_path)
    rows = [row for row in record.rows(tmp_path, "models") if "key" in row]
    assert [row["key"] for row in rows] == [f"{name} batch 2" for name in part.NETWORKS]
    assert {"converted", "emulation bf16 compiled"} <= set(rows[0]["us"])
    assert rows[0]["wrong"] == rows[0]["errors"] == {} and rows[0]["close"]["converted"] == "8/8"
    assert {"fp32 compiled", "bf16 compiled"} <= set(rows[2]["us"])


@pytest.mark.parametrize("options, message", [
    (("--size", "40"), "--size must be a multiple of 32"), (("--batch", "0"), "--batch must be 1"),
    (("--budget", "0"), "--budget must be more"), (("--models", "vgg"), "invalid choice")])
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        bench_models.main(list(options))
    assert message in capsys.readouterr().err
