"""Each call of the engine on odd shapes and strides, against PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bitkernels  # noqa: F401
from bitkernels_tests.network.engine import Engine, EngineError, Graph

ops = torch.ops.bitkernels
IMAGES = [(1, 1, 5, 7), (3, 3, 6, 6), (1, 31, 7, 5), (3, 33, 6, 5)]
LAYOUTS = ("planes", "rows", "slice", "turned")


def laid_out(shape, layout: str) -> Tensor:
    n, c, h, w = shape
    if layout == "planes":
        return torch.randn(shape)
    if layout == "rows":
        return torch.randn(shape).to(memory_format=torch.channels_last)
    if layout == "slice":
        return torch.randn(n, c + 2, h + 1, 2 * w)[:, 1:-1, 1:, ::2]
    return torch.randn(w, h, n, c).permute(2, 3, 1, 0)


@pytest.fixture(params=[(s, LAYOUTS[i]) for i, s in enumerate(IMAGES)]
                + [(IMAGES[3], layout) for layout in LAYOUTS[:3]], ids=str)
def image(request):
    graph = Graph()
    x = graph.input(laid_out(*request.param))
    return graph, x, graph.values[0]


def test_conv2d(image):
    graph, x, value = image
    c = value.shape[1]
    outputs = [
        graph.call("aten.conv2d.default", x, torch.randn(5, c, 3, 3), torch.randn(5)),
        graph.call("aten.conv2d.default", x, torch.randn(33, c, 1, 1), None, [2, 2]),
        graph.call("aten.conv2d.default", x, torch.randn(2 * c, 1, 3, 2), torch.randn(2 * c),
                   [1, 2], [1, 0], [2, 1], c),
        graph.call("aten.relu6.default", graph.call(
            "aten.conv2d.default", x, torch.randn(17, c, 2, 3), None, [1, 1], [2, 2]))]
    graph.check(*outputs)


def test_padding_before_layers(image):
    graph, x, value = image
    c = value.shape[1]
    pads = [1, 0, 2, 1]

    def pad(node, value, pads=pads):
        return graph.call("aten.pad.default", node, pads, "constant", value)

    active = graph.call("aten.relu.default", graph.call("aten.conv2d.default", x,
                                                        torch.randn(4, c, 1, 1)))
    outputs = [
        graph.call("aten.conv2d.default", pad(x, 0.0), torch.randn(4, c, 3, 3), None,
                   [2, 2], [1, 1]),
        graph.call("aten.conv2d.default", pad(x, 0.5), torch.randn(4, c, 3, 3)),
        graph.call("aten.avg_pool2d.default", pad(x, 0.0), [2, 3], [1, 2]),
        graph.call("aten.avg_pool2d.default", pad(x, 0.0), [2, 3], [1, 2], [1, 1], False, False),
        graph.call("aten.max_pool2d.default", pad(x, -math.inf), [3, 3], [2, 2]),
        graph.call("aten.max_pool2d.default", pad(x, 0.0), [3, 3], [2, 2]),
        graph.call("aten.max_pool2d.default", pad(active, 0.0), [3, 3], [1, 1]),
        graph.call("aten.max_pool2d.default", pad(active, 0.0, [3, 3, 3, 3]), [3, 3], [1, 1]),
        pad(x, None, [0, 1]), pad(x, 2.0, [1, 1, 0, 2, 3, 0])]
    graph.check(*outputs)


def test_pools(image):
    graph, x, _ = image
    outputs = [
        graph.call("aten.max_pool2d.default", x, [3, 2], [2, 1], [1, 1]),
        graph.call("aten.max_pool2d.default", x, [2, 2], [2, 2], [0, 0], [2, 1], True),
        graph.call("aten.avg_pool2d.default", x, [3, 3], [2, 2], [1, 1], True, False),
        graph.call("aten.avg_pool2d.default", x, [2, 2], [], [1, 0], False, True, 3),
        graph.call("aten.adaptive_avg_pool2d.default", x, [2, 3]),
        graph.call("aten.adaptive_avg_pool2d.default", x, [1, 1]),
        graph.call("aten.mean.dim", x, [2, 3]), graph.call("aten.mean.dim", x, [-1, -2], True),
        graph.call("aten.mean.dim", x, [1], True), graph.call("aten.mean.dim", x, [0, 2])]
    graph.check(*outputs)


def test_chains(image):
    """Elementwise calls in every order, some read twice."""
    graph, x, value = image
    c = value.shape[1]
    y = graph.input(torch.randn(value.shape))

    def norm(node):
        return graph.call("aten.batch_norm.default", node, torch.randn(c), torch.randn(c),
                          torch.randn(c), torch.rand(c) + 0.5, False, 0.1, 1e-5, False)

    def prelu(node, n):
        return graph.call("aten.prelu.default", node, torch.randn(n))

    first = norm(x)
    added = graph.call("aten.add.Tensor", first, y)
    outputs = [
        prelu(graph.call("aten.add.Tensor", y, norm(x)), c),
        graph.call("aten.relu.default", prelu(norm(y), 1)),
        graph.call("aten.add.Tensor", added, graph.call("aten.relu.default", first)),
        graph.call("aten.hardtanh.default", graph.call(
            "aten.add.Tensor", graph.call("aten.mul.Tensor", x, torch.randn(c, 1, 1)),
            torch.randn(1, c, 1, 1))),
        graph.call("aten.clamp.default", graph.call("aten.relu6.default", x), None, 0.5),
        graph.call("aten.leaky_relu.default", graph.call("aten.sub.Tensor", x, 0.25), 0.1),
        graph.call("aten.add.Tensor", x, x), graph.call("aten.mul.Tensor", x, 0.5),
        graph.call("aten.mul.Tensor", torch.randn(1), x),
        graph.call("aten.add.Tensor", x, y, alpha=2), graph.call("aten.sub.Tensor", x, y),
        graph.call("aten.clamp_min.default", graph.call("aten.leaky_relu.default", x), -0.05)]
    graph.check(*outputs)


def test_broadcasts(image):
    graph, x, value = image
    n, c, h, w = value.shape
    outputs = []
    for sizes in ((n, c, 1, 1), (1, c, 1, 1), (n, 1, h, w), (w,), (h, 1), (n, c, h, w)):
        other = graph.input(torch.randn(sizes), free=())
        for call in ("mul", "add", "sub", "div"):
            outputs += [graph.call(f"aten.{call}.Tensor", x, other),
                        graph.call(f"aten.{call}.Tensor", other, x)]
    graph.check(*outputs)


def test_quantizer(image):
    """The calls of a DoReFa quantizer."""
    graph, x, _ = image
    inside = graph.call("aten.__and__.Tensor", graph.call("aten.ge.Scalar", x, 0),
                        graph.call("aten.le.Scalar", x, 1))
    kept = graph.call("aten.where.ScalarOther", inside, x, 0.0)
    steps = graph.call("aten.round.default", graph.call("aten.mul.Tensor", kept, 3.0))
    graph.check(inside, kept, graph.call("aten.div.Tensor", steps, 3.0),
                graph.call("aten.softmax.int", x, 1), graph.call("aten.softmax.int", x, -1))


FUNCTIONS = (("neg",), ("abs",), ("exp",), ("sqrt",), ("tanh",), ("silu",), ("sigmoid",),
             ("hardsigmoid",), ("hardswish",), ("elu",), ("elu", 0.7), ("elu", 1.67, 1.05, 0.5))


def test_functions(image):
    graph, x, value = image
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.0, -3.0, 6.0, 1e-30, -90.0,
                            90.0, 2e-4])
    named = [graph.call(f"aten.{name}.default", of, *args)
             for of in (x, graph.input(special, free=())) for name, *args in FUNCTIONS]
    graph.check(*named)


def test_gelu(image):
    """Of infinity PyTorch makes NaN."""
    graph, x, _ = image
    graph.check(graph.call("aten.gelu.default", x),
                graph.call("aten.gelu.default", x, approximate="tanh"))
    with pytest.raises(EngineError, match="approximate must be none or tanh, got sinh"):
        Engine(graph.file(graph.call("aten.gelu.default", x, approximate="sinh")))


def test_views(image):
    graph, x, value = image
    n, c, h, w = value.shape
    turned = graph.call("aten.permute.default", x, [0, 2, 3, 1])
    cut = graph.call("aten.slice.Tensor", x, 2, 1, 9223372036854775807, 2)
    rows = graph.call("aten.reshape.default", x, [n, -1, w])
    small = graph.call("aten.adaptive_avg_pool2d.default", x, [1, 1])
    flat = graph.call("aten.flatten.using_ints", small, 1)
    outputs = [
        graph.call("aten.flatten.using_ints", x, 1), graph.call("aten.flatten.using_ints", turned),
        turned, cut, rows, flat,
        graph.call("aten.transpose.int", rows, 1, 2),
        graph.call("aten.relu.default", turned), graph.call("aten.sigmoid.default", cut),
        graph.call("aten.unsqueeze.default", x, -1), graph.call("aten.squeeze.dims", small, [2, 3]),
        graph.call("aten.unsqueeze.default", graph.call("aten.unsqueeze.default", flat, 2), 3),
        graph.call("aten.conv2d.default", cut, torch.randn(4, c, 1, 1)), x,
        graph.call("aten.slice.Tensor", x, 1, 0, 1), graph.call("aten.slice.Tensor", x, 3, 9, 2),
        graph.call("aten.cat.default", [cut, cut, graph.call("aten.neg.default", cut)], 1),
        graph.call("aten.cat.default", [x, x], 2),
        graph.call("aten.cat.default", [turned, turned], -1)]
    graph.check(*outputs)


def test_sizes(image):
    """A reshape to sizes that the graph computes, for another batch than the example's."""
    graph, x, value = image
    n = graph.call("aten.sym_size.int", x, 0)
    c = graph.call("aten.sym_size.int", x, 1)
    both = graph.call("size.mul", n, c)
    more = graph.call("size.add", both, 1)
    less = graph.call("size.floordiv", graph.call("size.sub", more, 1), 1)
    out = graph.call("aten.reshape.default", x, [less, -1])
    graph.check(out, inputs=[torch.randn(5, *value.shape[1:])])


def test_concatenation_in_place():
    """Parts that are read elsewhere, given twice, nested, and parts that are views."""
    graph = Graph()
    x = graph.input(torch.randn(2, 6, 5, 4))
    a = graph.call("aten.relu.default", graph.call("aten.conv2d.default", x,
                                                   torch.randn(3, 6, 1, 1)))
    b = graph.call("aten.max_pool2d.default", x, [3, 3], [1, 1], [1, 1])
    inner = graph.call("aten.cat.default", [a, b], 1)
    c = graph.call("aten.sigmoid.default", inner)
    outer = graph.call("aten.cat.default", [inner, c, a, x], 1)
    last = graph.call("aten.relu.default", outer)
    flat = graph.call("aten.mean.dim", outer, [2, 3])
    logits = graph.call("aten.linear.default", flat, torch.randn(7, 27), torch.randn(7))
    joined = graph.call("aten.cat.default", [flat, logits, logits], 1)
    graph.check(outer, last, inner, joined, graph.call("aten.cat.default", [a, a], 1), logits)


def product(graph, x, channels, out, residual, groups=1, **kwargs):
    """A binary 1x1 layer of real and packed output."""
    words = graph.call("bitkernels.sign_pack.default", x, None, 1)
    both = graph.call("bitkernels.packed_conv2d.both", words=words, channels=channels,
                      weight_words=ops.sign_pack(torch.randn(out, 1, 1, channels // groups)),
                      groups=groups, residual=residual, slope=torch.randn(out), **kwargs)
    return [graph.call("size.getitem", both, i) for i in (0, 1)]


def test_repeated_residual():
    """A tensor given twice along the channels is read twice; other concatenations are made."""
    graph = Graph()
    x = graph.input(torch.randn(2, 64, 7, 5))
    once = graph.call("aten.relu.default", graph.call("aten.conv2d.default", x,
                                                      torch.randn(64, 64, 1, 1)))

    def cat(*parts, dim=1):
        return graph.call("aten.cat.default", list(parts), dim)

    twice, thrice = cat(once, once), cat(once, once, once)
    outputs = product(graph, x, 64, 128, twice) + product(graph, x, 64, 192, thrice)
    steps = [name for name, *_ in graph.check(*outputs).steps(*graph.values)]
    assert twice["node"] not in steps and thrice["node"] not in steps

    narrow = graph.call("aten.conv2d.default", x, torch.randn(48, 64, 1, 1))
    wide = graph.call("aten.conv2d.default", x, torch.randn(64, 64, 1, 1))
    read = cat(once, once)
    outputs += product(graph, x, 64, 128, cat(once, wide)) + [wide]
    outputs += product(graph, x, 64, 96, cat(narrow, narrow))
    outputs += product(graph, x, 64, 128, read) + [read]
    outputs += product(graph, x, 64, 128, cat(once, once), groups=4)
    outputs += product(graph, cat(x, x, dim=2), 64, 64, cat(once, once, dim=2))
    graph.check(*outputs)


@pytest.mark.parametrize("channels, tensors", [(64, 1), (1024, 2)])
def test_output_over_the_residual(channels, tensors):
    """Where nothing reads the residual later the output takes its memory. Rows of 1024 channels lie
    wider than those of the copied input, which is the second tensor."""
    graph = Graph()
    x = graph.input(torch.randn(2, channels, 4, 4))
    value = graph.call("aten.relu.default", x)
    for _ in range(3):
        value, words = product(graph, value, channels, channels, value)
    engine = graph.check(words, graph.call("aten.mean.dim", value, [2, 3]))
    assert engine.memory(*graph.values)[1] < (tensors + 0.3) * 4 * 2 * 16 * channels
    pooled = graph.call("aten.adaptive_avg_pool2d.default", value, [1, 1])
    kept, _ = product(graph, x, channels, channels, value)
    graph.check(graph.call("aten.flatten.using_ints", value, 1), kept, pooled,
                graph.call("aten.neg.default", value), words)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
def test_linear(shape):
    graph = Graph()
    x = graph.input(torch.randn(shape), free=())
    y = graph.call("aten.linear.default", x, torch.randn(33, 4), torch.randn(33))
    outputs = [graph.call("aten.relu.default", y),
               graph.call("aten.linear.default", y, torch.randn(1, 33))]
    words = graph.call("bitkernels.sign_pack.default", y, None, -1)
    kwargs = dict(words=words, weight_words=ops.sign_pack(torch.randn(40, 33)), channels=33)
    outputs += [
        words, graph.call("bitkernels.packed_linear.default", **kwargs, scale=torch.randn(40),
                          residual=graph.call("aten.linear.default", x, torch.randn(40, 4)))]
    graph.check(*outputs)


def int8(*shape):
    return torch.randint(-128, 128, shape).to(torch.int8)


def exactly(graph, *outputs):
    engine = Engine(graph.file(*outputs))
    for got, expected in zip(engine(*graph.values), graph.expected(graph.values), strict=True):
        assert torch.equal(got, expected)
    return engine


def test_int8_conv2d(image):
    graph, x, value = image
    c, name = value.shape[1], "bitkernels.int8_conv2d.default"
    first = graph.call(name, x, int8(5, c, 3, 3), torch.randn(5), torch.randn(5), 30.5)
    outputs = [
        first, graph.call("aten.relu.default", graph.call(
            name, first, int8(33, 5, 1, 1), torch.randn(33) / 100, None, 3.0, [2, 2])),
        graph.call(name, x, int8(2 * c, 1, 3, 2), torch.randn(2 * c), None, 50, [1, 2], [1, 0],
                   [2, 1], c),
        graph.call(name, x, int8(4, c, 2, 3), torch.randn(4), None, 9.0, [1, 1], [1, 0, 2, 1]),
        graph.call(name, graph.call("aten.pad.default", x, [1, 0, 2, 1], "constant", 0.0),
                   int8(4, c, 2, 3), torch.randn(4), None, 9.0, [1, 2], [1, 1])]
    engine = exactly(graph, *outputs)
    called = [call for _, call, *_ in engine.steps(*graph.values)]
    assert "aten.pad.default" not in called and "aten.relu.default" not in called


def test_int8_weights_are_arranged_once():
    graph = Graph()
    x = graph.input(torch.randn(2, 64, 5, 5))
    weight = int8(128, 64, 3, 3)
    y = graph.call("bitkernels.int8_conv2d.default", x, weight, torch.randn(128), None, 20.0)
    flat = graph.call("aten.flatten.using_ints", y, 1)
    z = graph.call("bitkernels.int8_linear.default", flat, int8(7, 1152), torch.randn(7),
                   torch.randn(7), 0.5)
    engine = exactly(graph, z)
    constants, _ = engine.memory(*graph.values)
    assert engine(torch.randn(0, 64, 5, 5))[0].shape == (0, 7)
    assert engine.memory(torch.randn(3, 64, 5, 5))[0] == constants


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
def test_int8_linear(shape):
    graph = Graph()
    x = graph.input(torch.randn(shape), free=())
    y = graph.call("bitkernels.int8_linear.default", x, int8(33, 4), torch.randn(33),
                   torch.randn(33), 40.0)
    exactly(graph, y, graph.call("aten.relu6.default", graph.call(
        "bitkernels.int8_linear.default", y, int8(1, 33), torch.randn(1), None, 0.1)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels, groups", [(1, 1), (31, 1), (33, 1), (66, 2), (64, 2), (3, 3)])
def test_words(batch, channels, groups):
    """Every operator on words, with all parts of the epilogue."""
    graph = Graph()
    x = graph.input(laid_out((batch, channels, 7, 6), "rows" if batch == 1 else "planes"))
    words = graph.call("bitkernels.sign_pack.default", x, torch.randn(channels), 1)
    each = graph.call("aten.mean.dim", x, [2, 3], True)
    shifted = graph.call("bitkernels.sign_pack.default", x, each, 1)
    cout = 11 * groups
    weight = ops.sign_pack(torch.randn(cout, channels // groups, 3, 2), dim=1)

    def vector():
        return torch.randn(cout)

    kwargs = dict(weight_words=weight, channels=channels, stride=[2, 1], groups=groups)
    real = graph.call("bitkernels.packed_conv2d.default", words=words, padding=[1, 2], **kwargs,
                      clamp_min=-3.0, scale=vector(), bias=vector(), dtype={"dtype": "float32"})
    both = graph.call("bitkernels.packed_conv2d.both", words=shifted, padding=[1, 1, 2, 2],
                      pad_value=-1, residual=real, shift_in=vector(), slope=vector(),
                      shift_out=vector(), sign_shift=vector(), **kwargs)
    first, second = (graph.call("size.getitem", both, i) for i in (0, 1))
    bounds = torch.sort(torch.randint(-9, 9, (2, cout), dtype=torch.int32), 0)[0]
    packed = graph.call("bitkernels.packed_conv2d.packed", words=words, threshold=bounds,
                        pad_value=1, padding=[1, 1], dilation=[1, 2], **kwargs)
    pool = graph.call("bitkernels.packed_max_pool2d.default", second, [3, 2], [2, 1], [1, 1],
                      [1, 1], True)
    up = graph.call("bitkernels.packed_conv_transpose2d.default", words, weight, channels, [2, 3],
                    [1, 0], [1, 2], groups, [1, 2], scale=vector(), bias=vector())
    more = graph.call("bitkernels.packed_conv_transpose2d.default", words, weight, channels, [1, 1],
                      [1, 1], [0, 0], groups, [1, 1])
    image = graph.call("bitkernels.unpack.default", pool, cout, {"dtype": "float32"}, 1)
    last = graph.call("bitkernels.unpack.default", pool, cout)
    active = graph.call("bitkernels.rprelu.default", first, vector(), vector(), vector())
    graph.check(words, shifted, real, first, second, packed, pool, up, more, image, last, active,
                graph.call("aten.relu.default", image), graph.call("aten.relu.default", last),
                graph.call("bitkernels.rsign.default", first, vector()),
                graph.call("aten.cat.default", [image, image], 1),
                graph.call("aten.cat.default", [pool, pool], -1),
                graph.call("aten.flatten.using_ints", pool, 1))


def test_empty_batch():
    graph = Graph()
    x = graph.input(torch.randn(2, 33, 4, 4))
    words = graph.call("bitkernels.sign_pack.default", x, None, 1)
    y = graph.call("bitkernels.packed_conv2d.default", words,
                   ops.sign_pack(torch.randn(8, 33, 1, 1), dim=1), 33)
    z = graph.call("aten.conv2d.default", graph.call("aten.relu.default", y),
                   torch.randn(4, 8, 3, 3))
    out = graph.call("aten.flatten.using_ints", z, 1)
    engine = graph.check(out)
    assert engine(torch.randn(0, 33, 4, 4))[0].shape == (0, 16)


@pytest.mark.parametrize("call, args, message", [
    ("aten.matmul.default", (torch.randn(2),), "calls 'aten.matmul.default', which"),
    ("aten.conv2d.default", (torch.randn(2, 5, 1, 1),), "weight must be of 1 groups for 3"),
    ("aten.conv2d.default", (torch.randn(2, 3, 9, 9),), "weight must be not larger than"),
    ("aten.conv2d.default", (torch.randn(2, 3, 1, 1), torch.randn(3)),
     "bias must be a constant of"),
    ("aten.linear.default", (torch.randn(2, 9),), "input must be of 1 to 3 dimensions"),
    ("aten.max_pool2d.default", ([2, 2], [0, 0]), "stride must be in .1, "),
    ("aten.softmax.int", (7,), r"dim must be in \[-4, 3\], got 7"),
    ("aten.reshape.default", ([7, -1],), "shape must be of 96 elements"),
    ("aten.to.dtype", ({"dtype": "bfloat16"},), "dtype must be float32: this engine casts nothing"),
    ("bitkernels.sign_pack.default", (torch.randn(9), 1), r"shift must be of shape \(3,\)"),
    ("bitkernels.packed_conv2d.default", (torch.zeros(8, 1, 1, 1).int(), 3),
     "words must be int32 words of 4 dimensions"),
    ("bitkernels.int8_conv2d.default", (torch.zeros(4, 3, 1, 1), torch.randn(4), None, 1.0),
     "weight must be a constant, int8 of 4"),
    ("bitkernels.int8_conv2d.default", (int8(4, 2, 1, 1), torch.randn(4), None, 1.0),
     "weight must be of 1 groups for 3"),
    ("bitkernels.int8_conv2d.default", (int8(4, 3, 1, 1), torch.randn(3), None, 1.0),
     r"scale must be a constant of shape \(4,\)"),
    ("bitkernels.int8_conv2d.default", (int8(4, 3, 1, 1), torch.randn(4), None, 0.0),
     "steps must be a positive float32 number, got 0"),
    ("bitkernels.int8_conv2d.default", (int8(4, 3, 210, 210), torch.randn(4), None, 1.0, 1, 200),
     "weight must be of at most 132104 products"),
    ("bitkernels.int8_linear.default", (int8(4, 3), torch.randn(4), None, 1.0),
     "input must be of 1 to 3 dimensions, 3 wide"),
    ("aten.mul.Tensor", (int8(2, 3, 4, 4),), "as a weight of int8 layers only"),
    ("aten.relu.default", (3,), "has too many arguments"),
    ("aten.prelu.default", (), "lacks weight"),
    ("aten.permute.default", ([0, 1, 1, 2],), "dims must be each of 4 dimensions once"),
])
def test_refused(call, args, message):
    graph = Graph()
    x = graph.input(torch.randn(2, 3, 4, 4))
    with pytest.raises(EngineError, match=message):
        graph.check(graph.call(call, x, *args))
