"""torch.func: gradients, per-sample gradients and vmap of every module and operator."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_flatten, tree_unflatten

import bitkernels.nn as bnn
from bitkernels import models, quantizers
from bitkernels_tests import module_cases as cases
from bitkernels_tests.ops import test_contract as contract

pytestmark = pytest.mark.usefixtures("one_thread")

ops = torch.ops.bitkernels
MODULES = cases.MODULES
BINARY = {**cases.PACKABLE, **{n: c for n, c in cases.ACTIVATIONS.items() if n != "max pool"}}
LEARNABLE = {"block": cases.BLOCKS["block"], "block of reactnet": cases.BLOCKS["block of reactnet"],
             "binarynet": cases.MODELS["binarynet"], "quicknet": cases.MODELS["quicknet"],
             "reactnet": cases.MODELS["reactnet"]}


@pytest.fixture(autouse=True)
def no_warnings():
    """torch.vmap warns where an operator has no batching rule."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*batching rule for bitkernels.*")
        yield


def state_of(module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return ({k: v.detach() for k, v in module.named_parameters()}, dict(module.named_buffers()))


def loss_of(module, parameters, buffers, x) -> Tensor:
    return functional_call(module, (parameters, buffers), (x,)).square().sum()


def expected(module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the parameters and the input, by backward."""
    x = x.clone().requires_grad_()
    names = [name for name, _ in module.named_parameters()]
    *parameters, of_input = torch.autograd.grad(
        module(x).square().sum(), [*module.parameters(), x], allow_unused=True)
    return dict(zip(names, parameters, strict=True)), of_input


def assert_close(a: Tensor, b: Tensor, tolerance: float = 0.0) -> None:
    """To a part of the largest value; the library's own sums may have another order."""
    if b.dtype == torch.float8_e5m2:  # which has no arithmetic
        assert a.dtype == b.dtype
        a, b = a.float(), b.float()
    size = b.abs().max().item() if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES | LEARNABLE)
def test_grad_equals_backward(name, training):
    module, x = (MODULES | LEARNABLE)[name]()
    module.train(training)
    parameters, buffers = state_of(module)
    wanted, of_input = expected(copy.deepcopy(module), x)
    got, got_input = grad(lambda p, x: loss_of(module, p, {k: b.clone() for k, b in
                                                          buffers.items()}, x),
                          argnums=(0, 1))(parameters, x)
    for key, value in wanted.items():
        assert_close(got[key], value, 1e-5)
    assert_close(got_input, of_input, 1e-5)
    out, pull = vjp(lambda x: functional_call(
        module, (parameters, {k: b.clone() for k, b in buffers.items()}), (x,)), x)
    assert_close(pull(2 * out)[0], of_input, 1e-5)


@pytest.mark.parametrize("name", MODULES | LEARNABLE)
def test_per_sample_gradients(name):
    """Of each sample alone, and vmap's order does not matter."""
    module, x = (MODULES | LEARNABLE)[name]()
    module.eval()
    parameters, buffers = state_of(module)

    def loss(parameters, sample):
        return loss_of(module, parameters, buffers, sample.unsqueeze(0))

    one_by_one = [expected(module, sample.unsqueeze(0)) for sample in x]
    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for key in parameters:
        for i, (wanted, _) in enumerate(one_by_one):
            assert_close(got[key][i], wanted[key], 2e-5)
    total = grad(lambda p: vmap(loss, in_dims=(None, 0))(p, x).sum())(parameters)
    for key in parameters:
        assert_close(total[key], sum(wanted[key] for wanted, _ in one_by_one), 2e-4)


@pytest.mark.parametrize("name", ["block", "block of reactnet", "block of quicknet"])
def test_batch_statistics_are_those_of_each_batch(name):
    """As of a batch norm that keeps no running statistics."""
    block, _ = cases.BLOCKS[name]()
    block.norm.track_running_stats = False
    block.norm.running_mean = block.norm.running_var = block.norm.num_batches_tracked = None
    batches = torch.randn(2, 3, 8, 6, 6)
    parameters, buffers = state_of(block)
    got = vmap(grad(lambda p, x: loss_of(block, p, buffers, x)), in_dims=(None, 0))(
        parameters, batches)
    for i, batch in enumerate(batches):
        for key, value in expected(block, batch)[0].items():
            assert_close(got[key][i], value, 1e-4)


@pytest.mark.parametrize("name", ["conv2d", "conv1d", "linear", "rsign", "rprelu", "conv3d",
                                  "block of reactnet"])
def test_ensembles(name):
    """vmap over parameters."""
    members = [MODULES[name]()[0].eval() for _ in range(3)]
    for member in members:
        for parameter in member.parameters():
            torch.nn.init.normal_(parameter)
    x = MODULES[name]()[1]
    parameters, buffers = stack_module_state(members)

    def call(p, b, x):
        return functional_call(members[0], (p, b), (x,))

    out = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    for i, member in enumerate(members):
        assert_close(out[i], member(x), 1e-6)


@pytest.mark.parametrize("name", BINARY)
def test_jacobians(name):
    module, x = BINARY[name]()
    x = x[:1]
    rows = jacrev(module)(x)
    y = module(x.requires_grad_())
    some = [0, y.numel() // 2, y.numel() - 1]
    for at in some:
        row, = torch.autograd.grad(y.flatten()[at], x, retain_graph=True)
        assert_close(rows.reshape(y.numel(), *x.shape)[at], row, 1e-6)


@pytest.mark.parametrize("name", [n for n in contract.samples("cpu")])
def test_batching_rules(name):
    """Of every operator: each argument mapped alone, in front and at the end, and all of them."""
    op, args, kw = contract.samples("cpu")[name]
    flat, spec = tree_flatten((args, kw))
    tensors = [i for i, t in enumerate(flat) if isinstance(t, Tensor)]
    for at in [[i] for i in tensors] + [tensors]:
        for dim in (0, -1):
            mapped = [torch.stack([flat[i].detach(), flat[i].detach().flip(0),
                                   flat[i].detach().roll(1, -1)], dim) for i in at]

            def call(*values, at=at):
                filled = list(flat)
                for i, value in zip(at, values, strict=True):
                    filled[i] = value
                args, kw = tree_unflatten(
                    [t.detach() if isinstance(t, Tensor) else t for t in filled], spec)
                return op(*args, **kw)

            got = vmap(call, in_dims=dim)(*mapped)
            wanted = [call(*(m.select(dim, i) for m in mapped)) for i in range(3)]
            for out, parts in zip(tree_flatten(got)[0], zip(*(tree_flatten(w)[0] for w in wanted),
                                                            strict=True), strict=True):
                assert_close(out, torch.stack(parts), 1e-6)


def test_nested_and_empty_vmap():
    x, w = torch.randn(2, 3, 4, 8, 5, 5), torch.randn(6, 8, 3, 3)
    out = vmap(vmap(ops.binary_conv2d, in_dims=(0, None)), in_dims=(0, None))(x, w)
    assert_close(out, ops.binary_conv2d(x.flatten(0, 2), w).unflatten(0, (2, 3, 4)))
    many = torch.randn(3, 6, 8, 3, 3)
    out = vmap(lambda x: vmap(lambda w: ops.binary_conv2d(x, w))(many))(x[0])
    for i in range(3):
        for j in range(3):
            assert_close(out[i, j], ops.binary_conv2d(x[0, i], many[j]))
    with pytest.raises(RuntimeError, match="size 0"):
        vmap(ops.binary_conv2d, in_dims=(None, 0))(x[0, 0], many[:0])
    assert vmap(ops.binary_conv2d, in_dims=(0, None))(x[:0, 0], w).shape == (0, 4, 6, 3, 3)


@pytest.mark.parametrize("name", ["binary_conv2d", "binary_linear", "rsign", "rprelu",
                                  "binary_residual_block"])
def test_what_has_no_derivative_says_so(name):
    x, vector = torch.randn(3, 8, 5, 5), torch.randn(8)
    others = {"binary_conv2d": (torch.randn(8, 8, 3, 3),), "rsign": (vector,),
              "binary_linear": (torch.randn(8, 8),), "rprelu": (vector, vector, vector),
              "binary_residual_block": (torch.randn(8, 8, 1, 1),)}[name]
    if name == "binary_linear":
        x = torch.randn(3, 8)

    def call(x):
        out = getattr(ops, name)(x, *others)
        return out[0] if isinstance(out, tuple) else out

    def square(x):
        return call(x).square().sum()

    for forward in (lambda: jvp(call, (x,), (x,)), lambda: jacfwd(call)(x),
                    lambda: hessian(square)(x)):
        with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
            forward()
    with pytest.raises(RuntimeError, match=f"{name} has no forward-mode"), forward_ad.dual_level():
        call(forward_ad.make_dual(x, x))
    with forward_ad.dual_level():  # nothing moves
        assert_close(call(x), call(x))
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        grad(lambda x: grad(square)(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    first, = torch.autograd.grad(square(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize("name", ["conv2d", "conv2d approx", "linear", "rprelu", "rsign"])
def test_a_loss_with_its_own_gradient(name):
    """Two levels: the outer one differentiates the value, and the inner gradient is a constant."""
    module, x = MODULES[name]()

    def loss(x):
        return module(x).sum()

    def outer(x):
        return (loss(x) * 2 + (x * grad(loss)(x).detach()).sum()).sum()

    assert_close(grad(outer)(x), 3 * grad(loss)(x), 1e-5)


@pytest.mark.parametrize("name", cases.QUANTIZERS)
def test_vmap_keeps_the_gradient(name):
    """Of tensors that require grad outside of it."""
    quantizer, x = cases.QUANTIZERS[name]()
    wanted = expected(torch.nn.Sequential(quantizer), x[:1])[1]
    first = x[:1].clone().requires_grad_()
    vmap(quantizer)(first.unsqueeze(0)).square().sum().backward()
    assert_close(first.grad, wanted, 1e-6)


@pytest.mark.parametrize("name", cases.QUANTIZERS)
def test_quantizers_have_no_forward_mode(name):
    quantizer, x = cases.QUANTIZERS[name]()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        jvp(quantizer, (x,), (x,))
    with pytest.raises(RuntimeError, match="has no forward-mode"), forward_ad.dual_level():
        quantizer(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", ["packed conv2d", "packed linear"])
def test_packed_layers(name):
    module, x = cases.PACKED[name]()
    assert_close(vmap(lambda x: module(x.unsqueeze(0)))(x).squeeze(1), module(x))
    with pytest.raises(RuntimeError, match="has no gradient"):
        jvp(module, (x,), (x,))


def test_estimators_by_the_operator_equal_the_specification():
    """`sign_backward` computes what the passes of the reference do: approx_sign to the bit, and
    swish_sign but for what its exponentials are off."""
    from bitkernels.reference import estimator_grad

    for shape in ((4, 8, 3, 3), (5, 8), (7,), (), (0, 4), (4, 0), (2, 3, 5)):
        x = torch.randn(shape).requires_grad_()
        grad = torch.randn(shape)
        for quantizer in (quantizers.ApproxSign(), quantizers.SwishSign(3.0)):
            got, = torch.autograd.grad(quantizer(x), x, grad)
            beta = getattr(quantizer, "beta", 0.0)
            wanted = estimator_grad(grad, x.detach(), quantizer.estimator, None, beta)
            near = 1e-5 * beta  # none for approx_sign
            torch.testing.assert_close(got, wanted, rtol=near, atol=near)


def test_max_pool_in_transforms():
    pool, x = MODULES["max pool"]()
    real = torch.nn.MaxPool2d(3, 2, 1)
    out, tangent = jvp(pool, (x,), (x,))
    wanted = jvp(real, (x,), (x,))
    assert torch.equal(out, wanted[0]) and torch.equal(tangent, wanted[1])
    assert torch.equal(grad(lambda x: pool(x).square().sum())(x),
                       grad(lambda x: real(x).square().sum())(x))


def test_compiled_per_sample_gradients():
    net = models.ReActNet(5, channels=(8, 8)).eval()
    x = torch.randn(3, 3, 6, 6)
    parameters, buffers = state_of(net)

    def per_sample(parameters, x):
        return vmap(grad(lambda p, x: loss_of(net, p, buffers, x.unsqueeze(0))),
                    in_dims=(None, 0))(parameters, x)

    compiled = torch.compile(per_sample, backend="aot_eager")(parameters, x)
    for key, value in per_sample(parameters, x).items():
        assert_close(compiled[key], value, 1e-5)


@pytest.mark.parametrize("make, shape", [
    (lambda: bnn.BinaryConvTranspose2d(16, 8, 3, stride=2), (16, 5, 5)),
    (lambda: bnn.BinaryConvTranspose1d(16, 8, 3, stride=3), (16, 5))], ids=["2d", "1d"])
def test_packed_transposed_layers_under_vmap(make, shape):
    layer, x = make().pack(), torch.randn(3, *shape)
    layer(x)  # its phases' filters are there
    got = vmap(lambda sample: layer(sample.unsqueeze(0)).squeeze(0))(x)
    assert torch.equal(got, layer(x))


@pytest.mark.parametrize("name", ["conv2d", "linear", "conv transpose2d", "rsign", "rprelu",
                                  "approx_sign"])
def test_a_gradient_penalty_is_refused(name):
    """Where the output's gradient is a constant, it reaches what was saved alone."""
    module, x = MODULES[name]()
    g, = torch.autograd.grad(module(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (g.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("name", cases.QUANTIZERS)
def test_vmap_of_quantizers_over_images_that_are_not_contiguous(name):
    quantizer, images = quantizers.get(name), torch.randn(3, 2, 4, 5, 6)
    for x in (images.transpose(3, 4), images[..., ::2],
              images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)):
        def loss(t):
            return (quantizer(t) * t).sum()

        want = torch.stack([quantizer(t) for t in x]), torch.stack([grad(loss)(t) for t in x])
        assert torch.equal(vmap(quantizer)(x), want[0])
        torch.testing.assert_close(vmap(grad(loss))(x), want[1])


@pytest.mark.parametrize("name", [n for n in MODULES if n not in cases.PACKED])
def test_gradients_in_batches(name):
    """By the vmap that was before torch.func: is_grads_batched, jacobian(vectorize=True)."""
    module, x = MODULES[name]()
    x = x[:1].requires_grad_()
    y = module(x)
    inputs = [x, *module.parameters()]
    batch = torch.randn(2, 3, *y.shape)

    def pull(g, **kw):
        return torch.autograd.grad(y, inputs, g, retain_graph=True, allow_unused=True, **kw)

    got = pull(batch[0], is_grads_batched=True)
    for i in range(3):
        for g, wanted in zip(got, pull(batch[0, i]), strict=True):
            assert (g is None) == (wanted is None)
            if g is not None:
                assert_close(g[i], wanted, 1e-6)
    nested = _vmap(_vmap(lambda g: pull(g)[0]))(batch)
    for i in range(2):
        for j in range(3):
            assert_close(nested[i, j], pull(batch[i, j])[0], 1e-6)


def test_a_jacobian_at_once_is_the_jacobian():
    module, x = MODULES["conv2d"]()
    jacobian = torch.autograd.functional.jacobian
    assert torch.equal(jacobian(module, x[:1], vectorize=True), jacobian(module, x[:1]))


@pytest.mark.parametrize("name", ["conv2d", "linear", "conv transpose2d", "rsign", "rprelu",
                                  "approx_sign", "block of reactnet"])
def test_gradients_in_batches_have_no_second_derivative(name):
    module, x = MODULES[name]()
    y = module(x.requires_grad_())
    batch = torch.randn(3, *y.shape, requires_grad=True)
    g, = torch.autograd.grad(y, x, batch, is_grads_batched=True, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (g.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("name", cases.QUANTIZERS)
def test_quantizers_have_no_hessian(name):
    """Where the level of the tangents is below that of the gradient."""
    quantizer, x = cases.QUANTIZERS[name]()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        hessian(lambda x: quantizer(x).square().sum())(x)
