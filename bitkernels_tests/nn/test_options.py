"""A layer's options as one object: decided once, swapped whole, with all that hangs on them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from bitkernels import nn as bnn
from bitkernels import quantizers
from bitkernels.nn import BinaryConv2d, BinaryConv3d, BinaryLinear, NormSign, RSign
from bitkernels.nn.options import Binarization
from bitkernels.quantizers import NoOp
from bitkernels_tests.cases import reals

pytestmark = pytest.mark.usefixtures("one_thread")


class Learned(nn.Module):
    """A sign with a parameter and a running statistic."""

    precision = 1

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return torch.where(x < 0, -1.0, 1.0) * self.gain


ops = torch.ops.bitkernels


@pytest.mark.parametrize("options, estimators", [
    (("ste_sign", "ste_sign", None), {}),
    (("ste_sign", "ste_sign", "detached"), dict(scale_weight_grad=False)),
    (("approx_sign", "ste_sign", "xnor"), dict(input_estimator="approx_sign", input_clip=None)),
    ((None, quantizers.SwishSign(3.0), None),
     dict(input_estimator="identity", input_clip=None, weight_estimator="swish_sign",
          weight_clip=None, beta=3.0)),
    (("ste_sign", quantizers.MagnitudeAwareSign(0.5), None), dict(weight_clip=0.5)),
    ((Learned(), "ste_sign", None), dict(input_estimator="identity", input_clip=None)),
    ((torch.tanh, "ste_sign", None), {}), (("ste_sign", "ste_tern", None), {})])
def test_what_the_operator_gets(options, estimators):
    assert Binarization(*options).estimators == estimators


def test_what_is_decided():
    own = Binarization(Learned(), quantizers.MagnitudeAwareSign(0.5))
    assert own.input_is_sign and own.input_first and own.weight_is_sign and not own.weight_first
    assert own.scale_rule == "magnitude_aware" and own.weight_scale is None
    assert own.unscaled_sign.clip_value == 0.5
    real = Binarization("dorefa_quantizer", "ste_sign", "xnor")
    assert not real.input_is_sign and real.weight_is_sign and real.unscaled_sign is None
    betas = Binarization(quantizers.SwishSign(2.0), quantizers.SwishSign(3.0))
    assert betas.weight_first and not betas.input_first and betas.estimators["beta"] == 2.0
    with pytest.raises(AttributeError):
        own.weight_scale = "xnor"
    with pytest.raises(ValueError, match="weight_quantizer: unknown quantizer 'sign'"):
        Binarization(None, "sign")


def test_swapped_whole():
    layer, x = BinaryConv2d(36, 8, 3), reals(2, 36, 5, 5)
    other = BinaryConv2d(36, 8, 3, input_quantizer=NormSign(36, 2), weight_scale="xnor")
    other.load_state_dict(layer.state_dict(), strict=False)
    assert not list(layer.children()) or "input_quantizer.norm.weight" not in layer.state_dict()
    layer.binarization = other.binarization
    assert layer.input_quantizer is other.input_quantizer and layer.weight_scale == "xnor"
    assert set(layer.state_dict()) == set(other.state_dict())
    assert torch.equal(layer.eval()(x), other.eval()(x))
    layer.binarization = Binarization(torch.sign, None)
    assert set(layer.state_dict()) == {"weight", "bias"} and layer.input_quantizer is torch.sign
    with pytest.raises(TypeError, match="binarization must be a Binarization, got 'ste_sign'"):
        layer.binarization = "ste_sign"
    assert layer.input_quantizer is torch.sign


def test_a_refused_option_leaves_the_old_ones():
    layer = BinaryConv2d(8, 8, 3, input_quantizer=Learned(), weight_scale="xnor")
    before = layer.binarization
    for name, value, text in (("weight_scale", "mean", "BinaryConv2d: weight_scale must be one of"),
                              ("weight_quantizer", "ste_tern", "needs a weight quantizer"),
                              ("input_quantizer", 3, "BinaryConv2d: input_quantizer: unknown")):
        with pytest.raises(ValueError, match=text):
            setattr(layer, name, value)
    assert layer.binarization is before
    assert set(layer.state_dict()) == {"weight", "bias", "input_quantizer.gain",
                                       "input_quantizer.calls"}


def test_quantizers_are_submodules():
    layer = BinaryLinear(8, 4, input_quantizer=Learned(), weight_quantizer=Learned())
    assert {name for name, _ in layer.named_parameters()} == {
        "weight", "bias", "input_quantizer.gain", "weight_quantizer.gain"}
    layer.to(torch.float64)
    assert layer.input_quantizer.gain.dtype == torch.float64
    layer(reals(3, 8).double()).sum().backward()
    copied = copy.deepcopy(layer)
    assert copied.binarization.input_quantizer is copied.input_quantizer
    assert copied.input_quantizer is not layer.input_quantizer
    assert pickle.loads(pickle.dumps(layer)).input_quantizer.gain.dtype == torch.float64
    layer.input_quantizer = "ste_sign"
    assert "input_quantizer.gain" not in dict(layer.named_parameters())


def test_a_module_put_in_place_of_a_quantizer_is_called():
    """As tools do that wrap submodules."""
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    layer, x = BinaryConv2d(8, 8, 3, input_quantizer=Learned()), reals(1, 8, 5, 5)
    expected = layer(x)
    layer._modules["input_quantizer"] = wrapped = Wrapped(layer.input_quantizer)
    assert torch.equal(layer(x), expected) and wrapped.calls == 1
    assert layer.input_quantizer is wrapped
    layer.weight_scale = "detached"
    assert layer.input_quantizer is layer.binarization.input_quantizer is not None


def test_replicas_have_options_of_their_own():
    layer, other = BinaryConv2d(8, 8, 3, input_quantizer=Learned()), Learned()
    own, replica = layer.input_quantizer, layer._replicate_for_data_parallel()
    replica.input_quantizer = other  # as torch.nn.parallel.replicate assigns a replica's children
    assert replica.input_quantizer is replica.binarization.input_quantizer is other
    assert layer.input_quantizer is layer.binarization.input_quantizer is own


def test_operator_arguments_reach_the_operator():
    layer = BinaryConv2d(36, 8, 3, padding=1, pad_value=-1, bias=False, weight_scale="xnor",
                         input_quantizer="approx_sign")
    arguments = layer.operator_arguments()
    assert set(arguments) == {"input_estimator", "input_clip", "scale", "pad_value"}
    x = reals(2, 36, 5, 5)
    assert torch.equal(ops.binary_conv2d(x, layer.weight_to_sign(), None, 1, 1, **arguments),
                       layer(x))
    arguments.clear()
    assert layer.operator_arguments()["pad_value"] == -1
    sign = RSign(36, quantizers.SwishSign(2.0))
    assert sign.operator_arguments() == dict(estimator="swish_sign", clip=None, beta=2.0)
    assert torch.equal(ops.rsign(x, sign.shift, **sign.operator_arguments()), sign(x))


@pytest.mark.parametrize("options", [
    dict(input_quantizer=NormSign(8, 2), weight_scale="xnor"),
    dict(weight_quantizer="magnitude_aware_sign"), dict(input_quantizer=torch.sign),
    dict(input_quantizer="dorefa_quantizer", weight_quantizer=Learned())],
    ids=["norm_sign", "magnitude_aware", "function", "real"])
def test_layers_pickled_before_there_was_one(options):
    layer, x = BinaryConv2d(8, 4, 3, **options).eval(), reals(2, 8, 5, 5)
    old = copy.deepcopy(layer)
    state = old.__dict__
    own = state.pop("binarization")
    state.pop("_looked")
    state.update(on_bits=layer.on_bits, _scale_rule=own.scale_rule, _train_args=own.estimators,
                 _unscaled_sign=own.unscaled_sign, _unseen_weight=True, _input_seen=True,
                 weight_scale=own.weight_scale)
    for name in ("input_quantizer", "weight_quantizer"):
        if name not in old._modules:
            state[name] = getattr(own, name)
    loaded = pickle.loads(pickle.dumps(old))
    assert torch.equal(loaded(x), layer(x)) and repr(loaded) == repr(layer)
    assert list(loaded.state_dict()) == list(layer.state_dict())
    assert set(vars(loaded)) == set(vars(layer))


def test_graphs_know_the_quantizers_by_their_names():
    layer, x = BinaryConv2d(8, 4, 3, input_quantizer=NormSign(8, 2),
                            weight_quantizer=Learned()).eval(), reals(2, 8, 5, 5)
    expected = layer(x)
    program = torch.export.export(layer, (x,), strict=True)
    assert set(program.state_dict) == set(layer.state_dict())
    assert torch.equal(program.module()(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    layer.input_quantizer = "ste_sign"
    assert torch.equal(compiled(x), layer(x)) and not torch.equal(layer(x), expected)


def test_three_dimensions_are_real():
    layer = BinaryConv3d(4, 4, 1)
    assert layer.binarization.input_is_sign and not layer.on_bits


LATER = {
    "dilated": dict(dilation=(2, 2), padding=(2, 2)),
    "narrower": dict(padding=(0, 1)),
    "integers": dict(stride=2, padding=2, dilation=1),
    "same": dict(padding="same", dilation=2),
}


@pytest.mark.parametrize("geometry", LATER)
@pytest.mark.parametrize("options", [
    {}, dict(pad_value=1), dict(padding_mode="circular"),
    dict(pad_value=-1, input_quantizer=NoOp(32)), dict(weight_quantizer="ste_tern")])
def test_geometry_can_be_assigned(geometry, options):
    """As code does that dilates a network after it was made."""
    x = torch.randn(2, 8, 9, 9)
    new = bnn.BinaryConv2d(8, 8, 3, **LATER[geometry], **options)
    layer = bnn.BinaryConv2d(8, 8, 3, padding=1, **options)
    layer.load_state_dict(new.state_dict())
    for name, value in LATER[geometry].items():
        setattr(layer, name, value)
    assert torch.equal(layer(x), new(x)) and layer.padding == new.padding
    if layer.pack_obstacle() is None:
        with torch.no_grad():
            assert torch.equal(bnn.pack(layer)(x), new(x))


@pytest.mark.parametrize("geometry", LATER)
def test_geometry_of_a_block_can_be_assigned(geometry):
    conv = bnn.BinaryConv2d(8, 8, 3, padding=1, bias=False)
    block = bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(8), shortcut=bnn.NoShortcut())
    x = torch.randn(2, 8, 9, 9)
    for name, value in LATER[geometry].items():
        setattr(conv, name, value)
    for training in (True, False):
        assert block.train(training).unfused(x.detach()) is None or not training
        with torch.no_grad():
            block.fused = True
            found = block(x)
            block.fused = False
            torch.testing.assert_close(found, block(x))


def test_wrong_geometry_that_is_assigned():
    layer = bnn.BinaryConv2d(8, 8, 3, padding=1)
    with pytest.raises(ValueError, match="pad_value must be -1, 0 or 1, got 5"):
        layer.pad_value = 5
    layer.pad_value = 1
    with pytest.raises(ValueError, match="pad_value=1 needs padding_mode='zeros', got 'reflect'"):
        layer.padding_mode = "reflect"
    layer.padding, layer.stride = "same", 2
    with pytest.raises(ValueError, match=r"padding='same' needs stride=1, got \(2, 2\)"):
        layer.pads_of((9, 9))
    assert bnn.BinaryConv1d(8, 8, 3).stride == (1,)
    deconv = bnn.BinaryConvTranspose1d(8, 8, 3)
    deconv.stride = deconv.output_padding = 2
    assert deconv.stride == deconv.output_padding == (2,)
