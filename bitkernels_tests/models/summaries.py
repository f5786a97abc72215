"""Summaries of the published networks, taken once for all tests."""

from __future__ import annotations

import functools

import pytest
import torch

import bitkernels
from bitkernels import models
from bitkernels.models.registry import entry


@functools.cache
def published(name: str):
    """At the published size; the network is built without values."""
    if name not in models.list_models():
        pytest.skip(f"there is no {name}")
    size = entry(name).image_size
    with torch.device("meta"):
        return bitkernels.summary(models.create_model(name), (3, size, size))
