"""Which launchers take 64-bit offsets: decided on tensors without memory, by size and by stride."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled elsewhere", allow_module_level=True)

from bitkernels.backends.triton import configs, dispatch, elementwise, gemm, plan, sums, tuning

BIG = 2**31


def meta(*shape, dtype=torch.float16, last=False):
    format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=format)


def words(*shape):
    return meta(*shape, dtype=torch.int32)


@pytest.mark.parametrize("tensor,far", [
    (meta(1), False), (meta(0, BIG), False),
    (meta(BIG // 2), False), (meta(BIG - 2**14 - 1), False), (meta(BIG), True),
    (meta(2**16, 2**15), True), (meta(2**16, 2**14), False),
    (meta(1).expand(2**20, 2**20), False),
    (torch.empty_strided((3, 4), (2**30, 1), device="meta"), True),
    (torch.empty_strided((2, 4), (2**30, 1), device="meta"), False),
    (torch.empty_strided((4, 3), (1, 2**30), device="meta"), True),
], ids=lambda x: str(tuple(x.shape) + x.stride()) if isinstance(x, torch.Tensor) else None)
def test_wide(tensor, far):
    assert elementwise.wide(tensor) is far
    assert elementwise.wide(None, meta(1), tensor) is far
    assert not elementwise.wide(None)


class Recorder:
    """In the place of a kernel: keeps whether it was to take 64-bit offsets."""

    def __init__(self, seen: list[bool]) -> None:
        self.seen = seen

    def __getitem__(self, grid):
        return lambda *args, **kw: self.seen.append(kw["WIDE"]) if "WIDE" in kw else None


@pytest.fixture
def decided(monkeypatch):
    """The decisions of a call of an operator's launcher."""
    seen: list[bool] = []
    monkeypatch.setattr(sums, "reduce_kernel", Recorder(seen))
    monkeypatch.setattr(tuning, "launch", lambda *args, WIDE=None, **kw: seen.append(WIDE))
    monkeypatch.setattr(configs, "family", lambda device: "sm90")

    def decide(op, *args, **kw):
        seen.clear()
        module = importlib.import_module(dispatch.kernel(op).__module__)
        with monkeypatch.context() as context:
            for name in vars(module).copy():
                if name.endswith("_kernel"):
                    context.setattr(module, name, Recorder(seen))
            dispatch.kernel(op)(*args, **kw)
        return set(seen)

    return decide


def vectors(count, channels):
    return [meta(channels, dtype=torch.float32) for _ in range(count)]


def activations(n, channels, last=False):
    """Calls of an operator on n images of 2^10 pixels."""
    x = meta(n, channels, 32, 32, last=last)
    rows = words(n, 32, 32, -(-channels // 32))
    dot = meta(n, channels, 32, 32, dtype=torch.int16, last=True)
    double = [v.double() for v in vectors(4, channels)]
    return {
        "sign_pack": (x, None, 1), "sign_pack_mask": (x, 1.0, None, 1),
        "unpack": (rows, channels, torch.float16, 1), "mask_grad": (x, rows, 1),
        "rsign": (x, *vectors(1, channels)), "rprelu": (x, *vectors(3, channels)),
        "rprelu_backward": (x, x, *vectors(2, channels)),
        "sign_backward": (x, x, None, None, "approx_sign", None, 5.0),
        "residual_block_forward": (dot, x, *double[:2], *vectors(3, channels), False),
        "residual_block_backward": (x, dot, x, *double[:2], *vectors(2, channels), double[2],
                                    False),
        "residual_block_norm_backward": (x, dot, *double, False, torch.float16),
    }


@pytest.mark.parametrize("last", (False, True), ids=("planes", "channels_last"))
@pytest.mark.parametrize("op", activations(1, 1))
def test_elementwise_launchers(op, last, decided):
    assert decided(op, *activations(2**15, 64, last)[op]) == {True}
    assert decided(op, *activations(2**14, 64, last)[op]) == {False}


@pytest.mark.parametrize("op", ("sign_pack", "rsign", "rprelu", "mask_grad"))
def test_images_far_apart(op, decided):
    """Few elements, at offsets that 32 bits do not hold."""
    for stride, far in ((2**30, True), (2**29, False)):
        x = torch.empty_strided((3, 8, 4, 4), (stride, 16, 4, 1), dtype=torch.float16,
                                device="meta")
        _, *rest = activations(3, 8)[op]
        if op == "mask_grad":
            rest[0] = words(3, 4, 4, 1)
        assert decided(op, x, *rest) == {far}


@pytest.mark.parametrize("op", ("rprelu_backward", "sign_backward"))
def test_a_walk_counts_beyond_its_last_row(op, decided):
    """All rows are one in memory; the turn after the last one has an index, too."""
    for rows, far in ((BIG - 2**14, True), (BIG - 2**20, False)):
        x = meta(1, 1).expand(rows, 1)
        rest = activations(1, 1)[op][2:]
        assert decided(op, x, x, *rest) == {far}


def test_words_of_an_expanded_input(decided):
    """All rows are one in memory; their words are not."""
    for rows, far in ((BIG, True), (BIG // 4, False)):
        assert decided("sign_pack", meta(1, 3).expand(rows, 3), None, 1) == {far}


def test_packed_max_pool2d(decided):
    for n, far in ((2**17, True), (2**15, False)):
        assert decided("packed_max_pool2d", words(n, 64, 64, 4), (2, 2)) == {far}


@pytest.mark.parametrize("last", (False, True), ids=("planes", "channels_last"))
def test_max_pool2d_with_offsets(last, decided):
    """The image alone is large, or its gradient."""
    window = (2, 2), (2, 2), (0, 0), (1, 1), False
    for n, far in ((2**15, True), (2**14, False)):
        x = meta(n, 64, 32, 32, last=last)
        grad = meta(n, 64, 16, 16, last=last)
        assert decided("max_pool2d_with_offsets", x, *window) == {far}
        assert decided("max_pool2d_with_offsets_backward", grad, grad.byte(), (32, 32),
                       *window) == {far}


def test_moments(decided):
    for n, far in ((2**15, True), (2**10, False)):
        found = decided("packed_conv2d_moments", words(n, 32, 32, 2), words(64, 1, 1, 2), 64, (1,),
                        (0,), (1,), 1, pad_value=0, out_channels=None, relu=False,
                        dtype=torch.int16, inner="popc")
        assert found == {far}


@pytest.mark.parametrize("what", ("input", "output", "packed", "residual"))
@pytest.mark.parametrize("op", ("packed_conv2d", "packed_linear"))
def test_products(op, what, decided):
    """Each tensor alone may be the large one; int8 and b1 do not take such a call."""
    rows, width, cout = {"input": (2**18, 2**13, 32), "output": (2**24, 1, 128),
                         "packed": (2**24, 1, 2**12), "residual": (3, 1, 32)}[what]
    kw = dict(real=what != "packed", packed=what == "packed")
    shape, filters = (rows, width), (cout, width)
    if op == "packed_conv2d":
        shape, filters = (rows, 1, 1, width), (cout, 1, 1, width)
    if what == "residual":
        size = (rows, cout, 1, 1) if op == "packed_conv2d" else (rows, cout)
        kw["residual"] = torch.empty_strided(
            size, (2**30, *([1] * (len(size) - 1))), dtype=torch.float16, device="meta")
    call = words(*shape), words(*filters), 32 * width
    assert decided(op, *call, inner="popc", **kw) == {True}
    if what != "residual":  # which is copied where it lies too far apart
        assert plan.decide(op, call, {}, torch.device("cuda")).inners == ("popc",)
    small = words(2, *shape[1:]), *call[1:]
    kw.pop("residual", None)
    assert decided(op, *small, inner="popc", **kw) == {False}


def test_a_residual_far_apart_is_brought_together_for_the_tensor_cores(monkeypatch):
    given = []
    monkeypatch.setattr(configs, "family", lambda device: "sm90")
    monkeypatch.setattr(gemm, "corrections", lambda *args: words(1, 1))
    monkeypatch.setattr(gemm, "windows", lambda *args: (words(1, 1), words(1, 1)))
    monkeypatch.setattr(tuning, "launch", lambda *args, residual, **kw: given.append(residual))
    residual = torch.empty_strided((3, 64, 1, 1), (2**30, 1, 1, 1), dtype=torch.float16,
                                   device="meta")
    for inner in ("int8", "b1"):
        dispatch.kernel("packed_conv2d")(words(3, 1, 1, 4), words(64, 1, 1, 4), 128,
                                         residual=residual, inner=inner)
    assert [t.stride(0) for t in given] == [64, 64]
