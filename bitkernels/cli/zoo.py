"""What the commands on networks share: the network itself, its weights, its pictures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bitkernels import models
from bitkernels import nn as bnn
from bitkernels.backends import cpu
from bitkernels.models import preprocessing
from bitkernels.models.preprocessing import Preprocessing, recorded
from bitkernels.models.registry import Entry, entry, takes_image_size
from bitkernels.models.weights import weights_file
from bitkernels.models.weights.hub import HUB, config_of
from bitkernels.train.errors import TrainError, first_line

# What ends a command with one line: files, sizes, names and packages that the user can mend.
MENDABLE = (TrainError, ValueError, OSError, ImportError, RuntimeError)


def add_network(parser: argparse.ArgumentParser) -> None:
    """MODEL --weights and how it runs."""
    parser.add_argument("model", metavar="MODEL", help="a published network, as of python -m "
                        "bitkernels models; or the folder of a training or of save_pretrained, "
                        "or hf-hub:owner/name")
    parser.add_argument("--weights", metavar="FILE", help="of a published network: a file of "
                        "weights, hf-hub:owner/name, or the name of public weights")
    parser.add_argument("--num-classes", type=int, help="default: as published")
    parser.add_argument("--size", type=int, help="the side of an image; default: as published")
    parser.add_argument("--packed", action="store_true", help="run it on packed 1-bit weights")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    parser.add_argument("--json", action="store_true", help="print JSON")


def check(options: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for numbers below 1, and for more threads than there may be."""
    for name in ("num_classes", "size", "threads", *names):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if name == "threads" and value is not None and value > cpu.MOST_THREADS:
            raise ValueError(f"--threads must be at most {cpu.MOST_THREADS}, got {value}")


def prepared(options: argparse.Namespace) -> torch.device:
    """Sets --threads; the device of --device, which tensors were seen to be made on."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ValueError(f"--device {options.device}: {first_line(error)}") from None
    if device.type == "meta":
        raise ValueError("--device meta: tensors have no values there")
    return device


def ordered(values: torch.Tensor) -> torch.Tensor:
    """The values. Raises ValueError for NaN among them: none of them is then the largest."""
    if values.isnan().any():
        raise ValueError("the network gives NaN or infinity for a picture: its weights are not "
                         "usable")
    return values


@dataclass(frozen=True)
class Network:
    """What MODEL and --weights are, before weights are read.

    rule: what the network's pictures go through. published: where it is one by name.
    """

    classes: int
    rule: Preprocessing
    labels: Sequence[str] | None = None
    published: Entry | None = None


def asked(options: argparse.Namespace) -> Network:
    """Of a published network by name with --weights, or of what `save_pretrained` and a training
    wrote. Raises ValueError for options that do not fit, and as `from_pretrained`."""
    if not has_config(options.model):
        found = _published(options)
    else:
        _refuse_own(options.model, "published networks", weights=options.weights,
                    num_classes=options.num_classes)
        config = config_of(options.model)
        if config["in_channels"] != 3:
            raise ValueError(f"{options.model} takes images of {config['in_channels']} channels, "
                             "and pictures have 3")
        if config["preprocessing"] is None:
            raise ValueError(f"config.json of {options.model} does not say what the network's "
                             "pictures go through: it was not trained on pictures")
        found = Network(config["num_classes"], config["preprocessing"], config.get("labels"))
    return replace(found, rule=found.rule.at(options.size)) if options.size else found


def _published(options: argparse.Namespace) -> Network:
    published = entry(options.model)
    if options.weights is None:
        raise ValueError(f"--weights is needed for {options.model}, a published network")
    here = os.path.exists(options.weights) or options.weights.startswith(HUB)
    rule = recorded(weights_file(options.weights)) if here else None
    return Network(options.num_classes or published.num_classes,
                   rule or preprocessing.get(published.preprocessing).at(published.image_size),
                   published=published)


def has_config(name: str) -> bool:
    """Whether it is a folder or a repository of the Hub, which say themselves what they are."""
    return os.path.isdir(name) or name.startswith(HUB)


def _refuse_own(name: str, others: str, **own: Any) -> None:
    for option, value in own.items():
        if value is not None:
            raise ValueError(f"--{option.replace('_', '-')} is for {others}; {name} has its own")


def saved(name: str, size: int | None, **own: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network of such a folder, and an image's (channels, side, side).

    own: options that it decides itself. Raises ValueError where one is given, and as
    `from_pretrained`.
    """
    _refuse_own(name, "networks by name", **own)
    config = config_of(name)
    rule = config["preprocessing"]
    side = size or (rule.size if rule else config["options"].get("image_size", 32))
    return models.from_pretrained(name), (config["in_channels"], side, side)


def sized(name: str, side: int | None) -> dict[str, Any]:
    """What `create_model` is told of an image's side; None: as published."""
    takes = side is not None and takes_image_size(entry(name).build)
    return {"image_size": side} if takes else {}


def packed(model: nn.Module) -> nn.Module:
    """A copy of which every layer is packed that can be."""
    return bnn.pack(model, filter=lambda _, layer: layer.pack_obstacle() is None)


def network(options: argparse.Namespace) -> nn.Module:
    """The network that was asked for, with its weights, in evaluation on its device."""
    device = prepared(options)
    if has_config(options.model):
        model = models.from_pretrained(options.model)
    else:
        model = models.create_model(options.model, num_classes=options.num_classes,
                                    weights=options.weights,
                                    **sized(options.model, options.size)).eval()
    return (packed(model) if options.packed else model).to(device)
