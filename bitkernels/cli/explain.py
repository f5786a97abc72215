"""`python -m bitkernels explain`: which kernel a call or each layer of a network gets, and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

import bitkernels
from bitkernels import models
from bitkernels.backends import gpus
from bitkernels.cli import zoo
from bitkernels.cli.summary import build
from bitkernels.explain import Explanation
from bitkernels.train.errors import first_line

DESCRIPTION = """\
Which backend and kernel a call of an operator, or each layer of a network, gets, and why.

  python -m bitkernels explain reactnet
  python -m bitkernels explain reactnet --packed --target sm_90 --batch 256 --size 224
  python -m bitkernels explain quicknet --train
  python -m bitkernels explain packed_conv2d --channels 256 --size 14 --target sm_80

A network is one of `python -m bitkernels models` by name, the published one where two have it, or
the folder of a training or of save_pretrained. It is called once on random images, in evaluation
without gradients. An operator gets tensors without memory: --channels in and out, images of --size,
filters of --kernel, padded to keep the size.
"""


def _words(*shape: int) -> Tensor:
    return torch.empty(*shape[:-1], -(-shape[-1] // 32), dtype=torch.int32, device="meta")


def _real(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


# By operator: its arguments, of (batch, channels, size, kernel).
ARGUMENTS: dict[str, Callable[[int, int, int, int], tuple[tuple, dict]]] = {
    "binary_conv2d": lambda n, c, s, k: ((_real(n, c, s, s), _real(c, c, k, k)),
                                         {"padding": k // 2}),
    "binary_conv_transpose2d": lambda n, c, s, k: ((_real(n, c, s, s), _real(c, c, k, k)),
                                                   {"padding": k // 2}),
    "binary_linear": lambda n, c, s, k: ((_real(n, c), _real(c, c)), {}),
    "binary_residual_block": lambda n, c, s, k: ((_real(n, c, s, s), _real(c, c, k, k)),
                                                 {"padding": k // 2}),
    "packed_conv2d": lambda n, c, s, k: ((_words(n, s, s, c), _words(c, k, k, c), c),
                                         {"padding": k // 2}),
    "packed_linear": lambda n, c, s, k: ((_words(n, c), _words(c, c), c), {}),
    "packed_max_pool2d": lambda n, c, s, k: ((_words(n, s, s, c), k), {}),
    "rprelu": lambda n, c, s, k: ((_real(n, c, s, s), *(_real(c) for _ in range(3))), {}),
    "rsign": lambda n, c, s, k: ((_real(n, c, s, s), _real(c)), {}),
    "sign_pack": lambda n, c, s, k: ((_real(n, c, s, s), None, 1), {}),
    "unpack": lambda n, c, s, k: ((_words(n, s, s, c), c), {}),
}
ARGUMENTS |= {f"{name}.packed": ARGUMENTS[name] for name in ("packed_conv2d", "packed_linear")}


NETWORK, OPERATOR = ("packed", "train", "num_classes", "in_channels"), ("channels", "kernel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("name", metavar="MODEL_OR_OP")
    parser.add_argument("--target", help="cpu, or a GPU by architecture, as sm_80 or sm_90; "
                        "default: a GPU if there is one, else cpu")
    parser.add_argument("--batch", type=int, default=1, help="default: 1")
    parser.add_argument("--size", type=int, help="the side of an image; default: 32, of a "
                        "published network its own, of an operator 56")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    network = parser.add_argument_group("of a network")
    network.add_argument("--packed", action="store_true", help="after bitkernels.nn.pack")
    network.add_argument("--train", action="store_true", help="in training, with gradients")
    network.add_argument("--num-classes", type=int, help="default: 10, of a published network 1000")
    network.add_argument("--in-channels", type=int, help="of the images; default: 3")
    operator = parser.add_argument_group("of an operator")
    operator.add_argument("--channels", type=int, help="default: 64")
    operator.add_argument("--kernel", type=int, help="side of the filters; default: 3")


def _of_network(options: argparse.Namespace, target: str | None) -> Explanation:
    name, classes, channels = options.name, options.num_classes, options.in_channels
    if zoo.has_config(name):
        model, (channels, size, _) = zoo.saved(name, options.size, num_classes=classes,
                                               in_channels=channels)
    else:
        channels = channels or 3
        model, size = build(name, classes, channels, options.size, device="cpu")
    model.train(options.train)
    if options.packed:
        model = zoo.packed(model)
    device = "cuda" if target is None and torch.cuda.is_available() else "cpu"
    images = torch.randn(options.batch, channels, size, size, device=device)
    with nullcontext() if options.train else torch.no_grad():
        return bitkernels.explain(model.to(device), images, target=target)


def main(options: argparse.Namespace) -> int:
    target, name = options.target, options.name
    try:
        zoo.check(options, "batch", "channels", "kernel", "in_channels")
        if options.train and options.packed:
            raise ValueError("--packed layers do not train: give one of --packed and --train")
        operator = name in ARGUMENTS
        network = (zoo.has_config(name) or name in models.names()
                   or name in models.list_models())
        for option in NETWORK if operator else OPERATOR if network else ():
            if getattr(options, option):
                raise ValueError(f"--{option.replace('_', '-')} is of "
                                 f"{'networks' if operator else 'operators'}, {name} is "
                                 f"{'an operator' if operator else 'a network'}")
        if operator:
            args, kw = ARGUMENTS[name](options.batch, options.channels or 64, options.size or 56,
                                       options.kernel or 3)
            if target is None:
                gpu = gpus.of(torch.device("cuda")) if torch.cuda.is_available() else None
                target = "cpu" if gpu is None else gpu.architecture
            found = bitkernels.explain(name, *args, target=target, **kw)
        elif network:
            found = _of_network(options, target)
        elif name.partition(".")[0] in bitkernels.ops.__all__:
            raise ValueError(f"{name} takes more than sizes: give bitkernels.explain({name!r}) "
                             f"its arguments, in Python; here there are {', '.join(ARGUMENTS)}")
        else:
            raise ValueError(f"no network or operator is called {name!r}; there are "
                             f"{', '.join((*models.names(), *models.list_models()))}; "
                             f"{', '.join(ARGUMENTS)}")
    except zoo.MENDABLE as error:
        said = first_line(error).removeprefix("bitkernels.explain: ")
        print(f"bitkernels explain: {said}", file=sys.stderr)
        return 1
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0
