"""The engine in a process without the package: it defines the operators itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bitkernels.backends import cpu
from bitkernels.ops._record import OPERATORS

pytestmark = pytest.mark.skipif(cpu.active() is None,
                                reason="the engine is not built or not asked for")
ops = torch.ops.bitkernels
PROGRAM = """
import ctypes, sys, torch
engine = ctypes.CDLL(sys.argv[1])
engine.bitkernels_define_operators()
x, words = torch.load(sys.argv[2])
out = torch.ops.bitkernels.packed_conv2d.both(
    torch.ops.bitkernels.sign_pack(x, None, 1), words, 40, [1, 1], [1, 1], residual=x,
    clamp_min=0.0)
schemas = sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("bitkernels"))
assert not any(name.split(".")[0] == "bitkernels" for name in sys.modules)
torch.save((out, schemas), sys.argv[3])
"""


def test_operators_without_the_package(tmp_path):
    from bitkernels import _C

    x, words = torch.randn(2, 40, 5, 5), ops.sign_pack(torch.randn(40, 40, 3, 3), None, 1)
    torch.save((x, words), tmp_path / "in.pt")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, _C.__file__, tmp_path / "in.pt", tmp_path / "out.pt"],
        capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (real, packed), schemas = torch.load(tmp_path / "out.pt")
    wanted = ops.packed_conv2d.both(ops.sign_pack(x, None, 1), words, 40, [1, 1], [1, 1],
                                    residual=x, clamp_min=0.0)
    assert torch.equal(real, wanted[0]) and torch.equal(packed, wanted[1])
    named = {s.partition("(")[0].removeprefix("bitkernels::").partition(".")[0] for s in schemas}
    assert set(OPERATORS) <= named
    here = {str(op._schema) for record in OPERATORS.values() for op in record.overloads.values()}
    assert here <= set(schemas)
