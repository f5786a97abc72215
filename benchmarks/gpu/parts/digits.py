"""Part digits: a few epochs of a recipe, by which a GPU must train as well as the CPU.

From several starts that differ by less than float32 tells apart in a logit: signs near 0 make of
that, on a CPU as well, accuracies from 0.89 to 0.97 after three epochs. One start says nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from record import Record

from bitkernels import models
from bitkernels.train import Options, datasets, fit, recipes

DIGITS, EPOCHS = "quicknet-digits", 3
STARTS = (0.0, 1e-7, 2e-7, 3e-7, 1e-6)  # by which the first weights are larger


def network(larger: float) -> torch.nn.Module:
    made = models.create("quicknet", in_channels=1, image_size=8, blocks=(1, 1, 1),
                         filters=(32, 64, 128))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1 + larger)
    return made


def digits(device: str) -> dict:
    recipe = recipes.get(DIGITS)
    recipe = dataclasses.replace(recipe, stages=tuple(
        dataclasses.replace(stage, epochs=EPOCHS) for stage in recipe.stages))
    start = time.time()
    found = [fit(partial(network, larger), recipe, datasets.digits(),
                 options=Options(device=device, watch=False)).accuracy for larger in STARTS]
    return {"accuracy": statistics.mean(found), "from": min(found), "to": max(found),
            "epochs": EPOCHS, "training s": round(time.time() - start, 1)}


def run(folder: Path, device: str) -> None:
    Record(folder, f"digits-{device}").add(key=f"digits {device}", **digits(device))
