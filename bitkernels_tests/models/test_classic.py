"""AlexNet's and ResNet's binary forms: sizes as published, values, training, packing, export."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkernels import models
from bitkernels import nn as bnn
from bitkernels.models.dorefanet import LayerMeanSign
from bitkernels.models.parts import FlattenImage
from bitkernels_tests.models import generated

BLOCKS, CHANNELS = (1, 2), (8, 16)
RESIDUAL = dict(blocks=BLOCKS, channels=CHANNELS)
# Of each network a small form, with the side of its images.
SMALL: dict[str, tuple[dict, int]] = {
    "birealnet18": (RESIDUAL, 37),
    "birealnet34": (RESIDUAL, 32),
    "binary_resnet_e18": (RESIDUAL, 38),
    "binary_alexnet": (dict(image_size=57, hidden=16), 57),
    "dorefanet": (dict(image_size=44, hidden=16), 44),
    "xnornet": (dict(image_size=217, hidden=16), 217),
}
RESIDUALS = [name for name, (options, _) in SMALL.items() if options is RESIDUAL]


def small(name: str, **options) -> nn.Module:
    return models.create_model(name, num_classes=5, **SMALL[name][0], **options)


def images(name: str, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SMALL[name][1], SMALL[name][1])


def moved(model: nn.Module) -> nn.Module:
    """With norms that are not what they start as, in evaluation."""
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if t.is_floating_point() and t.dim() == 1:
                t.uniform_(0.5, 1.5) if "var" in name else t.normal_()
    return model.eval()


@pytest.mark.parametrize("name, tensors, binary, macs, real_macs", [
    ("birealnet18", 11_699_112, 10_985_472, 1_676_279_808, 137_793_536),
    ("binary_resnet_e18", 11_699_368, 10_985_472, 1_676_279_808, 137_793_536),
    ("xnornet", 62_396_768, 58_236_928, 1_025_744_896, 113_379_328),
    ("binary_alexnet", 61_859_192, 61_827_776, 768_512_000, 72_855_552),
    ("dorefanet", 62_403_912, 58_236_928, 0, None),
    ("birealnet34", None, 21_086_208, None, None),
])
def test_sizes_are_the_published_ones(name, tensors, binary, macs, real_macs):
    bits: list[int] = []
    reals: list[int] = []

    def count(layer, _inputs, out):
        on_bits = isinstance(layer, bnn.BinaryLayer) and layer.on_bits
        (bits if on_bits else reals).append(layer.weight.numel() * out.shape[2:].numel())

    with torch.device("meta"):
        model = models.create_model(name).eval()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    layers = [m for m in model.modules() if isinstance(m, bnn.BinaryLayer)]
    assert sum(m.weight.numel() for m in layers) == binary
    if tensors is not None:  # Keras counts running statistics too
        extra = sum(b.numel() for key, b in model.named_buffers() if "num_batches" not in key)
        assert sum(p.numel() for p in model.parameters()) + extra == tensors
    if macs is not None:
        assert sum(bits) == macs
    if real_macs is not None:
        assert sum(reals) == real_macs


def test_birealnet34_has_the_tensors_of_its_code():
    with torch.device("meta"):
        model = models.create_model("birealnet34")
    assert sum(p.numel() for p in model.parameters()) == 21_797_672
    shapes = [b.conv.weight.shape[0] for b in model.blocks]
    assert shapes == [64] * 6 + [128] * 8 + [256] * 12 + [512] * 6


@pytest.mark.parametrize("name", SMALL)
def test_a_step_of_training(name):
    model, x = small(name), images(name)
    blocks = [m for m in model.modules() if isinstance(m, bnn.BinaryResidualBlock)]
    reasons = []
    for block in blocks:
        block.register_forward_pre_hook(lambda b, inputs: reasons.append(b.unfused(inputs[0])))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = F.cross_entropy(model(x), torch.tensor([1, 3]))
    loss.backward()
    assert reasons == [None] * len(blocks) and bool(blocks) == (name in RESIDUALS)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    binary = [m.weight for m in model.modules() if isinstance(m, bnn.BinaryLayer)]
    assert all(w.grad.abs().max() > 0 for w in binary)


@pytest.mark.parametrize("name", SMALL)
def test_packed_network_is_the_same(name):
    model, x = moved(small(name)), images(name, 1)
    left = {"binary_alexnet": ["features.1"], "dorefanet": [
        n for n, m in model.named_modules() if isinstance(m, bnn.BinaryLayer)]}.get(name, [])
    with torch.no_grad():
        wanted = model(x)
        packed = bnn.pack(model, filter=lambda _, layer: layer.pack_obstacle() is None)
        assert [n for n, m in packed.named_modules() if isinstance(m, bnn.BinaryLayer)] == left
        assert torch.equal(packed(x), wanted)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("birealnet18", "dorefanet") else [pytest.mark.every])
    for name in SMALL])
def test_exported_and_compiled_it_is_the_same(name):
    model, x = moved(small(name)), images(name, 1)
    with torch.no_grad():
        wanted = model(x)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), wanted, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_precisions(name):
    model, x = moved(small(name)), images(name, 1)
    other = small(name).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(other(x), wanted)
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_two_steps_share_their_state(name):
    first, second, x = moved(small(name, binary_weights=False)), small(name).eval(), images(name)
    size = 1.0 if name in ("binary_alexnet", "binary_resnet_e18") else 0.125  # its own scale
    with torch.no_grad():
        for layer in first.modules():
            if isinstance(layer, bnn.BinaryLayer):
                assert layer.weight_quantizer.precision == 32
                layer.weight.copy_(torch.where(layer.weight < 0, -size, size))
        second.load_state_dict(first.state_dict())
        torch.testing.assert_close(first(x), second(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("size", [(1, 1), (7, 12), (33, 32)])
def test_residual_networks_take_images_of_any_size(name, stem, size):
    model = small(name, stem=stem).eval()
    sides = []
    model.blocks[-1].register_forward_hook(lambda _m, _i, out: sides.append(tuple(out.shape[2:])))
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)
    for _ in range(3 if stem == "imagenet" else 1):
        size = tuple(-(-side // 2) for side in size)
    assert sides == [size]


def test_images_are_flattened_as_tensorflow_does():
    x = torch.arange(24.0).view(1, 6, 2, 2)
    flat = FlattenImage(2, 9)(x)
    assert torch.equal(flat.view(1, 2, 2, 6), x.permute(0, 2, 3, 1))
    with pytest.raises(RuntimeError, match=r"images of 9 x 9 give; got .*\(1, 6, 2, 3\)"):
        FlattenImage(2, 9)(torch.zeros(1, 6, 2, 3))


def test_dorefas_weight_has_the_identitys_gradient():
    w = torch.from_numpy(generated.uniform(1, 0, (4, 3), -2, 2)).requires_grad_()
    value = LayerMeanSign()(w)
    assert torch.equal(value, torch.where(w < 0, -1.0, 1.0) * w.detach().abs().mean())
    grad = torch.randn(4, 3)
    value.backward(grad)
    assert torch.equal(w.grad, grad)


def test_dorefas_last_layer_takes_values_from_0_to_1():
    model = moved(small("dorefanet"))
    seen = []
    model.classifier[-1].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(images("dorefanet", 8)).sum().backward()
    assert seen[0].min() == 0 and seen[0].max() == 1 and len(seen[0].unique()) > 3


@pytest.mark.parametrize("make, message", [
    (lambda: models.BinaryAlexNet(image_size=56), "image_size must be at least 57.* got 56"),
    (lambda: models.XNORNet(image_size=216), "image_size must be at least 217.* got 216"),
    (lambda: models.DoReFaNet(image_size=43), "image_size must be at least 44.* got 43"),
    (lambda: models.BiRealNet(style="caffe"), "style must be .* got 'caffe'"),
    (lambda: models.BiRealNet(stem="small"), "stem must be .* got 'small'"),
    (lambda: models.BinaryResNetE(stem=3), "stem must be one of 'imagenet', 'cifar', got 3"),
    (lambda: models.BinaryResNetE(blocks=(1,)), "a number of blocks and of channels"),
    (lambda: models.create_model("xnornet", style="larq"), "no option style; it has binary_w"),
])
def test_options_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
