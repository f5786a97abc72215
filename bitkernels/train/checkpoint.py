"""Checkpoints and weights, each file the old one or the new one; the random generators' state."""

from __future__ import annotations

import ctypes
import hashlib
import io
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels import _files
from bitkernels._packages import needs
from bitkernels.train.errors import CheckpointError, TrainError, first_line

__all__ = ["export", "fingerprint", "import_weights", "load", "numpy", "random_state",
           "replace_file", "safetensors", "save", "set_random_state", "transfer"]

FORMAT = 1


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`, all of it or none.

    Raises CheckpointError where the disk is full or the folder cannot be written; what was at
    `path` before is then still there, and no other file is left.
    """
    try:
        _files.replace_file(path, data)
    except OSError as error:
        kept = "; the file that was there before is intact" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}{kept}") from None


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint. Raises CheckpointError as `replace_file` does."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    replace_file(path, buffer.getvalue())


def load(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What `save` wrote, on the CPU.

    identity: what this run is, by name; must equal the "identity" in the checkpoint. Raises
    CheckpointError for a file that is missing or broken, and for one of another run: the message
    names both.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path} to resume") from None
    except Exception as error:  # what torch.load raises depends on where the file is broken
        raise CheckpointError(f"{path} is not a checkpoint that can be read: "
                              f"{first_line(error)}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or "identity" not in state:
        raise CheckpointError(f"{path} is not a checkpoint of bitkernels.train in format {FORMAT}")
    _same(path, state["identity"], identity)
    return state


def fingerprint(model: nn.Module) -> str:
    """Of the values of a network's parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            own = value.detach().cpu().contiguous()
            digest.update(ctypes.string_at(own.data_ptr(), own.nbytes))
    return digest.hexdigest()[:16]


def _same(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    if "teacher" in ours:  # which checkpoints did not have at first
        theirs = {"teacher": ours["teacher"], **theirs}
    if theirs == ours:
        return
    def title(run: dict[str, Any]) -> str:
        return (f"model {run.get('model')} on {run.get('data')} with recipe "
                f"{run.get('recipe', {}).get('name')}")

    def flat(run: dict[str, Any]) -> dict[str, Any]:
        rows = {}
        for key, value in run.items():
            rows.update({f"{key} {k}": v for k, v in value.items()} if isinstance(value, dict)
                        else {key: value})
        return rows

    there, here = flat(theirs), flat(ours)
    differing = [f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
                 for key in [*there, *(k for k in here if k not in there)]
                 if there.get(key) != here.get(key)]
    if title(theirs) != title(ours):
        raise CheckpointError(f"{path} is of {title(theirs)}; this run is {title(ours)}")
    raise CheckpointError(f"{path} is of {title(theirs)}, as this run, but with other settings: "
                          + "; ".join(differing))


def numpy() -> Any:
    """NumPy, or None where it is not installed and so nothing draws from it."""
    try:
        import numpy as np
    except ImportError:
        return None
    return np


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of this process's generators: torch's, Python's and, where installed, numpy's."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(),
                             "numpy": None}
    if (np := numpy()) is not None:
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        words = torch.tensor(keys.tolist(), dtype=torch.int64)
        state["numpy"] = name, words, position, has_gauss, cached
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if state["numpy"] is not None and (np := numpy()) is not None:
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(keys.tolist(), np.uint32), position, has_gauss, cached))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def export(path: Path, weights: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write weights as safetensors, with strings about them in its metadata.

    Raises CheckpointError as `replace_file` does, TrainError without safetensors.
    """
    safetensors()
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    replace_file(path, _files.safetensors_bytes(tensors, about))


def import_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError where it cannot be read."""
    try:
        return safetensors().load(path.read_bytes())
    except TrainError:
        raise
    except Exception as error:  # safetensors has its own class of errors
        raise CheckpointError(f"cannot read weights from {path}: {first_line(error)}") from None


def safetensors() -> Any:
    """safetensors.torch. Raises TrainError where it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise TrainError(needs("files of weights", "safetensors")) from None
    return safetensors.torch


def transfer(weights: dict[str, Tensor], model: nn.Module, origin: str) -> None:
    """Load all of `weights` into all of `model`.

    Names of the network's published code, and of earlier versions of it here, are brought to those
    of now where the model knows them (`published_state`).

    Raises CheckpointError that lists every key that is missing, unknown or of another shape; the
    model is then unchanged.
    """
    ours = model.state_dict()
    if hasattr(model, "published_state") and set(weights) != set(ours):
        try:
            weights = model.published_state(weights)  # type: ignore[operator]
        except ValueError as error:
            raise CheckpointError(f"the weights of {origin} cannot be used: {error}") from None
    problems = {
        "missing": [k for k in ours if k not in weights],
        "unknown": [k for k in weights if k not in ours],
        "of another shape": [f"{k} {tuple(weights[k].shape)}, not {tuple(v.shape)}"
                             for k, v in ours.items()
                             if k in weights and weights[k].shape != v.shape]}
    if any(problems.values()):
        raise CheckpointError(
            f"the weights of {origin} are not those of {type(model).__name__}: "
            + "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys))
    model.load_state_dict(weights)
