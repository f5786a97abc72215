"""ReActNet-A, B, C, -18 and -34: published sizes, values, checkpoints, fused training."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkernels import models
from bitkernels import nn as bnn
from bitkernels.models.weights import load_weights
from bitkernels_tests.models import plain_reactnet as plain
from bitkernels_tests.models.usable import check_usable

SMALL = (8, 16, 16, 32)

# What an earlier version called a block's parts, and which of two branches they were of.
EARLIER = {
    "move11.bias": "sign1.shift", "binary_3x3.weight": "conv1.weight", "bn1": "norm1",
    "move12.bias": "act1.shift_in", "prelu1.weight": "act1.slope",
    "move13.bias": "act1.shift_out", "move21.bias": "sign2.shift",
    "binary_pw.weight": "conv2.0.weight", "binary_pw_down1.weight": "conv2.0.weight",
    "binary_pw_down2.weight": "conv2.1.weight", "bn2": "norm2.0", "bn2_1": "norm2.0",
    "bn2_2": "norm2.1", "move22.bias": "act2.shift_in", "prelu2.weight": "act2.slope",
    "move23.bias": "act2.shift_out",
}


def earlier(name: str) -> str:
    """The name that a tensor of the published code had in an earlier version of ours."""
    first, _, rest = name.partition(".")
    if first == "fc":
        return f"classifier.{rest}"
    number, _, rest = rest.partition(".")
    if number == "0":
        return rest.replace("conv1", "stem.0").replace("bn1", "stem.1")
    part = EARLIER.get(rest)
    if part is None:
        norm, _, last = rest.rpartition(".")
        part = f"{EARLIER[norm]}.{last}"
    return f"blocks.{int(number) - 1}.{part}"


def operations(model: nn.Module, size: int) -> tuple[int, int]:
    """Products of binary and of real layers for an image, on the meta device."""
    counts = {True: 0, False: 0}

    def count(layer, _inputs, output):
        weight = layer.weight
        counts[isinstance(layer, bnn.BinaryLayer)] += output[0].numel() * weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.empty(2, 3, size, size, device="meta"))
    return counts[True], counts[False]


@pytest.mark.parametrize("name, binary, real, ops", [
    ("reactnet_a", 4.817e9, 1.186e7, 8.713e7), ("reactnet_b", 4.688e9, 4.40e7, 1.17e8),
    ("reactnet_c", 4.688e9, 1.403e8, 2.14e8), ("reactnet18", None, None, 1.640e8)])
def test_operations_as_published(name, binary, real, ops):
    with torch.device("meta"):
        model = models.create_model(name)
    counted = operations(model, 224)
    for got, published in ((counted[0], binary), (counted[1], real),
                           (counted[1] + counted[0] / 64, ops)):
        assert published is None or got == pytest.approx(published, rel=4e-3)


def test_published_names_make_the_published_networks():
    with torch.device("meta"):
        a, r18, r34 = (models.create_model(name) for name in ("reactnet_a", "reactnet18",
                                                              "reactnet34"))
        cifar = models.create_model("reactnet18", num_classes=10, stem="cifar")
    for model, parameters, binary, names in (
            (a, 29_343_592, 28_253_184, plain.entries()),
            (r18, 11_704_424, 10_985_472, plain.entries18())):
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert sum(layer.weight.numel() for layer in model.modules()
                   if isinstance(layer, bnn.BinaryLayer)) == binary
        state = {name: torch.empty(shape, device="meta") for name, shape in names}
        assert set(model.published_state(state)) == set(model.state_dict())
    assert len(dict(plain.entries())) == 298
    assert len(r34.blocks) == 32 and r34.classifier.in_features == 512
    for model, size, sides in ((a, 224, [112, 56, 56, 28, 28, *[14] * 6, 7, 7]),
                               (r18, 65, [17] * 4 + [9] * 4 + [5] * 4 + [3] * 4),
                               (cifar, 32, [32] * 4 + [16] * 4 + [8] * 4 + [4] * 4)):
        seen = []
        for block in model.blocks:
            block.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.shape[-1]))
        model(torch.empty(2, 3, size, size, device="meta"))
        assert seen == sides


def image(seed: int, size: int = 32) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def check_logits(model: nn.Module, images: torch.Tensor, wanted: torch.Tensor) -> None:
    with torch.no_grad():
        error = (model.eval()(images) - wanted).abs().max()
    assert error <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("name, entries, forward", [
    ("reactnet_a", plain.entries, plain.reactnet_a),
    ("reactnet18", plain.entries18, plain.reactnet18)])
def test_logits_of_a_plain_forward(name, entries, forward):
    state = plain.generated(entries(), 0)
    net = plain.Network(state)
    wanted = forward(net, image(3).double())
    assert net.margin > 1e-6
    model = models.create_model(name)
    model.load_state_dict(model.published_state(state))
    check_logits(model, image(3), wanted)


@pytest.mark.parametrize("make, entries, forward", [
    (lambda: models.ReActNet(channels=SMALL, stem_stride=2),
     lambda: plain.entries(SMALL, 10), lambda net, x: plain.reactnet_a(net, x, SMALL)),
    (lambda: models.ReActNet18(10, blocks=(1,), channels=(64,)),
     lambda: plain.entries18((1,), 10), lambda net, x: plain.reactnet18(net, x, (1,)))])
def test_checkpoint_of_the_published_code(make, entries, forward, tmp_path):
    """All that the file may look like gives the logits of a plain forward."""
    state = plain.generated(entries(), 1)
    net = plain.Network(state)
    wanted = forward(net, image(0).double())
    assert net.margin > 1e-6
    binary = [key for key in state if "binary" in key]
    flat = {f"{key}s" if key in binary else key:
            value.reshape(-1, 1) if key in binary else value for key, value in state.items()}
    assert len(flat) == len(state) and binary
    forms = [{"epoch": 3, "best_top1_acc": torch.tensor(69.4), "optimizer": {"state": {}},
              "state_dict": {f"module.{key}": value for key, value in state.items()}},
             {"state_dict": {key.replace(".weights", ".weight"): value
                             for key, value in flat.items()}}, flat]
    for form in forms:
        torch.save(form, tmp_path / "model_best.pth.tar")
        model = make()
        load_weights(model, tmp_path / "model_best.pth.tar")
        check_logits(model, image(0), wanted)


def small_state() -> dict[str, torch.Tensor]:
    return plain.generated(plain.entries(SMALL, classes=10), 4)


def test_state_of_an_earlier_version_loads():
    state = small_state()
    old = {earlier(name): value.flatten() if "move" in name else value
           for name, value in state.items()}
    assert "blocks.0.conv2.1.weight" in old and "blocks.1.conv2.0.weight" in old
    model, other, third = (models.ReActNet(channels=SMALL) for _ in range(3))
    model.load_state_dict(model.published_state(state))
    other.load_state_dict(old)
    third.load_state_dict(third.published_state(old))
    for theirs in (other.state_dict(), third.state_dict()):
        assert all(torch.equal(theirs[key], value) for key, value in model.state_dict().items())
    block = models.ReActBlock(8, 16)
    block.load_state_dict({key.removeprefix("blocks.0."): value for key, value in old.items()
                           if key.startswith("blocks.0.")})
    assert torch.equal(block.pointwise.conv.weight, model.blocks[0].pointwise.conv.weight)
    del old["blocks.0.conv2.1.weight"]
    with pytest.raises(RuntimeError, match="blocks.0.pointwise.conv.weight"):
        other.load_state_dict(old)


@pytest.mark.parametrize("change, problem", [
    (lambda s: s.pop("feature.1.binary_pw_down2.weight"), "blocks.0.pointwise.conv.weight"),
    (lambda s: s.pop("feature.2.prelu1.weight"), "blocks.1.spatial.act.slope"),
    (lambda s: s.update({"feature.1.binary_pw.weight": torch.ones(8, 8, 1, 1)}), "binary_pw_"),
    (lambda s: s.update({"feature.9.bn1.weight": torch.zeros(8)}), "feature.9.bn1.weight"),
    (lambda s: s.update({"fc.weight": torch.zeros(32, 10)}), "classifier.weight"),
    (lambda s: s.update({"feature.1.binary_3x3.weight": torch.ones(577, 1)}), "spatial.conv")])
def test_a_checkpoint_that_does_not_fit_is_refused(change, problem, tmp_path):
    state = small_state()
    change(state)
    model = models.ReActNet(channels=SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "file")
    with pytest.raises(ValueError, match=problem):
        load_weights(model, tmp_path / "file")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_zeros_among_published_weights_are_named():
    state = small_state()
    state["feature.2.binary_3x3.weight"][0, 0, 1, :2] = 0
    with pytest.warns(UserWarning, match="2 of the binary weights are exactly 0"):
        models.ReActNet(channels=SMALL).published_state(state)


def fused_blocks(model: nn.Module, images: torch.Tensor) -> int:
    """Calls of the fused operator in one training step."""
    with torch.profiler.profile() as profile:
        F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.long)).backward()
    return sum(event.count for event in profile.key_averages()
               if event.key == "bitkernels::binary_residual_block")


@pytest.mark.parametrize("make, blocks", [
    (lambda: models.ReActNet(channels=SMALL), 6),
    (lambda: models.ReActNet(channels=SMALL, real_groups=4), 4),
    (lambda: models.ReActNet18(blocks=(1, 2), channels=(8, 16), stem="cifar"), 3),
    (lambda: models.QuickNet(blocks=(1, 2), filters=(8, 16)), 3),
    (lambda: models.BNext(10, channels=SMALL, stem="cifar"), 8)])
def test_every_binary_convolution_trains_fused(make, blocks):
    model = make()
    layers = [m for m in model.modules() if isinstance(m, bnn.BinaryLayer)]
    assert fused_blocks(model, torch.randn(4, 3, 9, 9)) == blocks == len(layers)


def bright_and_dark(height: int, width: int) -> torch.Tensor:
    """Eight images that a network tells apart after two updates."""
    return torch.randn(8, 1, height, width) + torch.linspace(-4, 4, 8).view(-1, 1, 1, 1)


@pytest.mark.parametrize("make", [
    lambda: models.ReActNet(10, 1, channels=(8, 16, 16)),
    lambda: models.ReActNet18(10, 1, blocks=(1, 1), channels=(8, 16), stem="cifar")])
def test_a_small_one_does_what_every_network_must(make):
    check_usable(make, bright_and_dark(7, 6))


def test_real_doubling_is_the_formula():
    block = models.ReActBlock(8, 16, real_groups=2).eval().pointwise
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.1)
    x = torch.randn(2, 8, 3, 4)
    with torch.no_grad():
        y = F.batch_norm(F.conv2d(x, block.conv.weight, groups=2), block.norm.running_mean,
                         block.norm.running_var, block.norm.weight, block.norm.bias)
        y = y + torch.cat([x, x], 1) + block.act.shift_in.view(-1, 1, 1)
        expected = F.prelu(y, block.act.slope) + block.act.shift_out.view(-1, 1, 1)
        torch.testing.assert_close(block(x), expected)


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="real_groups must divide .* got 3"):
        models.ReActNet(channels=SMALL, real_groups=3)
    with pytest.raises(ValueError, match="stem must be one of 'imagenet', 'cifar', got 'mnist'"):
        models.create_model("reactnet34", stem="mnist")


@pytest.mark.parametrize("make", [
    lambda: models.ReActNet(channels=(8, 16), real_groups=1),
    lambda: models.ReActNet18(blocks=(1,), channels=(8,)),
    lambda: models.BNext(10, channels=(8, 16))])
def test_graphs_of_the_networks_pickle(make):
    """torch.fx writes annotations into its code, and cannot pickle those that are strings."""
    model, x = make().eval(), torch.randn(2, 3, 12, 12)
    graph = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))
