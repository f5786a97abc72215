"""Folders and repositories of the Hugging Face Hub: config.json, model.safetensors, README.md."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitkernels._files import replace_file
from bitkernels._packages import needs
from bitkernels.models import preprocessing
from bitkernels.models.registry import create, create_model, entry
from bitkernels.models.weights.checkpoint import differences, listed, load, read, unwrapped
from bitkernels.nn import load_packed, pack, save_packed
from bitkernels.nn.packed import _Packed

HUB = "hf-hub:"
MAKERS: dict[str, Callable[..., nn.Module]] = {"create": create, "create_model": create_model}
REPOSITORY = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a model that `create_model` or `create` made to a folder, for `from_pretrained`.

    model: with its latent weights, or packed by `bitkernels.nn.pack`, 1 bit a binary weight.
    folder: made where it is not there. It gets config.json (name, classes, options),
      model.safetensors and README.md, a model card with counts; what it had under these names is
      replaced once all are written.

    Raises ValueError for a model that was made in another way or changed since, OSError where the
    folder cannot be written, ImportError without safetensors.
    """
    _save(model, Path(folder), "OWNER/NAME")


def _save(model: nn.Module, folder: Path, repository: str) -> None:
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    config = _config(model)
    with torch.device("meta"):
        fresh = _made(config)
    twin = fresh
    if config["packed"]:
        packed = {name for name, m in model.named_modules() if isinstance(m, _Packed)}
        twin = pack(fresh, filter=lambda name, _: name in packed)
    if changed := differences(twin, model.state_dict(), True):
        raise ValueError(f"save_pretrained: {config['model']} is not as {config['maker']} made it: "
                         + listed(changed))
    now, then = _structure(model), _structure(twin)
    if other := sorted(name for name in now.keys() | then.keys()
                       if now.get(name) != then.get(name)):
        name = other[0]
        raise ValueError(f"save_pretrained: {config['model']} is not as {config['maker']} made it: "
                         f"{name or 'it'} is {now.get(name)}, made as {then.get(name)}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as place:
        new = Path(place)
        if config["packed"]:
            save_packed(model, new / WEIGHTS)
        else:
            replace_file(new / WEIGHTS, _weights(model, _rule(config)))
        replace_file(new / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        card = _card(config, fresh, (new / WEIGHTS).stat().st_size, repository)
        replace_file(new / CARD, card.encode())
        for name in (WEIGHTS, CONFIG, CARD):
            os.replace(new / name, folder / name)


def from_pretrained(name_or_folder: str | os.PathLike[str]) -> nn.Module:
    """The model of a folder that `save_pretrained` wrote, in eval mode; packed if it was packed.

    name_or_folder: a folder; where there is none, a repository of the Hugging Face Hub,
      "owner/name" or "owner/name@revision", with "hf-hub:" before it or not.

    Raises ValueError for a config.json of something else and for weights that are not the
    config's; FileNotFoundError; OSError where the Hub has no such repository or cannot be reached;
    ImportError without safetensors, or for the Hub without huggingface_hub.
    """
    origin = os.fspath(name_or_folder)
    config_path = _part(origin, CONFIG)
    config = _read_config(config_path)
    try:
        model = _made(config)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"from_pretrained: {config_path}: {error}") from None
    model = model.to(getattr(torch, config["dtype"])).eval()
    vars(model)["pretrained_config"] |= {key: config[key] for key in ("preprocessing", "labels")
                                         if key in config}
    path = _part(origin, WEIGHTS)
    if config["packed"]:
        packed = load_packed(path, model)
        vars(packed)["pretrained_config"] = vars(model)["pretrained_config"]
        return packed
    load(model, read(path), origin)
    return model


def config_of(origin: str) -> dict[str, Any]:
    """The config of a folder, or of a repository of the Hugging Face Hub, of `save_pretrained`.

    Its "preprocessing" is a `Preprocessing` or None, what the network's pictures go through: as
    recorded, else as the network was published with. Raises as `from_pretrained`.
    """
    config = _read_config(_part(origin, CONFIG))
    rule = _rule(config)
    if rule is None and config["maker"] == "create_model":
        published = entry(config["model"])
        rule = preprocessing.get(published.preprocessing).at(
            config["options"].get("image_size", published.image_size))
    return {**config, "preprocessing": rule}


def _rule(config: dict[str, Any]) -> preprocessing.Preprocessing | None:
    """The preprocessing that a config has recorded."""
    recorded = config.get("preprocessing")
    return recorded and preprocessing.get(recorded["name"]).at(recorded["size"])


def push_to_hub(model: nn.Module, name: str, *, private: bool | None = None,
                message: str = "Model of bitkernels") -> str:
    """Upload what `save_pretrained` writes to the Hugging Face Hub; the URL of the commit.

    name: "owner/name"; the repository is made where it is not there. The user is logged in by
    `hf auth login` or HF_TOKEN.

    Raises what `save_pretrained` raises, huggingface_hub's errors, ImportError without it.
    """
    hub = _huggingface_hub()
    repository = _repository(name)[0]
    with tempfile.TemporaryDirectory() as folder:
        _save(model, Path(folder), repository)
        api = hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder,
                                     commit_message=message))


def hub_file(origin: str, *names: str) -> Path:
    """The first of these files that a repository "hf-hub:owner/name" has, from the Hub's cache or
    downloaded.

    Raises OSError that says what the Hub has not, or that it cannot be reached; ImportError.
    """
    hub = _huggingface_hub()
    repository, revision = _repository(origin)
    error: Exception | None = None
    for name in names:
        try:
            return Path(hub.hf_hub_download(repository, name, revision=revision))
        except hub.errors.EntryNotFoundError as missing:
            error = error or missing
            if isinstance(missing, hub.errors.LocalEntryNotFoundError):
                break  # no network, nothing in the cache
        except (hub.errors.HfHubHTTPError, OSError, ValueError) as other:
            error = other
            break
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    raise FileNotFoundError(f"{origin}: no {' or '.join(names)} from the Hugging Face Hub: "
                            + " ".join(lines)) from error


def _config(model: nn.Module) -> dict[str, Any]:
    """What config.json says. Raises ValueError for a model that cannot be made again from it."""
    from bitkernels import __version__

    made = getattr(model, "pretrained_config", None)
    if not isinstance(model, nn.Module) or made is None:
        raise ValueError(f"save_pretrained: {type(model).__name__} was not made by create_model or "
                         "create, so nothing says how to make it again; use torch.save, or "
                         "bitkernels.nn.save_packed")
    try:
        options = json.loads(json.dumps(made["options"]))
    except TypeError as error:
        raise ValueError(f"save_pretrained: an option of {made['model']} cannot be written to "
                         f"config.json: {error}") from None
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"save_pretrained: {made['model']} has parameters of several dtypes: "
                         f"{', '.join(sorted(map(str, dtypes)))}")
    dtype = str(dtypes.pop()) if dtypes else "torch.float32"
    return {"library_name": "bitkernels", "bitkernels": __version__, **made, "options": options,
            "dtype": dtype.removeprefix("torch."),
            "packed": any(isinstance(m, _Packed) for m in model.modules())}


def _structure(model: nn.Module) -> dict[str, str]:
    """What each module prints of itself; synchronised batch norms as the others."""
    return {name: f"{'BatchNorm' if isinstance(m, _BatchNorm) else type(m).__name__}"
                  f"({m.extra_repr()})" for name, m in model.named_modules()}


def _read_config(path: Path) -> dict[str, Any]:
    types = {"maker": str, "model": str, "num_classes": int, "in_channels": int, "options": dict,
             "dtype": str, "packed": bool}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} is no JSON: {error}") from None
    wrong = [key for key, kind in types.items()
             if not isinstance(config, dict) or type(config.get(key)) is not kind]
    if wrong or config["maker"] not in MAKERS or config["dtype"] not in (
            "float32", "float16", "bfloat16", "float64"):
        raise ValueError(f"from_pretrained: {path} is no config.json of save_pretrained, or a "
                         f"broken one ({', '.join(wrong) or 'maker or dtype'})")
    rule, labels = config.get("preprocessing"), config.get("labels")
    if "preprocessing" in config and not (
            isinstance(rule, dict) and rule.get("name") in [*preprocessing.PREPROCESSING]
            and type(rule.get("size")) is int and rule["size"] > 0):
        raise ValueError(f"from_pretrained: preprocessing in {path} must have a name, of "
                         f"{', '.join(preprocessing.PREPROCESSING)}, and a size of at least 1, got "
                         f"{rule}")
    if "labels" in config and not (isinstance(labels, list) and all(
            isinstance(label, str) for label in labels) and len(labels) == config["num_classes"]):
        raise ValueError(f"from_pretrained: labels in {path} must be {config['num_classes']} "
                         "strings, one a class")
    config["options"] = {key: _tuples(value) for key, value in config["options"].items()}
    return config


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _weights(model: nn.Module, rule: preprocessing.Preprocessing | None) -> bytes:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(needs("files of weights", "safetensors", error)) from None
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
               for key, value in model.state_dict().items()}
    return safetensors.torch.save(tensors, {"format": "pt", **preprocessing.metadata(rule)})


def _made(config: dict[str, Any]) -> nn.Module:
    return MAKERS[config["maker"]](config["model"], num_classes=config["num_classes"],
                                   in_channels=config["in_channels"], **config["options"])


def _card(config: dict[str, Any], model: nn.Module, size: int, repository: str) -> str:
    """README.md of a repository."""
    from bitkernels.optim import binary_weights

    parameters = sum(p.numel() for p in model.parameters())
    binary = sum(w.numel() for w in binary_weights(model).values())
    options = "".join(f", {key}={value!r}" for key, value in config["options"].items())
    made = (f"{config['maker']}({config['model']!r}, num_classes={config['num_classes']}, "
            f"in_channels={config['in_channels']}{options})")
    paper = f"\nThe network: {entry(config['model']).paper}.\n" if config["maker"] == (
        "create_model") else ""
    return f"""---
library_name: bitkernels
tags:
- bitkernels
- binary-neural-network
---

# {config["model"]}

A binary neural network of bitkernels: `{made}`.
{paper}
| | |
|---|---|
| parameters | {parameters:,} |
| of them binary | {binary:,} |
| dtype of the others | {config["dtype"]} |
| packed, 1 bit a binary weight | {"yes" if config["packed"] else "no"} |
| bytes of {WEIGHTS} | {size:,} |

```python
from bitkernels import models

model = models.from_pretrained("{HUB}{repository}")
```
"""


def _part(origin: str, name: str) -> Path:
    if os.path.isdir(origin):
        path = Path(origin) / name
        if not path.is_file():
            raise FileNotFoundError(f"from_pretrained: the folder {origin} has no {name}")
        return path
    if REPOSITORY.fullmatch(origin) is None:
        raise FileNotFoundError(f"from_pretrained: there is no folder {origin}, and it is no "
                                f"repository \"{HUB}owner/name\" of the Hugging Face Hub")
    return hub_file(origin, name)


def _repository(origin: str) -> tuple[str, str | None]:
    """owner/name, and the revision where one is named."""
    found = REPOSITORY.fullmatch(origin)
    if found is None:
        raise ValueError(f"a repository of the Hugging Face Hub is \"{HUB}owner/name\" or "
                         f"\"{HUB}owner/name@revision\", got {origin!r}")
    return found[1], found[2]


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(needs("repositories of the Hugging Face Hub", "huggingface_hub", error)
                          ) from None
    return huggingface_hub
