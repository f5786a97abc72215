"""Bop, Bop2ndOrder and CaseOptimizer against numpy, and as optimizers of torch."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from bitkernels.nn import BinaryLinear
from bitkernels.optim import (
    Bop,
    Bop2ndOrder,
    CaseOptimizer,
    ScheduledHyperparameter,
)
from bitkernels.quantizers import NoOp
from bitkernels_tests import ROOT

STEPS = 60
SHAPES = ((7, 5), (4, 3, 3, 3), (40,))
OPTIMIZERS = {
    "bop": lambda p, **kw: Bop(p, gamma=1e-2, threshold=2e-3, **kw),
    "biased": lambda p, **kw: Bop2ndOrder(p, 1e-2, 2e-2, 1e-2, **kw),
    "unbiased": lambda p, **kw: Bop2ndOrder(p, 1e-2, 0.5, 1e-3, unbiased=True, **kw),
}


# Tensors too small for threads, which would cost more than all the rest.
pytestmark = pytest.mark.usefixtures("one_thread")


def make(device="cpu", dtype=torch.float32):
    """Weights of several shapes, real at first, with exact zeros."""
    weights = [torch.randn(s, device=device, dtype=dtype) for s in SHAPES]
    for w in weights:
        w.view(-1)[3], w.view(-1)[4] = 0.0, -0.0
    return [nn.Parameter(w) for w in weights]


def gradients(step, params):
    """A drifting mean and noise, zero now and then, the same for each call."""
    g = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        drift = torch.linspace(-1, 1, p.numel()).view(p.shape) * np.cos(step / 9 + i)
        grad = 0.1 * (torch.randn(p.shape, generator=g) + drift)
        grad.view(-1)[step % p.numel()] = 0.0
        p.grad = grad.to(p.device, p.dtype)


def published(rule, weights, grads, state, gamma, tau, sigma):
    """One step of the rule in words: flip where the test is passed, +1 at equality."""
    tests = {"bop": lambda m, v: m, "biased": lambda m, v: m / (np.sqrt(v) + 1e-10),
             "unbiased": lambda m, v: (m / gamma) / (np.sqrt(v / sigma) + 1e-10)}
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        m, v = state[i]
        m = ((1 - gamma) * m + gamma * g).astype(w.dtype)
        v = ((1 - sigma) * v + sigma * g * g).astype(w.dtype)
        state[i] = m, v
        test = tests[rule](m, v) * w
        old = np.where(w < 0, -1.0, 1.0)
        weights[i] = np.where(test == tau, 1.0, np.where(test > tau, -old, old)).astype(w.dtype)


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("foreach", [False, True])
def test_trace_is_the_published_rule(rule, foreach, device):
    params = make(device, torch.float64)
    optimizer = OPTIMIZERS[rule](params, foreach=foreach)
    group = optimizer.param_groups[0]
    weights = [p.detach().cpu().numpy().copy() for p in params]
    state = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    flips = 0
    for step in range(STEPS):
        gradients(step, params)
        before = [w.copy() for w in weights]
        published(rule, weights, [p.grad.cpu().numpy() for p in params], state, group["lr"],
                  group["threshold"], group.get("sigma", 0.0))
        optimizer.step()
        flips += sum((a * b < 0).sum() for a, b in zip(before, weights, strict=True))
        for p, w, (m, v) in zip(params, weights, state, strict=True):
            assert np.array_equal(p.detach().cpu().numpy(), w)
            np.testing.assert_allclose(optimizer.state[p]["momentum"].cpu(), m, atol=1e-6)
            if rule != "bop":
                np.testing.assert_allclose(optimizer.state[p]["variance"].cpu(), v, atol=1e-6)
    assert flips > STEPS  # the trace is one of weights that do flip


def larq_step(w, m, g, gamma, tau):
    """Larq's Bop in float32, in its order of operations: lq.sign(-sign(w m - tau) w)."""
    m = m + np.float32(gamma) * (g - m)
    r = -np.sign(w * m - np.float32(tau)) * w
    return np.sign(np.sign(r) + np.float32(0.1)), m


def test_float32_trace_is_larqs():
    """Larq's recipe, gamma 1e-4 and threshold 1e-8, gradients of the size of a real network's."""
    (w, *_), tau = make(), 1e-8
    optimizer = Bop([w])
    expected, m, flips = w.detach().numpy().copy(), np.zeros(w.shape, np.float32), 0
    for step in range(STEPS):
        gradients(step, [w])
        w.grad.mul_(1e-4)
        before = expected
        expected, m = larq_step(before, m, w.grad.numpy(), 1e-4, tau)
        flips += (before * expected < 0).sum()
        optimizer.step()
        assert np.array_equal(w.detach().numpy(), expected)
        np.testing.assert_allclose(optimizer.state[w]["momentum"], m, atol=1e-6, rtol=1e-6)
    assert flips > 10


@pytest.mark.parametrize("make_optimizer", [
    lambda p, tau: Bop(p, gamma=1.0, threshold=tau),
    lambda p, tau: Bop2ndOrder(p, gamma=1.0, threshold=tau, sigma=1.0)])
def test_equality_gives_plus_one(make_optimizer):
    w = nn.Parameter(torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0]))
    w.grad = torch.zeros(5)
    make_optimizer([w], 0.0).step()  # w m == 0 == threshold
    assert torch.equal(w, torch.ones(5))


def test_equality_at_a_threshold():
    w = nn.Parameter(torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))
    w.grad = torch.tensor([0.5, -0.5, 0.25, -0.25, 0.75, -0.75])
    Bop([w], gamma=1.0, threshold=0.5).step()
    assert w.tolist() == [1, 1, 1, -1, -1, 1]


def test_first_step_snaps_real_weights_and_tests_their_value():
    w = nn.Parameter(torch.tensor([0.3, -0.3, 0.0, -0.0, 2.0, 0.2]))
    w.grad = torch.tensor([0.0, 0.0, 1.0, -1.0, 1.0, 1.0])
    Bop([w], gamma=1.0, threshold=0.5).step()
    assert w.tolist() == [1, -1, 1, 1, -1, 1]  # 2.0 * 1 > 0.5, but 0.2 * 1 is not


def test_nan_leaves_plus_one():
    w = nn.Parameter(torch.tensor([-1.0, 1.0, -1.0]))
    w.grad = torch.tensor([float("nan"), float("nan"), 0.0])
    Bop([w], threshold=1e-8).step()
    assert w.tolist() == [1, 1, -1]


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_foreach_equals_the_loop(rule, dtype, device):
    torch.manual_seed(0)
    params = make(device, dtype)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    a, b = OPTIMIZERS[rule](params, foreach=True), OPTIMIZERS[rule](twins, foreach=False)
    for step in range(20):
        gradients(step, params)
        gradients(step, twins)
        a.step()
        b.step()
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p, q) and p.dtype == dtype
            m, n = a.state[p]["momentum"], b.state[q]["momentum"]
            assert torch.equal(m, n) and m.dtype == torch.float32


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_continues_identically(rule, dtype, tmp_path):
    params = make(dtype=dtype)
    optimizer = OPTIMIZERS[rule](params)
    for step in range(5):
        gradients(step, params)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = Bop(twins) if rule == "bop" else Bop2ndOrder(twins)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(5, 15):
        for ps, o in ((params, optimizer), (twins, twin)):
            gradients(step, ps)
            o.step()
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(optimizer.state[p]["momentum"], twin.state[q]["momentum"])


def test_closure_groups_and_missing_gradients():
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = Bop([{"params": [a], "gamma": 1.0}, {"params": [b, c], "threshold": 5.0}],
                    gamma=0.5, threshold=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (a + b).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert a.tolist() == [-1] * 3 and b.tolist() == [1] * 3 and c not in optimizer.state
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.5]
    assert optimizer.state[b]["momentum"].tolist() == [0.5] * 3


def test_schedulers_drive_gamma_and_threshold():
    w = nn.Parameter(torch.ones(3))
    optimizer = Bop([w], gamma=0.1, threshold=1e-3)
    face = ScheduledHyperparameter(optimizer, "threshold")
    gamma = CosineAnnealingLR(optimizer, T_max=4, eta_min=0.0)
    threshold = LambdaLR(face, lambda epoch: 0.5**epoch)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no complaint about the order of the steps
        for _ in range(4):
            w.grad = torch.ones(3)
            optimizer.step()
            gamma.step()
            threshold.step()
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["threshold"]))
    cosine = [0.05 * (1 + np.cos(np.pi * t / 4)) for t in range(1, 5)]
    np.testing.assert_allclose(seen, np.array([cosine, [1e-3 * 0.5**t for t in range(1, 5)]]).T,
                               atol=1e-12)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][0]["initial_threshold"] == 1e-3
    optimizer.load_state_dict(state)  # new dicts in the optimizer; the face follows
    threshold.step()
    assert optimizer.param_groups[0]["threshold"] == pytest.approx(1e-3 * 0.5**5)


def test_scheduled_gamma_enters_the_update():
    w = nn.Parameter(torch.ones(1))
    optimizer = Bop([w], gamma=1.0, threshold=10.0)
    schedule = StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        w.grad = torch.ones(1) * 8
        optimizer.step()
        schedule.step()
        w.grad.zero_()
    assert optimizer.state[w]["momentum"].item() == 8.0
    OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)


def test_unbiased_with_gamma_zero_leaves_weights():
    w = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = Bop2ndOrder([w], gamma=0.0, threshold=0.0, unbiased=True)
    w.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    assert w.tolist() == [1, -1]


@pytest.mark.parametrize("make", [
    lambda ps: Bop(ps, gamma=0.5, threshold=0.0),
    lambda ps: Bop2ndOrder(ps, gamma=0.5, threshold=0.0, foreach=True),
    lambda ps: CaseOptimizer([("w", ps[0])], (lambda *_: True, lambda p: Bop(p, threshold=0.0)))])
def test_checkpoints_make_the_state_and_leave_the_weights(make):
    """torch.distributed.checkpoint steps with gradients and a learning rate of 0 for it."""
    layer = BinaryLinear(6, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = make([layer.weight])
    state = get_optimizer_state_dict(layer, optimizer)["state"]
    assert torch.equal(layer.weight, before)
    assert state["weight"]["momentum"].tolist() == [[0.0] * 6] * 2
    rate = optimizer.param_groups[0]["lr"]
    assert rate > 0
    layer.weight.grad = -torch.sign(before)  # grows them: no weight flips
    optimizer.step()
    assert torch.equal(layer.weight, torch.sign(before))
    optimizer.param_groups[0]["lr"] = 0.0  # the moments stay, and so the test
    layer.weight.grad = torch.sign(before)
    optimizer.step()
    assert torch.equal(layer.weight, torch.sign(before))


@pytest.mark.parametrize("quantizer, learns", [
    (None, True), (NoOp(precision=1), True), ("ste_sign", True), ("approx_sign", False)])
def test_weight_quantizers_that_pass_gradients_at_one(quantizer, learns):
    layer = BinaryLinear(40, 8, weight_quantizer=quantizer)
    optimizer = Bop([layer.weight], gamma=1.0, threshold=1e-6)
    changed = []
    for _ in range(4):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        layer(torch.randn(16, 40)).square().mean().backward()
        optimizer.step()
        changed.append((before * layer.weight < 0).any().item())
    assert any(changed[1:]) == learns  # the first step starts from real weights


def test_the_example_of_the_documentation(capsys):
    page = ROOT / "docs" / "training.md"
    if not page.exists():
        pytest.skip("installed without docs")
    space: dict = {}
    examples = [part.split("```")[0] for part in page.read_text().split("```python")[1:]]
    exec(next(code for code in examples if "CaseOptimizer" in code), space)
    group, = space["bop"].param_groups
    assert group["lr"] == pytest.approx(0, abs=1e-12) and group["threshold"] == 1e-7
    assert "c2i_ratio" in capsys.readouterr().out


def test_grad_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    w, twin = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer, plain = Bop([w], 0.5, 0.1), Bop([twin], 0.5, 0.1)
    x = torch.tensor([1.0, -1.0, 0.1, 0.3])
    for values in (x, x * float("inf"), x):
        optimizer.zero_grad()
        scaler.scale((w * values).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if values.isfinite().all():
            plain.zero_grad()
            (twin * values).sum().backward()
            plain.step()
    assert torch.equal(w, twin)
    assert torch.equal(optimizer.state[w]["momentum"], plain.state[twin]["momentum"])


@pytest.mark.parametrize("call, match", [
    (lambda p: Bop(p, gamma=-1), "gamma must be a number in"),
    (lambda p: Bop(p, gamma=float("nan")), "gamma must be a number in"),
    (lambda p: Bop(p, threshold=-1e-9), "threshold must be a number of at least 0"),
    (lambda p: Bop2ndOrder(p, sigma=2), "sigma must be a number in"),
    (lambda p: Bop([{"params": p, "gamma": 1, "lr": 1}]), "both gamma and lr"),
    (lambda p: Bop(p, gamma=1e-4, lr=1e-4), "gamma=0.0001 and lr=0.0001 are the same"),
    (lambda p: Bop2ndOrder(p, lr=2.0), r"gamma must be a number in \[0, 1\], got 2.0"),
    (lambda p: Bop([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), "complex64"),
    (lambda p: Bop(p, threshold="0"), "threshold must be a number of at least 0, got '0'"),
    (lambda p: Bop([{"params": p, "maximize": True}]), "a group has maximize=True, which Bop does"),
    (lambda p: Bop2ndOrder([{"params": p, "weight_decay": 0.1, "fused": None}]),
     "a group has weight_decay=0.1, which"),
    (lambda p: ScheduledHyperparameter(Bop(p), "sigma"), "no 'sigma'"),
    (lambda p: ScheduledHyperparameter(Bop(p), "lr"), "give the scheduler the optimizer"),
    (lambda p: Bop(p).load_state_dict(torch.optim.SGD(p).state_dict()), "not a state of Bop"),
])
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call(make())


def test_bad_steps():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Bop(embedding.parameters()).step()
    params = make()
    optimizer = Bop(params)
    optimizer.param_groups[0]["gamma"] = 0.1
    with pytest.raises(RuntimeError, match=r"group\['lr'\]"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="for schedulers"):
        ScheduledHyperparameter(optimizer, "threshold").step()
