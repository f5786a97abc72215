"""What is known of the real weight of a packed layer, of which only the signs are left."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves


class WeightFacts:
    """Type, device and sizes of a weight that is no longer there, for parents that ask.

    Many read `layer.weight.dtype` to cast their input (T5, CLIP, ViT of transformers). Whoever
    computes with it gets an error: AttributeError for a method, else RuntimeError.
    """

    requires_grad = False
    grad = None

    def __init__(self, layer: str, shape: tuple[int, ...], dtype: torch.dtype,
                 device: torch.device) -> None:
        self._layer, self.shape = layer, torch.Size(shape)
        self.dtype, self.device = dtype, device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        return True

    def __getattr__(self, name: str) -> NoReturn:
        layer = self.__dict__.get("_layer", "a packed layer")
        raise AttributeError(f"{_text(layer)}; {name} needs its values")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
                           ) -> NoReturn:
        facts = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, cls))
        raise RuntimeError(f"{_text(facts._layer)}; {getattr(func, '__name__', func)} needs its "
                           "values")

    def _refuse(self, *_: Any) -> NoReturn:
        raise RuntimeError(f"{_text(self._layer)}; arithmetic needs its values")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __neg__ = __abs__ = __getitem__ = __iter__ = _refuse


def _text(layer: str) -> str:
    return (f"{layer} has no real weight: call the layer, or read its binary_weight() (-1 and +1) "
            "or weight_words (packed)")
