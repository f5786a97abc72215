"""`convert` and the module that it returns."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from bitkernels import _onnx
from bitkernels._arguments import flag
from bitkernels._dispatch import functorch_active
from bitkernels._fx import FxLeaf
from bitkernels.converter.capture import capture, neutral
from bitkernels.converter.engine import Engine, Engines
from bitkernels.converter.epilogue import fuse_epilogues
from bitkernels.converter.inputs import Input, arguments_of, check_inputs, inputs_of
from bitkernels.converter.int8 import in_int8
from bitkernels.converter.joins import split_joins
from bitkernels.converter.lower import lower
from bitkernels.converter.net import WITH_WORDS, Net, ops
from bitkernels.converter.onnx import RealForm
from bitkernels.converter.real import channels_last, fold_norms, in_bfloat16
from bitkernels.converter.recognise import recognise
from bitkernels.converter.report import ConvertReport, report
from bitkernels.converter.sequences import lift_sequences
from bitkernels.converter.signs import move_signs, write_signs
from bitkernels.nn.conversion.checks import check_shapes
from bitkernels.packed import WeightImage

REALS = ("float32", "bfloat16", "int8")
tile_weight = ops.tile_weight.default
_dispatch_modes = torch._C._len_torch_dispatch_stack


class Converted(FxLeaf):
    """A converted network: what the model computes in evaluation, without gradients.

    Called as the model was; RuntimeError for types and sizes that it was not made for. Its buffers
    are packed words and what is left of the real weights. `report` says what became of each layer;
    `graph_module` is the graph, of `torch.ops.bitkernels` and ATen operators, which torch.compile
    and torch.export take. On a CPU the C++ engine runs the whole graph as one call, where it knows
    all of its operators (`engine` tells), else PyTorch runs one after the other.
    """

    def __init__(self, graph_module: fx.GraphModule, report: ConvertReport,
                 inputs: tuple[Input, ...], in_spec: TreeSpec, out_spec: TreeSpec) -> None:
        super().__init__()
        self.graph_module, self.report, self.inputs = graph_module, report, inputs
        self.in_spec, self.out_spec = in_spec, out_spec  # of (args, kwargs) and the result
        self.training = False
        self.engines = Engines()
        self.state_names = tuple(graph_module.state_dict())
        self._image = WeightImage(_tiles)
        self._read: dict[str, tuple[str, int]] = {}  # buffer that a product reads: (words, groups)
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target in WITH_WORDS:
                self._give_image(node)
        graph_module.recompile()
        self.arrange()
        self.register_load_state_dict_pre_hook(_check_types)
        self.register_load_state_dict_post_hook(_arrange)

    def _give_image(self, product: fx.Node) -> None:
        """A product reads its words in the order that the device's kernels like best, which is
        kept beside the words and not in the state."""
        words = product.kwargs["weight_words"]
        assert isinstance(words, fx.Node)
        name = f"{words.target}_image"
        if name not in self._read:
            self._read[name] = str(words.target), int(product.kwargs.get("groups", 1))  # type: ignore
            self.graph_module.register_buffer(name, None, persistent=False)
        with self.graph_module.graph.inserting_before(words):
            image = self.graph_module.graph.get_attr(name)
        product.replace_input_with(words, image)

    def arrange(self) -> None:
        """What products read in place of words, made again of words that were written to."""
        for name, (words, groups) in self._read.items():
            source = getattr(self.graph_module, words)
            image = self._image(source, groups, name)
            image = source if image is None else image
            if self.graph_module._buffers.get(name) is not image:
                self.graph_module.register_buffer(name, image, persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self._read:  # in the state of a GraphModule's copy, as all its buffers
            self.graph_module.register_buffer(name, None, persistent=False)
        self.arrange()

    def _apply(self, fn: Any, recurse: bool = True) -> Converted:
        if fn(torch.zeros(1, dtype=torch.float32, device="cpu")).dtype is not torch.float32:
            raise RuntimeError("Converted: a converted network keeps its types; convert the model "
                               "of another type")
        self.engines = Engines()  # which holds the buffers
        for name in self._read:  # made again, whatever their layout; channels-last takes 4 sizes
            self.graph_module.register_buffer(name, None, persistent=False)
        try:
            super()._apply(fn, recurse)
        finally:
            self.arrange()
        return self

    def words_of(self, buffer: str) -> str:
        """The buffer of the state behind one that a product reads; any other is itself."""
        return self._read[buffer][0] if buffer in self._read else buffer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args, tuple):
            raise fx.proxy.TraceError(
                "Converted: torch.fx can trace the call of a converted network inside another "
                "module, such as nn.Sequential(network); its own graph is network.graph_module")
        inputs, spec = tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise RuntimeError(f"Converted: the arguments must be those of the example_inputs of "
                               f"convert, {arguments_of(self.in_spec)}, got {arguments_of(spec)}")
        check_inputs(self.inputs, inputs)
        if _onnx.is_exporting():
            return tree_unflatten(RealForm(self).run(*inputs), self.out_spec)
        if torch.compiler.is_compiling() or _dispatch_modes() or torch.jit.is_tracing():
            return tree_unflatten(self.graph_module(*inputs), self.out_spec)
        if functorch_active():
            return tree_unflatten(self._transformed(inputs), self.out_spec)
        engine = self.engines.of(self, inputs)
        if isinstance(engine, Engine):
            return tree_unflatten(engine(inputs), self.out_spec)
        self.arrange()  # costs little where no words were written to
        return tree_unflatten(self.graph_module(*inputs), self.out_spec)

    def _transformed(self, inputs: list[Any]) -> Any:
        """The graph within a transform of torch.func, whose operators have rules for vmap."""
        try:
            return self.graph_module(*inputs)
        except RuntimeError as error:
            if "inside of vmap" not in str(error):
                raise
            raise RuntimeError("Converted: torch.vmap has no memory formats, which the images of a "
                               "converted network are in; give it the whole batch, or map over "
                               "pack(model)") from None

    def engine(self, *args: Any, **kwargs: Any) -> Engine | str:
        """The C++ engine that runs the graph for these arguments, or why PyTorch does."""
        return self.engines.of(self, tree_flatten((args, kwargs))[0])

    def train(self, mode: bool = True) -> Converted:
        """A converted network has no training: raises RuntimeError for mode=True."""
        if mode:
            raise RuntimeError("Converted: a converted network cannot be trained; train the model "
                               "and convert it again")
        return self


def _tiles(words: Tensor, groups: int, _: str) -> Tensor | None:
    return tile_weight(words, groups) if words.is_cpu else None


def _check_types(module: Converted, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """RuntimeError where a copy would round words, bounds or int8 weights to others."""
    for name, own in module.state_dict(keep_vars=True).items():
        given = state.get(prefix + name)
        if (isinstance(given, Tensor) and given.dtype != own.dtype
                and not own.dtype.is_floating_point):
            raise RuntimeError(f"Converted: {prefix}{name} of the state must be {own.dtype}, got "
                               f"{given.dtype}")


def _arrange(module: Converted, _: Any) -> None:
    module.arrange()


def convert(model: nn.Module, example_inputs: Any = None, *,
            real: Literal["float32", "bfloat16", "int8"] = "float32",
            sign_of_zero: Literal[1] | None = None,
            dynamic_shapes: Any = None, verbose: bool = False) -> Converted:
    """A network that computes on bits what the model computes in evaluation.

    example_inputs: a tensor or a tuple of arguments, as the model will get them. The first size of
      each tensor, the batch, may be another later (but for one of 1 beside larger ones); other
      sizes, types and arguments that are no tensors may not.
    real: "bfloat16" runs real convolutions and linear layers in bfloat16. "int8" runs those of at
      least 16 input channels a group on int8, a quarter of the bytes, with steps for activations
      that are taken from the values in example_inputs: give real images, a batch or more. Values
      are approximate then, by a few tenths of a percent of a layer's largest, and signs that are
      near their thresholds may change; `bitkernels.converter.compare` counts them.
    sign_of_zero: 1 takes signs of 0 in code that computes on real numbers as +1, where it has 0
      (torch.sign) or -1, also those of weights; but not where a value is exactly 0 for many inputs,
      as behind a ReLU. None: what has another sign of 0 stays real, and the report says so.
    dynamic_shapes: as of `torch.export.export`, for other sizes that may change.
    verbose: print the report.

    Binary layers become products of packed bits, and so do real layers whose weights have one
    magnitude a channel, but for rounding, and whose input is a sign. Batch norm, clamp, residual
    and activation behind one move into its epilogue; a sign behind it is written by it as bits.
    Signs move through max pooling, concatenation, batch norm and flattening. Factors are folded in
    float64 and rounded once, so values differ from the model's by float32 rounding, and a sign
    where its real value is that close to its threshold. What is not recognised stays as it is;
    `report` names it.

    The model is not changed, and an autocast around this call is none of it. It has to be one that
    torch.export takes: control flow that depends on values is not.

    Raises ValueError for a model that cannot be exported, with the reason of torch.export, that
    changes buffers or inputs in evaluation, calls as_strided or is converted already, for arguments
    out of range, and with real="int8" where a real layer's input is all 0 or not finite in the
    example_inputs.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    check_shapes("convert", model)
    if real not in REALS:
        raise ValueError(f"convert: real must be one of {', '.join(REALS)}, got {real!r}")
    if sign_of_zero is not None and (isinstance(sign_of_zero, bool) or sign_of_zero != 1):
        raise ValueError(f"convert: sign_of_zero must be 1 or None, got {sign_of_zero!r}")
    flag("convert", "verbose", verbose)
    if example_inputs is None:
        raise ValueError("convert: example_inputs must be given: a tensor or a tuple of arguments "
                         "shaped as those of a call of the model")
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)):
        raise ValueError("convert: example_inputs must be a tensor or a tuple of arguments, got "
                         f"{type(example_inputs).__name__}")
    for name, part in model.named_modules():
        if isinstance(part, Converted):
            raise ValueError(f"convert: {name or 'model'} is converted already; convert the model "
                             "that it was made of")
    if on_meta := [name for name, t in (*model.named_parameters(), *model.named_buffers())
                   if t.is_meta]:
        raise ValueError(f"convert: {', '.join(on_meta[:3])} of the model have no values, on the "
                         "meta device; load them first")
    with neutral():
        return _converted(model, tuple(example_inputs), real, sign_of_zero, dynamic_shapes, verbose)


def _converted(model: nn.Module, example_inputs: tuple[Any, ...], real: str,
               sign_of_zero: int | None, dynamic_shapes: Any, verbose: bool) -> Converted:
    before = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    net = capture(model, example_inputs, dynamic_shapes)
    reasons = passes(net, real, sign_of_zero, example_inputs)
    specs: Any = net.graph._codegen
    info = specs.pytree_info
    net.graph.set_codegen(fx.graph.CodeGen())
    net.graph._tracer_cls = None  # torch.export's cannot be pickled
    made = fx.GraphModule(net.module, net.graph, "Network")  # a plain one, which deepcopy takes
    converted = Converted(made.eval(), report(net, before, reasons),
                          inputs_of(net.graph), info.in_spec, info.out_spec)
    if verbose:
        print(converted.report)
    return converted


def passes(net: Net, real: str, sign_of_zero: int | None,
           example_inputs: Any) -> dict[fx.Node, str]:
    """All passes, in their order; why some real layers are not products of bits."""
    reasons = recognise(net, sign_of_zero)
    lower(net)
    lift_sequences(net)
    fuse_epilogues(net)
    while split_joins(net):
        fuse_epilogues(net)
    move_signs(net)
    write_signs(net)
    fold_norms(net)
    channels_last(net)
    if real == "bfloat16":
        in_bfloat16(net)
    elif real == "int8":
        in_int8(net, tree_leaves(example_inputs), reasons)
    net.flatten()
    net.clean()
    return reasons


