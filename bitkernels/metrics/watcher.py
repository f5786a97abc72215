"""Metrics attached to the binary layers of a model by hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from bitkernels._arguments import flag, integer, refuse
from bitkernels._arguments import module as module_of
from bitkernels.metrics.base import NAN, packed_signs
from bitkernels.metrics.signs import C2IRatio, DeadWeights, FlipRatio
from bitkernels.metrics.values import Histogram, Saturation
from bitkernels.nn import BinaryLayer, RSign
from bitkernels.nn.latent import latent_parameters, local, weight_of_now
from bitkernels.optim.grouping import binary_layers
from bitkernels.quantizers import (
    ApproxSign,
    MagnitudeAwareSign,
    NoOp,
    SteSign,
    SwishSign,
    is_binary,
)

__all__ = ["Watcher", "watch"]


class _Weight:
    """One binary weight and its metrics, which share one packing of its signs."""

    def __init__(self, layer: BinaryLayer, window: int, tolerance: float) -> None:
        self.layer = layer
        self.metrics: dict[str, FlipRatio | C2IRatio | DeadWeights] = {
            "flip_ratio": FlipRatio(), "c2i_ratio": C2IRatio(),
            "dead_weights": DeadWeights(window, tolerance)}
        self.update(None)

    @torch.no_grad()
    def update(self, grad: Tensor | None) -> None:
        with weight_of_now(self.layer):
            signed = local(_signed(self.layer))
        words, size = packed_signs(signed), signed.numel()
        grad = None if grad is None else local(grad)
        for metric in self.metrics.values():
            metric.size = size
            if isinstance(metric, DeadWeights):
                metric._update(words, grad)
            else:
                metric._update(words)


_PLAIN_SIGNS = (NoOp, SteSign, ApproxSign, SwishSign, MagnitudeAwareSign)


def _signed(layer: BinaryLayer) -> Tensor:
    """A tensor with the signs of the layer's weight; a custom quantizer has to compute them."""
    quantizer = layer.weight_quantizer
    if quantizer is None or type(quantizer) in _PLAIN_SIGNS:
        return layer.weight
    return quantizer(layer.weight)


def _activation_clip(module: nn.Module) -> float | None:
    """Where the gradient of this module's input sign ends; None where it takes no sign of a real.

    1 for estimators without a clip (approx_sign's own bound; for others by convention).
    """
    clip: Any
    if isinstance(module, RSign):
        clip = module.operator_arguments()["clip"]
    elif isinstance(module, BinaryLayer):
        quantizer = module.input_quantizer
        if quantizer is None or type(quantizer) is NoOp or not is_binary(quantizer):
            return None
        clip = getattr(quantizer, "clip_value", None)
    else:
        return None
    return 1.0 if clip is None else clip


class Watcher:
    """Metrics of all binary layers of a model, updated by hooks until `close`; see `watch`.

    weights: for each binary weight, by its layer's name, flip_ratio, c2i_ratio and dead_weights.
    activations: for each layer that takes the sign of a real input, saturation, and histogram if
    asked for.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None, *,
                 activations: bool = True, histograms: bool = False, every: int = 1,
                 window: int = 100, tolerance: float = 1e-2) -> None:
        module_of("watch", "model", model)
        every = integer("watch", "every", every)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            refuse("watch", "optimizer", "None or one of torch.optim", optimizer)
        flag("watch", "activations", activations), flag("watch", "histograms", histograms)
        self._handles: list[Any] = []
        self._weights: dict[str, _Weight] = {}
        seen: set[int] = set()
        for name, layer in binary_layers(model).items():
            parameters = {id(p) for p in latent_parameters(layer)}
            if not parameters or not parameters <= seen:
                seen |= parameters
                self._weights[name or type(layer).__name__] = _Weight(layer, window, tolerance)
        if not self._weights:
            raise ValueError(f"watch: {type(model).__name__} has no layer with binary weights")
        if optimizer is not None and not seen & {
                id(p) for group in optimizer.param_groups for p in group["params"]}:
            raise ValueError(f"watch: {type(optimizer).__name__} holds none of the binary weights")
        self.weights = {name: weight.metrics for name, weight in self._weights.items()}
        self.activations: dict[str, dict[str, Saturation | Histogram]] = {}
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.update()))
        for name, module in model.named_modules() if activations else ():
            clip = _activation_clip(module)
            if clip is None:
                continue
            metrics: dict[str, Saturation | Histogram] = {"saturation": Saturation(clip)}
            if histograms:
                metrics["histogram"] = Histogram()
            self.activations[name or type(module).__name__] = metrics
            taken = _Inputs(tuple(metrics.values()), every).take
            # Here and not as a decorator: it imports the compiler, which `import bitkernels` must
            # not do.
            self._handles.append(module.register_forward_pre_hook(
                torch.compiler.disable(taken), with_kwargs=True))

    def update(self) -> None:
        """Take the weights as they are after an update; the hook of the optimizer calls this."""
        for weight in self._weights.values():
            latent = latent_parameters(weight.layer)
            weight.update(latent[0].grad if latent else None)

    def reset(self) -> None:
        """Start new means of flips, of saturation and histograms; C2I and windows go on."""
        for metrics in self.weights.values():
            metrics["flip_ratio"].reset()
        for inputs in self.activations.values():
            for metric in inputs.values():
                metric.reset()

    def scalars(self) -> dict[str, float]:
        """All values as "metric/layer", and "metric" over all layers, weighted by their elements.

        flip_ratio is that of the last update, flip_ratio_mean that since the last reset.
        """
        values: dict[str, float] = {}
        parts: dict[str, list[tuple[float, int]]] = {}

        def add(kind: str, name: str, value: float, size: int) -> None:
            values[f"{kind}/{name}"] = value
            parts.setdefault(kind, []).append((value, size))

        for name, metrics in self.weights.items():
            for kind, metric in metrics.items():
                if isinstance(metric, FlipRatio):
                    add(kind, name, metric.last, metric.size)
                    add("flip_ratio_mean", name, metric.value, metric.size)
                else:
                    add(kind, name, metric.value, metric.size)
        for name, inputs in self.activations.items():
            saturation: Any = inputs["saturation"]
            add("saturation", name, saturation.value, saturation._count)
        for kind, items in parts.items():
            sizes = sum(size for _, size in items)
            total = sum(value * size for value, size in items if size)
            values[kind] = total / sizes if sizes else NAN
        return values

    @torch.no_grad()
    def histograms(self) -> dict[str, Histogram]:
        """Of the latent weights now ("weight/layer") and of the inputs ("activation/layer")."""
        found: dict[str, Histogram] = {}
        for name, weight in self._weights.items():
            with weight_of_now(weight.layer):
                latent = local(weight.layer.weight)
            limit = float(latent.abs().max()) if latent.numel() else 0.0
            limit = limit if 0 < limit < float("inf") else 1.0
            found[f"weight/{name}"] = Histogram(low=-limit, high=limit)
            found[f"weight/{name}"].update(latent)
        for name, inputs in self.activations.items():
            if isinstance(histogram := inputs.get("histogram"), Histogram):
                found[f"activation/{name}"] = histogram
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs: tensors, numbers and None."""
        return {part: {name: {kind: metric.state_dict() for kind, metric in metrics.items()}
                       for name, metrics in getattr(self, part).items()}
                for part in ("weights", "activations")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises KeyError where a layer or metric lacks."""
        for part in ("weights", "activations"):
            for name, metrics in getattr(self, part).items():
                for kind, metric in metrics.items():
                    metric.load_state_dict(state[part][name][kind])

    def close(self) -> None:
        """Remove all hooks; the values stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Inputs:
    """Gives metrics the input of each `every`-th forward pass in training."""

    def __init__(self, metrics: tuple[Any, ...], every: int) -> None:
        self.metrics, self.every, self.calls = metrics, every, 0

    @torch.no_grad()
    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        self.calls += 1
        if (self.calls - 1) % self.every:
            return
        x: Tensor = args[0] if args else kwargs["input"]
        if isinstance(module, RSign):
            x = x + module.shift.view(-1, *[1] * (x.dim() - 2))
        for metric in self.metrics:
            metric.update(x)


def watch(model: nn.Module, optimizer: Optimizer | None = None, *, activations: bool = True,
          histograms: bool = False, every: int = 1, window: int = 100,
          tolerance: float = 1e-2) -> Watcher:
    """Attach metrics to the binary layers of a model; close() or the end of `with` detaches them.

        with watch(model, optimizer) as watcher:
            ...
            print(watcher.scalars()["flip_ratio"])

    optimizer: its steps update the metrics of the weights, by a post-step hook. It is the one that
      holds the binary weights, or a `CaseOptimizer`. Without one call `update()` after each step
      (before the gradients are cleared, for dead weights).
    activations: whether to look at the inputs of layers and RSign modules that take the sign of a
      real tensor, in training mode: the share beyond the estimator's clip, or beyond 1 where it
      has none.
    histograms: whether to count these inputs in histograms too. Those of the latent weights need
      no hook: `histograms()` counts them when called.
    every: look at the inputs of each every-th forward pass of a layer only.
    window, tolerance: see `DeadWeights`.

    The weights at the call are the start of C2I and the first update of the flip ratio. Watch a
    model before `torch.compile`; the hooks on inputs break its graph, those on weights do not.
    On several processes the values are those of this process; the weights' are the same on all,
    but for shards (FSDP2), of which each process watches its own.

    Raises ValueError for a model without binary weights and an optimizer that holds none of them.
    """
    return Watcher(model, optimizer, activations=activations, histograms=histograms, every=every,
                   window=window, tolerance=tolerance)
