"""Five networks of Larq Zoo, and Bi-Real Net's PyTorch code, in plain PyTorch: no bitkernels.

Written from the papers and Keras' rules. Each function takes what a file holds and images
(N, H, W, C) or (N, C, H, W), and gives the logits. `Signs` takes signs and notes how near to 0
their arguments came, where roundings decide.
"""

from __future__ import annotations

import h5py
import torch
import torch.nn.functional as F
from torch import Tensor


class Signs:
    """x -> -1 where x < 0, else +1."""

    margin = float("inf")

    def __call__(self, x: Tensor) -> Tensor:
        self.margin = min(self.margin, x.abs().min().item())
        return torch.where(x < 0, -1.0, 1.0)

    def two_bits(self, x: Tensor) -> Tensor:
        """0, 1/3, 2/3 or 1, whichever is nearest."""
        steps = x.clamp(0, 1) * 3
        self.margin = min(self.margin, (steps - steps.floor() - 0.5).abs().min().item() / 3)
        return steps.round() / 3


def read(path) -> list[dict[str, Tensor]]:
    """The layers with weights of a file of Keras' save_weights, in its order."""
    with h5py.File(path) as file:
        layers = [{key.rpartition("/")[2].removesuffix(":0"): torch.from_numpy(file[n][key][()])
                   for key in (w.decode() for w in file[n].attrs["weight_names"])}
                  for n in (name.decode() for name in file.attrs["layer_names"])]
    return [layer for layer in layers if layer]


def same(x: Tensor, window: int, stride: int, value: float = 0.0) -> Tensor:
    for dim in (2, 3):
        size = x.shape[dim]
        total = max((-(-size // stride) - 1) * stride + window - size, 0)
        pad = (total // 2, total - total // 2)
        x = F.pad(x, pad if dim == 3 else (0, 0, *pad), value=value)
    return x


def conv(x: Tensor, kernel: Tensor, stride: int = 1, padded: bool = True, bias=None) -> Tensor:
    weight = kernel.permute(3, 2, 0, 1)
    return F.conv2d(same(x, weight.shape[-1], stride) if padded else x, weight, bias, stride)


def norm(x: Tensor, layer: dict[str, Tensor], eps: float) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (x - layer["moving_mean"].view(shape)) / (layer["moving_variance"] + eps).sqrt().view(shape)
    return y * layer.get("gamma", torch.ones(1)).view(shape) + layer["beta"].view(shape)


def mean_scaled(w: Tensor) -> Tensor:
    """Of (H, W, I, O): signs times the mean magnitude of each output channel."""
    return torch.where(w < 0, -1.0, 1.0) * w.abs().mean((0, 1, 2))


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


def flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1)


def residual(layers, x, sign, blocks, eps, weight) -> Tensor:
    for section, count in enumerate(blocks):
        for i in range(count):
            y = conv(sign(x), weight(next(layers)["kernel"]), 2 if section and not i else 1)
            if section and not i:
                x = conv(F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False),
                         next(layers)["kernel"])
                y = norm(y, next(layers), eps)
                x = norm(x, next(layers), eps)
            else:
                y = norm(y, next(layers), eps)
            x = x + y
    return x


def dense(x: Tensor, layer: dict[str, Tensor]) -> Tensor:
    return x @ layer["kernel"] + layer.get("bias", torch.zeros(1))


def birealnet18(file, x: Tensor, sign: Signs, blocks) -> Tensor:
    layers = iter(file)
    x = norm(conv(x, next(layers)["kernel"], 2), next(layers), 1e-3)
    x = pool(same(x, 3, 2, float("-inf")))
    x = residual(layers, x, sign, blocks, 1e-3, mean_scaled)
    return dense(x.mean((2, 3)), next(layers))


def binary_resnet_e18(file, x: Tensor, sign: Signs, blocks, small: bool = False) -> Tensor:
    layers = iter(file)
    if small:
        x = conv(x, next(layers)["kernel"])
    else:
        x = norm(conv(x, next(layers)["kernel"], 2), next(layers), 1e-5).relu()
        x = norm(pool(same(x, 3, 2, float("-inf"))), next(layers), 1e-5)
    x = residual(layers, x, sign, blocks, 1e-5, lambda w: torch.where(w < 0, -1.0, 1.0))
    return dense(x.relu().mean((2, 3)), next(layers))


def xnornet(file, x: Tensor, sign: Signs) -> Tensor:
    layers = iter(file)
    x = norm(conv(x, next(layers)["kernel"], 4), next(layers), 1e-5).relu()
    x = norm(pool(x), next(layers), 1e-4)
    for i in range(6):
        x = conv(sign(x), mean_scaled(next(layers)["kernel"].clamp(-1, 1)), padded=i < 4)
        x = norm(pool(x) if i in (0, 3) else x, next(layers), 1e-3 if i == 5 else 1e-4)
    return dense(flat(x.relu()), next(layers))


def binary_alexnet(file, x: Tensor, sign: Signs) -> Tensor:
    layers = iter(file)
    for i in range(5):
        x = conv(sign(x) if i else x, torch.where(next(layers)["kernel"] < 0, -1.0, 1.0),
                 1 if i else 4)
        x = norm(pool(x) if i in (0, 1, 4) else x, next(layers), 1e-3)
    x = flat(x)
    for _ in range(3):
        x = sign(x) @ torch.where(next(layers)["kernel"][0, 0] < 0, -1.0, 1.0)
        x = norm(x, next(layers), 1e-3)
    return x


def dorefanet(file, x: Tensor, sign: Signs) -> Tensor:
    layers = iter(file)
    first = next(layers)
    x = conv(x, first["kernel"], 4, padded=False, bias=first["bias"])

    def weight() -> Tensor:
        w = next(layers)["kernel"]
        return torch.where(w < 0, -1.0, 1.0) * w.abs().mean()

    for i in range(4):
        x = norm(conv(sign.two_bits(x), weight()), next(layers), 1e-4)
        if i != 2:
            x = pool(x if i == 3 else same(x, 3, 2, float("-inf")))
    x = flat(x)
    for _ in range(2):
        x = norm(sign.two_bits(x) @ weight(), next(layers), 1e-4)
    return dense(x.clamp(0, 1), next(layers))


def birealnet_pytorch(state: dict[str, Tensor], x: Tensor, sign: Signs, blocks) -> Tensor:
    """Of the authors' state dict."""
    def torch_norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in (
            "running_mean", "running_var", "weight", "bias")))

    x = torch_norm(F.conv2d(x, state["conv1.weight"], None, 2, 3), "bn1")
    x = F.max_pool2d(x, 3, 2, 1)
    for section, count in enumerate(blocks, 1):
        for i in range(count):
            name, stride = f"layer{section}.{i}", 2 if section > 1 and not i else 1
            weight = state[f"{name}.binary_conv.weights"].view(-1, x.shape[1], 3, 3)
            signs = torch.where(weight < 0, -1.0, 1.0) * weight.abs().mean((1, 2, 3), keepdim=True)
            y = torch_norm(F.conv2d(sign(x), signs, None, stride, 1), f"{name}.bn1")
            if stride == 2:
                x = F.conv2d(F.avg_pool2d(x, 2), state[f"{name}.downsample.1.weight"])
                x = torch_norm(x, f"{name}.downsample.2")
            x = x + y
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
