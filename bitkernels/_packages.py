"""What is said where a package is missing that only a part of bitkernels needs."""

from __future__ import annotations


def needs(what: str, package: str, error: BaseException | None = None) -> str:
    """One line: what needs which package, and the command that installs it.

    what: a plural, such as "progress bars". error: why the import failed, where that may be more
    than absence.
    """
    found = "is not installed" if error is None else f"cannot be imported ({error})"
    return f"{what} need {package}, which {found}: pip install {package}"
