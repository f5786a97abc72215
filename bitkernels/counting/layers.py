"""Weights of one module by their bits."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch import Tensor, nn

from bitkernels.nn.latent import latent_parameters
from bitkernels.nn.layer import BinaryLayer
from bitkernels.nn.packed import _Packed

# Layers whose inner modules (quantizers, parametrizations) are a part of them.
WHOLE = (BinaryLayer, _Packed)
REAL = 32


def bits_of(tensor: Tensor) -> int:
    """Of one value as it is stored."""
    return 8 * tensor.element_size()


def quantizer_bits(quantizer: Any) -> int:
    """Of a value that the quantizer of a binary layer returns; 32 where it does not say."""
    if quantizer is None or getattr(quantizer, "binary", False) is True:
        return 1
    precision = getattr(quantizer, "precision", None)
    return precision if isinstance(precision, int) else REAL


def layer_bits(layer: nn.Module) -> tuple[int, int]:
    """(of an input, of a weight) of a layer in `WHOLE`."""
    if isinstance(layer, _Packed):
        return 1, 1
    return quantizer_bits(layer.input_quantizer), quantizer_bits(layer.weight_quantizer)


class Weights:
    """What each module has, every tensor once, at the first module that has it."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.parameters = 0  # learned numbers, a binary weight of a packed layer included
        self.values = 0  # with running statistics and fixed filters

    def _new(self, tensor: Tensor | None) -> int:
        """How many numbers this tensor adds."""
        if tensor is None or id(tensor) in self._seen:
            return 0
        self._seen.add(id(tensor))
        return tensor.numel()

    def of(self, module: nn.Module) -> dict[int, int]:
        """{bits: weights} as Larq counts them; two a channel for a norm with running statistics."""
        found: Counter[int] = Counter()
        if isinstance(module, WHOLE):
            for name in ("input_quantizer", "weight_quantizer"):
                quantizer = getattr(module, name, None)
                for part in quantizer.modules() if isinstance(quantizer, nn.Module) else ():
                    found.update(self.of(part))
        if isinstance(module, _Packed):
            words: Any = module.weight_words
            signs = self._new(words) and (math.prod(words.shape[:-1])
                                          * (module._channels // module.groups))
            bias = self._new(module.bias)
            found.update({1: signs, REAL: bias})
            self.parameters += signs + bias
            self.values += signs + bias
            # The scale follows from the latent weights and is folded into what comes behind, so
            # that it is not counted, as it is not before packing.
            return {bits: count for bits, count in found.items() if count}
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            pairs = ((module.bias, module.running_mean), (module.weight, module.running_var))
            for learned, running in pairs:
                # One after the other: what runs is the one folded into the other.
                count, fixed = self._new(learned), self._new(running)
                self.parameters += count
                self.values += count + fixed
                found[bits_of(running)] += max(count, fixed)  # type: ignore[arg-type]
        binary = isinstance(module, BinaryLayer)
        latent = {id(p) for p in latent_parameters(module)} if binary else set()
        weight_bits = layer_bits(module)[1] if binary else REAL
        for parameter in module.parameters(recurse=binary):
            count = self._new(parameter)
            self.parameters += count
            self.values += count
            found[weight_bits if id(parameter) in latent and weight_bits < REAL
                  else bits_of(parameter)] += count
        if not binary:  # those of a binary layer are masks of pruning
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and name != "num_batches_tracked":
                    count = self._new(buffer)
                    self.values += count
                    found[bits_of(buffer)] += count
        return {bits: count for bits, count in found.items() if count}
