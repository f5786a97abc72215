"""Converted networks as ONNX: from the model or from a file, equal in onnxruntime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitkernels
import bitkernels.nn as bnn
from bitkernels import models
from bitkernels_tests.converter.networks import conv, norm, shuffled
from bitkernels_tests.converter.test_convert import NAMED, stem

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from bitkernels_tests.toolchains import test_onnx as onnx_tests
from bitkernels_tests.toolchains.test_onnx import exported, quiet, run  # noqa: F401

pytestmark = onnx_tests.pytestmark
BATCH = (({0: torch.export.Dim("batch", min=2)},),)


def checked(network, size, tolerance=1e-4):
    """The file; equal to the network, on a batch of another size."""
    proto = exported(network, torch.randn(2, 3, size, size), dynamic_shapes=BATCH)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    (got,), wanted = run(proto, x), network(x)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())
    return proto


def converted(model, size):
    return bitkernels.convert(shuffled(model), torch.randn(2, 3, size, size))


@pytest.mark.parametrize("name", ["reactnet-18", "quicknet", "binarynet"])
def test_the_networks(name):
    torch.manual_seed(0)
    make, size = NAMED[name]
    checked(converted(make(), size), size)


CASES = {
    "transposed": lambda: [bnn.BinaryConvTranspose2d(32, 16, 3, 2, groups=2), norm(16),
                           conv(16, 32, pad_value=-1), norm(32)],
    "groups and pool": lambda: [conv(32, 64, groups=2, stride=2), nn.MaxPool2d(3, 2, 1), norm(64),
                                conv(64, 32, padding=(1, 0)), nn.ReLU(), norm(32)],
    "integers": lambda: [conv(32, 40), conv(40, 8)],
}


@pytest.mark.parametrize("name", CASES)
def test_what_else_writes_words(name):
    torch.manual_seed(0)
    network = converted(nn.Sequential(*stem(), *CASES[name]()), 12)
    calls = {str(node.target) for node in network.graph_module.graph.nodes}
    wanted = {"transposed": "conv_transpose2d", "groups and pool": "packed_max_pool2d",
              "integers": "packed_conv2d.packed"}[name]
    assert any(wanted in call for call in calls)
    checked(network, 12)


def test_joined_words():
    """Words of two branches side by side, then flattened."""
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Sequential(*stem()), conv(32, 64), conv(32, 32)
            self.out = bnn.BinaryLinear(96 * 16, 5)

        def forward(self, x):
            x = self.stem(x)
            return self.out(torch.cat([self.a(x), self.b(x)], 1).flatten(1))

    torch.manual_seed(0)
    network = converted(Joined(), 4)
    assert not any(p.reads == "signs" for p in network.report.products[-1:])
    checked(network, 4)


def test_of_a_file_without_the_model(tmp_path):
    torch.manual_seed(0)
    network = converted(models.ReActNet18(5, blocks=(1, 1), channels=(256, 256)), 32)
    bitkernels.save_converted(network, tmp_path / "network.safetensors")
    again = bitkernels.load_converted(tmp_path / "network.safetensors")
    proto = checked(again, 32)
    words = 2 * 256 * 256 * 9 // 8
    real = network.report.bytes_after - words
    assert len(proto.SerializeToString()) < 1.1 * (words + real) + 60_000  # weights stay words


def test_the_old_exporter_is_refused(tmp_path):
    network = converted(nn.Sequential(*stem(), conv(32, 8)), 8)
    with pytest.raises(RuntimeError, match="dynamo=True"):
        torch.onnx.export(network, (torch.randn(1, 3, 8, 8),), tmp_path / "x.onnx", dynamo=False)
