"""Downloads that are kept: whole or not there, resumed where they broke off, compared by hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from bitkernels._files import put

TIMEOUT = 30.0  # seconds without a byte
TRIES = 4  # of a connection that breaks; each goes on where the last one ended
PAUSE = 1.0  # seconds before the second try, twice as long before each further one
BLOCK = 1 << 18
# Answers of servers that are busy.
_LATER = {408, 429, 500, 502, 503, 504}


class DownloadError(OSError):
    """A file that could not be had; the message says which and why."""


def cache_folder() -> Path:
    """Where downloaded weights are kept: BITKERNELS_WEIGHTS_DIR, or bitkernels/weights under
    XDG_CACHE_HOME or ~/.cache.

    Raises DownloadError for a user without a home directory.
    """
    chosen = os.environ.get("BITKERNELS_WEIGHTS_DIR")
    if chosen:
        return Path(chosen)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise DownloadError("there is no home directory to keep weights in: set "
                            "BITKERNELS_WEIGHTS_DIR") from None
    return base / "bitkernels" / "weights"


def cached_path(url: str, folder: Path | None = None) -> Path:
    """Where the file of that URL is kept, whether it is there or not."""
    name = re.sub(r"[^\w.-]", "_", urlsplit(url).path.rpartition("/")[2]) or "file"
    return (folder or cache_folder()) / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def download(url: str, *, sha256: str | None = None, folder: Path | None = None,
             progress: bool = True) -> Path:
    """The file of a URL, from the cache where it is there.

    url: http or https. Proxies are taken from the environment, as urllib does.
    sha256: of the whole file, in hexadecimal. It is compared on each call, also with what is in the
      cache, where a file that differs is fetched again.
    folder: of the cache; None: `cache_folder()`.
    progress: a bar on a terminal, where tqdm is installed.

    What a connection that broke has brought is kept beside the file, and this call, or the next
    one, goes on from there where the server can and still has the same file. Of processes that
    want the same file one fetches it and the others wait.

    Raises DownloadError for a file that is not there, a server that cannot be reached or breaks
    off, another hash, and a disk that is full; the cache then has what it had before. ValueError
    for a URL of another kind.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"download: url must start with https:// or http://, got {url!r}")
    path = cached_path(url, folder)
    if _is_right(path, sha256):
        return path
    from filelock import FileLock  # which torch needs too

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not _is_right(path, sha256):
                _Transfer(url, path, sha256, progress).run()
    except DownloadError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DownloadError(f"cannot keep {url} in {path.parent}: "
                            f"{'the disk is full' if full else error.strerror or error}; "
                            "BITKERNELS_WEIGHTS_DIR names another folder") from None
    return path


def _is_right(path: Path, sha256: str | None) -> bool:
    return path.is_file() and (sha256 is None or _digest(path) == sha256.lower())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class _Changed(Exception):
    """What was kept is no beginning of what the server has."""


class _Broken(Exception):
    """The connection broke off."""


class _Transfer:
    """One file on its way; `part` holds its beginning, `mark` what the server calls its state."""

    def __init__(self, url: str, path: Path, sha256: str | None, progress: bool) -> None:
        self.url, self.path, self.sha256, self.progress = url, path, sha256, progress
        self.part = path.with_name(f".{path.name}.part")
        self.mark = path.with_name(f".{path.name}.mark")
        self.total: int | None = None

    def run(self) -> None:
        resumed = self._kept() > 0
        try:
            self._fetch()
            if resumed and not _is_right(self.part, self.sha256):
                self._forget()  # the beginning may have been of another file
                self._fetch()
            self._settle()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._forget()  # and give the space back
            raise

    def _settle(self) -> None:
        if self.sha256 is not None and (found := _digest(self.part)) != self.sha256.lower():
            self._forget()
            raise DownloadError(f"{self.url} is not the file that was expected: its sha256 is "
                                f"{found}, not {self.sha256}; nothing was kept")
        put(self.part, self.path)
        self._forget()

    def _kept(self) -> int:
        """Bytes to go on from: those of a file that can be recognised again."""
        if self.part.is_file() and (self.sha256 is not None or self.mark.is_file()):
            return self.part.stat().st_size
        return 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.mark.unlink(missing_ok=True)

    def _fetch(self) -> None:
        reason = "it changes all the time"
        for trial in range(TRIES):
            try:
                return self._go_on()
            except _Changed:
                self._forget()
            except _Broken as error:
                reason = str(error)
                if trial < TRIES - 1:
                    time.sleep(PAUSE * 2 ** trial)
        kept = self._kept()
        raise DownloadError(f"cannot fetch {self.url}: {reason}" + (
            f"; the next call goes on from the {kept:,} bytes that came" if kept else ""))

    def _go_on(self) -> None:
        """Bring the rest. Raises _Broken, _Changed, DownloadError, and OSError of the disk."""
        offset = self._kept()
        headers = {"Accept-Encoding": "identity", "User-Agent": "bitkernels"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            with contextlib.suppress(OSError):
                headers["If-Range"] = self.mark.read_text()
        try:
            answer = urlopen(Request(self.url, headers=headers), timeout=TIMEOUT)
        except HTTPError as error:
            with error:
                if error.code == 416 and offset:
                    if error.headers["Content-Range"] == f"bytes */{offset}":
                        return  # all of it was there
                    raise _Changed from None
                if error.code in _LATER:
                    raise _Broken(f"the server answers {error.code} {error.reason}") from None
                raise DownloadError(f"cannot fetch {self.url}: the server answers {error.code} "
                                    f"{error.reason}") from None
        except URLError as error:
            what = f"no connection to {urlsplit(self.url).netloc} ({error.reason})"
            if self.total is not None:  # there was one a moment ago
                raise _Broken(what) from None
            raise DownloadError(f"cannot fetch {self.url}: {what}; a file that came another way is "
                                f"found at {self.path}") from None
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise _Broken(f"the server does not answer ({error})") from None
        with answer:
            if answer.status == 206:
                span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers["Content-Range"]
                                    or "")
                if span is None or int(span[1]) != offset:
                    raise _Changed
            else:
                offset = 0  # the whole file comes
            length = answer.headers["Content-Length"]
            self.total = offset + int(length) if length else None
            if not offset:
                self._forget()
                mark = answer.headers["ETag"] or answer.headers["Last-Modified"]
                if mark and not mark.startswith("W/"):
                    self.mark.write_text(mark)
            with open(self.part, "ab") as file, self._bar(offset) as bar:
                self._copy(answer, file, bar)
        if self.total is not None and self.part.stat().st_size != self.total:
            raise _Broken("the connection broke off")

    def _copy(self, answer: Any, file: IO[bytes], bar: Any) -> None:
        while True:
            try:
                block = answer.read(BLOCK)
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                file.flush()
                raise _Broken(f"the connection broke off ({error})") from None
            if not block:
                return
            file.write(block)
            if bar is not None:
                bar.update(len(block))

    @contextlib.contextmanager
    def _bar(self, offset: int) -> Iterator[Any]:
        """A progress bar, or None."""
        try:
            from tqdm import tqdm
        except ImportError:
            tqdm = None
        if tqdm is None or not self.progress:
            yield None
            return
        with tqdm(total=self.total, initial=offset, unit="B", unit_scale=True, unit_divisor=1024,
                  desc=self.path.name.partition("-")[2], disable=None) as bar:
            yield bar
