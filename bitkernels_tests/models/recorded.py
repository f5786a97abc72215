"""What Larq Zoo's networks computed (`data/larq_zoo.npz`), and files of weights as Keras writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitkernels.models import create_model
from bitkernels_tests import ROOT
from bitkernels_tests.models import generated

RECORDS = np.load(ROOT / "bitkernels_tests" / "data" / "larq_zoo.npz")
NAMES = sorted(name for name in RECORDS if name != "header" and "/" not in name)


def layers_of(record: str) -> tuple[dict, list]:
    """What was recorded beside the logits: seed, size, classes, margin (of all values whose sign
    was taken the least distance to 0, over its layer's RMS); and [layer, [[weight, shape], ...]]
    of all layers of the file."""
    about, layers = json.loads(RECORDS[f"{record}/layers"].tobytes())
    return about, layers


def write_h5(path: Path, layers: list, seed: int) -> None:
    """The generated weights in the layout of Keras' save_weights."""
    h5py = pytest.importorskip("h5py")
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


def loaded(record: str, folder: Path, seed: int | None = None, **options) -> nn.Module:
    """The network of a record, in evaluation, with the generated weights of its own or another
    seed, by way of a file."""
    from bitkernels.models.weights import load_weights

    about, layers = layers_of(record)
    path = folder / "weights.h5"
    write_h5(path, layers, about["seed"] if seed is None else seed)
    with pytest.MonkeyPatch.context() as patch:
        # Initial values would take most of the time; what is not loaded gives NaN.
        for initial in ("trunc_normal_", "kaiming_uniform_", "xavier_uniform_"):
            patch.setattr(nn.init, initial, lambda w, *_, **__: nn.init.constant_(w, math.nan))
        model = create_model(record.partition(":")[0], num_classes=about["classes"], **options)
    load_weights(model, path)
    path.unlink()
    return model.eval()


def image(seed: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(generated.image(seed, size)).permute(0, 3, 1, 2)
