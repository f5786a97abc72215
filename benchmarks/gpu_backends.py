"""Our calls once for each backend of a device, and the peak to compare them with."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import common

from bitkernels.backends.cuda import dispatch

Call = Callable[[], object]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """The GPU backend that runs products meanwhile: `triton`, or `cuda` where it takes them."""
    before = os.environ.get("BITKERNELS_CUDA")
    os.environ["BITKERNELS_CUDA"] = "1" if name == "cuda" else "0"
    try:
        yield
    finally:
        os.environ.pop("BITKERNELS_CUDA")
        if before is not None:
            os.environ["BITKERNELS_CUDA"] = before


@dataclass(frozen=True)
class Ours:
    """A call, and (arguments, keywords) of each product in it, as the backends get them."""

    call: Call
    products: Sequence[tuple[Sequence, Mapping]]


def by_backend(device: common.Device, op: str, outputs: Mapping[str, Ours], where: str,
               notes: dict[str, str]) -> tuple[dict[str, Call], dict[str, str]]:
    """(calls by `backend output`, kernels of csrc/cuda by the same names).

    Where csrc/cuda does not take all of a call's products, a note says why and it is left out.
    """
    calls: dict[str, Call] = {}
    kernels: dict[str, str] = {}
    for name, (output, ours) in itertools.product(device.backends, outputs.items()):
        title = f"{name} {output}".strip()
        if name in common.CpuDevice.backends:
            calls[title] = ours.call
            continue
        call = _on(name, ours.call)
        if name == "cuda":
            found, reason = _kernels(op, call, ours.products)
            if reason is not None:
                if reason not in notes.values():
                    notes[f"{title}, {where}"] = reason
                continue
            kernels[title] = found
        calls[title] = call
    return calls, kernels


def _on(name: str, call: Call) -> Call:
    def run() -> object:
        with backend(name):
            return call()

    return run


def _kernels(op: str, call: Call, products) -> tuple[str, str | None]:
    """(kernels of csrc/cuda that run a call, why it does not take a product).

    The call runs once before: a kernel that fails then is not what explain() names.
    """
    with backend("cuda"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
        said = [dispatch.explain(op, *args, **kw) for args, kw in products]
    names = dict.fromkeys(answer.kernel for answer in said if answer.kernel)
    return "+".join(names), next((str(answer) for answer in said if not answer.kernel), None)


def peak_rate(device: common.Device, notes: dict[str, str]) -> float | None:
    """Operations a second of the device's 1-bit arithmetic alone; None where it cannot be measured.

    On a GPU a note then says why.
    """
    try:
        return device.peak_rate()
    except Exception as error:  # what kernels meet on their first GPU is not foreseen
        notes["of peak"] = str(error) or type(error).__name__
        return None


def title(provider: str) -> str:
    """Of a column: the package's name left out where it is the only backend."""
    return provider.removeprefix("bitkernels ").replace(" ", "\n")
