"""bitkernels.train.distillation: values by their formulas, gradients, hooks, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bitkernels import models
from bitkernels.train.distillation import (
    REAL_TO_BINARY,
    DistillationLoss,
    DistillationWeights,
    FeatureTap,
    attention_matching_loss,
    distribution_loss,
    output_matching_loss,
)


def softmax(row):
    powers = [math.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


def test_distribution_loss_by_hand():
    student, teacher = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    expected = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(theirs), softmax(ours)
        expected -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / 5
    assert distribution_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_distribution_loss_has_the_gradient_of_the_divergence():
    student = torch.randn(6, 10, requires_grad=True)
    teacher = torch.randn(6, 10, requires_grad=True)
    distribution_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad,
                               ((student.softmax(1) - teacher.softmax(1)) / 6).detach())
    assert teacher.grad is None


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_output_matching_by_hand(temperature):
    student, teacher = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    expected = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p = softmax([v / temperature for v in theirs])
        q = softmax([v / temperature for v in ours])
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    value = output_matching_loss(student, teacher, temperature).item()
    assert value == pytest.approx(temperature**2 * expected, rel=1e-10)
    assert output_matching_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-12)


def test_attention_matching_by_hand():
    # One channel: attention of the student (1, 0.25), of the teacher (0.25, 1).
    student = torch.tensor([2.0, 1.0]).view(1, 1, 1, 2)
    teacher = torch.tensor([-1.0, 2.0]).view(1, 1, 1, 2)
    assert attention_matching_loss([student], [teacher]).item() == pytest.approx(0.75**2)
    # Channels are averaged, so their number may differ; the scale of the features is of no matter.
    twice = student.repeat(1, 3, 1, 1) * 7
    assert attention_matching_loss([twice], [teacher]).item() == pytest.approx(0.75**2)
    pair = attention_matching_loss([student, teacher], [teacher, teacher])
    assert pair.item() == pytest.approx(0.75**2 / 2)


def test_attention_of_a_silent_sample_is_zero():
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = attention_matching_loss([student], [torch.ones(1, 2, 3, 3)])
    loss.backward()
    assert loss.item() == 1 and torch.equal(student.grad, torch.zeros_like(student))


def test_weights_are_those_of_larq_zoo():
    stages = [(w.classification, w.attention, w.output, w.temperature)
              for w in REAL_TO_BINARY.values()]
    assert list(REAL_TO_BINARY) == ["real", "real_tanh", "binary_activations", "binary"]
    assert stages == [(1, 0, 0, 1), (1, 30, 3, 1), (1, 30, 3, 1), (1, 0, 0.8, 1)]


def networks():
    return (models.ReActNet(channels=(8, 16, 16), in_channels=1),
            models.ReActNet(channels=(16, 32, 32), in_channels=1, binary_weights=False))


def test_distillation_is_the_weighted_sum():
    student, teacher = networks()
    weights = DistillationWeights(classification=0.5, attention=30, output=3, temperature=2)
    images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    loss = DistillationLoss(student, teacher, weights, ["blocks.0", "blocks.1"])
    with FeatureTap(student, ["blocks.0", "blocks.1"]) as ours:
        logits = student(images)
        mine = ours.features()
    total = loss(images, logits, labels)
    with torch.no_grad(), FeatureTap(teacher, ["blocks.0", "blocks.1"]) as theirs:
        expected = teacher.eval()(images)
        features = theirs.features()
    torch.testing.assert_close(
        total, 0.5 * nn.functional.cross_entropy(logits, labels)
        + 30 * attention_matching_loss(mine, features) + 3 * output_matching_loss(
            logits, expected, 2))
    total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.blocks[0].conv1.weight.grad.abs().max() > 0


def test_teacher_is_asked_in_eval_mode_and_left_as_it_was():
    student, teacher = networks()
    teacher.train()
    teacher.blocks.eval()
    before = {name: b.clone() for name, b in teacher.named_buffers()}
    loss = DistillationLoss(student, teacher, REAL_TO_BINARY["binary"])
    images = torch.randn(4, 1, 8, 8)
    loss(images, student(images), torch.randint(10, (4,)))
    assert teacher.training and teacher.stem.training and not teacher.blocks.training
    assert all(torch.equal(b, before[name]) for name, b in teacher.named_buffers())


def test_a_tap_gives_each_pass_once_and_can_be_removed():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    tap = FeatureTap(model, ["0", "1"])
    with pytest.raises(RuntimeError, match="no forward pass gave the features of 0, 1"):
        tap.features()
    model(torch.ones(1, 2))
    first, second = tap.features()
    assert torch.equal(first.relu(), second)
    with pytest.raises(RuntimeError, match="no forward pass"):
        tap.features()
    tap.close()
    model(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="no forward pass"):
        tap.features()
    assert not model[0]._forward_hooks


def test_what_does_not_fit_is_refused():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    for loss in (distribution_loss, output_matching_loss):
        with pytest.raises(ValueError, match=r"got shapes \(2, 3\) and \(2, 4\)"):
            loss(a, b)
    with pytest.raises(ValueError, match="temperature must be positive"):
        output_matching_loss(a, a, 0)
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="1 features of the student, 2 of the teacher"):
        attention_matching_loss([x], [x, x])
    with pytest.raises(ValueError, match="at least one"):
        attention_matching_loss([], [])
    with pytest.raises(ValueError, match=r"pair 1 .*\(2, 3, 4, 4\) and \(2, 3, 4, 2\)"):
        attention_matching_loss([x, x], [x, x[..., :2]])
    student, teacher = networks()
    with pytest.raises(ValueError, match="no submodule blocks.9"):
        FeatureTap(student, ["blocks.9"])
    with pytest.raises(ValueError, match="one needs the other"):
        DistillationLoss(student, teacher, REAL_TO_BINARY["real_tanh"])
    with pytest.raises(ValueError, match="one needs the other"):
        DistillationLoss(student, teacher, REAL_TO_BINARY["binary"], ["blocks.0"])
    with pytest.raises(ValueError, match="1 points of the student, 2 of the teacher"):
        DistillationLoss(student, teacher, REAL_TO_BINARY["real_tanh"], ["blocks.0"],
                         ["blocks.0", "blocks.1"])
