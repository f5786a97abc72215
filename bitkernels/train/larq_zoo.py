"""Recipes of Larq Zoo's classic networks (github.com/larq/zoo, larq_zoo.training)."""

from __future__ import annotations

from bitkernels.train.recipes import Method, Recipe, Schedule, Stage

_NOTES = """\
Random parts of an image are torchvision's RandomResizedCrop, where the zoo uses TensorFlow's."""


def _recipe(name: str, source: str, model: str, epochs: int, batch_size: int, method: Method,
            clip: float) -> Recipe:
    stage = Stage(name, epochs, batch_size, method, latent_clip=clip,
                  augmentation="resized-crop-bicubic")
    return Recipe(name, (stage,), f"Larq Zoo, ImageNet: {source}", _NOTES, model)


# Keras's Adam has eps 1e-7 where the zoo gives none.
RECIPES = (
    _recipe("binary-alexnet", "BinaryAlexNet 36.3 %", "binary_alexnet", 150, 512, Method(
        "adam", 1e-2, Schedule("steps", milestones=tuple(range(10, 150, 10)), factor=0.5),
        eps=1e-7), 1.0),
    _recipe("birealnet", "Bi-Real-18 57.5 %", "birealnet18", 300, 512, Method(
        "adam", 5e-3, Schedule("linear"), eps=1e-7), 1.0),
    _recipe("binary-resnet-e18", "BinaryResNetE18 58.3 %", "binary_resnet_e18", 120, 1024, Method(
        "adam", 4e-3, Schedule("steps", milestones=(70, 90, 110), factor=0.3)), 1.25),
)
