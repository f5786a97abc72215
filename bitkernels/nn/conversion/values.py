"""Which operations give values that cannot be negative, and which keep values so."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx, nn

from bitkernels.nn.pool import MaxPool2d

# Names of functions and methods, without the underscores around them.
_NON_NEGATIVE = {
    "relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "softmax", "softmin", "abs", "absolute",
    "square", "exp", "exp2", "expit", "sqrt", "norm", "var", "std", "one_hot", "cosh", "rand"}
_KEEPING = {
    "flatten", "unflatten", "reshape", "reshape_as", "view", "view_as", "permute", "transpose",
    "swapaxes", "swapdims", "movedim", "moveaxis", "t", "contiguous", "clone", "chunk", "split",
    "split_with_sizes", "tensor_split", "unbind", "getitem", "getattr", "get", "select", "narrow",
    "index_select", "gather", "take_along_dim", "squeeze", "unsqueeze", "expand", "expand_as",
    "repeat", "repeat_interleave", "tile", "interpolate", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "roll", "flip", "rot90", "mean", "sum", "max", "amax", "amin", "median",
    "topk", "sort", "cumsum", "unfold", "fold", "to", "type", "type_as", "float", "half",
    "bfloat16", "double", "detach", "requires_grad", "stochastic_depth", "drop_path", "cuda", "cpu",
    "identity", "masked_select", "diagonal", "tril", "triu"}
_KEEPING_PARTS = ("pool", "dropout", "upsample", "grid_sampl")
_ANY_PART = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "where"}
_ALL = {"add", "iadd", "radd", "matmul", "bmm", "einsum", "minimum"}
_PRODUCT = {"mul", "imul", "rmul", "multiply", "div", "truediv", "itruediv", "true_divide"}
_GATES = {"sigmoid", "hardsigmoid", "softmax"}
_ABOVE, _BELOW = {"gt", "ge", "greater", "greater_equal"}, {"lt", "le", "less", "less_equal"}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_ZEROS = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"}

_NON_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softmax,
                         nn.Softmax2d, nn.Softmin)
_KEEPING_MODULES = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten, nn.Identity,
    nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Fold, nn.Unfold,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    MaxPool2d)
_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_SIZES = ("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "dtype", "device")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def name_of(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def is_size(node: fx.Node, sizes: Container[fx.Node]) -> bool:
    """Whether it says what a tensor is like, not what is in it; of what `sizes` are, which do."""
    if node.op == "call_method":
        return name_of(node) in _SIZES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SIZES
    numbers = getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
    inputs = node.all_input_nodes
    return numbers and bool(inputs) and all(n in sizes for n in inputs)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def _at_least_zero(value: Any) -> bool:
    """A number, or a constant tensor of a graph."""
    if isinstance(value, fx.Node):
        constant = value.meta.get("constant")
        if constant is not None and not constant.is_meta and not constant.is_complex():
            return bool((constant >= 0).all())
        return value.op in ("call_function", "call_method") and name_of(value) in _ZEROS
    return isinstance(value, (int, float)) and value >= 0


def _compares(test: Any, how: set[str], x: Any) -> bool:
    """Whether a node is `x > 0`, or in `how` else, in any type."""
    while isinstance(test, fx.Node) and name_of(test) in _CASTS:
        test = test.args[0]
    return (isinstance(test, fx.Node) and name_of(test) in how and len(test.args) == 2
            and test.args[0] is x and isinstance(x, fx.Node) and _at_least_zero(test.args[1]))


def _rectifies(node: fx.Node, name: str) -> bool:
    """x x, and what is a ReLU in other words: x (x > 0), where(x > 0, x, 0), maximum(x, 0),
    masked_fill(x, x < 0, 0)."""
    args = node.args
    if name in ("mul", "imul", "rmul", "multiply") and len(args) == 2:
        x, other = args
        return (isinstance(x, fx.Node) and x is other or _compares(other, _ABOVE, x)
                or _compares(x, _ABOVE, other))
    if name in ("maximum", "fmax", "max") and len(args) == 2:
        return any(isinstance(a, fx.Node) and _at_least_zero(a) for a in args)
    if name == "where" and len(args) == 3:  # of torch or of a tensor, which comes first then
        first, second, other = args
        return any(_compares(test, _ABOVE, x) and _at_least_zero(other)
                   or _compares(test, _BELOW, other) and _at_least_zero(x)
                   for test, x in ((first, second), (second, first)))
    return (name == "masked_fill" and len(args) == 3 and _compares(args[1], _BELOW, args[0])
            and _at_least_zero(args[2]))


def kind(node: fx.Node, module: nn.Module | None) -> str:
    """What the node makes of its inputs' signs.

    source   its values cannot be negative, whatever the input
    keeps    values, or some channels of them, are not negative where its first input's are not
    parts    where those of any input are not
    all      where those of all inputs are not
    product  the same, but an input that is a gate in [0, 1] is not what to change
    any      its values may be negative (SiLU, GELU, Hardswish, ELU too: they keep the sign of most)
    """
    if module is not None:
        return module_kind(module)
    if node.op not in ("call_function", "call_method"):
        return "any"
    name = name_of(node)
    if name in ("hardtanh", "threshold"):
        low, other = ((_argument(node, 1, "min_val", -1.0), 0) if name == "hardtanh" else
                      (_argument(node, 1, "threshold"), _argument(node, 2, "value")))
        return "source" if _at_least_zero(low) and _at_least_zero(other) else "any"
    if name in ("clamp", "clip", "clamp_min"):
        return "source" if _at_least_zero(_argument(node, 1, "min")) else "any"
    if name == "clamp_max":
        return "keeps" if _at_least_zero(_argument(node, 1, "max")) else "any"
    if name == "pow":
        power = _argument(node, 1, "exponent")
        return "source" if isinstance(power, (int, float)) and power % 2 == 0 else "keeps"
    if name == "pad":
        constant = _argument(node, 2, "mode", "constant") == "constant"
        value = _argument(node, 3, "value") or 0
        return "keeps" if not constant or _at_least_zero(value) else "any"
    if name in _NON_NEGATIVE or _rectifies(node, name):
        return "source"
    if name in _KEEPING or any(part in name for part in _KEEPING_PARTS):
        return "keeps"
    if name in _ANY_PART or name == "maximum":
        return "parts"
    return "all" if name in _ALL else "product" if name in _PRODUCT else "any"


def module_kind(module: nn.Module) -> str:
    """`kind` of a call of the module."""
    if isinstance(module, _NON_NEGATIVE_MODULES):
        return "source"
    if isinstance(module, nn.Hardtanh):
        return "source" if module.min_val >= 0 else "any"
    if isinstance(module, nn.Threshold):
        return "source" if module.threshold >= 0 and module.value >= 0 else "any"
    if isinstance(module, _CONSTANT_PADS):
        return "keeps" if _at_least_zero(module.value) else "any"
    keeps = _is_pool(module) or type(module).__module__.startswith("einops.layers.")
    return "keeps" if keeps or isinstance(module, _KEEPING_MODULES) else "any"


def _is_pool(module: nn.Module) -> bool:
    """Of torch, or of einops, which also only moves values by another class."""
    return type(module).__module__ == nn.MaxPool2d.__module__ or _reduction(module) is not None


def _reduction(module: nn.Module) -> Any:
    """What `Reduce` of einops does, None for other modules."""
    home = type(module).__module__
    return getattr(module, "reduction", None) if home.startswith("einops.layers.") else None


def is_gate(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax))
    return node.op in ("call_function", "call_method") and name_of(node) in _GATES


def is_pool(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return _is_pool(module)
    return node.op in ("call_function", "call_method") and (
        name_of(node) in ("mean", "amax") or "pool" in name_of(node))


def is_max(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether it lets only the largest of several values through."""
    if module is not None:
        return "MaxPool" in type(module).__name__ or _reduction(module) == "max"
    return name_of(node) in ("max", "amax", "topk") or "max_pool" in name_of(node)


def is_norm(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether its values have a scale of their own."""
    if module is not None:
        return isinstance(module, _NORMS) or type(module).__name__ in ("LayerNorm2d", "RMSNorm")
    return node.op == "call_function" and name_of(node).endswith(("_norm", "softmax"))
