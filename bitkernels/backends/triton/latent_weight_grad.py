"""latent_weight_grad: one program an output channel, in the order of the weight's memory.

The library's gradient may have another memory format than the weight; it is small, and read where
it lies. swish_sign is within rounding of the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitkernels.backends.triton.elementwise import collapse, wide
from bitkernels.backends.triton.jit import row_offset
from bitkernels.backends.triton.launch import launch
from bitkernels.backends.triton.sign_backward import ESTIMATORS, IDENTITY, estimator_grad
from bitkernels.ops.geometry import is_channels_last
from bitkernels.ops.latent_weight_grad import fake

BLOCK = 1024
NONE = tl.constexpr(-1)


@triton.jit
def latent_weight_grad_kernel(grad, weight, scale, out, of_scale, clip, beta, columns, inner,
                              gr, go, gi, wr, wo, wi, rr, ro, ri, ESTIMATOR: tl.constexpr,
                              BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    if WIDE:
        row = row.to(tl.int64)
        c = c.to(tl.int64)
    kind: tl.constexpr = grad.dtype.element_ty
    if scale is not None:
        factor = tl.load(scale + row).to(tl.float32).to(kind).to(tl.float32)  # as PyTorch casts
    total = tl.zeros([BLOCK], tl.float64)
    for _ in range(0, columns, BLOCK):
        ok = c < columns
        g = tl.load(grad + (row * gr + row_offset(c, inner, go, gi)), mask=ok, other=0.0)
        w = tl.load(weight + (row * wr + row_offset(c, inner, wo, wi)), mask=ok, other=0.0)
        g = g.to(tl.float32)
        w = w.to(tl.float32)
        if of_scale is not None:
            total += tl.where(w < 0, -g, g).to(tl.float64)
        if scale is not None:
            g = (g * factor).to(kind).to(tl.float32)
        if ESTIMATOR == NONE:
            g = tl.zeros([BLOCK], tl.float32)  # also of NaN
        elif ESTIMATOR != IDENTITY:
            g = estimator_grad(g, w, clip, beta, ESTIMATOR)
        to = out + (row * rr + row_offset(c, inner, ro, ri))
        tl.store(to, g.to(out.dtype.element_ty), mask=ok)
        c += BLOCK
    if of_scale is not None:
        tl.store(of_scale + row, tl.sum(total, axis=0))


def _rows(grad, weight, out):
    """(grad, weight and out, or copies, outer, inner, strides of each): `collapse` by rows, in the
    order of `out`, which is dense."""
    same = weight.stride()
    if (grad.stride() == same == out.stride()
            and (weight.is_contiguous() or is_channels_last(weight))):
        columns = weight.numel() // weight.shape[0]  # neighbours, in one order in all three
        return (grad, weight, out), 1, columns, [(0, 1, columns)] * 3
    tensors = [grad, weight, out]
    order = sorted(range(1, out.dim()), key=lambda d: (-out.stride(d), d))
    tensors = [t.permute(0, *order) for t in tensors]
    found = collapse(0, *tensors)
    if found is None:
        *operands, to = tensors
        tensors = [*(torch.empty_like(to, dtype=t.dtype).copy_(t) for t in operands), to]
        found = collapse(0, *tensors)
    return tensors, *found


def latent_weight_grad(grad, weight, scale, estimator, clip, beta, scale_weight_grad, wants_scale):
    out, of_scale = fake(grad, weight, scale, estimator, clip, beta, scale_weight_grad,
                         wants_scale)
    if not weight.numel():
        return out, of_scale.zero_()
    tensors, outer, inner, strides = _rows(grad, weight, out)
    if clip is None and estimator == "ste_sign":
        estimator = "identity"
    factor = scale.contiguous() if scale is not None and scale_weight_grad else None
    launch(latent_weight_grad_kernel, (weight.shape[0], 1),
           (tensors[0], tensors[1], factor, tensors[2], of_scale if wants_scale else None,
            0.0 if clip is None else float(clip), float(beta), outer * inner,
            None if outer == 1 else inner, *(s for o, i, r in strides for s in (r, o, i))), (4,),
           ESTIMATOR=ESTIMATORS.get(estimator, -1), BLOCK=BLOCK, WIDE=wide(*tensors))
    return out, of_scale
