"""The recipes themselves. Where a paper and its code differ, the choice is in `notes`.

Sources: AdamBNN (Liu et al., ICML 2021, arXiv 2106.11309; github.com/liuzechun/AdamBNN), ReActNet
(Liu et al., ECCV 2020, arXiv 2003.03488; github.com/liuzechun/ReActNet), Bop (Helwegen et al.,
NeurIPS 2019, arXiv 1906.02107; github.com/plumerai/rethinking-bnn-optimization), QuickNet and
Real-to-Binary nets as trained in Larq Zoo (github.com/larq/zoo), Martinez et al., ICLR 2020
(openreview BJg4NgBKvH), BNext (Guo et al. 2022, arXiv 2211.12933; github.com/hpi-xnor/BNext).
"""

from __future__ import annotations

from dataclasses import replace

from bitkernels.train import larq_zoo
from bitkernels.train.recipes import Loss, Method, Recipe, Schedule, Stage

__all__ = ["RECIPES"]

_EPOCH_LINEAR = Schedule("linear", per="epoch")
_TWO_STEP_NOTES = """\
The published loop lowers the rate before each epoch, so that its last epoch runs at 0; here epoch e
  of E has lr (1 - e / E), which is what its schedule says.
The published decay group is "four dimensions or conv in the name" and so holds the learned shifts,
  which are (1, C, 1, 1) there; here shifts are not decayed.
The published colour jitter (PCA lighting of std 0.1 on 0-255 pixels, truncated to integers) changes
  a pixel by at most one level; it is left out.
Step 2 takes over every weight of step 1 or stops. (The first published code lost the binary ones:
  they had other names in step 2, and the load was not strict.)
Step 2 starts from the last weights of step 1, not from those that were best on the held-out images:
  that choice would be made on the test images."""


_REACTNET_A = ("reactnet", ("channels=(32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, "
                            "1024, 1024)", "stem_stride=2"))


def _two_step(name: str, source: str, lr: float, epochs: int, batch_size: int, decay: float,
              model: str, model_options: tuple[str, ...] = ()) -> Recipe:
    step1 = Stage(
        "step1", epochs, batch_size, weights="real", teacher="given",
        method=Method("adam", lr, _EPOCH_LINEAR, weight_decay=decay),
        loss=Loss(labels=0, distribution=1), augmentation="resized-crop")
    step2 = replace(step1, name="step2", weights="binary", start="step1",
                    method=replace(step1.method, weight_decay=0.0))
    return Recipe(name, (step1, step2), source, _TWO_STEP_NOTES, model, model_options)


ADAMBNN = _two_step("adambnn", "AdamBNN, ImageNet: ReActNet-A 70.5 %; teacher ResNet-34",
                    1.25e-3, 256, 256, 5e-6, *_REACTNET_A)
REACTNET_A = _two_step("reactnet-a", "ReActNet-A, ImageNet: 69.4 %; teacher ResNet-34",
                       1.25e-3, 128, 256, 1e-5, *_REACTNET_A)
REACTNET_A = replace(REACTNET_A, notes=REACTNET_A.notes + """
The paper says lr 5e-4 and 600,000 updates at batch 256, which is 120 epochs; this is run.sh.""")
REACTNET_18 = _two_step("reactnet-18", "ReActNet-18, ImageNet: 65.9 %; teacher ResNet-34",
                        2.5e-3, 128, 512, 1e-5, "reactnet-18")

_DROPS = Schedule("steps", milestones=(100, 200, 300, 400), factor=0.1)
BOP_CIFAR10 = Recipe("bop-cifar10", (Stage(
    "bop", epochs=500, batch_size=50, signs_at_start=True, augmentation="shift-flip",
    method=Method("bop", 1e-4, _DROPS, threshold=1e-8), rest=Method("adam", 1e-2)),),
    "Bop, section 5.2, BinaryNet on CIFAR-10: 91.3 %", """\
The binary weights start as signs, as in the paper; its code starts from real ones, whose signs
  the first step takes.
Only the rate of Bop falls; Adam's stays, as in the code.""", model="binarynet")

BOP_IMAGENET = Recipe("bop-imagenet", (Stage(
    "bop", epochs=300, batch_size=1024, signs_at_start=True, augmentation="resized-crop",
    method=Method("bop", 1e-4, Schedule("linear", final=1e-2), threshold=1e-8),
    rest=Method("adam", 2.5e-3, Schedule("linear", final=2e-3))),),
    "Bop, ImageNet: Bi-Real-18 56.6 % (300 epochs), XNOR-Net 45.9 % (100), AlexNet 41.1 % (150)",
    """\
Epochs are those of Bi-Real-18. gamma falls to 1e-6 and Adam's rate to 5e-6 at the last step.
The first version of the paper has threshold 1e-7, gamma 5e-4 to 2.5e-6, batch 256, 100 epochs.
XNOR-Net's decay of 5e-7 on its first and last layer is not part of the recipe.""")

_WARM_COSINE = Schedule("cosine", warmup=5)
QUICKNET = Recipe("quicknet", (Stage(
    "quicknet", epochs=600, batch_size=2048, latent_clip=1.25,
    method=Method("adam", 1e-2, _WARM_COSINE),
    rest=Method("sgd", 0.1, _WARM_COSINE, momentum=0.9), augmentation="resized-crop-bicubic"),),
    "Larq Zoo, ImageNet: QuickNet 63.3 %, Small 59.4 %, Large 66.9 %", """\
Random parts of an image are torchvision's RandomResizedCrop, where the zoo uses TensorFlow's.""",
    model="quicknet", model_options=("blocks=(4, 4, 4, 4)", "filters=(64, 128, 256, 512)",
                                     "stem_strides=(2, 2)"))


def _r2b(name: str, lr: float, **fields) -> Stage:
    drops = Schedule("steps", milestones=(40, 60, 70), factor=0.3, warmup=5)
    return Stage(name, 75, 256, Method("adam", lr, drops), augmentation="resized-crop-bicubic",
                 **fields)


_MATCHING = Loss(labels=1, matching=3, attention=30)
REAL_TO_BINARY = Recipe("real-to-binary", (
    _r2b("real", 1e-3, activations="tanh", weights="real", teacher="given",
         loss=replace(_MATCHING, teacher_points=("layer?.?",))),
    _r2b("binary-activations", 1e-3, weights="real", teacher="real", loss=_MATCHING),
    replace(_r2b("binary", 2e-4, start="binary-activations", teacher="binary-activations",
                 loss=Loss(labels=1, matching=0.8)),
            method=Method("adam", 2e-4, Schedule("cosine", warmup=10)))),
    "Larq Zoo, ImageNet: Real-to-Binary net 65.0 %; the teacher of the first stage is a ResNet-18",
    """\
Of the zoo's four stages the first trains the teacher that is given here, a ResNet-18, whose eight
  blocks torchvision names layer1.0 to layer4.1; the network has eight blocks, too.
Rates, weights of the losses and the cosine of the last stage are those of the zoo's TrainR2B; the
  paper has no warm-up and steps in the last stage too.
The second stage starts fresh, as in the zoo: only its teacher comes from the first.""")

BNEXT = Recipe("bnext", (Stage(
    "bnext", epochs=512, batch_size=512, teacher="given", loss=Loss(labels=0, teachers=1),
    method=Method("adamw", 1e-3, Schedule("cosine", per="epoch", final=1e-4, warmup=5),
                  weight_decay=1e-3, decay="others"),
    latent_clip=1.5, gradient_clip=5.0, augmentation="resized-crop-bicubic"),),
    "BNext, ImageNet: T 72.4 %, S 76.1 %, M 78.3 %, L 80.57 %", """\
The teacher is a bitkernels.train.distillation.Teachers of a weak assistant and a strong network:
  EfficientNet-B0 and EfficientNet-B2 for T and S. M and L change the assistant after equal parts of
  the epochs (B0, B2; B0, B4, ConvNeXt-T), which is no part of the recipe.
Weights are signs from the start. Published, they are clamp(w / T, -1, 1) with T = 0.9^epoch until
  it is below 1e-7, in epoch 153.
There is no RandAugment (m7-mstd0.5), and images are evaluated as those of the other recipes.
The decay of 1e-8 of filters is left out. Shifts of signs and scales are decayed as all vectors; in
  the published code they have four dimensions and so the 1e-8.
The warm-up starts from 0, not from 1e-5, and rises with every step; the rate ends at 1e-7.""",
    "bnext_t")

_DIGITS_COSINE = Schedule("cosine")
ADAMBNN_DIGITS = Recipe("adambnn-digits", (
    Stage("teacher", 10, 64, Method("adam", 3e-3, _DIGITS_COSINE), activations="tanh",
          weights="real", augmentation="shift", loss=Loss(label_smoothing=0.1)),
    Stage("step1", 20, 64, Method("adam", 3e-3, _EPOCH_LINEAR, weight_decay=5e-6), weights="real",
          augmentation="shift", teacher="teacher", loss=Loss(labels=0, distribution=1)),
    Stage("step2", 20, 64, Method("adam", 3e-3, _EPOCH_LINEAR), start="step1",
          augmentation="shift", teacher="teacher", loss=Loss(labels=0, distribution=1))),
    "AdamBNN's two steps, sized for small images", """\
As adambnn, but: the teacher is the same network with real weights and tanh, trained first, instead
  of a ResNet-34; fewer epochs, batch 64, lr 3e-3; images shifted, not cropped or mirrored.""",
    model="reactnet")

BOP_DIGITS = Recipe("bop-digits", (Stage(
    "bop", epochs=40, batch_size=64, signs_at_start=True, augmentation="shift",
    method=Method("bop", 1e-2, Schedule("linear", final=1e-2), threshold=1e-6),
    rest=Method("adam", 1e-2, Schedule("linear", final=1e-2)),
    loss=Loss(label_smoothing=0.1)),),
    "Bop, sized for small images", """\
As bop-cifar10, but: gamma = 1e-2 falling linearly to 1e-4, since 900 updates are too few for a mean
  over 10,000; tau and Adam's 1e-2 are of the paper's section 5.1; both rates fall, the labels are
  smoothed, images shifted and not mirrored.""", model="binarynet")

QUICKNET_DIGITS = Recipe("quicknet-digits", (Stage(
    "quicknet", epochs=20, batch_size=64, latent_clip=1.25, augmentation="shift",
    method=Method("adam", 1e-2, Schedule("cosine", warmup=2)),
    rest=Method("sgd", 0.1, Schedule("cosine", warmup=2), momentum=0.9),
    loss=Loss(label_smoothing=0.1)),),
    "QuickNet, sized for small images", """\
As quicknet, but: a small network, 20 epochs with 2 of warm-up, batch 64, the labels smoothed,
  images shifted and not cropped or mirrored.""",
    model="quicknet", model_options=("blocks=(1, 1, 1)", "filters=(32, 64, 128)"))

RECIPES = {recipe.name: recipe for recipe in (
    ADAMBNN, REACTNET_A, REACTNET_18, BOP_CIFAR10, BOP_IMAGENET, QUICKNET, REAL_TO_BINARY, BNEXT,
    ADAMBNN_DIGITS, BOP_DIGITS, QUICKNET_DIGITS)}
RECIPES |= {recipe.name: recipe for recipe in larq_zoo.RECIPES}
