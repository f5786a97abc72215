"""bitkernels.train.distillation: values by their formulas, gradients, hooks, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bitkernels import models
from bitkernels.train.distillation import (
    FeatureTap,
    attention_matching_loss,
    distribution_loss,
    output_matching_loss,
    soft_labels_loss,
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


def test_soft_labels_by_hand():
    student, teachers = torch.randn(3, 5, requires_grad=True), torch.randn(2, 3, 5)
    losses = [[-(teachers[t, n].softmax(0) * student[n].log_softmax(0)).sum() for n in range(3)]
              for t in range(2)]
    total = 0.0
    for t in range(2):
        share = sum(softmax([losses[u][n].item() for u in range(2)])[t]
                    for n in range(3)) / 3
        total = total + share * sum(losses[t]) / 3
    found = soft_labels_loss(student, teachers)
    torch.testing.assert_close(found, total / 2)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0]
                                 for loss in (found, total / 2)))
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(2, 3, 4\)"):
        soft_labels_loss(student, teachers[..., :4])


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


def test_no_gradient_enters_the_teacher():
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    attention_matching_loss([student], [teacher]).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None
    student, teacher = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    output_matching_loss(student, teacher, 2.0).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None


def test_attention_of_a_silent_sample_is_zero():
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = attention_matching_loss([student], [torch.ones(1, 2, 3, 3)])
    loss.backward()
    assert loss.item() == 1 and torch.equal(student.grad, torch.zeros_like(student))


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
    with pytest.raises(ValueError, match="no submodule blocks.9"):
        FeatureTap(models.ReActNet(channels=(8, 8)), ["blocks.9"])
