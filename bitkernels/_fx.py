"""Modules that torch.fx records as one `call_module` node, as it does those of `torch.nn`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, get_type_hints

from torch import nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError

Forward = TypeVar("Forward", bound=Callable[..., Any])


def _tracer(values) -> Any:
    """That of the first proxy among the values, or in a tuple or list of them; None without."""
    for value in values:
        if isinstance(value, Proxy):
            return value.tracer
        if isinstance(value, (tuple, list)):
            tracer = _tracer(value)
            if tracer is not None:
                return tracer
    return None


class FxLeaf(nn.Module):
    """Base of modules that are leaves of every `torch.fx` trace, whatever its tracer calls leaves.

    A trace of a network then holds the module itself: options, hooks, `pack`, metrics and latent
    weights stay what they are. torch's own rule, the name of the class's package, is for `torch.nn`
    alone. The call is where this is decided, not `forward`: hooks and a subclass's or an instance's
    own forward run when the graph runs, and only then.

    The tracer's `call_module` is asked all the same, so tracers that note names there work.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer = _tracer((*args, *kwargs.values()) if kwargs else args)
        if tracer is None or not hasattr(tracer, "call_module"):
            return super().__call__(*args, **kwargs)

        def leaf(*args: Any, **kwargs: Any) -> Proxy:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, leaf, args, kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by `torch.jit.script`, whose language has neither these operators' defaults nor
        options that are quantizers."""
        raise RuntimeError(f"{type(self).__name__}: torch.jit.script cannot compile it; use "
                           "torch.jit.trace, torch.export or torch.compile")

    @property
    def itself(self) -> nn.Module:
        """This module, under the name by which a trace of it alone calls it."""
        return self


def traced_whole(forward: Forward) -> Forward:
    """Decorates a leaf's `forward` for traces that do not call the module: it is their root.

    The trace is one node, which calls `itself`. Raises TraceError where another forward passes a
    proxy on (a subclass that is the root, `layer.forward(x)` in a traced parent): the module's node
    would run that other forward, or hooks, once more.
    """

    # torch.fx copies them into the graph, which does not pickle with names in place of types.
    forward.__annotations__ = get_type_hints(forward)

    @functools.wraps(forward)
    def whole(self, input, *args, **kwargs):
        if not isinstance(input, Proxy):
            return forward(self, input, *args, **kwargs)
        tracer = input.tracer
        if getattr(tracer, "root", None) is not self or type(self).forward is not whole:
            name = type(self).__name__
            raise TraceError(
                f"{name}: torch.fx can trace the call of this module, not what its forward does; "
                f"call the module, not .forward, and trace a {name} with a forward of its own "
                "inside another module, such as nn.Sequential(layer)")
        return tracer.create_proxy("call_module", "itself", (input, *args), kwargs)

    return whole  # type: ignore[return-value]
