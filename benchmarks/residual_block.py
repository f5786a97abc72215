"""The blocks of bench_block.py: a residual binary block for training, for inference, emulated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitkernels.nn as bnn
from bitkernels import reference

ops = torch.ops.bitkernels


class Block(bnn.BinaryResidualBlock):
    """The block of bitkernels.nn: in training one operator."""

    def __init__(self, channels: int) -> None:
        conv = bnn.BinaryConv2d(channels, channels, 3, padding=1, bias=False, input_quantizer=None)
        super().__init__(conv, nn.BatchNorm2d(channels), sign=bnn.RSign(channels, "ste_sign"),
                         act=bnn.RPReLU(channels))

    @torch.no_grad()
    def randomize(self, generator: torch.Generator) -> None:
        """As after training: no shift is 0, no factor 1, and the weights fill [-1, 1]."""
        taps = self.conv.weight[0].numel()

        def fill(t: Tensor, middle: float, width: float) -> None:
            t.copy_(middle + width * (2 * torch.rand(t.shape, generator=generator) - 1))

        for shift in (self.sign.shift, self.act.shift_in, self.act.shift_out, self.norm.bias):
            fill(shift, 0.0, 0.3)
        fill(self.conv.weight, 0.0, 1.2)
        fill(self.act.slope, 0.25, 0.2)
        fill(self.norm.weight, 1.0, 0.5)
        fill(self.norm.running_mean, 0.0, taps**0.5)
        fill(self.norm.running_var, taps, taps / 2)


class StraightThrough(torch.autograd.Function):
    """-1 where x < 0, else +1; gradient 1 where |x| <= 1."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        minus = torch.full((), -1.0, dtype=x.dtype, device=x.device)  # two numbers give float32
        return torch.where(x < 0, minus, 1.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, grad, 0.0)


class Emulated(nn.Module):
    """The same block, with equal parameters, in real numbers.

    In evaluation mode the signs of the weights are those at construction, as ours are packed then.
    """

    signs: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()

        def copy(t: Tensor, *shape: int) -> nn.Parameter:
            return nn.Parameter(t.detach().clone().view(*(shape or t.shape)))

        self.shift = copy(block.sign.shift, -1, 1, 1)
        self.weight = nn.Parameter(block.conv.weight.detach().clone())  # keeps its memory format
        self.register_buffer("signs", StraightThrough.apply(self.weight).detach())
        self.norm = nn.BatchNorm2d(block.norm.num_features).to(self.weight)
        self.norm.load_state_dict(block.norm.state_dict())
        self.shift_in = copy(block.act.shift_in, -1, 1, 1)
        self.slope = copy(block.act.slope)
        self.shift_out = copy(block.act.shift_out, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = StraightThrough.apply(self.weight) if self.training else self.signs
        y = F.conv2d(StraightThrough.apply(x + self.shift), weight, padding=1)
        y = x + self.norm(y)
        return F.prelu(y + self.shift_in, self.slope) + self.shift_out


class Fused:
    """Blocks for inference: one operator each, between them only packed signs and the residual."""

    GEOMETRY = ((1, 1), (1, 1))  # stride, padding

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.filters, self.parts, self.shifts = [], [], []
        self.words = []
        for block in blocks:
            norm, act = block.norm, block.act
            scale = norm.weight.float() / (norm.running_var.float() + norm.eps).sqrt()
            bias = norm.bias.float() - norm.running_mean.float() * scale
            values = dict(scale=scale, bias=bias, shift_in=act.shift_in.float(),
                          slope=act.slope.float(), shift_out=act.shift_out.float())
            self.parts.append({name: t.detach() for name, t in values.items()})
            words = ops.sign_pack.default(block.conv.weight.detach(), None, 1)
            self.words.append(words)
            self.filters.append(words if words.is_cuda else ops.tile_weight.default(words))
            self.shifts.append(block.sign.shift.detach().float())
        self.channels = blocks[0].conv.out_channels

    def keywords(self, i: int, x: Tensor) -> dict:
        """Of block i's product, whose residual is x."""
        signs = {"sign_shift": self.shifts[i + 1]} if i + 1 < len(self.filters) else {}
        return dict(out_channels=self.channels, residual=x, dtype=x.dtype, **self.parts[i], **signs)

    def products(self, x: Tensor) -> list[tuple[tuple, dict]]:
        """(arguments, keywords) of every product, as the backends get them."""
        words, last = ops.sign_pack.default(x, self.shifts[0], 1), len(self.filters) - 1
        return [((words, filter, self.channels, *self.GEOMETRY),
                 {"real": True, "packed": i < last, **self.keywords(i, x)})
                for i, filter in enumerate(self.filters)]

    def __call__(self, x: Tensor) -> Tensor:
        words = ops.sign_pack.default(x, self.shifts[0], 1)
        for i, filter in enumerate(self.filters):
            args, kw = (words, filter, self.channels, *self.GEOMETRY), self.keywords(i, x)
            if i + 1 < len(self.filters):
                x, words = ops.packed_conv2d.both(*args, **kw)
            else:
                x = ops.packed_conv2d.default(*args, **kw)
        return x

    def expected(self, x: Tensor) -> Tensor:
        """The same by reference operators, one after the other."""
        dtype, channels = x.dtype, self.channels
        words = reference.sign_pack(x, self.shifts[0], 1)
        for i, (weight, parts) in enumerate(zip(self.words, self.parts, strict=True)):
            dot = reference.dot_conv2d(words, weight, channels, *self.GEOMETRY, (1, 1), 1, 0)
            y = reference.epilogue(dot, 1, scale=parts["scale"], bias=parts["bias"], residual=x)
            y = reference.rprelu(y, parts["shift_in"], parts["slope"], parts["shift_out"])
            if i + 1 < len(self.words):
                words = reference.sign_pack(y, self.shifts[i + 1], 1)
            x = y.to(dtype)
        return x


def training_step(model: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Forward and backward, gradients of the input and of every parameter."""
    model(x).backward(grad)
    model.zero_grad(set_to_none=True)  # here, so that gradients count into the peak memory
    x.grad = None


def saved_bytes(model: nn.Module, x: Tensor, weights: bool = True) -> int:
    """Memory that the forward keeps for the backward, each allocation once, parameters apart.

    Without `weights` nothing in the shape of a parameter counts, or of its packed signs: cast,
    binarized or transposed weights.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    given = [t.shape for t in model.parameters() if t.dim() > 1 and not weights]
    packed = [(s[0], *s[2:], -(-s[1] // 32)) for s in given]
    shapes = {tuple(sorted(s)) for s in (*given, *packed)}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and tuple(sorted(t.shape)) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(x)
    del out
    return sum(kept.values())
