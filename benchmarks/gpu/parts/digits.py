"""Part digits: a few epochs of a recipe, by which a GPU must train as well as the CPU."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from record import Record

from bitkernels import models
from bitkernels.train import Options, datasets, fit, recipes

DIGITS, EPOCHS = "quicknet-digits", 3


def digits(device: str) -> dict:
    recipe = recipes.get(DIGITS)
    recipe = dataclasses.replace(recipe, stages=tuple(
        dataclasses.replace(stage, epochs=EPOCHS) for stage in recipe.stages))
    start = time.time()
    result = fit(lambda: models.create("quicknet", in_channels=1, image_size=8, blocks=(1, 1, 1),
                                       filters=(32, 64, 128)),
                 recipe, datasets.digits(), options=Options(device=device, watch=False))
    return {"accuracy": result.accuracy, "epochs": EPOCHS,
            "training s": round(time.time() - start, 1)}


def run(folder: Path, device: str) -> None:
    Record(folder, f"digits-{device}").add(key=f"digits {device}", **digits(device))
