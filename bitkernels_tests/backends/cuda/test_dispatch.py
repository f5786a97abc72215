"""When csrc/cuda runs and when the next backend does, and that it is said why."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from bitkernels import reference
from bitkernels.backends import gpu, gpus
from bitkernels.backends.cuda import compiler, dispatch, kernels, launch, plan, selfcheck
from bitkernels.backends.cuda.spec import conv_spec, linear_spec
from bitkernels.cli import doctor
from bitkernels_tests import forked
from bitkernels_tests.cases import ConvCase, words_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("BITKERNELS_CUDA", "BITKERNELS_CUDA_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    dispatch.clear()
    yield
    dispatch.clear()


@pytest.fixture
def usable(monkeypatch):
    monkeypatch.setattr(dispatch, "why_unusable", lambda device: None)


def linear(rows=40, cout=64, channels=256):
    return words_of(rows, channels), words_of(cout, channels), channels


def test_a_call_unlike_any_measured_one_does_not_run_unasked(usable):
    assert dispatch.attempt("packed_linear", linear(), {}) is None
    assert "BITKERNELS_CUDA=1 opts in" in str(dispatch.explain("packed_linear", *linear()))


def measured(monkeypatch, op, us, **sizes):
    """A plan table of one call, as a GPU would have filled it."""
    call = dict(op=op, real=True, us=us, **sizes)
    monkeypatch.setattr(plan, "table", lambda: {
        "sm_90a": {"gpu": "a GPU", "date": "2027-01-01", "calls": [call]}})


LINEAR = dict(rows=64, cout=64, products=256)


def test_a_measured_kernel_runs_unasked(usable, monkeypatch):
    measured(monkeypatch, "packed_linear", {"triton": 9, "mma_64x64": 7, "mma_64x32": 8}, **LINEAR)
    monkeypatch.setattr(dispatch, "_trusted", lambda *a: True)
    ran = []
    monkeypatch.setattr(launch, "packed_linear", lambda kernel, *a, **k: ran.append(kernel) or "r")
    assert dispatch.attempt("packed_linear", linear(), {}) == "r"
    assert ran[0].name == "mma_64x64"
    assert str(dispatch.explain("packed_linear", *linear())) == (
        "cuda: mma_64x64, measured near this shape at 7 us, triton 9 us (a GPU, 2027-01-01)")
    assert "sm_90a (a GPU, 2027-01-01)" in dict(doctor.report())["cuda kernels"]
    monkeypatch.setenv("BITKERNELS_CUDA", "0")
    dispatch.clear()
    assert dispatch.attempt("packed_linear", linear(), {}) is None
    assert "BITKERNELS_CUDA is 0" in dispatch.explain("packed_linear", *linear()).reason


def test_the_next_backend_runs_where_it_was_faster(usable, monkeypatch):
    measured(monkeypatch, "packed_linear", {"triton": 9, "mma_64x64": 10}, **LINEAR)
    assert dispatch.attempt("packed_linear", linear(), {}) is None
    assert str(dispatch.explain("packed_linear", *linear())) == (
        "the next backend: triton was measured to be faster near this shape")
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    found, why, _ = dispatch._plan("packed_linear", linear(), {}, CPU)
    assert found[0].name == "mma_64x64" and len(found) > 5 and "at 10 us" in why


def matrices(words: int, first: int = 0):
    """Of packed_linear; its words begin at so many."""
    rows = torch.empty(4096 * words + first, dtype=torch.int32)[first:].view(4096, words)
    return rows, torch.empty(4096, words, dtype=torch.int32), 32 * words


@pytest.mark.parametrize("args", (matrices(128, 1), matrices(127)), ids=("a view", "narrow rows"))
def test_the_fastest_kernel_that_does_not_take_a_call_says_why(usable, args):
    why = "bulk_128x256, the fastest measured near this shape, copies only rows that start at 16"
    kw = dict(real=False, packed=True)
    found = dispatch.explain("packed_linear", *matrices(128), **kw)
    assert found.kernel == "bulk_128x256" and "copies only" not in found.reason
    found = dispatch.explain("packed_linear", *args, **kw)
    assert found.kernel is None and found.reason.startswith(why)


@pytest.mark.parametrize("asked", (None, "1"))
def test_a_call_that_no_kernel_takes_near_a_measured_one(usable, monkeypatch, asked):
    """A step of training at 512@7 with four times the channels that were measured."""
    if asked:
        monkeypatch.setenv("BITKERNELS_CUDA", asked)
    args = (torch.empty(256, 7, 7, 64, dtype=torch.int32),
            torch.empty(512, 3, 3, 64, dtype=torch.int32), 2048, (1, 1), (1, 1), (1, 1), 1)
    kw = dict(pad_value=0, out_channels=None, relu=False, dtype=torch.int16)
    assert dispatch.attempt("packed_conv2d_moments", args, kw) is None
    why = dispatch.explain("packed_conv2d_moments", *args, **kw).reason
    assert "takes fewer than 16384 products an output" in why
    assert ("mma_64x32: takes no sums of its outputs" in why) == bool(asked)


@pytest.mark.parametrize("name,why", (
    ("bulk_128x256", "copies only rows"), ("mma_64x64", "was not measured to be faster")))
def test_a_named_kernel_that_does_not_run_says_why(usable, monkeypatch, name, why):
    monkeypatch.setenv("BITKERNELS_CUDA_KERNEL", name)
    measured(monkeypatch, "packed_linear", {"triton": 9, "mma_64x32": 7}, **LINEAR)
    args = linear() if name != "bulk_128x256" else linear(channels=224)
    found = dispatch.explain("packed_linear", *args)
    assert found.kernel is None and found.reason.startswith(f"{name}, which BITKERNELS_CUDA_KERNEL")
    assert why in found.reason


@pytest.mark.parametrize("far", (dict(rows=1024), dict(cout=512), dict(products=8192)), ids=str)
def test_nothing_runs_unasked_far_from_what_was_measured(far, usable, monkeypatch):
    measured(monkeypatch, "packed_linear", {"triton": 9, "mma_64x64": 7}, **{**LINEAR, **far})
    assert dispatch.attempt("packed_linear", linear(), {}) is None
    assert "proven near this shape" in dispatch.explain("packed_linear", *linear()).reason


def test_other_outputs_are_other_calls(usable, monkeypatch):
    measured(monkeypatch, "packed_linear", {"triton": 9, "mma_64x64": 7}, **LINEAR)
    found, *_ = dispatch._plan("packed_linear", linear(), dict(real=True), CPU)
    assert found
    found, *_ = dispatch._plan("packed_linear", linear(), dict(real=False, packed=True), CPU)
    assert not found


TURNS = {"triton": 9, "resident_64x128": 7, "resident_64x128_turns": 6}
SHAPE = dict(rows=63, cout=128, products=576)  # of `resident`


@pytest.fixture
def resident(usable):
    """What explain says of a convolution with so many images, and the kernels that the plan has."""
    def found(images=1):
        case = ConvCase(channels=64, out_channels=128, size=(9, 7), batch=images)
        args = *case.words(), 64, *case.args
        dispatch.clear()
        plan_ = dispatch._plan("packed_conv2d", args, {}, CPU)
        return dispatch.explain("packed_conv2d", *args), [k.name for k in plan_.candidates]

    return found


def test_a_kernel_that_must_have_been_measured_is_not_run_by_opting_in(resident, monkeypatch):
    """Whether nothing was measured near the call, or only others."""
    assert not any(kernel.measured_only for kernel in kernels.ALL.values()
                   if not kernel.name.endswith("_turns"))
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    for us in (None, {"triton": 9, "resident_64x128": 7}, {"triton": 5, "resident_64x128": 7}):
        if us is not None:
            measured(monkeypatch, "packed_conv2d", us, **SHAPE)
        for images in (1, 64):
            said, names = resident(images)
            assert len(names) == 8 and not any(name.endswith("_turns") for name in names)
            assert not said.kernel.endswith("_turns") and "turns" not in said.reason


def test_a_measured_kernel_of_this_kind_runs_near_what_was_measured(resident, monkeypatch):
    """As of a later `measured.json`: unasked where it was fastest, else in its place."""
    measured(monkeypatch, "packed_conv2d", TURNS, **SHAPE)
    said, names = resident()
    assert names == ["resident_64x128_turns", "resident_64x128"]
    assert str(said) == ("cuda: resident_64x128_turns, measured near this shape at 6 us, triton "
                         "9 us (a GPU, 2027-01-01)")
    assert resident(64)[1] == []
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    names = resident()[1]
    assert names[:2] == ["resident_64x128_turns", "resident_64x128"]
    assert "resident_128x64" in names and "resident_128x64_turns" not in names
    assert not any(name.endswith("_turns") for name in resident(64)[1])  # far from it
    measured(monkeypatch, "packed_conv2d", {**TURNS, "triton": 6.5}, **SHAPE)
    monkeypatch.delenv("BITKERNELS_CUDA")
    assert resident()[1] == ["resident_64x128_turns"]


def test_a_kernel_of_this_kind_runs_where_it_is_named(resident, monkeypatch):
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    monkeypatch.setenv("BITKERNELS_CUDA_KERNEL", "resident_128x64_turns")
    said, names = resident()
    assert names == ["resident_128x64_turns"] and "BITKERNELS_CUDA_KERNEL names it" in said.reason
    monkeypatch.delenv("BITKERNELS_CUDA")
    assert resident()[1] == []


def test_the_table_of_the_package_is_well_formed():
    for arch, entry in plan.table().items():
        assert arch in kernels.FAMILIES and entry["gpu"] and entry["date"]
        for call in entry["calls"]:
            assert call["op"] in dispatch.OPS and isinstance(call["real"], bool)
            assert all(call[name] > 0 for name in ("rows", "cout", "products"))
            assert set(call["us"]) <= {plan.NEXT, *kernels.ALL} and plan.NEXT in call["us"]


OUTSIDE = {
    "groups": (ConvCase(groups=2, channels=128), {}),
    "padding with +1": (ConvCase(), {"pad_value": 1}),
    "float64": (ConvCase(), {"dtype": torch.float64}),
    "an output without channels": (ConvCase(out_channels=0), {}),
    "kinds of border windows": (ConvCase(kernel=(21, 21), size=(30, 30), padding=(10, 10)), {}),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_calls_outside_the_class(what, usable, monkeypatch):
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    case, kw = OUTSIDE[what]
    args = (*case.words(), case.channels, *case.args)
    assert what in launch.outside("packed_conv2d", args, kw)
    assert dispatch.attempt("packed_conv2d", args, kw) is None
    assert what in dispatch.explain("packed_conv2d", *args, **kw).reason


def test_a_kernel_that_fails_is_named_once_and_the_next_runs(usable, monkeypatch):
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    monkeypatch.setattr(selfcheck, "cases", lambda op: [(linear(), dict(dtype=torch.int32))])
    ran = []

    def failing(kernel, *args, **kw):
        ran.append(kernel.name)
        if kernel.family != "mma":
            raise RuntimeError("no room")
        return reference.packed_linear(*args, **kw)

    monkeypatch.setattr(launch, "packed_linear", failing)
    with pytest.warns(UserWarning, match="no room; the next kernel runs instead"):
        out = dispatch.attempt("packed_linear", linear(1000, 256), dict(dtype=torch.int32))
    assert out[0].dtype == torch.int32
    assert str(dispatch.explain("packed_linear", *linear(1000, 256))).startswith("cuda: mma_")
    ran.clear()
    dispatch.attempt("packed_linear", linear(1000, 256), dict(dtype=torch.int32))
    assert all(name.startswith("mma") for name in ran)


def test_a_wrong_kernel_is_not_used(usable, monkeypatch):
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    monkeypatch.setattr(launch, "packed_linear", lambda kernel, *a, **k: tuple(
        None if t is None else t + 1 for t in reference.packed_linear(*a, **k)))
    with pytest.warns(UserWarning, match="differs from the reference"):
        assert dispatch.attempt("packed_linear", linear(), {}) is None
    assert "differs from the reference" in dispatch.explain("packed_linear", *linear()).reason


def test_reasons_of_the_machine(monkeypatch):
    with gpus.planning_for(gpus.named("sm_100")):
        assert "sm_100 has no 1-bit tensor core" in dispatch.why_unusable(CPU)
    with gpus.planning_for(gpus.named("hip")):
        assert "NVIDIA" in dispatch.why_unusable(CPU)

    def missing():
        raise OSError("there is no libnvrtc.so.13 or .12")

    monkeypatch.setattr(compiler, "version", missing)
    said = (r"NVRTC does not load: OSError: there is no libnvrtc.so.13 or .12 "
            r"\(pip install cuda-pathfinder .*nvidia-cuda-nvrtc")
    assert re.match(said, dispatch.why_unusable(CPU))


@pytest.mark.parametrize("major,said", ((12, "nvidia-cuda-nvrtc-cu12"),
                                        (13, "nvrtc>=13,<14"), (None, "nvrtc>=13,<14")))
def test_what_to_install_fits_the_driver(monkeypatch, major, said):
    def driver():
        if major is None:
            raise OSError("libcuda.so.1: no such file")
        return type("Found", (), {"version": lambda self: (major, 4)})()

    monkeypatch.setattr(launch, "driver", driver)
    assert said in dispatch.install()


@pytest.mark.parametrize("driver,said", (
    ((12, 8), "the driver knows CUDA 12.8 and NVRTC is 13.0 (pip install cuda-pathfinder "),
    ((11, 8), "NVRTC is 13.0 (they need a driver of CUDA 12"), (None, None)))
def test_reasons_of_the_driver(driver, said, monkeypatch):
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "architectures", lambda: frozenset((80, 90)))
    if driver is None:
        def missing():
            raise OSError("libcuda.so.1: no such file")

        monkeypatch.setattr(launch, "driver", missing)
        assert "the CUDA driver does not load: OSError" in dispatch.why_unusable(CPU)
    else:
        found = type("Found", (), {"version": lambda self: driver})()
        monkeypatch.setattr(launch, "driver", lambda: found)
        assert said in dispatch.why_unusable(CPU)
    monkeypatch.setattr(compiler, "architectures", lambda: frozenset((80,)))
    assert "does not compile for sm_90a" in dispatch.why_unusable(CPU)


def test_a_shape_that_is_new_inside_a_capture_is_an_error(usable, monkeypatch):
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    monkeypatch.setattr(dispatch, "_trusted", lambda *a: True)
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="bitkernels::packed_linear: .* call it once before"):
        dispatch.attempt("packed_linear", linear(), {})


def test_asking_for_it_where_it_cannot_run_warns_once(monkeypatch):
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    monkeypatch.setattr(dispatch, "why_unusable", lambda device: "no such thing")
    with pytest.warns(UserWarning, match="no such thing; BITKERNELS_CUDA=1 has no effect"):
        assert dispatch.attempt("packed_linear", linear(), {}) is None
    assert dispatch.attempt("packed_linear", linear(), {}) is None


def test_one_kernel_can_be_named(usable, monkeypatch):
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    monkeypatch.setenv("BITKERNELS_CUDA_KERNEL", "mma_64x64")
    found, why, _ = dispatch._plan("packed_linear", linear(), {}, CPU)
    assert [k.name for k in found] == ["mma_64x64"] and "names it" in why
    monkeypatch.setenv("BITKERNELS_CUDA_KERNEL", "mma_1x1")
    with pytest.raises(RuntimeError, match="BITKERNELS_CUDA_KERNEL must be one of .*mma_64x64"):
        dispatch.attempt("packed_linear", linear(), {})


def test_large_calls_get_large_tiles():
    def first(rows, cout, aligned=True, families=kernels.FAMILIES["sm_90a"], spec=None):
        spec = spec or linear_spec(256, cout, 8192, 16)
        problem = plan.Problem("packed_linear", spec, rows, True, aligned)
        return plan.modelled(families, problem, 132)[0].name

    def conv(cout, size):
        return conv_spec((256, cout, size, size), (size, size), (cout, 3, 3, cout // 32), cout,
                         (1, 1), (1, 1, 1, 1), (1, 1), 16)

    assert first(8192, 8192).startswith("bulk_")
    assert first(8192, 8192, aligned=False) == "mma_128x128"
    assert first(8192, 8192, families=("mma",)) == "mma_128x128"
    assert first(64 * 56 * 56, 64, families=("mma",)) == "mma_128x64"
    assert first(8, 32, families=("mma",)) == "mma_64x32"
    assert first(256 * 56 * 56, 64, spec=conv(64, 56)) == "resident_128x64"
    assert first(56 * 56, 64, spec=conv(64, 56)).endswith("_64x64")
    assert first(256 * 28 * 28, 128, spec=conv(128, 28)) == "resident_64x128"
    assert first(256 * 14 * 14, 256, spec=conv(256, 14)) == "resident_64x128"
    assert first(256 * 7 * 7, 512, spec=conv(512, 7)).startswith("resident_")


def test_squares_of_all_rows_of_a_tile_must_fit_into_32_bits():
    """Of 32 rows up to 11585 products, of 16 up to 16383, which is the most anyway."""
    names = [(name, problem_op) for name in ("resident_64x64", "resident_128x64")
             for problem_op in ("packed_conv2d", "packed_conv2d_moments")]
    for channels, refused in ((448, []), (480, [("resident_128x64", "packed_conv2d_moments")])):
        spec = conv_spec((9, 64, 16, 4), (16, 4), (64, 5, 5, channels // 32), channels, (1, 1),
                         (2, 2, 2, 2), (1, 1), 16)
        assert kernels.ALL["resident_128x64"].shared_bytes(spec) < kernels.MOST_SHARED
        assert refused == [(name, op) for name, op in names if not kernels.ALL[name].takes(
            plan.Problem(op, spec, 9 * 64, True, False))]


def test_sums_have_their_place_in_shared_memory():
    """Some shapes fit without them only: what a kernel takes, it can launch."""
    refused = set()
    for channels, name in itertools.product(range(32, 1025, 32), kernels.ALL):
        kernel = kernels.ALL[name]
        spec = conv_spec((1, 64, 14, 14), (14, 14), (64, 3, 3, channels // 32), channels, (1, 1),
                         (1, 1, 1, 1), (1, 1), 16)
        asked = [plan.Problem(op, spec, 196, True, True)
                 for op in ("packed_conv2d", "packed_conv2d_moments")]
        if not kernel.sums or not kernel.takes(asked[0]):
            continue
        launched = kernel.placed(spec.with_parts(("moments", 2), ("out_type", 5)))
        fits = kernel.shared_bytes(launched) <= kernels.MOST_SHARED
        assert fits or not kernel.takes(asked[1])
        if not fits:
            refused.add(name)
    assert "resident4_64x64" in refused


def test_the_next_backend_gets_what_cuda_does_not_take(monkeypatch):
    monkeypatch.setattr(gpu.triton, "run", lambda op, *a, **k: (op, a, k))
    assert gpu.run("sign_pack", 1, x=2) == ("sign_pack", (1,), {"x": 2})
    assert gpu.run("packed_linear", *linear())[0] == "packed_linear"


def test_on_hopper_the_layers_of_a_resnet_run_unasked(usable):
    """By the table that the package carries; batch 256, and one image."""
    for channels, size in ((64, 56), (128, 28), (256, 14)):
        for batch, real in itertools.product((1, 256), (False, True)):
            words = torch.zeros(batch, size, size, channels // 32, dtype=torch.int32)
            args = words, words_of(channels, 3, 3, channels), channels, (1, 1), (1, 1)
            found, why, _ = dispatch._plan("packed_conv2d", args, dict(real=real, packed=not real),
                                        CPU)
            assert found[0].resident, (channels, batch, real, why)
            assert "NVIDIA H200" in why


def test_free_image_sizes_do_not_compile_for_ever(usable, monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_UNASKED", 2)
    weight = words_of(256, 3, 3, 256)

    def chosen(size):
        args = torch.zeros(4, size, size, 8, dtype=torch.int32), weight, 256, (1, 1), (1, 1)
        return dispatch._plan("packed_conv2d", args, dict(real=True, packed=False), CPU)

    assert chosen(28)[0] and chosen(30)[0]
    found, why, _ = chosen(32)
    assert not found and "kernels for 2 shapes have been compiled" in why
    assert chosen(28)[0], "what is there goes on"
    assert "triton's takes every image size" in why
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    assert chosen(32)[0]


def test_after_so_many_shapes_triton_runs_the_new_ones(usable, monkeypatch):
    """Its kernels take an image's size as arguments (backends/triton/test_launch.py)."""
    monkeypatch.setattr(dispatch, "MOST_UNASKED", 2)
    monkeypatch.setattr(dispatch, "_trusted", lambda *a: True)
    monkeypatch.setattr(launch, "packed_conv2d", lambda kernel, *a, **k: kernel.family)
    monkeypatch.setattr(gpu.triton, "run", lambda op, *a, **k: "triton")
    weight = words_of(256, 3, 3, 256)

    def ran(size):
        words = torch.zeros(4, size, size, 8, dtype=torch.int32)
        return gpu.run("packed_conv2d", words, weight, 256, (1, 1), (1, 1), real=True,
                       packed=False)

    assert [ran(size) for size in (28, 30, 32, 34, 28, 30)] == [
        "resident", "resident", "triton", "triton", "resident", "resident"]
    launch.clear()  # what is displaced and comes again is no new shape
    assert ran(30) == "resident"


def test_the_report_says_why(monkeypatch):
    assert "sm_90a (NVIDIA H200, " in dict(doctor.report())["cuda kernels"]
    monkeypatch.setattr(plan, "table", dict)
    assert "none proven" in dict(doctor.report())["cuda kernels"]


def test_importing_loads_no_cuda():
    code = ("import sys, bitkernels; assert not any(m.startswith(('cupy', 'triton')) "
            "for m in sys.modules), 'loaded'")
    done = forked.run("-c", code)
    assert done.returncode == 0, done.stderr
