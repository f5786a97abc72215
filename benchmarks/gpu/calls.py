"""The calls that the parts check and time: operands, what may run them, the right answer, floors.

The answer is computed without the package: products of -1 and +1 by float32 matrix products, one a
tap, whose sums of less than 2^24 are exact in any order, then the epilogue step by step.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels.backends.cuda import dispatch, kernels, launch, plan, settled
from bitkernels.backends.triton import configs
from bitkernels.backends.triton import dispatch as triton
from bitkernels.backends.triton import plan as triton_plan

LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCHES = (256, 64, 1)
# What a convolution takes and gives. "fp16 from fp16" takes signs of real numbers first.
OUTPUTS = ("packed", "fp16", "block", "fp16 from fp16", "moments int16", "moments int32")
SIZES = (8192, 4096, 16384)
TRITON = plan.NEXT
COPIES = 20  # calls in a CUDA graph
PEAK = 15.5e15  # operations a second of the 1-bit tensor core of an H200, measured 2026-11-26
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Call:
    """A product of bits. Its first operand, and its residual, come in `sets`, one for each call of
    a graph, as far as they would otherwise stay in the L2 cache."""

    name: str
    op: str
    sets: tuple[tuple[Tensor, Tensor | None], ...]
    rest: tuple  # arguments after the first
    kw: dict
    products: int  # in all
    bytes: int  # that must move
    real_input: bool = False

    def arguments(self, number: int = 0) -> tuple[tuple, dict]:
        """As a backend gets them, the signs of a real input taken."""
        first, residual = self.sets[number % len(self.sets)]
        if self.real_input:
            first = triton.kernel("sign_pack")(first, None, 1)
        kw = self.kw if residual is None else {**self.kw, "residual": residual}
        return (first, *self.rest), kw

    def run(self, which: kernels.Kernel | str, number: int = 0) -> tuple:
        """In a kernel of csrc/cuda, by `TRITON` as a user gets it, or in a `tile_name`."""
        args, kw = self.arguments(number)
        if isinstance(which, str):
            tile = which.removeprefix(TRITON).removeprefix(":")
            with in_tile(int(tile)) if tile else contextlib.nullcontext():
                return by_triton(self.op, args, kw)
        found = getattr(launch, self.op)(which, *args, **kw)
        settled.add(self.rest[0])  # as the operator does: a layer's filters stay as they are
        return found

    def floors(self, copy: float) -> dict[str, float]:
        """Microseconds: arithmetic at the tensor core's peak, bytes at the rate of a copy."""
        return {"tensor": 2e6 * self.products / PEAK, "bytes": 1e6 * self.bytes / copy}


def inner_of(op: str, args: tuple, kw: dict) -> str | None:
    """The inner product that Triton would run a call by, None of an operator without."""
    inners = triton_plan.decide(op, args, kw, args[0].device).inners
    if not inners:
        raise RuntimeError(f"Triton has no kernel for this call of {op}")
    return inners[0]


def by_triton(op: str, args: tuple, kw: dict) -> tuple:
    """The Triton kernel that would run, without the check that comes before its first use."""
    inner = inner_of(op, args, kw)
    return triton.kernel(op)(*args, **kw, **({"inner": inner} if inner else {}))


def tiles(call: Call) -> tuple[str, ...]:
    """Names of the configurations of Triton's kernel that tuning may choose for a large call; of
    others `TRITON`, which stands for the one that a user gets."""
    args, kw = call.arguments()
    if len(args[0]) < BATCHES[0]:
        return (TRITON,)
    inner, family = inner_of(call.op, args, kw), configs.family(args[0].device)
    if inner is None:
        return (TRITON,)
    size = getattr(triton_plan.decide(call.op, args, kw, args[0].device), "size", None)
    table = (configs.table(inner, family) if size is None else
             configs.table(inner, family, size.flat))
    return tuple(tile_name(number) for number in range(len(table)))


def tile_name(number: int) -> str:
    return f"{TRITON}:{number}"


def in_tile(number: int) -> contextlib.AbstractContextManager:
    """Inside, Triton's kernels run in this configuration."""
    from bitkernels.backends.triton import tuning

    return tuning.fixed(number)


def architecture(device: torch.device) -> str | None:
    return launch.architecture(device)


def own_kernels(arch: str | None) -> list[kernels.Kernel]:
    """Those of csrc/cuda that compute products on an architecture."""
    return [k for k in kernels.ALL.values()
            if k.name != kernels.PREPARE.name and k.family in kernels.FAMILIES.get(arch or "", ())]


def takers(call: Call, device: torch.device) -> list[kernels.Kernel]:
    """The kernels of csrc/cuda that take a call."""
    arch = architecture(device)
    if arch is None or call.op not in dispatch.OPS:
        return []
    args, kw = call.arguments()
    return list(launch.taking(kernels.FAMILIES[arch], call.op, args, kw))


def words(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(-2**31, 2**31, shape, dtype=torch.int32, device=device)


def sets_of(make: Callable[[], tuple[Tensor, Tensor | None]], cache: int, copies: int
            ) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """So many first operands that a cache of so many bytes does not hold them; `copies` at most."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first if t is not None)
    count = min(copies, max(1, math.ceil(2 * cache / size)))
    return (first, *(make() for _ in range(count - 1)))


def convolution(device: torch.device, channels: int, size: int, batch: int, output: str,
                cache: int = 0, copies: int = COPIES, *, cin: int | None = None, kernel: int = 3,
                stride: int = 1) -> Call:
    """channels@size is the output; cin: input channels where they are others."""
    cin = cin or channels
    real_input, kind = output == "fp16 from fp16", output.split()[0]
    large, width = size * stride, cin // 32

    def real(c: int, s: int) -> Tensor:
        x = torch.randn(batch, c, s, s, device=device, dtype=torch.float16)
        return x.to(memory_format=torch.channels_last)

    def operands() -> tuple[Tensor, Tensor | None]:
        first = real(cin, large) if real_input else words(device, batch, large, large, width)
        return first, real(channels, size) if kind == "block" else None

    filters = words(device, channels, kernel, kernel, width)
    rest: tuple = (filters, cin, (stride, stride), (kernel // 2, kernel // 2))
    op = "packed_conv2d"
    k = cin * kernel * kernel
    if kind == "packed":
        spread = math.isqrt(k)
        low = torch.randint(-spread, spread + 1, (channels,), dtype=torch.int32, device=device)
        kw = dict(real=False, packed=True,
                  threshold=torch.stack((low, torch.full_like(low, INT_MAX))))
        bits = 1
    elif kind == "fp16":
        kw, bits = dict(real=True, packed=False, dtype=torch.float16), 16
    elif kind == "block":
        def vector(middle: float, reach: float) -> Tensor:
            return middle + reach * (2 * torch.rand(channels, device=device) - 1)

        kw = dict(real=True, packed=True, dtype=torch.float16,
                  scale=vector(1, 0.5) / math.sqrt(k), bias=vector(0, 0.3),
                  shift_in=vector(0, 0.3), slope=vector(0.25, 0.2), shift_out=vector(0, 0.3),
                  sign_shift=vector(0, 0.3))
        bits = 16 + 16 + 1
    else:
        op, rest = "packed_conv2d_moments", (*rest, (1, 1), 1)
        dtype = getattr(torch, output.split()[1])
        kw = dict(pad_value=0, out_channels=None, relu=False, dtype=dtype)
        bits = 8 * dtype.itemsize
    pixels = batch * size * size
    moved = (batch * large * large * cin * (16 if real_input else 1) + channels * k
             + pixels * channels * bits) // 8
    name = f"{kernel}x{kernel}{f'/{stride}' if stride > 1 else ''}:" + (
        f"{cin}-" if cin != channels else "") + f"{channels}@{size} batch {batch} {output}"
    return Call(name, op, sets_of(operands, cache, copies), rest, kw, pixels * channels * k, moved,
                real_input)


def product(device: torch.device, rows: int, columns: int, channels: int, output: str,
            cache: int = 0, copies: int = COPIES) -> Call:
    width = channels // 32
    kw = (dict(real=False, packed=True) if output == "packed" else
          dict(real=True, packed=False, dtype=torch.float16))
    bits = 1 if output == "packed" else 16
    return Call(f"{rows}x{columns}x{channels} {output}", "packed_linear",
                sets_of(lambda: (words(device, rows, width), None), cache, copies),
                (words(device, columns, width), channels), kw, rows * columns * channels,
                (rows * channels + columns * channels + rows * columns * bits) // 8)


def convolutions(device: torch.device, cache: int = 0, layers: Sequence[tuple[int, int]] = LAYERS,
                 batches: Sequence[int] = BATCHES, outputs: Sequence[str] = OUTPUTS
                 ) -> Iterator[tuple[str, int, str, Callable[[], Call]]]:
    """(layer, batch, output, the call), what matters most first: moments of small batches, and
    those of more than 16 bits, come last."""
    def late(batch: int, output: str) -> bool:
        return output.startswith("moments") and (batch != batches[0] or output.endswith("32"))

    for last in (False, True):
        for batch in batches:
            for channels, size in layers:
                for output in outputs:
                    if late(batch, output) == last:
                        yield f"{channels}@{size}", batch, output, functools.partial(
                            convolution, device, channels, size, batch, output, cache,
                            conv_copies(batch))


def conv_copies(batch: int) -> int:
    """Calls in a graph: of those of a batch of 1 so many that the graph's own start is little."""
    return COPIES if batch > 1 else 3 * COPIES


def gemm_copies(size: int) -> int:
    return max(4, min(COPIES, (8192 * COPIES) // (2 * size)))


# The right answer.


def signs(packed: Tensor, channels: int) -> Tensor:
    """-1 and +1 in float32 of words, channels last."""
    bits = (packed.unsqueeze(-1) >> torch.arange(32, device=packed.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :channels].float() * 2 - 1


def pack(bits: Tensor) -> Tensor:
    """Booleans (..., C), C a multiple of 32, to words."""
    value = (bits.unflatten(-1, (-1, 32)).long()
             << torch.arange(32, device=bits.device)).sum(-1)
    return torch.where(value >= 2**31, value - 2**32, value).int()


def rows_of(call: Call) -> slice | None:
    """Of a large product's rows only some are compared."""
    return slice(0, 2048) if call.op == "packed_linear" and len(call.sets[0][0]) > 8192 else None


def dots(call: Call) -> Tensor:
    """Integers in float32: (N, OH, OW, Cout), or (rows, Cout)."""
    first, filters, channels = call.sets[0][0], call.rest[0], call.rest[1]
    if call.op == "packed_linear":
        part = rows_of(call)
        x = signs(first if part is None else first[part], channels)
        return torch.cat([x @ signs(some, channels).T for some in filters.split(4096)], -1)
    w = signs(filters, channels)
    x = (torch.where(first < 0, -1.0, 1.0).float().permute(0, 2, 3, 1) if call.real_input
         else signs(first, channels))
    (sh, sw), (ph, pw) = call.rest[2:4]
    _, kh, kw, _ = w.shape
    x = F.pad(x, (0, 0, pw, pw, ph, ph))
    oh, ow = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    total = None
    for dy in range(kh):
        for dx in range(kw):
            window = x[:, dy:dy + (oh - 1) * sh + 1:sh, dx:dx + (ow - 1) * sw + 1:sw]
            part = window.reshape(-1, channels) @ w[:, dy, dx].T
            total = part if total is None else total + part
    assert total is not None
    return total.view(len(x), oh, ow, len(w))


def expected(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """What `run` returns for the first set of operands."""
    torch.backends.cuda.matmul.allow_tf32 = False
    y, kw = dots(call), call.kw
    if call.op == "packed_conv2d_moments":
        d = y.long()
        sums = [t.sum((0, 1, 2)) for t in (d, d * d, torch.ones_like(d))]
        return y.permute(0, 3, 1, 2).to(kw["dtype"]), torch.stack(sums)
    if "threshold" in kw:
        low, high = kw["threshold"]
        d = y.int()
        return None, pack((d >= low) & (d <= high))
    if "scale" in kw:
        y = y * kw["scale"]
        y = y + kw["bias"]
        residual = call.sets[0][1]
        assert residual is not None
        y = y + residual.permute(0, 2, 3, 1).float()
        y = y + kw["shift_in"]
        y = torch.where(y > 0, y, y * kw["slope"])
        y = y + kw["shift_out"]
    packed = None
    if kw["packed"]:
        shifted = y + kw["sign_shift"] if "sign_shift" in kw else y
        packed = pack(~(shifted < 0))
    real = None
    if kw["real"]:
        real = (y.permute(0, 3, 1, 2) if y.dim() == 4 else y).to(kw["dtype"])
    return real, packed


def difference(call: Call, found: Sequence[Tensor | None],
               right: Sequence[Tensor | None]) -> str | None:
    """Where an answer differs, or None."""
    part = rows_of(call)
    for number, (have, want) in enumerate(zip(found, right, strict=True)):
        if (have is None) != (want is None):
            return f"output {number} {'is missing' if have is None else 'was not asked for'}"
        if have is None or want is None:
            continue
        have = have if part is None else have[part]
        if have.dtype != want.dtype or have.shape != want.shape:
            return (f"output {number} is {have.dtype} {tuple(have.shape)}, not {want.dtype} "
                    f"{tuple(want.shape)}")
        if not torch.equal(have, want):
            return f"output {number} differs in {int((have != want).sum())} of {want.numel()}"
    return None
