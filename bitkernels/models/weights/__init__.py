"""Weights of networks: from files of every format they were published in, from the Hugging Face
Hub and from the table of public files, all of a file or nothing."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from bitkernels.models.weights.checkpoint import check_target, kind, load, read
from bitkernels.models.weights.hub import (
    HUB,
    from_pretrained,
    hub_file,
    push_to_hub,
    save_pretrained,
)
from bitkernels.models.weights.table import PublicFile, find, public_weights

__all__ = ["PublicFile", "from_pretrained", "load_weights", "public_weights", "push_to_hub",
           "save_pretrained"]


def load_weights(model: nn.Module, path_or_name: str | os.PathLike[str], *,
                 head: bool = True) -> None:
    """Load a file of weights into a model: all of it, strictly, or nothing.

    path_or_name: one of
      a file, told by its content, not by its name: Keras HDF5 of Larq Zoo's networks; a checkpoint
        of torch.save, with this package's names or with those of the network's published code
        ("module." before each or not, under "state_dict", "model" or bare); safetensors;
      a folder that `save_pretrained` wrote;
      "hf-hub:owner/name" or "hf-hub:owner/name@revision" of the Hugging Face Hub;
      the name of public weights, as "quicknet.larq" (`public_weights`), which are downloaded once.
    head: False leaves the model's last layer, and norms after it, as they are, whatever the file
      has there: for other classes.

    The values are converted to the model's dtypes and devices; a model on the meta device gets
    them on the CPU. No code in a file is run.

    Raises ValueError that lists what is missing, unknown and of another shape, for a file that is
    damaged or of another kind, holds code, or is of a packed model, and for a packed model;
    FileNotFoundError for a name that is neither a file nor public; `DownloadError`, an OSError;
    ImportError that names the package to install. The model is then unchanged.
    """
    target = check_target(model)
    origin = os.fspath(path_or_name)
    path = weights_file(origin)
    if kind(path) == "keras":
        from bitkernels.models.weights.keras import load as load_keras

        load_keras(target, path, head=head)
    else:
        load(target, read(path), origin, head)


def weights_file(origin: str) -> Path:
    """The file that `load_weights` reads, downloaded where it is not here."""
    if origin.startswith(HUB):
        return hub_file(origin, "model.safetensors", "pytorch_model.bin")
    path = Path(origin)
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            raise FileNotFoundError(f"load_weights: the folder {path} has no model.safetensors")
        return path / "model.safetensors"
    if path.is_file():
        return path
    public = find(origin)
    if public is None:
        raise FileNotFoundError(
            f"load_weights: there is no file {origin}, and no public weights of that name; there "
            f"are {', '.join(row.name for row in public_weights() if row.head)}")
    if public.url is None:
        raise FileNotFoundError(
            f"load_weights: {public.name} can be downloaded by a browser only, from {public.page}: "
            "give load_weights the path of that file")
    from bitkernels.models.weights.download import download

    return download(public.url, sha256=public.sha256)
