"""NVRTC's binding: what it compiles, what it says, where it looks."""

from __future__ import annotations

import ctypes
import sys
import types

import pytest

from bitkernels.backends.cuda import compiler, nvrtc

SOURCE = '#include "size.cuh"\nextern "C" __global__ void fill(int* p) { p[threadIdx.x] = SIZE; }'
HEADERS = {"size.cuh": "#define SIZE 70000\n"}


@pytest.fixture
def library():
    try:
        return nvrtc.library()
    except OSError as error:
        pytest.skip(f"NVRTC does not load ({error})")


def test_sources_become_machine_code(library):
    assert nvrtc.version() >= (12, 0) and {80, 86, 89, 90} <= nvrtc.architectures()
    options = ("--gpu-architecture=sm_90a", *compiler.OPTIONS)
    code, log = nvrtc.compile(SOURCE, HEADERS, options)
    assert code.startswith(b"\x7fELF") and b"fill" in code
    assert "Used" in log and log.endswith("\n")
    assert nvrtc.compile(SOURCE, {"size.cuh": "#define SIZE 3\n"}, options)[0] != code


@pytest.mark.parametrize("source,options,said", (
    ("int f() { return missing; }", (), 'identifier "missing" is undefined'),
    ('#include "absent.cuh"', (), "absent.cuh"),
    (SOURCE, ("--gpu-architecture=sm_1",), "gpu-architecture")))
def test_what_does_not_compile_says_why(library, source, options, said):
    with pytest.raises(nvrtc.NvrtcError, match=said):
        nvrtc.compile(source, HEADERS, options)


def test_an_error_names_the_architecture(library):
    with pytest.raises(compiler.CompileError, match=r"^sm_90a: nvrtcCompile.*\n.*error: "):
        compiler.compile("broken", "", "sm_90a", cached=False)


@pytest.fixture
def opened(monkeypatch):
    """The names that are opened; of those in `there` the library is found."""
    names, there = [], set()

    def open(name):
        names.append(name)
        if name not in there:
            raise OSError(f"{name}: cannot open shared object file")
        return name

    monkeypatch.setattr(ctypes, "CDLL", open)
    return names, there


def pathfinder(monkeypatch, path):
    """cuda-pathfinder, as where it finds the library at `path`, or nothing."""
    def load(name):
        assert name == "nvrtc"
        if path is None:
            raise RuntimeError("no such library")
        return types.SimpleNamespace(abs_path=path)

    module = types.ModuleType("cuda.pathfinder")
    module.load_nvidia_dynamic_lib = load
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", module)


def test_the_wheel_s_library_comes_first(opened, monkeypatch):
    names, there = opened
    there |= {"/wheel/libnvrtc.so.13", "libnvrtc.so.13"}
    pathfinder(monkeypatch, "/wheel/libnvrtc.so.13")
    assert nvrtc._found() == "/wheel/libnvrtc.so.13" and names == ["/wheel/libnvrtc.so.13"]


@pytest.mark.parametrize("installed", (False, True))
def test_else_the_loader_s(opened, monkeypatch, installed):
    names, there = opened
    there.add("libnvrtc.so.12")
    if installed:
        pathfinder(monkeypatch, None)
    else:
        monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    assert nvrtc._found() == "libnvrtc.so.12" and names == ["libnvrtc.so.13", "libnvrtc.so.12"]
    there.clear()
    with pytest.raises(OSError, match="there is no libnvrtc.so.13 or .12"):
        nvrtc._found()
