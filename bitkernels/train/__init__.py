"""Training of binary networks by recipe: `fit`, the recipes, the image sets, the losses.

    from bitkernels import models
    from bitkernels.train import datasets, fit, recipes

    data = datasets.digits()
    result = fit(lambda: models.create("reactnet", in_channels=1, image_size=8),
                 recipes.get("adambnn-digits"), data, "run")

`python -m bitkernels train` is the same from a command line, also under `torchrun`.
"""

from bitkernels.train import datasets, recipes
from bitkernels.train.errors import CheckpointError, DataError, DivergedError, TrainError
from bitkernels.train.loop import fit
from bitkernels.train.recipes import Loss, Method, Recipe, Schedule, Stage
from bitkernels.train.run import Options, Result

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergedError",
    "Loss",
    "Method",
    "Options",
    "Recipe",
    "Result",
    "Schedule",
    "Stage",
    "TrainError",
    "datasets",
    "fit",
    "recipes",
]
