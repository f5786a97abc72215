"""Files of tensors, safetensors, that say in their metadata what they are.

Metadata, all strings; readers ignore keys that they do not know:
  format          which kind of file it is
  format_version  "1"; a reader refuses a larger one
  bitkernels      the version that wrote the file
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitkernels._files import mark_of_this_writer, replace_file, safetensors_bytes
from bitkernels._packages import needs


@dataclass(frozen=True)
class Kind:
    """What a function writes and another reads.

    what: a plural, such as "packed models". save, load: the names of the two functions.
    """

    what: str
    save: str
    load: str
    format: str
    version: int

    def package(self) -> Any:
        """safetensors.torch. Raises ImportError with one line where it is missing."""
        try:
            import safetensors.torch
        except ImportError:
            raise ImportError(needs(f"files of {self.what}", "safetensors")) from None
        return safetensors.torch

    def write(self, path: str | os.PathLike, tensors: dict[str, Tensor],
              metadata: dict[str, str]) -> None:
        """Puts the file at `path`, all of it or none.

        Raises ValueError for a dtype that safetensors does not have, OSError where it cannot be
        written, and as `package`.
        """
        from bitkernels import __version__

        self.package()
        # Copies: safetensors refuses tensors that share memory, as views of one another do.
        copies = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format)
                  for key, t in tensors.items()}
        try:
            data = safetensors_bytes(copies, {
                "format": self.format, "format_version": str(self.version),
                "bitkernels": __version__, **metadata})
        except Exception as error:  # it has several of its own
            raise ValueError(f"{self.save}: safetensors cannot write this model: {error}") from None
        try:
            # All processes of a run may save the same model, which no lock keeps apart.
            replace_file(Path(path), data, mark_of_this_writer())
        except OSError as error:
            raise type(error)(error.errno, f"{self.save} cannot write: {error.strerror}",
                              os.fspath(path)) from None

    def read(self, path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
        """The metadata and the tensors.

        Raises ValueError for a file that is broken, of another kind or of a later format;
        FileNotFoundError; and as `package`.
        """
        self.package()
        from safetensors import SafetensorError, safe_open

        if os.path.isdir(path):
            raise ValueError(f"{self.load}: {path} is a folder")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self._check(path, metadata)
                return metadata, {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{self.load}: {path} is not a safetensors file that can be read, or "
                             f"not a whole one: {error}") from None
        except FileNotFoundError:
            raise
        except OSError as error:  # an empty file cannot be mapped
            raise ValueError(f"{self.load}: {path} cannot be read: {error}") from None

    def _check(self, path: str | os.PathLike, metadata: dict[str, str]) -> None:
        if metadata.get("format") != self.format:
            raise ValueError(f"{self.load}: {path} is a safetensors file, but not one of "
                             f"{self.save}: its format is {metadata.get('format')!r}, not "
                             f"{self.format!r}")
        version = metadata.get("format_version", "")
        if version not in map(str, range(1, self.version + 1)):
            raise ValueError(f"{self.load}: {path} has format version {version!r}, written by "
                             f"bitkernels {metadata.get('bitkernels')}; this one reads up to "
                             f"{self.version}: update it")
