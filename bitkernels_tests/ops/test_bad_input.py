"""Wrong arguments: one RuntimeError that names operator, argument, what it takes and what it got.

The eager operator, the fake one (compile, export, meta) and the launcher in Python must say the
same words. Rows by hand lie in `wrong_*.py`; those of every operator are made of its record's
samples.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import bitkernels_tests.ops.wrong_int8
import bitkernels_tests.ops.wrong_packed
import bitkernels_tests.ops.wrong_trained  # noqa: F401  its rows
from bitkernels.ops._record import OPERATORS
from bitkernels_tests.ops.test_contract import samples
from bitkernels_tests.ops.wrong import ROWS, SAYS, identify, real, words

ops = torch.ops.bitkernels


def failure(op, args, kw) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        op(*args, **kw)
    return caught.value


def assert_says(error: RuntimeError, op, text: str) -> None:
    name = SAYS.get(op, op._schema.name)
    assert type(error) is RuntimeError and error.__cause__ is None
    assert str(error) == f"{name}: {text}"


@pytest.mark.parametrize("op,text,args,kw", ROWS, ids=map(identify, ROWS))
def test_eager_message(op, text, args, kw):
    assert_says(failure(op, args, kw), op, text)
    assert re.fullmatch(r"\w+ must (be|not) .+(, got .+|\.detach\(\))", text)


@pytest.mark.parametrize("op,text,args,kw", ROWS, ids=map(identify, ROWS))
def test_fake_message_is_the_same(op, text, args, kw):
    mode = FakeTensorMode()
    fake_args, fake_kw = tree_map_only(torch.Tensor, mode.from_tensor, (args, kw))
    with mode:
        assert_says(failure(op, fake_args, fake_kw), op, text)


def test_training_shape_error_also_in_inference_mode():
    with torch.inference_mode():
        error = failure(ops.binary_linear.default, (real(3, 5), real(8, 6)), {})
    assert_says(error, ops.binary_linear.default,
                "input must be (..., 6) for a weight of shape (8, 6), got float32 of shape (3, 5)")


def test_raw_operators_accept_parameters_without_grad_mode():
    scale = torch.ones(8, requires_grad=True)
    with torch.no_grad():
        y = ops.packed_linear(words(3, 2), words(8, 2), 40, scale=scale)
    assert not y.requires_grad and (y == 40).all()


def wrong_calls(op, args, kw):
    """(what is wrong, args, kw): of each tensor of a call its type, rank and device, a gradient
    that it must not want, and that it is missing."""
    for i, argument in enumerate(op._schema.arguments[:len(args)]):
        if str(argument.type) == "Tensor":
            yield "None", (*args[:i], None, *args[i + 1:]), kw
    leaves, spec = tree_flatten((args, kw))
    refuses = OPERATORS[op._opname].autograd is None
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for i in tensors:
        t = leaves[i].detach()
        other = torch.int16 if t.dtype is torch.int8 else torch.int8
        wrong = {"type": t.to(other), "one more dimension": t.unsqueeze(0)}
        if i != tensors[0]:
            wrong["meta"] = t.to("meta")
        if refuses and t.is_floating_point():
            wrong["grad"] = t.clone().requires_grad_()
        for what, value in wrong.items():
            yield what, *tree_unflatten([*leaves[:i], value, *leaves[i + 1:]], spec)


def said(call, *args, **kw) -> str:
    try:
        call(*args, **kw)
    except RuntimeError as error:
        return str(error)
    return "taken"


def reached(name, *args, **kw):
    raise RuntimeError("taken")


def fullest() -> dict:
    """Of each overload the sample with the most tensors.

    C++ speaks for binary_conv2d_forward in the words of what that runs: binary_conv2d has checked.
    """
    chosen: dict = {}
    for sample in samples("cpu").values():
        count = sum(isinstance(leaf, torch.Tensor) for leaf in tree_flatten(sample[1:])[0])
        chosen[str(sample[0])] = max(chosen.get(str(sample[0]), (-1,)), (count, sample),
                                     key=lambda pair: pair[0])
    return {name.removeprefix("bitkernels."): sample for name, (_, sample) in chosen.items()
            if sample[0] is not ops.binary_conv2d_forward.default}


@pytest.mark.parametrize("name", fullest())
def test_wrong_tensors_of_a_sample(name):
    op, args, kw = fullest()[name]
    operator = OPERATORS[op._opname]
    known = {argument.name for argument in op._schema.arguments}
    mode, refused = FakeTensorMode(), 0
    for what, args_, kw_ in wrong_calls(op, args, kw):
        eager = said(op, *args_, **kw_)
        fake_args, fake_kw = tree_map_only(torch.Tensor, mode.from_tensor, (args_, kw_))
        with mode:
            assert said(op, *fake_args, **fake_kw) == eager, what
        if operator.launched and what != "grad":
            launch = operator.launcher(reached, op._overloadname.replace("default", ""))
            assert said(launch, *args_, **kw_) == eager, what
        if eager == "taken":
            assert what == "one more dimension", what
            continue
        refused += 1
        match = re.fullmatch(r"bitkernels::(\w+): (\w+) must (be|not) .+", eager)
        assert match and match[2] in known, eager
        assert match[1] in (op._schema.name if what == "None" else SAYS.get(op, op._schema.name))
    assert refused
