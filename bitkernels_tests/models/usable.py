"""What every network must be able to do, on a small one of its class."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels import nn as bnn
from bitkernels.train.distillation import FeatureTap


def check_usable(make: Callable[[], nn.Module], images: Tensor) -> None:
    """make: the network for these images (N, C, H, W), with 10 classes, as initialised."""
    model = make()
    trains(model, images)
    model.eval()
    copies_and_loads(make, model, images)
    packs(model, images)
    compiles_and_exports(model, images)
    attention_layers_are_images(model, images)
    runs_in_other_precisions(model, images)
    with torch.device("meta"):
        assert make()(images.to("meta")).shape == (len(images), 10)


def trains(model: nn.Module, images: Tensor) -> None:
    """Two updates: every parameter moves."""
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    labels = torch.arange(len(images)) % 10
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, start[name]), name


@torch.no_grad()
def copies_and_loads(make: Callable[[], nn.Module], model: nn.Module, images: Tensor) -> None:
    logits = model(images)
    assert torch.equal(copy.deepcopy(model)(images), logits)
    other = make().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), logits)
    one = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(one, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


@torch.no_grad()
def packs(model: nn.Module, images: Tensor) -> None:
    """Every layer that has a packed twin, as all but those on real images or values."""
    packed = bnn.pack(model, filter=lambda _, layer: layer.pack_obstacle() is None)
    assert any(type(m).__name__.startswith("Packed") for m in packed.modules())
    logits = model(images)
    torch.testing.assert_close(packed(images), logits, rtol=1e-5, atol=1e-5)
    assert len(logits.argmax(1).unique()) > 1


def compiles_and_exports(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        logits = model(images)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), logits, rtol=1e-5, atol=1e-5)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(torch.cat([images, images])),
                                   torch.cat([logits, logits]), rtol=1e-5, atol=1e-5)


def attention_layers_are_images(model: nn.Module, images: Tensor) -> None:
    with FeatureTap(model, model.attention_layers) as tap, torch.no_grad():  # type: ignore
        model(images)
        assert [f.dim() for f in tap.features()] == [4] * len(model.attention_layers)  # type: ignore


def runs_in_other_precisions(model: nn.Module, images: Tensor) -> None:
    half = copy.deepcopy(model).half()
    with torch.no_grad():
        logits = half(images.half())
        assert logits.dtype == torch.float16 and torch.isfinite(logits).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images).float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
