"""Metrics against counts by hand, and what the watcher's hooks see."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkernels import metrics
from bitkernels.metrics import C2IRatio, DeadWeights, FlipRatio, Histogram, Saturation, watch
from bitkernels.metrics.base import popcount
from bitkernels.nn import BinaryConv2d, BinaryLinear, RSign
from bitkernels.optim import Bop, CaseOptimizer, is_binary_weight
from bitkernels_tests.cases import reals

T = torch.tensor


# Tensors too small for threads, which would cost more than all the rest.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_popcount(device):
    words = torch.randint(-2**31, 2**31, (1000,)).int()
    expected = sum(bin(w & 0xFFFFFFFF).count("1") for w in words.tolist())
    assert popcount(words.to(device)).item() == expected
    assert popcount(T([-1, 0, 1, -2**31], dtype=torch.int32)).item() == 34


def test_flip_ratio_by_hand():
    flip = FlipRatio()
    assert math.isnan(flip.last) and flip.value == 0
    flip.update(T([1.0, 1.0, 0.0, -2.0]))  # ++ + -: the first one does not count
    assert math.isnan(flip.last) and flip.value == 0
    flip.update(T([-1.0, 1.0, -0.0, -3.0]))  # one of four
    assert flip.last == flip.value == 0.25
    flip.update(T([1.0, -1.0, -1.0, -3.0]))  # three of four
    assert flip.last == 0.75 and flip.value == 0.5
    flip.reset()
    assert flip.value == 0 and flip.last == 0.75
    flip.update(T([1.0, 1.0, -1.0, -3.0]))  # after a reset not in the mean, but in last
    assert flip.value == 0 and flip.last == 0.25
    flip.update(T([1.0, 1.0, 1.0, 3.0]))
    assert flip.value == flip.last == 0.5


def larq_flip_ratio(values):
    """Larq's bookkeeping: total += ratio * sign(count), count += 1, total / (count - 1)."""
    total = count = 0.0
    previous = torch.zeros_like(values[0])
    for v in values:
        total += (v != previous).float().mean().item() * (count > 0)
        count += 1
        previous = v
    return total / (count - 1)


@pytest.mark.parametrize("shape", [(5,), (32,), (33, 7), (4, 3, 3, 3), (1, 64)])
def test_flip_ratio_is_larqs(shape, device):
    flip, seen = FlipRatio(), []
    for _ in range(6):
        x = reals(*shape, device=device)
        flip.update(x)
        seen.append(torch.where(x < 0, -1.0, 1.0))
    assert flip.value == pytest.approx(larq_flip_ratio(seen), abs=1e-6)
    assert flip._reference.numel() == -(-x.numel() // 32)  # one bit a weight


def test_flip_ratio_follows_memory_formats():
    x = torch.randn(4, 6, 3, 3)
    flip = FlipRatio()
    flip.update(x)
    flip.update(x.contiguous(memory_format=torch.channels_last))
    assert flip.last == 0


def test_c2i_by_hand():
    c2i = C2IRatio()
    assert math.isnan(c2i.value)
    for x, expected in (([1.0, -1, 2, -2, 0], 1.0), ([1.0, 1, 2, -2, 0], 0.8),
                        ([-1.0, 1, -2, 2, -1], 0.0), ([3.0, -3, 3, -3, 3], 1.0)):
        c2i.update(T(x))
        assert c2i.value == pytest.approx(expected)
    c2i.reset()
    c2i.update(T([-1.0]))
    assert c2i.value == 1


def test_dead_weights_by_hand():
    dead = DeadWeights(window=3, tolerance=0.0)
    w = T([1.0, 1.0, 1.0, -1.0, 1.0])
    zero, push = torch.zeros(5), T([0.0, 0.0, 1e-6, 0.0, 0.0])
    dead.update(w, zero)
    assert math.isnan(dead.value) and dead.current == 1
    dead.update(w * T([1.0, -1, 1, 1, 1]), zero)  # weight 1 changes
    assert dead.current == 0.8
    dead.update(w * T([1.0, -1, 1, 1, 1]), push)  # weight 2 is pushed
    assert dead.value == 0.6 and math.isnan(dead.current)
    dead.update(w, zero)  # weight 1 changes across the windows: in the second one
    assert dead.value == 0.6 and dead.current == 0.8
    dead.update(w, T([float("nan")] + [0.0] * 4))  # rms is NaN: all count as pushed
    assert dead.current == 0


def test_dead_weights_are_relative_to_the_gradient():
    grad = T([1.0, 1.0, 1.0, 0.009, -0.008])  # rms sqrt(3 / 5) = 0.775, a hundredth 0.00775
    for scale in (1.0, 65536.0, 1e-12):
        dead = DeadWeights(window=1)
        dead.update(torch.ones(5), grad * scale)
        assert dead.value == 0
        dead.update(torch.ones(5), grad * T([1, 1, 1, 0.8, 0.8]) * scale)
        assert dead.value == pytest.approx(0.4)


def test_saturation_by_hand(device):
    sat = Saturation()
    assert math.isnan(sat.value)
    sat.update(T([1.0, -1.0, 1.0001, -5.0, 0.0], device=device))
    assert sat.value == 0.4
    sat.update(torch.full((5,), float("nan"), device=device))
    assert sat.value == 0.7
    x = torch.randn(2, 5, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    sat.reset()
    sat.update(x)
    assert sat.value == pytest.approx((x.abs() > 1).float().mean().item())


def test_histogram(monkeypatch):
    monkeypatch.setattr(Histogram, "_CHUNK", 7)
    h = Histogram(bins=4, low=-1, high=1)
    assert h.value.tolist() == [0] * 4 and h.below == h.above == 0
    h.update(T([-1.0, -0.6, -0.5, 0.0, 0.4, 0.5, 1.0, 1.1, -3.0, -2.0, float("nan")]))
    h.update(T([0.75]).half())
    assert h.value.tolist() == [2, 1, 2, 3] and (h.below, h.above) == (2, 1)
    assert h.edges.tolist() == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize("make, values", [
    (FlipRatio, ["last", "value"]), (C2IRatio, ["value"]), (Saturation, ["value"]),
    (lambda: DeadWeights(3), ["value", "current"]), (Histogram, ["below", "above"])])
def test_state_dict_continues(make, values, tmp_path):
    a, b = make(), make()
    grads = isinstance(a, DeadWeights)
    inputs = [(torch.randn(70), torch.randn(70) * (torch.rand(70) < 0.5))[: 1 + grads]
              for _ in range(7)]
    for x in inputs[:4]:
        a.update(*x)
    torch.save(a.state_dict(), tmp_path / "m.pt")
    b.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    for x in inputs[4:]:
        a.update(*x)
        b.update(*x)
    for name in values:
        assert getattr(a, name) == getattr(b, name)
    with pytest.raises(KeyError):
        b.load_state_dict({})


@pytest.mark.parametrize("call, match", [
    (lambda: [f.update(torch.ones(n)) for f in [FlipRatio()] for n in (3, 4)], "had 3 elements"),
    (lambda: DeadWeights(2.5), "window must be an integer"),
    (lambda: Histogram(2.5), "bins must be an integer of at least 1, got 2.5"),
    (lambda: Histogram(4, -torch.inf), "low must be a finite number, got -inf"),
    (lambda: DeadWeights(0), "window must be"), (lambda: DeadWeights(5, -1.0), "tolerance"),
    (lambda: DeadWeights().update(torch.ones(3), torch.ones(1)), r"gradient of shape \(1,\)"),
    (lambda: Saturation(-1.0), "clip"), (lambda: Histogram(0), "bins must be"),
    (lambda: Histogram(4, 1, 1), "high must be above low"),
    (lambda: watch(nn.Linear(2, 2)), "no layer with binary weights"),
    (lambda: watch(BinaryLinear(2, 2), every=0), "every"),
    (lambda: watch(BinaryLinear(2, 2), torch.optim.SGD([torch.zeros(1)])), "holds none")])
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), BinaryConv2d(6, 5, 3, weight_scale="detached"), RSign(5),
        BinaryConv2d(5, 8, 3, input_quantizer=None), nn.Flatten(),
        BinaryLinear(32, 3, weight_quantizer="magnitude_aware_sign"))


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 1, 8, 8, generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long()).backward()
        optimizer.step()


def optimizer_of(model):
    return CaseOptimizer(model, (is_binary_weight(model), lambda p: Bop(p, 0.1, 1e-4)),
                         default=lambda p: torch.optim.Adam(p))


def signs(model):
    return {n: torch.where(model[int(n)].weight < 0, -1, 1) for n in ("1", "3", "5")}


def test_watch_a_training():
    model = network()
    optimizer, start = optimizer_of(model), signs(model)
    with watch(model, optimizer, histograms=True, window=2) as watcher:
        assert list(watcher.weights) == ["1", "3", "5"]
        assert list(watcher.activations) == ["1", "2", "5"]
        inputs = []
        model[1].register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
        previous, ratios = start, {n: [] for n in start}
        for step in range(4):
            train(model, optimizer, 1, step)
            now = signs(model)
            for n, was in previous.items():
                ratios[n].append((now[n] != was).double().mean().item())
            previous = now
        values = watcher.scalars()
        assert sum(ratios["1"]) > 0
        for n in start:
            assert values[f"flip_ratio/{n}"] == pytest.approx(ratios[n][-1])
            assert values[f"flip_ratio_mean/{n}"] == pytest.approx(sum(ratios[n]) / 4)
            same = (now[n] == start[n]).double().mean().item()
            assert values[f"c2i_ratio/{n}"] == pytest.approx(same)
            assert 0 <= values[f"dead_weights/{n}"] <= 1
        total = sum((now[n] != start[n]).sum().item() for n in start)
        size = sum(w.numel() for w in start.values())
        assert values["c2i_ratio"] == pytest.approx(1 - total / size)
        share = (torch.cat(inputs).abs() > 1).double().mean().item()
        assert values["saturation/1"] == pytest.approx(share)
        found = watcher.histograms()
        assert set(found) == {f"{kind}/{n}" for kind, names in (
            ("weight", start), ("activation", "125")) for n in names}
        assert found["weight/1"].value.sum() == model[1].weight.numel()
        x = torch.cat(inputs)
        counted = found["activation/1"]
        assert counted.value.sum() + counted.below + counted.above == x.numel()
        watcher.reset()
        assert watcher.scalars()["flip_ratio_mean"] == 0 and math.isnan(
            watcher.scalars()["saturation"])
    assert not optimizer._optimizer_step_post_hooks
    assert all(not m._forward_pre_hooks for i, m in enumerate(model) if i != 1)
    before = watcher.scalars()
    train(model, optimizer, 1)
    after = watcher.scalars()
    assert before.keys() == after.keys()
    assert all(after[k] == v or math.isnan(v) for k, v in before.items())


def test_watching_changes_nothing_and_resumes():
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = optimizer_of(model), optimizer_of(twin)
    watcher = watch(model, optimizer, window=3)
    train(model, optimizer, 4)
    train(twin, other, 4)
    resumed = watch(twin, other, window=3)
    resumed.load_state_dict(copy.deepcopy(watcher.state_dict()))
    train(model, optimizer, 3, start=4)
    train(twin, other, 3, start=4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert watcher.scalars() == resumed.scalars()


def test_watch_inputs():
    model = nn.Sequential(BinaryLinear(4, 4, input_quantizer="approx_sign"), RSign(4))
    watcher = watch(model, every=2)
    x = T([[0.5, 1.5, 2.5, -3.0]])
    with torch.no_grad():
        model[1].shift.fill_(0.75)
    model[0](input=x)
    model[1](x)
    model.eval()
    model(x * 0)
    model.train()
    model(x * 0)  # the second forward pass of each in training: left out
    values = watcher.scalars()
    assert values["saturation/0"] == 0.75 and values["saturation/1"] == 1.0
    assert watch(model, activations=False).activations == {}


def test_watch_custom_and_shared_weights():
    class Negated(nn.Module):
        precision = 1

        def forward(self, w):
            return torch.where(w < 0, 1.0, -1.0)

    model = nn.Sequential(BinaryLinear(4, 4, weight_quantizer=Negated()), BinaryLinear(4, 4))
    model[1].weight = model[0].weight
    watcher = watch(model)
    assert list(watcher.weights) == ["0"]
    assert list(watch(BinaryLinear(2, 2)).weights) == ["BinaryLinear"]
    with torch.no_grad():
        model[0].weight.neg_()
    watcher.update()
    assert watcher.scalars()["flip_ratio"] == 1


def test_without_a_watcher_there_are_no_hooks():
    model = network()
    optimizer = optimizer_of(model)
    watch(model, optimizer).close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_post_hooks
    assert set(metrics.__all__) >= {"FlipRatio", "watch"}


def test_watch_under_compile():
    model = nn.Sequential(BinaryLinear(4, 4))
    watcher = watch(model)
    compiled = torch.compile(model, backend="eager")
    x = T([[0.5, 1.5, 2.5, -3.0]])
    for _ in range(3):
        assert torch.equal(compiled(x), model[0](x))
    assert watcher.activations["0"]["saturation"].value == 0.75
    assert watcher.activations["0"]["saturation"]._count == 24
