"""`BinaryResidualBlock`: the fused operator and the layers one after the other are one block."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from bitkernels import nn as bnn
from bitkernels import quantizers
from bitkernels_tests import ROOT
from bitkernels_tests.cases import reals

CHANNELS = 40
pytestmark = pytest.mark.usefixtures("one_thread")


def conv(cin=CHANNELS, cout=CHANNELS, kernel_size=3, **options):
    options = dict(padding=1, bias=False, weight_scale="detached") | options
    return bnn.BinaryConv2d(cin, cout, kernel_size, **options)


def reactnet(norm=nn.BatchNorm2d, **options):
    return bnn.BinaryResidualBlock(conv(input_quantizer=None), norm(CHANNELS, **options),
                                   sign=bnn.RSign(CHANNELS), act=bnn.RPReLU(CHANNELS))


def reactnet_down():
    shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(CHANNELS, 48, 1, bias=False),
                             nn.BatchNorm2d(48))
    return bnn.BinaryResidualBlock(
        conv(cout=48, stride=2, input_quantizer=None), nn.BatchNorm2d(48),
        sign=bnn.RSign(CHANNELS, "swish_sign"), act=bnn.RPReLU(48), shortcut=shortcut)


def bireal(**options):
    return bnn.BinaryResidualBlock(
        conv(input_quantizer="approx_sign", weight_scale="xnor", **options),
        nn.BatchNorm2d(CHANNELS), act=nn.PReLU())


def quicknet(**options):
    return bnn.BinaryResidualBlock(
        conv(input_quantizer=quantizers.SteSign(1.25), weight_quantizer="magnitude_aware_sign",
             weight_scale=None, **options), nn.BatchNorm2d(CHANNELS), relu=True)


def padded():
    return bnn.BinaryResidualBlock(conv(pad_value=1, groups=2, weight_scale=None),
                                   nn.BatchNorm2d(CHANNELS, momentum=None, affine=False))


def alone():
    """A half of a BNext block."""
    return bnn.BinaryResidualBlock(
        conv(cout=48, stride=2, input_quantizer=None, weight_scale=None,
             weight_quantizer=quantizers.SteSign(None)), nn.BatchNorm2d(48),
        sign=bnn.RSign(CHANNELS, quantizers.SteSign(1.5)), act=nn.PReLU(48),
        shortcut=bnn.NoShortcut())


BLOCKS = {f.__name__: f for f in (reactnet, reactnet_down, bireal, quicknet, padded, alone)}


def pair_of(make, *args, **kw):
    """(fused, layer by layer) of equal, random state, in training."""
    fused = make(*args, **kw)
    with torch.no_grad():
        for t in fused.parameters():
            t.add_(0.3 * torch.randn_like(t))
    layers = copy.deepcopy(fused)
    layers.fused = False
    return fused, layers


def near(a, b, limit=1e-5):
    assert (a.double() - b.double()).norm() <= limit * b.double().norm().clamp_min(1)


def assert_equal_state(a, b, limit=1e-5):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        near(a[name], b[name], limit)


def step(module, x, optimizer=None):
    """Output and gradients of one step."""
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel()).sin().view_as(y))
    grads = {n: p.grad.clone() for n, p in module.named_parameters()}
    if optimizer:
        optimizer.step()
    module.zero_grad()
    return y.detach(), x.grad, grads


def batch(*shape):
    return reals(*(shape or (3, CHANNELS, 8, 6)))


@pytest.mark.parametrize("name", BLOCKS)
def test_training_equals_the_layers(name):
    """Outputs, gradients, running statistics and counters over steps with two learning rates."""
    fused, layers = pair_of(BLOCKS[name])
    assert fused.unfused(batch()) is None and layers.unfused(batch()) == "fused is False"
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (fused, layers)]
    for _ in range(4):
        x = batch()
        (y, gx, grads), (y2, gx2, grads2) = (
            step(m, x, o) for m, o in zip((fused, layers), optimizers, strict=True))
        assert y.dtype == y2.dtype and y.shape == y2.shape
        near(y, y2)
        near(gx, gx2, 1e-4)
        assert grads.keys() == grads2.keys()
        for n in grads:
            near(grads[n], grads2[n], 1e-4)
    assert_equal_state(fused, layers)
    assert int(fused.norm.num_batches_tracked) == 4


@pytest.mark.parametrize("name", BLOCKS)
def test_evaluation_equals_the_layers(name):
    fused, layers = pair_of(BLOCKS[name])
    step(fused, batch())
    layers.load_state_dict(fused.state_dict())
    fused.eval(), layers.eval()
    x = batch()
    with torch.no_grad():
        assert fused.unfused(x) is None
        y = fused(x)
        near(y, layers(x))
        for dtype in (torch.bfloat16, torch.float16)[:9 if fused.shortcut is None else 0]:
            half = fused(x.to(dtype))
            assert half.dtype == dtype
            near(half, fused(x.to(dtype).float()), torch.finfo(dtype).eps)
    before = copy.deepcopy(fused.state_dict())
    assert fused.unfused(x) == "gradients with running statistics"
    a, b = step(fused, x), step(layers, x)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert all(torch.equal(a[2][n], b[2][n]) for n in a[2])
    assert all(torch.equal(t, before[n]) for n, t in fused.state_dict().items())


def test_state_dict_is_that_of_the_layers():
    """The same layers in a plain module: same keys, and each loads the other's values."""
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.sign, self.conv = bnn.RSign(CHANNELS), conv(input_quantizer=None)
            self.norm, self.act = nn.BatchNorm2d(CHANNELS), bnn.RPReLU(CHANNELS)

        def forward(self, x):
            return self.act(self.norm(self.conv(self.sign(x))) + x)

    block, plain = pair_of(reactnet)[0], Plain()
    assert list(block.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(block.state_dict())
    x = batch()
    (y, gx, _), (y2, gx2, _) = step(block, x), step(plain, x)
    near(y, y2), near(gx, gx2, 1e-4)
    block.load_state_dict(plain.state_dict())
    assert_equal_state(block, plain, 0)


@pytest.mark.parametrize("options", [
    dict(momentum=None), dict(momentum=0.0), dict(momentum=1.0), dict(affine=False),
    dict(track_running_stats=False), dict(eps=1e-2), dict(dtype=torch.float64)], ids=str)
def test_norm_options(options):
    fused, layers = pair_of(reactnet, **options)
    wide = "dtype" in options
    if wide:
        fused.double(), layers.double()
    limit = 1e-7 if wide else 1e-5  # the convolution as a layer of its own rounds to float32
    for _ in range(3):
        x = batch().to(next(fused.parameters()).dtype)
        a, b = step(fused, x), step(layers, x)
        near(a[0], b[0], limit), near(a[1], b[1], 10 * limit)
    assert_equal_state(fused, layers, limit)
    fused.eval(), layers.eval()
    with torch.no_grad():
        if wide:
            assert fused.unfused(x) == "float64 with running statistics"
        near(fused(x), layers(x), limit)


def test_a_norm_whose_statistics_were_taken_away():
    """As for networks of few images a batch: those of the batch, in evaluation too."""
    fused, layers = pair_of(reactnet)
    for block in (fused, layers):
        block.norm.running_mean = block.norm.running_var = None
    for training in (True, False):
        x = batch()
        near(fused.train(training)(x), layers.train(training)(x), 1e-5)
        assert fused.unfused(x) is None


def test_running_statistics_are_those_of_torch():
    """Against nn.BatchNorm2d on the convolution's own output: mean and unbiased variance."""
    block = pair_of(bireal)[0]
    norm = nn.BatchNorm2d(CHANNELS)
    for _ in range(3):
        x = batch()
        with torch.no_grad():
            norm(block.conv(x))
            block(x)
    near(block.norm.running_mean, norm.running_mean, 1e-6)
    near(block.norm.running_var, norm.running_var, 1e-6)
    assert block.norm.num_batches_tracked == norm.num_batches_tracked


def frozen_norm(block):
    block.norm.eval()


def hooked(part):
    def change(block):
        getattr(block, part).register_forward_hook(lambda *_: None)
    return change


def swapped(part, make):
    return lambda block: setattr(block, part, make())


class Norm(nn.BatchNorm2d):
    pass


class Sign(bnn.RSign):
    pass


class Act(bnn.RPReLU):
    pass


class Conv(bnn.BinaryConv2d):
    pass


UNFUSED = [
    ("fused is False", lambda b: setattr(b, "fused", False)),
    *((f"{part} has hooks", hooked(part)) for part in ("sign", "conv", "norm", "act")),
    ("conv is Conv", swapped("conv", lambda: Conv(
        CHANNELS, CHANNELS, 3, padding=1, bias=False, input_quantizer=None))),
    ("norm is Norm", swapped("norm", lambda: Norm(CHANNELS))),
    ("act is Act", swapped("act", lambda: Act(CHANNELS))),
    ("conv has quantizers that are not estimators of the operator",
     swapped("conv", lambda: conv(weight_quantizer="dorefa_quantizer", weight_scale=None,
                                  input_quantizer=None))),
    ("sign is an RSign before a convolution with input_quantizer=None only",
     lambda b: setattr(b.conv, "input_quantizer", "ste_sign")),
    ("sign is Sign", swapped("sign", lambda: Sign(CHANNELS))),
    ("conv has a bias or a padding mode",
     swapped("conv", lambda: conv(bias=True, input_quantizer=None))),
    ("conv has a bias or a padding mode",
     swapped("conv", lambda: conv(padding_mode="reflect", input_quantizer=None))),
    ("gradients with running statistics", frozen_norm),
]


@pytest.mark.parametrize("reason, change", UNFUSED, ids=[r for r, _ in UNFUSED])
def test_reasons_to_run_the_layers(reason, change):
    """Each is reported, and the block still computes what its layers do, one by one."""
    block = pair_of(reactnet)[0]
    change(block)
    assert block.unfused(batch()) == reason
    x, fresh = batch(), copy.deepcopy(block)
    expected = fresh.act(fresh.norm(fresh.conv(fresh.sign(x))) + x)
    assert torch.equal(block(x), expected)
    assert_equal_state(block, fresh, 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("part", ["sign", "conv", "norm", "act"])
def test_a_forward_of_a_parts_own_is_called(part, packed):
    """As tools set it that move weights or measure time."""
    block = bnn.pack(pair_of(reactnet)[0]) if packed else pair_of(reactnet)[0]
    module, calls = getattr(block, part), []
    own = module.forward
    module.forward = lambda *inputs: calls.append(1) or own(*inputs)
    for training in (True, False):
        block.train(training)
        with torch.no_grad():
            assert block.unfused(batch()) == f"{part} has a forward of its own"
            block(batch())
    assert calls == [1, 1]


def test_different_betas_run_the_layers():
    block = reactnet()
    block.sign = bnn.RSign(CHANNELS, quantizers.SwishSign(3.0))
    block.conv.weight_quantizer = quantizers.SwishSign(7.0)
    assert block.unfused(batch()) == "sign and the weight quantizer have different betas"
    block.conv.weight_quantizer = quantizers.SwishSign(3.0)
    assert block.unfused(batch()) is None


@pytest.mark.parametrize("shape", [(1, CHANNELS, 1, 1), (0, CHANNELS, 4, 4), (CHANNELS, 4, 4)])
def test_batches_without_statistics_are_torchs(shape):
    """One value per channel, no value, no batch: the layers' result, or their error."""
    fused, layers = pair_of(bireal)
    x = torch.randn(shape)
    assert fused.unfused(x) in (
        "less than two values per channel", "the input is not a batch")
    outcomes = []
    for block in (fused, layers):
        try:
            outcomes.append(block(x).shape)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    if shape == (1, CHANNELS, 1, 1):
        assert "Expected more than 1 value per channel" in outcomes[0][1]
    assert_equal_state(fused, layers, 0)


def test_residual_of_another_type_runs_the_layers():
    block, layers = pair_of(reactnet)
    block.shortcut = layers.shortcut = nn.Module()
    block.shortcut.forward = lambda x: x.double()
    x = batch()
    assert torch.equal(block(x), layers(x)) and block(x).dtype == torch.float64


def test_autocast():
    """Output in the stream's type, as the layers'; statistics from exact integers."""
    fused, layers = pair_of(reactnet)
    x = batch()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = step(fused, x), step(layers, x)
    assert a[0].dtype == torch.float32
    near(a[0], b[0], 2**-7)
    near(a[1], b[1], 0.1)  # some values cross the activation's kink
    for n in a[2]:
        near(a[2][n], b[2][n], 0.1)
    assert_equal_state(fused, layers, 2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_module(dtype):
    """Parameters, statistics and stream in half precision: the layers round more often."""
    fused, layers = (m.to(dtype) for m in pair_of(reactnet_down))
    x = batch().to(dtype)
    a, b = step(fused, x), step(layers, x)
    assert a[0].dtype == dtype and fused.norm.running_var.dtype == dtype
    near(a[0], b[0], 2**-7)
    near(a[1], b[1], 0.1)  # some values cross the activation's kink
    for n in a[2]:
        assert a[2][n].dtype == dtype
        near(a[2][n], b[2][n], 0.1)
    assert_equal_state(fused, layers, 2**-7)


def test_deepcopy_and_pickle():
    block = pair_of(reactnet_down)[0]
    block(batch())
    x = batch()
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    expected = block(x)
    for other in copies:
        assert torch.equal(other(x), expected)
        assert_equal_state(other, block, 0)


@pytest.mark.parametrize("wrong, message", [
    (dict(conv=nn.Conv2d(4, 4, 3)), "conv must be BinaryConv2d, got Conv2d"),
    (dict(norm=nn.Identity()), "norm must be BatchNorm2d or SyncBatchNorm, got Identity"),
    (dict(norm=nn.BatchNorm2d(5)), "norm must have 4 features as conv has output channels, got 5"),
    (dict(sign=nn.ReLU()), "sign must be RSign, got ReLU"),
    (dict(act=nn.ReLU()), "act must be RPReLU or PReLU, got ReLU")])
def test_modules_of_other_classes(wrong, message):
    parts = dict(conv=bnn.BinaryConv2d(4, 4, 3), norm=nn.BatchNorm2d(4)) | wrong
    with pytest.raises(ValueError) as caught:
        bnn.BinaryResidualBlock(**parts)
    assert str(caught.value) == f"BinaryResidualBlock: {message}"


@pytest.mark.parametrize("name", ["reactnet", "quicknet"])
def test_one_graph_for_every_batch(name):
    """torch.compile, fullgraph: training steps of three batch sizes, one compilation."""
    torch._dynamo.reset()
    block, eager = pair_of(BLOCKS[name])
    eager.fused = True
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (2, 3, 5):
            x = batch(n, CHANNELS, 8, 6).requires_grad_()
            torch._dynamo.mark_dynamic(x, 0)
            y = compiled(x)
            assert torch.equal(y, eager(x))
            y.sum().backward()
    assert counter.frame_count == 1 and block.conv.weight.grad is not None
    assert_equal_state(block, eager, 0)
    torch._dynamo.reset()


def test_the_example_of_the_documentation():
    page = ROOT / "docs" / "training.md"
    if not page.exists():
        pytest.skip("installed without docs")
    examples = [part.split("```")[0] for part in page.read_text().split("```python")[1:]]
    space: dict = {}
    exec(next(code for code in examples if "BinaryResidualBlock" in code), space)
    for build in (space["reactnet"], space["quicknet"]):
        block, x = build(8), torch.randn(2, 8, 5, 5)
        assert block.unfused(x) is None and block(x).shape == x.shape
