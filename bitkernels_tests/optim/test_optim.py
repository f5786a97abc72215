"""Bop, Bop2ndOrder and CaseOptimizer against numpy, and as optimizers of torch."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from bitkernels.nn import BinaryLinear, binarize
from bitkernels.optim import (
    Bop,
    Bop2ndOrder,
    CaseOptimizer,
    ScheduledHyperparameter,
    binary_weights,
    clip_latent_weights,
    is_binary_weight,
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
    (lambda p: Bop(p, gamma=-1), "gamma must be in"),
    (lambda p: Bop(p, gamma=float("nan")), "gamma must be in"),
    (lambda p: Bop(p, threshold=-1e-9), "threshold must be at least 0"),
    (lambda p: Bop2ndOrder(p, sigma=2), "sigma must be in"),
    (lambda p: Bop([{"params": p, "gamma": 1, "lr": 1}]), "both gamma and lr"),
    (lambda p: Bop([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), "complex64"),
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


def network(**options):
    return binarize(nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 33),
                                  nn.BatchNorm1d(33), nn.Linear(33, 3)), **options)


def cases(model, **kw):
    return CaseOptimizer(model, (is_binary_weight(model), lambda p: Bop(p, gamma=1e-2)),
                         default=lambda p: torch.optim.Adam(p, lr=1e-2), **kw)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x), (x[:, 0] > 0).long() + (x[:, 1] > 0).long()).backward()
        optimizer.step()


def test_case_optimizer_is_its_optimizers():
    model = network()
    twin = copy.deepcopy(model)
    optimizer = cases(model)
    binary = set(binary_weights(twin))
    assert binary == {"2.weight"}
    bop = Bop([p for n, p in twin.named_parameters() if n in binary], gamma=1e-2)
    adam = torch.optim.Adam([p for n, p in twin.named_parameters() if n not in binary], lr=1e-2)
    train(model, optimizer, 5)

    class Both:
        def zero_grad(self):
            twin.zero_grad()

        def step(self):
            bop.step(), adam.step()

    train(twin, Both(), 5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert set(model[2].weight.unique().tolist()) == {-1.0, 1.0}
    assert len(optimizer.param_groups) == 2 and len(optimizer.state) == len(list(twin.parameters()))
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())


def test_case_optimizer_state_dict_continues_identically(tmp_path):
    model = network()
    optimizer = cases(model)
    schedule = LambdaLR(optimizer, lambda t: 0.9**t)
    train(model, optimizer, 3)
    schedule.step()
    torch.save({"o": optimizer.state_dict(), "s": schedule.state_dict()}, tmp_path / "c.pt")
    twin = copy.deepcopy(model)
    other = cases(twin)
    other_schedule = LambdaLR(other, lambda t: 0.9**t)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    other.load_state_dict(saved["o"])
    other_schedule.load_state_dict(saved["s"])
    for m, o, s in ((model, optimizer, schedule), (twin, other, other_schedule)):
        train(m, o, 4, start=3)
        s.step()
    assert [g["lr"] for g in other.param_groups] == [pytest.approx(1e-2 * 0.81)] * 2
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(pickle.loads(pickle.dumps(optimizer)).param_groups) == 2


def test_case_optimizer_closure_hooks_and_scaler():
    model, calls = network(), []
    optimizer = cases(model)
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    x = torch.randn(8, 6)

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == ["closure", "hook"]
    scaler, before = torch.amp.GradScaler("cpu"), copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    scaler.scale(model(x).sum() * float("inf")).backward()
    scaler.step(optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    schedule = StepLR(optimizer.optimizers[1], 1, 0.1)
    train(model, optimizer, 1)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, pytest.approx(1e-3)]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("make_it, error, match", [
    (lambda m: CaseOptimizer(m, (lambda n, p: True, sgd), (lambda n, p: n == "2.weight", sgd)),
     ValueError, "'2.weight' is claimed by the predicates of cases 0 and 1"),
    (lambda m: CaseOptimizer(m, (lambda n, p: False, sgd), default=sgd), ValueError,
     "case 0 claims no parameter"),
    (lambda m: CaseOptimizer(m, (lambda n, p: True, sgd(m.parameters()))), TypeError,
     "a function that makes the optimizer"),
    (lambda m: CaseOptimizer(m, default=lambda p: p), TypeError, "returned list"),
    (lambda m: CaseOptimizer(m, default=lambda p: sgd(p[1:])), ValueError, "it lacks 0.weight"),
    (lambda m: CaseOptimizer(nn.ReLU(), default=sgd), ValueError, "no parameters to optimize"),
    (lambda m: is_binary_weight(nn.Linear(2, 2)), ValueError, "Linear has no binary weights"),
    (lambda m: clip_latent_weights(sgd(m[0].parameters()), m), ValueError, "holds none"),
    (lambda m: clip_latent_weights(sgd(m.parameters()), m, 0.0), ValueError, "must be positive"),
    (lambda m: cases(m).add_param_group({"params": []}), RuntimeError, "optimizers"),
    (lambda m: cases(m).load_state_dict(cases(network(skip_last=False)).state_dict()), ValueError,
     r"missing \[\], unknown \['4.weight'\]"),
    (lambda m: cases(m).load_state_dict(sgd(m.parameters()).state_dict()), ValueError,
     "the state has 1 parameter groups"),
])
def test_case_optimizer_errors(make_it, error, match):
    with pytest.raises(error, match=match):
        make_it(network())


def test_unclaimed_parameters_are_listed():
    model = network()
    model[4].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"not trained: 0.weight, .*4.weight$"):
        CaseOptimizer(model, (is_binary_weight(model), Bop))


def test_binary_weights():
    model = nn.Sequential(BinaryLinear(4, 4), BinaryLinear(4, 4, weight_quantizer="ste_tern"),
                          BinaryLinear(4, 4, weight_quantizer="magnitude_aware_sign"),
                          BinaryLinear(4, 4, input_quantizer="dorefa_quantizer"), nn.Linear(4, 4))
    model[3].weight = model[0].weight
    assert list(binary_weights(model)) == ["0.weight", "2.weight"]


def test_latent_weights_are_clipped():
    model = network()
    optimizer = CaseOptimizer(model, default=lambda p: torch.optim.SGD(p, lr=100.0))
    handle = clip_latent_weights(optimizer, model, 1.25)
    train(model, optimizer, 1)
    assert model[2].weight.abs().max() == 1.25 and model[0].weight.abs().max() > 1.25
    handle.remove()
    train(model, optimizer, 1)
    assert model[2].weight.abs().max() > 1.25


def _worker(rank, store, results):
    """Two processes with half of each batch; rank 0 keeps the weights."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = distributed_network()
    parallel = nn.parallel.DistributedDataParallel(model)
    train_linear(parallel, cases(model), slice(4 * rank, 4 * rank + 4))
    if rank == 0:
        torch.save(model.state_dict(), results)
    dist.destroy_process_group()


def distributed_network():
    return nn.Sequential(nn.Linear(6, 20), BinaryLinear(20, 9), nn.Linear(9, 3))


def train_linear(model, optimizer, part):
    """Sums of eighths and quarters of multiples: the mean over processes is that of the batch."""
    for step in range(20):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.mse_loss(model(x[part]), x[part, :3]).backward()
        optimizer.step()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(_worker, (tmp_path / "store", tmp_path / "weights"), nprocs=2)
    torch.manual_seed(0)
    model = distributed_network()
    train_linear(model, cases(model), slice(0, 8))
    for name, value in torch.load(tmp_path / "weights").items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-5, rtol=0)
