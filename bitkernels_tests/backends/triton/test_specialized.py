"""Which compiled kernel a launch takes: always the one that Triton would, without asking it."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has a launch path of its own", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the driver is replaced", allow_module_level=True)

import triton
import triton.language as tl
from triton import knobs

from bitkernels.backends.triton import launch
from bitkernels_tests import no_gpu


@triton.jit
def copy_kernel(x, add, out, number, factor, N: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, 16)
    y = tl.load(x + i * number, mask=i < N)
    if add is not None:
        y = y + tl.load(add + i)
    tl.store(out + i, (y * factor).to(out.dtype.element_ty))


LONG = torch.zeros(64)
NUMBERS = (0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -2**31, -2**31 - 16,
           2**32, 2**40 + 1, 2**63, 2**63 + 1)
TENSORS = (LONG, LONG[1:], LONG[2:], LONG[4:], LONG[8:], LONG.half(), LONG.half()[1:],
           LONG.bfloat16(), LONG.double(), LONG.int(), LONG.long()[1:])
CASES = [*((LONG, None, LONG, number, 1.0, 16, False) for number in NUMBERS),
         *((t, None, LONG, 16, 1.0, 16, False) for t in TENSORS),
         *((LONG, t, LONG, 3, 0.5, 16, False) for t in (None, *TENSORS)),
         *((LONG, None, t, 3, 2.0, 16, False) for t in TENSORS),
         *((LONG, None, LONG, 3, 2.0, n, wide) for n in (1, 8) for wide in (False, True))]


@pytest.fixture
def gpu():
    with no_gpu.triton_driver() as found:
        yield found


def run(case, warps=4) -> None:
    launch.launch(copy_kernel, (3, 2), case[:5], (warps,), N=case[5], WIDE=case[6])


def tritons(case, warps=4):
    """By its own way, with the options in the order in which it is given them there: in another it
    would compile once more."""
    return copy_kernel[(3, 2)](*case, enable_fp_fusion=False, num_warps=warps)


def taken(monkeypatch, case, warps=4):
    """The compiled kernel that a launch runs, and its arguments."""
    seen = []
    for at, ready in list(launch._ready.items()):
        if ready.kept[0] is copy_kernel:
            def note(*args, ready=ready):
                seen.append((ready.kept[1], args))

            monkeypatch.setitem(launch._ready, at, ready._replace(run=note))
    run(case, warps)
    return seen


def test_every_case_gets_its_own_kernel(gpu, monkeypatch):
    """All are compiled first, so that a key which is too short finds another's."""
    for case in CASES:
        run(case)
    for case in reversed(CASES):
        with monkeypatch.context() as patch:
            (compiled, args), = taken(patch, case)
        assert compiled is tritons(case), case
        assert args[:4] == (3, 2, 1, 0) and args[6:9] == (None, None, None)
        assert args[9:] == tuple(value.data_ptr() if isinstance(value, torch.Tensor) else value
                                 for value in case)


def test_options_are_others(gpu, monkeypatch):
    for warps in (1, 4, 8):
        run(CASES[0], warps)
    for warps in (1, 4, 8):
        with monkeypatch.context() as patch:
            (compiled, _), = taken(patch, CASES[0], warps)
        assert compiled.metadata.num_warps == warps


def test_another_device_has_kernels_of_its_own(gpu, monkeypatch):
    run(CASES[0])
    monkeypatch.setattr(no_gpu.NoGpu, "get_current_device", lambda self: 1)
    with monkeypatch.context() as patch:
        assert not taken(patch, CASES[0])
    run(CASES[0])
    with monkeypatch.context() as patch:
        assert len(taken(patch, CASES[0])) == 1


def test_the_current_stream_is_asked_in_every_call(gpu, monkeypatch):
    run(CASES[0])
    for stream in (5, 7):
        monkeypatch.setattr(no_gpu.NoGpu, "get_current_stream", lambda self, device, s=stream: s)
        with monkeypatch.context() as patch:
            (_, args), = taken(patch, CASES[0])
        assert args[3] == stream


def test_a_profiler_hears_of_launches(gpu, monkeypatch):
    """Triton's hooks: its own way runs."""
    run(CASES[0])
    knobs.runtime.launch_enter_hook.add(print)
    try:
        with monkeypatch.context() as patch:
            assert not taken(patch, CASES[0])
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    with monkeypatch.context() as patch:
        assert len(taken(patch, CASES[0])) == 1


def test_constants_out_of_order_are_noticed(gpu):
    with pytest.raises(AssertionError):
        launch.launch(copy_kernel, (1, 1), CASES[0][:5], (2,), WIDE=False, N=16)


def test_launchers_launch_by_it():
    """Recordings (backends/replay.py) know of no other launches."""
    folder = os.path.dirname(launch.__file__)
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and name not in ("launch.py", "tuning.py"):
            with open(os.path.join(folder, name)) as file:
                assert "_kernel[" not in file.read(), name
