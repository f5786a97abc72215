"""Deliberate mistakes in the sources of csrc/cuda, each of which the emulator has to notice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from bitkernels import reference
from bitkernels.backends.cuda import kernels, launch
from bitkernels_tests import cuda_emulator


class Mutation(NamedTuple):
    """What is wrong; the file; the right text; the same with the mistake where MUTANT is its
    number, counted from 1."""

    name: str
    file: str
    right: str
    wrong: str


class Run(NamedTuple):
    """A call of an operator by one kernel."""

    kernel: kernels.Kernel
    op: str
    args: tuple
    kw: dict


# Headers that a kernel's own includes, which its calls are the first to try.
NEAREST = {"gemm_epilogue.cuh": "bulk_gemm.cuh", "pixels.cuh": "resident.cuh",
           "filters.cuh": "resident.cuh", "masks.cuh": "resident.cuh",
           "outputs.cuh": "resident.cuh", "signs.cuh": "resident.cuh",
           "layout.cuh": "resident.cuh", "epilogue.cuh": "bulk_gemm.cuh"}


def survivors(mutations: Sequence[tuple[str, str, str, str]], runs: Sequence[Run], monkeypatch,
              seeds: int = 2) -> list[str]:
    """The mistakes that no call notices in so many random orders; without one all are right."""
    texts = dict(cuda_emulator.compiler.sources())
    for _, file, right, wrong in mutations:
        assert right in texts[file], right
        texts[file] = texts[file].replace(right, wrong)
    library = cuda_emulator.build(texts, list(dict.fromkeys(run.kernel for run in runs)))
    wanted = {id(run): getattr(reference, run.op)(*run.args, **run.kw) for run in runs}

    def right(seed: int, run: Run) -> bool:
        launch.clear()
        monkeypatch.setattr(launch, "_driver", cuda_emulator.EmulatedDriver(seed, library))
        try:
            got = getattr(launch, run.op)(run.kernel, *run.args, **run.kw)
        except RuntimeError:  # a deadlock, or what the emulator refuses
            return False
        return all(torch.equal(g, w) for g, w in zip(got, wanted[id(run)], strict=True)
                   if w is not None)

    found = []
    for number, (name, file, *_) in enumerate(mutations, 1):
        library.set_mutant(number)
        nearest = NEAREST.get(file, file)
        # What costs least comes first: most mistakes show in any call of their kernel.
        ordered = sorted(runs, key=lambda run, nearest=nearest: (
            run.kernel.header != nearest, run.args[0].numel()))
        if all(right(seed, run) for seed in range(seeds) for run in ordered):
            found.append(name)
    library.set_mutant(0)
    assert all(right(0, run) for run in runs)
    return found
