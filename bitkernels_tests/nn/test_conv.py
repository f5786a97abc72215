"""Binary convolution layers: forward exactly torch's of the signs, gradients against autograd."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from bitkernels import quantizers
from bitkernels.nn import BinaryConv1d, BinaryConv2d, BinaryConv3d, BinaryLayer
from bitkernels.nn.options import OPERATOR_DEFAULTS
from bitkernels_tests import oracles
from bitkernels_tests.cases import dyadic, reals, signed

LAYERS = {1: (BinaryConv1d, nn.Conv1d, F.conv1d), 2: (BinaryConv2d, nn.Conv2d, F.conv2d),
          3: (BinaryConv3d, nn.Conv3d, F.conv3d)}
SIZE = (5, 6, 5)
GEOMETRIES = (
    dict(kernel_size=3), dict(kernel_size=1, bias=False), dict(kernel_size=3, padding=1, stride=2),
    dict(kernel_size=2, padding=1, dilation=2, groups=2), dict(kernel_size=4, padding="same"),
    dict(kernel_size=3, padding="valid"), dict(kernel_size=2, padding="same", pad_value=-1),
    dict(kernel_size=3, padding=2, pad_value=1, groups=3),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
    dict(kernel_size=3, padding=2, padding_mode="circular", stride=2),
    dict(kernel_size=4, padding="same", padding_mode="replicate"),
)
SCALES = (None, "detached", "magnitude_aware", "xnor")


# Tensors too small for threads, which would cost more than all the rest.
pytestmark = pytest.mark.usefixtures("one_thread")


def layer_of(dims, dtype=torch.float32, device="cpu", layers=LAYERS, **options):
    """A layer whose weight has exact zeros and clip values, and whose bias is dyadic."""
    layer = layers[dims][0](36, 12, dtype=dtype, device=device, **options)
    with torch.no_grad():
        layer.weight.copy_(reals(*layer.weight.shape, device=device))
        if layer.bias is not None:
            layer.bias.copy_(dyadic(12, device=device))
    return layer


def emulate(layer, x, weight, bias):
    """PyTorch's function on an already quantized input and weight, padded as the layer says."""
    function = LAYERS[len(layer.kernel_size)][2]
    pads = layer._reversed_padding_repeated_twice
    if layer.padding_mode == "zeros":
        x = F.pad(x, pads, value=float(layer.pad_value))
    else:
        x = F.pad(x, pads, mode=layer.padding_mode)
    return function(x, weight, bias, layer.stride, 0, layer.dilation, layer.groups)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_forward_is_the_convolution_of_signs(dims, options, device):
    layer = layer_of(dims, device=device, **options)
    for shape in ((2, 36, *SIZE[:dims]), (36, *SIZE[:dims])):
        x = reals(*shape, device=device)
        expected = emulate(layer, signed(x), signed(layer.weight), None).round()
        if layer.bias is not None:
            expected = expected + layer.bias.view(-1, *[1] * dims)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_matches_conv_of_torch_on_signs(dims):
    """An `nn.Conv` with the signs as weights, given the signs, is the same layer."""
    layer = layer_of(dims, kernel_size=3, padding=1, stride=2)
    real = LAYERS[dims][1](36, 12, 3, padding=1, stride=2)
    real.load_state_dict(layer.state_dict())
    real.weight.data = signed(real.weight.data)
    x = reals(2, 36, *SIZE[:dims])
    assert torch.equal(layer(x), real(signed(x)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [dict(kernel_size=3, padding=1),
                                     dict(kernel_size=3, padding=2, pad_value=1, stride=2),
                                     dict(kernel_size=2, padding_mode="circular", padding=1)],
                         ids=str)
def test_gradients(dims, options, scale, device):
    """Every rule of the weight scale, spelled out in float64."""
    layer = layer_of(dims, device=device, weight_scale=scale, **options)
    x = reals(2, 36, *SIZE[:dims], device=device).requires_grad_()
    y = layer(x)
    grad = dyadic(*y.shape, device=device)
    y.backward(grad)

    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    alpha = torch.where(w64.abs() <= 1, w64, w64.sign()) if scale == "xnor" else w64
    alpha = None if scale is None else alpha.abs().mean(tuple(range(1, w64.dim())))
    if alpha is not None and scale != "xnor":
        alpha = alpha.detach()
    weight = oracles.binary_weight(w64, alpha, scale_weight_grad=scale != "detached")
    expected = emulate(layer, oracles.sign(x64), weight, b64)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    expected.backward(grad.double())
    for actual, wanted in ((x, x64), (layer.weight, w64), (layer.bias, b64)):
        largest = wanted.grad.abs().max().item()
        torch.testing.assert_close(actual.grad.double(), wanted.grad, rtol=1e-5,
                                   atol=1e-6 * largest)


def test_scale_rules_differ_as_documented():
    """On one weight per channel: alpha = |w|, and the three rules by hand."""
    x, w = torch.ones(1, 1, 1, 1), torch.tensor([0.5, -0.25, -2.0]).view(3, 1, 1, 1)
    grads = {}
    for scale in SCALES:
        layer = BinaryConv2d(1, 3, 1, bias=False, weight_scale=scale)
        layer.weight.data = w.clone()
        y = layer(x).flatten()
        expected = {None: [1, -1, -1], "xnor": [0.5, -0.25, -1]}.get(scale, [0.5, -0.25, -2])
        assert y.tolist() == expected
        (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        grads[scale] = layer.weight.grad.flatten().tolist()
    assert grads == {None: [1, 2, 0], "detached": [1, 2, 0], "magnitude_aware": [0.5, 0.5, 0],
                     # d alpha/dw = sign(w) inside the clip, times sum(G s) = G sign(w)
                     "xnor": [0.5 + 1, 0.5 + 2, 0]}


@pytest.mark.parametrize("input_quantizer, weight_quantizer", [
    ("approx_sign", "ste_sign"), ("swish_sign", "swish_sign"), (None, "approx_sign"),
    (quantizers.SteSign(1.25), quantizers.SteSign(None)), (quantizers.NoOp(1), None),
    (quantizers.SwishSign(2.0), quantizers.SwishSign(7.0)), ("ste_sign", quantizers.SwishSign(3.0)),
], ids=str)
@pytest.mark.parametrize("dims", [2, 3])
def test_estimators(dims, input_quantizer, weight_quantizer):
    layer = layer_of(dims, kernel_size=3, input_quantizer=input_quantizer,
                     weight_quantizer=weight_quantizer)
    assert layer.on_bits == (dims == 2)
    x = reals(2, 36, *SIZE[:dims]).requires_grad_()
    y = layer(x)
    grad = dyadic(*y.shape)
    y.backward(grad)

    def conf(quantizer):
        if quantizer is None or isinstance(quantizer, quantizers.NoOp):
            return "identity", None, 0.0
        quantizer = quantizers.get(quantizer)
        return (quantizer.estimator, getattr(quantizer, "clip_value", None),
                getattr(quantizer, "beta", 0.0))

    x64, w64 = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    expected = emulate(layer, oracles.sign(x64, *conf(input_quantizer)),
                       oracles.sign(w64, *conf(weight_quantizer)), layer.bias.double())
    assert torch.equal(y.double(), expected)
    expected.backward(grad.double())
    for actual, wanted in ((x.grad, x64.grad), (layer.weight.grad, w64.grad)):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4,
                                   atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("pad_value", [0, 1])
@pytest.mark.parametrize("input_quantizer, weight_quantizer", [
    ("dorefa_quantizer", quantizers.DoReFa(3, "weights")), ("ste_heaviside", "ste_sign"),
    ("ste_sign", "ste_tern"), (quantizers.NoOp(32), "ste_sign"), (torch.tanh, torch.sin),
    (None, "ste_tern"), ("magnitude_aware_sign", "magnitude_aware_sign")],
    ids=lambda given: getattr(given, "__name__", str(given)))
def test_other_quantizers_compute_on_reals(dims, pad_value, input_quantizer, weight_quantizer):
    layer = layer_of(dims, kernel_size=3, padding=1, pad_value=pad_value,
                     input_quantizer=input_quantizer, weight_quantizer=weight_quantizer)
    assert not layer.on_bits
    x = reals(2, 36, *SIZE[:dims]).requires_grad_()
    q_in = quantizers.get(input_quantizer) or quantizers.SteSign(None)
    expected = emulate(layer, q_in(x), quantizers.get(weight_quantizer)(layer.weight), layer.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    grads = torch.autograd.grad(y.sum(), (x, layer.weight))
    expected_grads = torch.autograd.grad(expected.sum(), (x, layer.weight))
    for actual, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


class Centred(nn.Module):
    """A custom binary quantizer with a state of its own."""

    precision = 1

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.25))

    def forward(self, x):
        return quantizers.SteSign()(x - self.level)


def test_custom_binary_quantizer():
    layer = layer_of(2, kernel_size=3, input_quantizer=Centred(), weight_quantizer=Centred(),
                     weight_scale="detached")
    assert layer.on_bits
    assert set(layer.state_dict()) == {"weight", "bias", "input_quantizer.level",
                                       "weight_quantizer.level"}
    x = reals(2, 36, 6, 6).requires_grad_()
    y = layer(x)
    alpha = layer.weight.abs().mean((1, 2, 3))
    dot = F.conv2d(signed(x - 0.25), signed(layer.weight - 0.25))
    expected = dot * alpha.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert torch.equal(x.grad == 0, ((x - 0.25).abs() > 1) | (x.grad == 0))
    assert layer.input_quantizer.level.grad is not None
    assert layer.weight.grad.any()


def test_magnitude_aware_sign_is_the_scale_of_larq():
    a = layer_of(2, kernel_size=3, weight_quantizer=quantizers.MagnitudeAwareSign(0.5))
    b = layer_of(2, kernel_size=3, weight_quantizer=quantizers.SteSign(0.5),
                 weight_scale="magnitude_aware")
    b.load_state_dict(a.state_dict())
    x = reals(2, 36, 6, 6)
    ya, yb = a(x), b(x)
    ya.pow(2).sum().backward()
    yb.pow(2).sum().backward()
    assert a.on_bits and torch.equal(ya, yb) and torch.equal(a.weight.grad, b.weight.grad)
    weight = quantizers.MagnitudeAwareSign(0.5)(a.weight)
    torch.testing.assert_close(ya, F.conv2d(signed(x), weight, a.bias), rtol=1e-5, atol=1e-4)


def test_constructor_and_state_dict_are_those_of_torch():
    for dims, (binary, real, _) in LAYERS.items():
        torch.manual_seed(3)
        a = binary(8, 6, 3, 2, 1, 1, 2, False, "zeros")
        torch.manual_seed(3)
        b = real(8, 6, 3, 2, 1, 1, 2, False, "zeros")
        assert torch.equal(a.weight, b.weight)
        a, b = binary(8, 6, 3), real(8, 6, 3)
        assert list(a.state_dict()) == list(b.state_dict()) == ["weight", "bias"]
        a.load_state_dict(b.state_dict())
        assert torch.equal(a.weight, b.weight)
        b.load_state_dict(binary(8, 6, 3).state_dict())
        assert isinstance(a, (BinaryLayer, real)) and dims == len(a.kernel_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [None, "detached", "xnor"])
def test_dtypes(dtype, scale):
    layer = layer_of(2, kernel_size=3, weight_scale=scale).to(dtype)
    x = reals(2, 36, 5, 5, dtype=dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    w = layer.weight.clamp(-1, 1) if scale == "xnor" else layer.weight
    dot = F.conv2d(signed(x).float(), signed(layer.weight).float())
    if scale:
        dot = dot * w.float().abs().mean((1, 2, 3)).view(-1, 1, 1)
    if dtype == torch.float64:
        torch.testing.assert_close(y.float(), dot + layer.bias.float().view(-1, 1, 1))
    else:
        assert torch.equal(y, (dot + layer.bias.float().view(-1, 1, 1)).to(dtype))
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype


def test_autocast_gives_the_autocast_dtype():
    layer = layer_of(2, kernel_size=3, weight_scale="detached")
    x = reals(2, 36, 5, 5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x).bfloat16())
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_channels_last_and_slices():
    layer = layer_of(2, kernel_size=3, padding=1)
    x = reals(4, 36, 6, 6)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y, layer(x))
    wide = reals(2, 72, 6, 12)
    part = wide[:, ::2, :, ::2]
    assert torch.equal(layer(part), layer(part.contiguous()))
    assert layer(x[:0]).shape == (0, 12, 6, 6)


def saved_bytes(function, *skip):
    """Bytes saved for backward, each storage once, without those of `skip`."""
    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function()
    for t in skip:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_backward_keeps_bits_only():
    x = torch.randn(2, 64, 56, 56, requires_grad=True)
    layer = BinaryConv2d(64, 64, 3, padding=1, bias=False)
    weight = signed(layer.weight.detach()).requires_grad_()

    def emulated():
        return F.conv2d(oracles.sign(x), weight, padding=1)

    real = saved_bytes(emulated, weight)
    assert real >= 2 * x.numel() * 4  # x for the mask, its signs for the convolution
    packed = saved_bytes(lambda: layer(x), layer.weight)
    assert 0 < packed <= real / 24
    free = BinaryConv2d(64, 64, 3, padding=1, bias=False, input_quantizer=None)
    assert saved_bytes(lambda: free(x), free.weight) <= packed / 2


def test_copies():
    layer = layer_of(2, kernel_size=3, input_quantizer=quantizers.SteSign(1.25),
                     weight_scale="xnor", pad_value=1, padding=1)
    x = reals(2, 36, 6, 6)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    loaded = layer_of(2, kernel_size=3, input_quantizer=quantizers.SteSign(1.25),
                      weight_scale="xnor", pad_value=1, padding=1)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(copied(x), layer(x)) and repr(copied) == repr(layer)
        copied.weight_scale = None
        assert layer.weight_scale == "xnor" and not torch.equal(copied(x), layer(x))


def test_meta_device():
    layer = BinaryConv2d(36, 12, 3, device="meta")
    assert layer(torch.empty(2, 36, 5, 5, device="meta")).shape == (2, 12, 3, 3)
    source = layer_of(2, kernel_size=3)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = reals(2, 36, 5, 5)
    assert torch.equal(layer(x), source(x))


def test_defaults_left_out_are_those_of_the_operator():
    schema = {a.name: a.default_value
              for a in torch.ops.bitkernels.binary_conv2d.default._schema.arguments}
    for name, value in OPERATOR_DEFAULTS.items():
        assert schema[name] == value


def test_options_can_be_assigned():
    layer = layer_of(2, kernel_size=3)
    x = reals(2, 36, 5, 5)
    layer.weight_scale = "detached"
    assert torch.equal(layer(x), layer_of_like(layer, weight_scale="detached")(x))
    layer.input_quantizer = torch.tanh
    assert not layer.on_bits
    layer.input_quantizer = "approx_sign"
    assert layer.on_bits and layer.operator_arguments()["input_estimator"] == "approx_sign"
    with pytest.raises(ValueError, match="needs a weight quantizer"):
        layer.weight_quantizer = "ste_tern"
    with pytest.raises(ValueError, match="weight_scale must be one of"):
        layer.weight_scale = "mean"
    assert layer.weight_scale == "detached" and "SteSign" in repr(layer.weight_quantizer)
    assert "input_quantizer=ApproxSign()" in layer.extra_repr()
    assert "weight_scale='detached'" in repr(layer)


def layer_of_like(layer, **options):
    twin = layer_of(2, kernel_size=3, **options)
    twin.load_state_dict(layer.state_dict())
    return twin


@pytest.mark.parametrize("options, message", [
    (dict(input_quantizer="sign"), "unknown quantizer 'sign'.*ste_sign"),
    (dict(weight_scale="mean"), "weight_scale must be one of"),
    (dict(weight_scale="xnor", weight_quantizer="ste_tern"), "needs a weight quantizer"),
    (dict(weight_scale="xnor", weight_quantizer="magnitude_aware_sign"), "two scales"),
    (dict(pad_value=2), "pad_value must be -1, 0 or 1"),
    (dict(pad_value=1, padding_mode="reflect"), "needs padding_mode='zeros'"),
    (dict(padding="same", stride=2), "strided"), (dict(groups=5), "divisible"),
])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_wrong_options(dims, options, message):
    with pytest.raises(ValueError, match=message):
        LAYERS[dims][0](36, 12, 3, **options)


@pytest.mark.parametrize("shape", [(2, 35, 5, 5), (36, 5), (2, 36, 2, 5), (1, 2, 36, 5, 5)])
def test_wrong_input(shape):
    layer = layer_of(2, kernel_size=3)
    with pytest.raises(RuntimeError, match="bitkernels::binary_conv2d"):
        layer(torch.randn(shape))
    with pytest.raises(RuntimeError, match="BinaryConv1d: input must be"):
        layer_of(1, kernel_size=3)(torch.randn(1, 2, 36, 5))
    with pytest.raises(RuntimeError, match="BinaryConv1d: input must be"):
        layer_of(1, kernel_size=3)(torch.randn(35, 5))
    with pytest.raises(RuntimeError, match="float"):
        layer(torch.ones(2, 36, 5, 5, dtype=torch.int64))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_compiles_once_for_all_batches(dims):
    torch._dynamo.reset()
    layer = layer_of(dims, kernel_size=3, padding=1, weight_scale="detached")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 8):
        x = reals(batch, 36, *SIZE[:dims])
        torch._dynamo.mark_dynamic(x, 0)
        layer.zero_grad()
        y = compiled(x)
        y.sum().backward()
        grad = layer.weight.grad.clone()
        layer.zero_grad()
        expected = layer(x)
        expected.sum().backward()
        assert torch.equal(y, expected)
        torch.testing.assert_close(grad, layer.weight.grad, rtol=1e-5, atol=1e-4)
    assert counter.frame_count == 1
