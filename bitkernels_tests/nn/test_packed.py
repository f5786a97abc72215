"""Packed twins: the same outputs bit for bit, without latent weights, through every copy."""

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
from bitkernels.nn import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv3d,
    BinaryConvTranspose1d,
    BinaryConvTranspose2d,
    BinaryLinear,
    NormSign,
    PackedConv1d,
    PackedConv2d,
    PackedLinear,
    SameConv2d,
    binarize,
    pack,
)
from bitkernels_tests import module_cases, oracles
from bitkernels_tests.cases import reals
from bitkernels_tests.nn.test_conv import GEOMETRIES, SCALES, SIZE, Centred, layer_of

pytestmark = pytest.mark.usefixtures("one_thread")


def linear_of(**options):
    layer = BinaryLinear(67, 9, **options)
    layer.weight.data = reals(9, 67)
    return layer


def conv_and_input():
    layer = layer_of(2, kernel_size=3, padding=1, weight_scale="detached")
    return layer, layer.pack(), reals(2, 36, 5, 6)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_convolution_equals_its_layer(dims, options, scale, device):
    layer = layer_of(dims, device=device, weight_scale=scale, **options).eval()
    twin = layer.pack()
    assert type(twin) is (PackedConv1d, PackedConv2d)[dims - 1] and not twin.training
    for shape in ((2, 36, *SIZE[:dims]), (36, *SIZE[:dims]), (0, 36, *SIZE[:dims])):
        x = reals(*shape, device=device)
        y, expected = twin(x), layer(x)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
    assert not any(True for _ in twin.parameters())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_its_layer(scale, bias):
    layer = linear_of(weight_scale=scale, bias=bias)
    twin = layer.pack()
    assert type(twin) is PackedLinear
    for shape in ((67,), (5, 67), (2, 3, 67), (0, 67)):
        x = reals(*shape)
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("options", [
    dict(input_quantizer=None, weight_quantizer=None), dict(input_quantizer="swish_sign"),
    dict(input_quantizer=quantizers.NoOp(1), weight_quantizer="approx_sign"),
    dict(weight_quantizer="magnitude_aware_sign"),
    dict(input_quantizer=Centred(), weight_quantizer=Centred(), weight_scale="xnor")], ids=str)
def test_quantizers(options):
    x = reals(2, 36, 5, 6)
    layer = layer_of(2, kernel_size=3, **options)
    with torch.no_grad():
        assert torch.equal(layer.pack()(x), layer(x))
        layer, x = linear_of(**options), reals(4, 67)
        assert torch.equal(layer.pack()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_dtype_is_the_input_dtype(dtype):
    layer, twin, x = conv_and_input()
    assert twin(x.to(dtype)).dtype == dtype
    assert torch.equal(twin(x.to(dtype)), layer(x.to(dtype)))
    # A layer of another dtype packs to float32 scale and bias.
    twin = layer.to(dtype).pack()
    assert twin.scale.dtype == twin.bias.dtype == torch.float32
    assert torch.equal(twin(x.to(dtype)), layer(x.to(dtype)))


def test_buffers_are_the_documented_words():
    layer, twin, _ = conv_and_input()
    assert set(twin.state_dict()) == {"weight_words", "scale", "bias"}
    words = oracles.pack(oracles.sign_bits(layer.weight, 1))
    assert twin.weight_words.shape == (12, 3, 3, 2) and torch.equal(twin.weight_words, words)
    line = linear_of()
    assert torch.equal(line.pack().weight_words, oracles.pack(oracles.sign_bits(line.weight, 1)))
    flat = layer_of(1, kernel_size=3, groups=2).pack()
    assert flat.weight_words.shape == (12, 1, 3, 1) and flat.scale is None
    size = sum(t.numel() * t.element_size() for t in twin.state_dict().values())
    assert size == 4 * (12 * 3 * 3 * 2 + 12 + 12)


def test_copies_and_state_dicts():
    layer, twin, x = conv_and_input()
    expected = layer(x)
    stream = io.BytesIO()
    torch.save(twin.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    empty = PackedConv2d(36, 12, 3, padding=1, scale=True)
    assert not torch.equal(empty(x), expected)
    empty.load_state_dict(state)
    meta = PackedConv2d(36, 12, 3, padding=1, scale=True, device="meta")
    assert meta(x.to("meta")).shape == expected.shape
    assigned = copy.deepcopy(meta)
    assigned.load_state_dict(state, assign=True)
    meta = meta.to_empty(device="cpu")
    meta.load_state_dict(state)
    nested = nn.Sequential(PackedConv2d(36, 12, 3, padding=1, scale=True))
    nested.load_state_dict({f"0.{key}": value for key, value in state.items()})
    for copied in (empty, assigned, meta, nested, copy.deepcopy(twin),
                   pickle.loads(pickle.dumps(twin)), copy.deepcopy(twin).to("cpu")):
        assert torch.equal(copied(x), expected)
    again = copy.deepcopy(twin)
    again.load_state_dict(empty.state_dict())
    assert torch.equal(again(x), expected)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scale"):
        PackedConv2d(36, 12, 3, padding=1).load_state_dict(state)
    line = linear_of(weight_scale="xnor")
    empty = PackedLinear(67, 9, scale=True)
    empty.load_state_dict(line.pack().state_dict())
    x = reals(3, 67)
    assert torch.equal(empty(x), line(x))


def test_half_leaves_the_words_alone():
    layer, twin, x = conv_and_input()
    twin = twin.half()
    assert twin.weight_words.dtype == torch.int32
    y = twin(x.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-3, atol=2e-2)


def test_channels_last_in_and_out():
    layer, twin, x = conv_and_input()
    y = twin(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y, layer(x))


@pytest.mark.parametrize("layer, why", [
    (BinaryConv3d(4, 4, 3), "three-dimensional"),
    (BinaryConv2d(4, 4, 3, input_quantizer="dorefa_quantizer"), "DoReFa.*do not both return"),
    (BinaryConv1d(4, 4, 3, weight_quantizer="ste_tern"), "SteTern.*do not both return"),
    (BinaryLinear(4, 4, input_quantizer=torch.tanh), "tanh.*do not both return")], ids=str)
def test_layers_without_a_twin(layer, why):
    with pytest.raises(ValueError, match=f"{type(layer).__name__}.*cannot be packed: .*{why}"):
        layer.pack()


def test_wrong_input_and_arguments():
    _, twin, x = conv_and_input()
    for wrong in (x[:, :35], x[0, 0], x.unsqueeze(0)):
        with pytest.raises(RuntimeError, match=r"PackedConv2d: input must be \(N, 36"):
            twin(wrong)
    with pytest.raises(RuntimeError, match="PackedLinear: input must be"):
        linear_of().pack()(torch.randn(2, 64))
    with pytest.raises(RuntimeError, match="must not require grad"):
        twin(x.requires_grad_())
    with pytest.raises(ValueError, match="pad_value"):
        PackedConv2d(4, 4, 3, pad_value=3)
    with pytest.raises(ValueError, match="divisible"):
        PackedConv2d(4, 4, 3, groups=3)


def test_compiles_once_and_exports():
    torch._dynamo.reset()
    layer, twin, _ = conv_and_input()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for batch in (2, 3, 6):
        x = reals(batch, 36, 5, 6)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(twin, (x,), dynamic_shapes=({0: batch},))
    x = reals(9, 36, 5, 6)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("name", module_cases.PACKABLE)
def test_autocast_is_the_layers(name, dtype):
    """float64 stays float64; all else becomes the type of autocast."""
    layer, x = module_cases.PACKABLE[name]()
    twin, x = layer.pack(), x.to(dtype)
    for enabled in (torch.bfloat16, torch.float16, None):
        with torch.autocast("cpu", enabled, enabled=enabled is not None), torch.no_grad():
            real, packed = layer(x), twin(x)
        assert packed.dtype == real.dtype
        assert packed.dtype == (dtype if dtype == torch.float64 else enabled or dtype)
        if packed.dtype != torch.float64:  # where the layer's scale and bias are wider
            assert torch.equal(real, packed)


def test_autocast_is_that_of_a_transposed_layer():
    layer = BinaryConvTranspose2d(8, 4, 3, stride=2)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 8, 5, 4, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            real, packed = layer(x), layer.pack()(x)
        assert packed.dtype == real.dtype == (
            torch.float64 if dtype == torch.float64 else torch.bfloat16)


@pytest.mark.parametrize("layer, names", [
    (BinaryConv2d(33, 8, 3), ("stride", "padding", "dilation", "kernel_size", "groups",
                              "padding_mode", "in_channels", "out_channels")),
    (BinaryConv1d(33, 8, 3), ("padding",)),
    (SameConv2d(33, 8, 3, stride=2), ("padding", "stride")),
    (BinaryConvTranspose2d(33, 8, 3), ("stride", "output_padding", "groups")),
    (BinaryLinear(33, 8), ("in_features", "out_features"))])
def test_what_the_words_were_made_for_stays(layer, names):
    """It would be shown, and not used."""
    packed = layer.pack()
    for name in names:
        before = getattr(packed, name)
        with pytest.raises(AttributeError, match=f"{name} is that of the layer that was packed"):
            setattr(packed, name, 2)
        assert getattr(packed, name) == before
    packed.note = 2
    assert copy.deepcopy(packed).note == 2


class Above(nn.Module):
    """The sign of the distance from the mean of all, of inputs of these dimensions."""

    precision = 1

    def __init__(self, dims) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x):
        assert x.dim() in self.dims
        return torch.where(x < x.mean(), -1.0, 1.0).to(x.dtype)


@pytest.mark.parametrize("batched", (True, False))
@pytest.mark.parametrize("cls,dims,options", [
    (BinaryConv1d, 1, {}), (BinaryConv1d, 1, dict(padding=1, padding_mode="circular")),
    (BinaryConv2d, 2, {}), (BinaryConv2d, 2, dict(padding=1, padding_mode="reflect")),
    (BinaryConvTranspose1d, 1, {}), (BinaryConvTranspose2d, 2, {})])
def test_a_quantizer_gets_the_input_as_it_is(cls, dims, options, batched):
    """Neither padded nor with dimensions that the operator asks for: a batch norm counts them, and
    what looks at all of the input would see the padding."""
    x = torch.randn(*[2] * batched, 8, *[6] * dims) + 0.3
    for quantizer in (NormSign(8, dims), Above((dims + 1, dims + 2))):
        layer = cls(8, 5, 3, **options, input_quantizer=quantizer).eval()
        with torch.no_grad():
            assert torch.equal(layer.pack()(x), layer(x))


@pytest.mark.parametrize("name", module_cases.PACKABLE)
def test_parents_may_ask_what_the_weight_was_like(name):
    """Its type, device and sizes, of which many cast their input; not its values."""
    layer, x = module_cases.PACKABLE[name]()
    packed = layer.pack()
    real, facts = layer.weight, packed.weight
    assert (facts.dtype, facts.device, facts.shape) == (real.dtype, real.device, real.shape)
    assert (facts.size(), facts.size(1), facts.ndim, facts.dim(), facts.numel()) == (
        real.size(), real.size(1), real.ndim, real.dim(), real.numel())
    assert facts.is_floating_point() and not (facts.is_cuda or facts.requires_grad)
    assert layer.double().pack().weight.dtype == torch.float64
    for one in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        one = one.bfloat16().to("meta").weight
        assert one.dtype == torch.bfloat16 and one.device.type == "meta"
    said = "has no real weight: call the layer, or read its binary_weight"
    for use in (lambda: F.linear(x, facts), lambda: x * facts, lambda: 2 * facts, lambda: facts[0],
                lambda: torch.sign(facts)):
        with pytest.raises(RuntimeError, match=said):
            use()
    with pytest.raises(AttributeError, match=f"{said}.*; abs needs its values"):
        facts.abs()
    with pytest.raises(AttributeError, match="no attribute 'weigth'"):
        packed.weigth  # noqa: B018


def test_a_parent_that_casts_to_the_type_of_a_weight():
    class Casting(nn.Module):  # as T5's and CLIP's of transformers
        def __init__(self):
            super().__init__()
            self.first, self.wo, self.last = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
                x = x.to(self.wo.weight.dtype)
            return self.last(self.wo(x.to(self.wo.weight.device, self.wo.weight.dtype)))

    model, x = binarize(Casting()).eval(), torch.randn(2, 8)
    packed = pack(model)
    assert isinstance(packed.wo, PackedLinear)
    assert torch.equal(packed(x), model(x))
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    half = copy.deepcopy(packed).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", module_cases.PACKABLE)
@pytest.mark.parametrize("assign", [False, True])
def test_words_of_another_type_are_not_loaded(name, assign):
    """As a state of which all tensors were made half or float: a copy would round them."""
    layer, x = module_cases.PACKABLE[name]()
    packed = nn.Sequential(layer.pack())
    before = packed(x)
    for dtype in (torch.float32, torch.float16, torch.int64):
        state = {key: value.to(dtype) for key, value in packed.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"0\.weight_words of Packed\w+ must be the packed "
                           rf"words of \d+ channels in int32, got {str(dtype)[6:]}"):
            packed.load_state_dict(state, assign=assign)
    words = packed[0].weight_words | (1 << 29)
    with pytest.raises(RuntimeError, match=r"got bits behind channel \d+"):
        packed.load_state_dict(packed.state_dict() | {"0.weight_words": words}, assign=assign)
    assert packed[0].weight_words.dtype == torch.int32 and torch.equal(packed(x), before)


@pytest.mark.parametrize("attribute, value", [("in_channels", 7), ("kernel_size", (1, 1)),
                                              ("out_channels", 3)])
def test_a_weight_that_its_layer_does_not_describe_is_not_packed(attribute, value):
    """As tools leave it that cut channels out of a weight alone. Words would be read wrongly."""
    layer = BinaryConv2d(8, 4, 3)
    setattr(layer, attribute, value)
    with pytest.raises(ValueError, match=r"weight must be of shape \(.*\) as its attributes say, "
                       r"got \(4, 8, 3, 3\)"):
        pack(nn.Sequential(layer))
