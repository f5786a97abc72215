"""Binary layers inside converted networks, against what popcounts in registers allow.

  python benchmarks/bench_layers.py                         the networks of docs/performance.md
  python benchmarks/bench_layers.py reactnet_a --repeats 100
  BITKERNELS_CPU=avx2 python benchmarks/bench_layers.py     another kernel

One thread, batch 1, published sizes. A row is a shape of layer: its number in the network, the mean
over them of the least time of all repeats, each in a run of the whole network so that a layer finds
the caches as in use; the part of the ceiling (`bitkernels.backends.cpu.popcount_ceiling`) that its
products reach; and `limit`, the part that it could if nothing but vector operations took time: 3
for 512 products, and those of the epilogue for 16 outputs, at the ceiling's rate. Taps on the zero
padding are not visited, and not counted.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from bitkernels import convert
from bitkernels.backends import cpu
from bitkernels.converter.engine import Engine
from bitkernels.converter.net import arguments
from bitkernels.models import create_model
from bitkernels.models.registry import entry

NETWORKS = ("quicknet", "reactnet18", "reactnet_a", "birealnet18", "real_to_binary_net")
NAME = "bitkernels.packed_conv2d."


@dataclass(frozen=True)
class Shape:
    """A binary convolution of an image, as a row of the table."""

    kernel: int
    channels: int
    out_channels: int
    side: int  # of the output
    stride: int
    parts: tuple[str, ...]  # of the epilogue
    products: int  # on taps inside the image
    outputs: int

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return (f"{self.kernel}x{self.kernel}:{self.channels}->{self.out_channels}@{self.side}"
                f"{stride}")

    def limit(self) -> float:
        products = 3 * self.products / 512
        return products / (products + self.operations() * self.outputs / 16)

    def operations(self) -> int:
        """Vector operations for 16 outputs: a subtraction, scale and bias, and what is given."""
        activation = 4 if "slope" in self.parts else 0
        return (3 + activation + ("residual" in self.parts) + ("words" in self.parts)
                + 4 * ("clamp_min" in self.parts or "clamp_max" in self.parts))


def inside(size: int, taps: int, stride: int, before: int, dilation: int, out: int) -> int:
    """Taps of all windows along an axis that lie inside the image."""
    return sum(0 <= o * stride - before + k * dilation < size
               for o in range(out) for k in range(taps))


class Shapes(fx.Interpreter):
    """The shapes of binary convolutions, by the name of the step that runs them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and str(n.target).startswith(NAME):
            self.found[n.name] = self._shape(n, tree_leaves(result))
        return result

    def _shape(self, node: fx.Node, results: list[torch.Tensor]) -> Shape:
        given = arguments(node)

        def two(name: str, default: int) -> tuple[int, int]:
            value = given.get(name, default)
            return (value, value) if isinstance(value, int) else (value[0], value[len(value) // 2])

        words, filters = (self.env[given[name]].shape for name in ("words", "weight_words"))
        real = results[0].is_floating_point()
        height, width = results[0].shape[2:] if real else results[0].shape[1:3]
        groups = given.get("groups", 1)
        taps = math.prod(inside(words[1 + i], filters[1 + i], two("stride", 1)[i],
                                two("padding", 0)[i], two("dilation", 1)[i], (height, width)[i])
                         for i in (0, 1))
        parts = [name for name, value in given.items() if value is not None]
        parts += ["words"] if len(results) > 1 or not real else []
        channels = int(given["channels"]) // groups
        out_channels = results[0].shape[1] if real else int(given["out_channels"])
        return Shape(filters[1], channels, out_channels, height, two("stride", 1)[0], tuple(parts),
                     words[0] * taps * channels * out_channels,
                     words[0] * height * width * out_channels)


def rows(name: str, repeats: int) -> list[tuple[Shape, int, float]]:
    """(shape, layers of it, seconds of one)."""
    x = torch.randn(1, 3, *(2 * [entry(name).image_size]))
    network = convert(create_model(name).eval(), x)
    engine = network.engine(x)
    if not isinstance(engine, Engine):
        raise RuntimeError(f"{name} does not run in the engine: {engine}")
    shapes = Shapes(network.graph_module)
    with torch.no_grad():
        shapes.run(x)
    best: dict[str, float] = {}
    for _ in range(repeats):
        for step in engine.timed([x]):
            best[step.name] = min(best.get(step.name, math.inf), step.seconds)
    times: dict[Shape, list[float]] = {}
    for node, shape in shapes.found.items():
        times.setdefault(shape, []).append(best[node])
    return [(shape, len(all_), sum(all_) / len(all_)) for shape, all_ in times.items()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--repeats", type=int, default=50, help="default: 50")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in options.networks:
        found = rows(name, options.repeats)
        ceiling = cpu.popcount_ceiling(0.2)
        print(f"\n{name}, {cpu.active()}: ceiling {ceiling / 1e12:.2f} TMAC/s\n")
        print("| layer | number | us | of the ceiling | limit |\n|---|---|---|---|---|")
        for shape, count, seconds in found:
            print(f"| {shape} | {count} | {1e6 * seconds:.1f} "
                  f"| {shape.products / seconds / ceiling:.0%} | {shape.limit():.0%} |")


if __name__ == "__main__":
    main()
