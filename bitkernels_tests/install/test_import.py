"""Importing names things and does no work; every engine can be turned off."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitkernels_tests import forked

PROBE = """
import os, sys, threading, warnings
import torch
threads = threading.active_count()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import bitkernels
if os.environ.get("BITKERNELS_CPU") == "reference":
    assert "bitkernels._C" not in sys.modules
heavy = [m for m in ("triton", "cupy", "matplotlib", "numba", "sklearn", "pandas", "torchvision")
         if m in sys.modules]
assert not heavy, heavy
assert not torch.cuda.is_initialized()
assert threading.active_count() == threads
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
x = torch.tensor([[-1.0, 1.0, 0.0]])
assert torch.ops.bitkernels.sign_pack(x).tolist() == [[6]]
y = torch.ops.bitkernels.binary_linear(x, -x)
assert y.tolist() == [[-1.0]], y
assert not torch.cuda.is_initialized()
print(bitkernels.__version__)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return forked.run("-c", code, timeout=120, env={**os.environ, **environment})


@pytest.mark.parametrize("engine", [None, "reference", "scalar"])
def test_import_does_no_work(engine):
    result = run(PROBE, **({} if engine is None else {"BITKERNELS_CPU": engine}))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and not result.stderr.strip()


STALE = "import sys, types; sys.modules['bitkernels._C'] = types.ModuleType('_C')"
ABSENT = "import sys; sys.modules['bitkernels._C'] = None"
BROKEN = """
import sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == 'bitkernels._C': raise ImportError('undefined symbol')
sys.meta_path.insert(0, Finder())
"""
CALLS = """
import sys, torch, bitkernels
import bitkernels.nn as bnn
print("imported", file=sys.stderr)
conv = bnn.BinaryConv2d(8, 8, 3)
for _ in range(2):
    conv(torch.randn(1, 8, 5, 5)).sum().backward()
    bnn.pack(conv)(torch.randn(1, 8, 5, 5))
print(bitkernels.backends.cpu.why_not)
"""


@pytest.mark.parametrize("how, reason", [
    (STALE, "build it again"), (ABSENT, "is not built"), (BROKEN, "undefined symbol")])
def test_slow_operators_are_one_warning_at_their_first_call(how, reason):
    result = run(f"{how}\n{CALLS}")
    assert result.returncode == 0, result.stderr
    at_import, at_calls = result.stderr.split("imported\n")
    assert not at_import
    assert at_calls.count("UserWarning") == 1 and reason in at_calls, at_calls
    if how is STALE:
        assert "packed_conv2d, " in at_calls and "sign_pack, " in at_calls
    else:
        assert reason in result.stdout


@pytest.mark.parametrize("asked", ["BITKERNELS_CPU=reference", "BITKERNELS_NO_EXT=1"])
def test_slow_operators_that_were_asked_for_are_silent(asked):
    name, value = asked.split("=")
    result = run(f"{ABSENT}\n{CALLS}", **{name: value})
    assert result.returncode == 0 and result.stderr == "imported\n", result.stderr


def test_no_numpy_is_no_warning():
    code = f"import sys; sys.modules['numpy'] = None\nimport bitkernels\n{CALLS}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            timeout=120)
    assert result.returncode == 0 and result.stderr == "imported\n", result.stderr


def test_lazy_modules_are_loaded_when_they_are_used():
    result = run("""
import sys, bitkernels
lazy = ("train", "interop", "autograd", "models", "cli", "converter", "counting")
assert not [name for name in lazy if f"bitkernels.{name}" in sys.modules]
assert set(lazy[:4]) <= set(dir(bitkernels)) and set(bitkernels.__all__) <= set(dir(bitkernels))
assert bitkernels.ops.sign_pack is not None and bitkernels.interop.pack is not None
assert bitkernels.train.recipes.names()
heavy = ("triton", "cupy", "sklearn", "safetensors", "torchvision", "tensorboard")
assert not [m for m in heavy if m in sys.modules]
for name in ("autograd", "backends", "reference", "residual_block"):
    assert hasattr(bitkernels, name)
try:
    bitkernels.trian
except AttributeError as error:
    assert "no attribute 'trian'" in str(error)
else:
    raise AssertionError
reference = None
from bitkernels import *
assert callable(fold_threshold) and train.fit and nn and reference is None
""")
    assert result.returncode == 0, result.stderr
