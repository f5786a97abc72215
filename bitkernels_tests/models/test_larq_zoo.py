"""Every network of Larq Zoo: its h5 layout loads, its logits are those of the original.

What the originals computed is in `data/larq_zoo.npz`, made by `data/make_larq_zoo.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitkernels.models import create_model, list_models
from bitkernels_tests import ROOT
from bitkernels_tests.models import generated

h5py = pytest.importorskip("h5py")

RECORDS = np.load(ROOT / "bitkernels_tests" / "data" / "larq_zoo.npz")
NAMES = sorted(name for name in RECORDS if name != "header" and "/" not in name)
BIG = ("xnornet", "binary_densenet37", "quicknet")  # and others of their families remain


def layers_of(record: str) -> tuple[dict, list]:
    """What was recorded beside the logits: seed, size, classes; and [layer, [[weight, shape]]]."""
    about, layers = json.loads(RECORDS[f"{record}/layers"].tobytes())
    return about, layers


def write_h5(path: Path, layers: list, seed: int) -> None:
    """The generated weights in the layout of Keras' save_weights."""
    index = 0
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.array([layer.encode() for layer, _ in layers])
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"2.15.0"
        for layer, weights in layers:
            group = file.create_group(layer)
            group.attrs["weight_names"] = np.array([name.encode() for name, _ in weights], "S")
            for name, shape in weights:
                kind = generated.kind_of(layer, name)
                group[name] = generated.weight(seed, index, kind, shape)
                index += 1


def image_of(about: dict) -> torch.Tensor:
    return torch.from_numpy(generated.image(about["seed"], about["size"])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("record", [
    pytest.param(name, marks=[pytest.mark.every] if name in BIG else []) for name in NAMES
    if name.partition(":")[0] in list_models()])
def test_logits_of_the_original(record, tmp_path):
    from bitkernels.models.weights import load_weights

    about, layers = layers_of(record)
    name, _, variant = record.partition(":")
    options: dict = {"stem": "small"} if variant == "small" else {}
    if name in ("binary_alexnet", "dorefanet"):
        options["image_size"] = about["size"][0]
    model = create_model(name, num_classes=about["classes"], **options).eval()
    path = tmp_path / "weights.h5"
    write_h5(path, layers, about["seed"])
    load_weights(model, path)
    with torch.no_grad():
        logits = model(image_of(about)).numpy()
    wanted = RECORDS[record]
    assert logits.shape == wanted.shape
    assert np.abs(logits - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_records_hold_what_keras_writes():
    assert len(NAMES) == 16
    for name in NAMES:
        about, layers = layers_of(name)
        assert len(dict(layers)) == len(layers) and about["margin"] > 3e-6
        assert RECORDS[name].shape == (1, about["classes"])
