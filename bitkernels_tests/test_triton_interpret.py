"""Numerics of every Triton kernel in Triton's interpreter, which runs without a GPU.

The interpreter must be chosen before Triton is imported, so the tests of this file run in a process
of their own, started by the one test that other processes see. It truncates on the way to bfloat16
where a GPU rounds, hence `as_interpreted`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton", reason="triton is not installed")

if not INTERPRETED:

    def test_kernels_in_the_interpreter():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    def test_import_leaves_triton_alone():
        subprocess.run([sys.executable, "-c", "import bitkernels, sys\n"
                        "assert 'triton' not in sys.modules"], check=True)

else:
    import triton.language as tl
    from triton.runtime import interpreter

    from bitkernels import reference
    from bitkernels._checks import empty_around
    from bitkernels.backends.triton import configs, dispatch, elementwise, gemm, selfcheck, tuning
    from bitkernels_tests import ptx_emulator
    from bitkernels_tests.cases import (
        CONV_CASES,
        EPILOGUES,
        FEW_CONV_CASES,
        LAYOUTS,
        LINEAR_CASES,
        POOL_CASES,
        ConvCase,
        dyadic,
        epilogue_parts,
        reals,
        words_of,
    )

    kernel = dispatch.kernel
    CPU = torch.device("cpu")
    CHANNELS = (1, 32, 100)
    FLOATS = (torch.float32, torch.float16, torch.bfloat16)

    # Of whole words in and whole tiles out: with and without a K step that stays in a tap.
    WHOLE_GROUPS = [
        ConvCase(groups=2, channels=64, out_channels=128, batch=1),
        ConvCase(groups=3, channels=192, out_channels=192, size=(3, 4), stride=(2, 1), pad_value=1),
        ConvCase(groups=2, channels=512, out_channels=128, size=(3, 3), batch=1, padding=(0, 1)),
    ]
    EVERY_CONV = (*CONV_CASES, *WHOLE_GROUPS)

    def takers(case):
        """The inner products that take a convolution: all take whole groups, b1 up to 32 taps."""
        if case.groups > 1 and case not in WHOLE_GROUPS:
            return ("popc",)
        return configs.INNER if case.kernel[0] * case.kernel[1] <= 32 else ("int8", "popc")

    @pytest.fixture(scope="module", autouse=True)
    def language_patched_once():
        """The interpreter patches triton.language at every call of a device function, which is
        most of its time. Here it does so once for each set of modules, undone at the end."""
        patch, scopes = interpreter._patch_lang, {}

        def once(fn):
            modules = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
            if modules not in scopes:
                scopes[modules] = patch(fn)
                # Triton 3.6 takes int() of an array of one element, which NumPy 2.4 refuses.
                tl.tensor.__index__ = lambda self: self.handle.data.item()
            return types.SimpleNamespace(restore=lambda: None)

        with pytest.MonkeyPatch.context() as context:
            context.setattr(interpreter, "_patch_lang", once)
            yield
        for scope in reversed(scopes.values()):
            scope.restore()

    @pytest.fixture(autouse=True)
    def emulated_ptx(monkeypatch):
        monkeypatch.setattr(tl, "inline_asm_elementwise", ptx_emulator.inline_asm_elementwise)

    def as_interpreted(x, dtype):
        """float32 in another type as the interpreter casts it: cut, not rounded, to bfloat16."""
        if dtype != torch.bfloat16:
            return x.to(dtype)
        return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    def as_promised(op, *args):
        """The kernel's output; its layout is the one that the fake kernel tells compilers."""
        out = kernel(op)(*args)
        fake = getattr(torch.ops.bitkernels, op)(
            *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        got, promised = ((out,), (fake,)) if isinstance(out, torch.Tensor) else (out, fake)
        for have, want in zip(got, promised, strict=True):
            assert have.stride() == want.stride()
        return out

    def same(got, expected):
        if isinstance(got, torch.Tensor):
            got, expected = (got,), (expected,)
        for have, want in zip(got, expected, strict=True):
            if want is None:
                assert have is None
                continue
            assert have.dtype == want.dtype and have.shape == want.shape
            assert torch.equal(have, want)

    @pytest.mark.parametrize("layout,channels", [
        (layout, channels) for layout in LAYOUTS
        for channels in (CHANNELS if layout in ("contiguous", "channels_last") else (33,))])
    def test_elementwise(layout, channels):
        for dtype in FLOATS:
            x = LAYOUTS[layout](reals(2, channels, 3, 5, dtype=dtype))
            shift, slope, last = (reals(channels), reals(channels), reals(channels, dtype=dtype))
            for given in (None, shift):
                same(as_promised("sign_pack", x, given, 1), reference.sign_pack(x, given, 1))
                same(as_promised("sign_pack_mask", x, 0.7, given, 1),
                     reference.sign_pack_mask(x, 0.7, given, 1))
            same(as_promised("sign_pack", x, None, 3), reference.sign_pack(x, None, 3))
            words = words_of(2, 3, 5, channels)
            same(as_promised("unpack", words, channels, dtype, 1),
                 reference.unpack(words, channels, dtype, 1))
            same(as_promised("mask_grad", x, words, 1), reference.mask_grad(x, words, 1))
            same(as_promised("rsign", x, shift), reference.rsign(x, shift))
            expected = reference.rprelu(x, shift, slope, last)
            if elementwise.collapse(1, x, empty_around(x, 1)) is not None:  # else the reference ran
                expected = as_interpreted(reference.rprelu(x.float(), shift, slope, last), dtype)
            same(as_promised("rprelu", x, shift, slope, last), expected)

    def test_nan_is_plus_one():
        x = torch.tensor([float("nan"), -0.0, -1.0, float("-inf"), float("inf")])
        same(kernel("sign_pack")(x, None, 0), reference.sign_pack(x))
        same(kernel("sign_pack_mask")(x, 1.0, None, 0), reference.sign_pack_mask(x, 1.0))
        same(kernel("rsign")(x[None], torch.zeros(5)), reference.rsign(x[None], torch.zeros(5)))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_rprelu_backward(layout):
        """Multiples of 1/4: the sums of the channels are exact in any order."""
        x, grad = (LAYOUTS[layout](dyadic(3, 40, 5, 7)) for _ in range(2))
        vectors = dyadic(40), dyadic(40)
        same(as_promised("rprelu_backward", grad, x, *vectors),
             reference.rprelu_backward(grad, x, *vectors))

    def test_rprelu_backward_of_several_programs(monkeypatch):
        from bitkernels.backends.triton import rprelu

        monkeypatch.setattr(rprelu, "PARTIALS", 3)
        x, grad = dyadic(4000, 33), dyadic(4000, 33)
        vectors = dyadic(33), dyadic(33)
        same(kernel("rprelu_backward")(grad, x, *vectors),
             reference.rprelu_backward(grad, x, *vectors))

    @pytest.mark.parametrize("case", POOL_CASES, ids=str)
    def test_packed_max_pool2d(case):
        words = words_of(case.batch, *case.size, case.channels)
        same(kernel("packed_max_pool2d")(words, *case.args),
             reference.packed_max_pool2d(words, *case.args))

    @pytest.mark.parametrize("inner,case", [(inner, case) for case in EVERY_CONV
                                            for inner in takers(case)], ids=str)
    def test_packed_conv2d(inner, case):
        words, weight_words = case.words()
        args = words, weight_words, case.channels, *case.args
        kw = dict(pad_value=case.pad_value, dtype=torch.int32, real=True, packed=True)
        got = kernel("packed_conv2d")(*args, **kw, inner=inner)
        expected = reference.packed_conv2d(*args, **kw)
        same(got, expected)
        assert got[0].stride() == expected[0].stride()

    @pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
    @pytest.mark.parametrize("inner", configs.INNER)
    def test_packed_linear(inner, case):
        words, weight_words = case.words()
        kw = dict(dtype=torch.int32, real=True, packed=True)
        same(kernel("packed_linear")(words, weight_words, case.channels, **kw, inner=inner),
             reference.packed_linear(words, weight_words, case.channels, **kw))

    @pytest.mark.parametrize("forced", (None, *configs.INNER))
    def test_what_each_convolution_may_run_in(monkeypatch, forced):
        """The launcher's choice on a GPU, were every case large."""
        module = importlib.import_module("bitkernels.backends.triton.packed_conv2d")
        monkeypatch.setattr(configs, "family", lambda device: "sm90")
        monkeypatch.setattr(gemm, "SMALL", 0)
        if forced:
            monkeypatch.setenv("BITKERNELS_TRITON_INNER", forced)
        else:
            monkeypatch.delenv("BITKERNELS_TRITON_INNER", raising=False)
        for case in EVERY_CONV:
            may = takers(case)
            got = module.inner_products(*case.words(), case.channels, *case.args,
                                        pad_value=case.pad_value)
            assert got == ((forced,) if forced in may else may), case

    @pytest.mark.parametrize("name", EPILOGUES)
    @pytest.mark.parametrize("inner", ("popc", "b1"))
    def test_epilogue(inner, name):
        case = FEW_CONV_CASES[0]
        words, weight_words = case.words()
        parts = epilogue_parts(EPILOGUES[name], case.output_shape, 1, dtype=torch.float16)
        args = words, weight_words, case.channels, *case.args
        for dtype in FLOATS[:2]:
            kw = dict(parts, dtype=dtype, channels_last=dtype == torch.float16, real=True,
                      packed=True, sign_shift=reals(case.out_channels))
            same(kernel("packed_conv2d")(*args, **kw, inner=inner),
                 reference.packed_conv2d(*args, **kw))

    @pytest.mark.parametrize("inner", configs.INNER)
    def test_threshold_and_tiled_weight(inner):
        case = FEW_CONV_CASES[3]
        words, weight_words = case.words()
        low = torch.randint(-40, 20, (case.out_channels,), dtype=torch.int32)
        kw = dict(real=False, packed=True, threshold=torch.stack([low, low + 30]),
                  pad_value=case.pad_value, out_channels=case.out_channels)
        expected = reference.packed_conv2d(words, weight_words, case.channels, *case.args, **kw)
        for weights in (weight_words, reference.tile_weight(weight_words, 1)):
            same(kernel("packed_conv2d")(words, weights, case.channels, *case.args, **kw,
                                         inner=inner), expected)

    @pytest.mark.parametrize("inner", configs.INNER)
    @pytest.mark.parametrize("op", ("packed_conv2d", "packed_linear"))
    def test_selfcheck_passes(op, inner):
        assert selfcheck.failure(op, inner, CPU) is None

    @pytest.mark.parametrize("op,inner", [("sign_pack", None), ("unpack", None),
                                          ("mask_grad", None), ("rprelu_backward", None),
                                          ("packed_linear", "popc")])
    def test_selfcheck_ignores_the_default_device(op, inner):
        with torch.device("meta"):
            assert selfcheck.failure(op, inner, CPU) is None

    def test_selfcheck_sees_a_wrong_kernel(monkeypatch):
        module = importlib.import_module("bitkernels.backends.triton.rsign")
        monkeypatch.setattr(module, "rsign", lambda x, shift: torch.ones_like(x))
        dispatch.clear()
        x, shift = reals(2, 5, 3, 3), reals(5)
        with pytest.warns(UserWarning, match="rsign .* differs .* the reference runs"):
            same(dispatch.run("rsign", x, shift), reference.rsign(x, shift))
        same(dispatch.run("rsign", x, shift), reference.rsign(x, shift))
        dispatch.clear()

    def test_without_triton_the_reference_runs_after_one_warning(monkeypatch):
        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
        dispatch.clear()
        x = reals(2, 40)
        with pytest.warns(UserWarning, match="triton is not installed") as warned:
            for _ in range(2):
                same(dispatch.run("sign_pack", x, None, 1), reference.sign_pack(x))
        assert len(warned) == 1
        dispatch.clear()

    @pytest.fixture
    def two_tiles(monkeypatch):
        """Tuning is on and popc has two configurations."""
        monkeypatch.setitem(configs.POPC, "interpret",
                            configs.POPC["interpret"] + configs.POPC["default"][:1])
        monkeypatch.setenv("BITKERNELS_TRITON_AUTOTUNE", "1")
        tuning.tuner.cache_clear()
        yield
        tuning.tuner.cache_clear()

    @pytest.fixture
    def timed(two_tiles, monkeypatch):
        """One item for each configuration timed; each is faster than the one before."""
        timed = []

        def do_bench(call, **kw):
            call()
            timed.append(1)
            return [1.0 / len(timed)] * 3

        monkeypatch.setattr(tuning.triton.testing, "do_bench", do_bench)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        return timed

    def product(rows, columns=40):
        words, weights = words_of(rows, 70), words_of(columns, 70)
        kw = dict(dtype=torch.int32, inner="popc")
        same(kernel("packed_linear")(words, weights, 70, **kw),
             reference.packed_linear(words, weights, 70, dtype=torch.int32))

    def test_tuning_times_a_shape_class_once(timed):
        product(5)
        assert len(timed) == 2
        assert tuning.tuner("popc", "interpret", None).best_config.kwargs["BLOCK_M"] == 32
        product(7)
        assert len(timed) == 2, "5 and 7 rows are one class"
        product(9)
        product(9, columns=41)
        assert len(timed) == 6

    def test_the_fixed_mode_times_nothing(timed, monkeypatch):
        monkeypatch.setenv("BITKERNELS_TRITON_AUTOTUNE", "0")
        product(5)
        with tuning.fixed(1):
            product(5)
        assert timed == []
        assert [tuning.tuner("popc", "interpret", i).best_config.kwargs["BLOCK_M"]
                for i in (0, 1)] == [64, 32]

    @pytest.mark.parametrize("why", ("a graph is captured", "no memory for the timer"))
    def test_where_nothing_can_be_timed_the_fixed_tile_runs(timed, monkeypatch, why):
        def no_memory(*args, **kw):
            raise torch.OutOfMemoryError

        with monkeypatch.context() as context:
            if why == "a graph is captured":
                context.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            else:
                context.setattr(tuning.triton.testing, "do_bench", no_memory)
            product(5)
            assert timed == [] and tuning.tuner("popc", "interpret", None).cache == {}
        product(5)
        assert len(timed) == 2, "a later call tunes"

    def test_selfcheck_runs_every_tile_that_tuning_may_choose(timed, monkeypatch):
        ran = set()
        launch = tuning.launch
        monkeypatch.setattr(tuning, "launch", lambda inner, *args, **kw: (
            ran.add((inner, tuning._fixed.get())), launch(inner, *args, **kw)))
        assert selfcheck.failure("packed_linear", "popc", CPU) is None
        assert ran == {("popc", 0), ("popc", 1)} and timed == []

    def test_choice_of_inner_product():
        big = dict(rows=10**5, columns=256, depth=72, whole=True, taps=9, addressable=True)
        assert gemm.choose("sm90", **big) == ("b1", "int8", "popc")
        assert gemm.choose("sm100", **big) == gemm.choose("hip", **big) == ("int8", "popc")
        assert gemm.choose("sm90", **{**big, "whole": False}) == ("popc",)
        assert gemm.choose("sm90", **{**big, "addressable": False}) == ("popc",)
        assert gemm.choose("sm90", **{**big, "taps": 49}) == ("int8", "popc")
        assert gemm.choose("sm90", **{**big, "rows": 4}) == ("popc",)

