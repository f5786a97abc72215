"""The launchers in Python, which GPUs and the reference share, check what the C++ ones check."""

from __future__ import annotations

import pytest

from bitkernels.ops._record import OPERATORS
from bitkernels_tests.ops.test_bad_input import ROWS, SAYS, identify

BY_NAME = {name: o for name, o in OPERATORS.items() if o.launched}


def reached(op, *args, **kw):
    pytest.fail(f"{op} runs with wrong arguments")


def launcher(op):
    overload = op._overloadname.replace("default", "")
    return BY_NAME[op.__name__.partition(".")[0]].launcher(reached, overload)


# What is refused above the launchers: by autograd.
LAUNCHED = [entry for entry in ROWS if entry[0].__name__.partition(".")[0] in BY_NAME
            and "must not require grad" not in entry[1]]


@pytest.mark.parametrize("op,text,args,kw", LAUNCHED, ids=map(identify, LAUNCHED))
def test_a_launcher_refuses_what_its_operator_refuses(op, text, args, kw):
    with pytest.raises(RuntimeError) as caught:
        launcher(op)(*args, **kw)
    assert str(caught.value) == f"{SAYS.get(op, op._schema.name)}: {text}"
