"""packed_conv2d and packed_linear on the kernels of csrc/cuda: from tensors to launches.

A resident kernel is one launch. For the others a first one (`prepare`) counts bits of the filters
per border class, the second does the rest. All are compiled for the shape at its first call, which
a CUDA graph cannot capture. Of the loaded ones the least recently used are unloaded, but never one
that a graph has captured.
"""

from __future__ import annotations

import functools
import threading
import weakref

import torch
from torch import Tensor

from bitkernels import reference
from bitkernels.backends import gpus
from bitkernels.backends.cuda import kernels, settled
from bitkernels.backends.cuda.driver import Driver, Loaded, TensorMap
from bitkernels.backends.cuda.plan import Problem, modelled
from bitkernels.backends.cuda.recent import Recent
from bitkernels.backends.cuda.spec import (
    TYPES,
    VECTORS,
    Params,
    Spec,
    conv_spec,
    linear_spec,
)
from bitkernels.backends.replay import watch
from bitkernels.backends.trust import Capturing, capturing
from bitkernels.ops.geometry import (
    TILE,
    conv_output_size,
    empty_real,
    empty_words,
    linear_geometry,
    padding4,
    pair,
)

_lock = threading.Lock()
_driver: Driver | None = None
# Twice what runs unasked (`dispatch.MOST_UNASKED` shapes of a kernel and its `prepare`), so that
# only shapes by BITKERNELS_CUDA=1 displace others.
MOST_LOADED = 256
_loaded: Recent[tuple[str, Spec, int], Loaded] = Recent(MOST_LOADED, lambda k: k.captured)
MOST_CLASSES = 256
MOST_PRODUCTS = 1 << 29  # 4 popcount(a and w) stays in int32
MOST_ROWS = 2**31 - 2**16  # rows, and those of tiles past the last, are counted in int32


def driver() -> Driver:
    global _driver
    if _driver is None:
        _driver = Driver()
    return _driver


def clear() -> None:
    """Forgets the driver and the loaded kernels, which are unloaded but for captured ones."""
    global _driver
    with _lock:
        _loaded.clear()
        _driver = None


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    """The current one, without an object around it."""
    return torch._C._cuda_getCurrentRawStream(_index(device)) if device.type == "cuda" else 0


def architecture(device: torch.device) -> str | None:
    gpu = gpus.of(device)
    if gpu is None:  # the emulator's
        return "sm_90a"
    return None if gpu.capability is None else kernels.architecture(gpu.capability)


def multiprocessors(device: torch.device) -> int:
    gpu = gpus.of(device)
    return 4 if gpu is None else gpu.multiprocessors


def _function(kernel: kernels.Kernel, spec: Spec, device: torch.device) -> Loaded:
    """The kernel, compiled and loaded; it stays loaded for as long as the caller holds it."""
    key = kernel.name, spec, _index(device)
    found = _loaded.get(key)
    if found is None:
        if capturing(device):
            raise Capturing(f"{kernel.name} is not compiled for this shape yet and cannot be while "
                            "a CUDA graph is captured; call it once before the capture")
        arch = architecture(device)
        assert arch is not None
        with _lock:
            found = _loaded.get(key)
            if found is None:
                driver().bind(key[2])
                found = driver().build(kernel, spec, arch)
                _loaded.put(key, found)
    if not found.captured and capturing(device):
        found.keep()
    return found


def _chunk(pixel: int, *tensors: Tensor) -> int:
    """Bytes of one cp.async: as many as the pixels and both tensors are aligned to."""
    for size in (16, 8):
        if pixel % size == 0 and all(t.data_ptr() % size == 0 for t in tensors):
            return size
    return 4


def _dense(t: Tensor, channels_last: bool) -> Tensor:
    """Memory as the output's, which is dense in the order (N, H, W, C) or (N, C, H, W)."""
    t = t.permute(0, 2, 3, 1) if channels_last else t
    return _aligned(t)


def _aligned(t: Tensor) -> Tensor:
    """Contiguous, and where kernels may read two elements at once."""
    t = t.contiguous()
    return t if t.data_ptr() % 8 == 0 else t.clone()


def outside(op: str, args, kw) -> str | None:
    """Why these kernels do not take a call with checked arguments, or None."""
    types = {kw.get("dtype")} | {kw[name].dtype for name in (*VECTORS, "residual")
                                 if kw.get(name) is not None}
    if torch.float64 in types:
        return "float64"
    if not args[1].shape[0]:
        return "an output without channels"
    if op == "packed_linear":
        words, filters, channels = args[:3]
        rows, spec = words.numel() // words.shape[-1], linear_spec(words.shape[-1], 1, channels, 4)
    else:
        words, filters, channels, stride, padding, dilation, groups = _defaults(*args)
        pad_value = kw.get("pad_value", 0)
        if groups != 1:
            return "groups"
        if pad_value == 1:
            return "padding with +1"
        spec, shape = _conv(words, filters, channels, stride, padding, dilation, pad_value,
                            kw.get("out_channels"), 4)
        rows = shape[0] * shape[2] * shape[3]
        if spec.classes > MOST_CLASSES:
            return f"{spec.classes} kinds of border windows, more than {MOST_CLASSES}"
        if max(spec.h, spec.w) + spec.kh * spec.dh + spec.kw * spec.dw >= 1 << 29:
            return "an image of 2^29 pixels a side"
    if 8 * spec.k_bytes >= MOST_PRODUCTS:
        return "2^29 products in one dot product"
    if rows >= MOST_ROWS or spec.classes * filters.shape[0] >= MOST_ROWS // TILE:
        return "2^31 rows or channels"
    return None


def _defaults(words, filters, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1):
    return words, filters, channels, stride, padding, dilation, groups


def _conv(words, filters, channels, stride, padding, dilation, pad_value, out_channels, chunk):
    """(spec, output shape) of a convolution."""
    return _conv_of(words.shape, filters.shape, channels, tuple(stride), tuple(padding),
                    tuple(dilation), pad_value, out_channels, chunk)


@functools.lru_cache(maxsize=4096)
def _conv_of(size, filters, channels, stride, padding, dilation, pad_value, out_channels, chunk):
    """Of sizes that `conv_geometry` has let pass once."""
    stride, dilation = pair("packed_conv2d", "stride", stride, 1), pair(
        "packed_conv2d", "dilation", dilation, 1)
    pad = padding4("packed_conv2d", padding)
    cout = filters[0]
    if len(filters) == 5:
        cout = filters[0] * TILE if out_channels is None else out_channels
    oh, ow = conv_output_size("packed_conv2d", size[1:3], filters[1:3], stride, pad, dilation)
    shape = size[0], cout, oh, ow
    spec = conv_spec(shape, tuple(size[1:3]), (cout, *filters[1:4]), channels, stride, pad,
                     dilation, chunk, pad_value)
    return spec, shape


def problem(op: str, args, kw) -> Problem:
    """Of a call that is not `outside`."""
    words, filters, channels = args[:3]
    aligned = False
    if op == "packed_linear":
        shape = linear_geometry(op, words, filters, channels, kw.get("out_channels"))
        rows = torch.Size(shape[:-1]).numel()
        spec = linear_spec(words.shape[-1], shape[-1], channels, 4)
        aligned = words.shape[-1] % 4 == 0 and all(
            t.data_ptr() % 16 == 0 or not t.is_contiguous() for t in (words, filters))
    else:
        words, filters, channels, stride, padding, dilation, _ = _defaults(*args)
        spec, (n, _, oh, ow) = _conv(words, filters, channels, stride, padding, dilation,
                                     kw.get("pad_value", 0), kw.get("out_channels"), 4)
        rows = n * oh * ow
        aligned = words.data_ptr() % 16 == 0 or not words.is_contiguous()
    return Problem(op, spec, max(1, rows), kw.get("real", True), aligned)


def taking(families: tuple[str, ...], op: str, args, kw) -> tuple[kernels.Kernel, ...]:
    """Kernels that a call can run in, the one expected to be fastest first."""
    if outside(op, args, kw) is not None:
        return ()
    return modelled(families, problem(op, args, kw), multiprocessors(args[0].device))


def packed_conv2d(kernel: kernels.Kernel, words, weight_words, channels, stride=(1,), padding=(0,),
                  dilation=(1,), groups=1, *, pad_value=0, out_channels=None, dtype=None,
                  channels_last=True, real=True, packed=False, residual=None, **parts):
    """(real tensor or None, packed signs or None)."""
    words, filters = words.contiguous(), _filters(weight_words, out_channels).contiguous()
    chunk = _chunk(4 * words.shape[-1], words, filters)
    spec, shape = _conv(words, filters, channels, stride, padding, dilation, pad_value, None, chunk)
    images, cout, oh, ow = shape
    out = empty_real(words, shape, dtype, channels_last) if real else None
    signs = empty_words(words, (images, oh, ow), cout) if packed else None
    if residual is not None:
        residual = _dense(residual, channels_last)
    _contract(kernel, spec, words, filters, images * oh * ow, out, signs, residual,
              bool(channels_last), settled=filters is weight_words and settled.has(filters),
              **parts)
    return out, signs


def packed_conv2d_moments(kernel: kernels.Kernel, words, weight_words, channels, stride=(1,),
                          padding=(0,), dilation=(1,), groups=1, *, pad_value=0, out_channels=None,
                          relu=False, dtype=torch.int16, sums=True):
    """(dot products, their moments). Where nobody wants the sums the same kernel takes them, and
    what they are added to is not cleared before."""
    words, filters = words.contiguous(), _filters(weight_words, out_channels).contiguous()
    spec, shape = _conv(words, filters, channels, stride, padding, dilation, pad_value, None,
                        _chunk(4 * words.shape[-1], words, filters))
    images, cout, oh, ow = shape
    dot = empty_real(words, shape, dtype, True)
    new = words.new_zeros if sums else words.new_empty
    moments = new((3, cout), dtype=torch.int64)
    _contract(kernel, spec.with_parts(("moments", 2 if relu else 1)), words, filters,
              images * oh * ow, dot, None, None, True, moments=moments)
    return dot, moments if sums else None


def _filters(weight_words: Tensor, out_channels: int | None) -> Tensor:
    """Filters as they are, not as CPU kernels read them."""
    if weight_words.dim() == 4:
        return weight_words
    cout = weight_words.shape[0] * weight_words.shape[-1] if out_channels is None else out_channels
    return reference.untile_weight(weight_words, cout, 1)


def packed_linear(kernel: kernels.Kernel, words, weight_words, channels, *, out_channels=None,
                  dtype=None, real=True, packed=False, residual=None, **parts):
    """(real tensor or None, packed signs or None)."""
    words = words.contiguous()
    shape = linear_geometry("packed_linear", words, weight_words, channels, out_channels)
    if weight_words.dim() == 3:
        weight_words = reference.untile_weight(weight_words, shape[-1])
    filters = weight_words.contiguous()
    width, cout = words.shape[-1], shape[-1]
    out = empty_real(words, shape, dtype, False) if real else None
    signs = empty_words(words, shape[:-1], cout) if packed else None
    spec = linear_spec(width, cout, channels, _chunk(4 * width, words, filters))
    _contract(kernel, spec, words, filters, words.numel() // width, out, signs,
              None if residual is None else _aligned(residual), True, **parts)
    return out, signs


def _contract(kernel, spec: Spec, words, filters, rows, out, packed, residual, nhwc, *,
              clamp_min=None, clamp_max=None, threshold=None, moments=None, settled=False,
              **vectors) -> None:
    """settled: whether the launch before has not written the filters."""
    if rows == 0:
        return
    device = words.device
    vectors = {name: _aligned(vectors[name].float()) for name in VECTORS
               if vectors.get(name) is not None}
    if threshold is not None:
        threshold = _aligned(threshold)
    spec, shared = _specialized(
        kernel, spec, None if out is None else out.dtype, nhwc, packed is not None,
        None if residual is None else residual.dtype, threshold is not None, clamp_min is not None,
        clamp_max is not None, tuple(vectors), words.data_ptr() % 16 == 0)
    main = _function(kernel, spec, device)
    tensors = dict(words=words, filters=filters, out=out, packed=packed, residual=residual,
                   threshold=threshold, moments=moments, **vectors)
    params = Params(**{name: t.data_ptr() for name, t in tensors.items() if t is not None},
                    clamp_min=0.0 if clamp_min is None else clamp_min,  # -0.0 is another bound
                    clamp_max=0.0 if clamp_max is None else clamp_max, rows=rows,
                    images=rows // (spec.oh * spec.ow), settled=settled)
    prepare = None
    if not kernel.resident:
        prepare = _function(kernels.PREPARE, spec.for_preparation(), device)
        # Both counts in one allocation, which lives until the launches below are enqueued.
        first = -(-spec.classes * spec.cout // 4) * 4
        counts = words.new_empty(first + (rows if kernel.windows else 0))
        params.corr = counts.data_ptr()
        params.pa = params.corr + 4 * first if kernel.windows else None
    stream = _stream(device)
    run = driver()
    run.bind(_index(device))
    if prepare is not None:
        filters_padded = -(-spec.cout // kernels.PREPARE.bm) * kernels.PREPARE.bm
        warps = filters_padded + (rows if kernel.windows else 0)
        run.launch(prepare, -(-warps // kernels.PREPARE.bm), kernels.PREPARE.threads, 0, stream,
                   params)
    columns = -(-spec.cout // kernel.bn)
    tiles = -(-rows // kernel.bm) * columns
    grid = min(tiles, multiprocessors(device)) if kernel.persistent else tiles
    if kernel.resident:
        grid = max(grid, columns)
    maps = kernel.maps(spec, rows) if kernel.bulk else None
    if watch.launches is not None:
        watch.launches.append(_again(main, (grid, kernel.threads, shared), params, tensors, device,
                                     maps) if kernel.resident else None)
    run.launch(main, grid, kernel.threads, shared, stream, params, *_encoded(run, params, maps),
               early=kernel.bulk or kernel.resident)


def _encoded(run: Driver, params: Params, maps) -> tuple[TensorMap, ...]:
    """What a kernel with bulk copies takes beside its parameters, where they say that words and
    filters are; where it copies the filters itself, it looks at the first map alone."""
    if maps is None:
        return ()
    words = run.tensor_map(params.words, maps[0])
    return words, words if maps[1] is None else run.tensor_map(params.filters, maps[1])


def _again(main: Loaded, sizes: tuple[int, int, int], params: Params,
           tensors: dict[str, Tensor | None], device: torch.device, maps):
    """For `replay`: a resident kernel's launch, and its tensors."""
    kept, number = weakref.ref(main), _index(device)
    names = [name for name, t in tensors.items() if t is not None]
    numbers = {name: getattr(params, name) for name in (
        "clamp_min", "clamp_max", "rows", "images", "settled")}

    def again(stream: int, values: list[int]) -> None:
        kernel, run = kept(), driver()
        if kernel is None:
            raise LookupError("the kernel has been unloaded")
        if not kernel.captured and capturing(device):
            kernel.keep()
        run.bind(number)
        new = Params(**dict(zip(names, values, strict=True)), **numbers)
        run.launch(kernel, *sizes, stream, new, *_encoded(run, new, maps), early=True)

    return again, [t for t in tensors.values() if t is not None]


@functools.lru_cache(maxsize=4096)
def _specialized(kernel: kernels.Kernel, spec: Spec, out, nhwc: bool, packed: bool, residual,
                 threshold: bool, clamp_min: bool, clamp_max: bool, vectors: tuple[str, ...],
                 aligned: bool) -> tuple[Spec, int]:
    """(what the kernel is compiled for, bytes of its dynamic shared memory); out and residual:
    their types."""
    spec = spec.with_parts(
        ("out_type", TYPES[out]), ("nhwc", int(nhwc)), ("packed", int(packed)),
        ("residual", TYPES[residual]), ("threshold", int(threshold)),
        ("clamp_min", int(clamp_min)), ("clamp_max", int(clamp_max)),
        ("windows", int(kernel.windows)), *((name, 1) for name in vectors))
    if kernel.resident:
        spec = kernel.placed(spec, aligned)
    return spec, kernel.shared_bytes(spec)


def peak(device: torch.device, rounds: int = 2000):
    """(call, products of a call): the 1-bit tensor core with nothing else to do."""
    kernel = kernels.PEAK_WGMMA if architecture(device) == "sm_90a" else kernels.PEAK_MMA
    blocks = multiprocessors(device) * (1 if kernel is kernels.PEAK_WGMMA else 2)
    function = _function(kernel, linear_spec(1, 1, 1, 4), device)
    out = torch.empty(blocks * kernel.threads, dtype=torch.int32, device=device)
    params = Params(out=out.data_ptr(), rows=rounds)

    def call():
        stream = _stream(device)
        driver().bind(_index(device))
        driver().launch(function, blocks, kernel.threads, kernel.shared, stream, params)
        return out

    warps = blocks * kernel.threads // 32
    each = 64 * 256 * 256 // 4 * 4 if kernel is kernels.PEAK_WGMMA else 16 * 8 * 256 * 32
    return call, warps * each * rounds
