"""What the C interface says of a network, refuses, and makes of broken files."""

from __future__ import annotations

import ctypes
import random
import threading

import pytest
import torch

import bitkernels
from bitkernels_tests.network.engine import (
    Engine,
    EngineError,
    Graph,
    TensorOf,
    described,
    library,
)

ops = torch.ops.bitkernels


@pytest.fixture(scope="module")
def graph():
    graph = Graph()
    x = graph.input(torch.randn(2, 5, 8, 8))
    words = graph.call("bitkernels.sign_pack.default", x, None, 1)
    y = graph.call("bitkernels.packed_conv2d.default", words,
                   ops.sign_pack(torch.randn(40, 5, 3, 3), dim=1), 5, padding=[1, 1], pad_value=1)
    z = graph.call("aten.conv2d.default", y, torch.randn(6, 40, 3, 3), torch.randn(6))
    flat = graph.call("aten.mean.dim", z, [2, 3])
    logits = graph.call("aten.linear.default", flat, torch.randn(4, 6), torch.randn(4))
    graph.content = graph.file(logits, z)
    return graph


@pytest.fixture
def engine(graph):
    return Engine(graph.content)


def test_descriptions(engine):
    assert library.bk_version().decode() == bitkernels.__version__
    assert library.bk_kernel().decode() in ("avx512", "avx2", "neon", "scalar")
    assert library.bk_input_count(engine.handle) == 1
    assert library.bk_input_name(engine.handle, 0) == b"input_0"
    assert library.bk_input_name(engine.handle, 1) is None
    found = TensorOf()
    assert library.bk_input(engine.handle, 0, ctypes.byref(found)) == 0
    assert (found.dtype, found.rank, list(found.sizes[:4])) == (0, 4, [-1, 5, 8, 8])
    x = described(torch.randn(3, 5, 8, 8))
    assert library.bk_output(engine.handle, 1, ctypes.byref(x), ctypes.byref(found)) == 0
    assert list(found.sizes[:4]) == [3, 6, 6, 6] and list(found.strides[:4]) == [216, 1, 36, 6]
    assert library.bk_bytes(ctypes.byref(found)) == 3 * 6 * 36 * 4


def test_a_host_keeps_its_threads():
    assert library.bk_set_threads(2) == 1
    assert b"LibTorch" in library.bk_error()


@pytest.mark.parametrize("x, message", [
    (torch.randn(2, 5, 8, 9), r"'input_0' must be float32 of shape \(2, 5, 8, 8\), got .*8, 9"),
    (torch.randn(2, 5, 8), "got float32 of shape"), (torch.ones(2, 5, 8, 8).int(), "got int32")])
def test_other_inputs(engine, x, message):
    with pytest.raises(EngineError, match=message):
        engine(x)


def test_other_outputs(engine):
    x = torch.randn(2, 5, 8, 8)
    given, outputs, tensors = engine.prepared(x)
    tensors[0].fill_(7)
    outputs[1].strides[3] = 1  # as of planes
    assert library.bk_run(engine.handle, given, outputs) == 1
    assert b"output 1 must be" in library.bk_error() and bool((tensors[0] == 7).all())
    given, outputs, tensors = engine.prepared(x)
    outputs[0].data = None
    assert library.bk_run(engine.handle, given, outputs) == 1
    assert library.bk_run(engine.handle, None, outputs) == 1
    assert library.bk_run(None, given, outputs) == 1
    assert library.bk_run_timed(engine.handle, given, outputs, None, 3) == 1


def test_strides_of_0_mean_dense(engine):
    x = torch.randn(2, 5, 8, 8)
    given, outputs, tensors = engine.prepared(x)
    given[0].strides[:] = [0] * 8
    outputs[0].strides[:] = [0] * 8
    assert library.bk_run(engine.handle, given, outputs) == 0
    assert torch.equal(tensors[0], engine(x)[0])


def test_more_sizes_than_are_kept(graph, engine):
    images = [torch.randn(n, 5, 8, 8) for n in range(1, 13)]
    for x in images + images[::-1]:
        torch.testing.assert_close(engine(x)[0], graph.expected([x])[0], rtol=1e-4, atol=1e-4)


def test_threads_share_a_network(engine):
    images = [torch.randn(1 + i % 2, 5, 8, 8) for i in range(4)]
    expected = [engine(x) for x in images]
    wrong = []

    def use(i: int) -> None:
        for _ in range(50):
            if not all(map(torch.equal, engine(images[i]), expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_named_sizes_agree():
    graph = Graph()
    a, b = graph.input(torch.randn(2, 3)), graph.input(torch.randn(2, 3))
    engine = graph.check(graph.call("aten.add.Tensor", a, b))
    with pytest.raises(EngineError, match="'input_1' must be"):
        engine(torch.randn(4, 3), torch.randn(5, 3))


def test_sizes_that_a_file_only_says():
    """Loading takes no memory for them."""
    graph = Graph()
    x = graph.input(torch.randn(1, 2))
    y = graph.call("aten.relu.default", graph.call("aten.mul.Tensor", x, 2.0))
    graph.inputs[0][2:] = [["n", 2**40], [1, 2**40]]
    Engine(graph.file(y))
    with pytest.raises(EngineError, match="at most 1048576 channels"):
        Engine(graph.file(graph.call("aten.leaky_relu.default", y)))
    graph.inputs[0][2:] = [["n", 2**62], [1, 2**62]]
    with pytest.raises(EngineError, match="too large"):
        Engine(graph.file(y))


def test_other_files(graph, tmp_path):
    for metadata, message in (({"format_version": "2"}, "format version '2'.*update it"),
                              ({"format": "pt"}, "its format is 'pt'"),
                              ({"graph": "[" * 9999}, "the graph is no JSON: nested too deeply"),
                              ({"graph": "{}"}, "no inputs")):
        with pytest.raises(EngineError, match=message):
            Engine(graph.file(*graph.output, **metadata))
    with pytest.raises(EngineError, match="No such file"):
        Engine(tmp_path / "missing")
    with pytest.raises(EngineError, match="it is no file"):
        Engine(tmp_path)
    with pytest.raises(EngineError, match="not a whole one"):
        Engine(graph.content[:-1])


def test_broken_files(graph):
    """A reason or a network, never a crash; csrc/tests/network does more, under sanitizers."""
    header = 8 + int.from_bytes(graph.content[:8], "little")
    choose = random.Random(5)
    loaded = 0
    for i in range(400):
        content = bytearray(graph.content)
        for _ in range(1 + i % 2):
            at = choose.randrange(header if i % 4 else len(content))
            content[at] = choose.randrange(256)
        try:
            Engine(bytes(content[:choose.randrange(len(content))] if i % 10 == 0 else content))
            loaded += 1
        except EngineError as error:
            assert str(error).startswith("bitkernels: ") and "\n" not in str(error)
    assert 0 < loaded < 300
