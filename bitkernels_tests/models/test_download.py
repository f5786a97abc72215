"""Downloads against a server on this machine: resumed, compared, whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import bitkernels
from bitkernels.models.weights import download as module
from bitkernels.models.weights.download import DownloadError, cached_path, download

DATA = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `data` at /w.h5; what it should do wrong is set from outside."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.etag, self.ranges = DATA, '"first"', True
        self.breaks: list[int] = []  # bytes after which the next answers break off
        self.codes: list[int] = []  # of the next answers
        self.seen: list[tuple[str | None, str | None]] = []  # Range, If-Range
        self.hold = lambda: None  # called before each answer
        self.url = f"http://127.0.0.1:{self.server_port}/w.h5"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        span, condition = self.headers["Range"], self.headers["If-Range"]
        server.seen.append((span, condition))
        server.hold()
        if server.codes or self.path != "/w.h5":
            self.send_error(server.codes.pop(0) if server.codes else 404)
            return
        data, start = server.data, 0
        if span and server.ranges and condition in (None, server.etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", span)[1])
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        sent = data[start:]
        if server.breaks:
            sent = sent[:server.breaks.pop(0)]
        self.wfile.write(sent)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = Server()
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield found
    found.shutdown()
    found.server_close()


def left(folder: Path) -> set[str]:
    """The files of a cache, apart from locks."""
    return {p.name for p in folder.iterdir() if not p.name.endswith(".lock")}


def broken(server, folder, breaks=(300_000, 0, 0, 0), **options) -> DownloadError:
    server.breaks = list(breaks)
    with pytest.raises(DownloadError) as error:
        download(server.url, folder=folder, **options)
    return error.value


def test_a_file_comes_once_and_stays(server, tmp_path):
    folder = tmp_path / "new" / "cache"
    path = download(server.url, sha256=SHA256, folder=folder)
    assert path == cached_path(server.url, folder) and path.read_bytes() == DATA
    assert path.name.endswith("-w.h5") and left(folder) == {path.name}
    assert download(server.url, sha256=SHA256.upper(), folder=folder) == path
    assert server.seen == [(None, None)]


def test_the_cache_is_where_the_environment_says(server, tmp_path, monkeypatch):
    monkeypatch.setenv("BITKERNELS_WEIGHTS_DIR", str(tmp_path / "a"))
    assert download(server.url).parent == tmp_path / "a"
    monkeypatch.delenv("BITKERNELS_WEIGHTS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert module.cache_folder() == tmp_path / "b" / "bitkernels" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert module.cache_folder() == tmp_path / ".cache" / "bitkernels" / "weights"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(DownloadError, match="BITKERNELS_WEIGHTS_DIR"):
        module.cache_folder()


def test_a_broken_connection_is_taken_up_again(server, tmp_path):
    server.breaks = [300_000, 200_000]
    assert download(server.url, sha256=SHA256, folder=tmp_path).read_bytes() == DATA
    assert server.seen == [(None, None), ("bytes=300000-", '"first"'),
                           ("bytes=500000-", '"first"')]


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_the_next_call_goes_on(server, tmp_path, sha256):
    error = broken(server, tmp_path, sha256=sha256)
    assert "broke off" in str(error) and "300,000 bytes" in str(error)
    assert not cached_path(server.url, tmp_path).exists()
    assert download(server.url, sha256=sha256, folder=tmp_path).read_bytes() == DATA
    assert server.seen[-1] == ("bytes=300000-", '"first"')
    assert left(tmp_path) == {cached_path(server.url).name}


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.codes = [503, 429]
    assert download(server.url, folder=tmp_path).read_bytes() == DATA
    server.codes = [503] * module.TRIES
    with pytest.raises(DownloadError, match="503 Service Unavailable"):
        download(server.url, folder=tmp_path / "other")


def test_a_file_that_changed_meanwhile_comes_anew(server, tmp_path):
    broken(server, tmp_path)
    server.data, server.etag = DATA[::-1], '"second"'
    assert download(server.url, folder=tmp_path).read_bytes() == DATA[::-1]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    broken(server, tmp_path)
    server.ranges = False
    assert download(server.url, folder=tmp_path).read_bytes() == DATA


def test_without_a_mark_or_hash_nothing_is_taken_up(server, tmp_path):
    """Nobody could tell whether the rest is of the same file."""
    server.etag = None
    broken(server, tmp_path)
    assert download(server.url, folder=tmp_path).read_bytes() == DATA
    assert all(span is None for span, _ in server.seen)


def test_a_beginning_of_another_file_does_not_spoil_the_download(server, tmp_path):
    server.etag = None
    broken(server, tmp_path, sha256=SHA256)
    part = tmp_path / f".{cached_path(server.url).name}.part"
    part.write_bytes(b"x" * 300_000)
    assert download(server.url, sha256=SHA256, folder=tmp_path).read_bytes() == DATA
    assert [span for span, _ in server.seen][-2:] == ["bytes=300000-", None]


@pytest.mark.parametrize("kept", [DATA, DATA + b"more"])
def test_all_of_it_was_there_already(server, tmp_path, kept):
    """The process ended between the last byte and the renaming; or the file has become shorter."""
    broken(server, tmp_path, sha256=SHA256)
    (tmp_path / f".{cached_path(server.url).name}.part").write_bytes(kept)
    assert download(server.url, sha256=SHA256, folder=tmp_path).read_bytes() == DATA
    assert server.seen[-1] == ((f"bytes={len(DATA)}-", '"first"') if kept == DATA
                               else (None, None))


def test_another_hash_is_refused_and_nothing_kept(server, tmp_path):
    wrong = "0" * 64
    with pytest.raises(DownloadError, match=f"sha256 is {SHA256}, not {wrong}"):
        download(server.url, sha256=wrong, folder=tmp_path)
    assert left(tmp_path) == set()


def test_a_damaged_file_of_the_cache_is_replaced(server, tmp_path):
    path = download(server.url, sha256=SHA256, folder=tmp_path)
    path.write_bytes(DATA[:-1])
    assert download(server.url, sha256=SHA256, folder=tmp_path).read_bytes() == DATA
    assert len(server.seen) == 2


def test_what_was_in_the_cache_stays_where_the_new_file_is_wrong(server, tmp_path):
    path = download(server.url, folder=tmp_path)
    with pytest.raises(DownloadError, match="not the file that was expected"):
        download(server.url, sha256="1" * 64, folder=tmp_path)
    assert path.read_bytes() == DATA and left(tmp_path) == {path.name}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(server, tmp_path, monkeypatch, number):
    """It is said, the space is given back, and the cache has what it had."""
    old = download(server.url, folder=tmp_path)
    real = module._Transfer._copy

    def copy(self, answer, file, bar):
        class Full:
            def write(self, block):
                if file.tell() > 500_000:
                    raise OSError(number, os.strerror(number))
                return file.write(block)
        return real(self, answer, Full(), bar)

    monkeypatch.setattr(module._Transfer, "_copy", copy)
    with pytest.raises(DownloadError, match="the disk is full; BITKERNELS_WEIGHTS_DIR"):
        download(server.url, sha256="2" * 64, folder=tmp_path)
    assert left(tmp_path) == {old.name} and old.read_bytes() == DATA


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot keep .* in .*file/cache"):
        download(server.url, folder=tmp_path / "file" / "cache")


def test_a_file_that_is_not_there(server, tmp_path):
    url = server.url + ".missing"
    with pytest.raises(DownloadError, match=f"cannot fetch {url}: the server answers 404"):
        download(url, folder=tmp_path)
    assert left(tmp_path) == set() and len(server.seen) == 1


def test_no_network(server, tmp_path):
    """Nobody listens there; the message says where a file that came another way belongs."""
    url = server.url
    server.server_close()
    with pytest.raises(DownloadError, match="no connection to 127.0.0.1") as error:
        download(url, folder=tmp_path)
    path = cached_path(url, tmp_path)
    assert str(path) in str(error.value)
    path.write_bytes(DATA)
    assert download(url, sha256=SHA256, folder=tmp_path) == path


@pytest.mark.parametrize("url", ["ftp://host/w.h5", "file:///etc/passwd", "w.h5"])
def test_urls_of_other_kinds_are_refused(url, tmp_path):
    with pytest.raises(ValueError, match="must start with https"):
        download(url, folder=tmp_path)


# Starts fast, without torch.
PROCESS = """
import sys, types
from pathlib import Path
for name in ("bitkernels", "bitkernels.models", "bitkernels.models.weights"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path(sys.argv[1], *name.split(".")))]
from bitkernels.models.weights.download import download
print("asking", flush=True)
print(download(sys.argv[2], sha256=sys.argv[3], folder=Path(sys.argv[4])), flush=True)
"""


def test_two_processes_fetch_a_file_once(server, tmp_path):
    """The second asks while the first is at it, waits, and takes what the first has brought."""
    answering, release = threading.Event(), threading.Event()

    def hold():
        answering.set()
        assert release.wait(60)

    server.hold = hold
    command = [sys.executable, "-c", PROCESS, str(Path(bitkernels.__file__).parents[1]),
               server.url, SHA256, str(tmp_path)]
    first, second = (subprocess.Popen(command, text=True, stdout=subprocess.PIPE)
                     for _ in range(2))
    try:
        assert answering.wait(60)
        for process in first, second:
            assert process.stdout.readline() == "asking\n"
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.3)
    finally:
        release.set()
        found = [p.communicate(timeout=60)[0].strip() for p in (first, second)]
    assert found == [str(cached_path(server.url, tmp_path))] * 2 and len(server.seen) == 1
    assert cached_path(server.url, tmp_path).read_bytes() == DATA


def test_a_bar_on_a_terminal(server, tmp_path, monkeypatch, capsys):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    download(server.url, folder=tmp_path)
    assert "w.h5" in capsys.readouterr().err
    download(server.url, folder=tmp_path / "quiet", progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert download(server.url, folder=tmp_path / "without").read_bytes() == DATA
    assert not capsys.readouterr().err and tqdm is not None
