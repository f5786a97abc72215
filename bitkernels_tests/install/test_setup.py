"""setup.py: what an install says where the engine cannot be built, and what it is then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bitkernels
from bitkernels_tests import ROOT

SOURCE = ROOT
pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(not (SOURCE / "setup.py").exists() or os.name == "nt",
                                reason="not in a source tree")


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy, since a build writes into its tree."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SOURCE / name, folder)
    shutil.copytree(SOURCE / "bitkernels", folder / "bitkernels",
                    ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def setup(source: Path, *command: str, prologue: str = "", **environment: str):
    code = f"import runpy, sys\n{prologue}\nsys.argv = {['setup.py', *command]}\n" \
           "runpy.run_path('setup.py', run_name='__main__')"
    base = {k: v for k, v in os.environ.items() if not k.startswith(("CXX", "BITKERNELS_"))}
    return subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True,
                          env={**base, **environment})


def compiler(folder: Path, script: str) -> str:
    path = folder / "c++-9"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("how, said", [
    (dict(CXX="g++-of-tomorrow -m64"), "no C++ compiler (g++-of-tomorrow -m64)"),
    (dict(prologue="sys.modules['torch'] = None\nimport importlib.util as u\n"
                   "find = u.find_spec\nu.find_spec = lambda n: None if n == 'torch' else find(n)"),
     "torch is not installed here; pip install torch, then use --no-build-isolation"),
    (dict(prologue="import sysconfig as s\npath = s.get_path\n"
                   "s.get_path = lambda n: '/nowhere' if n == 'include' else path(n)"),
     "no Python.h; install the headers of this Python (python3-dev)"),
    (dict(prologue="import importlib.util as u, types\nu.find_spec = lambda name: "
                   "types.SimpleNamespace(origin='/old/torch/__init__.py')"),
     "/old/torch/include has no stable ABI headers; install torch >= 2.11"),
])
def test_what_is_missing_ends_the_build_in_one_line(how, said, source):
    done = setup(source, "build_ext", **how)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("bitkernels: the CPU engine cannot be built here: ") and said in line
    assert line.endswith("set BITKERNELS_NO_EXT=1.") and "Traceback" not in done.stderr


def test_a_compiler_that_is_too_old_is_named_with_what_it_said(source, tmp_path):
    old = compiler(tmp_path, "echo 'In file included' >&2\n"
                             "echo 'probe.cpp:9:3: error: no member named optional' >&2; exit 1")
    line = setup(source, "bdist_wheel", CXX=old).stderr.strip().splitlines()[-1]
    assert f"{old} cannot compile the engine" in line
    assert "no member named optional" in line and "g++ >= 11 or clang++ >= 14" in line
    crashed = setup(source, "bdist_wheel", CXX=compiler(tmp_path, "exit 4"))
    assert "(exit code 4)" in crashed.stderr


def test_metadata_needs_no_compiler(source):
    done = setup(source, "egg_info", CXX="g++-of-tomorrow")
    assert done.returncode == 0, done.stderr


def test_an_install_without_the_engine_is_a_version_of_its_own(source, tmp_path):
    done = setup(source, "dist_info", BITKERNELS_NO_EXT="1", CXX="g++-of-tomorrow")
    assert done.returncode == 0, done.stderr
    metadata, = source.glob("*.dist-info/METADATA")
    version = f"Version: {bitkernels.__version__}"
    assert f"{version}+pure" in metadata.read_text().splitlines()
    assert setup(source, "dist_info").returncode == 0
    assert any(version in path.read_text().splitlines()
               for path in source.glob("*.dist-info/METADATA"))
    assert "License: Apache-2.0" in metadata.read_text()


def test_setuptools_without_wheels_is_told_what_to_install(source):
    prologue = ("import setuptools\nfrom setuptools.errors import ModuleError\n"
                "def command(self, name): raise ModuleError(f'invalid command {name!r}')\n"
                "setuptools.Distribution.get_command_class = command\n"
                "setuptools.__version__ = '65.5.0'")
    done = setup(source, "dist_info", prologue=prologue)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "bitkernels: setuptools 65.5.0 builds no wheels by itself; "
        "pip install 'setuptools>=77' wheel")
