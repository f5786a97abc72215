"""What constructors refuse, and that they do when they are called, not the layer later."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from torch import nn

import bitkernels.nn as bnn
from bitkernels import metrics, models, optim, quantizers
from bitkernels._arguments import choice, flag, integer, number, sizes
from bitkernels.nn.conversion import NormSign
from bitkernels.train import Loss, Method, Options, Recipe, Schedule, Stage


class NoInteger:
    """Neither a number nor a sequence."""


NO_INTEGERS = (None, True, 1.0, float("nan"), "3", b"3", -1, 2**40, torch.tensor(3), 1j, (1,) * 9,
               (n for n in range(2)), NoInteger(), int)
NO_NUMBERS = (True, "0.5", float("nan"), -1.0, torch.ones(2), (0.5,), 1j, NoInteger())
NO_FLAGS = (None, 2, 1.0, "no", [], float("nan"), torch.tensor(True), NoInteger())
NO_TEXTS = (1, True, b"zeros", ("zeros",), "nonsense", NoInteger())
WRONG = {"integer": NO_INTEGERS, "number": NO_NUMBERS, "flag": NO_FLAGS, "choice": NO_TEXTS,
         "module": (3, "x", nn.ReLU, len, torch.zeros(1)),
         "quantizer": (3, "nonsense", b"ste_sign", True, torch.zeros(1), [])}

GEOMETRY = dict.fromkeys(("in_channels", "out_channels", "kernel_size", "stride", "padding",
                          "dilation", "groups"), "integer")
LAYER = dict(bias="flag", padding_mode="choice", input_quantizer="quantizer")
LATENT = dict(weight_quantizer="quantizer", weight_scale="choice")
CONV = dict(in_channels=8, out_channels=8, kernel_size=3)
LINEAR = dict(in_features="integer", out_features="integer", bias="flag",
              input_quantizer="quantizer")


def block(**options):
    conv = bnn.BinaryConv2d(8, 8, 3, padding=1, bias=False)
    return bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(8), **options)


def kinds(count):
    return bnn.__dict__[f"BinaryConv{count}d"]


def watch(**options):
    return metrics.watch(**{"model": bnn.BinaryLinear(8, 8), **options})


CASES = [
    *((kinds(n), CONV, {**GEOMETRY, **LAYER, **LATENT, "pad_value": "integer"}) for n in (1, 2, 3)),
    *((cls, CONV, {**GEOMETRY, **LAYER, **LATENT, "output_padding": "integer"})
      for cls in (bnn.BinaryConvTranspose1d, bnn.BinaryConvTranspose2d)),
    (bnn.SameConv2d, CONV, {k: v for k, v in {**GEOMETRY, **LAYER, **LATENT}.items()
                            if k not in ("padding", "padding_mode")}),
    *((cls, CONV, {**GEOMETRY, **LAYER, "pad_value": "integer", "scale": "flag"})
      for cls in (bnn.PackedConv1d, bnn.PackedConv2d)),
    *((cls, CONV, {**GEOMETRY, **LAYER, "output_padding": "integer", "scale": "flag"})
      for cls in (bnn.PackedConvTranspose1d, bnn.PackedConvTranspose2d)),
    (bnn.BinaryLinear, dict(in_features=8, out_features=8), {**LINEAR, **LATENT}),
    (bnn.PackedLinear, dict(in_features=8, out_features=8), {**LINEAR, "scale": "flag"}),
    (bnn.RSign, dict(num_features=8), dict(num_features="integer", quantizer="quantizer")),
    (bnn.RPReLU, dict(num_features=8), dict(num_features="integer")),
    (NormSign, dict(num_features=8, dims=2),
     dict(num_features="integer", dims="integer", quantizer="quantizer")),
    (bnn.SyncBatchNorm, dict(num_features=8),
     dict(num_features="integer", eps="number", momentum="number", affine="flag",
          track_running_stats="flag")),
    (block, {}, dict(shortcut="module", relu="flag", recompute="flag")),
    (bnn.binarize, dict(model=nn.Sequential(nn.Conv2d(8, 8, 3))),
     dict(skip_first="flag", skip_last="flag", keep_downsample="flag", keep_depthwise="flag",
          keep_gates="flag", keep_expansions="flag", verbose="flag", pad_value="integer",
          activation="choice", weight_scale="choice")),
    (quantizers.SteSign, {}, dict(clip_value="number")),
    (quantizers.MagnitudeAwareSign, {}, dict(clip_value="number")),
    (quantizers.SteHeaviside, {}, dict(clip_value="number")),
    (quantizers.SwishSign, {}, dict(beta="number")),
    (quantizers.SteTern, {}, dict(threshold_value="number", ternary_weight_networks="flag",
                                  clip_value="number")),
    (quantizers.DoReFa, {}, dict(k_bit="integer", mode="choice")),
    (quantizers.NoOp, {}, dict(precision="integer")),
    (optim.Bop, dict(params=[nn.Parameter(torch.ones(2))]),
     dict(gamma="number", threshold="number", foreach="flag")),
    (optim.Bop2ndOrder, dict(params=[nn.Parameter(torch.ones(2))]),
     dict(gamma="number", threshold="number", sigma="number", unbiased="flag", foreach="flag")),
    (metrics.Saturation, {}, dict(clip="number")),
    (metrics.DeadWeights, {}, dict(window="integer", tolerance="number")),
    (metrics.Histogram, {}, dict(bins="integer")),
    (watch, {}, dict(model="module", optimizer="module", every="integer", window="integer",
                     activations="flag", histograms="flag")),
    (models.ReActNet, {}, dict(num_classes="integer", in_channels="integer", stem_stride="integer",
                               real_groups="integer", binary_weights="flag")),
    (models.BinaryNet, {}, dict(width="integer", stages="integer", norm_momentum="number",
                                first_padding="integer")),
    (models.QuickNetBlock, dict(channels=32), dict(channels="integer", binary_weights="flag")),
    (Schedule, {}, dict(kind="choice", per="choice", final="number", factor="number",
                        warmup="number")),
    (Method, dict(name="adam", lr=0.1), dict(
        name="choice", lr="number", eps="number", momentum="number", weight_decay="number",
        decay="choice", threshold="number")),
    (Loss, {}, dict(labels="number", label_smoothing="number", temperature="number")),
    (Stage, dict(name="a", epochs=1, batch_size=8, method=Method("adam", 0.1)), dict(
        activations="choice", weights="choice", method="module", loss="module",
        latent_clip="number", gradient_clip="number", signs_at_start="flag")),
    (Options, {}, dict(workers="integer", checkpoint_every="integer", bf16="flag", watch="flag")),
]
MAY_BE_NONE = ("stages", "real_groups", "foreach", "optimizer")


@pytest.mark.parametrize("make, given, takes", CASES, ids=[c[0].__name__ for c in CASES])
def test_wrong_arguments_are_refused_at_construction(make, given, takes):
    make(**given) if make is not quantizers.NoOp else make(precision=1)
    for name, kind in takes.items():
        for value in WRONG[kind]:
            if (value is None and name in MAY_BE_NONE) or (name, value) == ("pad_value", -1):
                continue
            with pytest.raises((ValueError, TypeError), match=name) as caught:
                make(**{**given, name: value})
            assert "must be" in str(caught.value) or "unknown" in str(caught.value), (name, value)


@pytest.mark.parametrize("name, value", [
    ("stride", 0), ("stride", 1.0), ("padding", "sme"), ("padding", -1), ("dilation", (1, 2, 3)),
    ("stride", None), ("pad_value", 2), ("padding_mode", "mirror")])
def test_wrong_arguments_are_refused_when_they_are_assigned(name, value):
    layer = bnn.BinaryConv2d(8, 8, 3)
    before = repr(layer)
    with pytest.raises(ValueError, match=f"BinaryConv2d: {name} must be"):
        setattr(layer, name, value)
    assert repr(layer) == before


@pytest.mark.parametrize("make", [
    lambda n: bnn.BinaryConv2d(n(8), n(16), n(3), stride=(n(1), n(2)), padding=n(1), groups=n(2),
                               pad_value=n(-1)),
    lambda n: bnn.BinaryConvTranspose2d(n(8), n(8), [n(3), n(2)], n(2)),
    lambda n: bnn.PackedConv2d(n(8), n(16), n(3), padding=n(1)),
    lambda n: bnn.BinaryLinear(n(8), n(4)), lambda n: bnn.RSign(n(8)), lambda n: bnn.RPReLU(n(8)),
    lambda n: quantizers.DoReFa(n(2)),
    lambda n: models.ReActNet(n(5), n(1), channels=(n(8), n(16))),
    lambda n: models.create("quicknet", num_classes=n(4), in_channels=n(1))])
def test_integers_of_numpy_are_integers(make):
    numpy = pytest.importorskip("numpy")
    torch.manual_seed(0)
    expected = make(int)
    for kind in (numpy.int64, numpy.int32, numpy.int8):
        found = make(kind)
        assert repr(found) == repr(expected)
        assert repr(pickle.loads(pickle.dumps(found))) == repr(copy.deepcopy(found)) == repr(found)
        assert getattr(found, "pretrained_config", None) == getattr(
            expected, "pretrained_config", None)
    assert not any(type(v).__module__ == "numpy" for v in vars(found).values())


def test_numbers_of_numpy_are_plain_in_recipes():
    numpy = pytest.importorskip("numpy")
    stage = Stage("a", numpy.int64(2), numpy.int32(8), Method("adam", numpy.float32(0.5)))
    settings = Recipe("r", (stage,)).settings()
    assert {type(v) for v in settings.values()} <= {int, float, str, bool, list, type(None)}
    assert settings["a.epochs"] == 2 and settings["a.method.lr"] == 0.5


def test_what_the_checks_take():
    assert integer("f", "n", 3) == 3 and sizes("f", "n", [1, 2], 2) == sizes("f", "n", (1, 2), 2)
    assert sizes("f", "n", 2, 3) == (2, 2, 2) and number("f", "x", Fraction(1, 2)) == 0.5
    assert flag("f", "b", False) is False and choice("f", "c", None, (None, "a")) is None
    for call, text in (
            (lambda: integer("f", "n", 0), "f: n must be an integer of at least 1, got 0"),
            (lambda: integer("f", "n", 9, 1, 8), "f: n must be an integer from 1 to 8, got 9"),
            (lambda: integer("f", "n", torch.ones(2, 2)), "got a tensor of shape (2, 2)"),
            (lambda: integer("f", "n", [1] * 99), "got list"),
            (lambda: sizes("f", "n", (1, 2), 3), "n must be an integer or 3 of them, got (1, 2)"),
            (lambda: number("f", "x", 2, 0, 1), "f: x must be a number in [0, 1], got 2"),
            (lambda: number("f", "x", 0, above=0), "f: x must be a finite number above 0, got 0"),
            (lambda: flag("f", "b", "no"), "f: b must be True or False, got 'no'"),
            (lambda: choice("f", "c", 1, (True, "a")), "f: c must be one of True, 'a', got 1"),
            (lambda: choice("f", "c", "b", ("a",)), "f: c must be 'a', got 'b'")):
        with pytest.raises(ValueError) as caught:
            call()
        assert text in str(caught.value)
