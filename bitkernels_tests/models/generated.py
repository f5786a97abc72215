"""Weights and images made from a seed and an index alone, the same on every machine.

They need numpy only: the originals' recordings (`data/make_larq_zoo.py`) and the tests make them
from this one file. The numbers are the raw stream of Philox, which numpy keeps for good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def uniform(seed: int, index: int, shape: Sequence[int], low: float = 0.0, high: float = 1.0
            ) -> np.ndarray:
    """float32 of that shape in [low, high), of 24 random bits each."""
    count = math.prod(shape)
    raw = np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw((count + 1) // 2)
    bits = raw.astype("<u8", copy=False).view("<u4")[:count] >> np.uint32(8)
    unit = bits.astype(np.float32) * np.float32(2**-24)
    return (unit * np.float32(high - low) + np.float32(low)).reshape(tuple(shape))


def image(seed: int, size: Sequence[int], channels: int = 3) -> np.ndarray:
    """(1, height, width, channels), about as normalised images are spread."""
    return uniform(seed, 2**32, (1, *size, channels), -2, 2)


def weight(seed: int, index: int, kind: str, shape: Sequence[int]) -> np.ndarray:
    """A float32 weight of a Keras layer.

    kind: the last part of its Keras name: kernel, depthwise_kernel, gamma, beta, moving_mean,
      moving_variance, bias, alpha (a PReLU's slopes), or blur, the kernel that QuickNet has fixed.

    The convolutions' kernels have values beyond 1, which XNOR-Net clips; batch norms have factors
    of both signs and channels that they spread widely or hardly.
    """
    if kind == "blur":
        line = np.array([1, 2, 1], np.float32) / np.float32(4)
        return np.ascontiguousarray(np.broadcast_to(np.outer(line, line)[:, :, None, None], shape))
    if kind == "kernel" and len(shape) == 2:
        bound = 0.3 * (3 / shape[0]) ** 0.5
        return uniform(seed, index, shape, -bound, bound)
    values = uniform(seed, index, shape, -1, 1)
    if kind in ("kernel", "depthwise_kernel"):
        fan_in = math.prod(shape[:2] if kind == "depthwise_kernel" else shape[:-1])
        flat = values.reshape(-1)
        flat *= np.float32((3 / fan_in) ** 0.5)
        flat[::97] *= np.float32(1.5 * (fan_in / 3) ** 0.5)
        return values
    if kind == "gamma":
        return np.where(values < -0.6, values - np.float32(0.1), values * np.float32(0.5) + 1)
    if kind == "moving_variance":  # powers of 2 times 0.5 to 1
        return np.ldexp(values * np.float32(0.25) + np.float32(0.75),
                        (uniform(seed, index + 2**33, shape, 0, 11)).astype(np.int32))
    if kind == "alpha":
        return values * np.float32(0.15) + np.float32(0.25)
    if kind in ("beta", "bias"):
        return values
    if kind == "moving_mean":
        return values * 4
    raise ValueError(f"no weight is of kind {kind!r}")


def kind_of(layer: str, name: str) -> str:
    """The kind of a weight, from its name in a Keras file and its layer's."""
    kind = name.rpartition("/")[2].removesuffix(":0")
    fixed = kind == "depthwise_kernel" and layer.startswith("depthwise_conv2d")
    return "blur" if fixed else kind
