"""GPU tensors: csrc/cuda where its plan has a kernel for the call, else Triton.

Operators without a Triton kernel stay with the reference: the library's real gradients, for one.
"""

from __future__ import annotations

from bitkernels.backends import replay
from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.cuda import settled
from bitkernels.backends.triton import dispatch as triton
from bitkernels.ops._record import REMEMBERED, STRAIGHT, register


def run(op: str, *args, **kw):
    if op in cuda.OPS:
        result = cuda.attempt(op, args, kw)
        if result is not None:
            return result
    return triton.run(op, *args, **kw)


def _one(run, op: str, names: tuple[str, ...], *args):
    """A call whose last arguments have names."""
    if not names:
        return run(op, *args)
    first = len(args) - len(names)
    return run(op, *args[:first], **dict(zip(names, args[first:], strict=True)))


def _one_settled(run, op: str, names: tuple[str, ...], *args):
    """`_one`, whose launches may read the filters early: they are remembered apart."""
    return _one(run, op, names, *args)


def _one_waiting(run, op: str, names: tuple[str, ...], *args):
    """`_one`, whose launches wait for the filters, also where another thread has read them since
    this call was looked at: they are repeated for filters that are being written."""
    with settled.answering(False):
        return _one(run, op, names, *args)


def repeat(op: str, *args, **kw):
    """`run`, by what is remembered of calls that look alike."""
    if op != "packed_conv2d":
        return replay.call(run, _one, op, (*kw,), *args, *kw.values())
    if settled.has(args[1]):
        return replay.call(run, _one_settled, op, (*kw,), *args, *kw.values())
    found = replay.call(run, _one_waiting, op, (*kw,), *args, *kw.values())
    settled.add(args[1])
    return found


def remember(_, function, *args):
    return replay.call(run, function, *args)


register("CUDA", repeat, triton.OPERATORS)
STRAIGHT["cuda"] = repeat
REMEMBERED[repeat] = remember
