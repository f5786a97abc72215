"""Converted networks compute what the models compute, and what they fuse is said."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import bitkernels.nn as bnn
from bitkernels import models
from bitkernels.converter import convert
from bitkernels_tests.converter.networks import Factors, Two, WrittenRPReLU, conv, norm, shuffled


def stem(channels: int = 32) -> list[nn.Module]:
    return [nn.Conv2d(3, channels, 3, padding=1), norm(channels)]


def checked(model: nn.Module, size: int = 8, batch: int = 3, **options):
    """The converted model, equal to the model on another batch than it was converted with."""
    model = shuffled(model)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    converted = convert(model, x[:1], **options)
    with torch.no_grad():
        expected, got = model(x), converted(x)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, error
    return converted


def products(converted) -> list[tuple]:
    return [(p.kind, p.reads, p.epilogue, p.writes) for p in converted.report.products]


NAMED = {
    "reactnet-18": (lambda: models.ReActNet18(5, blocks=(2, 2), channels=(32, 64)), 32),
    "reactnet": (lambda: models.ReActNet(5, channels=(32, 64, 64, 128)), 16),
    "quicknet": (lambda: models.QuickNet(5, blocks=(2, 2), filters=(32, 64)), 16),
    "binarynet": (lambda: models.BinaryNet(5, width=32, image_size=18), 18),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_networks(name):
    make, size = NAMED[name]
    converted = checked(make(), size)
    found = products(converted)
    assert len(found) == sum(isinstance(m, (bnn.BinaryConv2d, bnn.BinaryLinear))
                             for m in make().modules()) - (name == "binarynet")
    left = dict(converted.report.others)
    assert "batch_norm" not in left and "rprelu" not in left
    assert converted.report.bytes_after < converted.report.bytes_before / 6


@pytest.mark.parametrize("make", [
    lambda: models.RealToBinaryNet(5, blocks=(1, 1), channels=(32, 64)),
    lambda: models.MeliusNet(5, blocks=(1, 1), features=(64,)),
    lambda: models.BNext(5, channels=(32, 32, 64))])
def test_networks_with_joins_and_gates(make):
    model = make()
    count = sum(isinstance(m, (bnn.BinaryConv2d, bnn.BinaryLinear)) for m in model.modules())
    assert len(checked(model, 32).report.products) == count


def test_a_chain_of_blocks_stays_packed():
    found = products(checked(models.ReActNet18(5, blocks=(3,), channels=(32,)), 32))
    steps = ("scale", "bias", "residual", "activation")
    assert found == [("conv2d", "signs", steps, "both"), ("conv2d", "words", steps, "both"),
                     ("conv2d", "words", steps, "real")]


def test_a_plain_chain_is_thresholds():
    found = products(checked(nn.Sequential(
        *stem(), conv(32, 64), norm(64), nn.Hardtanh(), conv(64, 64), nn.MaxPool2d(2), norm(64),
        conv(64, 32), norm(32), nn.Flatten(), bnn.BinaryLinear(32 * 16, 48), nn.BatchNorm1d(48),
        bnn.BinaryLinear(48, 5))))
    threshold = ("threshold",)
    assert found == [("conv2d", "signs", threshold, "words"),
                     *2 * [("conv2d", "words", threshold, "words")],
                     ("linear", "words", threshold, "words"),
                     ("linear", "words", ("bias",), "real")]


MODULES = {
    "relu before the norm": lambda c: nn.Sequential(nn.ReLU(), norm(c)),
    "relu behind the norm": lambda c: nn.Sequential(norm(c), nn.ReLU(inplace=True)),
    "relu6 behind the norm": lambda c: nn.Sequential(norm(c), nn.ReLU6()),
    "clamp before the norm": lambda c: nn.Sequential(nn.Hardtanh(-3, 5), norm(c)),
    "norms in a row": lambda c: nn.Sequential(norm(c), norm(c, scaled=False)),
    "prelu": lambda c: nn.Sequential(norm(c), nn.PReLU(c)),
    "one slope": lambda c: nn.Sequential(norm(c), nn.PReLU()),
    "leaky": lambda c: nn.Sequential(norm(c), nn.LeakyReLU(0.2)),
    "factors": Factors,
    "written rprelu": WrittenRPReLU,
    "rprelu, then a norm": lambda c: nn.Sequential(bnn.RPReLU(c), norm(c)),
    "pool, then a norm": lambda c: nn.Sequential(nn.MaxPool2d(3, 2, 1), norm(c)),
    "average": lambda c: nn.Sequential(nn.AvgPool2d(2), norm(c)),
    "nothing": lambda c: nn.Identity(),
    # Behind a norm: of -6 and less GELU is 0 or just below, by what a vector's lanes round.
    "gelu": lambda c: nn.Sequential(norm(c), nn.GELU()),
}


@pytest.mark.parametrize("name, scale", [
    *((name, "detached") for name in MODULES), ("relu before the norm", None),
    ("relu behind the norm", "xnor"), ("clamp before the norm", None), ("factors", None)])
def test_what_follows_a_convolution(name, scale):
    checked(nn.Sequential(*stem(), conv(32, 64, weight_scale=scale, bias=scale is None),
                          MODULES[name](64), conv(64, 32), norm(32)))


@pytest.mark.parametrize("how", ["add", "cat"])
@pytest.mark.parametrize("after", ["nothing", "relu behind the norm", "written rprelu", "prelu",
                                   "pool, then a norm"])
def test_two_products_together(how, after):
    one, other = (nn.Sequential(conv(32, 32), norm(32)) for _ in range(2))
    width = 64 if how == "cat" else 32
    checked(nn.Sequential(*stem(), Two(one, other, how), MODULES[after](width),
                          bnn.RSign(width), conv(width, 32, input_quantizer=None), norm(32)))


def test_a_dense_layer_reads_signs_of_a_norm():
    layer = nn.Sequential(norm(32), conv(32, 32))
    deeper = nn.Sequential(norm(64), conv(64, 32, groups=2))
    checked(nn.Sequential(*stem(), Two(nn.Identity(), layer, "cat"),
                          Two(nn.Identity(), deeper, "cat"), norm(96), nn.ReLU()))


@pytest.mark.parametrize("pad_value", [0, 1, -1])
def test_a_negative_factor_before_a_sign(pad_value):
    converted = checked(nn.Sequential(*stem(), nn.AvgPool2d(1), norm(32),
                                      conv(32, 48, pad_value=pad_value), norm(48)))
    left = dict(converted.report.others).get("batch_norm", 0)
    assert left == (0 if pad_value == 0 else 1)


def test_a_norm_that_is_0_and_values_at_the_threshold():
    model = nn.Sequential(nn.Identity(), norm(32), conv(32, 32), norm(32))
    model = shuffled(model)
    with torch.no_grad():
        model[1].weight[:8], model[1].bias[:4] = 0, -1
        model[1].running_mean.fill_(0.5), model[1].running_var.fill_(1 - 1e-5)
        model[1].bias[8:] = 0
    x = torch.randint(0, 2, (2, 32, 6, 6)).float() * 0.5  # half of them exactly the mean
    with torch.no_grad():
        assert torch.allclose(convert(model, x)(x), model(x), atol=1e-4)


@settings(max_examples=8, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_generated_networks(data):
    def pick(*options):
        return data.draw(st.sampled_from(options))

    channels, layers, size = pick(32, 40), [], 12
    layers += [nn.Conv2d(3, channels, 3, padding=1)]
    for _ in range(data.draw(st.integers(1, 3))):
        out, groups = pick(32, 40, 64), pick(1, 1, 2)
        kernel, stride = pick(1, 3), pick(1, 1, 2)
        binary = conv(channels, out, kernel, stride=stride, groups=groups,
                      dilation=pick(1, 1, 2) if size > 6 else 1, pad_value=pick(0, 0, 1, -1),
                      weight_scale=pick(None, "detached"), bias=pick(False, True),
                      input_quantizer="ste_sign")
        body = nn.Sequential(binary, MODULES[pick(*MODULES)](out))
        if pick(False, True):
            body = nn.Sequential(bnn.RSign(channels), body)
            binary.input_quantizer = None
        with torch.no_grad():
            shape = body(torch.zeros(2, channels, size, size)).shape
        if shape[1:] == (channels, size, size) and pick(True, False):
            body = Two(body, pick(nn.Identity(), nn.Sequential(conv(channels, out), norm(out))))
        layers.append(body)
        channels, size = shape[1], shape[-1]
    checked(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          bnn.BinaryLinear(channels, 7)), 12)


def test_transposed_and_packed_layers():
    model = nn.Sequential(*stem(), bnn.BinaryConvTranspose2d(32, 16, 3, 2, groups=2), norm(16),
                          conv(16, 32), norm(32))
    checked(model)
    packed = bnn.pack(shuffled(model))
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(convert(packed, x)(x), packed(x), atol=1e-4)
    assert products(convert(packed, x)) == products(convert(model, x))


def test_bfloat16_leaves_the_bits_alone():
    model = shuffled(nn.Sequential(*stem(), conv(32, 32), norm(32), nn.Conv2d(32, 4, 1)))
    x = torch.randn(2, 3, 8, 8)
    converted = convert(model, x, real="bfloat16")
    kinds = {b.dtype for name, b in converted.named_buffers() if name.endswith("bias")}
    assert torch.bfloat16 in kinds
    with torch.no_grad():
        expected = model(x)
        assert (converted(x) - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_it_is_a_module_like_others():
    model = shuffled(models.ReActNet18(5, blocks=(1, 1), channels=(32, 64)))
    x = torch.randn(2, 3, 32, 32)
    converted = convert(model, x)
    expected = converted(x)
    assert torch.equal(copy.deepcopy(converted)(x), expected)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    other = convert(shuffled(copy.deepcopy(model), seed=5), x)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        program = torch.export.export(converted, (x,))
        assert torch.allclose(program.module()(x), expected, atol=1e-5)
    assert not list(converted.parameters())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        converted.train()
    with pytest.raises(RuntimeError, match="keeps its types"):
        converted.half()
    converted.to(memory_format=torch.channels_last)
    assert torch.equal(converted(x), expected)


CALLERS = {
    "another device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16)}


@pytest.mark.parametrize("how", CALLERS)
@pytest.mark.parametrize("real", ["float32", "int8"])
def test_a_network_does_not_depend_on_where_convert_is_called(how, real):
    """On a GPU, too, every constant is made on the model's device: none on the default one."""
    model = shuffled(nn.Sequential(
        nn.Conv2d(3, 32, 3), norm(32), nn.Hardtanh(), conv(32, 32), Factors(32), nn.ReLU(),
        norm(32), conv(32, 32), nn.LeakyReLU(), conv(32, 32), conv(32, 32), nn.ReLU(),
        nn.Conv2d(32, 4, 1)))
    x = torch.randn(2, 3, 8, 8)
    wanted = convert(model, x, real=real)
    with CALLERS[how]():
        converted = convert(model, x, real=real)
    assert torch.equal(converted(x), wanted(x)) and products(converted) == products(wanted)
    assert not any(t.is_inference() for t in converted.buffers())


def test_threads_may_convert_at_once():
    model, x = shuffled(nn.Sequential(*stem(), conv(32, 8))), torch.randn(2, 3, 8, 8)
    wanted = convert(model, x)(x)
    with ThreadPoolExecutor(3) as pool:
        for made in pool.map(lambda _: convert(model, x), range(3)):
            assert torch.equal(made(x), wanted)


def test_the_model_is_not_changed():
    model = shuffled(models.QuickNet(5, blocks=(1, 1), filters=(32, 32))).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    convert(model, torch.randn(1, 3, 16, 16, generator=torch.Generator()))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("model, options, says", [
    (lambda x: x, {}, "model must be a torch.nn.Module, got function"),
    (nn.Linear(3, 3), dict(example_inputs=None), "example_inputs must be given"),
    (nn.Linear(3, 3), dict(real="int4"), "real must be one of float32, bfloat16, int8, got 'int4'"),
    (nn.Linear(3, 3), dict(example_inputs={"x": 1}), "must be a tensor or a tuple .* got dict"),
    (nn.Linear(3, 3), dict(example_inputs=torch.ones(0, 3)), r"at least 1, got .*shape \(0, 3\)"),
    (Branches(), {}, "cannot be exported"),
    (nn.Linear(4, 3), {}, "cannot be exported"),
])
def test_bad_input(model, options, says):
    with pytest.raises(ValueError, match=says):
        convert(model, **{"example_inputs": torch.randn(2, 3), **options})


def test_the_report_is_text():
    text = str(checked(nn.Sequential(*stem(), conv(32, 64), norm(64), nn.GELU(),
                                     nn.Conv2d(64, 2, 1))).report)
    assert "1 products of bits, 2 real" in text and "2.weight  conv2d: signs -> scale, bias" in text
    assert "real: 5.weight: a real layer" in text and "1 gelu" in text


WRITES = {
    "in place": lambda to, state: [t.copy_(state[name]) for name, t in to.state_dict().items()],
    "graph": lambda to, state: to.graph_module.load_state_dict(
        {name.removeprefix("graph_module."): t for name, t in state.items()}),
    "assigned": lambda to, state: to.load_state_dict(state, assign=True)}


@pytest.mark.parametrize("how", WRITES)
def test_what_a_product_reads_follows_its_words(how):
    x, made = torch.randn(1, 64, 6, 6), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(convert(
            nn.Sequential(bnn.RSign(64), bnn.BinaryConv2d(64, 32, 3)).eval(), x))
    expected, other = made[0](x), made[1]
    assert not torch.equal(other(x), expected)
    WRITES[how](other, made[0].state_dict())
    assert torch.equal(other(x), expected)


def test_a_copy_has_the_state_of_the_network():
    x = torch.randn(1, 64, 6, 6)
    made = convert(
        nn.Sequential(bnn.RSign(64), bnn.BinaryConv2d(64, 32, 3)).eval(), x)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)),
                  copy.deepcopy(copy.deepcopy(made).to("meta"))):
        assert list(other.state_dict()) == list(made.state_dict())


def test_a_linear_layer_behind_a_free_size():
    """Its width is that of its weight; the export has it as an expression of the image's sizes."""
    model = shuffled(nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Flatten(),
        bnn.BinaryLinear(8 * 16, 24), nn.BatchNorm1d(24), nn.Linear(24, 5)))
    images, size = torch.randn(2, 3, 8, 8), torch.export.Dim.AUTO
    network = convert(model, images, dynamic_shapes=({0: size, 2: size, 3: size},))
    for x in (images, torch.randn(3, 3, 8, 8), torch.randn(3, 3, 4, 16)):
        torch.testing.assert_close(network(x), model(x))


def test_a_packed_linear_layer_behind_a_packed_one():
    """Whose signs the export takes by defaults alone."""
    model = nn.Sequential(bnn.BinaryLinear(40, 33), bnn.BinaryLinear(33, 4)).eval()
    rows = torch.randn(3, 40)
    network = convert(bnn.pack(model), rows)
    assert torch.equal(network(rows), model(rows))
    assert [p.reads for p in network.report.products] == ["signs", "words"]


def test_a_model_without_values_is_refused():
    model = nn.Sequential(bnn.BinaryConv2d(8, 8, 3), nn.BatchNorm2d(8)).to("meta")
    with pytest.raises(ValueError, match="convert: 0.weight, 0.bias, 1.weight of the"):
        convert(model, torch.randn(2, 8, 7, 7))


def test_words_of_another_type_are_not_loaded():
    model = nn.Sequential(bnn.BinaryConv2d(8, 8, 3), nn.BatchNorm2d(8),
                          bnn.BinaryConv2d(8, 4, 3)).eval()
    x = torch.randn(2, 8, 7, 7)
    network = nn.Sequential(convert(model, x))
    before = network(x)
    state = {key: value.half() for key, value in network.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Converted: 0\.graph_module\.\w+ of the state must be "
                       "torch.int32, got torch.float16"):
        network.load_state_dict(state)
    assert torch.equal(network(x), before)


def test_in_transforms_of_torch_func():
    x = torch.randn(3, 8)
    lines = nn.Sequential(bnn.BinaryLinear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()
    network = convert(lines, x)
    mapped = torch.vmap(lambda row: network(row.unsqueeze(0)).squeeze(0))(x)
    torch.testing.assert_close(mapped, network(x))
    images = convert(nn.Sequential(bnn.BinaryConv2d(3, 4, 3), nn.BatchNorm2d(4),
                                   nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 5, 5))
    with pytest.raises(RuntimeError, match="Converted: torch.vmap has no memory formats"):
        torch.vmap(lambda image: images(image.unsqueeze(0)))(torch.randn(2, 3, 5, 5))
