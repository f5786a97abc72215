"""binarize and pack: which layers change, what they keep, and that the network stays the same."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkernels import quantizers
from bitkernels.nn import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv3d,
    BinaryConvTranspose1d,
    BinaryConvTranspose2d,
    BinaryLinear,
    PackedConv2d,
    PackedLinear,
    RPReLU,
    RSign,
    binarize,
    load_packed,
    pack,
    save_packed,
)
from bitkernels_tests.cases import reals


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 33, 3, padding=1), nn.BatchNorm2d(33), nn.Hardtanh(),
        nn.Conv2d(33, 34, 3, padding=1, groups=1, bias=False), nn.BatchNorm2d(34),
        nn.Sequential(nn.Conv2d(34, 35, 1, stride=2), nn.BatchNorm2d(35)),
        nn.Flatten(), nn.Linear(35 * 16, 40), nn.BatchNorm1d(40), nn.Linear(40, 10))


def kinds(model):
    return [type(m).__name__ for m in model.modules()
            if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, PackedConv2d, PackedLinear))]


def settled(model):
    """Batch statistics that are not the initial ones."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(reals(8, 3, 8, 8))
    return model.eval()


def test_first_and_last_layer_stay_real():
    model = small()
    assert binarize(model) is model
    assert kinds(model) == ["Conv2d", "BinaryConv2d", "BinaryConv2d", "BinaryLinear", "Linear"]
    assert kinds(binarize(small(), skip_first=False)) == [
        "BinaryConv2d"] * 3 + ["BinaryLinear", "Linear"]
    assert kinds(binarize(small(), skip_last=False)) == [
        "Conv2d", "BinaryConv2d", "BinaryConv2d", "BinaryLinear", "BinaryLinear"]
    before = list(model.modules())
    assert list(binarize(model).modules()) == before  # binary layers are left


def test_everything_but_the_class_is_kept():
    model = small().eval()
    model[3].weight.requires_grad_(False)
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters())
    binarize(model)
    assert {k: id(p) for k, p in model.named_parameters()} == {
        k: id(p) for k, p in parameters.items()}
    assert not any(m.training for m in model[3].modules())
    assert not model[3].weight.requires_grad and model[3].bias is None
    model(reals(2, 3, 8, 8))
    assert calls == [1]
    small().load_state_dict(model.state_dict())
    assert next(binarize(small().to("meta"))[3].parameters()).device.type == "meta"
    assert binarize(small().double())[3].weight.dtype == torch.float64


def test_converted_layers_equal_new_ones():
    options = dict(input_quantizer="approx_sign", weight_scale="detached")
    real = small()
    model = binarize(copy.deepcopy(real), pad_value=1, **options)
    conv = BinaryConv2d(33, 34, 3, padding=1, bias=False, pad_value=1, **options)
    conv.load_state_dict(real[3].state_dict())
    line = BinaryLinear(35 * 16, 40, **options)
    line.load_state_dict(real[7].state_dict())
    assert repr(model[3]) == repr(conv) and repr(model[7]) == repr(line)
    x = reals(2, 33, 6, 6)
    assert torch.equal(model[3](x), conv(x))
    x = reals(2, 35 * 16)
    assert torch.equal(model[7](x), line(x))


def test_filter_sees_names():
    seen = []

    def choose(name, module):
        seen.append((name, type(module)))
        return name == "5.0"

    model = binarize(small(), filter=choose)
    assert seen == [("3", nn.Conv2d), ("5.0", nn.Conv2d), ("7", nn.Linear)]
    assert kinds(model) == ["Conv2d", "Conv2d", "BinaryConv2d", "Linear", "Linear"]


def test_all_dimensions_and_other_classes():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3),
        Own(4, 4, 1), nn.ConvTranspose2d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3),
        nn.ConvTranspose3d(4, 4, 3), nn.MultiheadAttention(4, 2), RSign(4), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="these layers stay real: 4 .Own is a subclass.*"
                                         "7 .there is no binary ConvTranspose3d.*8.out_proj"):
        binarize(model)
    assert [type(m) for m in model[1:7]] == [
        BinaryConv1d, BinaryConv2d, BinaryConv3d, Own, BinaryConvTranspose2d,
        BinaryConvTranspose1d]
    assert "Binary" not in repr(model[7]) + repr(model[8]) + repr(model[9])


def test_shared_layers_stay_shared():
    shared = nn.Conv2d(4, 4, 3)
    model = nn.ModuleDict(dict(a=nn.Conv2d(4, 4, 1), b=shared, c=nn.Sequential(shared, shared),
                               d=nn.Linear(4, 4)))
    binarize(model)
    assert isinstance(model["b"], BinaryConv2d)
    assert model["b"] is model["c"][0] is model["c"][1]
    packed = pack(model)
    assert isinstance(packed["b"], PackedConv2d)
    assert packed["b"] is packed["c"][0] is packed["c"][1]


def test_a_lone_layer_is_replaced():
    real = nn.Conv2d(4, 4, 3)
    layer = binarize(real)
    assert isinstance(layer, BinaryConv2d) and layer.weight is real.weight
    assert type(real) is nn.Conv2d
    assert binarize(real, filter=lambda name, module: False) is real
    assert isinstance(pack(layer), PackedConv2d) and isinstance(layer, BinaryConv2d)


def test_a_lone_layer_shares_what_it_had():
    """Parameters, masks and norms, hooks; and the real layer goes on as it was."""
    calls, x = [], reals(2, 8, 5, 5)
    for change in (lambda m: nn.utils.prune.random_unstructured(m, "weight", 0.3),
                   nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        real = nn.Conv2d(8, 4, 3)
        change(real)
        real.register_forward_hook(lambda *call: calls.append(call[0]))
        before, kind = real(x), type(real)
        layer = binarize(real.eval())
        assert isinstance(layer, BinaryConv2d) and not layer.training
        ours, theirs = dict(layer.named_parameters()), dict(real.named_parameters())
        assert ours.keys() == theirs.keys() and all(ours[n] is theirs[n] for n in ours)
        assert list(layer._forward_hooks.values()) == list(real._forward_hooks.values())
        dot = F.conv2d(*(torch.where(t < 0, -1.0, 1.0) for t in (x, layer.weight)))
        assert torch.equal(layer(x), dot + layer.bias.view(-1, 1, 1))
        assert type(real) is kind and torch.equal(real(x), before)
        assert calls[-2:] == [layer, real]


def test_each_layer_has_its_own_quantizer():
    model = binarize(small(), input_quantizer=quantizers.SteSign(1.25))
    assert model[3].input_quantizer is not model[7].input_quantizer
    assert model[7].input_quantizer.clip_value == 1.25


def test_wrong_options_change_nothing():
    model = small()
    model[5][0] = nn.Conv2d(34, 35, 1, stride=2, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"5\.0: BinaryConv2d: pad_value=1 needs padding_mode"):
        binarize(model, pad_value=1)
    with pytest.raises(ValueError, match="unknown quantizer"):
        binarize(model, input_quantizer="sign")
    assert kinds(model) == ["Conv2d"] * 3 + ["Linear"] * 2


def test_transformer_layer_calls_its_binary_layers():
    """The fused inference path of nn.TransformerEncoderLayer would read the real weights."""
    model = binarize(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True),
                     skip_first=False, skip_last=False).eval()
    assert isinstance(model.linear1, BinaryLinear) and isinstance(model.linear2, BinaryLinear)
    x = reals(2, 5, 32)
    with torch.no_grad():
        y = model(x)
        h = model.norm1(x + model.self_attn(x, x, x)[0])
        expected = model.norm2(h + model.linear2(F.relu(model.linear1(h))))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("scale", [None, "detached", "magnitude_aware", "xnor"])
def test_packed_model_equals_the_model(scale):
    model = settled(binarize(small(), weight_scale=scale))
    packed = pack(model)
    assert kinds(packed) == ["Conv2d", "PackedConv2d", "PackedConv2d", "PackedLinear", "Linear"]
    assert kinds(model) == ["Conv2d", "BinaryConv2d", "BinaryConv2d", "BinaryLinear", "Linear"]
    x = reals(2, 3, 8, 8)
    y = packed(x)
    assert torch.equal(y, model(x)) and not y.requires_grad
    assert not packed.training and not any(p.requires_grad for p in packed.parameters())
    assert all(p.requires_grad for p in model.parameters())
    latent = {id(model[i].weight) for i in (3, 7)}
    assert not latent & {id(t) for t in packed.state_dict(keep_vars=True).values()}
    again = pack(settled(binarize(small(), weight_scale=scale)))
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), y)


def test_pack_names_what_it_cannot_pack():
    model = nn.ModuleDict(dict(a=BinaryConv3d(4, 4, 1), b=nn.Conv2d(4, 4, 1),
                               c=nn.Sequential(BinaryLinear(4, 4, weight_quantizer="ste_tern"))))
    with pytest.raises(ValueError, match=r"cannot pack a: three-dim.*; c\.0: .*SteTern"):
        pack(model)


def test_pack_leaves_what_the_filter_refuses():
    model = nn.Sequential(BinaryLinear(40, 8, input_quantizer=quantizers.NoOp(precision=32)),
                          BinaryLinear(8, 4)).eval()
    seen = []

    def packable(name, layer):
        seen.append(name)
        return layer.pack_obstacle() is None

    packed = pack(model, filter=packable)
    assert seen == ["0", "1"]
    assert type(packed[0]) is BinaryLinear and packed[0] is not model[0]
    assert type(packed[1]) is PackedLinear
    x = torch.randn(3, 40)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


def test_real_model_packs_to_itself():
    model = settled(small())
    x = reals(2, 3, 8, 8)
    assert torch.equal(pack(model)(x), model(x))


def test_model_trains_compiles_and_exports():
    model = binarize(small(), weight_scale="detached")
    x, labels = reals(16, 3, 8, 8), torch.arange(16) % 10
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        assert "bitkernels.binary_conv2d" in str(program.graph)
        assert torch.equal(program.module()(x[:5]), model(x[:5]))


def test_rsign_and_rprelu_need_no_twin():
    model = nn.Sequential(RSign(8), BinaryConv2d(8, 8, 3, input_quantizer=None), RPReLU(8)).eval()
    packed = pack(model)
    x = reals(2, 8, 5, 5)
    assert [type(m) for m in packed] == [RSign, PackedConv2d, RPReLU]
    assert torch.equal(packed(x), model(x))


@pytest.mark.parametrize("call, message", [
    (lambda path: binarize("x"), "binarize: model must be an nn.Module, got str"),
    (lambda path: binarize(nn.Linear),
     "binarize: model must be an nn.Module, got the class Linear"),
    (lambda path: pack(None), "pack: model must be an nn.Module, got NoneType"),
    (lambda path: save_packed(path, nn.Linear(3, 3)),
     "save_packed: model must be an nn.Module, got PosixPath"),
    (lambda path: load_packed(nn.Linear(3, 3), path),
     "load_packed: model must be an nn.Module, got PosixPath"),
], ids=["str", "class", "none", "save swapped", "load swapped"])
def test_what_is_no_model(call, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        call(tmp_path / "x.safetensors")


def test_nothing_binary_is_said():
    with pytest.warns(UserWarning, match="pack: Linear has no binary layer and comes back real"):
        pack(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=r"no layer became binary: 0 \(first layer \(skip_first\)"):
        binarize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    with pytest.warns(UserWarning, match="no layer became binary"):
        binarize(nn.LSTM(3, 3))


def test_a_lone_layer_is_reported():
    reports = []
    binarize(nn.Linear(40, 3), report=reports.append)
    assert reports[0].binary == {"": "BinaryLinear"} and reports[0].binary_weights == 120
    assert "1 layers became binary" in str(reports[0])


def test_warnings_that_are_errors_leave_the_model_as_it_was():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(2)), nn.ReLU(), nn.Conv2d(3, 3, 1),
                          Own(3, 3, 1), nn.Conv2d(3, 3, 1))
    before = [type(m) for m in model]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="these layers stay real: 4"):
            binarize(model)
    assert [type(m) for m in model] == before
