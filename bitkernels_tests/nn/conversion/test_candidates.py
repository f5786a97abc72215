"""A layer that says binary is binary: what binarize changes, refuses, or names as left real."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import bitkernels.nn as bnn
from bitkernels import convert, summary
from bitkernels.nn import BinaryConv2d, BinaryLayer, BinaryLinear, binarize, pack, save_packed
from bitkernels_tests.cases import signed

C = 8


def stack(layer: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, C), nn.Linear(C, C) if layer is None else layer,
                         nn.Linear(C, C))


def state(model: nn.Module) -> list:
    return [(m, type(m), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()})
            for m in model.modules()]


def patch(layer: nn.Module) -> None:
    old = layer.forward
    layer._old_forward = old
    layer.forward = lambda x: old(x)


@pytest.mark.parametrize("spoil, said", [
    (patch, "its forward was replaced on the instance"),
    (lambda layer: setattr(layer, "forward", lambda x: 0 * x), "its forward was replaced"),
    (lambda layer: layer.compile(backend="eager"), r"compiled by \.compile\(\)"),
])
def test_refused_by_name_and_unchanged(spoil, said):
    model = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Sequential(nn.Linear(C, C)),
                          nn.ReLU(), nn.Linear(C, C), nn.Linear(C, C)).eval()
    spoil(model[4])
    before, x = state(model), torch.randn(3, C)
    y = model(x)
    with pytest.raises(ValueError, match=rf"cannot binarize 4 \(.*{said}"):
        binarize(model)
    assert state(model) == before and torch.equal(model(x), y)
    binarize(model, filter=lambda name, module: name != "4")
    assert isinstance(model[2][0], BinaryLinear) and type(model[4]) is nn.Linear
    with pytest.raises(ValueError, match=said):
        binarize(model[4])


def test_lazy_layers_are_refused():
    model = stack(nn.LazyLinear(C))
    with pytest.raises(ValueError, match=r"binarize: 1\.weight, 1\.bias of the model has no shape"):
        binarize(model)
    assert type(model[1]) is nn.LazyLinear
    model(torch.randn(2, C))
    assert type(binarize(model)[1]) is BinaryLinear


@pytest.mark.parametrize("call", [
    binarize, pack, lambda model: convert(model, torch.randn(2, C)),
    lambda model: save_packed(model, "unwritten"), lambda model: summary(model, (2, C))],
    ids=["binarize", "pack", "convert", "save_packed", "summary"])
@pytest.mark.parametrize("lazy", [nn.LazyLinear, nn.LazyBatchNorm1d])
def test_models_with_a_lazy_module_are_not_changed(call, lazy):
    """One that stays real too: a last layer, a norm."""
    model = nn.Sequential(nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C),
                          lazy(*[3] * (lazy is nn.LazyLinear)))
    with pytest.raises(ValueError, match=r"3\.weight.* of the model has no shape yet"):
        call(model)
    assert [type(m) for m in model][:3] == [nn.Linear] * 3 and not os.path.exists("unwritten")


def test_all_refused_layers_are_in_one_line():
    model = nn.Sequential(*(nn.Linear(C, C) for _ in range(5)))
    patch(model[1])
    patch(model[3])
    with pytest.raises(ValueError, match=r"cannot binarize 1, 3 \(its forward") as said:
        binarize(model)
    assert "\n" not in str(said.value)
    assert not any(isinstance(m, BinaryLayer) for m in model)


def test_dispatched_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(stack(), {"": "cpu"}, force_hooks=True)
    accelerate.hooks.add_hook_to_module(model[1], accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match="remove_hook_from_module"):
        binarize(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert isinstance(binarize(model)[1], BinaryLinear)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(C, C), lambda: nn.Conv2d(C, C, 3)])
def test_parametrized_layers_are_binary_with_the_weight_of_now(name, make):
    shape = (2, C) if isinstance(make(), nn.Linear) else (2, C, 5, 5)
    model = nn.Sequential(make(), PARAMETRIZATIONS[name](make()), make()).eval()
    names = list(model.state_dict())
    binarize(model)
    layer, x = model[1], torch.randn(shape)
    assert isinstance(layer, BinaryLayer) and parametrize.is_parametrized(layer)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        for parameter in layer.parametrizations.parameters():
            parameter.add_(torch.randn_like(parameter))
        real = F.linear if isinstance(layer, nn.Linear) else F.conv2d
        assert torch.equal(layer(x), real(signed(x), signed(layer.weight)) + layer.bias.view(
            -1, *[1] * (len(shape) - 2)))
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parametrizations.parameters() if p.requires_grad)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) in (BinaryLinear, BinaryConv2d)


@pytest.mark.parametrize("reparametrize", [
    lambda layer: prune.l1_unstructured(layer, "weight", 0.25),
    lambda layer: torch.nn.utils.weight_norm(layer),
    lambda layer: torch.nn.utils.spectral_norm(layer),
])
def test_hooks_that_make_the_weight_are_kept(reparametrize):
    model = stack(reparametrize(nn.Linear(C, C)))
    binarize(model).eval()
    layer, x = model[1], torch.randn(4, C)
    assert isinstance(layer, BinaryLinear)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        y = layer(x)
        assert torch.equal(y, signed(x) @ signed(layer.weight).t() + layer.bias)


def test_handles_of_hooks_stay_valid():
    model = stack()
    seen: list[str] = []
    handles = [model[1].register_forward_hook(lambda *_: seen.append("forward")),
               model[1].register_full_backward_hook(lambda *_: seen.append("backward")),
               model[1].register_load_state_dict_pre_hook(lambda *_: seen.append("load"))]
    binarize(model)
    x = torch.randn(2, C)
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["forward", "backward", "load"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(seen) == 3


def test_layers_in_plain_containers_are_binary():
    """A parent that keeps its layers in a list, a tuple or a lambda calls the binary ones."""
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(C, C), nn.Linear(C, C)
            self.order = [self.one, self.two]
            self.call = lambda x, layer=self.two: layer(x)
            self.act = nn.ReLU()
            self.acts = (self.act,)

        def forward(self, x):
            return self.call(self.acts[0](self.order[0](x)))

    model = stack(Parent())
    binarize(model)
    parent = model[1]
    assert all(isinstance(layer, BinaryLinear) for layer in parent.order)
    assert parent.order[0] is parent.one and isinstance(parent.acts[0], nn.PReLU)
    x = torch.randn(2, C)
    assert torch.equal(parent(x), parent.two(parent.act(parent.one(x))))


class Trivial(nn.Linear):
    pass


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize("layer", [
    Trivial(C, C), OwnForward(C, C), OwnConvForward(C, C, 1), nn.ConvTranspose3d(C, C, 1)])
def test_what_stays_real_is_named_once(layer):
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    sizes = (C, C) if kind is nn.Linear else (C, C, 1)
    model = nn.Sequential(kind(*sizes), layer, kind(*sizes), kind(*sizes))
    with pytest.warns(UserWarning, match=rf"stay real: 1 \(.*{type(layer).__name__}") as said:
        binarize(model)
    assert len(said) == 1 and model[1] is layer and not isinstance(layer, BinaryLayer)
    with pytest.warns(UserWarning, match="stays real"):
        assert binarize(layer) is layer


def test_quantized_layers_are_named():
    model = stack(torch.ao.nn.quantized.dynamic.Linear(C, C))
    model.append(nn.Linear(C, C))
    with pytest.warns(UserWarning, match=r"1 \(it is quantized already\)"):
        binarize(model)


def test_patched_convolution():
    """`_conv_forward` is what some libraries replace; a binary layer on bits never calls it."""
    model = nn.Sequential(*(nn.Conv2d(C, C, 1) for _ in range(3)))
    model[1]._conv_forward = lambda x, weight, bias: x
    with pytest.raises(ValueError, match=r"cannot binarize 1 \(its forward was replaced"):
        binarize(model)


class Reads(nn.Module):
    def __init__(self, read) -> None:
        super().__init__()
        self.proj, self.read = nn.Linear(C, C), read
        self.layers = nn.ModuleList([nn.Linear(C, C)])

    def forward(self, x):
        return self.read(self, self.layers[0](x))


class ReadsUntraced(Reads):
    """Its code asks for values, which a tracer cannot give; another method reads the weight."""

    def forward(self, x):
        return self.project(x) if x.sum() < 1e9 else x

    def project(self, x):
        return F.linear(x, self.layers[0].weight) + self.proj(x)


READS = {
    "F.linear": lambda s, x: F.linear(x, s.proj.weight, s.proj.bias),
    "matmul": lambda s, x: x @ s.proj.weight.t(),
    "data": lambda s, x: torch.einsum("bi,oi->bo", x, s.proj.weight.data),
    "another name": lambda s, x: F.linear(x, getattr(s, "proj").weight),  # noqa: B009
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("recorded", [False, True])
def test_weights_that_a_parent_reads(name, recorded):
    x = torch.randn(2, C)
    model = stack(Reads(READS[name])).eval()
    with pytest.warns(UserWarning, match=r"stay real: 1\.proj \(code of a parent reads"):
        binarize(model, example_inputs=x if recorded else None)
    assert type(model[1].proj) is nn.Linear
    assert isinstance(model[1].layers[0], BinaryLinear)


def test_weights_that_untraced_code_reads():
    model = stack(ReadsUntraced(None))
    with pytest.warns(UserWarning) as said:
        binarize(model)
    text = [str(w.message) for w in said]
    assert "stay real: 1.layers.0 (code of a parent reads" in text[0]
    assert "cannot trace the calls of these layers" in text[1] and "1.proj" in text[1]


def test_asking_for_the_type_of_a_weight_is_no_read():
    model = stack(Reads(lambda s, x: s.proj(x.to(s.proj.weight.dtype)).view(
        -1, s.proj.weight.shape[0])))
    binarize(model)
    assert isinstance(model[1].proj, BinaryLinear)


def test_swin_and_attention(torchvision):
    model = torchvision.models.swin_transformer.SwinTransformer(
        [2, 2], 16, [2], [2], [4, 4], num_classes=3)
    with pytest.warns(UserWarning, match=r"features\.1\.0\.attn\.qkv, features\.1\.0\.attn\.proj"):
        binarize(model)
    block = model.features[1][0]
    assert type(block.attn.proj) is nn.Linear and isinstance(block.mlp[3], BinaryLinear)
    with pytest.warns(UserWarning, match=r"1\.out_proj"):
        binarize(nn.ModuleList([nn.Linear(C, C), nn.MultiheadAttention(C, 2), nn.Linear(C, C)]))


def test_tied_weights_stay_tied():
    model = stack()
    model.append(nn.Embedding(C, C))
    model[1].weight = model[3].weight
    binarize(model)
    assert isinstance(model[1], BinaryLinear) and model[1].weight is model[3].weight


def test_pickled_and_compiled():
    model = binarize(stack()).eval()
    x = torch.randn(2, C)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    whole = torch.compile(stack().eval(), backend="eager")
    real = whole(x)
    binarize(whole)
    with torch.no_grad():
        assert not torch.equal(whole(x), real)
        assert torch.equal(whole(x), whole._orig_mod(x))


def test_names_of_options_are_checked_first():
    model = stack()
    with pytest.raises(ValueError, match="activation must be one of.*got 'relu'"):
        binarize(model, activation="relu")
    assert type(model[1]) is nn.Linear


def test_report(capsys):
    reports: list[bnn.BinarizeReport] = []
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3),
                          nn.Flatten(), nn.Linear(C, 3))
    binarize(model, verbose=True, report=reports.append)
    (report,) = reports
    assert report.binary == {"3": "BinaryConv2d"}
    assert report.kept == {"0": "first layer (skip_first)", "5": "last layer (skip_last)"}
    assert report.activations == {"2": "ReLU -> PReLU(num_parameters=8)"}
    assert report.binary_weights == 9 * C * C
    assert report.real_parameters == sum(p.numel() for p in model.parameters()) - 9 * C * C
    assert capsys.readouterr().out == f"{report}\n"
    assert "activations: ReLU -> PReLU(num_parameters=8): 2" in str(report)


class Reader(nn.Module):
    """Its subclasses read weights in code that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)
        self.layers = nn.ModuleList([nn.Linear(C, C), nn.Linear(C, C)])


class Loop(Reader):
    def forward(self, x):
        x = x if x.sum() < 1e9 else -x
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        return self.b(self.a(x))


class Index(Reader):
    def forward(self, x):
        x = x if x.sum() < 1e9 else -x
        for i in range(2):
            x = F.linear(x, self.layers[i].weight)
        return self.b(self.a(x))


class Local(Reader):
    def forward(self, x):
        x = x if x.sum() < 1e9 else -x
        layer = self.a
        return self.b(F.linear(x, layer.weight))


class Named(Reader):
    def forward(self, x):
        x = x if x.sum() < 1e9 else -x
        return self.b(F.linear(x, self.get_parameter("a.weight")))


class Held(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.w = self.a.weight

    def forward(self, x):
        x = x if x.sum() < 1e9 else -x
        return self.b(F.linear(x, self.w))


@pytest.mark.parametrize("cls, read", [
    (Loop, ["layers.0", "layers.1"]), (Index, ["layers.0", "layers.1"]), (Local, ["a"]),
    (Named, ["a"]), (Held, ["a"])])
def test_weights_read_by_another_name_stay_real(cls, read):
    model = nn.Sequential(nn.Linear(C, C), cls(), nn.Linear(C, C)).eval()
    with pytest.warns(UserWarning, match="these layers stay real: .*code of a parent reads"):
        binarize(model)
    assert all(type(model[1].get_submodule(name)) is nn.Linear for name in read)
    assert isinstance(model[1].b, BinaryLinear)


def test_scripted_models_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    scripted = torch.jit.script(model)
    for given in (scripted, nn.Sequential(nn.Conv2d(3, 3, 1), scripted)):
        given.eval()
        with pytest.raises(ValueError, match="compiled by torch.jit; binarize it first"):
            binarize(given)
        assert not given.training


def test_packed_layers_are_layers_and_stay():
    model = binarize(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3)))
    packed = bnn.pack(model)
    binarize(packed)
    assert [type(m) for m in packed] == [nn.Conv2d, bnn.PackedConv2d, nn.Conv2d]
    around = nn.Sequential(nn.Conv2d(3, 16, 3), bnn.BinaryConv2d(16, 16, 3).pack(),
                           nn.Conv2d(16, 16, 3), bnn.BinaryConv2d(16, 8, 3).pack())
    binarize(around)
    assert isinstance(around[2], BinaryConv2d)
