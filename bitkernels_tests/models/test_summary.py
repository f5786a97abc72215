"""bitkernels.summary: the published numbers, every kind of layer, models left as they were."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import bitkernels
from bitkernels import models, quantizers
from bitkernels import nn as bnn
from bitkernels_tests.models.summaries import published

# What larq.models.summary of Larq 0.14 gives for the networks of Larq Zoo 2.4 at 224 pixels:
# weights, binary ones, {bits: multiply-adds}, bytes, bytes with the real weights in 8 bits; and all
# tensors that Keras has. Bytes and multiply-adds are also those of Larq's documentation
# (2020-10-15), there without fixed filters.
LARQ = {
    "binary_alexnet": (61_848_720, 61_827_776, {1: 768_512_000, 32: 72_855_552},
        7_812_248, 7_749_416, 61_859_192),
    "xnornet": (62_387_104, 58_236_928, {1: 1_025_744_896, 32: 113_379_328},
        23_880_320, 11_429_792, 62_396_768),
    "dorefanet": (62_394_440, 58_236_928, {2: 2_924_609_536, 32: 125_028_352},
        23_909_664, 11_437_128, 62_403_912),
    "birealnet18": (11_689_512, 10_985_472, {1: 1_676_279_808, 32: 137_793_536},
        4_189_344, 2_077_224, 11_699_112),
    "binary_resnet_e18": (11_689_640, 10_985_472, {1: 1_676_279_808, 32: 137_793_536},
        4_189_856, 2_077_352, 11_699_368),
    "binary_densenet28": (5_131_496, 4_202_496, {1: 3_587_383_296, 32: 202_484_224},
        4_241_312, 1_454_312, 5_150_504),
    "binary_densenet37": (8_702_248, 7_593_984, {1: 4_506_808_320, 32: 199_738_368},
        5_382_304, 2_057_512, 8_734_120),
    "binary_densenet37_dilated": (8_702_248, 7_593_984, {1: 7_774_470_144, 32: 452_625_408},
        5_382_304, 2_057_512, 8_734_120),
    "binary_densenet45": (13_889_512, 12_349_440, {1: 6_430_556_160, 32: 244_103_424},
        7_703_968, 3_083_752, 13_939_240),
    "meliusnet22": (6_944_584, 6_119_424, {1: 4_624_220_160, 32: 136_388_608},
        4_065_568, 1_590_088, 6_969_672),
    "real_to_binary_net": (11_986_920, 10_985_472, {1: 1_676_279_808, 32: 138_087_936},
        5_378_976, 2_374_632, 11_995_624),
    "quicknet_small": (12_655_688, 11_980_800, {1: 1_156_055_040, 32: 15_941_120},
        4_197_152, 2_172_488, 12_664_344),
    "quicknet": (13_234_088, 12_533_760, {1: 1_849_688_064, 32: 29_651_712},
        4_368_032, 2_267_048, 13_243_720),
    "quicknet_large": (23_342_248, 22_634_496, {1: 3_699_376_128, 32: 29_651_712},
        5_660_320, 3_537_064, 23_359_304),
}
# Multiply-adds of their fixed filters.
BLURS = {"quicknet_small": 451_584, "quicknet": 790_272, "quicknet_large": 790_272}
# Parameters, binary weights, BOPs, OPs, these as the papers round them.
REACTNET = {
    "reactnet_a": (29_343_592, 28_253_184, 4.817e9, 8.713e7),
    "reactnet_b": (None, None, 4.688e9, 1.17e8),
    "reactnet_c": (None, None, 4.688e9, 2.14e8),
    "reactnet18": (11_704_424, 10_985_472, 1.676e9, 1.640e8),
}
# Of the published code: parameters, those of them that it never uses, binary weights, BOPs, OPs,
# megabytes (1-bit and float32, 1-bit and 8-bit).
BNEXT = {
    "bnext_t": (30_862_236, 8_960, 28_253_184, 4.817e9, 0.0769e9, 14.0, 6.1),
    "bnext_s": (68_594_614, 13_440, 63_569_664, 10.84e9, 0.1720e9, 28.1, 13.0),
    "bnext_m": (134_501_974, 22_080, 126_238_464, 20.09e9, 0.3169e9, 48.8, 24.0),
    "bnext_l": (326_546_640, 41_728, 308_310_016, 52.15e9, 0.8198e9, 111.5, 56.8),
}


def rounded(value: float, expected: float) -> bool:
    """Equal to four digits, or to the three that are there."""
    return math.isclose(value, expected, rel_tol=5e-4 if f"{expected:.3g}" != f"{expected:.4g}"
                        else 5e-3)


@pytest.mark.parametrize("name", LARQ)
def test_larq_zoo(name):
    found = published(name)
    weights, binary, macs, size, size8, values = LARQ[name]
    blur, larq, total = BLURS.get(name, 0), found.larq, sum(macs.values())
    assert (larq.weights, found.weights[1], found.values) == (weights, binary, values)
    assert found.macs == macs and found.fixed_macs == ({32: blur} if blur else {})
    assert (larq.bytes, larq.bytes_8bit, larq.bytes_float32) == (size, size8, 4 * weights)
    assert larq.compression == pytest.approx(size / (4 * weights), abs=1e-12)
    assert (larq.macs, found.reactnet.bops) == (total, macs.get(1, 0))
    assert larq.binarized == pytest.approx(macs.get(1, 0) / total, abs=1e-12)
    assert larq.ternarized == pytest.approx(macs.get(2, 0) / total, abs=1e-12)
    assert found.reactnet.flops == found.bnext.flops == total - blur - macs.get(1, 0)
    assert not found.uncounted


@pytest.mark.parametrize("name", REACTNET)
def test_reactnets(name):
    found = published(name)
    parameters, binary, bops, ops = REACTNET[name]
    if parameters is not None:
        assert (found.parameters, found.weights[1]) == (parameters, binary)
    assert rounded(found.reactnet.bops, bops) and rounded(found.reactnet.ops, ops)
    assert not found.uncounted
    if name == "reactnet_a":
        assert rounded(found.reactnet.flops, 1.186e7)


def test_the_class_of_reactnet18():
    with torch.device("meta"):
        found = bitkernels.summary(models.create("reactnet-18", num_classes=1000), (3, 224, 224))
    assert (found.parameters, found.weights[1]) == (11_704_424, 10_985_472)
    assert rounded(found.reactnet.ops, 1.640e8) and found.reactnet.flops == 137_793_536


@pytest.mark.parametrize("name", BNEXT)
def test_bnexts(name):
    found = published(name)
    parameters, unused, binary, bops, ops, megabytes, megabytes8 = BNEXT[name]
    assert (found.parameters + unused, found.weights[1]) == (parameters, binary)
    assert rounded(found.bnext.bops, bops) and rounded(found.bnext.ops, ops)
    assert (found.larq.bytes + 4 * unused) / 1e6 == pytest.approx(megabytes, abs=0.06)
    assert (found.larq.bytes_8bit + unused) / 1e6 == pytest.approx(megabytes8, abs=0.06)
    assert not found.uncounted


# What each layer has: (layer, input, weights by bits, multiply-adds by bits).
LAYERS = {
    "conv": (nn.Conv2d(6, 4, 3, 2, 1, groups=2), (6, 8, 8), {32: 112}, {32: 108 * 16}),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (6, 8, 8), {32: 60}, {32: 54 * 36}),
    "dilated": (nn.Conv1d(6, 4, 3, dilation=2), torch.empty(2, 6, 8), {32: 76}, {32: 72 * 8}),
    "binary": (bnn.BinaryConv2d(40, 4, 3, pad_value=1, padding=1, bias=False), (40, 8, 8),
               {1: 1440}, {1: 1440 * 64}),
    "grouped": (bnn.BinaryConv2d(64, 4, 3, 2, groups=2, weight_scale="detached"), (2, 64, 9, 9),
                {1: 1152, 32: 4}, {1: 1152 * 2 * 16}),
    "same": (bnn.BinaryConv2d(6, 4, 3, padding="same"), (6, 5, 7), {1: 216, 32: 4}, {1: 216 * 35}),
    "one-dimensional": (bnn.BinaryConv1d(6, 4, 3), torch.empty(2, 6, 9), {1: 72, 32: 4},
                        {1: 72 * 14}),
    "three-dimensional": (bnn.BinaryConv3d(2, 4, 3), (1, 2, 5, 5, 5), {1: 216, 32: 4},
                          {1: 216 * 27}),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (4, 5, 7), {32: 114}, {32: 108 * 35}),
    "binary transposed": (bnn.BinaryConvTranspose2d(4, 6, 3, 2, 1, groups=2), (4, 5, 7),
                          {1: 108, 32: 6}, {1: 108 * 35}),
    "transposed 1d": (bnn.BinaryConvTranspose1d(4, 6, 3, 2), torch.empty(1, 4, 5), {1: 72, 32: 6},
                      {1: 72 * 5}),
    "sequence": (nn.Linear(40, 3), torch.empty(2, 7, 40), {32: 123}, {32: 120 * 14}),
    "binary sequence": (bnn.BinaryLinear(40, 3), torch.empty(2, 7, 40), {1: 120, 32: 3},
                        {1: 120 * 14}),
    "vector": (nn.Linear(40, 3), (40,), {32: 123}, {32: 120}),
    "real input": (bnn.BinaryConv2d(4, 6, 3, input_quantizer=quantizers.NoOp(32)), (4, 8, 8),
                   {1: 216, 32: 6}, {32: 216 * 36}),
    "real weights": (bnn.BinaryConv2d(4, 6, 3, weight_quantizer=quantizers.NoOp(32)), (4, 8, 8),
                     {32: 222}, {32: 216 * 36}),
    "DoReFa": (bnn.BinaryConv2d(4, 6, 3, input_quantizer=quantizers.DoReFa(3)), (4, 8, 8),
               {1: 216, 32: 6}, {3: 216 * 36}),
    "ternary": (bnn.BinaryLinear(8, 4, weight_quantizer="ste_tern"), (1, 8), {2: 32, 32: 4},
                {2: 32}),
    "norm": (nn.BatchNorm2d(6), (6, 4, 4), {32: 12}, {}),
    "norm without scale": (models.parts.UnscaledBatchNorm2d(6), (6, 4, 4), {32: 12}, {}),
    "norm alone": (nn.BatchNorm2d(6, affine=False), (6, 4, 4), {32: 12}, {}),
    "norm of batches": (nn.BatchNorm2d(6, track_running_stats=False), (6, 4, 4), {32: 12}, {}),
    "layer norm": (nn.LayerNorm((3, 4)), torch.empty(1, 3, 4), {32: 24}, {}),
    "embedding": (nn.Embedding(10, 8), torch.zeros(2, 5, dtype=torch.long), {32: 80}, {}),
    "lstm": (nn.LSTM(8, 16), torch.empty(5, 2, 8), {32: 1664}, {32: 1536 * 10}),
    "attention": (nn.MultiheadAttention(8, 2, bias=False), (torch.empty(5, 2, 8),) * 3, {32: 256},
                  {32: 256 * 10 + 2 * 2 * 5 * 5 * 8}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case):
    layer, size, weights, macs = LAYERS[case]
    found = bitkernels.summary(layer, size)
    assert found.weights == weights and found.macs == macs and not found.uncounted
    assert found.larq.bytes == math.ceil(sum(b * n for b, n in weights.items()) / 8)
    if case == "attention":
        assert found.fixed_macs == {32: 2 * 2 * 5 * 5 * 8}
        assert found.reactnet.flops == 2560
    if isinstance(layer, bnn.BinaryLayer) and layer.pack_obstacle() is None:
        packed = bitkernels.summary(bnn.pack(layer), size)
        assert (packed.weights, packed.macs) == (weights, macs)
        assert packed.parameters == found.parameters and packed.layers[0].input_bits == 1


def test_packed_models_have_the_same_numbers():
    model = models.create("reactnet", channels=(16, 32, 32), image_size=16)
    found, packed = (bitkernels.summary(m, (2, 3, 16, 16)) for m in (model, bnn.pack(model)))
    for name in ("weights", "macs", "larq", "reactnet", "bnext", "parameters", "values"):
        assert getattr(packed, name) == getattr(found, name), name
    assert [row.kind for row in packed.layers].count("PackedConv2d") == 4


class Odd(nn.Module):
    """Shared weights, functions, a fixed filter, an attribute, random numbers, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.twice = self.conv
        self.position = nn.Parameter(torch.zeros(1, 3, 8, 8))
        self.register_buffer("blur", torch.ones(3, 1, 3, 3))
        self.unused = bnn.BinaryLinear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.unused.weight

    def forward(self, x):
        x = self.twice(self.conv(x) + self.position)
        self.seen = F.conv2d(x, self.blur.to(x.dtype), groups=3)
        return (self.seen + F.conv2d(x, 2 * self.conv.weight) * torch.rand(()),)


def test_shared_fixed_and_unused():
    found = bitkernels.summary(Odd(), (3, 8, 8))
    rows = {row.name: row for row in found.layers}
    assert list(rows) == ["", "conv", "unused"]  # the tied weight is counted once
    assert rows["conv"].calls == 2 and rows["conv"].macs == {32: 2 * 81 * 64}
    assert rows["conv"].weights == {32: 84} and rows["conv"].output_shapes == ((1, 3, 8, 8),)
    assert rows[""].fixed_macs == {32: 27 * 36} and rows[""].macs == {32: (27 + 81) * 36}
    assert rows[""].weights == {32: 192 + 27} and rows[""].output_shapes == ((1, 3, 6, 6),)
    assert rows["unused"].calls == 0 and rows["unused"].weights == {1: 64}
    assert found.reactnet.flops == 2 * 81 * 64 + 81 * 36
    assert found.parameters == 84 + 192 + 64 and found.values == found.parameters + 27
    text = str(found)
    assert "not called" in text and "2 of 1x3x8x8" in text and "(itself)" in text
    assert f"{found.larq.macs:,}" in text and "972 without a learned weight" in text


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(Odd(), nn.Identity(), nn.Dropout(0.5)).train()
    model[0].conv.eval()
    model[0].conv.weight.grad = torch.ones(3, 3, 3, 3)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    state = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    flags = [m.training for m in model.modules()]
    keys = [sorted(vars(m)) for m in model.modules()]
    random = torch.get_rng_state()
    bitkernels.summary(model[0], (3, 8, 8))
    assert flags == [m.training for m in model.modules()]
    assert keys == [sorted(vars(m)) for m in model.modules()] and not calls
    assert torch.equal(random, torch.get_rng_state())
    assert len(model[0]._forward_hooks) == 1 and model[0].conv.weight.grad is not None
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert state[name][0] == id(tensor) and torch.equal(state[name][1], tensor)


def test_first_inputs_are_still_looked_at_and_packed_words_are_those_of_the_layer():
    layer = bnn.BinaryConv2d(32, 32, 3)
    packed = bnn.pack(layer)
    for model in (layer, packed):
        bitkernels.summary(model, (32, 5, 5))
    x = torch.randn(1, 32, 5, 5)
    assert torch.equal(packed(x), layer.eval()(x).detach())
    with pytest.warns(UserWarning, match="every sign of its first training input"):
        layer.train()(x.abs())


def test_pruned_and_parametrized():
    layer = bnn.BinaryConv2d(4, 6, 3)
    prune.l1_unstructured(layer, "weight", 0.3)
    layer(torch.randn(1, 4, 5, 5))
    weight = layer.weight
    found = bitkernels.summary(layer, (4, 5, 5))
    assert found.weights == {1: 216, 32: 6} and layer.weight is weight
    normed = bitkernels.summary(parametrizations.weight_norm(bnn.BinaryConv2d(4, 6, 3)), (4, 5, 5))
    assert normed.weights == {1: 216, 32: 6 + 6} and normed.macs == {1: 216 * 9}
    low_rank = parametrizations.spectral_norm(nn.Linear(4, 6))  # products of weights alone
    assert bitkernels.summary(low_rank, (1, 4)).macs == {32: 24}


def test_half_precision_compiled_and_meta():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    expected = bitkernels.summary(model, (3, 8, 8)).macs
    assert bitkernels.summary(torch.compile(model), (3, 8, 8)).macs == expected
    assert bitkernels.summary(model.to("meta"), (3, 8, 8)).macs == expected
    half = bitkernels.summary(model.half(), (3, 8, 8))
    assert half.macs == {16: expected[32]} and half.larq.bytes == 2 * 112
    with torch.inference_mode():
        assert bitkernels.summary(nn.Conv2d(3, 4, 3), (3, 8, 8)).macs == expected


def test_operators_that_are_not_known_are_named():
    found = bitkernels.summary(nn.Bilinear(4, 5, 6), (torch.empty(1, 4), torch.empty(1, 5)))
    assert found.uncounted == {"": ("aten._trilinear",)} and found.layers[0].macs is None
    text = str(found)
    assert "?" in text and "not counted" in text and "aten._trilinear" in text


def test_operators_of_the_package_outside_of_layers():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(40, 40, 3, 3))

        def forward(self, x):
            words = bitkernels.ops.sign_pack(x, None, 1)
            filters = bitkernels.ops.sign_pack(self.weight, None, 1)
            bits = bitkernels.ops.packed_conv2d.packed(words, filters, 40)
            y, words = bitkernels.ops.packed_conv2d.both(bits, filters, 40)
            y = bitkernels.ops.binary_conv2d(y, self.weight, padding=1)
            return bitkernels.ops.packed_linear(words, filters[:, 0, 0], 40)

    found = bitkernels.summary(Direct(), (40, 8, 8))
    products = 40 * 40 * 9 * (36 + 16 + 16) + 16 * 40 * 40
    assert found.macs == {1: products} == {1: found.reactnet.bops} and not found.fixed_macs


class Calls(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize("out_channels", [16, 40])
def test_tiled_filters_and_images_without_a_batch(out_channels):
    weight, size = torch.randn(out_channels, 64, 3, 3), (1, 64, 5, 6)
    words, ops = bitkernels.ops.sign_pack(weight, None, 1), bitkernels.ops
    tiles, rows = ops.tile_weight(words), ops.tile_weight(words[:, 0, 0])
    for call, macs in (
            (lambda x: ops.packed_conv2d(ops.sign_pack(x, None, 1), tiles, 64,
                                         out_channels=out_channels), 12 * 9),
            (lambda x: ops.packed_linear(ops.sign_pack(x, None, 1), rows, 64,
                                         out_channels=out_channels), 30),
            (lambda x: ops.binary_conv2d(x[0], weight), 12 * 9),
            (lambda x: ops.binary_conv_transpose2d(x[0], weight.transpose(0, 1)), 30 * 9)):
        assert bitkernels.summary(Calls(call), size).macs == {1: macs * 64 * out_channels}
    if out_channels == 16:
        call = Calls(lambda x: ops.packed_conv2d(ops.sign_pack(x, None, 1), tiles, 64))
        assert bitkernels.summary(call, size).macs == {1: 12 * 9 * 64 * 16}


def test_depth_joins():
    model = models.create("quicknet", filters=(32, 32), blocks=(1, 1), image_size=8)
    whole = bitkernels.summary(model, (3, 8, 8))
    for depth in (1, 2, 3):
        joined = bitkernels.summary(model, (3, 8, 8), depth=depth)
        assert all(row.name.count(".") < depth for row in joined.layers)
        for name in ("weights", "macs", "fixed_macs", "larq", "reactnet"):
            assert getattr(joined, name) == getattr(whole, name)
    assert [row.name for row in bitkernels.summary(model, (3, 8, 8), depth=1).layers] == [
        "stem", "sections", "relu", "pool", "classifier"]


def test_json_has_all():
    found = bitkernels.summary(nn.Sequential(bnn.BinaryConv2d(4, 6, 3), nn.Flatten()), (4, 8, 8))
    data = json.loads(found.to_json())
    assert data == json.loads(json.dumps(found.to_dict()))
    assert data["layers"][0]["weights"] == {"1": 216, "32": 6}
    assert data["layers"][0]["output_shapes"] == [[1, 6, 6, 6]] and data["layers"][0]["bytes"] == 51
    assert data["larq"]["macs"] == data["reactnet"]["bops"] == 216 * 36


class Looks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("model, size, error, message", [
    (nn.Linear, (3,), TypeError, "model must be an nn.Module, got the class Linear"),
    (nn.Linear(3, 3), (0, 3), ValueError, r"at least 1, or tensors alone, got \(0, 3\)"),
    (nn.Linear(3, 3), ({"x": torch.ones(2, 3)}, torch.ones(9), 2), ValueError,
     r"got \(dict, Tensor, 2\)"),
    (nn.Conv1d(6, 4, 3), (2, 6, 9), RuntimeError,
     r"shape \(1, 2, 6, 9\): .*; three numbers are one image, with 1 before them: give an input"),
    (nn.Linear(3, 3), (), ValueError, "must be a shape or tensors"),
    (nn.Linear(3, 3), 3, ValueError, "must be a shape or tensors, got 3"),
    (nn.LazyLinear(3), (3,), ValueError, "weight, bias of the model has no shape yet"),
    (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 4)), (1, 3), RuntimeError,
     r"Sequential in 1 does not run on an input of shape \(1, 3\)"),
    (Looks(), (3, 8, 8), RuntimeError, "looks at values")])
def test_refusals(model, size, error, message, capfd):
    with pytest.raises(error, match=f"summary: .*{message}"):
        bitkernels.summary(model, size)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("depth", [0, -1, 1.5, True])
def test_a_depth_that_is_none(depth):
    with pytest.raises(ValueError, match="depth must be an integer of at least 1"):
        bitkernels.summary(nn.Linear(3, 3), (3,), depth=depth)


def test_a_scripted_module_is_refused():
    with pytest.raises(TypeError, match="ScriptModule"):
        bitkernels.summary(torch.jit.script(nn.Linear(3, 3)), (3,))


def test_a_converted_network_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), bnn.BinaryConv2d(32, 8, 3), nn.Flatten()).eval()
    converted = bitkernels.convert(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(TypeError, match="summary: 0 is a converted network, .* its report"):
        bitkernels.summary(nn.Sequential(converted), (3, 8, 8))


def test_a_norm_in_a_quantizer_counts_as_any_norm():
    """Two numbers a channel and its running statistics, before and after packing."""
    def numbers(model, shape):
        found = bitkernels.summary(model, shape)
        return found.weights, found.parameters, found.values, found.macs

    conv = bnn.BinaryConv2d(8, 4, 3, bias=False, input_quantizer=bnn.NormSign(8, 2))
    want = {1: 4 * 8 * 9, 32: 2 * 8}, 4 * 8 * 9 + 16, 4 * 8 * 9 + 32, {1: 4 * 8 * 9 * 9}
    assert numbers(conv, (1, 8, 5, 5)) == want
    assert numbers(bnn.pack(conv), (1, 8, 5, 5)) == want
    before = nn.Sequential(nn.BatchNorm2d(8), bnn.BinaryConv2d(8, 4, 3, bias=False))
    assert numbers(before, (1, 8, 5, 5)) == want
