"""Where a converted network's time goes: the calls, their parts and products."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import bitkernels.nn as bnn
from bitkernels.cli import main
from bitkernels.converter import convert, profile, save_converted
from bitkernels_tests.converter.networks import conv, norm, shuffled


@pytest.fixture(scope="module")
def network():
    model = shuffled(nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), conv(32, 64, groups=2, stride=2), norm(64), conv(64, 64),
        nn.GELU(), nn.Conv2d(64, 8, 1), nn.Flatten(), bnn.BinaryLinear(8 * 16, 40)))
    return convert(model, torch.randn(1, 3, 8, 8))


def test_calls_and_their_products(network):
    found = profile(network, torch.randn(3, 3, 8, 8), repeats=2)
    macs = [(c.part, c.macs) for c in found.calls if c.macs]
    assert macs == [("stem", 3 * 64 * 32 * 27), ("binary", 3 * 16 * 64 * 16 * 9),
                    ("binary", 3 * 16 * 64 * 64 * 9), ("real", 3 * 16 * 8 * 64),
                    ("binary", 3 * 128 * 40)]
    assert {"stem", "binary", "real", "glue"} == {c.part for c in found.calls}
    assert all(c.ms > 0 for c in found.calls)
    assert sum(found.parts().values()) == pytest.approx(found.ms)
    assert "aten.gelu.default" in str(found) and "on cpu" in str(found)


def test_the_command(network, tmp_path, capsys):
    pytest.importorskip("safetensors")
    save_converted(network, tmp_path / "network")
    with pytest.raises(SystemExit) as end:
        main(["profile", str(tmp_path / "network"), "--repeats", "1", "--batch", "2", "--json"])
    assert end.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["calls"]) > 5 and said["calls"][0]["part"] == "stem"


@pytest.mark.parametrize("batch", ["1", "3"])
def test_a_file_with_other_inputs(batch, tmp_path, capsys):
    pytest.importorskip("safetensors")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.words = conv(3, 8), nn.Embedding(5, 8)

        def forward(self, x, factor, mask, index):
            x = torch.where(mask, self.conv(x * factor), -1.0)
            return x.mean((2, 3)) + self.words(index)

    x = torch.randn(2, 3, 4, 4)
    save_converted(convert(Model().eval(), (
        x, torch.ones(1, 3, 1, 1), x[:, :1] > 0, torch.tensor([1, 4]))), tmp_path / "network")
    with pytest.raises(SystemExit) as end:
        main(["profile", str(tmp_path / "network"), "--repeats", "1", "--batch", batch])
    assert end.value.code == 0, capsys.readouterr().err


def test_the_chart(network, tmp_path):
    pytest.importorskip("matplotlib")
    profile(network, torch.randn(1, 3, 8, 8), repeats=1).chart(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="'banana' is not supported"):
        profile(network, torch.randn(1, 3, 8, 8), repeats=1).chart(tmp_path / "chart.banana")
    with pytest.raises(OSError, match="it is a device"):  # as one that is full
        profile(network, torch.randn(1, 3, 8, 8), repeats=1).chart("/dev/full")
    assert [file.name for file in tmp_path.iterdir()] == ["chart.png"]


@pytest.mark.parametrize("arguments, says", [
    (["nothing"], "no model is called 'nothing'"), (["quicknet", "--batch", "0"], "--batch"),
    (["no.safetensors"], "there is no file no.safetensors"),
    (["FILE", "--size", "32"], "a file has its own"),
    (["FILE", "--device", "none"], "--device none: "),
    (["quicknet", "--device", "none"], "--device none: ")])
def test_wrong_commands_are_one_line(arguments, says, network, tmp_path, capsys):
    pytest.importorskip("safetensors")
    save_converted(network, tmp_path / "network")
    with pytest.raises(SystemExit) as end:
        main(["profile", *(str(tmp_path / "network") if a == "FILE" else a for a in arguments)])
    error = capsys.readouterr().err
    assert end.value.code == 1 and says in error and error.count("\n") == 1


def test_bad_input(network):
    with pytest.raises(ValueError, match="must be what bitkernels.convert"):
        profile(nn.Identity(), torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        profile(network, torch.randn(1, 3, 8, 8), repeats=0)
    with pytest.raises(RuntimeError, match="must be those of the example_inputs"):
        profile(network, (torch.randn(1, 3, 8, 8), 1))
