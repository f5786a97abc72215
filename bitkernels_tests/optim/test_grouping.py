"""CaseOptimizer, and the binary parameters of a model: groups, states, processes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from bitkernels.nn import BinaryLinear, binarize
from bitkernels.optim import (
    Bop,
    Bop2ndOrder,
    CaseOptimizer,
    binary_weights,
    clip_latent_weights,
    is_binary_weight,
)
from bitkernels.quantizers import MagnitudeAwareSign, NoOp, SteSign
from bitkernels_tests import forked

# Tensors too small for threads, which would cost more than all the rest.
pytestmark = pytest.mark.usefixtures("one_thread")


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
    (lambda m: CaseOptimizer(m, (is_binary_weight(m), Bop), default=lambda p: torch.optim.LBFGS(
        [q for _, q in p])), ValueError, "the default: a step of LBFGS evaluates the closure"),
    (lambda m: CaseOptimizer(m, (lambda n, p: False, sgd), default=sgd), ValueError,
     "case 0 claims no parameter"),
    (lambda m: CaseOptimizer(m, (lambda n, p: True, sgd(m.parameters()))), TypeError,
     "a function that makes the optimizer"),
    (lambda m: CaseOptimizer(m, default=lambda p: p), TypeError, "returned list"),
    (lambda m: CaseOptimizer(m, default=lambda p: sgd(p[1:])), ValueError, "it lacks 0.weight"),
    (lambda m: CaseOptimizer(nn.ReLU(), default=sgd), ValueError, "no parameters to optimize"),
    (lambda m: is_binary_weight(nn.Linear(2, 2)), ValueError, "Linear has no binary weights"),
    (lambda m: clip_latent_weights(sgd(m[0].parameters()), m), ValueError, "holds none"),
    (lambda m: clip_latent_weights(sgd(m.parameters()), m, 0.0), ValueError,
     "clip must be a number above 0"),
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
    forked.spawn(_worker, (tmp_path / "store", tmp_path / "weights"))
    torch.manual_seed(0)
    model = distributed_network()
    train_linear(model, cases(model), slice(0, 8))
    for name, value in torch.load(tmp_path / "weights").items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bop", [Bop, Bop2ndOrder])
@pytest.mark.parametrize("quantizer,slope", [
    ("approx_sign", "0"), ("swish_sign", "-0.195"), (SteSign(0.9), "0"),
    (MagnitudeAwareSign(0.5), "0")])
def test_bop_wants_a_gradient_at_its_weights(bop, quantizer, slope):
    """And has one from the quantizers that are named for it; other layers' do not matter."""
    def optimizer_of(model):
        return CaseOptimizer(model, (is_binary_weight(model), bop), default=torch.optim.Adam)

    model = nn.Sequential(BinaryLinear(8, 8, weight_quantizer=quantizer), BinaryLinear(8, 8))
    with pytest.raises(ValueError, match=f"train the weight of 0: .* slope {slope} at -1 and"):
        optimizer_of(model)
    CaseOptimizer(model, (lambda name, _: name == "1.weight", bop), default=torch.optim.Adam)
    for fit in ("ste_sign", None, NoOp(1), SteSign(1.25), SteSign(None), "magnitude_aware_sign"):
        model[0].weight_quantizer = fit
        optimizer_of(model)
