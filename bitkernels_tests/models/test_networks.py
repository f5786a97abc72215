"""bitkernels.models: published sizes, structure, both steps of training, packing, bad options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkernels import models
from bitkernels import nn as bnn
from bitkernels.models.parts import SamePad2d, UnscaledBatchNorm2d, glorot_normal_, he_normal_
from bitkernels.train.distillation import FeatureTap

SMALL = {
    "binarynet": dict(width=16),
    "quicknet": dict(blocks=(1, 2), filters=(32, 64)),
    "reactnet": dict(channels=(16, 32, 32, 64)),
    "reactnet-18": dict(blocks=(1, 2), channels=(16, 32)),
}


def small(name: str, **options) -> nn.Module:
    return models.create(name, image_size=8, in_channels=1, **SMALL[name], **options)


def trained_a_little(model: nn.Module) -> nn.Module:
    """Three updates: running statistics, shifts and slopes leave their initial values."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.randint(10, (16,))).backward()
        optimizer.step()
    return model.eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def binary_weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, bnn.BinaryLayer))


@pytest.mark.parametrize("blocks, filters, keras, binary", [
    ((4, 4, 4, 4), (32, 64, 256, 512), 12_664_344, 11_980_800),
    ((4, 4, 4, 4), (64, 128, 256, 512), 13_243_720, 12_533_760),
    ((6, 8, 12, 6), (64, 128, 256, 512), 23_359_304, 22_634_496),
])
def test_quicknets_have_the_published_sizes(blocks, filters, keras, binary):
    with torch.device("meta"):
        model = models.QuickNet(1000, blocks=blocks, filters=filters, stem_strides=(2, 2))
        sizes = []
        for section in model.sections:
            section.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    # Keras counts running statistics and the fixed blur too.
    extra = sum(b.numel() for name, b in model.named_buffers() if "num_batches" not in name)
    assert parameters(model) + extra == keras
    assert binary_weights(model) == binary
    assert sizes == [(f, s, s) for f, s in zip(filters, (56, 28, 14, 7), strict=True)]


@pytest.mark.parametrize("size", [14, 15])
def test_reactnet18_block_is_the_formula(size):
    """In evaluation and in training, with an odd side too."""
    block = models.reactnet18_block(8, 16, 2)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.1)
    x = torch.randn(4, 8, size, size)

    def formula(norm, shortcut):
        shifted = torch.where(x + block.sign.shift.view(-1, 1, 1) < 0, -1.0, 1.0)
        w = block.conv.weight
        signs = torch.where(w < 0, -1.0, 1.0) * w.abs().mean((1, 2, 3), keepdim=True)
        y = norm(F.conv2d(shifted, signs, None, 2, 1)) + shortcut
        shift_in, slope, shift_out = (p.view(-1, 1, 1) for p in (
            block.act.shift_in, block.act.slope, block.act.shift_out))
        y = y + shift_in
        return torch.where(y > 0, y, slope * y) + shift_out

    pool, conv, norm = block.shortcut
    small = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    with torch.no_grad():
        for training in (True, False):
            block.train(training)
            saved = {key: value.clone() for key, value in block.state_dict().items()}
            expected = formula(block.norm, norm(conv(small)))
            block.load_state_dict(saved)  # the formula moved the running statistics
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_binarynet_is_bops_vgg():
    with torch.device("meta"):
        model = models.BinaryNet()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    layers = [m for m in model.modules() if isinstance(m, bnn.BinaryLayer)]
    assert [tuple(m.weight.shape[:2]) for m in layers] == [
        (128, 3), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512),
        (1024, 4608), (1024, 1024), (10, 1024)]
    assert [m.padding for m in layers[:6]] == [(0, 0)] + [(1, 1)] * 5
    assert all(m.bias is None for m in layers)
    assert not layers[0].on_bits and all(m.on_bits for m in layers[1:])
    kinds = [type(m).__name__ for m in model.features]
    norm, conv, pool = "UnscaledBatchNorm2d", "BinaryConv2d", "MaxPool2d"
    assert kinds == [conv, norm, conv, pool, norm] * 3
    assert parameters(model) - sum(m.weight.numel() for m in layers) == 128 * 14 + 2 * 1024 + 10


def test_reactnet_block_is_the_formula():
    block = trained_a_little(nn.Sequential(
        nn.Conv2d(1, 8, 1), models.ReActBlock(8, 16, 2), nn.Flatten(), nn.Linear(256, 10)))[1]
    x = torch.randn(4, 8, 8, 8)

    def norm(layer, value):
        return F.batch_norm(value, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    def act(layer, value):
        shift_in, slope, shift_out = (p.view(-1, 1, 1)
                                      for p in (layer.shift_in, layer.slope, layer.shift_out))
        value = value + shift_in
        return torch.where(value > 0, value, slope * value) + shift_out

    def conv(layer, value, **options):
        w = layer.weight
        signs = torch.where(w < 0, -1.0, 1.0) * w.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(torch.where(value < 0, -1.0, 1.0), signs, **options)

    with torch.no_grad():
        first, second = block.spatial, block.pointwise
        shifted = x + first.sign.shift.view(-1, 1, 1)
        h = act(first.act, norm(first.norm, conv(first.conv, shifted, stride=2, padding=1))
                + F.avg_pool2d(x, 2))
        shifted = h + second.sign.shift.view(-1, 1, 1)
        expected = act(second.act, norm(second.norm, conv(second.conv, shifted))
                       + torch.cat([h, h], 1))
        torch.testing.assert_close(block(x), expected)
    assert second.conv.out_channels == 16 and first.sign.shift.abs().max() > 0


def test_quicknet_block_is_the_formula():
    block = trained_a_little(nn.Sequential(
        nn.Conv2d(1, 8, 1), models.QuickNetBlock(8), nn.Flatten(), nn.Linear(512, 10)))[1]
    x = torch.randn(4, 8, 8, 8)
    with torch.no_grad():
        signs = F.pad(torch.where(x < 0, -1.0, 1.0), (1, 1, 1, 1), value=1.0)
        y = F.relu(F.conv2d(signs, torch.where(block.conv.weight < 0, -1.0, 1.0)))
        norm = block.norm
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        torch.testing.assert_close(block(x), x + y)
    assert block.conv.weight_quantizer.clip_value == 1.25
    assert block.conv.input_quantizer.clip_value == 1.25


def test_transition_blurs_the_maximum():
    transition = models.QuickNetTransition(2, 3)
    x = torch.randn(1, 2, 6, 6)
    pooled = F.pad(F.max_pool2d(x.relu(), 2, 1), (1, 1, 1, 1))  # 5x5, padded evenly
    kernel = torch.tensor([[1.0, 2.0, 1.0]])
    kernel = (kernel.T @ kernel / 16).expand(2, 1, 3, 3)
    expected = F.conv2d(pooled, kernel, stride=2, groups=2)
    seen = []
    transition.conv.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    assert transition(x).shape == (1, 3, 3, 3)
    torch.testing.assert_close(seen[0], expected)
    assert "blur" not in transition.state_dict()


@pytest.mark.parametrize("size, stride, pads", [
    (8, 2, (0, 1)), (7, 2, (1, 1)), (8, 1, (1, 1)), (1, 2, (1, 1)), (2, 2, (0, 1))])
def test_same_padding_is_tensorflows(size, stride, pads):
    out = SamePad2d(3, stride)(torch.ones(1, 1, size, size))
    assert out.shape[-1] == size + sum(pads)
    inside = out[0, 0, pads[0]:pads[0] + size, pads[0]:pads[0] + size]
    assert inside.sum() == out.sum() == size * size


def test_keras_normal_is_cut_and_has_its_deviation():
    weight = torch.empty(256, 64, 3, 3)
    for initialise, variance in ((he_normal_, 2 / 576), (glorot_normal_, 2 / (576 + 2304))):
        initialise(weight)
        assert weight.std().item() == pytest.approx(variance**0.5, rel=0.01)
        assert weight.abs().max() <= 2 * variance**0.5 / 0.8796
        assert weight.abs().max() > 1.9 * variance**0.5 / 0.8796


@pytest.mark.parametrize("name", models.names())
def test_two_steps_share_their_state(name):
    first = trained_a_little(small(name, binary_weights=False))
    second = small(name)
    assert list(first.state_dict()) == list(second.state_dict())
    second.load_state_dict(first.state_dict())
    layers = [m for m in first.modules() if isinstance(m, bnn.BinaryLayer)]
    assert layers and all(m.weight_quantizer.precision == 32 for m in layers)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert not torch.equal(first.eval()(x), second.eval()(x))
        for layer in layers:  # at weights that are binary already the steps are one network
            layer.weight.copy_(layer.weight.sign())
        second.load_state_dict(first.state_dict())
        torch.testing.assert_close(first(x), second(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", models.names())
def test_packed_network_predicts_the_same(name):
    model = trained_a_little(small(name))
    packed = bnn.pack(model, filter=lambda _, layer: layer.pack_obstacle() is None)
    left = [n for n, m in packed.named_modules() if isinstance(m, bnn.BinaryLayer)]
    assert left == (["features.0"] if name == "binarynet" else [])
    images = torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(packed(images), logits)
    assert len(logits.argmax(1).unique()) > 1


def test_pack_names_the_layer_that_stays_real():
    with pytest.raises(ValueError, match=r"features\.0"):
        bnn.pack(small("binarynet"))


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("size", [8, 28, 33])
def test_default_networks_take_small_images(name, size):
    model = models.create(name, image_size=size, in_channels=1, num_classes=7)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 1, size, size)).shape == (1, 7)


def test_unscaled_norm_survives_conversion_to_sync_batch_norm():
    norm = UnscaledBatchNorm2d(4, eps=1e-3, momentum=0.01)
    assert list(norm.state_dict()) == ["bias", "running_mean", "running_var",
                                       "num_batches_tracked"]
    norm(torch.randn(8, 4, 3, 3) * 3 + 1)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))[0]
    assert isinstance(sync, nn.SyncBatchNorm) and sync.weight is None and sync.momentum == 0.01
    x = torch.randn(8, 4, 3, 3)
    torch.testing.assert_close(sync.eval()(x), norm.eval()(x))


@pytest.mark.parametrize("name, sides", [
    ("binarynet", [3, 1]), ("quicknet", [8, 4]), ("reactnet", [8, 8, 4])])
def test_attention_layers_give_images(name, sides):
    model = small(name)
    with FeatureTap(model, model.attention_layers) as tap:
        model(torch.randn(2, 1, 8, 8))
        features = tap.features()
    assert [tuple(f.shape[2:]) for f in features] == [(side, side) for side in sides]


def test_channels_last_and_bfloat16_autocast_run():
    for name in models.names():
        model = small(name).to(memory_format=torch.channels_last)
        images = torch.randn(4, 1, 8, 8).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images).float().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("make, message", [
    (lambda: models.create("resnet"), "there are binarynet, quicknet, reactnet"),
    (lambda: models.create("reactnet", width=4), "reactnet has no option width; it has binary_we"),
    (lambda: models.create("reactnet", num_classes=0), "num_classes of reactnet must be"),
    (lambda: models.create("quicknet", in_channels=0), "in_channels of quicknet must be"),
    (lambda: models.create_model("quicknet", num_classes=2.5), "at least 1, got 2.5"),
    (lambda: models.create_model("binary_alexnet", image_size=0), "image_size of binary_a"),
    (lambda: models.BinaryNet(image_size=8, stages=3), "3 stages do not fit images of 8"),
    (lambda: models.BinaryNet(image_size=2), "0 stages do not fit images of 2"),
    (lambda: models.BinaryNet(width=0), "at least 1"),
    (lambda: models.ReActNet(channels=(32,)), "at least one block"),
    (lambda: models.ReActNet(channels=(32, 48)), "32 channels can become 32 or 64, not 48"),
    (lambda: models.ReActNet(channels=(32, 64), strides=(1, 1)), "1 blocks need as many strides"),
    (lambda: models.ReActBlock(8, 8, 3), "stride must be 1 or 2"),
    (lambda: models.ReActNet18(blocks=(1, 2), channels=(8,)), "blocks=.1, 2. and channels=.8,."),
    (lambda: models.QuickNet(blocks=(1,), filters=(32, 64)), "a number of blocks and of filters"),
    (lambda: models.QuickNet(blocks=(1,), filters=(30,)), "multiple of 4"),
])
def test_options_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
