"""Small cases of every operator, run on the device and compared bit for bit with the reference.

Real values are multiples of 1/4, so every sum is exact in any order. The products run all cases in
their fixed configuration, and the last one in every other that tuning could choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels import reference
from bitkernels.backends.triton import configs


class Values:
    """Inputs from a generator of their own: the global one is not touched."""

    def __init__(self):
        self.generator = torch.Generator("cpu").manual_seed(7)

    def _integers(self, low: int, high: int, shape) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device="cpu")

    def real(self, *shape, dtype=torch.float32) -> Tensor:
        return (self._integers(-16, 17, shape) / 4).to(dtype)

    def words(self, *shape) -> Tensor:
        return reference.pack_bits(self._integers(0, 2, shape).bool())

    def epilogue(self, shape, channels) -> dict:
        names = ("scale", "bias", "shift_in", "slope", "shift_out", "sign_shift")
        return dict(clamp_min=-20.0, clamp_max=25.0, dtype=torch.float16,
                    residual=self.real(*shape, dtype=torch.float16),
                    **{name: self.real(channels) for name in names})


def cases(op: str) -> list[tuple[tuple, dict]]:
    v = Values()
    nchw = v.real(2, 70, 5, 6)
    last = v.real(2, 70, 5, 6, dtype=torch.float16).to(memory_format=torch.channels_last)
    if op == "sign_pack":
        return [((x, shift, 1), {}) for x in (nchw, last)
                for shift in (None, v.real(70), v.real(2, 70, 1, 1))]
    if op == "sign_pack_mask":
        return [((x, 1.5, v.real(70), 1), {}) for x in (nchw, last)]
    if op == "mask_grad":
        return [((x, v.words(2, 5, 6, 70), 1), {}) for x in (nchw, last)]
    if op == "unpack":
        return [((v.words(2, 5, 6, 70), 70, dtype, 1), {})
                for dtype in (torch.float32, torch.bfloat16)]
    if op == "packed_max_pool2d":
        return [((v.words(2, 7, 6, 70), (3, 3), (2, 2), (1, 1), (1, 1), False), {})]
    if op == "rsign":
        return [((x, v.real(*shape)), {}) for x in (nchw, last) for shape in ((70,), (2, 70, 1, 1))]
    if op == "rprelu":
        return [((x, *(v.real(70) for _ in range(3))), {}) for x in (nchw, last)]
    if op == "rprelu_backward":
        return [((v.real(2, 70, 5, 6).to(x.dtype), x, v.real(70), v.real(70)), {})
                for x in (nchw, last)]
    if op.startswith("residual_block") or op == "sign_backward":
        return _block_cases(op, v)
    both = dict(real=True, packed=True)
    if op == "packed_linear":
        plain, full = (v.words(9, 300), v.words(70, 300), 300), (v.words(100, 70),
                                                                v.words(40, 70), 70)
        return [(plain, dict(both, dtype=torch.int32)),
                (full, dict(both, **v.epilogue((100, 40), 40)))]
    geometry = ((2, 1), (1, 0, 2, 1), (1, 2), 1)
    small = (v.words(2, 9, 11, 70), v.words(40, 3, 3, 70), 70, *geometry)
    large = (v.words(1, 9, 9, 256), v.words(72, 3, 3, 256), 256, (1,), (1,), (1,), 1)
    if op == "packed_conv2d_moments":
        kw = dict(pad_value=0, out_channels=None, relu=False, dtype=torch.int16)
        return [(small, dict(kw, relu=True, pad_value=-1, dtype=torch.int32)), (large, kw)]
    shape = (2, 40, 4, 10)
    return [(small, dict(both, dtype=torch.int32)),
            (small, dict(both, pad_value=1, **v.epilogue(shape, 40))),
            (large, dict(both, dtype=torch.int32))]


def _block_cases(op: str, v: Values) -> list[tuple[tuple, dict]]:
    """Mixed types, memory orders and optional parts, over several tiles of rows."""
    shape, half, last = (2, 70, 5, 9), torch.float16, torch.channels_last
    real, grad = v.real(*shape), v.real(*shape, dtype=half).to(memory_format=last)
    stream = v.real(*shape, dtype=half)
    short = v._integers(-9, 10, shape).short().to(memory_format=last)
    c = [v.real(70) for _ in range(6)]
    wide = [t.double() for t in c]
    if op == "residual_block_forward":
        return [((short, stream, *wide[:2], *c[2:5], True), {}),
                ((short.int(), real, *c[:2], None, None, None, False), {})]
    if op == "residual_block_backward":
        return [((grad, short, stream, *wide[:2], *c[2:4], wide[4], True), {}),
                ((real, short.int(), None, *c[:2], None, None, c[4], False), {})]
    if op == "residual_block_norm_backward":
        return [((grad, short, *wide[:4], True, torch.float32), {}),
                ((real, short.int(), *c[:4], False, half), {})]
    return [((grad, real, c[0], real, "approx_sign", None, 5.0), {}),
            ((real, stream, None, None, "ste_sign", 1.0, 5.0), {}),
            ((grad, stream.to(memory_format=last), c[0], grad, "identity", None, 5.0), {}),
            ((real, real, c[0], None, "swish_sign", None, 1.5), {})]


def _equal(want: Tensor, have: Tensor, args: tuple) -> bool:
    """Bit for bit, but for swish_sign, whose exponentials differ from library to library."""
    if "swish_sign" in [arg for arg in args if isinstance(arg, str)]:
        return torch.allclose(want, have, rtol=1e-5, atol=1e-4)
    return torch.equal(want, have)


def failure(op: str, inner: str | None, device: torch.device) -> str | None:
    """What is wrong with this operator's kernel on this device, or None."""
    from bitkernels.backends.triton import tuning
    from bitkernels.backends.triton.dispatch import kernel

    forced = {} if inner is None else {"inner": inner}
    tiles = 1
    if inner is not None and configs.autotuning():
        tiles = len(configs.table(inner, configs.family(device)))

    def move(value):
        return value.to(device) if isinstance(value, Tensor) else value

    every = cases(op)
    for tile in range(tiles):
        for number, (args, kw) in enumerate(every):
            if tile > 0 and number + 1 < len(every):
                continue
            expected = getattr(reference, op)(*args, **kw)
            with tuning.fixed(tile):
                got = kernel(op)(*map(move, args), **{k: move(t) for k, t in kw.items()}, **forced)
            if isinstance(expected, Tensor):
                expected, got = (expected,), (got,)
            for i, (want, have) in enumerate(zip(expected, got, strict=True)):
                if want is not None and not _equal(want, have.cpu(), args):
                    return (f"differs from the reference in case {number}, output {i}, "
                            f"configuration {tile}")
    return None
