"""bitkernels.nn.MaxPool2d: PyTorch's values and gradients, one byte an output kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bitkernels.nn as bnn
from bitkernels.nn import pool
from bitkernels.nn.pool import _Geometry
from bitkernels_tests.cases import FORMATS

WINDOWS = (dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=2), dict(kernel_size=1),
           dict(kernel_size=(3, 2), stride=(1, 3), padding=(1, 0)),
           dict(kernel_size=3, stride=2, ceil_mode=True),
           dict(kernel_size=(2, 3), stride=2, padding=1, dilation=(2, 3), ceil_mode=True),
           dict(kernel_size=(1, 5), padding=(0, 2)),
           dict(kernel_size=(15, 17), stride=3, padding=(7, 8)))
# Windows whose positions a byte does not tell apart: PyTorch's own function runs.
BEYOND = (dict(kernel_size=16, stride=2, padding=8), dict(kernel_size=(2, 9), padding=(0, 4)))


def result(layer, x, grad=None):
    """(output, gradient of the input, bytes kept by tensors other than the input)."""
    x = x.detach().requires_grad_()
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = layer(x)
    own = kept.pop(x.untyped_storage().data_ptr(), 0)
    out.backward(torch.arange(out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
                 if grad is None else grad)
    return out, x.grad, own, sum(kept.values())


def same(options, x) -> tuple[int, int]:
    want, want_grad, *_ = result(nn.MaxPool2d(**options), x)
    got, grad, own, kept = result(bnn.MaxPool2d(**options), x)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got.stride() == want.stride() and grad.stride() == want_grad.stride()
    if got.dtype in (torch.float16, torch.bfloat16) and pool._on_gpu(x):  # added in float32
        want_grad = result(nn.MaxPool2d(**options), x.float())[1].to(got.dtype)
    assert torch.equal(grad, want_grad)
    return own, kept - got.numel()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_equals_torch_and_keeps_a_byte_an_output(options, format, device):
    x = torch.randint(-3, 4, (2, 3, 20, 17), device=device).float()  # many equal maxima
    assert same(options, x.contiguous(memory_format=format)) == (0, 0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
def test_dtypes(dtype, device):
    assert same(WINDOWS[0], torch.randn(2, 5, 8, 9).to(device, dtype)) == (0, 0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("size", ((2, 8), (8, 2), (2, 2)))
def test_windows_between_whose_taps_the_image_lies(size, format, device):
    """PyTorch's backward writes beyond the image there, and would end the process."""
    layer = bnn.MaxPool2d(2, 3, 1, dilation=3)
    x = torch.randn(2, 3, *size, device=device).contiguous(memory_format=format)
    want = nn.functional.max_pool2d(x, 2, 3, 1, dilation=3)
    out, grad, *_ = result(layer, x)
    assert torch.equal(out, want) and bool(out.isinf().any())
    given = torch.arange(out.numel(), dtype=out.dtype, device=device).view(out.shape)
    assert grad.sum() == given[out.isfinite()].sum()
    assert result(layer, x[0])[1].shape == x[0].shape


def test_views_unbatched_and_empty(device):
    x = torch.randn(2, 4, 12, 14, device=device)
    for view in (x[0], x[:, ::2], x[..., 1::2], x.transpose(2, 3), x[:1].expand(3, 4, 12, 14),
                 x[:0]):
        assert same(WINDOWS[0], view) == (0, 0)


def test_not_a_number_and_infinities(device):
    x = torch.randn(1, 2, 9, 9, device=device)
    x[0, 0, 4, 4], x[0, 1] = float("nan"), -float("inf")
    x[0, 0, 0, 0] = float("inf")
    assert same(WINDOWS[0], x) == (0, 0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_index_outside_of_its_window(options, format):
    """On GPUs the index is 0 where all of a window is -inf: kept as such, not looked up outside."""
    x = torch.randn(2, 3, 20, 17).contiguous(memory_format=format)
    indices = nn.MaxPool2d(**options, return_indices=True)(x)[1]
    indices[:, 1] = 0
    geometry = _Geometry(bnn.MaxPool2d(**options), 17)
    numbers = geometry.to_numbers(indices.clone())
    assert numbers.dtype == torch.uint8 and numbers.stride() == indices.stride()
    assert torch.equal(geometry.to_indices(numbers), indices)


@pytest.mark.parametrize("options", BEYOND, ids=str)
def test_windows_that_a_byte_does_not_cover(options):
    x = torch.randn(1, 2, 20, 8)
    own, _ = same(options, x)
    assert own == 4 * x.numel()


def test_where_nothing_is_kept_it_is_torchs():
    x, layer = torch.randn(1, 2, 8, 8), bnn.MaxPool2d(2)
    assert layer(x).grad_fn is None
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert layer(leaf).grad_fn is None
    out, indices = bnn.MaxPool2d(2, return_indices=True)(leaf)
    assert indices.dtype == torch.int64 and out.requires_grad
    with pytest.raises(RuntimeError, match="3D or 4D"):
        layer(torch.randn(2, 2, requires_grad=True))


def test_it_is_torchs_layer_to_others():
    layer = bnn.MaxPool2d(3, 2, 1)
    assert isinstance(layer, nn.MaxPool2d) and not layer.state_dict()
    assert repr(layer) == repr(nn.MaxPool2d(3, 2, 1))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is bnn.MaxPool2d and twin.stride == 2
    network = nn.Sequential(nn.Conv2d(3, 4, 3), bnn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Flatten(),
                            nn.Linear(4, 2))
    assert type(bnn.binarize(network)[1]) is bnn.MaxPool2d


def test_checkpoint():
    layer, x = bnn.MaxPool2d(3, 2, 1), torch.randn(2, 3, 8, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, result(layer, x, torch.ones(2, 3, 4, 4))[1])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_second_derivative(format):
    """As PyTorch's: that of the elements that were the maxima."""
    x = torch.randn(2, 3, 8, 9).contiguous(memory_format=format).requires_grad_()
    grads = []
    for layer in (nn.MaxPool2d(3, 2, 1), bnn.MaxPool2d(3, 2, 1)):
        (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert grads[0].any() and torch.equal(*grads)


def test_hooks_may_change_the_layout():
    x = torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.tolist(), torch.tensor):
        out = bnn.MaxPool2d(3, 2, 1)(x)
    out.sum().backward()
    assert torch.equal(x.grad, result(nn.MaxPool2d(3, 2, 1), x, torch.ones_like(out))[1])


@pytest.mark.parametrize("options", (
    dict(kernel_size=(3,)), dict(kernel_size=3, stride=[2], padding=(1,), dilation=(1,)),
    dict(kernel_size=2, stride=[])), ids=str)
def test_arguments_in_every_form_that_torch_takes(options):
    same(options, torch.randn(1, 2, 8, 8))


@pytest.mark.parametrize("options", (
    dict(kernel_size=0), dict(kernel_size=3.0), dict(kernel_size=(1, 2, 3)), dict(kernel_size=None),
    dict(kernel_size=3, padding=2), dict(kernel_size=3, stride=0), dict(kernel_size=3, dilation=0),
    dict(kernel_size=3, dilation=9)), ids=str)
def test_errors_are_torchs(options):
    x, errors = torch.randn(1, 2, 8, 8, requires_grad=True), []
    for layer in (nn.MaxPool2d(**options), bnn.MaxPool2d(**options)):
        with pytest.raises((RuntimeError, TypeError)) as error:
            layer(x)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces():
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), bnn.MaxPool2d(2)), torch.randn(1, 3, 8, 8)
    for traced in (torch.jit.trace(network, x), torch.fx.symbolic_trace(network)):
        assert torch.equal(traced(x), network(x))


def test_compiles_with_dynamic_batch():
    """To Inductor's own pooling, which keeps a byte an output as well."""
    layer = bnn.MaxPool2d(3, 2, 1)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 8, 8)
        ours, inductors = result(layer, x), result(compiled, x)
        assert all(torch.equal(a, b) for a, b in zip(ours[:2], inductors[:2], strict=True))
        assert ours[2:] == inductors[2:] == (0, ours[0].numel())
    network = nn.Sequential(nn.Conv2d(3, 3, 1), layer).eval()
    torch.export.export(network, (torch.randn(1, 3, 8, 8),))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The layer takes its operators, which a CPU has as well."""
    monkeypatch.setattr(pool, "_on_gpu", lambda t: True)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_operators_equal_torch_and_keep_a_byte_an_output(options, format):
    x = torch.randint(-3, 4, (2, 3, 20, 17)).float().contiguous(memory_format=format)
    assert same(options, x) == (0, 0)
    assert pool._has_operator(bnn.MaxPool2d(**options), x)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_operators_on_views_unbatched_and_empty():
    test_views_unbatched_and_empty("cpu")
    test_not_a_number_and_infinities("cpu")
    test_checkpoint()
    x = torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        out = bnn.MaxPool2d(3, 2, 1)(x)
    out.sum().backward()
    assert torch.equal(x.grad, result(nn.MaxPool2d(3, 2, 1), x, torch.ones_like(out))[1])
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        test_dtypes(dtype, "cpu")
    for format in FORMATS:
        test_second_derivative(format)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("options", (
    BEYOND[0], dict(kernel_size=(3,)), dict(kernel_size=2, stride=[]), dict(kernel_size=0),
    dict(kernel_size=3.0), dict(kernel_size=(1, 2, 3)), dict(kernel_size=3, padding=2),
    dict(kernel_size=3, stride=0), dict(kernel_size=3, dilation=0),
    dict(kernel_size=3, dilation=9), dict(kernel_size=3, padding=-1)), ids=str)
def test_operators_are_left_alone_where_torch_has_to_speak(options):
    """More taps than a byte tells apart, and arguments that it refuses or reads otherwise."""
    x, ends = torch.randn(1, 2, 8, 8, requires_grad=True), []
    for layer in (nn.MaxPool2d(**options), bnn.MaxPool2d(**options)):
        try:
            ends.append(type(layer(x).grad_fn).__name__)
        except (RuntimeError, TypeError) as error:
            ends.append((type(error), str(error)))
    assert ends[0] == ends[1]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dynamic", (False, True))
def test_operators_compile_whole(dynamic):
    """The same operators as eagerly, one forward and one backward, under autocast too."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), bnn.MaxPool2d(3, 2, 1)).to(
        memory_format=torch.channels_last)
    seen = []

    def backend(graph, inputs):
        return torch._dynamo.backends.common.aot_autograd(
            fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    def keep(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes
                    if node.op == "call_function" and "pool" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend=backend)
    x = torch.randn(2, 3, 9, 10).contiguous(memory_format=torch.channels_last)
    for wide in (True, False):
        grads = []
        for run in (network, compiled):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
                out = run(leaf)
            assert out.dtype == (torch.float32 if wide else torch.bfloat16)
            out.sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)
    assert len(seen) == 4 and seen[:2] == ["bitkernels.max_pool2d_with_offsets.default",
                                           "bitkernels.max_pool2d_with_offsets_backward.default"]
    torch._dynamo.reset()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_export_has_torchs_pooling():
    """It keeps no backward, and other toolchains know it."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1), bnn.MaxPool2d(3, 2, 1))
    program = torch.export.export(network, (torch.randn(1, 3, 8, 8),))
    assert "aten.max_pool2d" in str(program.graph) and "bitkernels" not in str(program.graph)
