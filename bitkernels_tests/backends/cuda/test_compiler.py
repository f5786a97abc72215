"""The cache of machine code: right after any accident, and without a home directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from bitkernels.backends.cuda import compiler

CODE = b"\x7fELF machine code"


@pytest.fixture
def compiled(monkeypatch):
    """The sources that were compiled, by a compiler that needs no time and no NVRTC."""
    made: list[str] = []

    def compile(source, header, arch):
        made.append(source)
        return compiler.Binary(CODE + source.encode(), "a log")

    monkeypatch.setattr(compiler, "_compile", compile)
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BITKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def code(source="a", **options) -> bytes:
    return compiler.compile(source, "header", "sm_90a", **options).code


def test_what_was_compiled_comes_back(folder, compiled):
    assert code() == code() == CODE + b"a" and compiled == ["a"]
    code("b")
    assert compiled == ["a", "b"] and len(os.listdir(folder)) == 2
    assert all(name.endswith(".cubin") for name in os.listdir(folder))


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:7], lambda data: data[:-1], lambda data: data[:40],
    lambda data: data + b"x", lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: data[-32:],
], ids=["empty", "cut early", "one byte short", "cut late", "longer", "a bit", "only the hash"])
def test_a_broken_file_is_compiled_again_and_mended(damage, folder, compiled):
    code()
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert code() == code() == CODE + b"a" and compiled == ["a", "a"]


def test_renew_replaces_and_without_the_cache_nothing_is_written(folder, compiled):
    code(cached=False)
    assert not folder.exists()
    code()
    code(renew=True)
    assert compiled == ["a"] * 3
    code()
    assert compiled == ["a"] * 3 and len(os.listdir(folder)) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_costs_time_only(call, folder, compiled, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert code() == CODE + b"a" and os.listdir(folder) == []
    assert code() == CODE + b"a" and len(os.listdir(folder)) == 1


@pytest.fixture
def homeless(tmp_path, monkeypatch) -> Path:
    """A user whom passwd does not know; the folder that is then taken."""
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("BITKERNELS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"bitkernels-{os.getuid()}"


def test_without_a_home_directory_a_private_folder_is_used(homeless, compiled):
    assert code() == code() and compiled == ["a"]
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700 and len(os.listdir(homeless)) == 1


@pytest.mark.parametrize("made", ["by another user", "open to others", "a link", "a file"])
def test_code_from_a_folder_of_others_is_never_run(made, homeless, compiled, monkeypatch):
    if made == "a file":
        homeless.touch()
    elif made == "a link":
        homeless.with_name("elsewhere").mkdir(mode=0o700)
        homeless.symlink_to(homeless.with_name("elsewhere"))
    else:
        homeless.mkdir(mode=0o777)
        homeless.chmod(0o777 if made == "open to others" else 0o700)
    if made == "by another user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)  # and the folder is still ours
        homeless.rename(homeless.with_name("bitkernels-12345"))
    assert compiler.cache_folder() is None
    assert code() == code() and compiled == ["a", "a"]
