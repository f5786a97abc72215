"""Packed tensors that know more than their words: activations their channels, weights their images.

Words alone cannot tell how many channels they hold, nor in which form a kernel reads them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bitkernels._arguments import INT_MAX, integer
from bitkernels.ops.geometry import word_count

_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_trace = torch._C._get_tracing_state
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """Signs of a real tensor, 32 to a word, with what words alone do not say.

        packed = PackedTensor.from_real(x)       # x (N, C, H, W)
        packed = packed.max_pool2d(2)            # of bits
        layer(packed)                            # a packed layer, which then packs nothing

    words: int32, channels last, bits past the last channel 0: (N, H, W, ceil(C / 32)) of images.
    channels: C, how many there are.
    dim: where the channels stand in the real tensor: -3 in images, -2 in (N, C, L), -1 in rows;
      counted from the end, as which it is kept, also where it was given from the front.
    dtype: of the real tensor.

    It promises to be its `unpack()`: packed layers give for both the same, bit for bit and in the
    same dtype. It has no gradient. Compiled functions, `torch.export`, `torch.func.vmap` and other
    users of pytrees see the words; the rest is constant in a graph.

    Raises ValueError for words, channels and dim that do not fit each other, or are none.
    """

    words: Tensor
    channels: int
    dim: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.words, Tensor):
            raise ValueError("PackedTensor: words must be an int32 tensor, got "
                             f"{type(self.words).__name__}")
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"PackedTensor: dtype must be a torch.dtype, got {self.dtype!r}")
        for name, least in (("channels", 1), ("dim", -INT_MAX)):
            object.__setattr__(self, name, integer("PackedTensor", name, getattr(self, name),
                                                   least))
        words, dims = self.words, self.words.dim()
        if words.dtype != torch.int32 or not dims or words.shape[-1] != word_count(self.channels):
            raise ValueError(
                f"PackedTensor: words must be int32 of shape (..., {word_count(self.channels)}) "
                f"for {self.channels} channels, got {words.dtype} of shape {tuple(words.shape)}")
        if not -dims <= self.dim < dims:
            raise ValueError(f"PackedTensor: dim must be in [{-dims}, {dims}) for words of shape "
                             f"{tuple(words.shape)}, got {self.dim}")
        if self.dim >= 0:
            object.__setattr__(self, "dim", self.dim - dims)

    @classmethod
    def from_real(cls, input: Tensor, dim: int = 1, shift: Tensor | None = None) -> PackedTensor:
        """The signs of a real tensor, or of input + shift, whose channels stand in `dim`.

        shift: as for `torch.ops.bitkernels.sign_pack`, which also says what is refused.
        """
        words = torch.ops.bitkernels.sign_pack.default(input, shift, dim)
        return cls(words, input.shape[dim], dim, input.dtype)

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """-1 and +1 in the real tensor's shape, in its dtype or the given one."""
        return torch.ops.bitkernels.unpack.default(self.words, self.channels, dtype or self.dtype,
                                                   self.dim)

    @property
    def shape(self) -> torch.Size:
        """Of the real tensor."""
        size = list(self.words.shape[:-1])
        size.insert(len(size) + 1 + self.dim, self.channels)
        return torch.Size(size)

    @property
    def device(self) -> torch.device:
        return self.words.device

    def max_pool2d(self, kernel_size: int | tuple[int, int],
                   stride: int | tuple[int, int] | None = None,
                   padding: int | tuple[int, int] = 0) -> PackedTensor:
        """`torch.nn.functional.max_pool2d` of an image (N, C, H, W), on its bits."""
        if self.dim != -3:
            raise ValueError("PackedTensor.max_pool2d: takes images, with channels in dimension "
                             f"-3, got dim={self.dim}")
        words = torch.ops.bitkernels.packed_max_pool2d.default(
            self.words, kernel_size, [] if stride is None else stride, padding)
        return PackedTensor(words, self.channels, self.dim, self.dtype)


def _flatten(packed: PackedTensor) -> tuple[list[Any], tuple[int, int, torch.dtype]]:
    return [packed.words], (packed.channels, packed.dim, packed.dtype)


def _unflatten(children: Any, context: Any) -> PackedTensor:
    (words,), (channels, dim, dtype) = children, context
    packed = object.__new__(PackedTensor)  # unchecked: a tree may be of anything, as of shapes
    for name, value in dict(words=words, channels=channels, dim=dim, dtype=dtype).items():
        object.__setattr__(packed, name, value)
    return packed


_pytree.register_pytree_node(
    PackedTensor, _flatten, _unflatten, serialized_type_name="bitkernels.PackedTensor",
    to_dumpable_context=lambda c: [c[0], c[1], str(c[2]).removeprefix("torch.")],
    from_dumpable_context=lambda c: (c[0], c[1], getattr(torch, c[2])),
    flatten_with_keys_fn=lambda packed: (
        [(_pytree.GetAttrKey("words"), packed.words)], _flatten(packed)[1]))
torch.serialization.add_safe_globals([PackedTensor])  # an exported program holds example inputs


class WeightImage:
    """What kernels read in place of packed weights, kept for as long as the words are as they were.

        image = WeightImage(make)          # make(words, *geometry) -> a tensor, or several
        found = image(words, *geometry)    # None: use the words themselves

    A layer holds one beside its words, which stay the only state. make: a function of a module, so
    that layers can be pickled; None from it says that kernels of the words' device read the words.

    The image is used only for the same tensor object, in the same memory (storage and address,
    for an address alone may be that of memory which was freed), of the same version, which every
    in-place operation raises (also one on a view or on a tensor of `state_dict()`); else it is made
    anew. The words are referred to weakly: with them goes what was made of them. A copy or a pickle
    starts empty. Threads may share an object; at worst both make it.

    None is the answer too where an image could outlive its truth or get into a graph as a constant:
    in torch.compile, torch.export, torch.jit.trace, under a dispatch mode (fake tensors, make_fx),
    and for words that are of a subclass of Tensor, of torch.func, of shared memory (other processes
    write to it) or of inference mode (they have no version).

    Writes that PyTorch itself does not count are not seen: `tensor.data.copy_()`, collectives of
    torch.distributed, NumPy and DLPack views. `torch.autograd.graph.increment_version(tensor)`
    after such a write makes it known. Fused optimizers do not count theirs either (torch 2.13), and
    averages of weights are swapped in through .data: a latent weight is no source for this, packed
    words are.
    """

    __slots__ = ("_make", "_kept", "__weakref__")

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kept: dict[tuple[Hashable, ...], tuple[Any, ...]] = {}

    def __call__(self, words: Tensor, *geometry: Hashable) -> Any:
        if torch.compiler.is_compiling() or _dispatch_modes() or _jit_trace() is not None:
            return None
        kept = self._kept.get(geometry)
        if (kept is not None and kept[0]() is words and kept[1] == words._version
                and kept[2] == words.data_ptr() and kept[3]() is words.untyped_storage()):
            return kept[4]
        if (type(words) not in (Tensor, nn.Parameter) or words.is_inference() or _wrapped(words)
                or (words.is_cpu and words.is_shared())):
            return None
        # The state of before: a write while the value is made leaves an entry that never matches.
        version, address = words._version, words.data_ptr()
        storage = weakref.ref(words.untyped_storage())
        with torch.inference_mode(False), torch.no_grad():
            value = self._make(words, *geometry)
        if value is None:
            return None
        self._kept[geometry] = weakref.ref(words, _Forget(self)), version, address, storage, value
        return value

    def clear(self) -> None:
        """Keep nothing, not even a weak reference."""
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightImage:
        return WeightImage(self._make)

    def __reduce__(self) -> tuple[type[WeightImage], tuple[Callable[..., Any]]]:
        return WeightImage, (self._make,)


class _Forget:
    """Drops what was made of words that are gone, without keeping the cache alive."""

    __slots__ = ("_owner",)

    def __init__(self, owner: WeightImage) -> None:
        self._owner = weakref.ref(owner)

    def __call__(self, gone: weakref.ref[Tensor]) -> None:
        owner = self._owner()
        if owner is not None:
            for key, kept in list(owner._kept.items()):
                if kept[0] is gone:
                    owner._kept.pop(key, None)
