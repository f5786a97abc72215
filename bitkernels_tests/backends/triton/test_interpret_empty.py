"""The Triton kernels of test_interpret.py, which runs this file, on sizes of 0: a kernel that
fails there would be withdrawn, and not run for other sizes either."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_interpret.py runs this file", allow_module_level=True)

from bitkernels.backends.triton import dispatch, plan
from bitkernels.ops._record import OPERATORS, OUTPUTS
from bitkernels.ops._samples import Values
from bitkernels_tests.backends.triton.test_interpret import kernel
from bitkernels_tests.triton_interpreter import language_patched_once  # noqa: F401
from bitkernels_tests.zero_sizes import variants

# Orders of memory that need more than two strides of rows.
ORDERS = {"as it is": lambda t: t, "every other row": lambda t: t[..., ::2, :],
          "turned": lambda t: t.transpose(-1, -2)}


def calls(op):
    """(what is 0, the call) of each size of each sample that the operator and a kernel take."""
    operator = OPERATORS[op]
    for sample in operator.samples(Values()):
        given = tree_map_only(torch.Tensor, lambda t: t.detach(), (sample.args, sample.kw))
        for order, turn in ORDERS.items():
            for what, args, kw in variants(*given):
                args = tree_map_only(
                    torch.Tensor, lambda t, turn=turn: turn(t) if t.dim() == 4 else t, args)
                try:
                    call = operator.check(*args, **kw)
                except RuntimeError:
                    continue
                outputs = dict(zip(("real", "packed"), OUTPUTS[sample.overload], strict=True)) if (
                    any(".both(" in schema for schema in operator.schemas)) else {}
                if plan.takes(op, call.args, call.kw) and any(
                        isinstance(t, torch.Tensor) and not t.numel()
                        for t in tree_leaves((call.args, call.kw))):
                    yield f"{what}, {order}", call.args, {**call.kw, **outputs}


@pytest.mark.parametrize("op", dispatch.OPERATORS)
def test_sizes_of_0(op):
    count = 0
    for what, args, kw in calls(op):
        want = OPERATORS[op].reference(*args, **kw)
        for inner in ("popc", "int8") if op in dispatch.PRODUCTS else (None,):
            try:
                got = kernel(op)(*args, **kw, **({} if inner is None else {"inner": inner}))
            except Exception as error:
                raise AssertionError(f"{what}, {inner}: {error}") from error
            for have, expected in zip(tree_leaves(got), tree_leaves(want), strict=True):
                assert (have is None) == (expected is None), what
                if have is not None:
                    assert have.shape == expected.shape and have.dtype == expected.dtype, what
                    assert torch.equal(have, expected), what
        count += 1
    assert count or op in ("residual_block_statistics", "residual_block_gradients")
