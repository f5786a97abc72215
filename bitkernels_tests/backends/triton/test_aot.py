"""Every Triton kernel compiled ahead of time for GPUs that are not there; machine code asserted.

What must show: the 1-bit tensor core on sm_80 and sm_90, the integer one on every GPU for int8,
hardware popcount, and no value spilled to thread-local memory anywhere. Triton before 3.9 has the
older integer instruction for sm_100, and on AMD counts bits by arithmetic.
"""

from __future__ import annotations

import importlib
import os
import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton

from bitkernels.backends.triton import configs
from bitkernels_tests.triton_aot import TOOLS, compile_for

if not (TOOLS / "nvdisasm").exists() or not (TOOLS / "cuobjdump").exists():
    pytest.skip("this triton brings no nvdisasm and cuobjdump", allow_module_level=True)

RECENT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
GPUS = ("sm80", "sm90", "sm100", "sm120", "gfx942")
INT8_INSTRUCTION = {"sm80": r"\bIMMA\.", "sm90": r"\bIGMMA\.",
                    "sm100": r"\bUTCIMMA" if RECENT else r"\bIMMA\.", "sm120": r"\bIMMA\.",
                    "gfx942": r"v_mfma_i32_\w+_?i8"}

POINTERS = {
    "x": "*fp16", "input": "*fp16", "out": "*fp16", "grad": "*fp16", "residual": "*fp16",
    "signs": "*i32", "masks": "*i32", "words": "*i32", "filters": "*i32", "packed": "*i32",
    "pa": "*i32", "border": "*i32", "corr": "*i32", "threshold": None, "partial": "*fp32",
    "shift": "*fp32", "scale": "*fp32", "bias": "*fp32", "shift_in": "*fp32", "slope": "*fp32",
    "shift_out": "*fp32", "sign_shift": "*fp32", "clip": "fp32", "clamp_min": "fp32",
    "clamp_max": "fp32", "dot": "*i16", "center": "*fp64", "p": "*fp64", "q": "*fp64",
    "r": "*fp64", "add": "*fp16", "beta": "fp32", "STEPS": 16, "STAGES": 1,
    "RELU": True, "WIDE": False, "each": None, "inner": "i32",
}
CHANNELS_LAST = {"inner": None, "so": 0, "oo": 0, "go": 0, "ao": 0, "si": "i32:16", "oi": "i32:16",
                 "gi": "i32:16", "ai": "i32:16", "sc": 1, "oc": 1, "gc": 1, "ac": 1}
NCHW = {"so": "i32:16", "oo": "i32:16", "go": "i32:16", "si": 1, "oi": 1, "gi": 1,
        "sc": "i32:16", "oc": "i32:16", "gc": "i32:16"}
NHWC_OUT = {f"{side}{axis}": 1 if axis == "oc" else "i32:16"
            for side in "ro" for axis in ("on", "oc", "oh", "ow")}
CONV = {
    "N": "i32:16", "SH": 1, "SW": 1, "PT": 1, "PL": 1, "DH": 1, "DW": 1, "BORDERS": 16,
    "WIDTH": 8, "KH": 3, "KW": 3, "PADDED": True, "CHANNELS": 256, "OUT_CHANNELS": 256,
    "GROUPS": 1, "PIXEL": 8, "PAD_VALUE": 0, "TOP": 1, "BOTTOM": 1, "LEFT": 1, "RIGHT": 1,
    **NHWC_OUT,
}
IMAGES = {f"{t}{axis}": 1 if axis == "c" else "i32:16" for t in "sog" for axis in "nchw"}
PLANES = {**IMAGES, **{f"{t}c": "i32:16" for t in "sog"}, **{f"{t}w": 1 for t in "sog"}}
POOL = {"offsets": "*u8", "channels": "i32:16", "blocks": 1, "KH": 3, "KW": 3, "SH": 2, "SW": 2,
        "PT": 1, "PL": 1, "DH": 1, "DW": 1, "UNROLL": True,
        "PACKED": False, "TILE_H": 4, "TILE_W": 4, "BLOCK_C": 64}
POOLED = {"TILE_H": 16, "TILE_W": 64, "BLOCK_C": 1}
ROWS = {"channels": "i32:16", "width": "i32:16", "BLOCK_R": 8, "BLOCK_C": 256}  # whole channels
WALK = {"BLOCK_R": 4}
VECTORS = {**dict.fromkeys(("vectors", "sums", "total", "pqr"), "*fp64"), "moments": "*i64",
           **dict.fromkeys(("mean", "variance", "weight", "norm_weight", "norm_bias"), "*fp32"),
           "EPS": 1e-5, "BLOCK": 32}
NORM = {"scale": "*fp64", "bias": "*fp64"}
PACKED_ONLY = dict(out=None, residual=None, scale=None, bias=None, shift_in=None, slope=None,
                   shift_out=None, sign_shift=None, clamp_min=None, clamp_max=None,
                   threshold="*i32")
LINEAR = dict(H=1, W=1, OH=1, OW=1, PT=0, PL=0, KH=1, KW=1, WIDTH=256, PADDED=False, BORDERS=1,
              packed=None, residual=None, slope=None, shift_in=None, shift_out=None,
              sign_shift=None)
NARROW = dict(WIDTH=2)
WHOLE_GROUPS = dict(GROUPS=2, WIDTH=4)
DOTS = {**PACKED_ONLY, "out": "*i16", "packed": None, "threshold": None}
B1 = dict(TOP=1, BOTTOM=1, LEFT=1, RIGHT=1, FLAT=False, WHOLE=True, EIGHTS=True, OUT_WIDE=True,
          RESIDUAL_WIDE=True, WORDS=2)
PRODUCTS = {"full": {}, "packed": PACKED_ONLY, "linear": LINEAR, "narrow": NARROW,
            "grouped": WHOLE_GROUPS, "dots": DOTS}


def build(gpu: str, kernel, overrides: dict, **options):
    known = {**POINTERS, "PTX": gpu != "gfx942", **overrides}
    types = {arg: known.get(arg, "i32") for arg in kernel.arg_names}
    code = compile_for(gpu, kernel, types, enable_fp_fusion=False, **options)
    # One that may start early waits for the kernel before it, and says that the next may start,
    # before it reads.
    if kernel.__name__ in ("b1_kernel", "sign_pack_rows_kernel"):
        waits = int(gpu not in ("sm80", "sm86", "sm89", "gfx942"))
        assert code.count(r"\bACQBULK\b") == code.count(r"\bPREEXIT\b") == waits
        assert not waits or code.text.index("ACQBULK") < code.text.index("LDG")
    return code


def load(module: str, name: str):
    return getattr(importlib.import_module(f"bitkernels.backends.triton.{module}"), name)


SIMPLE = {
    "sign_pack_rows": ("sign_pack", {**CHANNELS_LAST, **ROWS, "words": "i32", "BLOCK_R": 16}),
    "sign_pack_planes": ("sign_pack", {**NCHW, "words": "i32", "BLOCK_R": 512}),
    "sign_pack_rows, of samples": ("sign_pack", {**CHANNELS_LAST, "words": "i32", "each": "i32",
                                                 "BLOCK_R": 16, "BLOCK_C": 256}),
    "sign_pack_planes, of samples": ("sign_pack", {**NCHW, "words": "i32", "each": "i32",
                                                   "BLOCK_R": 512}),
    "unpack": ("unpack", {**ROWS, "words": "*i8", "BLOCK": 256}),
    "mask_grad": ("mask_grad", {**CHANNELS_LAST, **ROWS, "masks": "*i8"}),
    "mask_grad, planes": ("mask_grad", {**NCHW, "masks": "*i8", "BLOCK_R": 256, "BLOCK_C": 8}),
    "packed_max_pool2d": ("packed_max_pool2d", {"out": "*i32", "KH": 3, "KW": 3, "BLOCK": 512}),
    "max_pool2d": ("max_pool2d_with_offsets", {**POOL, **IMAGES}),
    "max_pool2d, planes of pairs": ("max_pool2d_with_offsets", {
        **POOL, **PLANES, **POOLED, "PACKED": True}),
    "max_pool2d, planes": ("max_pool2d_with_offsets", {**POOL, **PLANES, **POOLED}),
    "max_pool2d, of many taps": ("max_pool2d_with_offsets", {
        **POOL, **IMAGES, "KH": 6, "KW": 5, "UNROLL": False}),
    "max_pool2d_backward": ("max_pool2d_with_offsets", {**POOL, **IMAGES}),
    "max_pool2d_backward, planes": ("max_pool2d_with_offsets", {**POOL, **PLANES, **POOLED}),
    "max_pool2d_backward_blocks": ("max_pool2d_with_offsets", {**POOL, **IMAGES}),
    "max_pool2d_backward_blocks, of 3 x 3 pixels": ("max_pool2d_with_offsets", {
        **POOL, **IMAGES, "SH": 3, "SW": 3}),
    "max_pool2d_backward_blocks, of 5 x 5 taps": ("max_pool2d_with_offsets", {
        **POOL, **IMAGES, "KH": 5, "KW": 5}),
    "rsign": ("rsign", {**NCHW, "BLOCK_R": 256, "BLOCK_C": 8}),
    "rsign, of samples": ("rsign", {**NCHW, "each": "i32", "BLOCK_R": 256, "BLOCK_C": 8}),
    "rprelu": ("rprelu", {**CHANNELS_LAST, **ROWS}),
    "rprelu_backward": ("rprelu", {**CHANNELS_LAST, **ROWS, **WALK}),
    "rprelu_backward, staged": ("rprelu", {**CHANNELS_LAST, **ROWS, **WALK, "STAGES": 3}),
    "rprelu_backward, planes": ("rprelu", {**NCHW, "BLOCK_R": 128, "BLOCK_C": 8, "STAGES": 3}),
    "rprelu_reduce": ("rprelu", {"grad_in": "*fp32", "grad_slope": "*fp32", "grad_out": "*fp32",
                                 "BLOCK_P": 1024, "BLOCK_C": 8}),
    "block_forward": ("residual_block", {**ROWS, **NORM, **WALK}),
    "block_backward": ("residual_block", {**ROWS, **NORM, **WALK, "partial": "*fp64"}),
    "block_backward, staged": ("residual_block", {
        **ROWS, **NORM, **WALK, "partial": "*fp64", "STAGES": 3}),
    "norm_backward": ("residual_block", {**ROWS, "scale": None, "rounded": None}),
    "norm_backward, float8": ("residual_block", {**ROWS, "rounded": "*fp8e5"}),
    "unpack_filters": ("packed_conv2d_sign_backward", {
        "words": "*i32", "signs": "*fp16", "BLOCK_W": 2, "BLOCK_K": 64}),
    "sign_backward": ("sign_backward", {**CHANNELS_LAST, **ROWS, **WALK, "partial": "*fp64",
                                        "ESTIMATOR": 1}),
    "sign_backward, staged": ("sign_backward", {
        **CHANNELS_LAST, **ROWS, **WALK, "partial": "*fp64", "ESTIMATOR": 1, "STAGES": 3}),
    "sign_backward, planes": ("sign_backward", {
        **NCHW, "ao": "i32:16", "ai": 1, "ac": "i32:16", "partial": "*fp64", "ESTIMATOR": 3,
        "BLOCK_R": 128, "BLOCK_C": 8, "STAGES": 3}),
    "moments": ("packed_conv2d_moments", {**ROWS, **WALK, "partial": "*i64"}),
    "reduce": ("sums", {"partial": "*fp64", "out": "*fp64", "BLOCK_P": 1024, "BLOCK_C": 8}),
    "statistics": ("residual_block_vectors", VECTORS),
    "gradients": ("residual_block_vectors", VECTORS),
    "window": ("contraction", {**CONV, "BLOCK_M": 128, "BLOCK_K": 8}),
    "filter": ("contraction", {**CONV, "BORDERS": "i32", "CHANNELS": "i32", "BLOCK_B": 64,
                               "BLOCK_N": 32, "BLOCK_K": 8}),
}


# Of pooling's windows the usual one for each GPU, the others for two.
SIMPLE_CASES = [(name, gpu) for name in SIMPLE for gpu in GPUS
                if not name.startswith("max_pool2d") or "," not in name or gpu in ("sm80", "sm90")]


@pytest.mark.parametrize("name,gpu", SIMPLE_CASES)
def test_simple_kernels_spill_nothing(name, gpu):
    module, overrides = SIMPLE[name]
    warps = {"sign_pack": 8, "residual_block_vectors": 1}.get(module, 4)
    code = build(gpu, load(module, f"{name.split(',')[0]}_kernel"), overrides, num_warps=warps)
    assert code.spilled == 0
    if name in ("window", "filter") and gpu != "gfx942":
        assert code.count(r"\bPOPC\b") > 0


# 16-byte loads and stores of a turn of a walk, which takes two tiles: nothing stands between them,
# neither a barrier nor a load of a channel's vector.
TURNS = {"block_forward": (4, 2), "norm_backward": (4, 2), "block_backward": (6, 2),
         "sign_backward": (6, 2), "rprelu_backward": (4, 2)}
# Of a tile elsewhere; vectors of channels come on top.
TILES = {"rprelu": (2, 2), "mask_grad": (2, 2), "sign_pack_rows": (2, 0), "unpack": (0, 2)}


def on_sm90(name: str, **tile):
    module, overrides = SIMPLE[name]
    return build("sm90", load(module, f"{name.split(',')[0]}_kernel"), {**overrides, **tile},
                 num_warps=8 if module == "sign_pack" else 4)


@pytest.mark.parametrize("name", TURNS)
def test_a_walk_loads_two_tiles_before_it_stores_one(name):
    found = re.findall(r"\b(LDG|STG|BAR|LDS|STS|ATOM|BRA)\b(\.E\.128)?", on_sm90(name, **WALK).text)
    loads, stores = TURNS[name]
    turn = [("LDG", ".E.128")] * loads + [("STG", ".E.128")] * stores + [("BRA", "")]
    assert any(found[i:i + len(turn)] == turn for i in range(len(found))), found


@pytest.mark.parametrize("name, loads", [("block_backward", 6), ("sign_backward", 6),
                                         ("rprelu_backward", 4)])
def test_a_staged_walk_loads_into_shared_memory(name, loads):
    """16 bytes at a time: of two turns before the loop, and of the next but one in it.
    The registers are those of three programs of 128 threads on a multiprocessor."""
    code = on_sm90(f"{name}, staged")
    assert code.count(r"\bLDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128") == 3 * loads
    assert code.registers <= 168


@pytest.mark.parametrize("name", TILES)
def test_activations_move_16_bytes_at_once(name):
    loads, stores = TILES[name]
    code = on_sm90(name)
    assert code.count(r"\bLDG\.E\.128") >= loads and code.count(r"\bSTG\.E\.128") >= stores
    assert code.count(r"\bSTG\.E\.U16") == 0


@pytest.mark.parametrize("dtype", ("*fp16", "*bf16", "*fp32"))
@pytest.mark.parametrize("name,loads,stores", [("max_pool2d", 9, 1),
                                               ("max_pool2d_backward_blocks", 4, 4)])
def test_pooling_moves_16_bytes_at_once(name, loads, stores, dtype):
    """A window's 9 taps; of 2 x 2 pixels the 4 windows that contain some, each loaded once, and
    beside each 16 bytes the offsets of the same channels. Shared memory would mean that a thread
    has other channels of one tensor than of another."""
    tile = {"TILE_H": 2} if dtype == "*fp32" else {"PACKED": True}
    code = on_sm90(name, **dict.fromkeys(("input", "out", "grad"), dtype), **tile)
    assert code.count(r"\bLDG\.E\.128") == loads and code.count(r"\bSTG\.E\.128") == stores
    assert code.count(r"\bLDG\b") == loads + (loads if "backward" in name else 0)
    assert code.count(r"\bSTG\b") == stores + (0 if "backward" in name else 1)
    assert code.shared == 0 and code.count(r"\bBAR\b") == 0
    assert code.registers <= 64 if "backward" in name else 96 if dtype == "*fp32" else 40
    # Of two elements at once, a comparison for each tap and another whether it is a number.
    pairs = 2 * 9 * 4 if name == "max_pool2d" and dtype != "*fp32" else 0
    assert code.count(r"\bHSET2\.") == pairs


# Of gradients through a convolution of 3 x 3: the tensor core's instruction by what they are in.
THROUGH = {
    ("sm90", "float8"): r"\bQGMMA\.", ("sm89", "float8"): r"\bQMMA\.",
    ("sm100", "float8"): r"\bUTCQMMA", ("sm120", "float8"): r"\bQMMA\.",
    ("sm90", "fp16"): r"\bHGMMA\.", ("sm80", "fp16"): r"\bHMMA\.", ("sm90", "bf16"): r"\bHGMMA\."}


@pytest.mark.parametrize("gpu,kind,channels", [
    *((*of, 256) for of in THROUGH), ("sm90", "float8", 64), ("sm90", "fp16", 64)], ids=str)
def test_through_convolution_and_sign(gpu, kind, channels):
    """An image's pixels go through the L1 cache, where they wait for the next tap."""
    real = "fp16" if kind == "float8" else kind
    types = ("*fp8e5", "*fp8e4nv") if kind == "float8" else (f"*{kind}", f"*{kind}")
    parts = channels // min(channels, 128 if kind == "float8" else 64)
    code = build(gpu, load("packed_conv2d_sign_backward", "conv2d_sign_backward_kernel"), {
        "grad": types[0], "signs": types[1], "partial": "*fp64", "outputs": "i32:16",
        "channels": "i32:16", "top": 1, "left": 1, "dh": 1, "dw": 1, "TAPS": 9, "KW": 3,
        **dict.fromkeys(("x", "add", "out"), f"*{real}"), "PARTS": parts, "WHOLE": True,
        "ESTIMATOR": 2, "BLOCK_M": 128, "BLOCK_N": min(channels, 128),
        "BLOCK_K": channels // parts}, num_warps=8, num_stages=3,
        **({"maxnreg": 128} if channels == 64 and gpu == "sm90" else {}))
    assert code.spilled == 0 and code.count(THROUGH[gpu, kind]) > 0
    if gpu == "sm90":
        cached = code.count(r"\bLDGSTS\.E\.(LTC128B\.)?(64|128)\b")
        assert cached >= code.count(r"\bLDGSTS\b") / (1 if RECENT else 2) > 0
        assert code.registers <= (128 if channels == 64 else 255) and code.shared <= 100 << 10


WIDE = [name for name in SIMPLE
        if "," not in name and name not in ("reduce", "rprelu_reduce", "filter", "statistics",
                                            "gradients", "unpack_filters")]


@pytest.mark.parametrize("name", [*WIDE, "popc"])
def test_64_bit_offsets(name):
    """They compile, also where a loop carries them, and reach the pointers."""
    tile = configs.table("popc", "sm90")[0]
    module, overrides = SIMPLE.get(name, ("contraction", {**CONV, **tile.tile}))
    code = build("sm90", load(module, f"{name}_kernel"), {**overrides, "WIDE": True})
    assert code.offsets_of(64) > 0


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("what", ("full", "grouped"))
def test_popc(what, gpu):
    tile = configs.table("popc", gpu)[0]
    grouped = dict(GROUPS=2, CHANNELS=70, OUT_CHANNELS=128, WIDTH=3, PIXEL=5)
    code = build(gpu, load("contraction", "popc_kernel"), {
        **CONV, **tile.tile, **(grouped if what == "grouped" else {}),
    }, num_warps=tile.warps, num_stages=tile.stages)
    assert code.spilled == 0
    if RECENT or gpu != "gfx942":
        assert code.count(r"\bPOPC\b|v_bcnt_u32_b32") > 0


INT8_CASES = [(what, gpu, 0) for what in ("full", "packed") for gpu in GPUS]
INT8_CASES += [("linear", "sm90", 0), ("narrow", "sm80", 0), ("narrow", "sm100", 0)]
INT8_CASES += [("grouped", "sm90", 0), ("full", "sm90", 1), ("narrow", "sm90", 1),
               ("full", "sm90", 2), ("dots", "sm90", 0)]


@pytest.mark.parametrize("what,gpu,number", INT8_CASES)
def test_int8(what, gpu, number):
    shape = {**CONV, **PRODUCTS[what], "words": "*i8", "filters": "*i8"}
    shape["WIDTH"] *= 4
    family = "hip" if gpu == "gfx942" else gpu
    tile = configs.table("int8", family)[number]
    code = build(gpu, load("contraction", "int8_kernel"), {**shape, **tile.tile},
                 num_warps=tile.warps, num_stages=tile.stages)
    assert code.spilled == 0
    assert code.count(INT8_INSTRUCTION[gpu]) >= 8, "one integer product a bit plane at least"


def b1(gpu: str, what: str, tile, **overrides):
    flat = dict(TOP=0, BOTTOM=0, LEFT=0, RIGHT=0, FLAT=True, WORDS=4) if what == "linear" else {}
    shape = {**CONV, **B1, **PRODUCTS[what], **flat, **overrides, **tile.tile}
    return build(gpu, load("b1", "b1_kernel"), shape, num_warps=tile.warps,
                 num_stages=tile.stages)


B1_CASES = [(what, gpu, 0) for what in PRODUCTS for gpu in ("sm80", "sm90")]
B1_CASES += [("full", gpu, 0) for gpu in ("sm86", "sm89")]
B1_CASES += [(what, "sm90", number) for what in ("full", "linear") for number in (1, 2)]


@pytest.mark.parametrize("what,gpu,number", B1_CASES)
def test_b1(what, gpu, number):
    """Products, also those that count a window's bits, and how wide memory is read and written."""
    tile = configs.table("b1", gpu, what == "linear")[number]
    code = b1(gpu, what, tile)
    products, step = code.count(r"\bBMMA\.168256\.AND\.POPC\b"), tile.tile["SLOTS"] // 2 * 9
    assert products >= step and products % step == 0
    assert code.spilled == 0
    # Shared memory would mean that two tensors are laid out differently.
    assert code.shared == 0
    assert code.count(r"\bLDG\.E(\.CONSTANT)? ") == 0, "a word at a time"


@pytest.mark.parametrize("gpu", ("sm80", "sm90"))
@pytest.mark.parametrize("what,real,packed", [("full", 8, 1), ("dots", 8, 0), ("packed", 0, 1)])
def test_b1_stores(what, real, packed, gpu):
    """A thread has 4 rows of 2 x 8 channels: 16 bytes each of fp16, and 8 of signs in all."""
    code = b1(gpu, what, configs.B1[0])
    assert code.count(r"\bSTG\.E\.128 ") == real
    assert code.count(r"\bSTG\.E\.64 ") == packed
    assert code.count(r"\bSTG\b") == real + packed


@pytest.mark.parametrize("words,suffix", [(1, ""), (2, r"\.64"), (4, r"\.128")])
def test_b1_loads_of_words(words, suffix):
    """32 channels have one word a pixel, 512 have 16."""
    code = b1("sm90", "packed", configs.B1[0], WIDTH={1: 1, 2: 2, 4: 16}[words], WORDS=words)
    assert code.spilled == 0
    assert code.count(rf"\bLDG\.E{suffix}(\.CONSTANT)? ") >= 12 * (2 if words == 1 else 1)


def test_b1_of_any_channels():
    """Channels that 8 does not divide, memory that is not channels-last: an element at a time."""
    code = b1("sm90", "full", configs.B1[0], N="i32", WHOLE=False, EIGHTS=False, OUT_WIDE=False,
              RESIDUAL_WIDE=False, oon="i32", ooc="i32", ooh="i32", oow=1)
    assert code.spilled == 0 and code.shared == 0
    assert code.count(r"\bSTG\.E\.U16 ") == 64


@pytest.mark.parametrize("gpu,native", [("sm90", True), ("sm100", False), ("sm120", False)])
def test_b1_is_used_only_where_it_is_native(gpu, native):
    assert configs.has_b1(gpu) is native
