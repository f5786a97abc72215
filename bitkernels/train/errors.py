"""The errors that end a training run with one message and no traceback."""

from __future__ import annotations

__all__ = ["CheckpointError", "DataError", "DivergedError", "TrainError"]


def first_line(error: BaseException) -> str:
    """Of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TrainError(Exception):
    """Something the user can mend; the message says what and where."""


class DataError(TrainError):
    """Images that are missing, empty or unreadable."""


class CheckpointError(TrainError):
    """A file that cannot be written or read, or that belongs to another run."""


class DivergedError(TrainError):
    """The loss or a weight is no longer a finite number."""
