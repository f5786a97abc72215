"""Bop, the quantizers and ReActNet's gradient against values held from the original code.

data/larq.npz was written by running Larq, data/adambnn.npz by running AdamBNN's published code,
both by data/make_traces.py; the entry "header" of each names the versions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitkernels import models, quantizers
from bitkernels.nn import BinaryConv2d, RSign
from bitkernels.optim import Bop
from bitkernels.train.distillation import distribution_loss
from bitkernels_tests.data.make_traces import BOP, QUANTIZERS, STEPS

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def larq():
    return np.load(DATA / "larq.npz")


@pytest.fixture(scope="module")
def adambnn():
    return np.load(DATA / "adambnn.npz")


def test_headers_name_the_originals(larq, adambnn):
    assert "larq 0.14.0 on tensorflow-cpu 2.21.0" in str(larq["header"])
    assert "github.com/liuzechun/AdamBNN at commit 3351340" in str(adambnn["header"])


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", BOP)
def test_bop_flips_as_larqs(larq, name, foreach):
    gamma, threshold, gradient, start = BOP[name]
    weight = torch.nn.Parameter(torch.tensor(larq[f"bop/start/{start}"]))
    bop = Bop([weight], gamma=1e-2 if gamma == "linear" else gamma, threshold=threshold,
              foreach=foreach)
    held = larq[f"bop/{name}/weights"], larq[f"bop/{name}/momentum"]
    for step in range(STEPS):
        if gamma == "linear":
            bop.param_groups[0]["lr"] = 1e-2 + (1e-4 - 1e-2) * step / STEPS
        weight.grad = torch.tensor(larq[f"bop/gradients/{gradient}"][step])
        bop.step()
        np.testing.assert_array_equal(weight.detach().numpy(), held[0][step], f"update {step}")
        np.testing.assert_allclose(bop.state[weight]["momentum"].numpy(), held[1][step],
                                   rtol=1e-6, atol=1e-6 * np.abs(held[1]).max())


def test_bop_traces_flip_and_meet_equality(larq):
    for name, (_, _, _, start) in BOP.items():
        weights = larq[f"bop/{name}/weights"].astype(np.float32)
        before = np.concatenate([np.sign(larq[f"bop/start/{start}"])[None], weights[:-1]])
        assert (weights != before).sum() > (0 if name == "default" else 20), name
    for name, threshold in (("equality", 0.25), ("equality_half", 0.25), ("equality_0", 0.0)):
        weights, momentum = larq[f"bop/{name}/weights"], larq[f"bop/{name}/momentum"]
        before = np.concatenate([larq["bop/start/signs"][None], weights[:-1]])
        equal = before * momentum == threshold
        assert (equal & (before < 0)).sum() > 5, name
        assert (weights[equal] == 1).all(), name


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_equal_larqs(larq, name):
    cls, arguments, kind = QUANTIZERS[name]

    def tensor(key):  # output channels: last in Larq's kernels, first here
        value = torch.tensor(larq[key])
        return value.permute(3, 2, 0, 1).contiguous() if kind == "kernel" else value

    x = tensor(f"quantizers/{kind}").requires_grad_()
    y = getattr(quantizers, cls)(**arguments)(x)
    y.backward(tensor(f"quantizers/{kind}/gradient"))
    forward, backward = tensor(f"quantizers/{name}/forward"), tensor(f"quantizers/{name}/backward")
    if cls in ("SteSign", "ApproxSign", "SwishSign", "SteHeaviside", "SteTern", "NoOp"):
        assert torch.equal(y.detach(), forward)
    else:
        torch.testing.assert_close(y.detach(), forward, rtol=1e-6, atol=1e-6)
    if cls in ("SteSign", "SteHeaviside", "SteTern", "NoOp"):
        assert torch.equal(x.grad, backward)
    else:
        overflow = backward.isnan()  # theirs at infinity; the limit is 0
        assert (x.grad[overflow] == 0).all() and overflow.sum() == 2 * (cls == "SwishSign")
        torch.testing.assert_close(x.grad[~overflow], backward[~overflow], rtol=1e-5, atol=1e-6)


def test_activation_gradient_is_adambnns(adambnn):
    x = torch.tensor(adambnn["sign/input"], dtype=torch.float64)
    gradient = torch.tensor(adambnn["sign/gradient"], dtype=torch.float64)
    for sign in (quantizers.ApproxSign(), lambda v: RSign(1).double()(v.view(-1, 1)).view(-1)):
        leaf = x.clone().requires_grad_()
        y = sign(leaf)
        y.backward(gradient)
        zero = x == 0  # theirs is 0 there, ours +1
        assert zero.sum() == 2 and (y[zero] == 1).all()
        np.testing.assert_allclose(y[~zero].detach(), adambnn["sign/forward"][~zero], atol=1e-12)
        np.testing.assert_allclose(leaf.grad, adambnn["sign/backward"], rtol=1e-12, atol=1e-12)


def test_convolution_gradients_are_adambnns(adambnn):
    conv = BinaryConv2d(6, 5, 3, padding=1, bias=False, input_quantizer=None,
                        weight_scale="detached").double()
    conv.weight.data = torch.tensor(adambnn["conv/weight"], dtype=torch.float64)
    x = torch.tensor(adambnn["conv/input"], dtype=torch.float64).requires_grad_()
    y = conv(x)
    y.backward(torch.tensor(adambnn["conv/gradient"], dtype=torch.float64))
    for ours, theirs in ((y.detach(), "forward"), (conv.weight.grad, "weight_backward"),
                         (x.grad, "input_backward")):
        np.testing.assert_allclose(ours, adambnn[f"conv/{theirs}"], rtol=1e-5, atol=1e-5)
    assert (conv.weight.grad == 0).sum() > 10  # beyond the clip


def published(name: str) -> str:
    """The published name of a parameter of AdamBNN's layers, stacked as in make_traces.py."""
    place, rest = name.split(".", 1)
    return f"fc.{rest}" if place == "5" else f"feature.{place}.{rest}"


def test_sixty_updates_of_reactnet_follow_adambnns(adambnn):
    model = models.ReActNet(5, 1, channels=(4, 8, 8), strides=(2, 1)).double()
    parameters = dict(model.named_parameters())
    start = model.published_state({
        published(name): torch.tensor(adambnn[f"net/start/{name}"], dtype=torch.float64)
        for name in adambnn["net/names"]})
    assert set(start) == set(parameters)
    model.load_state_dict(start, strict=False)  # it has no running statistics
    # The two branches, which follow each other in the trace, are one convolution.
    binary = [parameters[f"blocks.{i}.{half}.conv.weight"] for i in (0, 1)
              for half in ("spatial", "pointwise")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, teacher = (torch.tensor(adambnn[f"net/{name}"], dtype=torch.float64)
                       for name in ("images", "teacher"))
    packed = []
    for step in range(STEPS):
        loss = distribution_loss(model(images[step % 4]), teacher[step % 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(adambnn["net/losses"][step], rel=1e-5)
        flat = torch.cat([w.detach().flatten() for w in binary]).numpy()
        packed.append(np.packbits(flat < 0))
        np.testing.assert_array_equal(packed[-1], adambnn["net/signs"][step], f"update {step}")
        if step % 5 == 4:
            momentum = torch.cat([optimizer.state[w]["momentum_buffer"].flatten() for w in binary])
            np.testing.assert_allclose(momentum, adambnn["net/momentum"][step // 5], rtol=0,
                                       atol=1e-6)
    flips = np.unpackbits(np.bitwise_xor(packed[0], packed[-1])).sum()
    assert flips > 20, "the trace must be one in which signs change"
