"""What torch asks of every operator: opcheck, compile, dynamic shapes, export, fake strides."""

from __future__ import annotations

import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bitkernels.backends import cpu
from bitkernels.ops._record import OPERATORS
from bitkernels.ops._samples import Values
from bitkernels_tests import forked
from bitkernels_tests.cases import dyadic, reals, words_of

ops = torch.ops.bitkernels


def leaf(t):
    return t.detach().requires_grad_()


def samples(device) -> dict[str, tuple]:
    """name -> (operator overload, args, kwargs): the samples of every record, on a device."""
    def move(t):
        return t if device == t.device else t.detach().to(device).requires_grad_(t.requires_grad)

    device = torch.device(device)
    found = {}
    for name, operator in OPERATORS.items():
        for number, sample in enumerate(operator.samples(Values())):
            args, kw = tree_map_only(torch.Tensor, move, (sample.args, sample.kw))
            called = f"{name}.{sample.overload}".rstrip(".")
            found[f"{called}-{number}"] = operator.overloads[sample.overload], args, kw
    return found


NAMES = tuple(samples("cpu"))


def test_every_overload_has_a_sample():
    sampled = {str(op) for op, _, _ in samples("cpu").values()}
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bitkernels::")
             and not n.startswith("bitkernels::_")]
    expected = {n.replace("::", ".") + ("" if "." in n else ".default") for n in names}
    assert expected and sampled == expected


# Samples of operators without a gradient, but the first of each overload. Compiling one with
# symbolic sizes runs its fake and its kernel, which the other checks do for less.
LATER = {name for name, (op, _, _) in samples("cpu").items()
         if OPERATORS[op._opname].autograd is None
         and any(other.rpartition("-")[0] == name.rpartition("-")[0]
                 for other in NAMES[:NAMES.index(name)])}
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    op, args, kw = samples(device)[name]
    checks = CHECKS if name in LATER else (*CHECKS, "test_aot_dispatch_dynamic")
    if any(isinstance(t, torch.Tensor) and t.dtype == torch.float8_e5m2 for t in args):
        checks = checks[1:]  # PyTorch (2.13) cannot look whether such an argument was changed
    torch.library.opcheck(op, args, kw, raise_exception=True, test_utils=checks)


@pytest.mark.every
@pytest.mark.parametrize("name", sorted(LATER))
def test_compiled_with_symbolic_sizes(name, device):
    op, args, kw = samples(device)[name]
    torch.library.opcheck(op, args, kw, raise_exception=True,
                          test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", NAMES)
def test_fake_and_meta_outputs_equal_eager(name, device):
    op, args, kw = samples(device)[name]
    outputs = op(*args, **kw)
    mode = FakeTensorMode()
    fake_args, fake_kw = tree_map_only(torch.Tensor, mode.from_tensor, (args, kw))
    with mode:
        fakes = op(*fake_args, **fake_kw)
    meta_args, meta_kw = tree_map_only(torch.Tensor, lambda t: t.detach().to("meta"), (args, kw))
    metas = op(*meta_args, **meta_kw)
    if isinstance(outputs, torch.Tensor):
        outputs, fakes, metas = (outputs,), (fakes,), (metas,)
    for real, fake, meta in zip(outputs, fakes, metas, strict=True):
        assert fake.device == real.device and meta.device.type == "meta"
        for other in (fake, meta):
            assert (other.shape, other.stride(), other.dtype) == \
                   (real.shape, real.stride(), real.dtype)


def block(x, weight, shift, slope, dense):
    """Every differentiable operator, in one network."""
    y = ops.rsign(x, shift)
    y = ops.binary_conv2d(y, weight, None, (1,), (1,), scale=weight.abs().mean((1, 2, 3)))
    y = ops.rprelu(y, shift, slope, shift)
    y = ops.binary_residual_block(y, weight, None, shift, slope, shift, shift, slope, shift, (1,),
                                  (1,), input_estimator="swish_sign", beta=0.1, eps=1.0)[0]
    y = ops.binary_conv2d.padding(y, weight, None, (1,), "same", pad_value=1, input_clip=40.0)
    return ops.binary_linear(y.mean((2, 3)), dense, input_estimator="identity")


def packed_block(x, weight_words, scale, dense_words):
    """The inference operators, in one network."""
    words = ops.sign_pack(x, None, 1)
    y, words = ops.packed_conv2d.both(words, weight_words, 8, (1,), (1,), scale=scale)
    words = ops.packed_max_pool2d(words, (2, 2))
    words = ops.packed_conv2d.packed(words, weight_words, 8, (1,), (1,), slope=scale)
    z = ops.packed_conv2d(words, weight_words, 8, residual=y[:, :, 1:2, 1:2], bias=scale)
    flat = ops.sign_pack(ops.unpack(words, 8).flatten(1))
    return z, ops.packed_linear(flat, dense_words, 72)


def block_inputs(batch, device):
    return (leaf(reals(batch, 8, 6, 6, device=device)), leaf(reals(8, 8, 3, 3, device=device)),
            leaf(reals(8, device=device)), leaf(reals(8, device=device)),
            leaf(reals(5, 8, device=device)))


def packed_inputs(batch, device):
    return (reals(batch, 8, 6, 6, device=device), words_of(8, 3, 3, 8, device=device),
            reals(8, device=device), words_of(5, 72, device=device))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_training_equals_eager(backend, device):
    if backend == "inductor" and device.type == "cpu":
        pytest.importorskip("torch._inductor.cpp_builder")
        try:
            torch._inductor.cpp_builder.get_cpp_compiler()
        except torch._inductor.exc.InvalidCxxCompiler:
            pytest.skip("no C++ compiler")
    inputs = block_inputs(2, device)
    expected = block(*inputs)
    weights = torch.arange(expected.numel(), device=device).view_as(expected).float()
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    y = torch.compile(block, fullgraph=True, backend=backend)(*inputs)
    grads = torch.autograd.grad((y * weights).sum(), inputs)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert all(g.any() for g in expected_grads)
    for g, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("function,make", [(packed_block, packed_inputs), (block, block_inputs)],
                         ids=["packed", "real"])
def test_compiled_inference_equals_eager(function, make, device):
    inputs = make(2, device)
    with torch.no_grad():
        expected = function(*inputs)
        y = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    for a, b in zip(y, expected, strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("function,make", [(packed_block, packed_inputs), (block, block_inputs)],
                         ids=["packed", "real"])
def test_one_compile_for_every_batch(function, make, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    fixed = make(2, device)[1:]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            x = make(batch, device)[0]
            torch._dynamo.mark_dynamic(x, 0)
            y, expected = compiled(x, *fixed), function(x, *fixed)
            for a, b in zip(y, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


class _Network(torch.nn.Module):
    def __init__(self, function, tensors):
        super().__init__()
        self.function = function
        for i, t in enumerate(tensors):
            self.register_buffer(f"t{i}", t.detach())

    def forward(self, x):
        return self.function(x, *self.buffers())


@pytest.mark.parametrize("function,make", [(packed_block, packed_inputs), (block, block_inputs)],
                         ids=["packed", "real"])
def test_export_with_dynamic_batch(function, make, device):
    x, *tensors = make(2, device)
    network = _Network(function, tensors)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(network, (x.detach(),), dynamic_shapes=({0: batch},))
        targets = {str(node.target) for node in program.graph.nodes}
        assert any(t.startswith("bitkernels.") for t in targets)
        for n in (1, 2, 7):
            other = make(n, device)[0].detach()
            for a, b in zip(program.module()(other), network(other), strict=True):
                assert torch.equal(a, b)


def test_sizes_of_0_are_computed_or_refused_and_end_no_process():
    """Every size of every operator: the kernel in use and the reference say the same."""
    said = []
    for kernel in {cpu.REFERENCE, cpu.active() or cpu.REFERENCE}:
        done = forked.run("-m", "bitkernels_tests.zero_sizes",
                          env={**os.environ, "BITKERNELS_CPU": kernel})
        lines = done.stdout.splitlines()
        assert done.returncode == 0, f"{kernel}: {lines[-1]} {done.returncode} {done.stderr}"
        assert not [line for line in lines if "failed" in line]
        said.append(lines)
    assert len(said[0]) > 500 and sum(not line.endswith("refused") for line in said[0]) > 100
    assert [pair for pair in zip(*said, strict=True) if len(set(pair)) > 1] == []


def test_threads_change_no_bit(keeps_threads):
    """Operators in use one by one, on operands of many tasks; those of a block have their own."""
    x, w = reals(3, 96, 33, 31), reals(80, 96, 3, 3)
    shift, slope = dyadic(96), dyadic(96)
    rows, filters = reals(700, 96), reals(80, 96)
    mask = words_of(3, 33, 31, 96)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        words, weight_words = ops.sign_pack(x, shift, 1), ops.sign_pack(w, None, 1)
        row_words, filter_words = ops.sign_pack(rows), ops.sign_pack(filters)
        results.append((
            words, weight_words, *ops.sign_pack_mask(x, 0.5, None, 1), ops.mask_grad(x, mask, 1),
            ops.unpack(words, 96, dim=1), ops.packed_max_pool2d(words, (2, 2)),
            ops.packed_conv2d(words, weight_words, 96, (1,), (1,)),
            *ops.packed_conv2d.both(words, weight_words, 96, (2,), (1,)),
            ops.packed_linear(row_words, filter_words, 96), ops.rsign(x, shift),
            ops.rprelu(x, shift, slope, shift), *ops.rprelu_backward(x, x, shift, slope)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_shapes_beyond_int32():
    """Shape rules on tensors of more than 2^31 elements, which only the meta device can hold."""
    x = torch.empty(70000, 256, 16, 16, device="meta")
    w = torch.empty(512, 256, 3, 3, device="meta")
    words = ops.sign_pack(x, None, 1)
    assert words.shape == (70000, 16, 16, 8)
    assert ops.unpack(words, 256, torch.float16, 1).shape == x.shape
    y, signs = ops.packed_conv2d.both(words, ops.sign_pack(w, None, 1), 256, (1,), (1,))
    assert y.shape == (70000, 512, 16, 16) and y.stride() == (2**17, 1, 2**13, 512)
    assert signs.shape == (70000, 16, 16, 16) and y.numel() > 2**33
    assert ops.binary_conv2d(x, w, None, (1,), (1,)).stride() == (2**17, 256, 16, 1)
    rows = torch.empty(2**22, 1024, device="meta")
    assert ops.binary_linear(rows, torch.empty(2048, 1024, device="meta")).numel() == 2**33
    wide = torch.empty(1, 2**32 + 1, device="meta")
    assert ops.sign_pack(wide).shape == (1, 2**27 + 1)


RAW = tuple(name for name, (op, _, _) in samples("cpu").items()
            if OPERATORS[op._opname].autograd is None)


@pytest.mark.parametrize("name", RAW)
def test_raw_operators_refuse_gradients(name, device):
    op, args, kw = samples(device)[name]
    real = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    for i in real:
        wanting = [leaf(a) if j == i else a for j, a in enumerate(args)]
        with pytest.raises(RuntimeError, match="must not require grad"):
            op(*wanting, **kw)
