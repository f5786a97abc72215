"""One-line mistakes for `mutants.py`, and the tests that should notice each.

A mutant stands for its kind. When one is not noticed, a test of the kind is missing; when `old` is
not found once any more, the line has moved on: write the same mistake into the new one.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """file: from the root. tests: files and ids below bitkernels_tests/, of the interpreter or none
    of them; or "engine" or "races", the engine's own test without and with threads."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ENGINE, RACES = ("engine",), ("races",)
CPU, CUDA, TRITON = "csrc/cpu", "bitkernels/backends/cuda", "bitkernels/backends/triton"
OFFSETS = ("test_triton_interpret_offsets.py::test_offsets_beyond_32_bits",)
ELEMENTWISE = ("test_triton_elementwise.py",)
LAUNCH = ("test_cuda_launch.py",)
EMULATED = "test_cuda_emulated.py"
BLOCK = "test_nn_residual_block.py"

MUTANTS = (
    # The CPU engine.
    Mutant("moments-race", f"{CPU}/packed_conv2d.cpp",
           "__atomic_fetch_add(total + c, moments[c], __ATOMIC_RELAXED);",
           "total[c] += moments[c];", RACES),
    Mutant("shared-words-race", f"{CPU}/packed_conv2d.cpp",
           "const int64_t inner = shared_words ? conv.groups * chunks : 1;",
           "const int64_t inner = 1;", RACES),
    Mutant("shared-sums-race", f"{CPU}/rprelu.cpp",
           "double* to = partial.data() + t * 3 * width;",
           "double* to = partial.data() + t / 2 * 3 * width;", RACES),
    Mutant("weight-grad-one-split", f"{CPU}/sign_weight_grad.cpp", "split < splits; ++split",
           "split + 1 < splits; ++split", ENGINE),
    Mutant("tail-bits-of-a-group", f"{CPU}/packed_conv2d.cpp",
           "if (count % 32) out[n - 1] &= (1u << count % 32) - 1;", "", ENGINE),
    Mutant("pool-border", f"{CPU}/packed_max_pool2d.cpp", "if (x < 0 || x >= pool.width) continue;",
           "if (x < 0 || x > pool.width) continue;", ENGINE),
    Mutant("input-grad-of-scaled-rows", f"{CPU}/sign_input_grad.cpp",
           "conv.out_channels, scale,", "conv.out_channels, nullptr,", ENGINE),
    Mutant("rprelu-sums-of-the-first-rows", f"{CPU}/rprelu.cpp",
           "for (int64_t i = 0; i < 3 * channels; ++i) to[i] += acc[i];",
           "for (int64_t i = 0; i < 3 * channels; ++i) to[i] = acc[i];",
           ENGINE),
    Mutant("norm-backward-without-relu", f"{CPU}/isa_residual_block.inc",
           "if (b.relu) BK_EACH(g)", "if (false) BK_EACH(g)", ENGINE),
    Mutant("nan-slope", f"{CPU}/isa_residual_block.inc", "y.v[j] = t < 80 ? slope : Floats{};",
           "y.v[j] = t >= 80 ? Floats{} : slope;", ENGINE),
    # csrc/cuda, by the emulator.
    Mutant("cuda-clamp", "csrc/cuda/epilogue.cuh", "y = y > p.clamp_max ? p.clamp_max : y;",
           "y = y > p.clamp_max ? p.clamp_min : y;", (f"{EMULATED}::test_parts_of_the_epilogue",)),
    Mutant("cuda-border-taps", "csrc/cuda/prepare.cuh", "kh >= h.before && kh < KH - h.past",
           "kh > h.before && kh < KH - h.past", (f"{EMULATED}::test_conv_geometry",)),
    # The launchers of csrc/cuda.
    Mutant("no-context-to-build", f"{CUDA}/launch.py", "                driver().bind(key[2])\n",
           "", LAUNCH),
    Mutant("no-context-to-launch", f"{CUDA}/launch.py", "    run.bind(_index(device))\n", "",
           LAUNCH),
    Mutant("bind-does-nothing", f"{CUDA}/driver.py", "if not current.value:", "if False:", LAUNCH),
    Mutant("one-kernel-for-all-devices", f"{CUDA}/launch.py",
           "key = kernel.name, spec, _index(device)", "key = kernel.name, spec, 0", LAUNCH),
    Mutant("a-vector-that-is-let-go", f"{CUDA}/launch.py",
           "**{name: t.data_ptr() for name, t in tensors.items() if t is not None}",
           "**{name: t.clone().data_ptr() for name, t in tensors.items() if t is not None}",
           LAUNCH),
    Mutant("unaligned-vectors", f"{CUDA}/launch.py",
           "return t if t.data_ptr() % 8 == 0 else t.clone()", "return t",
           (f"{EMULATED}::test_views_are_taken_as_they_lie",)),
    Mutant("compiled-while-captured", f"{CUDA}/launch.py", "if capturing(device):", "if False:",
           ("test_cuda_dispatch.py::test_a_shape_that_is_new_inside_a_capture_is_an_error",)),
    Mutant("broken-code-is-kept", f"{CUDA}/driver.py", "for renew in (False, True):",
           "for renew in (False,):", ("test_cuda_driver.py",)),
    # Trust, and the launchers of Triton.
    Mutant("no-device-guard", "bitkernels/backends/trust.py",
           'if device.type != "cuda" or device.index == torch.cuda.current_device():', "if True:",
           ("test_trust.py",)),
    Mutant("one-error-ends-it", "bitkernels/backends/trust.py", "if attempt == 2:", "if True:",
           ("test_trust.py",)),
    Mutant("no-memory-is-the-kernels-fault", "bitkernels/backends/trust.py",
           'if "out of memory" in', 'if "out of memory!" in', ("test_trust.py",)),
    Mutant("never-wide", f"{TRITON}/elementwise.py", "return any(\n        t is not None\n",
           "return any(\n        False\n", ELEMENTWISE),
    Mutant("wide-by-size-alone", f"{TRITON}/elementwise.py",
           "sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))", "t.numel()",
           ELEMENTWISE),
    Mutant("words-are-never-wide", f"{TRITON}/sign_pack.py",
           "block_r, BLOCK_C=block_c,\n                                    WIDE=wide(input, signs)",
           "block_r, BLOCK_C=block_c,\n                                    WIDE=wide(input)",
           ELEMENTWISE),
    Mutant("packed-output-is-never-wide", f"{TRITON}/gemm.py",
           "elementwise.wide(words, filters, out, packed, residual)",
           "elementwise.wide(words, filters, out, residual)", ELEMENTWISE),
    Mutant("wide-index-of-32-bits", f"{TRITON}/jit.py", "tl.program_id(0).to(tl.int64) * BLOCK",
           "tl.program_id(0) * BLOCK", ("test_triton_aot.py::test_64_bit_offsets",)),
    Mutant("narrow-launch-of-far-images", f"{TRITON}/rsign.py", "WIDE=wide(input, out)",
           "WIDE=False", OFFSETS),
    Mutant("int8-beyond-its-offsets", f"{TRITON}/packed_conv2d.py",
           "4 * weight_words.numel(), shape.numel()) < 2**31", "0) < 2**31", ELEMENTWISE),
    Mutant("triton-takes-float64", f"{TRITON}/elementwise.py",
           "t is not None and t.dtype == torch.float64", "False",
           ("test_triton_interpret.py::test_block_selfcheck_and_no_rows",)),
    Mutant("unchecked-vectors", "bitkernels/backends/launchers.py",
           "    _checks.check_rprelu(\"rprelu_backward\", input, shift_in=shift_in, slope=slope)\n",
           "", ("test_launchers.py",)),
    # Layers, and what is derived from their tensors.
    Mutant("backward-pre-hooks", "bitkernels/nn/residual_block.py",
           '"_backward_hooks", "_backward_pre_hooks")', '"_backward_hooks")',
           ("test_nn_residual_block_hooks.py",)),
    Mutant("packed-casts-float64", "bitkernels/nn/packed.py",
           'if (device in ("cpu", "cuda") and input.dtype != torch.float64\n',
           'if (device in ("cpu", "cuda")\n', ("test_nn_packed.py",)),
    Mutant("block-statistics-momentum", "bitkernels/nn/residual_block.py",
           "running.lerp_(batch, norm.momentum)", "running.lerp_(batch, 0.1)", (BLOCK,)),
    Mutant("fused-eval-without-scale", "bitkernels/nn/residual_block.py",
           "scale=factor if scale is None else factor * scale, bias=bias",
           "scale=factor, bias=bias", (f"{BLOCK}::test_evaluation_equals_the_layers",)),
    Mutant("subclass-is-its-parent", "bitkernels/nn/layer.py",
           "if type(quantizer) in (SteSign, ApproxSign, SwishSign):",
           "if isinstance(quantizer, (SteSign, ApproxSign, SwishSign)):", ("test_nn_linear.py",)),
    Mutant("scale-of-a-subclass", "bitkernels/nn/layer.py",
           "if type(weight_quantizer) is MagnitudeAwareSign:",
           "if isinstance(weight_quantizer, MagnitudeAwareSign):", ("test_nn_linear.py",)),
    Mutant("detached-scale-in-the-gradient", "bitkernels/nn/layer.py",
           "return grad, None\n", "return grad * 2, None\n", ("test_nn_conv.py",)),
    Mutant("half-of-the-words", "bitkernels/nn/packed.py", "if new.dtype != old.dtype:",
           "if False:", ("test_derived.py",)),
    Mutant("derived-ignores-writes", "bitkernels/nn/derived.py", "kept[1] == source._version",
           "True", ("test_derived.py",)),
    Mutant("derived-of-another-tensor", "bitkernels/nn/derived.py", "kept[0]() is source and",
           "kept[0]() is not None and", ("test_derived.py",)),
    Mutant("derived-in-a-graph", "bitkernels/nn/derived.py",
           "if torch.compiler.is_compiling() or _dispatch_modes() or _jit_trace() is not None:",
           "if torch.compiler.is_compiling():", ("test_derived.py",)),
    Mutant("sync-norm-without-its-offset", "bitkernels/nn/norm.py", "shift = -offset * factor",
           "shift = 0 * factor", ("test_nn_norm.py",)),
    # Reference and autograd.
    Mutant("clip-excludes-its-bound", "bitkernels/reference.py",
           "return torch.where(_wide(x).abs() <= clip, grad", "return torch.where(_wide(x).abs() < "
           "clip, grad", ("test_reference.py",)),
    Mutant("nan-is-minus-one", "bitkernels/reference.py",
           "return pack_bits(~(_shifted(input, shift, dim) < 0))",
           "return pack_bits(_shifted(input, shift, dim) >= 0)", ("test_reference.py",)),
    Mutant("scaled-weight-gradient", "bitkernels/autograd.py",
           'if scale is not None and conf["scale_weight_grad"]:', "if scale is not None:",
           ("test_binary_conv2d.py::test_gradients_of_scale_rules",)),
    Mutant("uneven-padding-backward", "bitkernels/_conv2d_backward.py",
           "grad_input = grad_input[:, :, top : top + size[0], left : left + size[1]]",
           "grad_input = grad_input[:, :, : size[0], : size[1]]",
           ("test_binary_conv2d.py::test_gradients_of_every_geometry",)),
    Mutant("operator-casts-float64", "bitkernels/_dispatch.py",
           "if dtype is None and args[0].dtype != torch.float64:", "if dtype is None:",
           ("test_binary_conv2d.py", "test_binary_linear.py")),
    Mutant("no-all-reduce", "bitkernels/residual_block.py",
           'total = _all_reduce(sums[:2].contiguous(), conf["group"]) / count',
           "total = sums[:2].contiguous() / count", ("test_nn_residual_block_distributed.py",)),
    Mutant("fold-of-a-constant", "bitkernels/thresholds.py",
           "torch.where(last, INT_MAX, torch.where(first, low, INT_MIN))",
           "torch.where(last, INT_MAX, low)", ("test_thresholds.py",)),
    # Optimizers.
    Mutant("equality-keeps-the-weight", "bitkernels/optim/bop.py",
           "torch._foreach_add_(values, 0.5)", "torch._foreach_add_(values, -0.5)",
           ("test_optim.py",)),
    Mutant("half-moments", "bitkernels/optim/bop.py",
           "return torch.float64 if param.dtype == torch.float64 else torch.float32",
           "return param.dtype", ("test_optim.py",)),
    Mutant("state-of-the-first-optimizer", "bitkernels/optim/grouping.py",
           "start += len(part)", "start += 0", ("test_optim.py",)),
    Mutant("clip-of-one-side", "bitkernels/optim/grouping.py",
           "        torch._foreach_clamp_min_(shards, -clip)\n", "",
           ("test_optim.py::test_latent_weights_are_clipped",)),
    # Training.
    Mutant("parts-of-a-batch", "bitkernels/train/data.py",
           "self.part = slice(rank * batch_size // size, (rank + 1) * batch_size // size)",
           "self.part = slice(0, batch_size // size)", ("test_train_data.py",)),
    Mutant("augmented-by-order", "bitkernels/train/data.py",
           "with _seeded(self.seed, epoch, index):", "with _seeded(self.seed, index):",
           ("test_train_data.py",)),
    Mutant("temperature", "bitkernels/train/distillation.py", "return temperature**2 * divergence",
           "return divergence", ("test_distillation.py",)),
    Mutant("gradient-into-the-teacher", "bitkernels/train/distillation.py",
           "(_attention(ours) - _attention(theirs.detach()))",
           "(_attention(ours) - _attention(theirs))", ("test_distillation.py",)),
    Mutant("schedule-forgotten", "bitkernels/train/trainer.py",
           '        self.scheduler.load_state_dict(saved["scheduler"])\n', "",
           ("test_train_checkpoint.py::test_interrupted_at_a_write_and_resumed",)),
    Mutant("evaluation-in-training-mode", "bitkernels/train/trainer.py",
           "        self.model.eval()\n", "", ("test_train_distributed.py",
                                               "test_train_checkpoint.py")),
    Mutant("written-in-place", "bitkernels/_files.py",
           'temporary = path.with_name(f".{path.name}{mark}.tmp")', "temporary = path",
           ("test_train_checkpoint.py",)),
    Mutant("rest-by-the-binary-schedule", "bitkernels/train/stages.py",
           "factors[own:] = [factor(stage.rest.schedule)] * (len(factors) - own)", "pass",
           ("test_train_stages.py", "test_train_recipes.py")),
    Mutant("decay-of-everything", "bitkernels/train/stages.py",
           'if method.decay == "all" or pair[1].dim() == 4]', "]", ("test_train_stages.py",)),
)
