"""torch.export, with decompositions and a dynamic batch, of every module; called with gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from bitkernels_tests import module_cases as cases
from bitkernels_tests.test_func import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

OPERATORS = {"binary_conv2d", "binary_conv_transpose2d", "binary_linear", "rsign", "rprelu",
             "binary_residual_block"}
ALIKE = ("conv2d padded with -1", "conv2d circular", "conv2d swish", "rsign swish", "swish_sign",
         "conv2d of reals", "block")  # as others of them, for torch.export
# Decomposed graphs forget `detach`, torch's own too, so scales that are constants and exported
# quantizers have other gradients there.
SAME_GRADIENTS = ("conv2d", "conv2d same", "conv2d strided groups", "conv2d padded with +1",
                  "conv2d approx", "conv2d swish", "conv2d of signs", "conv1d", "linear",
                  "linear of three dimensions", "rsign", "rsign ste", "rsign swish", "rprelu",
                  "conv transpose2d")


def exported(module, x, **options):
    batch = torch.export.Dim("batch", min=2)
    return torch.export.export(module, (x,), dynamic_shapes=({0: batch},), **options)


def results(module, x) -> list[torch.Tensor]:
    """The output, the gradient of the input and those of the parameters."""
    x = x.clone().requires_grad_()
    names, parameters = zip(*sorted(module.named_parameters()), strict=True) if list(
        module.parameters()) else ((), ())
    y = module(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True)
    return [y, *(torch.zeros(()) if g is None else g for g in grads)]


def operators(program) -> set[str]:
    return {node.target._opname for node in program.graph.nodes
            if node.op == "call_function" and getattr(node.target, "namespace", "") == "bitkernels"}


@pytest.mark.parametrize("name,training", [
    *((name, False) for name in cases.MODULES if name not in ALIKE),
    *((name, True) for name in cases.BLOCKS)])
def test_modules(name, training):
    module, x = cases.MODULES[name]()
    module.train(training)
    program = exported(copy.deepcopy(module), x)
    bigger = torch.cat([x, -x])
    wanted = results(copy.deepcopy(module), bigger)
    for got, value in zip(results(program.module(), bigger), wanted, strict=True):
        assert_close(got, value, 1e-5)
    decomposed = program.run_decompositions()
    assert_close(decomposed.module()(bigger), wanted[0], 1e-5)
    assert operators(decomposed) <= OPERATORS
    if name in SAME_GRADIENTS:
        for got, value in zip(results(decomposed.module(), bigger), wanted, strict=True):
            assert_close(got, value, 1e-5)


@pytest.mark.parametrize("name", ["binarynet", "quicknet", "reactnet"])
def test_models(name):
    model, x = cases.MODELS[name]()
    bigger = torch.cat([x, -x])
    trained = exported(copy.deepcopy(model).train(), x)
    for got, value in zip(results(trained.module(), bigger),
                          results(copy.deepcopy(model).train(), bigger), strict=True):
        assert_close(got, value, 1e-5)
    for twin in (model.eval(), cases.pack(model)):
        graph = exported(twin, x).run_decompositions().module()
        assert_close(graph(bigger), twin(bigger), 1e-5)


@pytest.mark.parametrize("name", ["packed conv2d same", "packed conv2d reflect",
                                  "packed conv2d strided groups", "packed conv1d",
                                  "packed linear of three dimensions",
                                  "packed conv transpose2d groups", "packed conv transpose1d"])
def test_packed_layers(name):
    module, x = cases.PACKED[name]()
    bigger = torch.cat([x, -x])
    program = exported(module, x)
    for graph in (program.module(), program.run_decompositions().module()):
        assert torch.equal(graph(bigger), module(bigger))


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
