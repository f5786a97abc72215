"""torch.fx: every module of the package is one node of a trace, and means what it meant."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental import optimization

import bitkernels.nn as bnn
from bitkernels import convert, metrics, models
from bitkernels_tests import module_cases as cases

pytestmark = pytest.mark.usefixtures("one_thread")

LEAVES = cases.MODULES | cases.PACKED


class Eager(torch.fx.Tracer):
    """Looks into every module, even into torch's."""

    def is_leaf_module(self, m, qualified_name):
        return False


class Recorder(torch.fx.Tracer):
    """Notes what it is asked, as feature extractors do."""

    def __init__(self):
        super().__init__()
        self.called = []

    def call_module(self, m, forward, args, kwargs):
        self.called.append(self.path_of_module(m))
        return super().call_module(m, forward, args, kwargs)


def trace(root: nn.Module, tracer: torch.fx.Tracer | None = None) -> torch.fx.GraphModule:
    tracer = tracer or torch.fx.Tracer()
    traced = torch.fx.GraphModule(root, tracer.trace(root))
    traced.graph.lint()
    return traced


def nodes(traced: torch.fx.GraphModule) -> list[tuple[str, object]]:
    return [(node.op, node.target) for node in traced.graph.nodes
            if node.op not in ("placeholder", "output")]


def results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    parameters = [p for p in module.parameters() if p.requires_grad]
    y = module(x)
    if not y.requires_grad:
        return [y]
    grads = torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True)
    return [y, *(g for g in grads if g is not None)]


def assert_same(first, second) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tracer", [torch.fx.Tracer, Eager, Recorder])
@pytest.mark.parametrize("name", LEAVES)
def test_every_module_is_a_leaf(name, tracer):
    module, x = LEAVES[name]()
    packed = name.startswith("packed")
    net = nn.Sequential(nn.Identity(), module)
    used = tracer()
    traced = trace(net, used)
    assert nodes(traced)[-1] == ("call_module", "1")
    if tracer is Recorder:
        assert used.called == ["0", "1"]
    for training in (False,) if packed else (True, False):
        traced.train(training)
        twin = copy.deepcopy(net).train(training)
        if packed:
            assert torch.equal(traced(x), twin(x))
        else:
            assert_same(results(traced, x), results(twin, x))


@pytest.mark.parametrize("name", LEAVES)
def test_a_module_can_be_the_root(name):
    module, x = LEAVES[name]()
    module.eval()
    traced = torch.fx.symbolic_trace(module)
    traced.graph.lint()
    assert nodes(traced) == [("call_module", "itself")]
    with torch.no_grad():
        torch.testing.assert_close(traced(x), module(x), rtol=0, atol=0)
    assert {id(p) for p in traced.parameters()} == {id(p) for p in module.parameters()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", cases.MODELS)
def test_models(name, packed):
    model, x = cases.MODELS[name]()
    model.eval()
    if packed:
        model = cases.pack(model)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        for twin in (traced, copy.deepcopy(traced)):
            assert torch.equal(twin(x), model(x))
    if not packed:
        assert_same(results(traced.train(), x), results(copy.deepcopy(model).train(), x))


@pytest.mark.parametrize("name", cases.MODELS)
def test_traced_models_pack(name):
    model, x = cases.MODELS[name]()
    traced = torch.fx.symbolic_trace(model.eval())
    packed = cases.pack(traced)
    kinds = [type(m) for m in cases.pack(model).modules() if type(m).__name__.startswith("Packed")]
    assert [type(m) for m in packed.modules() if type(m).__name__.startswith("Packed")] == kinds
    with torch.no_grad():
        assert torch.equal(packed(x), cases.pack(model)(x))


def test_traced_networks_binarize_and_are_watched():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3),
                        nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4)).eval()
    traced = bnn.binarize(torch.fx.symbolic_trace(net))
    assert isinstance(traced.get_submodule("2"), bnn.BinaryConv2d)
    again = torch.fx.symbolic_trace(traced)
    x = torch.randn(2, 3, 6, 6)
    with metrics.watch(again) as watcher:
        assert torch.equal(again(x), traced(x))
        assert any("flip_ratio/2" in name for name in watcher.scalars())


@pytest.mark.parametrize("case", [cases.MODELS["binarynet"], cases.MODELS["quicknet"],
                                  cases.MODELS["reactnet"], cases.BLOCKS["block of reactnet"],
                                  cases.PACKED["packed conv2d"]])
def test_graphs_pickle(case):
    module, x = case()
    traced = torch.fx.symbolic_trace(module.eval())
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(traced))(x), module(x))


@pytest.mark.parametrize("call", [
    lambda layer, x: layer(input=x),
    lambda layer, x: layer(x) + layer(x + 1),
    lambda layer, x: torch.cat([layer(x), layer(x).relu()], 1),
], ids=["keyword", "twice", "in a list"])
@pytest.mark.parametrize("name", ["conv2d padded with +1", "linear", "rprelu", "packed conv2d"])
def test_calls(name, call):
    class Net(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return call(self.layer, x)

    layer, x = LEAVES[name]()
    net = Net(layer)
    traced = torch.fx.symbolic_trace(net)
    assert ("call_module", "layer") in nodes(traced)
    with torch.no_grad():
        assert torch.equal(traced(x), net(x))


class Doubled(bnn.BinaryConv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Pairs(bnn.BinaryLinear):
    def forward(self, pair):
        return super().forward(pair[0]) - super().forward(pair[1])


def test_a_subclass_with_a_forward_of_its_own():
    layer, x = Doubled(8, 4, 3), torch.randn(2, 8, 5, 5)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert nodes(traced) == [("call_module", "0")]
    assert torch.equal(traced(x), layer(x))
    with pytest.raises(torch.fx.proxy.TraceError, match="inside another module"):
        torch.fx.symbolic_trace(layer)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pairs = Pairs(8, 4)

        def forward(self, x, y):
            return self.pairs([x, y])

    net, x, y = Net(), torch.randn(2, 8), torch.randn(2, 8)
    assert torch.equal(torch.fx.symbolic_trace(net)(x, y), net(x, y))


def test_hooks_run_once_when_the_graph_runs():
    layer, x = bnn.BinaryConv2d(8, 4, 3), torch.randn(2, 8, 5, 5)
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 0.25,))
    for root, calls in ((nn.Sequential(layer), "0"), (layer, "itself")):
        traced = torch.fx.symbolic_trace(root)
        assert nodes(traced) == [("call_module", calls)]
        assert torch.equal(traced(x), layer(x))


def test_a_forward_patched_on_an_instance_runs_once():
    layer, x = bnn.BinaryConv2d(8, 4, 3), torch.randn(2, 8, 5, 5)
    original = layer.forward
    layer.forward = lambda input: 2 * original(input)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), layer(x))


def test_forward_called_by_name_is_refused_in_words():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = bnn.BinaryConv2d(8, 4, 3)

        def forward(self, x):
            return self.layer.forward(x)

    with pytest.raises(torch.fx.proxy.TraceError, match="BinaryConv2d.*call the module"):
        torch.fx.symbolic_trace(Net())


def test_a_traced_graph_follows_its_weights():
    """The scale is no constant of the trace."""
    layer, x = bnn.BinaryConv2d(8, 4, 3, weight_scale="detached"), torch.randn(2, 8, 5, 5)
    traced = [torch.fx.symbolic_trace(layer), torch.fx.symbolic_trace(nn.Sequential(layer))]
    with torch.no_grad():
        layer.weight.mul_(-3).add_(0.1)
    for graph in traced:
        assert torch.equal(graph(x), layer(x))


def test_conv_and_norm_fusion_leaves_binary_layers_alone():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), bnn.BinaryConv2d(8, 8, 3),
                        nn.BatchNorm2d(8), bnn.RPReLU(8)).eval()
    x = torch.randn(2, 3, 8, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    fused = optimization.fuse(net)
    assert isinstance(fused.get_submodule("2"), bnn.BinaryConv2d)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_feature_extraction(torchvision, packed):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = models.ReActNet(5, channels=(8, 16, 16)).eval()
    if packed:
        model = bnn.pack(model)
    _, names = get_graph_node_names(model)
    assert {"blocks.0.spatial", "blocks.0.pointwise", "blocks.1.spatial"} <= set(names)
    features = create_feature_extractor(model, {"blocks.0.spatial": "half", "blocks.1": "last"})
    seen = {}
    model.blocks[0].spatial.register_forward_hook(lambda m, args, out: seen.update(half=out))
    model.blocks[1].register_forward_hook(lambda m, args, out: seen.update(last=out))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x)
        out = features(x)
    assert torch.equal(out["half"], seen["half"]) and torch.equal(out["last"], seen["last"])


@pytest.mark.parametrize("name", ["conv2d", "conv1d", "linear", "rsign", "rprelu", "block",
                                  "packed conv2d", "packed linear"])
def test_other_tracers_see_tensors(name):
    """`torch.jit.trace` and `make_fx` run the modules."""
    module, x = LEAVES[name]()
    module.eval().requires_grad_(False)  # a traced block that trains is its layers
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(torch.jit.trace(module, (x,))(x), expected)
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: module(x))(x)
        assert torch.equal(graph(x), expected)


@pytest.mark.parametrize("name", cases.MODULES)
def test_scripts_are_refused_in_words(name):
    module, _ = cases.MODULES[name]()
    for root in (module, nn.Sequential(nn.Identity(), module)):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile it; use torch"):
            torch.jit.script(root)


def test_converted_networks_are_one_node():
    model, x = nn.Sequential(bnn.BinaryConv2d(8, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(
        2, 8, 5, 5)
    converted = convert(model, x)
    whole = nn.Sequential(converted, nn.Flatten())
    traced = torch.fx.symbolic_trace(whole)
    assert [n.op for n in traced.graph.nodes].count("call_module") == 2
    assert torch.equal(traced(x), whole(x))
    with pytest.raises(torch.fx.proxy.TraceError, match="own graph is network.graph_module"):
        torch.fx.symbolic_trace(converted)
    with pytest.raises(RuntimeError, match="Converted: torch.jit.script cannot compile it"):
        torch.jit.script(whole)


@pytest.mark.parametrize("name", cases.MODULES)
def test_torch_jit_traces(name):
    """With torch's own check, there and back through a file, with gradients where there are any."""
    module, x = cases.MODULES[name]()
    module.eval()
    traced = torch.jit.trace(nn.Sequential(module), (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(loaded(x), module(x))
    for graph in (traced, loaded):
        if any(p.requires_grad for p in module.parameters()):
            wanted, got = (torch.autograd.grad(
                m(x).square().sum(), list(m.parameters()), allow_unused=True)
                for m in (module, graph))
            for a, b in zip(got, wanted, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)
