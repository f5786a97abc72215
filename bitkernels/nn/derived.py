"""Data computed from a tensor, kept beside it and never in its place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_trace = torch._C._get_tracing_state
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class Derived:
    """What a function makes of a tensor, kept for as long as that tensor is as it was.

        tiles = Derived(make)          # make(source, *key) -> a tensor, or several
        found = tiles(source, *key)    # None: nothing may be kept here, use the source itself

    The kept value is used only for the same tensor object, in the same memory (storage and address,
    for an address alone may be that of memory which was freed), of the same version, which every
    in-place operation raises (also one on a view or on a tensor of `state_dict()`); else it is made
    anew. The source is referred to weakly: with it goes what was made of it. A copy or a pickle
    starts empty. Threads may share an object; at worst both derive.

    None is the answer where a value could outlive its truth or get into a graph as a constant: in
    torch.compile, torch.export, torch.jit.trace, under a dispatch mode (fake tensors, make_fx), and
    for sources of subclasses of Tensor, of torch.func, of shared memory (other processes write to
    it) and of inference mode (they have no version).

    Writes that PyTorch itself does not count are not seen: `tensor.data.copy_()`, collectives of
    torch.distributed, NumPy and DLPack views. `torch.autograd.graph.increment_version(tensor)`
    after such a write makes it known. Fused optimizers do not count theirs either (torch 2.13), and
    averages of weights are swapped in through .data: a latent weight is no source for this, packed
    words are.

    make: a function of a module, so that layers which hold a `Derived` can be pickled.
    """

    __slots__ = ("_make", "_kept", "__weakref__")

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kept: dict[tuple[Hashable, ...], tuple[Any, ...]] = {}

    def __call__(self, source: Tensor, *key: Hashable) -> Any:
        if torch.compiler.is_compiling() or _dispatch_modes() or _jit_trace() is not None:
            return None
        kept = self._kept.get(key)
        if (kept is not None and kept[0]() is source and kept[1] == source._version
                and kept[2] == source.data_ptr() and kept[3]() is source.untyped_storage()):
            return kept[4]
        if (type(source) not in (Tensor, nn.Parameter) or source.is_inference() or _wrapped(source)
                or (source.is_cpu and source.is_shared())):
            return None
        # The state of before: a write while the value is made leaves an entry that never matches.
        version, address = source._version, source.data_ptr()
        storage = weakref.ref(source.untyped_storage())
        with torch.inference_mode(False), torch.no_grad():
            value = self._make(source, *key)
        self._kept[key] = weakref.ref(source, _Forget(self)), version, address, storage, value
        return value

    def clear(self) -> None:
        """Keep nothing, not even a weak reference."""
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived(self._make)

    def __reduce__(self) -> tuple[type[Derived], tuple[Callable[..., Any]]]:
        return Derived, (self._make,)


class _Forget:
    """Drops what was derived from a tensor that is gone, without keeping the cache alive."""

    __slots__ = ("_owner",)

    def __init__(self, owner: Derived) -> None:
        self._owner = weakref.ref(owner)

    def __call__(self, gone: weakref.ref[Tensor]) -> None:
        owner = self._owner()
        if owner is not None:
            for key, kept in list(owner._kept.items()):
                if kept[0] is gone:
                    owner._kept.pop(key, None)
