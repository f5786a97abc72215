"""Binary transposed convolution layers and their packed twins, against torch's on signs."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from bitkernels import quantizers
from bitkernels.nn import (
    BinaryConvTranspose1d,
    BinaryConvTranspose2d,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
    binarize,
    pack,
)
from bitkernels_tests import oracles
from bitkernels_tests.cases import reals, signed
from bitkernels_tests.nn import test_conv
from bitkernels_tests.nn.test_conv import SCALES, Centred

LAYERS = {1: (BinaryConvTranspose1d, nn.ConvTranspose1d, F.conv_transpose1d),
          2: (BinaryConvTranspose2d, nn.ConvTranspose2d, F.conv_transpose2d)}
layer_of = functools.partial(test_conv.layer_of, layers=LAYERS)
TWINS = {1: PackedConvTranspose1d, 2: PackedConvTranspose2d}
SIZE = (5, 6)
GEOMETRIES = (
    dict(kernel_size=3), dict(kernel_size=2, stride=2, bias=False),
    dict(kernel_size=4, stride=2, padding=1), dict(kernel_size=3, stride=2, padding=1, groups=2,
                                                   output_padding=1),
    dict(kernel_size=2, stride=3, output_padding=2, groups=3), dict(kernel_size=1, stride=2),
    dict(kernel_size=3, stride=4, padding=2, dilation=2, output_padding=3, groups=12),
    dict(kernel_size=3, dilation=3, padding=1, output_padding=2),
)

# Tensors too small for threads, which would cost more than all the rest.
pytestmark = pytest.mark.usefixtures("one_thread")


def emulate(layer, x, weight, bias):
    """PyTorch's function on an already quantized input and weight."""
    return LAYERS[len(layer.kernel_size)][2](
        x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups,
        layer.dilation)


def alpha(layer, weight):
    """Mean |w| of each output channel, by a loop over what makes it: (Cout,)."""
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return torch.stack([
        weight[o // outs * ins : (o // outs + 1) * ins, o % outs].abs().mean()
        for o in range(layer.out_channels)])


def spread(layer, factor):
    """(Cout,) over the weight's shape."""
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    rows = torch.stack([factor[i // ins * outs : (i // ins + 1) * outs]
                        for i in range(layer.in_channels)])
    return rows.view(*rows.shape, *[1] * len(layer.kernel_size))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_forward_is_the_transposed_convolution_of_signs(dims, options, device):
    layer = layer_of(dims, device=device, **options)
    for shape in ((2, 36, *SIZE[:dims]), (36, *SIZE[:dims]), (0, 36, *SIZE[:dims])):
        x = reals(*shape, device=device)
        assert torch.equal(layer(x), emulate(layer, signed(x), signed(layer.weight), layer.bias))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_gradients(dims, options, scale, device):
    """Of input, weight and bias, with each scale rule, against autograd in float64."""
    layer = layer_of(dims, device=device, weight_scale=scale, **options)
    x = reals(2, 36, *SIZE[:dims], device=device)
    ours = x.clone().requires_grad_()
    y = layer(ours)
    grad = reals(*y.shape, device=device)
    y.backward(grad)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    weight = oracles.sign(w64)
    if scale is not None:
        factor = alpha(layer, w64.clamp(-1, 1) if scale == "xnor" else w64)
        factor = spread(layer, factor if scale == "xnor" else factor.detach())
        weight = (weight + (weight * factor - weight).detach() if scale == "detached"
                  else weight * factor)
    expected = emulate(layer, oracles.sign(x64), weight, bias)
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.grad.double(), x64.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.weight.grad.double(), w64.grad, rtol=1e-4, atol=1e-3)
    if bias is not None:
        torch.testing.assert_close(layer.bias.grad.double(), bias.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_scale_is_the_mean_magnitude_of_each_output_channel(dims, options):
    layer = layer_of(dims, weight_scale="detached", **options)
    torch.testing.assert_close(layer.scale(), alpha(layer, layer.weight.detach()))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_packed_equals_its_layer(dims, options, scale, device):
    layer = layer_of(dims, device=device, weight_scale=scale, **options).eval()
    twin = layer.pack()
    assert type(twin) is TWINS[dims] and not twin.training
    kernel = (1, *layer.kernel_size)[-2:]
    assert twin.weight_words.shape == (12, *kernel, -(-36 // layer.groups // 32))
    for shape in ((2, 36, *SIZE[:dims]), (36, *SIZE[:dims]), (0, 36, *SIZE[:dims])):
        x = reals(*shape, device=device)
        y, expected = twin(x), layer(x)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
    assert not any(True for _ in twin.parameters())


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("groups", [1, 3])
def test_binary_weight_has_the_layout_of_the_weight(dims, scale, groups):
    layer = layer_of(dims, kernel_size=3, stride=2, groups=groups, weight_scale=scale)
    twin, signs = layer.pack(), signed(layer.weight.detach())
    for module in (layer, twin):
        assert torch.equal(module.binary_weight(), signs)
    scaled = signs if scale is None else signs * spread(layer, layer.scale().detach())
    for module in (layer, twin):
        torch.testing.assert_close(module.binary_weight(scaled=True), scaled, rtol=0, atol=0)


@pytest.mark.parametrize("dims", [1, 2])
def test_output_size(dims):
    """As torch's: the sizes that a strided convolution would have come from."""
    real = LAYERS[dims][1](36, 12, 3, stride=3, padding=1)
    layer = layer_of(dims, kernel_size=3, stride=3, padding=1)
    twin, x = layer.pack(), reals(2, 36, *SIZE[:dims])
    for extra in (0, 1, 2):
        size = [s + extra for s in layer(x).shape[2:]]
        for wanted in (size, [2, 12, *size]):
            y = layer(x, output_size=wanted)
            assert list(y.shape[2:]) == size and torch.equal(y, twin(x, output_size=wanted))
            assert y.shape == real(x, output_size=wanted).shape
    for module in (layer, twin, real):
        with pytest.raises(ValueError, match="requested an output size"):
            module(x, output_size=[s + 3 for s in layer(x).shape[2:]])


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("input_quantizer, weight_quantizer", [
    ("dorefa_quantizer", "ste_sign"), ("ste_sign", "ste_tern"),
    (quantizers.NoOp(precision=32), "ste_sign"), ("ste_heaviside", "ste_sign")])
def test_other_quantizers_compute_on_reals(dims, input_quantizer, weight_quantizer):
    layer = layer_of(dims, kernel_size=3, stride=2, groups=2, input_quantizer=input_quantizer,
                     weight_quantizer=weight_quantizer)
    assert not layer.on_bits and "do not both return" in layer.pack_obstacle()
    x = reals(2, 36, *SIZE[:dims])
    expected = emulate(layer, layer.input_quantizer(x), layer.weight_quantizer(layer.weight),
                       layer.bias)
    assert torch.equal(layer(x), expected)
    with pytest.raises(ValueError, match="cannot be packed"):
        layer.pack()


@pytest.mark.parametrize("scale", ["detached", "xnor"])
def test_real_inputs_with_a_scale(scale):
    """The scale of a layer that computes on reals is spread over the groups too."""
    layer = layer_of(2, kernel_size=3, stride=2, groups=3, weight_scale=scale,
                     input_quantizer=quantizers.NoOp(precision=32))
    x = reals(2, 36, *SIZE)
    weight = layer.weight.detach()
    factor = alpha(layer, weight.clamp(-1, 1) if scale == "xnor" else weight)
    torch.testing.assert_close(
        layer(x), emulate(layer, x, signed(weight) * spread(layer, factor), layer.bias))


@pytest.mark.parametrize("options", [
    dict(input_quantizer=None, weight_quantizer=None), dict(input_quantizer="swish_sign"),
    dict(weight_quantizer="magnitude_aware_sign"),
    dict(input_quantizer=Centred(), weight_quantizer=Centred(), weight_scale="xnor")], ids=str)
def test_quantizers(options):
    x = reals(2, 36, *SIZE)
    layer = layer_of(2, kernel_size=3, stride=2, groups=2, **options)
    with torch.no_grad():
        assert torch.equal(layer.pack()(x), layer(x))


@pytest.mark.parametrize("dims", [1, 2])
def test_constructor_and_state_dict_are_those_of_torch(dims):
    cls, torch_class, _ = LAYERS[dims]
    args = (8, 6, 3, 2, 1, 1, 2, True, 1, "zeros")
    real, layer = torch_class(*args), cls(*args)
    assert layer.extra_repr().startswith(real.extra_repr())
    layer.load_state_dict(real.state_dict())
    real.load_state_dict(layer.state_dict())
    x = reals(2, 8, *SIZE[:dims])
    assert torch.equal(layer(x), emulate(layer, signed(x), signed(real.weight), real.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_autocast(dtype):
    layer = layer_of(2, dtype=dtype, kernel_size=3, stride=2, weight_scale="detached")
    twin, x = layer.pack(), reals(2, 36, *SIZE, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and twin(x).dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(y, twin(x))
    y.float().sum().backward()
    assert layer.weight.grad.dtype == dtype
    layer = layer_of(2, kernel_size=3, stride=2)
    with torch.autocast("cpu", torch.bfloat16):
        y, packed = layer(x.float()), layer.pack()(x.float())
    assert y.dtype == packed.dtype == torch.bfloat16 and torch.equal(y, packed)


def test_channels_last_and_slices():
    layer = layer_of(2, kernel_size=3, stride=2)
    x = reals(2, 36, *SIZE)
    last = x.contiguous(memory_format=torch.channels_last)
    for module in (layer, layer.pack()):
        y = module(last)
        assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y, module(x))
        wide = reals(2, 72, 5, 12)[:, ::2, :, ::2]
        assert torch.equal(module(wide), module(wide.contiguous()))


def test_copies():
    layer = layer_of(2, kernel_size=3, stride=2, weight_scale="xnor", groups=2)
    twin, x = layer.pack(), reals(2, 36, *SIZE)
    expected = layer(x)
    for module in (layer, twin):
        stream = io.BytesIO()
        torch.save(module.state_dict(), stream)
        stream.seek(0)
        if module is layer:
            empty = layer_of(2, kernel_size=3, stride=2, weight_scale="xnor", groups=2)
        else:
            empty = PackedConvTranspose2d(36, 12, 3, stride=2, groups=2, scale=True)
        empty(x)  # filters of the phases are derived, then the state changes
        empty.load_state_dict(torch.load(stream, weights_only=True))
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), empty):
            assert torch.equal(copied(x), expected) and repr(copied) == repr(module)


def test_filters_of_the_phases_follow_the_words():
    layer, other = (layer_of(2, kernel_size=3, stride=2) for _ in range(2))
    twin, x = layer.pack(), reals(2, 36, *SIZE)
    assert torch.equal(twin(x), layer(x))
    twin.state_dict()["weight_words"].copy_(other.pack().weight_words)
    twin.bias.copy_(other.pack().bias)
    assert torch.equal(twin(x), other(x))
    state = layer.pack().state_dict()
    assert torch.equal(torch.func.functional_call(twin, state, x), layer(x))
    assert torch.equal(twin.to(memory_format=torch.channels_last)(x), other(x))
    assert set(state) == {"weight_words", "bias"}


def test_meta_device():
    layer = BinaryConvTranspose2d(36, 12, 3, 2, device="meta", weight_scale="detached")
    x = torch.empty(2, 36, 5, 6, device="meta")
    assert layer(x).shape == layer.pack()(x).shape == (2, 12, 11, 13)


@pytest.mark.parametrize("dims", [1, 2])
def test_wrong_options(dims):
    cls, twin = LAYERS[dims][0], TWINS[dims]
    for options, message in ((dict(input_quantizer="sign"), "unknown quantizer"),
                             (dict(weight_scale="mean"), "weight_scale must be one of")):
        with pytest.raises(ValueError, match=message):
            cls(36, 12, 3, **options)
    for module in (cls, twin):
        with pytest.raises(ValueError, match="divisible by groups"):
            module(36, 12, 3, groups=5)
        with pytest.raises(ValueError, match="padding_mode must be 'zeros', got"):
            module(36, 12, 3, padding_mode="reflect")


def test_wrong_input():
    layer = layer_of(2, kernel_size=3, stride=2)
    for shape in ((2, 35, 5, 5), (36, 5), (2, 36, 0, 5), (1, 2, 36, 5, 5)):
        with pytest.raises(RuntimeError, match="binary_conv_transpose2d: input must be"):
            layer(torch.randn(shape))
    for shape in ((2, 35, 5, 5), (36, 5), (1, 2, 36, 5, 5)):
        with pytest.raises(RuntimeError, match="PackedConvTranspose2d: input must be"):
            layer.pack()(torch.randn(shape))
    with pytest.raises(RuntimeError, match="packed_conv_transpose2d: input must be at least 1 x 1"):
        layer.pack()(torch.randn(2, 36, 0, 5))
    flat = layer_of(1, kernel_size=3, stride=2)
    for shape in ((2, 36, 5, 5), (35, 5), (5,)):
        with pytest.raises(RuntimeError, match="BinaryConvTranspose1d: input must be"):
            flat(torch.randn(shape))
        with pytest.raises(RuntimeError, match="PackedConvTranspose1d: input must be"):
            flat.pack()(torch.randn(shape))


def decoder():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8), nn.ConvTranspose2d(8, 8, 2, 2), nn.PReLU(8),
        nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2), nn.PReLU(6), nn.Conv2d(6, 3, 3, padding=1))


@pytest.mark.parametrize("options", [{}, dict(pad_value=1), dict(weight_scale="xnor")], ids=str)
def test_binarize_and_pack_a_decoder(options):
    """Transposed layers become binary with the others; pad_value does not concern them."""
    model = decoder()
    weight = model[2].weight
    binary = binarize(model, **options)
    assert type(binary[2]) is type(binary[4]) is BinaryConvTranspose2d
    assert binary[2].weight is weight and type(binary[6]) is nn.Conv2d
    x = reals(2, 3, 6, 5)
    y = binary(x)
    y.sum().backward()
    assert y.shape == (2, 3, 24, 20) and weight.grad.abs().sum() > 0
    packed = pack(binary.eval())
    assert type(packed[2]) is PackedConvTranspose2d
    with torch.no_grad():
        assert torch.equal(packed(x), binary(x))


def test_a_transposed_layer_may_be_the_first_or_last():
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.ConvTranspose1d(4, 6, 3),
                          nn.ConvTranspose1d(6, 4, 3))
    classes = [type(m) for m in binarize(model)]
    assert classes == [nn.ConvTranspose1d, BinaryConvTranspose1d, nn.ConvTranspose1d]
    volume = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 3), nn.ConvTranspose3d(4, 2, 3))
    assert [type(m).__name__ for m in binarize(volume)] == ["Conv3d", "BinaryConv3d",
                                                            "ConvTranspose3d"]


@pytest.mark.parametrize("dims", [1, 2])
def test_compiles_once_for_all_batches(dims):
    torch._dynamo.reset()
    layer = layer_of(dims, kernel_size=3, stride=2, padding=1, weight_scale="detached")
    twin = layer.pack()
    for module in (layer, twin):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for batch in (2, 3, 5):
            x = reals(batch, 36, *SIZE[:dims])
            torch._dynamo.mark_dynamic(x, 0)
            assert torch.equal(compiled(x), layer(x))
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_exports():
    layer = layer_of(2, kernel_size=4, stride=2, padding=1)
    batch = torch.export.Dim("batch")
    x = reals(3, 36, *SIZE)
    with torch.no_grad():
        for module in (layer, layer.pack()):
            program = torch.export.export(module, (reals(2, 36, *SIZE),),
                                          dynamic_shapes=({0: batch},))
            assert torch.equal(program.module()(x), layer(x))
