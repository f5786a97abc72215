"""Files of tensors under names: which kind one is, what it holds, and how that enters a model."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels._packages import needs
from bitkernels.nn.conversion.packed_file import FORMAT as PACKED
from bitkernels.nn.latent import is_sharded
from bitkernels.nn.packed import _Packed

LISTED = 8  # of each kind of difference in a message
_HEADER = 100_000_000  # bytes of a safetensors header, the format's own limit
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

State = dict[str, Tensor]


def kind(path: Path) -> str:
    """What a file is by its content: "keras" (HDF5), "torch" (torch.save) or "safetensors".

    Raises ValueError for anything else, FileNotFoundError, and IsADirectoryError.
    """
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras"
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5"):
        return "torch"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _HEADER:
        return "safetensors"
    raise ValueError(f"load_weights: {path} is " + (
        f"neither HDF5 nor a file of torch.save nor safetensors; it starts with {start!r}"
        if start else "empty"))


def read(path: Path) -> State:
    """The tensors of a file of kind "torch" or "safetensors", on the CPU, under the file's names.

    Of a checkpoint, a dict with "state_dict" or "model" in it, these are taken.

    Raises ValueError for a file that is damaged, holds code or something else than tensors, or is
    of a packed model; ImportError without safetensors where that is needed.
    """
    state = _safetensors(path) if kind(path) == "safetensors" else _tensors(_torch(path), path)
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"load_weights: {key} in {path} is not a plain tensor with values")
    return state


def _safetensors(path: Path) -> State:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(needs("files of weights", "safetensors", error)) from None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") == PACKED:
                raise ValueError(f"load_weights: {path} is of a packed model: use "
                                 "bitkernels.nn.load_packed(path, model)")
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"load_weights: {path} is a damaged safetensors file, or not all of one: "
                         f"{error}") from None


def _torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        _check_archive(path)
    try:
        with _numpy_scalars(), open(path, "rb") as file:  # of a path torch looks at the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises depends on where the file is broken
        code = re.search(r"GLOBAL (\S+)|(?:for unrecognized function|instantiate) (?:<class ')?"
                         r"([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code is not None:
            raise ValueError(
                f"load_weights: {path} holds more than tensors: its pickle calls "
                f"{code[1] or code[2]}, which is not run, as it could be anything; a file of "
                "torch.save(model.state_dict(), path) is read") from None
        what = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise ValueError(f"load_weights: {path} is a damaged file of torch.save, or not all of "
                         f"one: {what}") from None


def _check_archive(path: Path) -> None:
    """torch.load reads archives of torch.save, and does not compare their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            damaged = archive.testzip()
    except Exception as error:  # zipfile's own, and those of what it decodes by
        raise ValueError(f"load_weights: {path} is a damaged archive: "
                         f"{str(error) or type(error).__name__}") from None
    if damaged is not None:
        raise ValueError(f"load_weights: {path} is damaged: the checksum of {damaged} in it does "
                         "not hold")
    if not any(name.endswith("/data.pkl") for name in names) or any(
            name.endswith("/constants.pkl") for name in names):  # of TorchScript
        raise ValueError(f"load_weights: {path} is an archive, but not one of torch.save; it holds "
                         + _some(names))


@contextlib.contextmanager
def _numpy_scalars() -> Iterator[None]:
    """Lets torch.load read numbers of NumPy, as checkpoints hold their best accuracy."""
    try:
        import numpy as np
    except ImportError:
        yield
        return
    import _codecs

    scalar: Any = np.float64(0).__reduce__()[0]  # a NumPy before 2 has it elsewhere
    types = {type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32)}
    with torch.serialization.safe_globals(
            [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"),
             np.dtype, *types, _codecs.encode]):
        yield


def _tensors(data: Any, path: Path) -> State:
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    if not isinstance(data, Mapping):
        raise ValueError(f"load_weights: {path} holds a {type(data).__name__}, not a dict of "
                         "tensors")
    wrong = [f"{key} ({type(value).__name__})" for key, value in data.items()
             if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong or not data:
        raise ValueError(f"load_weights: {path} holds a dict that is no state_dict, nor has one as "
                         f"state_dict or model: {_some(wrong) or 'it is empty'}")
    return dict(data)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, DataParallel or DistributedDataParallel made of it."""
    model = model._modules.get("_orig_mod") or model
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def check_target(model: object) -> nn.Module:
    """The model itself, `unwrapped`.

    Raises TypeError for what is no module, ValueError for one that is packed or sharded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_weights: model must be an nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    if any(isinstance(m, _Packed) for m in model.modules()):
        raise ValueError(f"load_weights: {type(model).__name__} is packed and has no weights to "
                         "load into: load them first, then pack")
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(f"load_weights: {type(model).__name__} is sharded: load before sharding")
    return model


def load(model: nn.Module, state: State, origin: str, head: bool = True) -> None:
    """Load all of `state` into all of `model`, or nothing.

    state: under the model's own names, or under those of the published code where the model has
      `published_state`; with "module." before each or without.
    head: False leaves the model's `head_keys` as they are, whatever the state has there.

    A model on the meta device gets the tensors of the state, in its own dtypes.

    Raises ValueError with a list of what is missing, unknown, and of another shape or kind of
    number; the model is then unchanged.
    """
    own = model.state_dict()
    state = _unprefixed(state, own)
    found = differences(model, state, head)
    published: Any = getattr(model, "published_state", None)
    if found and published is not None:
        ours = 2 * sum(key in own for key in state) >= len(state)  # whose names a message has
        try:
            mapped = dict(published(state))
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            if not ours:
                what = error.args[0] if error.args else type(error).__name__
                raise ValueError(f"load_weights: {origin} is not a checkpoint of "
                                 f"{type(model).__name__} that can be used: {what}") from error
        else:
            others = differences(model, mapped, head)
            if not others or not ours:
                state, found = mapped, others
    if found:
        heads = head_keys(model)
        hint = ""
        if head and heads and not differences(model, state, False):
            hint = (f"; all but {heads[0].rpartition('.')[0] or heads[0]} fits: "
                    "load_weights(..., head=False) leaves that as it is")
        raise ValueError(f"load_weights: {origin} does not hold the weights of this "
                         f"{type(model).__name__}: "
                         + listed(found) + hint)
    left = set() if head else set(head_keys(model))
    enter(model, {key: value for key, value in state.items() if key not in left}, head)


def enter(model: nn.Module, state: State, strict: bool = True) -> None:
    """Load entries of a state_dict that fit, on the meta device too, where they are assigned.

    strict: False if some of the model's are left as they are.

    Raises ValueError, the model unchanged, where tensors would stay on the meta device.
    """
    own = model.state_dict()
    on_meta = any(t.is_meta for t in own.values())
    if on_meta:
        state = {key: value.to(own[key].dtype if key in own else value.dtype, copy=True)
                 for key, value in state.items()}
        trial = _hollow(model)
        trial.load_state_dict(state, strict=strict, assign=True)
        lost = [name for name, t in _named_tensors(trial).items()
                if t.is_meta and _named_tensors(model)[name].is_meta]
        if lost:
            raise ValueError(f"load_weights: {type(model).__name__} is on the meta device, and "
                             f"{_some(lost)} would get no values: build it on a real device")
    model.load_state_dict(state, strict=strict, assign=on_meta)


def _named_tensors(model: nn.Module) -> State:
    return dict([*model.named_parameters(), *model.named_buffers()])


def listed(found: dict[str, list[str]]) -> str:
    """What `differences` found, in words."""
    return "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in found.items())


def head_keys(model: nn.Module) -> list[str]:
    """The entries of a state_dict that hang on the classes: of the last layer with a matrix, and
    of the norms after it."""
    layers = [name for name, m in model.named_modules()
              if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    keys = list(model.state_dict())
    first = [i for i, key in enumerate(keys) if layers and key.startswith(f"{layers[-1]}.")]
    return keys[first[0]:] if first else []


def _unprefixed(state: State, own: Mapping[str, Any]) -> State:
    for prefix in _PREFIXES * 2:
        if all(key.startswith(prefix) for key in state) and not all(
                key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def differences(model: nn.Module, state: State, head: bool) -> dict[str, list[str]]:
    """What stands against loading, by kind; found out on a copy of the model without values, since
    modules may read other names than they write."""
    trial = _hollow(model)
    own = trial.state_dict()
    left = set() if head else set(head_keys(model))
    state = {key: value for key, value in state.items() if key not in left}
    shapes = [f"{key} {tuple(state[key].shape)}, not {tuple(t.shape)}" for key, t in own.items()
              if key in state and state[key].shape != t.shape]
    kinds = [f"{key} {_name(state[key])}, not {_name(t)}" for key, t in own.items()
             if key in state and _number(state[key]) != _number(t)]
    wrong = {text.partition(" ")[0] for text in shapes + kinds}
    rest: Any = OrderedDict((key, value) for key, value in state.items() if key not in wrong)
    # Batch norms fill in a counter that is missing, unless told that the file has counters.
    rest._metadata = {name: {"version": 2} for name, m in trial.named_modules()
                      if isinstance(m, nn.modules.batchnorm._NormBase)}
    missing, unknown, refused = [], [], []
    try:
        result = trial.load_state_dict(rest, strict=False, assign=True)
        missing = [key for key in result.missing_keys if key not in wrong | left]
        unknown = list(result.unexpected_keys)
    except RuntimeError as error:  # of a module that reads other names
        refused = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
    found = {"missing": missing, "unknown": unknown, "of another shape": shapes,
             "of another kind of number": kinds, "refused": refused}
    return {what: names for what, names in found.items() if names}


def _hollow(model: nn.Module) -> nn.Module:
    """A copy on the meta device, without hooks on its calls, which may hold what has no copy."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"),
                                           parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                memo[id(value)] = value
            elif name in _CALLS:
                memo[id(value)] = OrderedDict()
    return copy.deepcopy(model, memo)


def _number(tensor: Tensor) -> str:
    return ("complex" if tensor.is_complex() else "real" if tensor.is_floating_point()
            else "bool" if tensor.dtype == torch.bool else "integer")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
