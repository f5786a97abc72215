"""The launchers in Python, which GPUs and the reference share, check what the C++ ones check."""

from __future__ import annotations

import functools

import pytest

from bitkernels.backends import launchers
from bitkernels_tests.ops.test_bad_input import ROWS, SAYS, identify

BY_NAME = {f.__name__: f for f in (*launchers.SINGLE, *launchers.BLOCK)}
PRODUCTS = ("packed_conv2d", "packed_linear")


def launcher(op):
    """The launcher of an operator without a backend, or None: composed of others."""
    name, _, overload = op.__name__.partition(".")
    if name in PRODUCTS:
        kind = {"default": (True, False), "packed": (False, True), "both": (True, True)}[overload]
        return lambda *args, **kw: getattr(launchers, name)(reached, *kind, *args, **kw)
    found = BY_NAME.get(name)
    return None if found is None else functools.partial(found, reached)


def reached(op, *args, **kw):
    pytest.fail(f"{op} runs with wrong arguments")


# What is refused above the launchers: by autograd.
LAUNCHED = [entry for entry in ROWS
            if launcher(entry[0]) is not None and "must not require grad" not in entry[1]]


@pytest.mark.parametrize("op,text,args,kw", LAUNCHED, ids=map(identify, LAUNCHED))
def test_a_launcher_refuses_what_its_operator_refuses(op, text, args, kw):
    with pytest.raises(RuntimeError) as caught:
        launcher(op)(*args, **kw)
    assert str(caught.value) == f"{SAYS.get(op, op._schema.name)}: {text}"


def test_every_launcher_is_asked():
    asked = {entry[0].__name__.partition(".")[0] for entry in LAUNCHED}
    elsewhere = {"packed_conv2d_weight_grad", "packed_conv2d_input_grad"}
    assert asked == {*BY_NAME, *PRODUCTS} - elsewhere  # ops/test_packed_conv2d_grads.py
