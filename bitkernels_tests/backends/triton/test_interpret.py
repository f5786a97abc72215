"""Numerics of every Triton kernel in Triton's interpreter, which runs without a GPU.

The interpreter must be chosen before Triton is imported, so the tests of this file, and of
test_interpret_b1.py and its like, run in processes of their own, started by the one test that other
processes see. It truncates on the way to bfloat16 where a GPU rounds, hence `as_interpreted`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton", reason="triton is not installed")

if not INTERPRETED:

    @pytest.mark.long
    @pytest.mark.parametrize("files", (("",), ("_b1", "_empty", "_odd", "_offsets", "_pool")))
    def test_kernels_in_the_interpreter(files):
        """Two processes: each imports all that the tests need, for seconds."""
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
             *(__file__.replace(".py", f"{file}.py") for file in files)],
            env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

else:
    import triton.language as tl

    from bitkernels import reference
    from bitkernels.backends.triton import configs, dispatch, passes, plan, selfcheck, tuning
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
        in_turn,
        reals,
        words_of,
    )
    from bitkernels_tests.triton_interpreter import language_patched_once  # noqa: F401

    kernel = dispatch.kernel
    CPU = torch.device("cpu")
    CHANNELS = (1, 32, 100)
    LAYOUTS_AND_CHANNELS = [
        (layout, channels) for layout in LAYOUTS
        for channels in (CHANNELS if layout in ("contiguous", "channels_last") else (33,))]
    FLOATS = (torch.float32, torch.float16, torch.bfloat16)

    # Of whole words in and whole tiles out: with and without a K step that stays in a tap.
    WHOLE_GROUPS = [
        ConvCase(groups=2, channels=64, out_channels=128, batch=1),
        ConvCase(groups=3, channels=192, out_channels=192, size=(3, 4), stride=(2, 1), pad_value=1),
        ConvCase(groups=2, channels=512, out_channels=128, size=(3, 3), batch=1, padding=(0, 1)),
    ]
    EVERY_CONV = (*CONV_CASES, *WHOLE_GROUPS)

    def takers(case):
        """The inner products that take a convolution: all take whole groups, b1 up to 31 taps."""
        if case.groups > 1 and case not in WHOLE_GROUPS:
            return ("popc",)
        return configs.INNER if case.kernel[0] * case.kernel[1] < 32 else ("int8", "popc")

    @pytest.fixture(autouse=True)
    def emulated_ptx(monkeypatch):
        monkeypatch.setattr(tl, "inline_asm_elementwise", ptx_emulator.inline_asm_elementwise)

    def as_interpreted(x, dtype):
        """float32 in another type as the interpreter casts it: cut, not rounded, to bfloat16."""
        if dtype != torch.bfloat16:
            return x.to(dtype)
        return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    def as_promised(op, *args, **kw):
        """The kernel's output; its layout is the one that the fake kernel tells compilers."""
        out = kernel(op)(*args, **kw)
        fake = getattr(torch.ops.bitkernels, op)(
            *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args), **kw)
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

    @pytest.mark.parametrize("turn,which", [*enumerate(LAYOUTS_AND_CHANNELS)], ids=str)
    def test_elementwise(turn, which):
        layout, channels, dtype = *which, FLOATS[(turn + turn // 3) % 3]
        x = LAYOUTS[layout](reals(2, channels, 3, 5, dtype=dtype))
        shift, slope, last = (reals(channels), reals(channels), reals(channels, dtype=dtype))
        shifts = reals(2, channels, 1, 1)
        for given in (None, shift, shifts):
            same(as_promised("sign_pack", x, given, 1), reference.sign_pack(x, given, 1))
            same(as_promised("sign_pack_mask", x, 0.7, given, 1),
                 reference.sign_pack_mask(x, 0.7, given, 1))
        same(as_promised("sign_pack", x, None, 3), reference.sign_pack(x, None, 3))
        words = words_of(2, 3, 5, channels)
        same(as_promised("unpack", words, channels, dtype, 1),
             reference.unpack(words, channels, dtype, 1))
        same(as_promised("mask_grad", x, words, 1), reference.mask_grad(x, words, 1))
        for given in (shift, shifts):
            same(as_promised("rsign", x, given), reference.rsign(x, given))
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

    def few_programs(monkeypatch):
        for name, found in passes.PASSES.items():
            monkeypatch.setitem(
                passes.PASSES, name, found._replace(programs=3, columns=32, steps=2))

    def test_rprelu_backward_of_several_programs(monkeypatch):
        few_programs(monkeypatch)
        x, grad = dyadic(4000, 33), dyadic(4000, 33)
        vectors = dyadic(33), dyadic(33)
        same(kernel("rprelu_backward")(grad, x, *vectors),
             reference.rprelu_backward(grad, x, *vectors))

    def near(got, expected):
        """Sums of values that are equal, in another order."""
        torch.testing.assert_close(got, expected, rtol=1e-6,
                                   atol=1e-6 * float(expected.abs().amax()))

    @pytest.mark.parametrize("layout,channels", LAYOUTS_AND_CHANNELS)
    def test_residual_block(channels, layout):
        shape, of = (2, channels, 3, 7), LAYOUTS[layout]
        scale, bias, inside, slope, last, center = (reals(channels).double() for _ in range(6))
        for dtype, kind, relu, parts in (
                (torch.float32, torch.int16, False, (inside, slope, last)),
                (torch.float16, torch.int32, True, (None, slope, None)),
                (torch.bfloat16, torch.int16, True, (inside.float(), slope.half(), None)),
                (torch.float16, torch.int16, False, (None, None, None))):
            dot = of(torch.randint(-2**8, 2**8, shape).to(kind))
            stream, grad = (of(reals(*shape, dtype=dtype)) for _ in range(2))
            args = scale / 200, bias, *parts
            got = as_promised("residual_block_forward", dot, stream, *args, relu)
            same(got, as_interpreted(
                reference.residual_block_forward(dot, stream.float(), *args, relu), dtype))
            args = dot, stream, *args[:-1], center, relu
            got, sums = as_promised("residual_block_backward", grad, *args)
            expected, want = reference.residual_block_backward(
                grad.float(), dot, stream.float(), *args[2:])
            same(got, as_interpreted(expected, dtype))
            near(sums, want)
            out = FLOATS[(FLOATS.index(dtype) + relu) % 3]  # all three, of other types too
            args = dot, scale, bias / 100, center, last, relu
            got = as_promised("residual_block_norm_backward", grad, *args, out)
            same(got, as_interpreted(
                reference.residual_block_norm_backward(grad, *args, torch.float32), out))

    @pytest.mark.parametrize("estimator,layout,turn", [
        (estimator, layout, (i + j) % 3) for i, layout in enumerate(LAYOUTS)
        for j, estimator in enumerate(("ste_sign", "approx_sign", "swish_sign", "identity"))])
    def test_sign_backward(estimator, layout, turn):
        shape, shift = (3, 37, 5, 6), reals(37)
        dtype, wide, given, added, clip = (
            (torch.float32, torch.bfloat16, shift, True, 0.7),
            (torch.float16, torch.float32, None, False, 0.7),
            (torch.bfloat16, torch.bfloat16, shift.double(), True, None))[turn]
        x, grad = LAYOUTS[layout](reals(*shape, dtype=dtype)), reals(*shape, dtype=wide)
        x[0, 0, 0, :1] = float("nan")
        add = reals(*shape, dtype=dtype) if added else None
        kw = dict(estimator=estimator, clip=clip, beta=3.0)
        got, total = as_promised("sign_backward", grad, x, given, add, **kw)
        expected, want = reference.sign_backward(
            grad, x.float(), given, None if add is None else add.float(), **kw)
        expected = as_interpreted(expected, dtype)
        if estimator == "swish_sign":
            loose = dict(rtol=2e-2, atol=1e-3) if dtype != torch.float32 else {}
            torch.testing.assert_close(got, expected, **loose)
            torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-5)
        else:
            same(got, expected)
            near(total, want)

    @pytest.mark.parametrize("op", ("residual_block_forward", "residual_block_backward",
                                    "residual_block_norm_backward", "sign_backward",
                                    "residual_block_norm_backward_float8"))
    def test_block_selfcheck_and_no_rows(op):
        assert selfcheck.failure(op, None, CPU) is None
        for args, kw in selfcheck.cases(op):
            none = [a[:0] if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args]
            same(kernel(op)(*none, **kw), getattr(reference, op)(*none, **kw))
            if op.endswith("float8"):
                continue  # which never is double
            double = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else
                      torch.float64 if isinstance(a, torch.dtype) else a for a in args]
            assert plan.decide(op, double, kw, CPU)[:2] == ((), "the kernels do not take float64")
            same(dispatch.run(op, *double, **kw), getattr(reference, op)(*double, **kw))

    def test_sums_of_several_programs(monkeypatch):
        """Exact values: the sums are those of any order. Squares reach 2^60."""
        from bitkernels.backends.triton import packed_conv2d_moments

        few_programs(monkeypatch)
        dot = LAYOUTS["channels_last"](torch.randint(-2**24, 2**24, (2, 33, 20, 25)).int())
        for relu in (False, True):
            d = (dot.relu() if relu else dot).long()
            expected = [t.sum((0, 2, 3)) for t in (d, d * d, torch.ones_like(d))]
            same(packed_conv2d_moments.moments(dot, relu), torch.stack(expected))
        x, stream = dyadic(*dot.shape), dyadic(*dot.shape)
        c = [dyadic(33) for _ in range(5)]
        args = x, dot // 2**20, stream, *c, True
        same(kernel("residual_block_backward")(*args), reference.residual_block_backward(*args))
        args = x, stream, c[0], x, "approx_sign", None, 5.0
        same(kernel("sign_backward")(*args), reference.sign_backward(*args))

    @pytest.mark.parametrize("case", POOL_CASES, ids=str)
    def test_packed_max_pool2d(case):
        words = words_of(case.batch, *case.size, case.channels)
        same(kernel("packed_max_pool2d")(words, *case.args),
             reference.packed_max_pool2d(words, *case.args))

    @pytest.mark.parametrize("inner,case", in_turn(EVERY_CONV, takers), ids=str)
    def test_packed_conv2d(inner, case):
        words, weight_words = case.words()
        args = words, weight_words, case.channels, *case.args
        kw = dict(pad_value=case.pad_value, dtype=torch.int32, real=True, packed=True)
        got = kernel("packed_conv2d")(*args, **kw, inner=inner)
        expected = reference.packed_conv2d(*args, **kw)
        same(got, expected)
        assert got[0].stride() == expected[0].stride()

    @pytest.mark.parametrize("inner,case", [(inner, case) for case in (
        FEW_CONV_CASES[3], WHOLE_GROUPS[0], ConvCase(batch=0)) for inner in takers(case)], ids=str)
    def test_packed_conv2d_moments(inner, case):
        words, weight_words = case.words()
        args = words, weight_words, case.channels, *case.args
        for relu, dtype in ((False, torch.int16), (True, torch.int32)):
            kw = dict(pad_value=case.pad_value, out_channels=case.out_channels, relu=relu,
                      dtype=dtype)
            got = kernel("packed_conv2d_moments")(*args, **kw, inner=inner)
            expected = reference.packed_conv2d_moments(*args, **kw)
            same(got, expected)
            assert got[0].stride() == expected[0].stride()

    @pytest.mark.parametrize("inner,case", in_turn(LINEAR_CASES, lambda _: configs.INNER), ids=str)
    def test_packed_linear(inner, case):
        words, weight_words = case.words()
        kw = dict(dtype=torch.int32, real=True, packed=True)
        same(kernel("packed_linear")(words, weight_words, case.channels, **kw, inner=inner),
             reference.packed_linear(words, weight_words, case.channels, **kw))

    @pytest.mark.parametrize("forced", (None, *configs.INNER))
    def test_what_each_convolution_may_run_in(monkeypatch, forced):
        """The launcher's choice on a GPU, were every case large."""
        monkeypatch.setattr(configs, "family", lambda device: "sm90")
        monkeypatch.setattr(plan, "SMALL", 0)
        if forced:
            monkeypatch.setenv("BITKERNELS_TRITON_INNER", forced)
        else:
            monkeypatch.delenv("BITKERNELS_TRITON_INNER", raising=False)
        for case in EVERY_CONV:
            may = takers(case)
            call = *case.words(), case.channels, *case.args
            got = plan.decide("packed_conv2d", call, dict(pad_value=case.pad_value), CPU).inners
            assert got == ((forced,) if forced in may else may), case

    @pytest.mark.parametrize("inner,name,dtype", [
        (inner, name, FLOATS[(i + j) % 2]) for i, name in enumerate(EPILOGUES)
        for j, inner in enumerate(("popc", "b1"))])
    def test_epilogue(inner, name, dtype):
        case = FEW_CONV_CASES[0]
        words, weight_words = case.words()
        parts = epilogue_parts(EPILOGUES[name], case.output_shape, 1, dtype=torch.float16)
        args = words, weight_words, case.channels, *case.args
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
        best = tuning.tuner("popc", configs.table("popc", "interpret")).best_config
        assert len(timed) == 2 and best.kwargs["BLOCK_M"] == 32
        product(7)
        assert len(timed) == 2, "5 and 7 rows are one class"
        product(9)
        product(9, columns=41)
        assert len(timed) == 6

    def test_the_fixed_mode_times_nothing(timed, monkeypatch):
        monkeypatch.setenv("BITKERNELS_TRITON_AUTOTUNE", "0")
        launched, launch = [], tuning.launch_kernel
        monkeypatch.setattr(tuning, "launch_kernel", lambda *args, **constants: (
            launched.append(constants["BLOCK_M"]), launch(*args, **constants)))
        product(5)
        with tuning.fixed(1):
            product(5)
        assert timed == [] and launched == [64, 32]

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
            popc = configs.table("popc", "interpret")
            assert timed == [] and tuning.tuner("popc", popc).cache == {}
        product(5)
        assert len(timed) == 2, "a later call tunes"

    def test_selfcheck_runs_every_tile_that_tuning_may_choose(timed, monkeypatch):
        ran = set()
        launch = tuning.launch
        monkeypatch.setattr(tuning, "launch", lambda inner, *args, **kw: (
            ran.add((inner, tuning._fixed.get())), launch(inner, *args, **kw)))
        assert selfcheck.failure("packed_linear", "popc", CPU) is None
        assert ran == {("popc", 0), ("popc", 1)} and timed == []

    def test_large_calls_are_tuned_unasked(timed, monkeypatch):
        monkeypatch.delenv("BITKERNELS_TRITON_AUTOTUNE")
        product(5)
        assert timed == []
        monkeypatch.setattr(configs, "LARGE", 5 * 40 * 3)
        product(5)
        assert len(timed) == 2
