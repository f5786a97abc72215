"""Compiles a converted network for programs without Python, by PyTorch's AOTInductor.

  python examples/cpp/aoti_package.py network.safetensors network.pt2
  make -C examples/cpp
  examples/cpp/aoti_classify ENGINE network.pt2 image.ppm

network.safetensors is a file of `bitkernels.save_converted`, of a network for images
(N, 3, height, width); the package takes any N. ENGINE is what this prints.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import bitkernels
from bitkernels import _C
from bitkernels.backends import cpu


def compile_network(network: bitkernels.converter.Converted, package: Path) -> None:
    takes = [input.example for input in network.inputs]
    if len(takes) != 1 or len(takes[0]) != 4 or takes[0][1] != 3:
        raise ValueError("compile_network: network must take images (N, 3, height, width), takes "
                         f"tensors of {takes}")
    calls = {node.target._opname for node in network.graph_module.graph.nodes
             if getattr(node.target, "namespace", "") == "bitkernels"}
    if calls - set(cpu.OPERATORS):
        raise ValueError("compile_network: network must call operators of the C++ engine alone, "
                         f"calls {', '.join(sorted(calls - set(cpu.OPERATORS)))}")
    height, width = takes[0][2:]
    images = torch.randn(2, 3, height, width)
    # A package does not check what it is given: its reader has to know the size.
    options = {"aot_inductor.metadata": {"image_size": f"{height} {width}"}}
    with torch.no_grad():
        program = torch.export.export(
            network, (images,), dynamic_shapes=(({0: torch.export.Dim("images")},),))
        torch._inductor.aoti_compile_and_package(program, package_path=str(package),
                                                 inductor_configs=options)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: aoti_package.py NETWORK.safetensors PACKAGE.pt2")
    compile_network(bitkernels.load_converted(sys.argv[1]), Path(sys.argv[2]))
    print(_C.__file__)
