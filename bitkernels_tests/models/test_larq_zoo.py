"""Every network of Larq Zoo: its h5 layout loads, its logits are those of the original.

What the originals computed is in `data/larq_zoo.npz`, made by `data/make_larq_zoo.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitkernels.models import list_models
from bitkernels_tests.models.recorded import NAMES, RECORDS, image, layers_of, loaded

BIG = ("xnornet", "binary_densenet37", "quicknet")  # and others of their families remain


@pytest.mark.parametrize("record", [
    pytest.param(name, marks=[pytest.mark.every] if name in BIG else []) for name in NAMES
    if name.partition(":")[0] in list_models()])
def test_logits_of_the_original(record, tmp_path):
    about, _ = layers_of(record)
    options: dict = {"stem": "cifar"} if record.endswith(":small") else {}
    if record in ("binary_alexnet", "dorefanet"):
        options["image_size"] = about["size"][0]
    model = loaded(record, tmp_path, **options)
    with torch.no_grad():
        logits = model(image(about["seed"], about["size"])).numpy()
    wanted = RECORDS[record]
    assert logits.shape == wanted.shape
    assert np.abs(logits - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_records_hold_what_keras_writes():
    assert len(NAMES) == 16
    for name in NAMES:
        about, layers = layers_of(name)
        assert len(dict(layers)) == len(layers) and about["margin"] > 1.5e-6
        assert RECORDS[name].shape == (1, about["classes"])
