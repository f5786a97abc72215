"""What pack() takes over from a layer that is more than its class, and what it refuses in words."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.fx.experimental.optimization
from torch import nn
from torch.nn.utils import parametrize, prune

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
    pack,
)
from bitkernels.nn.layer import BinaryLayer
from bitkernels_tests.cases import reals, signed

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    BinaryConv1d: (lambda **o: BinaryConv1d(33, 8, 3, **o), (2, 33, 6)),
    BinaryConv2d: (lambda **o: BinaryConv2d(33, 8, 3, **o), (2, 33, 5, 6)),
    BinaryConvTranspose1d: (lambda **o: BinaryConvTranspose1d(33, 8, 3, **o), (2, 33, 6)),
    BinaryConvTranspose2d: (lambda **o: BinaryConvTranspose2d(34, 8, 3, 2, groups=2, **o),
                            (2, 34, 5, 6)),
    BinaryLinear: (lambda **o: BinaryLinear(33, 8, **o), (2, 33))}
SIZES = {cls: (33, 8, 3) for cls in LAYERS} | {
    BinaryLinear: (33, 8), BinaryConvTranspose2d: (34, 8, 3, 2, 0, 0, 2)}


@pytest.fixture(params=LAYERS, ids=lambda c: c.__name__)
def layer_and_input(request):
    make, shape = LAYERS[request.param]
    return make(weight_scale="magnitude_aware").eval(), reals(*shape)


# Subclasses, instances


def subclass(base, **members):
    return type("Own", (base,), members)


def doubled(self, *args):
    return 2 * super(type(self), self).forward(*args)


@pytest.mark.parametrize("base", LAYERS)
def test_a_subclass_that_computes_nothing_of_its_own_packs(base):
    make, shape = LAYERS[base]
    plain, x = make(), reals(*shape)

    class Named(base):
        extra = 3

        def __init__(self, *args, label="", **options):
            super().__init__(*args, **options)
            self.label = label

        def extra_repr(self):
            return f"{self.label}, {super().extra_repr()}"

    class Below(Named):
        pass

    own = Below(*SIZES[base], label="a")
    own.load_state_dict(plain.state_dict())
    assert torch.equal(pack(nn.Sequential(own))(x), plain(x))


class Doubling(nn.Module):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("make, why", [
    (lambda: subclass(BinaryConv2d, forward=doubled)(4, 4, 3), "class Own has a forward of its"),
    (lambda: subclass(BinaryConv1d, forward=doubled)(4, 4, 3), "class Own has a forward of its"),
    (lambda: subclass(BinaryLinear, forward=doubled)(4, 4), "class Own has a forward of its"),
    (lambda: subclass(subclass(BinaryLinear, forward=doubled))(4, 4), "has a forward of its own"),
    (lambda: type("Mixed", (Doubling, BinaryLinear), {})(4, 4), "Mixed has a forward of its own"),
    (lambda: subclass(BinaryConv2d, _conv_forward=lambda self, *a: 0)(4, 4, 3), "_conv_forward"),
    (lambda: subclass(BinaryConv2d, __call__=lambda self, x: x)(4, 4, 3), "a __call__ of its own"),
    (lambda: parametrized(subclass(BinaryLinear, forward=doubled)(4, 4)), "has a forward of its")])
def test_a_subclass_that_computes_is_refused(make, why):
    layer = make()
    model = nn.ModuleDict(dict(body=nn.Sequential(layer), last=BinaryLinear(4, 4)))
    before = list(model.modules())
    with pytest.raises(ValueError, match=rf"cannot pack body\.0: [^\n]*{why}[^\n]*$"):
        pack(model)
    with pytest.raises(ValueError, match=why):
        layer.pack()
    assert list(model.modules()) == before
    kept = pack(model, filter=lambda name, m: m.pack_obstacle() is None)
    assert type(kept["body"][0]) is type(layer) and type(kept["last"]) is PackedLinear


def test_a_patched_instance_is_refused(layer_and_input):
    layer, x = layer_and_input
    old = layer.forward
    layer.forward = lambda input: -old(input)
    with pytest.raises(ValueError, match="cannot pack 0: its forward is replaced on the instance"):
        pack(nn.Sequential(layer))
    del layer.forward
    assert torch.equal(layer.pack()(x), layer(x))


def test_accelerate_hooks_are_refused(layer_and_input):
    hooks = pytest.importorskip("accelerate.hooks")
    layer, x = layer_and_input
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    with pytest.raises(ValueError, match="remove_hook_from_module"):
        pack(nn.Sequential(layer))
    hooks.remove_hook_from_module(layer)
    assert torch.equal(layer.pack()(x), layer(x))


def test_compiled_layers_and_models_pack():
    layer, x = BinaryConv2d(33, 8, 3).eval(), reals(2, 33, 5, 6)
    expected = layer(x)
    layer.compile(backend="eager")
    model = nn.Sequential(layer)
    model.compile(backend="eager")
    assert torch.equal(model(x), expected)
    for packed in (pack(model), pack(torch.compile(nn.Sequential(layer), backend="eager")),
                   pack(nn.Sequential(torch.compile(layer, backend="eager")))):
        assert torch.equal(packed(x), expected) and packed._compiled_call_impl is None
        kinds = [type(m) for m in packed.modules()]
        assert PackedConv2d in kinds and BinaryConv2d not in kinds
    torch._dynamo.reset()


# Hooks


def test_forward_hooks_go_with_the_layer(layer_and_input):
    layer, x = layer_and_input
    calls = []
    layer.register_forward_pre_hook(lambda m, args: (calls.append(("pre", m)), (-args[0],))[1])
    layer.register_forward_pre_hook(lambda m, args, kwargs: calls.append(("pre kwargs", m)),
                                    with_kwargs=True)
    layer.register_forward_hook(lambda m, args, out: 2 * out)
    layer.register_forward_hook(
        lambda m, args, kwargs, out: (calls.append(("kwargs", m)), out + 1)[1], with_kwargs=True)
    layer.register_forward_hook(lambda m, args, out: calls.append(("always", m)), always_call=True)
    model = nn.Sequential(layer)
    expected = model(x)
    del calls[:]
    for packed in (pack(model), nn.Sequential(layer.pack())):
        assert torch.equal(packed(x), expected)
        names = [name for name, _ in calls]
        assert names == ["pre", "pre kwargs", "kwargs", "always"]
        assert all(m is packed[0] for _, m in calls)
        with pytest.raises(RuntimeError):
            packed(reals(2, 3))
        assert [name for name, _ in calls[4:]] == ["pre", "pre kwargs", "always"]
        del calls[:]
    assert torch.equal(copy.deepcopy(pack(model))(x), expected)


def test_a_hook_that_is_a_method_of_the_model_belongs_to_the_copy():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = BinaryLinear(33, 8), []
            self.layer.register_forward_hook(self.record)

        def record(self, module, args, out):
            self.seen.append(module)

        def forward(self, x):
            return self.layer(x)

    model = Recorder()
    packed = pack(model)
    packed(reals(2, 33))
    assert not model.seen and packed.seen == [packed.layer]
    assert not any(isinstance(m, BinaryLayer) for m in packed.modules())


def test_hooks_without_a_meaning_are_reported(layer_and_input):
    layer, x = layer_and_input
    layer.register_full_backward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="0: pack.. leaves out its backward hooks") as said:
        packed = pack(nn.Sequential(layer))
    assert torch.equal(packed(x), layer(x)) and len(said) == 1
    other = BinaryLinear(4, 4)
    other.register_full_backward_pre_hook(lambda *_: None)
    other.register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="backward hooks and state_dict hooks"):
        other.pack()


# The weight of now


def parametrized(layer, parametrization=None):
    parametrize.register_parametrization(layer, "weight", parametrization or Centre())
    return layer


class Centre(nn.Module):
    def forward(self, w):
        return w - w.mean()


def masked(layer):
    prune.random_unstructured(layer, "weight", 0.3)
    prune.l1_unstructured(layer, "weight", 0.3)  # a PruningContainer
    prune.random_unstructured(layer, "bias", 0.5)
    return layer


def removed(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return prune.remove(layer, "weight")


REPARAMETRIZED = {
    "prune.identity": lambda m: prune.identity(m, "weight"), "prune": masked,
    "prune.remove": removed,
    "weight_norm": lambda m: torch.nn.utils.weight_norm(m),
    "spectral_norm": lambda m: torch.nn.utils.spectral_norm(m),
    "parametrize": parametrized,
    "parametrizations.weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "parametrizations.spectral_norm": torch.nn.utils.parametrizations.spectral_norm}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("how", REPARAMETRIZED)
@pytest.mark.parametrize("training", [False, True])
def test_the_weight_of_now_is_packed(layer_and_input, how, training):
    layer, x = layer_and_input
    make, _ = LAYERS[type(layer)]
    layer = REPARAMETRIZED[how](layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(reals(*parameter.shape) + 0.01)
    layer.train(training)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    weight = layer.__dict__.get("weight")
    packed = pack(nn.Sequential(layer)).eval()
    binary = layer.binary_weight(scaled=True)
    assert layer.__dict__.get("weight") is weight
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer.training is training and all(m.training is training for m in layer.modules())
    assert torch.equal(packed(x), layer.eval()(x))
    assert not packed[0]._forward_pre_hooks
    assert torch.equal(packed[0].binary_weight(scaled=True), binary)
    # Loaded and not yet called: the attribute is that of before.
    other = REPARAMETRIZED[how](make(weight_scale="magnitude_aware")).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.pack()(x), packed(x))


@pytest.mark.parametrize("how", ["prune", "prune.remove", "mask", "parametrize"])
def test_zeros_are_reported_once_at_the_first_forward_and_at_pack(layer_and_input, how):
    layer, x = layer_and_input
    layer.weight.data = layer.weight.data + 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    if how == "prune":
        prune.random_unstructured(layer, "weight", 0.5)
    elif how == "prune.remove":
        removed(layer)
    elif how == "mask":
        layer.weight = nn.Parameter(layer.weight * (torch.rand_like(layer.weight) < 0.5))
    else:
        layer = parametrized(type(layer)(*SIZES[type(layer)]), nn.ReLU())
    with pytest.warns(UserWarning, match=r"% of the weights are 0 .*count as \+1"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    with pytest.warns(UserWarning, match=r"^0\.conv: \d+% of the weights are 0"):
        pack(nn.Sequential(nn.ModuleDict(dict(conv=layer))))


def test_layers_that_know_0_are_not_warned_of_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = BinaryLinear(33, 8, weight_quantizer="ste_tern")
        prune.random_unstructured(layer, "weight", 0.5)
        layer(reals(2, 33))
        layer = BinaryConv3d(4, 4, 1)
        prune.identity(layer, "weight")
        layer(reals(1, 4, 2, 2, 2))
    layer = BinaryConv3d(4, 4, 1, input_quantizer=quantizers.NoOp(precision=32))
    prune.random_unstructured(layer, "weight", 0.5)
    with pytest.warns(UserWarning, match="BinaryConv3d: 50% of the weights"):
        layer(reals(1, 4, 2, 2, 2))


# Folding a norm, reading the weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_a_norm_is_not_folded_into_latent_weights(dims, bias):
    layer = (BinaryLinear(9, 8, bias=bias) if dims == 0 else
             (BinaryConv1d, BinaryConv2d, BinaryConv3d)[dims - 1](9, 8, 1, bias=bias))
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](8)
    x = reals(6, 9, *dims * [4])
    norm(layer(x))
    layer.eval(), norm.eval()
    before = layer.weight
    fuse = (torch.nn.utils.fuse_linear_bn_eval if dims == 0 else torch.nn.utils.fuse_conv_bn_eval)
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: .*fuse_conv_bn_eval"):
        fuse(layer, norm)
    assert layer.weight is before
    if dims in (1, 2):
        other = (BinaryConvTranspose1d, BinaryConvTranspose2d)[dims - 1](9, 8, 1, bias=bias).eval()
        with pytest.raises(ValueError, match="BinaryConvTranspose.*fuse_conv_bn_eval"):
            fuse(other, norm, transpose=True)
    layer.weight = nn.Parameter(torch.randn_like(before))  # any other weight may be set
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}, assign=True)
    layer.train().weight = nn.Parameter(2 * layer.weight.detach())


@pytest.mark.parametrize("make", [
    lambda: BinaryLinear(1, 8), lambda: BinaryLinear(8, 1), lambda: BinaryConv2d(1, 8, 1),
    lambda: BinaryConv2d(8, 8, 1, groups=8), lambda: BinaryConvTranspose2d(8, 1, 1),
    lambda: BinaryLinear(1, 1)])
def test_other_weights_of_one_a_channel_are_no_folded_norm(make):
    layer = make().eval()
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    layer.load_state_dict(make().state_dict(), assign=True)


def test_tools_that_fuse_by_class_leave_binary_layers():
    model, x = nn.Sequential(BinaryConv2d(9, 8, 3), nn.BatchNorm2d(8)), reals(6, 9, 5, 5)
    model(x)
    fused = torch.fx.experimental.optimization.fuse(model.eval())
    assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", [
    {}, dict(weight_quantizer=None), dict(weight_quantizer="swish_sign", weight_scale="xnor"),
    dict(weight_quantizer="magnitude_aware_sign")], ids=str)
def test_binary_weight(layer_and_input, options, scaled):
    layer, _ = layer_and_input
    make, _ = LAYERS[type(layer)]
    layer = make(**options)
    with torch.no_grad():
        layer.weight.copy_(reals(*layer.weight.shape))
    found = layer.binary_weight(scaled)
    expected = signed(layer.weight)
    if scaled and layer.scale() is not None:
        expected = expected * layer._factor(layer.scale().detach())
    assert torch.equal(found, expected) and not found.requires_grad
    twin = layer.pack()
    assert torch.equal(twin.binary_weight(scaled), found)
    assert torch.equal(twin.binary_weight(scaled=scaled), expected)
    assert layer.double().binary_weight(scaled).dtype == torch.float64
    assert torch.equal(layer.signs_of_weight(), signed(layer.weight))
    assert layer.half().binary_weight().dtype == torch.float16


def test_binary_weight_of_groups_and_other_dimensions():
    layer = BinaryConv2d(66, 8, (3, 2), groups=2)
    assert torch.equal(layer.binary_weight(), signed(layer.weight))
    assert torch.equal(layer.pack().binary_weight(), signed(layer.weight))
    solid = BinaryConv3d(4, 4, 2)
    assert torch.equal(solid.binary_weight(), signed(solid.weight))
    centred = BinaryLinear(9, 4, weight_quantizer=Centred())
    assert torch.equal(centred.binary_weight(), signed(centred.weight - centred.weight.mean()))
    assert torch.equal(centred.pack().binary_weight(), centred.binary_weight())
    for quantizer in ("ste_tern", "dorefa_quantizer", quantizers.NoOp(precision=32)):
        with pytest.raises(ValueError, match="BinaryLinear.*weight_quantizer=.*does not return"):
            BinaryLinear(4, 4, weight_quantizer=quantizer).binary_weight()


class Centred(nn.Module):
    precision = 1

    def forward(self, x):
        return signed(x - x.mean())


def test_a_quantizer_is_copied_with_its_layer():
    quantizer = Centred()
    model = nn.ModuleDict(dict(a=BinaryLinear(4, 4, input_quantizer=quantizer), q=quantizer,
                               b=BinaryConv1d(4, 4, 1, input_quantizer=quantizer))).train()
    packed = pack(model)
    assert quantizer.training and packed["q"] is not quantizer
    assert packed["a"].input_quantizer is packed["b"].input_quantizer is packed["q"]
    assert model["a"].pack().input_quantizer is not quantizer


# Inputs with a gradient, parents


def test_an_input_that_requires_grad_is_refused_at_the_layer(layer_and_input):
    layer, x = layer_and_input
    packed, expected = pack(nn.Sequential(layer)), layer(x).detach()
    with pytest.raises(RuntimeError, match=r"Packed\w+: the input must not require grad.*detach"):
        packed(x.requires_grad_())
    with pytest.raises(RuntimeError, match="must not require grad"):
        packed(2 * x)
    assert torch.equal(packed(x.detach()), expected)
    with torch.no_grad():
        assert torch.equal(packed(x), expected)
