"""torch.export, with decompositions and a dynamic batch, of every module; called with gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from bitkernels_tests import module_cases as cases
from bitkernels_tests.toolchains.test_func import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

OPERATORS = {"binary_conv2d", "binary_conv_transpose2d", "binary_linear", "rsign", "rprelu",
             "binary_residual_block"}
# Decomposed graphs forget `detach`, torch's own too, so scales that are constants and exported
# quantizers have other gradients there.
SAME_GRADIENTS = ("conv2d", "conv2d same", "conv2d strided groups", "conv2d padded with +1",
                  "conv2d approx", "conv2d swish", "conv2d of signs", "conv transpose2d",
                  "rsign", "rsign ste", "rprelu")


def exported(module, x, **options):
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(module, (x,), dynamic_shapes=({0: batch},), **options)


def results(module, x) -> list[torch.Tensor]:
    """The outputs, the gradient of the input and those of the parameters."""
    x = x.clone().requires_grad_()
    names, parameters = zip(*sorted(module.named_parameters()), strict=True) if list(
        module.parameters()) else ((), ())
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(y.square().sum() for y in outputs)
    grads = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    return [*outputs, *(torch.zeros(()) if g is None else g for g in grads)]


def operators(program) -> set[str]:
    return {node.target._opname for node in program.graph.nodes
            if node.op == "call_function" and getattr(node.target, "namespace", "") == "bitkernels"}


@pytest.mark.parametrize("group,training", [*((group, False) for group in cases.GROUPS),
                                            ("blocks", True)])
def test_modules(group, training):
    network, x = cases.branches(group, packed=False)
    network.train(training)
    bigger = torch.cat([x, -x])
    program = exported(copy.deepcopy(network), x)
    wanted = results(copy.deepcopy(network), bigger)
    for got, value in zip(results(program.module(), bigger), wanted, strict=True):
        assert_close(got, value, 1e-5)
    decomposed = program.run_decompositions()
    assert operators(decomposed) <= OPERATORS
    graph = decomposed.module()  # called with gradients
    for got, value in zip(graph(bigger), wanted, strict=False):
        assert_close(got, value, 1e-5)


def test_decomposed_operators_have_their_gradients():
    network = cases.Branches([cases.MODULES[name]()[0] for name in SAME_GRADIENTS]).eval()
    x = torch.randn(3, 8, 6, 6)
    graph = exported(network, x).run_decompositions().module()
    for got, value in zip(results(graph, x), results(network, x), strict=True):
        assert_close(got, value, 1e-5)


@pytest.mark.parametrize("name", ["binarynet", "quicknet", "reactnet"])
def test_models(name):
    model, x = cases.MODELS[name]()
    bigger = torch.cat([x, -x])
    if name == "reactnet":
        trained = exported(copy.deepcopy(model).train(), x)
        for got, value in zip(results(trained.module(), bigger),
                              results(copy.deepcopy(model).train(), bigger), strict=True):
            assert_close(got, value, 1e-5)
    model.eval()
    network = cases.Branches([model, cases.pack(model)])
    graph = exported(network, x).run_decompositions().module()
    for got, value in zip(graph(bigger), network(bigger), strict=True):
        assert_close(got, value, 1e-5)


@pytest.mark.parametrize("group", ["convolutions", "transposed", "one dimension",
                                   "linear of three dimensions"])
def test_packed_layers(group):
    network, x = cases.branches(group)
    network.eval().requires_grad_(False)
    bigger = torch.cat([x, -x])
    graph = exported(network, x).run_decompositions().module()
    for got, value in zip(graph(bigger), network(bigger), strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("name", ["conv1d", "linear ternary", "block of reactnet"])
def test_strict_export(name):
    module, x = cases.MODULES[name]()
    module.eval()
    program = exported(module, x, strict=True)
    for got, value in zip(results(program.module(), x), results(module, x), strict=True):
        assert_close(got, value, 1e-5)


@pytest.mark.parametrize("name", ["conv2d", "linear", "block of reactnet"])
def test_no_grad_changes_nothing(name):
    module, x = cases.MODULES[name]()
    module.eval()
    with torch.no_grad():
        program = exported(module, x).run_decompositions()
        wanted = module(x)
        assert_close(program.module()(x), wanted, 1e-6)
    assert_close(program.module()(x), wanted, 1e-6)


def test_quantizers_keep_extreme_values():
    """The exported sign is -1 or +1 of everything, as the layers promise."""
    x = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -float("inf"), 3e38, -1e-45, 1.0]])
    for name in ("ste_sign", "approx_sign", "swish_sign", "ste_heaviside", "ste_tern"):
        quantizer = cases.QUANTIZERS[name]()[0]
        graph = torch.export.export(quantizer, (x.clone().requires_grad_(),)).module()
        assert torch.equal(graph(x), quantizer(x))
