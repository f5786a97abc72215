"""The published networks in timm: `import bitkernels.models.timm` registers all of them.

    import timm
    import bitkernels.models.timm

    model = timm.create_model("reactnet_a", num_classes=10, in_chans=1)
    model = timm.create_model("quicknet.larq", pretrained=True)  # public weights, by their name

Names are those of `bitkernels.models.list_models()`. Further arguments are those of `create_model`.
pretrained loads public weights; with another number of classes all but the last layer. Each model
has what timm's `resolve_model_data_config` reads: size and mean, standard deviation, interpolation
and crop of its images. It has no `forward_features`, nor other methods of timm's own networks.

Raises ImportError, at import, where timm is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bitkernels._packages import needs
from bitkernels.models import preprocessing, registry

try:
    from timm.models import register_model
except ImportError as error:
    raise ImportError(needs("networks registered with timm", "timm", error)) from None


def _data(name: str) -> dict[str, Any]:
    """What timm calls the default_cfg of a model."""
    found = registry.entry(name)
    rule = preprocessing.get(found.preprocessing)
    return dict(
        architecture=name, num_classes=found.num_classes, crop_pct=rule.crop, mean=rule.mean,
        std=rule.std, input_size=(3, found.image_size, found.image_size),
        interpolation="bilinear" if rule.interpolation == "bilinear" else "bicubic")


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, *, num_classes: int | None = None, in_chans: int = 3,
              pretrained_cfg: Any = None, pretrained_cfg_overlay: dict[str, Any] | None = None,
              cache_dir: str | None = None, **options: Any) -> nn.Module:
        if cache_dir is not None:
            raise ValueError(f"{name}: cache_dir is not taken: public weights are kept where "
                             "docs/environment.md says")
        data = _data(name)
        classes = data["num_classes"] if num_classes is None else num_classes
        model: Any = registry.create_model(name, num_classes=classes, in_channels=in_chans,
                                           **options)
        if pretrained:
            from bitkernels.models.weights import load_weights

            tag = f".{pretrained_cfg}" if isinstance(pretrained_cfg, str) else ""
            load_weights(model, name + tag, head=classes == data["num_classes"])
        model.num_classes = classes
        model.pretrained_cfg = model.default_cfg = {
            **data, "num_classes": classes, "input_size": (in_chans, *data["input_size"][1:]),
            **(pretrained_cfg if isinstance(pretrained_cfg, dict) else {}),
            **(pretrained_cfg_overlay or {})}
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`bitkernels.models.create_model({name!r})`, with timm's arguments."
    return build


for _name in registry.list_models():
    globals()[_name] = register_model(_entry_point(_name))
