"""Every published network, on the meta device, where sizes and operators cost nothing."""

from __future__ import annotations

import pytest
import torch

from bitkernels import models
from bitkernels import nn as bnn
from bitkernels.models.registry import entry, takes_image_size
from bitkernels.nn import residual_block

# Made for one size of images, and the sizes that are cheap.
SIZES = {"binary_alexnet": 96, "dorefanet": 96, "xnornet": 224, "binarynet": 32}
# As bnext_s with more channels, which cost seconds.
LARGE = ("bnext_m", "bnext_l")


@pytest.mark.parametrize("name", [name for name in models.list_models() if name not in LARGE])
def test_trains_fused_and_packs(name, monkeypatch):
    """A step of training; packed, in half precision, one image. Of odd sides where that may be."""
    fused, train = [], residual_block._train
    monkeypatch.setattr(residual_block, "_train",
                        lambda *args, **options: (fused.append(1), train(*args, **options))[1])
    sized = {"image_size": SIZES[name]} if takes_image_size(entry(name).build) else {}
    with torch.device("meta"):
        model = models.create_model(name, num_classes=7, **sized)
        images = torch.empty(2, 3, *[sized.get("image_size", 33)] * 2)
        logits = model.train()(images)
        logits.sum().backward()
    assert logits.shape == (2, 7) and all(p.grad is not None for p in model.parameters())
    blocks = [m for m in model.modules() if isinstance(m, bnn.BinaryResidualBlock)]
    assert len(fused) == len(blocks)
    packed = bnn.pack(model, filter=lambda _, layer: layer.pack_obstacle() is None)
    assert model.training and not packed.training
    logits = packed.half()(images[:1].half())
    assert logits.shape == (1, 7) and logits.dtype == torch.float16
    left = {type(m).__name__ for m in packed.modules() if isinstance(m, bnn.BinaryLayer)}
    assert not left or name in ("binary_alexnet", "binarynet", "dorefanet", "xnornet")
