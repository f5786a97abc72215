"""A weight's image follows its words: no way to change them leaves old ones answering."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from bitkernels.nn import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConvTranspose2d,
    BinaryLinear,
    PackedConv2d,
    pack,
)
from bitkernels.packed import WeightImage
from bitkernels_tests.cases import reals

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "conv2d": (lambda: BinaryConv2d(36, 20, 3, padding=1, weight_scale="detached"), (2, 36, 5, 6)),
    "grouped": (lambda: BinaryConv2d(36, 20, 3, groups=2), (2, 36, 5, 6)),
    "transposed": (lambda: BinaryConvTranspose2d(36, 20, 3, 2, weight_scale="xnor"), (2, 36, 5, 6)),
    "conv1d": (lambda: BinaryConv1d(36, 20, 3), (2, 36, 9)),
    "linear": (lambda: BinaryLinear(67, 9, weight_scale="xnor"), (3, 67))}


@pytest.fixture(params=LAYERS)
def pair(request):
    """Two packed layers of other weights, both used once, an input, and the second one's output."""
    make, shape = LAYERS[request.param]
    a, b, x = make().pack(), make().pack(), reals(*shape)
    expected = b(x).clone()
    assert not torch.equal(a(x), expected)
    return a, b, x, expected


def doubled(words, *key):
    return words * 2 + sum(key)


def test_a_value_is_made_once_for_each_key():
    calls = []
    words = torch.arange(4)
    image = WeightImage(lambda words, *key: (calls.append(key), doubled(words, *key))[1])
    for _ in range(3):
        assert torch.equal(image(words), words * 2)
        assert torch.equal(image(words, 1), words * 2 + 1)
    assert calls == [(), (1,)]
    words[1:].mul_(3)  # a view shares the version
    assert torch.equal(image(words), words * 2) and len(calls) == 3
    assert torch.equal(image(words, 1), words * 2 + 1) and len(calls) == 4
    torch.autograd.graph.increment_version(words)
    image(words)
    assert len(calls) == 5
    words.data = torch.ones(4, dtype=torch.int64)  # another memory, the same version
    assert torch.equal(image(words), torch.full((4,), 2))
    for value in range(20):  # freed and taken again, often at the same address
        words.data = torch.empty(0, dtype=torch.int64)
        words.data = torch.full((4,), value)
        assert torch.equal(image(words), torch.full((4,), 2 * value))
    both = torch.arange(8)
    for half in both.chunk(2):  # one storage, two addresses
        words.data = half
        assert torch.equal(image(words), 2 * half)


def test_the_words_are_not_kept_alive():
    image, words = WeightImage(doubled), torch.arange(4)
    value, alive = weakref.ref(image(words)), weakref.ref(words)
    assert value() is image(words)
    del words
    gc.collect()
    assert alive() is None and value() is None and not image._kept
    words = torch.arange(4)
    value, gone = weakref.ref(image(words)), weakref.ref(image)
    del image  # no cycle: it goes at once, with all that it kept
    assert gone() is None and value() is None
    del words


def test_nothing_is_kept_without_a_version_or_for_other_processes():
    image = WeightImage(doubled)
    with torch.inference_mode():
        words = torch.arange(4)
        assert image(words) is None
    assert image(words) is None  # an inference tensor, outside of inference mode
    shared = torch.arange(4)
    image(shared)
    shared.share_memory_()
    assert image(shared) is None
    assert torch.vmap(lambda s: torch.tensor(image(s) is None) & (s >= 0))(
        torch.ones(2, 2)).all()
    normal = torch.arange(4)
    with torch.inference_mode():
        value = image(normal)
        assert not value.is_inference()
        normal.add_(1)
    assert torch.equal(image(normal), normal * 2)


def load(a, b):
    a.load_state_dict(b.state_dict())


def assign(a, b):
    a.load_state_dict(copy.deepcopy(b.state_dict()), assign=True)


def swap(a, b):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        a.load_state_dict(b.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def in_place(a, b):
    for name, tensor in a.state_dict().items():
        tensor.copy_(b.state_dict()[name])


def in_inference_mode(a, b):
    with torch.inference_mode():
        in_place(a, b)


def rows(a, b):
    a.weight_words[:5] = b.weight_words[:5]
    a.weight_words[5:].copy_(b.weight_words[5:])
    a.scale, a.bias = b.scale, b.bias


def attribute(a, b):
    for name in ("weight_words", "scale", "bias"):
        setattr(a, name, getattr(b, name))


def data(a, b):
    for name, buffer in a.named_buffers():
        buffer.data = getattr(b, name).clone()


def buffers(a, b):  # as accelerate's set_module_tensor_to_device
    for name in a._buffers:
        a._buffers[name] = b._buffers[name]


@pytest.mark.parametrize("change", [load, assign, swap, in_place, in_inference_mode, rows,
                                    attribute, data, buffers], ids=lambda f: f.__name__)
def test_changed_words_answer(pair, change):
    a, b, x, expected = pair
    change(a, b)
    assert torch.equal(a(x), expected)
    a.weight_words.bitwise_not_()
    assert torch.equal(a(x), copy.deepcopy(a)(x)) and not torch.equal(a(x), expected)


def test_functional_call_uses_the_tensors_that_it_is_given(pair):
    a, b, x, expected = pair
    own = a(x).clone()
    state = {name: tensor.clone() for name, tensor in b.state_dict().items()}
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(a, state, (x,)), expected)
        assert torch.equal(a(x), own)
    for name, tensor in state.items():
        tensor.copy_(a.state_dict()[name])
    assert torch.equal(torch.func.functional_call(a, state, (x,)), own)
    assert torch.equal(a(x), own)


def test_meta_layers_load(pair):
    a, b, x, expected = pair
    for _ in range(2):
        a.to("meta")
        assert a(x.to("meta")).shape == expected.shape
        a.to_empty(device="cpu")
        assert a.scale is None or a.scale.dtype == torch.float32
        a.load_state_dict(b.state_dict())
        assert torch.equal(a(x), expected)


def test_memory_formats_leave_the_words(pair):
    a, b, x, expected = pair
    b.to(memory_format=torch.channels_last)
    assert torch.equal(b(x), expected) and b.weight_words.is_contiguous()
    assert torch.equal(nn.Sequential(b).to("cpu", torch.float16, memory_format=torch.channels_last)
                       (x), expected)


def test_copies_follow_their_own_words(pair):
    a, b, x, expected = pair
    stream = io.BytesIO()
    torch.save(b, stream)
    stream.seek(0)
    size = len(stream.getvalue())
    copies = [copy.deepcopy(b), pickle.loads(pickle.dumps(b)),
              torch.load(stream, weights_only=False)]
    b.weight_words.zero_()
    for copied in copies:
        assert torch.equal(copied(x), expected)
        copied.load_state_dict(a.state_dict())
        assert torch.equal(copied(x), a(x))
    torch.save(pickle.loads(pickle.dumps(a)), unused := io.BytesIO())
    assert len(unused.getvalue()) == size  # a layer that ran saves no more than one that did not


def test_shared_memory_is_read_anew(pair):
    a, b, x, expected = pair
    a.share_memory()
    other = copy.deepcopy(a)
    other.weight_words.set_(a.weight_words.untyped_storage(), 0, a.weight_words.shape)
    a(x), other(x)
    a.load_state_dict(b.state_dict())
    for name in ("scale", "bias"):
        setattr(other, name, getattr(b, name))
    assert torch.equal(other(x), expected)


def test_inference_tensors_are_read_anew(pair):
    a, b, x, expected = pair
    with torch.inference_mode():
        a.load_state_dict({k: v.clone() for k, v in a.state_dict().items()}, assign=True)
        assert a.weight_words.is_inference()
        a(x)
        in_place(a, b)
        assert torch.equal(a(x), expected)
    assert torch.equal(a(x), expected)


def test_threads_on_one_layer(pair):
    a, b, x, expected = pair
    own, wrong = a(x).clone(), []

    def run(layer, right):
        for _ in range(50):
            layer._image.clear()
            if not torch.equal(layer(x), right):
                wrong.append(layer)

    # Another layer with the same cache but its own words, as functional_call has them by turns.
    other = copy.deepcopy(b)
    other._image = a._image
    threads = [threading.Thread(target=run, args=args)
               for args in 2 * [(a, own), (other, expected)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_graphs_hold_words_and_no_constants(pair):
    a, b, x, expected = pair
    torch._dynamo.reset()
    compiled = torch.compile(a, fullgraph=True, backend="eager")
    program = torch.export.export(a, (x,))
    graph = make_fx(lambda words, x: torch.func.functional_call(a, {"weight_words": words},
                                                                (x,)))(a.weight_words, x)
    traced = torch.jit.trace(a, x, check_trace=False)
    assert torch.equal(compiled(x), a(x)) and torch.equal(traced(x), a(x))
    assert set(program.state_dict) == set(a.state_dict()) and not program.constants
    assert not any(name.startswith("_tensor_constant") and tensor.dtype == torch.int32
                   for name, tensor in graph.named_buffers())
    in_place(a, b)
    assert torch.equal(compiled(x), expected) and torch.equal(traced(x), expected)
    scale_and_bias_of_b = graph(b.weight_words, x)
    assert torch.equal(scale_and_bias_of_b, expected)


def test_accelerate_offloads_and_dispatches(pair):
    accelerate = pytest.importorskip("accelerate")
    a, b, x, expected = pair
    model = accelerate.cpu_offload(nn.Sequential(a, nn.Identity()), execution_device="cpu",
                                   offload_buffers=True,
                                   state_dict={f"0.{k}": v for k, v in b.state_dict().items()})
    assert a.weight_words.is_meta
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert a.weight_words.is_meta
    model = accelerate.dispatch_model(nn.Sequential(b), {"": "cpu"})
    assert torch.equal(model(x), expected)
    accelerate.utils.set_module_tensor_to_device(model, "0.weight_words", "cpu",
                                                 value=~b.weight_words)
    assert torch.equal(model(x), copy.deepcopy(b)(x)) and not torch.equal(model(x), expected)


def test_distributed_checkpoints_load(pair, tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    a, b, x, expected = pair
    checkpoint.save(b.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    checkpoint.load(a.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(a(x), expected)


def test_a_gpu_layer_has_no_tiles():
    layer = BinaryConv2d(8, 8, 3).pack()
    assert not layer._image._kept  # before the first call on a CPU
    layer.to("meta")(torch.zeros(1, 8, 4, 4, device="meta"))
    assert not layer._image._kept


def test_layers_pickled_with_the_older_names(pair):
    """`_tiles`, a `bitkernels.nn.derived.Derived` of the same makers."""
    a, b, x, expected = pair
    b.__dict__["_tiles"] = b.__dict__.pop("_image")
    data = pickle.dumps(b, protocol=0).replace(b"cbitkernels.packed\nWeightImage\n",
                                               b"cbitkernels.nn.derived\nDerived\n")
    assert b"Derived" in data
    loaded = pickle.loads(data)
    assert torch.equal(loaded(x), expected) and "_tiles" not in vars(loaded)
    a.load_state_dict(loaded.state_dict())
    assert torch.equal(a(x), expected)


@pytest.mark.parametrize("cast", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16),
    lambda m: m.type(torch.float16), lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    lambda m: nn.ModuleList([nn.Sequential(m)]).half()[0][0]], ids=range(7))
def test_casts_leave_the_buffers(pair, cast):
    a, b, x, expected = pair
    state = {name: tensor.clone() for name, tensor in b.state_dict().items()}
    b = cast(b)
    for name, tensor in b.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])
    assert torch.equal(b(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_default_dtype_leaves_the_buffers(dtype):
    layer, x = BinaryConv2d(36, 12, 3, weight_scale="detached"), reals(1, 36, 5, 5)
    expected = layer(x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for twin in (layer.pack(), pack(nn.Sequential(layer))[0],
                     PackedConv2d(36, 12, 3, scale=True)):
            assert twin.scale.dtype == twin.bias.dtype == torch.float32
            twin.load_state_dict(layer.pack().state_dict())
            assert torch.equal(twin(x), expected)
    finally:
        torch.set_default_dtype(before)


def test_rounded_vectors_that_are_assigned_are_float32_again():
    layer, x = BinaryConv2d(36, 12, 3, weight_scale="detached").pack(), reals(1, 36, 5, 5)
    state = {k: v.half() if v.is_floating_point() else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.scale.dtype == layer.bias.dtype == torch.float32
    assert torch.equal(layer.scale, state["scale"].float())
    layer(x)
