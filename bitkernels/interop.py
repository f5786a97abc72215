"""Packing, unpacking and 1-bit products of arrays of other libraries: CuPy, NumPy, JAX, any DLPack.

Nothing is copied on the way in or out: the arrays are seen by PyTorch where they lie, and results
are handed to the library that the first argument came from. On a GPU both sides' streams are
ordered as DLPack prescribes. There are no gradients. An array that runs backwards, as NumPy's
x[::-1], is a ValueError: tensors have no such strides.

    words = interop.pack(cupy_activations)            # (..., C) real -> (..., ceil(C / 32)) int32
    weight = interop.pack(cupy_weight)
    out = interop.multiply(words, weight, channels)   # +-1 dot products, a CuPy array
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import bitkernels.ops  # noqa: F401  the operators

ops = torch.ops.bitkernels


def pack(array: Any, shift: Any = None, *, axis: int = -1) -> Any:
    """Signs of array + shift along an axis, 32 to an int32 word; the axis becomes the last.

    Bit 1 is +1, and x is +1 unless x < 0. `shift` is one number a channel, (C,),
    or one a channel of each sample: of the array's rank, 1 but in dimension 0 and in `axis`.
    """
    with torch.no_grad():
        return _like(array, ops.sign_pack(_tensor("array", array), _optional("shift", shift), axis))


def unpack(words: Any, channels: int, *, dtype: torch.dtype = torch.float32, axis: int = -1) -> Any:
    """+1 and -1 of `channels` packed signs, in a torch dtype."""
    with torch.no_grad():
        return _like(words, ops.unpack(_words("words", words), channels, dtype, axis))


def multiply(words: Any, weight_words: Any, channels: int, *, scale: Any = None, bias: Any = None,
             dtype: torch.dtype | None = None) -> Any:
    """(..., out) of packed (..., channels) by packed (out, channels): dot products of +-1.

    int32 without scale and bias, else float32, or `dtype`.
    """
    scale, bias = _optional("scale", scale), _optional("bias", bias)
    if dtype is None:
        dtype = torch.int32 if scale is None and bias is None else torch.float32
    with torch.no_grad():
        return _like(words, ops.packed_linear(
            _words("words", words), _words("weight_words", weight_words), channels, scale=scale,
            bias=bias, dtype=dtype))


def _tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"bitkernels.interop: {name} must have __dlpack__, as arrays of NumPy, "
                        f"CuPy and JAX have, got {type(array).__name__}")
    # torch 2.13 ends the process at strides below 0, by an exception that nothing can catch.
    shape, strides = getattr(array, "shape", ()), getattr(array, "strides", None) or ()
    if any(n > 1 and stride < 0 for n, stride in zip(shape, strides, strict=False)):
        raise ValueError(f"bitkernels.interop: {name} must have strides of at least 0, which a "
                         f"copy has, got strides {tuple(strides)}")
    return torch.from_dlpack(array)


def _optional(name: str, array: Any) -> Tensor | None:
    return None if array is None else _tensor(name, array)


def _words(name: str, array: Any) -> Tensor:
    """int32 words; unsigned ones are the same bits."""
    words = _tensor(name, array)
    return words.view(torch.int32) if words.dtype == torch.uint32 else words


def _like(array: Any, tensor: Tensor) -> Any:
    """`tensor` as an array of the library that `array` belongs to."""
    if isinstance(array, Tensor):
        return tensor
    space = getattr(array, "__array_namespace__", None)
    library = importlib.import_module(type(array).__module__.split(".")[0])
    if space is not None and hasattr(space(), "from_dlpack"):
        library = space()
    return library.from_dlpack(tensor)
