"""ONNX export: graphs of real operators that equal, in onnxruntime, the bits they stand for."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from torch import nn

import bitkernels.nn as bnn
from bitkernels import _onnx
from bitkernels_tests import module_cases as cases

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::FutureWarning")]

ops = torch.ops.bitkernels
@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)


def exported(module, x, **options):
    options.setdefault("dynamic_shapes", ({0: torch.export.Dim("batch", min=2)},))
    return torch.onnx.export(module, (x,), dynamo=True, verbose=False, **options).model_proto


def run(proto, x) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name:
                                                                x.numpy()})]


def assert_equal_in_onnx(module, x, tolerance=1e-6, **options) -> None:
    proto = exported(module, x, **options)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    if not options:
        x = torch.cat([x, -x])
    with torch.no_grad():
        wanted = module(x)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for got, value in zip(run(proto, x), wanted, strict=True):
        assert got.dtype == value.dtype
        scale = max(value.abs().max().item(), 1.0)
        torch.testing.assert_close(got, value, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("group", cases.GROUPS)
def test_modules(group):
    network, x = cases.branches(group)
    assert_equal_in_onnx(network.eval(), x)


@pytest.mark.parametrize("name,packed", [("binarynet", True), ("quicknet", False),
                                         ("reactnet", True)])
def test_models(name, packed):
    model, x = cases.MODELS[name]()
    model.eval()
    assert_equal_in_onnx(cases.pack(model) if packed else model, x, 2e-5)


def test_without_a_scale_the_integers_are_exact():
    layers = [bnn.BinaryConv2d(200, 8, 3, padding=1, bias=False),
              bnn.BinaryConv2d(200, 8, 3, bias=False)]
    network = cases.Branches([*layers, *(layer.pack() for layer in layers)]).eval()
    x = torch.randn(2, 200, 5, 5)
    with torch.no_grad():  # what users write
        proto = exported(network, x)
        for got, wanted in zip(run(proto, x), network(x), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types(dtype):
    made = [bnn.BinaryConv2d(8, 4, 3, padding=1, weight_scale="xnor").to(dtype), bnn.RSign(8)]
    network = cases.Branches([*made, made[0].pack()]).eval()
    x = torch.randn(2, 8, 5, 5).to(dtype)
    assert_equal_in_onnx(network, x, 2e-3 if dtype == torch.float16 else 1e-6)


def test_without_a_batch():
    layer = bnn.BinaryConv2d(8, 4, 3, padding=1).eval()
    network = cases.Branches([layer, layer.pack()]).eval()
    assert_equal_in_onnx(network, torch.randn(8, 5, 5), dynamic_shapes=None)


def test_signs_of_everything():
    """0, -0.0 and NaN are +1 in ONNX too."""
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1e-30, 1.0, -1.0])
    x = x.repeat(3, 1)
    layer = bnn.BinaryLinear(8, 4, bias=False).eval()
    network = cases.Branches([layer, layer.pack(), bnn.RSign(8)]).eval()
    for got, wanted in zip(run(exported(network, x), x), network(x), strict=True):
        assert torch.equal(got, wanted)


def test_files_of_packed_models_hold_words():
    """Of all but small layers, which the exporter unpacks itself."""
    layer = bnn.BinaryConv2d(256, 256, 3, bias=False).eval().pack()
    size = len(exported(layer, torch.randn(2, 256, 3, 3)).SerializeToString())
    assert size < 1.2 * 256 * 256 * 9 / 8


def test_words_of_every_bit():
    words = torch.randint(-2**31, 2**31 - 1, (5, 4), dtype=torch.int32)
    words[0] = torch.tensor([-2**31, 2**31 - 1, -1, 0])
    for channels in (97, 120, 128):
        assert torch.equal(_onnx.unpack(words, channels), ops.unpack(words, channels))


def test_traced_modules_export():
    net = nn.Sequential(bnn.RSign(8), bnn.BinaryConv2d(8, 4, 3), bnn.RPReLU(4)).eval()
    assert_equal_in_onnx(torch.fx.symbolic_trace(net), torch.randn(2, 8, 5, 5))


@pytest.mark.parametrize("module", [
    bnn.BinaryConv2d(8, 4, 3), bnn.BinaryConv2d(8, 4, 3).pack(), bnn.RSign(8), bnn.RPReLU(8)])
def test_the_old_exporter_is_refused(module):
    with pytest.raises(RuntimeError, match="dynamo=True"):
        torch.onnx.export(module, (torch.randn(1, 8, 5, 5),), io.BytesIO(), dynamo=False)


def test_programs_of_packed_operators_are_refused():
    layer, x = bnn.BinaryConv2d(8, 4, 3).eval(), torch.randn(1, 8, 5, 5)
    proto = torch.onnx.export(torch.export.export(layer, (x,)), verbose=False).model_proto
    with torch.no_grad():
        torch.testing.assert_close(run(proto, x)[0], layer(x), rtol=0, atol=1e-6)
    program = torch.export.export(layer.pack(), (x,))
    with pytest.raises(Exception) as error:
        torch.onnx.export(program, verbose=False)
    causes = [error.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert any("give torch.onnx.export the model itself" in str(cause) for cause in causes)


def test_export_leaves_the_module_as_it_was():
    layer, x = bnn.BinaryConv2d(8, 4, 3).eval(), torch.randn(2, 8, 5, 5)
    before = layer(x)
    exported(layer, x)
    assert torch.equal(layer(x), before) and layer(x).grad_fn is not None


def _then(layer, norm, channels, last):
    return nn.Sequential(layer, norm(channels), nn.PReLU(channels), last)


@pytest.mark.parametrize("make, shape", [
    (lambda: _then(bnn.BinaryConv2d(16, 16, 3, bias=False), nn.BatchNorm2d, 16,
                   bnn.BinaryConv2d(16, 8, 3, bias=False)), (16, 9, 9)),
    (lambda: nn.Sequential(bnn.BinaryConv2d(16, 16, 3, weight_scale="xnor"),
                           bnn.BinaryConv2d(16, 8, 3, bias=False)), (16, 9, 9)),
    (lambda: _then(bnn.BinaryConvTranspose2d(16, 16, 3, bias=False), nn.BatchNorm2d, 16,
                   bnn.BinaryConv2d(16, 8, 3, bias=False)), (16, 5, 5)),
    (lambda: _then(bnn.BinaryLinear(64, 64, bias=False), nn.BatchNorm1d, 64,
                   bnn.BinaryLinear(64, 8, bias=False)), (64,)),
    (lambda: _then(bnn.BinaryConv3d(8, 8, 3, padding=1, weight_scale="detached"), nn.BatchNorm3d, 8,
                   bnn.BinaryConv3d(8, 4, 3, bias=False)), (8, 4, 4, 4)),
], ids=["conv", "scale", "transposed", "linear", "conv3d"])
def test_what_follows_a_layer_is_not_folded_into_its_signs(make, shape):
    """Sums of such weights round, and the next sign flips where a dot product is 0."""
    torch.manual_seed(0)
    network, x = make().eval(), torch.randn(4, *shape)
    networks = [network]
    if not any(isinstance(m, bnn.BinaryConv3d) for m in network.modules()):
        networks.append(bnn.pack(network))
    with torch.no_grad():
        for net in networks:
            proto = exported(net, x, dynamic_shapes=None)
            torch.testing.assert_close(run(proto, x)[0], net(x), rtol=0, atol=1e-4)
