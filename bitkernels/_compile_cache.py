"""What torch.compile keeps on disk must not outlive the version that it was made by.

A compiled graph holds what the operators' gradients were made of, and its key in torch's caches has
nothing but the operators' names: after an upgrade the old version's graph would go on running. So
the sources of what graphs are made of become a part of the key.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any

import torch.compiler.config


def tag(package: Any) -> str:
    """By all files that are traced below the operators which a model's graph names. package: a
    folder, as `Path` or of importlib.resources."""
    files = [*(package / "ops").iterdir(), package / "_dispatch.py", package / "_estimators.py"]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return f"bitkernels-{digest.hexdigest()[:16]}"


def mark() -> None:
    """Adds the tag to the user's own, of TORCH_COMPILE_CACHE_KEY_TAG."""
    config = torch.compiler.config
    config.cache_key_tag = " ".join(filter(None, (
        config.cache_key_tag, tag(resources.files("bitkernels")))))
