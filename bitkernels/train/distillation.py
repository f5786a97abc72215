"""Losses that train a binary network against a real one.

ReActNet (Liu et al. 2020, arXiv 2003.03488) and AdamBNN train on a teacher's outputs alone,
`distribution_loss`. Real-to-Binary (Martinez et al. 2020, openreview BJg4NgBKvH) adds to the
cross-entropy with the labels an `attention_matching_loss` on features inside the network and an
`output_matching_loss` on the logits. The teacher is a constant in all of them: no gradient enters
it. `bitkernels.train.Loss` weighs them in a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "FeatureTap",
    "Teachers",
    "attention_matching_loss",
    "distribution_loss",
    "output_matching_loss",
    "soft_labels_loss",
]


def distribution_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """ReActNet's loss: mean over the batch of -sum_c softmax(teacher)_c log softmax(student)_c.

    student, teacher: logits (N, classes), no labels and no temperature. The published code calls
    it the Kullback-Leibler divergence; it is larger by the teacher's entropy, a constant.

    Raises ValueError for logits of different shapes.
    """
    _check_logits(student, teacher)
    return F.cross_entropy(student, teacher.detach().softmax(1))


def output_matching_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch.

    student, teacher: logits (N, classes). 0 where both agree. Sources: Hinton et al. 2015 (the
    factor T^2 keeps the gradients' size); Larq Zoo's OutputDistributionMatchingLossLayer.

    Raises ValueError for logits of different shapes and a temperature that is not positive.
    """
    _check_logits(student, teacher)
    if not temperature > 0:
        raise ValueError(f"output_matching_loss: temperature must be positive, got {temperature!r}")
    divergence = F.kl_div((student / temperature).log_softmax(1),
                          (teacher.detach() / temperature).log_softmax(1),
                          reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def soft_labels_loss(student: Tensor, teachers: Tensor) -> Tensor:
    """BNext's loss: soft labels of several teachers, those the student misses most weighing most.

    student: logits (N, classes); teachers: (T, N, classes). With l_tn the cross-entropy of image n
    with the labels softmax(teacher t): mean over t of (mean_n a_tn) (mean_n l_tn), where a_tn is
    the softmax over t of l_tn, a constant for the gradient. That is what the published code
    (github.com/hpi-xnor/BNext) computes; it reads as if the product were meant image by image.

    Raises ValueError for shapes that do not fit.
    """
    if student.dim() != 2 or teachers.dim() != 3 or teachers.shape[1:] != student.shape:
        raise ValueError("soft_labels_loss: the student's logits must be (N, classes) and the "
                         f"teachers' (T, N, classes), got shapes {tuple(student.shape)} and "
                         f"{tuple(teachers.shape)}")
    losses = torch.stack([F.cross_entropy(student, labels, reduction="none")
                          for labels in teachers.detach().softmax(2)])
    return (losses.detach().softmax(0).mean(1) * losses.mean(1)).mean()


class Teachers(nn.ModuleList):
    """Several networks as the one teacher of `Loss.teachers`: images to (networks, N, classes)."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images).float() for network in self])


def attention_matching_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of where two networks are active, over pairs of features.

        a(x) = mean over channels of x^2          (N, H, W)
        q(x) = a / max over H and W of a
        loss = mean over pairs, batch, H and W of (q(student) - q(teacher))^2

    student, teacher: features (N, C, H, W); the channels of a pair may differ, its images may not.
    A sample whose features are all 0 has q = 0. This is Larq Zoo's AttentionMatchingLossLayer,
    whose weight is 30; the paper (section 4.2) divides by the L2 norm instead of the maximum.

    Raises ValueError for lists of different lengths, empty ones, and pairs that do not fit.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f"attention_matching_loss: {len(student)} features of the student, "
                         f"{len(teacher)} of the teacher; give as many, and at least one")
    losses = []
    for i, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        fits = ours.dim() == theirs.dim() == 4 and (
            ours.shape[0] == theirs.shape[0] and ours.shape[2:] == theirs.shape[2:])
        if not fits:
            raise ValueError(f"attention_matching_loss: pair {i} has shapes {tuple(ours.shape)} and"
                             f" {tuple(theirs.shape)}; both must be (N, C, H, W) with the same N, "
                             "H and W")
        losses.append((_attention(ours) - _attention(theirs.detach())).square().mean())
    return torch.stack(losses).mean()


def _attention(features: Tensor) -> Tensor:
    x = features if features.dtype == torch.float64 else features.float()
    attention = x.square().mean(1).flatten(1)
    return attention / attention.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError("logits of student and teacher must be (N, classes) both, got shapes "
                         f"{tuple(student.shape)} and {tuple(teacher.shape)}")


class FeatureTap:
    """The outputs of some submodules in the last forward pass, kept by hooks until `close`.

        with FeatureTap(model, ["blocks.1", "blocks.3"]) as tap:
            model(images)
            features = tap.features()

    features() returns and forgets them, in the order of the names: a second call without a forward
    pass in between raises RuntimeError, as does a submodule that did not run. Tap a model before
    `torch.compile` or DistributedDataParallel wraps it. Raises ValueError for a name that there is
    not.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        if unknown := [name for name in names if name not in modules]:
            raise ValueError(f"{type(model).__name__} has no submodule {', '.join(unknown)}")
        self.names = tuple(names)
        self._outputs: dict[str, Tensor] = {}
        self._handles = [modules[name].register_forward_hook(self._keep(name)) for name in names]

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._outputs[name] = output

        return hook

    def features(self) -> list[Tensor]:
        if missing := [name for name in self.names if name not in self._outputs]:
            raise RuntimeError(f"no forward pass gave the features of {', '.join(missing)}")
        outputs, self._outputs = self._outputs, {}
        return [outputs[name] for name in self.names]

    def close(self) -> None:
        """Remove the hooks and forget the features."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
