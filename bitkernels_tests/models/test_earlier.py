"""Packed files of earlier versions, when the blocks of two networks were layers side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitkernels import models
from bitkernels import nn as bnn
from bitkernels_tests.models.generated import image

safetensors = pytest.importorskip("safetensors.torch")

# Written by a version before of networks trained for three steps: a file, and its logits for
# image(1, (8, 8), 1), of each.
RECORDED = np.load(Path(__file__).parents[1] / "data" / "packed_0_1.npz")
OPTIONS = {"quicknet": dict(blocks=(1, 1), filters=(8, 40)),
           "reactnet": dict(channels=(8, 16, 16))}


def network(name: str, **options) -> nn.Module:
    return models.create(name, in_channels=1, num_classes=5, **{**OPTIONS[name], **options})


def written(name: str, folder: Path) -> Path:
    (folder / "file").write_bytes(RECORDED[name].tobytes())
    return folder / "file"


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_files_of_earlier_versions(name, tmp_path):
    path = written(name, tmp_path)
    fresh = network(name)
    with torch.device("meta"):
        hollow = network(name)
    x = torch.from_numpy(image(1, (8, 8), 1)).permute(0, 3, 1, 2)
    logits = torch.from_numpy(RECORDED[f"{name}/logits"])
    for model in (fresh, bnn.pack(fresh), hollow):
        loaded = bnn.load_packed(path, model)
        torch.testing.assert_close(loaded(x), logits, rtol=1e-5, atol=1e-5)
    bnn.save_packed(loaded, tmp_path / "new")
    assert torch.equal(bnn.load_packed(tmp_path / "new", fresh)(x), loaded(x))


@pytest.mark.parametrize("name, options, message", [
    ("quicknet", dict(filters=(8, 48)), "sections.1.1.conv: in_channels=40 in the file, 48 in the"),
    ("quicknet", dict(blocks=(2, 1)), "sections.0.1 is a QuickNetBlock in the model, not packed"),
    ("reactnet", dict(channels=(8, 16, 32)), "blocks.1.pointwise.conv: out_channels=16 in the"),
    ("reactnet", dict(channels=(8, 8, 8)), "blocks.0.pointwise.conv: out_channels=16 in the file"),
    ("reactnet", dict(channels=(8, 16)), "blocks.1.conv1 is a PackedConv2d in the file, not there"),
    ("reactnet", dict(real_groups=1), "blocks.0.pointwise.conv is a PackedConv2d in the file, a "),
])
def test_those_of_other_networks_are_refused(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bnn.load_packed(written(name, tmp_path), network(name, **options))


def test_damaged_ones_are_refused(tmp_path):
    path = written("reactnet", tmp_path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.load_file(path)

    def refused(message: str, layers: dict, changed: dict) -> None:
        safetensors.save_file({**tensors, **changed}, path,
                              {**metadata, "layers": json.dumps(layers)})
        with pytest.raises(ValueError, match=message):
            bnn.load_packed(path, network("reactnet"))

    layers = json.loads(metadata["layers"])
    refused("what .* has of blocks.0 is broken", layers,
            {"blocks.0.conv2.1.weight_words": torch.zeros(8, 3, 3, 1, dtype=torch.int32)})
    other = {**layers["blocks.0.conv2.1"], "stride": [2, 2]}
    refused("blocks.0.conv1 is a PackedConv2d in the file, not there in the model",
            {**layers, "blocks.0.conv2.1": other}, {})
    for branch in (0, 1):
        del layers[f"blocks.0.conv2.{branch}"]["out_channels"]
    refused("what .* has of blocks.0 is broken: 'out_channels'", layers, {})
