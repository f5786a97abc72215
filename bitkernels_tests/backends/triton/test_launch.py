"""Triton's own launch path without a GPU: launchers compile for sm_90 under a driver that runs
nothing. Seen are the arguments that launchers pass, specialization, tuning and grids; no result.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has a launch path of its own", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the other tests launch on the GPU", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bitkernels.backends.triton import configs, dispatch, launch, selfcheck, tuning
from bitkernels.backends.triton.b1 import b1_kernel
from bitkernels.ops._record import OPERATORS
from bitkernels_tests import no_gpu
from bitkernels_tests.backends import test_training_launches


@pytest.fixture
def launched():
    with no_gpu.triton_driver() as gpu:
        yield gpu.launched


def first_case(op, **forced):
    args, kw = selfcheck.cases(op)[0]
    return dispatch.kernel(op)(*args, **kw, **forced)


@pytest.mark.filterwarnings("error::UserWarning")  # Triton's too
@pytest.mark.parametrize("op,kernels", [
    ("sign_pack", [("sign_pack_planes_kernel", (1, 3, 1))]),
    ("rprelu_backward", [("rprelu_backward_kernel", (1, 9, 1)),
                         ("rprelu_reduce_kernel", (18, 3, 1))]),
    ("residual_block_forward", [("block_forward_kernel", (12, 1, 1))]),
    ("residual_block_backward", [("block_backward_kernel", (12, 1, 1)),
                                 ("reduce_kernel", (70, 1, 1))]),
    ("residual_block_statistics", [("statistics_kernel", (2, 1, 1))]),
    ("residual_block_gradients", [("gradients_kernel", (2, 1, 1))]),
    ("residual_block_norm_backward", [("norm_backward_kernel", (12, 1, 1))]),
    ("sign_backward", [("sign_backward_kernel", (1, 9, 1)), ("reduce_kernel", (18, 1, 1))]),
])
def test_elementwise(launched, op, kernels):
    first_case(op)
    assert launched == kernels


EARLY = {"b1_kernel", "sign_pack_rows_kernel"}


def test_kernels_that_start_early_begin_by_waiting():
    """`test_aot.py` reads where."""
    found = set()
    for file in Path(dispatch.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                statements = node.body[ast.get_docstring(node) is not None:]
                found |= {node.name} if ast.unparse(statements[0]) == "begin()" else set()
    assert found == EARLY


def test_from_sm_90_on_they_may_start_early(launched, monkeypatch):
    monkeypatch.setattr(launch, "_ready", {})
    first_case("sign_backward")
    first_case("packed_linear", inner="b1")
    dispatch.kernel("sign_pack")(torch.zeros(9, 64), None, 1)
    found = {ready.kept[1].metadata.name: ready.kept[1].metadata.launch_pdl
             for ready in launch._ready.values()}
    assert {"sign_backward_kernel", "reduce_kernel"} < found.keys() > EARLY
    assert {name for name, early in found.items() if early} == EARLY
    for gpu, early in ((("cuda", 80), False), (("cuda", 100), True), (("hip", "gfx942"), False)):
        monkeypatch.setattr(no_gpu.NoGpu, "get_current_target",
                            lambda self, gpu=gpu: GPUTarget(*gpu, 32))
        assert launch._overlaps(b1_kernel) == early


def test_moments_follow_the_convolution(launched):
    """2 x 4 x 10 pixels by 40 channels, in tiles of 32 x 32, then of 32 x 64."""
    first_case("packed_conv2d_moments", inner="popc")
    assert launched == [("popc_kernel", (3, 2, 1)), ("moments_kernel", (3, 1, 1)),
                        ("reduce_kernel", (30, 1, 1))]


def test_a_product_is_tuned_and_then_runs_in_its_fastest_tile(launched, monkeypatch):
    """9 x 300 times 300 x 70, in tiles of 32 x 32, 64 x 32 and 16 x 32."""
    timed = []

    def do_bench(call, **kw):
        timed.append(call())
        return [1.0 / len(timed)] * 3

    monkeypatch.setenv("BITKERNELS_TRITON_AUTOTUNE", "1")
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(configs, "interpreting", lambda: True)  # keeps no timings on disk
    for _ in range(2):
        first_case("packed_linear", inner="popc")
    assert len(timed) == 3 and launched == 5 * [("popc_kernel", (1, 3, 1))]
    best = tuning.tuner("popc", configs.table("popc", "sm90")).best_config
    assert best.kwargs == {"BLOCK_M": 16, "BLOCK_N": 32} and best.num_warps == 2


def test_image_sizes_are_arguments(launched, monkeypatch):
    """One kernel for all: what runs once csrc/cuda has been compiled for enough shapes."""
    monkeypatch.setenv("BITKERNELS_TRITON_AUTOTUNE", "0")
    loaded = driver.active.loaded
    for height, width in ((17, 19), (21, 33), (23, 41), (35, 7)):
        words = torch.zeros(1, height, width, 3, dtype=torch.int32)
        dispatch.kernel("packed_conv2d")(
            words, torch.zeros(9, 3, 3, 3, dtype=torch.int32), 96, (1, 1), (1, 1), inner="popc")
    assert len(launched) == 4 and loaded == ["popc_kernel"]


@pytest.mark.parametrize("op", [
    "sign_pack", "sign_pack_mask", "unpack", "mask_grad", "rsign", "rprelu", "rprelu_backward",
    "sign_backward", "residual_block_forward", "residual_block_backward",
    "residual_block_norm_backward", "residual_block_statistics", "residual_block_gradients",
    "latent_weight_grad", "max_pool2d_with_offsets", "max_pool2d_with_offsets_backward"])
def test_launches_of_a_training_step_are_those_that_are_counted(launched, op):
    first_case(op)
    assert len(launched) == test_training_launches.OURS.get(op, 1)


@pytest.mark.parametrize("family,inner,usual", (
    ("sm90", "b1", 2), ("sm80", "b1", 0), ("sm90", "int8", 0), ("sm90", "popc", 0)))
def test_the_check_runs_all_cases_in_the_usual_tile(launched, monkeypatch, family, inner, usual):
    """Which a launch without tuning has, and the last case in every other."""
    ran = []

    def kernel(op):
        def run(*args, inner, **kw):
            ran.append(tuning._fixed.get())
            return OPERATORS[op].reference(*args, **kw)

        return run

    monkeypatch.delenv("BITKERNELS_TRITON_AUTOTUNE", raising=False)
    monkeypatch.setattr(configs, "family", lambda device: family)
    monkeypatch.setattr(dispatch, "kernel", kernel)
    device = torch.device("cpu")
    assert selfcheck.failure("packed_conv2d", inner, device) is None
    cases, tiles = len(selfcheck.cases("packed_conv2d")), len(configs.table(inner, family))
    assert {tile: ran.count(tile) for tile in range(tiles)} == {
        tile: 2 * (cases if tile == usual else 1) for tile in range(tiles)}
    size = configs.Size(256 * 14 * 14, 256, 9, 8)
    assert configs.fixed_tile(inner, family, size) == configs.table(inner, family)[usual]
