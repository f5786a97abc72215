"""What reaches a sign: binarize finds activations that are never negative, however they get there.

Every network ends with its signs checked: each channel of the input of each binary layer has both.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitkernels.nn as bnn
from bitkernels import quantizers
from bitkernels.nn import BinaryLayer, NormSign, binarize
from bitkernels.nn.conversion.analysis import analyse

C = 8


def conv(inputs: int = C, outputs: int = C, size: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def block(inputs: int = C, outputs: int = C, *activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs), nn.BatchNorm2d(outputs), *activation)


class Net(nn.Module):
    """stem, `body`, a head; the body is what the tests are about."""

    def __init__(self, body: nn.Module, outputs: int = C) -> None:
        super().__init__()
        self.stem, self.body = block(3, C), body
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


class Code(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        self.code = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def one_signed(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How many channels of a binary layer's input have one sign only, where any do."""
    counts: dict[str, int] = {}

    def look(layer, args):
        x = args[0].detach()
        if isinstance(layer.input_quantizer, NormSign):
            x = layer.input_quantizer(x)
        channels = x.flatten(0, -2) if isinstance(layer, nn.Linear) else x.transpose(0, 1).flatten(
            1).t()
        negative = (channels < 0).float().mean(0)
        constant = int(((negative == 0) | (negative == 1)).sum())
        if constant:
            counts[names[layer]] = constant

    names = {m: name for name, m in model.named_modules()}
    hooks = [m.register_forward_pre_hook(look) for m in names if isinstance(m, BinaryLayer)]
    assert hooks
    model.train()
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return counts


def sees_its_input(model: nn.Module, inputs: Tensor | None = None) -> None:
    """Untrained, and with its statistics settled."""
    x = torch.randn(16, 3, 8, 8) if inputs is None else inputs
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            y = model(x)
        assert not torch.equal(y[0], y[1])
        for _ in range(8):
            assert one_signed(model, x) == {}
    model.eval()


class Residual(nn.Module):
    """As torchvision's BasicBlock: one ReLU, called twice."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride),
                                        nn.BatchNorm2d(outputs)) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Gated(nn.Module):
    """Squeeze-and-excitation between a ReLU and a convolution."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(), conv()
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, 4, 1), nn.ReLU(),
                                    nn.Conv2d(4, C, 1), gate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.conv(x * self.excite(x))


KEEPING = {
    "pooling": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), conv()),
    "dropout": lambda: nn.Sequential(nn.ReLU(), nn.Dropout2d(0.1), nn.Dropout(0.1), conv()),
    "identity": lambda: nn.Sequential(nn.ReLU6(), nn.Identity(), nn.Upsample(scale_factor=2),
                                      nn.ZeroPad2d(1), conv()),
    "bits' pool": lambda: nn.Sequential(nn.ReLU(), bnn.MaxPool2d(2), conv()),
    "functions": lambda: Code(
        lambda s, x: s.conv(F.interpolate(F.dropout(F.max_pool2d(s.relu(x), 2)), scale_factor=2)),
        relu=nn.ReLU(), conv=conv()),
    "shuffle": lambda: Code(
        lambda s, x: s.conv(s.relu(x).view(x.size(0), 2, C // 2, 8, 8).transpose(1, 2)
                            .contiguous().view(x.size(0), -1, 8, 8)), relu=nn.ReLU(), conv=conv()),
    "chunk and cat": lambda: Code(
        lambda s, x: s.conv(torch.cat(s.relu(x).chunk(2, dim=1)[::-1], 1)),
        relu=nn.ReLU(), conv=conv()),
    "half of a cat": lambda: Code(
        lambda s, x: s.conv(torch.cat([s.relu(x), x], 1)), relu=nn.ReLU(), conv=conv(2 * C)),
    "sum of two": lambda: Code(
        lambda s, x: s.conv(s.a(x) + s.b(x.roll(1, 1))), a=nn.ReLU(), b=nn.ReLU(), conv=conv()),
    "residual": lambda: nn.Sequential(Residual(C, C), Residual(C, C)),
    "Threshold": lambda: nn.Sequential(nn.Threshold(0.0, 0.0), conv()),
    "Hardtanh": lambda: nn.Sequential(nn.Hardtanh(0.0, 1.0), conv()),
    "Sigmoid": lambda: nn.Sequential(nn.Sigmoid(), conv()),
    "Softplus": lambda: nn.Sequential(nn.Softplus(), conv()),
    "norm after": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(C), conv()),
    "gate": lambda: Gated(nn.Sigmoid()),
    "hard gate": lambda: Gated(nn.Hardsigmoid()),
}


@pytest.mark.parametrize("name", KEEPING)
def test_activations_before_a_sign_are_replaced(name):
    reports: list[bnn.BinarizeReport] = []
    model = binarize(Net(KEEPING[name]()), report=reports.append)
    assert reports[0].activations
    pooled = name in ("pooling", "bits' pool", "functions")  # few negative values are left
    assert [isinstance(m, NormSign) for m in model.modules()].count(True) == pooled
    assert len(reports[0].normalized) == pooled
    sees_its_input(model)


FUNCTIONS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "Tensor.relu_": lambda x: x.clone().relu_(),
    "F.relu6": F.relu6,
    "F.hardtanh": lambda x: F.hardtanh(x, 0, 1),
    "clamp": lambda x: x.clamp(min=0),
    "F.threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "sigmoid": torch.sigmoid,
    "F.hardsigmoid": F.hardsigmoid,
    "F.softplus": F.softplus,
    "softmax": lambda x: x.softmax(1),
    "abs": torch.abs,
    "square": lambda x: x.square(),
    "power": lambda x: x ** 2,
    "product of two": lambda x: F.relu(x) * torch.sigmoid(x),
    "product with itself": lambda x: x * x,
    "product with a mask": lambda x: x * (x > 0),
    "product with a real mask": lambda x: (x >= 0).to(x.dtype) * x,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "where not": lambda x: torch.where(x < 0, torch.zeros_like(x), x),
    "Tensor.where": lambda x: x.where(x > 0, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "max": lambda x: torch.max(torch.zeros(()), x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("recorded", [False, True])
def test_layers_behind_functions_get_a_norm(name, recorded):
    function = FUNCTIONS[name]
    model = Net(Code(lambda s, x: s.conv(function(x)), conv=conv()))
    reports: list[bnn.BinarizeReport] = []
    example = torch.randn(2, 3, 8, 8) if recorded else None
    binarize(model, report=reports.append, example_inputs=example)
    assert list(reports[0].normalized) == ["body.conv"] and not reports[0].activations
    assert isinstance(model.body.conv.input_quantizer, NormSign)
    sees_its_input(model)
    packed = bnn.pack(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(packed(x), model(x))
    assert all(p.requires_grad for p in model.parameters())  # packing is not the model's business


SIGNED = {
    "norm between": lambda: nn.Sequential(nn.ReLU(), nn.GroupNorm(2, C), conv()),
    "SiLU": lambda: nn.Sequential(nn.SiLU(), conv()),
    "GELU": lambda: Code(lambda s, x: s.conv(F.gelu(x)), conv=conv()),
    "LeakyReLU": lambda: nn.Sequential(nn.LeakyReLU(), conv()),
    "plus a real value": lambda: Code(lambda s, x: s.conv(x + s.relu(x)), relu=nn.ReLU(),
                                      conv=conv()),
    "product with another mask": lambda: Code(lambda s, x: s.conv(x * (x > -1)), conv=conv()),
    "where less": lambda: Code(lambda s, x: s.conv(torch.where(x > 0, x, -1.0)), conv=conv()),
    "maximum of two": lambda: Code(lambda s, x: s.conv(torch.maximum(x, x.flip(1))), conv=conv()),
    "less a constant": lambda: Code(lambda s, x: s.conv(s.relu(x) - 0.5), relu=nn.ReLU(),
                                    conv=conv()),
    "after the signs": lambda: nn.Sequential(conv(), nn.ReLU()),
    "hardtanh": lambda: nn.Sequential(nn.Hardtanh(), conv()),
}


@pytest.mark.parametrize("name", SIGNED)
def test_what_keeps_signs_is_kept(name):
    reports: list[bnn.BinarizeReport] = []
    model = Net(SIGNED[name]())
    before = [type(m) for m in model.modules() if not isinstance(m, nn.Conv2d)]
    binarize(model, report=reports.append)
    assert not reports[0].activations and not reports[0].normalized
    after = [type(m) for m in model.modules() if type(m) is not quantizers.SteSign
             and not isinstance(m, nn.Conv2d)]
    assert after == before


@pytest.mark.parametrize("activation, kind", [("prelu", nn.PReLU), ("rprelu", bnn.RPReLU),
                                              ("hardtanh", nn.Hardtanh)])
def test_the_choice_of_activation(activation, kind):
    model = binarize(Net(nn.Sequential(nn.ReLU(), conv())), activation=activation)
    assert type(model.body[0]) is kind
    if activation == "prelu":
        assert model.body[0].num_parameters == C
    sees_its_input(model)


def test_kept_activations_warn_once_in_training():
    reports: list[bnn.BinarizeReport] = []
    model = binarize(Net(nn.Sequential(nn.ReLU(), conv())), activation="keep",
                     report=reports.append)
    assert reports[0].single_signed == {"body.1": "body.0"} and type(model.body[0]) is nn.ReLU
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"BinaryConv2d\(8, 8, .*is \+1") as said:
        model(x)
        model(x)
    assert len(said) == 1


def test_activations_that_reach_no_sign_are_kept():
    """Those before real layers: a depthwise one, a gate's, the head."""
    body = nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), conv(groups=C), nn.BatchNorm2d(C),
                         nn.ReLU(), conv(C, 2 * C), nn.BatchNorm2d(2 * C), nn.ReLU())
    model = binarize(Net(body, 2 * C))
    assert [type(body[i]) for i in (2, 5, 8)] == [nn.ReLU, nn.PReLU, nn.ReLU]
    gated = binarize(Net(Gated(nn.Sigmoid()))).body
    assert type(gated.relu) is nn.PReLU and type(gated.excite[2]) is nn.ReLU
    assert type(gated.excite[1]) is nn.Conv2d
    sees_its_input(model)


def test_the_size_of_an_image_is_not_its_values():
    """Efficient channel attention: the gate is shaped as the image that it multiplies."""
    def eca(s, x):
        x = s.relu(x)
        y = s.gate(x.mean((2, 3)).view(x.shape[0], 1, -1))
        return s.conv(x * torch.sigmoid(y).view(x.size(0), x.shape[1] // 1, 1, 1).expand_as(x))

    reports: list = []
    model = Net(Code(eca, relu=nn.ReLU(), gate=nn.Conv1d(1, 1, 3, padding=1), conv=conv()))
    binarize(model, report=reports.append)
    assert reports[0].kept["body.gate"] == "layer of a gate (keep_gates)"
    assert type(model.body.conv) is bnn.BinaryConv2d and type(model.body.relu) is nn.PReLU
    sees_its_input(model)


def test_one_module_called_with_different_channels():
    body = Code(lambda s, x: s.b(s.relu(s.a(s.relu(x)))), a=block(C, 2 * C), b=block(2 * C, C),
                relu=nn.ReLU())
    model = binarize(Net(body), activation="rprelu")
    assert type(model.body.relu) is nn.PReLU and model.body.relu.num_parameters == 1
    sees_its_input(model)


def test_linear_layers_and_sequences():
    """Their features are the last dimension, so a slope per channel would be wrong."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16),
                          Code(lambda s, x: s.line(F.relu(x)), line=nn.Linear(16, 16)),
                          nn.Linear(16, 3))
    binarize(model)
    assert model[1].num_parameters == 1
    for shape in ((64, 6), (8, 10, 6), (2, 3, 20, 6)):
        sees_its_input(model, torch.randn(shape))


def test_one_dimension_and_no_batch():
    for dims, layer in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        model = nn.Sequential(layer(2, C, 3), Code(lambda s, x: s.conv(F.relu(x)),
                                                   conv=layer(C, C, 1)), layer(C, 2, 1))
        binarize(model).train()
        assert isinstance(model[1].conv.input_quantizer, NormSign)
        image = torch.randn(2, *[6] * dims)
        batched = model(image.unsqueeze(0))
        torch.testing.assert_close(model(image), batched.squeeze(0))


@pytest.mark.parametrize("inputs, stride", [(C, 2), (C, 1)])
def test_shortcut_convolutions_stay_real(inputs, stride):
    body = nn.Sequential(Residual(inputs, 2 * C, stride), Residual(2 * C, 2 * C))
    model = binarize(Net(body, 2 * C))
    assert type(body[0].downsample[0]) is nn.Conv2d
    assert isinstance(body[0].conv1, bnn.BinaryConv2d)
    sees_its_input(model)
    body = nn.Sequential(Residual(inputs, 2 * C, stride))
    binarize(Net(body, 2 * C), keep_downsample=False)
    assert isinstance(body[0].downsample[0], bnn.BinaryConv2d)


def test_pooled_shortcut_and_what_is_none():
    """1x1 convolutions on the main path, as in a bottleneck, are no shortcuts."""
    bottleneck = nn.Sequential(block(C, 4, nn.ReLU()), nn.Conv2d(4, 2 * C, 1),
                               nn.BatchNorm2d(2 * C))
    short = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(C, 2 * C, 1), nn.BatchNorm2d(2 * C))
    body = Code(lambda s, x: s.main(x) + s.short(x), main=bottleneck, short=short)
    inverted = Code(lambda s, x: x + s.main(x), main=nn.Sequential(
        nn.Conv2d(2 * C, 4 * C, 1), nn.BatchNorm2d(4 * C), nn.Conv2d(4 * C, 2 * C, 1)))
    binarize(Net(nn.Sequential(body, inverted), 2 * C))
    assert type(body.short[1]) is nn.Conv2d
    assert isinstance(bottleneck[1], bnn.BinaryConv2d)
    assert all(isinstance(inverted.main[i], bnn.BinaryConv2d) for i in (0, 2))


@pytest.mark.parametrize("channels, times, stays", [(C, 6, True), (C, 1, False), (128, 2, False)])
def test_expansions_in_front_of_depthwise_layers(channels, times, stays):
    """As in MobileNetV2: few channels to more, which a depthwise layer mixes, and back."""
    wide = channels * times

    def body():
        return nn.Sequential(
            nn.Conv2d(C, channels, 3), nn.BatchNorm2d(channels), nn.Conv2d(channels, wide, 1),
            nn.BatchNorm2d(wide), nn.ReLU6(), nn.Conv2d(wide, wide, 3, groups=wide),
            nn.BatchNorm2d(wide), nn.ReLU6(), nn.Conv2d(wide, C, 1), nn.BatchNorm2d(C))

    model, reports = binarize(Net(body())), []
    expand, project = model.body[2], model.body[8]
    assert (type(expand) is nn.Conv2d) == stays and isinstance(project, bnn.BinaryConv2d)
    sees_its_input(model)
    asked = binarize(Net(body()), keep_expansions=False, report=reports.append)
    assert isinstance(asked.body[2], bnn.BinaryConv2d)
    assert not any("keep_expansions" in why for why in reports[0].kept.values())


def test_depthwise_and_gates_on_request():
    body = nn.Sequential(conv(groups=C), nn.BatchNorm2d(C), Gated(nn.Sigmoid()))
    binarize(Net(body), keep_depthwise=False, keep_gates=False)
    assert isinstance(body[0], bnn.BinaryConv2d) and isinstance(body[2].excite[1], bnn.BinaryConv2d)


def test_first_and_last_by_the_calls():
    """Registered in another order than called, two inputs, an auxiliary head in training."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.aux = nn.Linear(C, 3), nn.Linear(C, 2)
            self.middle, self.left, self.right = conv(), conv(3, C), conv(1, C)

        def forward(self, a, b):
            x = self.middle(self.left(a) + self.right(b))
            pooled = x.mean((2, 3))
            return (self.head(pooled), self.aux(pooled)) if self.training else self.head(pooled)

    found = analyse(model := Odd().eval())
    assert found.first == {model.left, model.right} and found.last == {model.head, model.aux}
    assert not model.training
    binarize(model)
    assert [type(m) for m in model.children() if isinstance(m, BinaryLayer)] == [bnn.BinaryConv2d]


@pytest.mark.parametrize("layer", [lambda: conv(), lambda: nn.Linear(C, C)])
def test_integers_of_a_binary_layer_get_a_norm(layer):
    """Their magnitude is far above 1, where the sign's gradient ends; a weight scale lowers it."""
    def model():
        return nn.Sequential(layer(), nn.Hardtanh(), layer(), nn.SiLU(), layer(), layer())

    norms = [isinstance(m.input_quantizer, NormSign) for m in binarize(model())
             if isinstance(m, BinaryLayer)]
    assert norms == [False, True]
    scaled = binarize(model(), weight_scale="detached")
    assert not any(isinstance(m, NormSign) for m in scaled.modules())
    kept = binarize(model(), activation="keep")
    assert not any(isinstance(m, NormSign) for m in kept.modules())


def test_other_quantizers_want_their_relu():
    model = Net(nn.Sequential(nn.ReLU(), conv()))
    binarize(model, input_quantizer="dorefa_quantizer")
    assert type(model.body[0]) is nn.ReLU


def test_transformer_layers():
    for activation in ("relu", nn.ReLU(), "gelu"):
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True)
        model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3))
        with pytest.warns(UserWarning, match="1.self_attn.out_proj"):
            binarize(model)
        assert isinstance(layer.linear2.input_quantizer, NormSign)
        assert isinstance(layer.activation, nn.PReLU) == isinstance(activation, nn.Module)
        model.train()
        with torch.no_grad():
            model(torch.randn(4, 5, 6))


@pytest.mark.parametrize("first, second", [(nn.ReLU, nn.ReLU), (nn.ReLU6, nn.ReLU),
                                           (nn.Sigmoid, nn.ReLU)])
def test_activations_in_a_row_all_give_way(first, second):
    """As in cells that begin with a ReLU, behind a block that ends with one."""
    body = nn.Sequential(first(), nn.Sequential(second(), conv(), nn.BatchNorm2d(C)))
    model = binarize(Net(body))
    assert isinstance(body[0], nn.PReLU) and isinstance(body[1][0], nn.PReLU)
    sees_its_input(model)


@pytest.mark.parametrize("dims", [-1, 4, 1.0])
def test_a_norm_before_a_sign_has_up_to_three_dimensions(dims):
    with pytest.raises(ValueError, match=f"dims must be an integer from 0 to 3, got {dims}"):
        NormSign(8, dims)
