"""BNext: published sizes, values, checkpoints and what makes one unusable, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from bitkernels import models
from bitkernels import nn as bnn
from bitkernels.models.bnext import CHANNELS, BNextHalf
from bitkernels.models.weights import load_weights
from bitkernels_tests.models import plain_bnext as plain
from bitkernels_tests.models.plain_reactnet import Network, generated
from bitkernels_tests.models.test_reactnet import (
    bright_and_dark,
    check_logits,
    image,
    operations,
)
from bitkernels_tests.models.usable import check_usable

SMALL = (8, 16, 32, 32)


def small_state() -> dict[str, torch.Tensor]:
    return generated(plain.entries(SMALL, classes=10), 4)


@pytest.mark.parametrize("size, parameters, unused, binary, binary_ops, ops", [
    ("t", 30_862_236, 8_960, 28_253_184, 4.817e9, 0.0769e9),
    ("s", 68_594_614, 13_440, 63_569_664, 10.84e9, 0.1720e9),
    ("m", 134_501_974, None, 126_238_464, 20.09e9, 0.3169e9),
    ("l", 326_546_640, None, 308_310_016, 52.15e9, 0.8198e9)])
def test_sizes_as_published(size, parameters, unused, binary, binary_ops, ops):
    """Those of the published code, which has PReLUs that it never uses."""
    entries = dict(plain.entries(CHANNELS[size]))
    state = {name: torch.empty(shape, device="meta") for name, shape in entries.items()}
    for name in state:
        if name.endswith("temperature"):
            state[name] = torch.zeros(1)
    with torch.device("meta"):
        model = models.create_model(f"bnext_{size}")
    assert set(model.published_state(state)) == set(model.state_dict())
    here = sum(p.numel() for p in model.parameters())
    there = sum(torch.Size(shape).numel() for name, shape in entries.items()
                if not name.endswith(("running_mean", "running_var", "num_batches_tracked",
                                      "temperature")))
    assert there == parameters and (unused is None or there - here == unused)
    layers = [m for m in model.modules() if isinstance(m, bnn.BinaryLayer)]
    assert sum(layer.weight.numel() for layer in layers) == binary
    counted = operations(model, 224)
    assert counted[0] == pytest.approx(binary_ops, rel=1e-3)
    assert counted[0] / 64 + counted[1] / 8 == pytest.approx(ops, rel=1e-3)


def test_logits_of_a_plain_forward():
    state = generated(plain.entries(), 0)
    assert len(state) == 661
    model = models.create_model("bnext_t")
    model.load_state_dict(model.published_state(state))
    check_logits(model, image(2), plain.bnext(Network(state), image(2).double()))


def test_checkpoint_of_the_published_code(tmp_path):
    state = small_state()
    torch.save({"epoch": 511, "state_dict": {f"module.{k}": v for k, v in state.items()},
                "best_top1_acc": torch.tensor(72.4), "optimizer": {}, "temp": [1.0]},
               tmp_path / "checkpoint.pth.tar")
    model = models.BNext(10, channels=SMALL)
    load_weights(model, tmp_path / "checkpoint.pth.tar")
    check_logits(model, image(2), plain.bnext(Network(state), image(2).double(), SMALL))


def test_what_is_never_used_may_be_anything():
    state, model, other = small_state(), *(models.BNext(10, channels=SMALL) for _ in range(2))
    model.load_state_dict(model.published_state(state))
    unused = ["feature.0.prelu.weight"] + [
        name for name in state if name.endswith("activation1.weight")
        and name != "feature.2.Attention.activation1.weight"]
    assert len(unused) == 1 + 3 + 5 - 1
    for name in unused:
        del state[name]
    other.load_state_dict(other.published_state(state))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(images), other.eval()(images))


@pytest.mark.parametrize("change, problem", [
    (lambda s: s["feature.2.FFN_1.binary_conv.temperature"].fill_(1e-7),
     r"feature\.2\.FFN_1\.binary_conv\.temperature is 1e-07, not below 1e-07 \(1 such"),
    (lambda s: s["feature.1.FFN_2.binary_conv.temperature"].fill_(torch.nan), "not binary"),
    (lambda s: s.pop("feature.3.FFN.binary_conv.temperature"), "temperature is missing"),
    (lambda s: s.pop("feature.2.Attention.activation1.weight"), r"blocks\.1\.spatial\.act"),
    (lambda s: s.update({"feature.3.FFN_1.scale": torch.ones(1, 32, 1, 1)}), "feature.3.FFN_1"),
    (lambda s: s.update({"feature.4.prelu.weight": torch.ones(8)}), "feature.4.prelu.weight")])
def test_a_checkpoint_that_does_not_fit_is_refused(change, problem, tmp_path):
    state = small_state()
    change(state)
    torch.save({"state_dict": state}, tmp_path / "file")
    with pytest.raises(ValueError, match=problem):
        load_weights(models.BNext(10, channels=SMALL), tmp_path / "file")


@pytest.mark.parametrize("kernel, stride, modulated", [(3, 1, True), (3, 2, True), (3, 2, False),
                                                       (1, 1, False)])
def test_gradients_of_a_half_are_those_of_the_formula(kernel, stride, modulated):
    """The published one: of a weight 1, of a sign 1 where |x| <= 1.5; scale clamped before use."""
    half = BNextHalf(16, kernel, stride, modulated=modulated).double()
    for name, p in half.named_parameters():
        torch.nn.init.normal_(p, 0.5 if name == "scale" else 0.2, 0.7)
    p = {k: v.detach().clone().requires_grad_() for k, v in half.named_parameters()}
    x = torch.randn(4, 16, 6, 6, dtype=torch.float64, requires_grad=True)
    copied = x.detach().clone().requires_grad_()

    def channels(vector):
        return vector.view(-1, 1, 1)

    def norm(name, value):
        return F.batch_norm(value, None, None, p[f"{name}.weight"], p[f"{name}.bias"], True)

    shifted = copied + channels(p["branch.sign.shift"])
    clipped = shifted.clamp(-1.5, 1.5)
    signs = clipped + (shifted.sign() - clipped).detach()
    weight = p["branch.conv.weight"]
    weight = weight + (weight.sign() - weight).detach()
    b = F.conv2d(signs, weight, None, stride, kernel // 2)
    b = F.prelu(norm("branch.norm", b), p["branch.act.weight"])
    r = F.prelu(copied, p["act.weight"]) if modulated else copied
    pooled = F.avg_pool2d(copied, 2) if stride == 2 else copied
    r = F.avg_pool2d(r, 2) if stride == 2 else r
    p["scale"].data.clamp_(0, 1)
    mix = channels(p["scale"]) * pooled + (1 - channels(p["scale"])) * b
    gate = F.conv2d(mix.mean((2, 3), keepdim=True), p["gate.0.weight"], p["gate.0.bias"]).relu()
    b = F.conv2d(gate, p["gate.2.weight"], p["gate.2.bias"]).sigmoid() * b
    expected = norm("norm", b * r if modulated else b) + r
    y = half(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, copied.grad)
    for name, parameter in half.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, msg=name)
    assert half.scale.min() == 0 and half.scale.max() == 1


def test_two_forwards_may_wait_for_one_backward():
    half = BNextHalf(8, 1)
    with torch.no_grad():
        half.scale.add_(1)
    x = torch.randn(4, 8, 5, 5)
    (half(x).sum() + half(2 * x).sum()).backward()
    assert torch.isfinite(half.scale.grad).all()


@pytest.mark.parametrize("kernel", [1, 3])
def test_evaluation_clamps_scale_in_halves_of_one_pixel_alone(kernel):
    half = BNextHalf(8, kernel).eval()
    clamped = copy.deepcopy(half)
    with torch.no_grad():
        half.scale.fill_(3)
        clamped.scale.fill_(1)
        x = torch.randn(2, 8, 5, 5) + 1
        assert torch.equal(half(x), clamped(x)) == (kernel == 1)
    assert (half.scale == 3).all()


def test_a_small_one_does_what_every_network_must():
    check_usable(lambda: models.BNext(10, 1, channels=(32, 32, 32), stem="cifar"),
                 bright_and_dark(9, 6))


@pytest.mark.parametrize("options, message", [
    (dict(channels=(8, 24)), "as many as before or twice as many; got .8, 24."),
    (dict(channels=(4, 8)), "at least 8"), (dict(channels=(8,)), "at least one block"),
    (dict(stem="mnist"), "stem must be one of 'imagenet', 'cifar', got 'mnist'")])
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        models.BNext(**options)
