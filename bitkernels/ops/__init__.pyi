"""Written by `python docs/make_operators.py`; do not edit."""

from typing import Any

PARTS: tuple[str, ...]

def schemas(name: str) -> tuple[str, ...]: ...
def parts(name: str) -> dict[str, str]: ...
def arguments(name: str) -> dict[str, str]: ...

binary_conv2d: Any
binary_conv2d_forward: Any
binary_conv_transpose2d: Any
binary_linear: Any
binary_residual_block: Any
int8_conv2d: Any
int8_linear: Any
latent_weight_grad: Any
mask_grad: Any
max_pool2d_with_offsets: Any
max_pool2d_with_offsets_backward: Any
packed_conv2d: Any
packed_conv2d_input_grad: Any
packed_conv2d_moments: Any
packed_conv2d_recompute: Any
packed_conv2d_sign_backward: Any
packed_conv2d_weight_grad: Any
packed_conv_transpose2d: Any
packed_linear: Any
packed_max_pool2d: Any
residual_block_backward: Any
residual_block_forward: Any
residual_block_gradients: Any
residual_block_norm_backward: Any
residual_block_norm_backward_float8: Any
residual_block_statistics: Any
rprelu: Any
rprelu_backward: Any
rsign: Any
sign_backward: Any
sign_pack: Any
sign_pack_mask: Any
tile_weight: Any
unpack: Any

__all__ = [
    "binary_conv2d",
    "binary_conv2d_forward",
    "binary_conv_transpose2d",
    "binary_linear",
    "binary_residual_block",
    "int8_conv2d",
    "int8_linear",
    "latent_weight_grad",
    "mask_grad",
    "max_pool2d_with_offsets",
    "max_pool2d_with_offsets_backward",
    "packed_conv2d",
    "packed_conv2d_input_grad",
    "packed_conv2d_moments",
    "packed_conv2d_recompute",
    "packed_conv2d_sign_backward",
    "packed_conv2d_weight_grad",
    "packed_conv_transpose2d",
    "packed_linear",
    "packed_max_pool2d",
    "residual_block_backward",
    "residual_block_forward",
    "residual_block_gradients",
    "residual_block_norm_backward",
    "residual_block_norm_backward_float8",
    "residual_block_statistics",
    "rprelu",
    "rprelu_backward",
    "rsign",
    "sign_backward",
    "sign_pack",
    "sign_pack_mask",
    "tile_weight",
    "unpack",
]
