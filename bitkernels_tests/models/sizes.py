"""Parameters, multiplications and bytes of a network, counted as Larq counts them."""

from __future__ import annotations

import torch
from torch import nn

from bitkernels.models import create_model
from bitkernels.nn import BinaryLayer


def check_sizes(name: str, keras: int, binary_macs: int, real_macs: int, packed_bytes: int,
                norm_values: int = 4) -> None:
    """At the published image size.

    keras: parameters and running statistics; norm_values: counted a channel of a batch norm.
    packed_bytes: a bit a binary weight, 4 bytes a real one, and of a batch norm 2 values a channel.
    """
    macs = {True: 0, False: 0}

    def count(module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        pixels = output[0, 0].numel() if output.dim() == 4 else 1
        macs[isinstance(module, BinaryLayer)] += module.weight.numel() * pixels

    with torch.device("meta"):
        model = create_model(name).eval()
        norms = 0
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
            elif isinstance(module, nn.BatchNorm2d):
                norms += module.num_features
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    parameters = sum(p.numel() for p in model.parameters())
    binary = sum(m.weight.numel() for m in model.modules() if isinstance(m, BinaryLayer))
    assert parameters + (norm_values - 2) * norms == keras
    assert (macs[True], macs[False]) == (binary_macs, real_macs)
    assert binary // 8 + 4 * (parameters - binary) == packed_bytes
