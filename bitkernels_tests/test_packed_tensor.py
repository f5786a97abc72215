"""A packed tensor is its `unpack()`, for every layer, in graphs and in transforms."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree

from bitkernels import PackedTensor
from bitkernels.nn import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConvTranspose1d,
    BinaryConvTranspose2d,
    BinaryLinear,
    NormSign,
)
from bitkernels_tests.cases import reals

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "conv2d": (lambda: BinaryConv2d(36, 20, 3, padding=1, weight_scale="detached"), (2, 36, 5, 6)),
    "grouped": (lambda: BinaryConv2d(64, 20, 3, groups=2, padding="same", pad_value=-1),
                (2, 64, 5, 6)),
    "conv1d": (lambda: BinaryConv1d(36, 20, 3), (2, 36, 9)),
    "transposed": (lambda: BinaryConvTranspose2d(36, 20, 3, 2, weight_scale="xnor"), (2, 36, 4, 3)),
    "transposed1d": (lambda: BinaryConvTranspose1d(36, 20, 3, 2), (2, 36, 4)),
    "linear": (lambda: BinaryLinear(67, 9, weight_scale="xnor"), (3, 2, 67)),
    "one_row": (lambda: BinaryLinear(64, 9), (64,))}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    make, shape = LAYERS[request.param]
    return make().pack(), reals(*shape)


def packed_for(layer, x):
    return PackedTensor.from_real(x, -1 if x.shape[-1:] == (getattr(layer, "in_features", 0),)
                                  else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_layers_take_it_for_its_signs(layer_and_input, dtype):
    layer, x = layer_and_input
    x = x.to(dtype)
    packed = packed_for(layer, x)
    expected = layer(x)
    got = layer(packed)
    assert got.dtype == dtype and torch.equal(got, expected)
    assert torch.equal(layer(packed.unpack()), expected)
    if dtype == torch.float32:
        with torch.autocast("cpu"):
            assert layer(packed).dtype == torch.bfloat16
            assert torch.equal(layer(packed), layer(x))
    if x.dim() > 2 and not isinstance(layer, nn.Linear) and hasattr(layer, "kernel_size"):
        one = PackedTensor.from_real(x[0], 0)
        assert torch.equal(layer(one), expected[0])


def test_a_size_for_the_output_of_a_transposed_convolution():
    layer, x = BinaryConvTranspose2d(36, 20, 3, 2, padding=1).pack(), reals(2, 36, 4, 3)
    packed = PackedTensor.from_real(x)
    for size in ((7, 6), (8, 5)):
        assert torch.equal(layer(packed, output_size=size), layer(x, output_size=size))


@pytest.mark.parametrize("shape, dim", [((2, 36, 5, 6), 1), ((36, 5), 0), ((3, 70), -1),
                                        ((2, 5, 33), 2), ((31,), 0)])
def test_it_is_its_real_tensor(shape, dim):
    x = reals(*shape)
    shift = reals(shape[dim])
    size = [1] * len(shape)
    size[dim] = -1
    for packed, real in ((PackedTensor.from_real(x, dim), x),
                         (PackedTensor.from_real(x, dim, shift), x + shift.view(size))):
        signs = torch.where(real < 0, -1.0, 1.0)
        assert packed.shape == x.shape and packed.device == x.device and packed.dim == (
            dim - len(shape) if dim >= 0 else dim)
        assert torch.equal(packed.unpack(), signs)
        assert packed.unpack(torch.float16).dtype == torch.float16
    assert PackedTensor.from_real(x.double(), dim).unpack().dtype == torch.float64


@pytest.mark.parametrize("arguments", [(2,), (3, 2, 1), ((2, 3), (1, 2), (1, 0))])
def test_max_pool(arguments):
    packed = PackedTensor.from_real(reals(2, 36, 8, 9))
    pooled = packed.max_pool2d(*arguments)
    assert torch.equal(pooled.unpack(), F.max_pool2d(packed.unpack(), *arguments))
    assert pooled.channels == 36 and pooled.dim == -3
    with pytest.raises(ValueError, match=r"takes images.*got dim=-1"):
        PackedTensor.from_real(reals(2, 5, 6, 36), -1).max_pool2d(2)


def test_graphs_and_transforms_see_the_words():
    layer, x = BinaryConv2d(36, 20, 3, padding=1, bias=False).pack(), reals(4, 36, 6, 6)
    packed, other = PackedTensor.from_real(x), PackedTensor.from_real(reals(4, 36, 6, 6) - 0.5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, packed):
            return self.layer(packed.max_pool2d(2)), packed.max_pool2d(3)

    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    program = torch.export.export(net, (packed,))
    torch.export.save(program, stream := io.BytesIO())
    stream.seek(0)
    loaded = torch.export.load(stream)
    for run in (compiled, program.module(), loaded.module()):
        for given in (packed, other):
            y, pooled = run(given)
            assert torch.equal(y, net(given)[0])
            assert torch.equal(pooled.unpack(), net(given)[1].unpack())
    assert torch.equal(torch.func.vmap(layer)(PackedTensor.from_real(x.unsqueeze(1), 2)),
                       layer(x).unsqueeze(1))
    assert torch.equal(torch.compile(lambda x: PackedTensor.from_real(x).max_pool2d(2).unpack(),
                                     fullgraph=True, backend="aot_eager")(x),
                       packed.max_pool2d(2).unpack())
    negated = torch.compile(lambda packed: _pytree.tree_map(lambda t: ~t, packed).unpack(),
                            fullgraph=True, backend="aot_eager")
    assert torch.equal(negated(packed), -packed.unpack())
    (words,), spec = _pytree.tree_flatten(packed)
    assert words is packed.words and _pytree.tree_unflatten([None], spec).words is None
    assert _pytree.tree_map(torch.Tensor.float, packed).words.dtype == torch.float32


def test_copies():
    packed = PackedTensor.from_real(reals(2, 36, 4, 4).half())
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied.unpack(), packed.unpack()) and copied.dtype == torch.float16


@pytest.mark.parametrize("words, channels, dim, text", [
    (torch.zeros(2, 3), 70, -1, r"words must be int32 of shape \(\.\.\., 3\) for 70 channels, got "
     r"torch.float32 of shape \(2, 3\)"),
    (torch.zeros(2, 3, dtype=torch.int32), 64, -1, r"shape \(\.\.\., 2\) for 64 channels, got "),
    (torch.zeros((), dtype=torch.int32), 1, -1, "words must be int32 of shape"),
    (torch.zeros(2, 3, dtype=torch.int32), 0, -1,
     "channels must be an integer of at least 1, got 0"),
    (torch.zeros(2, 3, dtype=torch.int32), 70, 2, r"dim must be in \[-2, 2\).*got 2"),
    (torch.zeros(2, 3, dtype=torch.int32), 70, -3, r"dim must be in \[-2, 2\).*got -3"),
    ([1, 2], 70, -1, "words must be an int32 tensor, got list")])
def test_wrong_parts(words, channels, dim, text):
    with pytest.raises(ValueError, match=f"PackedTensor: {text}" if text[0] != "s" else text):
        PackedTensor(words, channels, dim)


@pytest.mark.parametrize("given, text", [
    (dict(channels="70"), "channels must be an integer of at least 1, got '70'"),
    (dict(channels=70.0), "channels must be an integer of at least 1, got 70.0"),
    (dict(dim=None), "dim must be an integer, got None"),
    (dict(dtype="float32"), "dtype must be a torch.dtype, got 'float32'")])
def test_parts_of_other_types(given, text):
    with pytest.raises(ValueError, match=f"PackedTensor: {text}"):
        PackedTensor(**{**dict(words=torch.zeros(2, 3, dtype=torch.int32), channels=70, dim=-1),
                        **given})


def test_wrong_inputs_of_layers():
    image = PackedTensor.from_real(reals(2, 36, 4, 4))
    row = PackedTensor.from_real(reals(2, 36), -1)
    layer = BinaryConv2d(36, 4, 3)
    with pytest.raises(RuntimeError, match=r"PackedConv2d: input must have its channels in "
                                           r"dimension -3, got.*dim=-1"):
        layer.pack()(row)
    with pytest.raises(RuntimeError, match=r"PackedLinear: .*in dimension -1, got.*dim=-3"):
        BinaryLinear(36, 4).pack()(image)
    with pytest.raises(RuntimeError, match=r"input must be \(N, 40, ...\).*got shape \(2, 36, 4"):
        BinaryConv2d(40, 4, 3).pack()(image)
    with pytest.raises(RuntimeError, match=r"input_quantizer NormSign takes values.*unpack"):
        BinaryConv2d(36, 4, 3, input_quantizer=NormSign(36, 2)).pack().eval()(image)
    with pytest.raises(RuntimeError, match=r"real numbers, for padding_mode='reflect'"):
        BinaryConv2d(36, 4, 3, padding=1, padding_mode="reflect").pack()(image)
    with pytest.raises(RuntimeError, match="must not require grad|does not require grad|gradient"):
        PackedTensor.from_real(reals(2, 36, 4, 4).requires_grad_())
