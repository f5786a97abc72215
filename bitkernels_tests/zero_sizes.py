"""Runs every operator with sizes of 0, one line a call; ops/test_contract.py compares the lines.

A program of its own, since what it looks for ends a process: a division by 0, a wild address.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bitkernels_tests.ops.test_contract import samples


def emptied(t: Tensor, dims: list[int]) -> Tensor:
    """With a size of 0 in `dims`, in a memory order like that of t, requiring a gradient as t."""
    rest = t.detach()
    for dim in dims:
        rest = rest.narrow(dim, 0, 0)
    return rest.requires_grad_(t.requires_grad)


def variants(args: tuple, kw: dict) -> Iterator[tuple[str, tuple, dict]]:
    """(what is 0, args, kw): each size of each tensor alone, and each size wherever it occurs.

    A size that occurs as an integer argument (channels) is 0 there too.
    """
    leaves, spec = tree_flatten((args, kw))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for i in tensors:
        for dim in range(leaves[i].dim()):
            changed = [*leaves[:i], emptied(leaves[i], [dim]), *leaves[i + 1:]]
            yield f"dim {dim} of tensor {i}", *tree_unflatten(changed, spec)
    for size in sorted({size for i in tensors for size in leaves[i].shape}):
        for words in {size, -(-size // 32)}:
            def changed_leaf(leaf, size=size, words=words):
                if isinstance(leaf, Tensor):
                    gone = (size, words) if leaf.dtype == torch.int32 else (size,)
                    return emptied(leaf, [d for d, s in enumerate(leaf.shape) if s in gone])
                is_size = isinstance(leaf, int) and not isinstance(leaf, bool) and leaf > 2
                return 0 if is_size and leaf == size else leaf

            yield (f"sizes {size}, words {words}",
                   *tree_unflatten([changed_leaf(leaf) for leaf in leaves], spec))


def outcome(op, args: tuple, kw: dict) -> str:
    """The shapes and sums of what comes out and of the gradients, or the operator's refusal."""
    try:
        results, _ = tree_flatten(op(*args, **kw))
    except RuntimeError as error:
        return "refused" if str(error).startswith("bitkernels::") else f"failed: {error}"
    leaves = [t for t in tree_flatten((args, kw))[0] if isinstance(t, Tensor) and t.requires_grad]
    results = [t for t in results if isinstance(t, Tensor)]
    if leaves and results[0].requires_grad:
        results += torch.autograd.grad(results[0].sum(), leaves, allow_unused=True)
    return " ".join(
        "none" if t is None else f"{tuple(t.shape)}:{t.double().nan_to_num().sum().item():.3g}"
        for t in results)


def main(only: str = "") -> None:
    """only: the beginning of the operators' names."""
    for name, (op, args, kw) in samples("cpu").items():
        for what, new_args, new_kw in variants(args, kw) if name.startswith(only) else ():
            print(f"{name}, {what}", end=" -> ", flush=True)
            print(outcome(op, new_args, new_kw), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
