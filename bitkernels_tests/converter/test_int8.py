"""convert(real="int8"): what is converted, how far values may be off, files, and the engine."""

from __future__ import annotations

import runpy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkernels import models
from bitkernels.backends import cpu
from bitkernels.converter import compare, convert, load_converted, profile, save_converted
from bitkernels.converter.engine import Engine
from bitkernels_tests import ROOT
from bitkernels_tests.converter.networks import shuffled

IMAGE = (17, 9, 8)


def wide():
    """Layers that int8 takes alone, so that nothing before them rounds."""
    torch.manual_seed(0)
    return shuffled(nn.Sequential(
        nn.Conv2d(17, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(),
        nn.Conv2d(40, 66, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=2,
                  bias=False),
        nn.ReLU6(), nn.Conv2d(66, 20, 3, padding="same"), nn.Flatten(), nn.Linear(640, 10)))


def kinds(network) -> list[str]:
    return [str(n.target) for n in network.graph_module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("make, says", [
    (lambda c: nn.Conv2d(c, 24, 3, padding=1, groups=2), "conv2d"),
    (lambda c: nn.Sequential(nn.Conv2d(c, 24, 1, bias=False), nn.BatchNorm2d(24)), "conv2d"),
    (lambda c: nn.Sequential(nn.Flatten(), nn.Linear(c * 36, 10)), "linear")])
def test_values_are_off_by_halves_of_steps_at_most(make, says):
    torch.manual_seed(0)
    model, x = shuffled(make(32)), torch.randn(3, 32, 6, 6)
    network = convert(model, x, real="int8")
    assert f"bitkernels.int8_{says}.default" in kinds(network)
    folded = convert(model, x)  # with norms in the weight
    node = next(n for n in folded.graph_module.graph.nodes
                if str(n.target) in ("aten.conv2d.default", "aten.linear.default"))
    weight = getattr(folded.graph_module, str(node.args[1].target))
    step = weight.abs().flatten(1).amax(1).double() / 127
    x_step = x.abs().max().double() / 127

    def layer(a, w):
        return (F.linear(a.flatten(1), w) if says == "linear" else
                F.conv2d(a, w, None, *node.args[3:]))

    ones, per_channel = torch.ones_like(weight).double(), (-1, *[1] * (weight.dim() - 1))
    half = (ones * step.view(per_channel)) / 2
    most = (layer(x.double().abs(), half) + layer(torch.ones_like(x).double(), weight.double().abs()
                                                  + half) * x_step / 2)
    with torch.no_grad():
        off = (network(x).double() - folded(x).double()).abs()
    assert (off <= most * (1 + 1e-5) + 1e-5).all() and off.max() > 0


def test_quicknet_says_what_became_of_each_layer():
    torch.manual_seed(0)
    model = models.QuickNet(5, blocks=(1, 1), filters=(32, 64)).eval()
    x = torch.randn(2, 3, 32, 32)
    network = convert(model, x, real="int8")
    assert network.report.products == convert(model, x).report.products
    said = dict(network.report.real)
    assert said["stem.1.weight"] == (
        "a real layer, in float32: 3 input channels a group, less than 16")
    assert "1 input channels a group" in said["sections.1.0.blur"]
    for name in ("sections.1.0.conv.weight", "classifier.weight"):
        assert said[name].startswith("in int8, its input within ")
    text = str(network.report)
    assert "signs near their thresholds may change: bitkernels.converter.compare" in text
    assert "int8" not in str(convert(model, x).report)
    weights = [t for t in network.state_dict().values() if t.dtype is torch.int8]
    assert len(weights) == sum("in int8" in why for why in said.values())
    assert network.report.bytes_after < convert(model, x).report.bytes_after
    found = compare(model, network, x)
    assert 0 < found.largest < 0.2
    real = [c for c in profile(network, x, repeats=1).calls if "int8" in c.operator]
    assert real and all(c.macs for c in real)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(32, 32), lambda: nn.Conv2d(32, 32, 1)])
def test_layers_that_read_each_other(layer):
    """As a projection and the next expansion of MobileNetV2."""
    x = torch.randn(16, 32, *[4, 4][:layer().weight.dim() - 2])
    model = nn.Sequential(layer(), layer(), layer()).eval()
    network = convert(model, x, real="int8")
    assert all("in int8" in why for _, why in network.report.real)
    with torch.no_grad():
        expected, got = model(x), network(x)
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()


def test_others_stay():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.few, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
            self.sequence = nn.Conv1d(32, 32, 3, padding=1)

        def forward(self, x):
            y = self.sequence(self.few(x).transpose(1, 2)).transpose(1, 2)
            return self.last(F.linear(y, y[0].mean(0).outer(y[0].mean(0))))

    network = convert(Attention().eval(), torch.randn(2, 5, 8), real="int8")
    said = dict(network.report.real)
    assert "8 input channels, less than 16" in said["few.weight"]
    assert "no convolution of a batch of images" in said["sequence.weight"]
    assert "in int8" in said["last.weight"]
    assert sum("computed from the input" in why for why in said.values()) == 1
    assert network(torch.randn(3, 5, 8)).shape == (3, 5, 4)
    double = nn.Linear(32, 4).double().eval()
    kept = convert(double, torch.randn(2, 32).double(), real="int8")
    assert dict(kept.report.real)["weight"] == (
        "a real layer, in float64: layers in int8 read and give float32")


@pytest.mark.skipif(cpu.why_not is not None, reason="there is no engine")
def test_the_engine_equals_pytorch_bit_for_bit():
    x = torch.randn(4, *IMAGE)
    network = convert(wide(), x, real="int8")
    assert not any("aten.conv2d" in k or "aten.linear" in k for k in kinds(network))
    for batch in (1, 4):
        assert isinstance(network.engine(x[:batch]), Engine)
        with torch.no_grad():
            wanted, = network.graph_module(x[:batch])
            assert torch.equal(network(x[:batch]), wanted)


def test_a_file_holds_int8(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    x = torch.randn(2, *IMAGE)
    network = convert(wide(), x, real="int8")
    sizes = {}
    for real, made in (("int8", network), ("float32", convert(wide(), x))):
        save_converted(made, tmp_path / real)
        sizes[real] = (tmp_path / real).stat().st_size
    with safetensors.safe_open(tmp_path / "int8", framework="pt") as file:
        held = [file.get_tensor(key) for key in file.keys()]
    assert sum(t.dtype is torch.int8 for t in held) == 4
    weights = sum(t.numel() for t in held if t.dtype is torch.int8)
    assert sizes["float32"] - sizes["int8"] > 2.9 * weights - 6000  # 3 bytes each, a longer graph
    again = load_converted(tmp_path / "int8")
    assert torch.equal(again(x), network(x)) and again.report == network.report


@pytest.mark.parametrize("value, says", [(0.0, "all 0"), (torch.inf, "not finite"),
                                         (torch.nan, "not finite")])
def test_examples_that_tell_no_steps(value, says):
    x = torch.randn(2, *IMAGE) * (value != 0)
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=f"the input of 0.weight is {says}; give real images"):
        convert(wide(), x, real="int8")


def test_constant_channels_and_saturated_inputs():
    model = nn.Conv2d(16, 3, 1).eval()
    with torch.no_grad():
        model.weight[1] = 0
    x = torch.randn(2, 16, 4, 4)
    network = convert(model, x, real="int8")
    bias = float(model.bias[1].detach())
    assert (network(x)[:, 1] == bias).all()
    with torch.no_grad():  # what calibration has not seen ends at the largest that it has
        most = x.abs().max()
        assert torch.equal(network(1e6 * x), network(torch.sign(x) * most))


def test_digits_lose_no_accuracy():
    """Real layers of 16 channels and more before, between and behind binary ones, trained."""
    pytest.importorskip("sklearn")
    if not (ROOT / "examples").is_dir():
        pytest.skip("not in the sources")
    torch.manual_seed(0)
    example = runpy.run_path(str(ROOT / "examples" / "digits.py"))
    train, test, train_labels, test_labels = example["digits"](0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), example["Block"](64),
        nn.AvgPool2d(2), nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64),
        example["Block"](64), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    example["train"](model, train, train_labels, 4)
    model.eval()
    network = convert(model, train[:256], real="int8")
    assert sum("in int8" in why for _, why in network.report.real) == 3

    def accuracy(net) -> float:
        with torch.no_grad():
            return float((net(test).argmax(1) == test_labels).float().mean())

    assert accuracy(model) > 0.85
    assert abs(accuracy(network) - accuracy(model)) <= 0.01
    found = compare(model, network, test)
    assert sum(p.different for p in found.products) < 0.02 * sum(p.signs for p in found.products)
