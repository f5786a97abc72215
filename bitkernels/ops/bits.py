"""Packing and unpacking of signs, and what works on words alone."""

TEXTS = {
    "sign_pack": """
Words of sign(input + shift), 32 signs to an int32, along a dimension, which becomes the last.

Bit 1 is +1, and a value is +1 unless it is below 0: 0, -0.0 and NaN are +1. Least significant bit
first; bits past the last channel are 0.

Arguments:
  input: float32, float16, bfloat16 or float64, any shape and memory format.
  shift: real, added before the sign: (C,), one number a channel; or one a channel of each sample,
    of the input's rank, N in dimension 0, C in dim and 1 elsewhere, which takes a dim that is not
    0; None: none.
  dim: the dimension of the channels, which becomes the last.
Returns:
  int32, the shape of input with dim moved to the end and divided by 32, rounded up.
Errors:
  an integer input, a dim that is not there, no channel, a shift of another shape or device; an
  input that requires a gradient, of which there is none: use rsign or detach it.
Example:
  >>> ops.sign_pack(torch.tensor([[-1.0, 1.0, 0.0]])).tolist()
  [[6]]
  >>> ops.sign_pack(torch.randn(2, 40, 5, 5), dim=1).shape
  torch.Size([2, 5, 5, 2])
""",
    "sign_pack_mask": """
Words of sign(input + shift), and of the mask of the straight-through estimator, in one pass.

Arguments:
  input: as of sign_pack.
  clip: at least 0; the mask is 1 where |input + shift| <= clip.
  shift: as of sign_pack.
  dim: as of sign_pack.
Returns:
  (signs, mask), both as sign_pack's result.
Errors:
  those of sign_pack; a clip below 0 or NaN.
Example:
  >>> signs, mask = ops.sign_pack_mask(torch.tensor([[-2.0, 0.5, 3.0]]), 1.0)
  >>> signs.item(), mask.item()
  (6, 2)
""",
    "mask_grad": """
A gradient where its bit of a mask is set, else 0: the backward of a clipped straight-through sign.

Arguments:
  grad: float32, float16, bfloat16 or float64.
  mask_words: int32, from sign_pack_mask: the shape of grad with dim moved to the end and packed.
  dim: the dimension of grad that is packed in the mask.
Returns:
  the shape and dtype of grad.
Errors:
  a mask of another shape or type, a dim that is not there; a grad that requires a gradient.
Example:
  >>> _, mask = ops.sign_pack_mask(torch.tensor([[-2.0, 0.5, 3.0]]), 1.0)
  >>> ops.mask_grad(torch.ones(1, 3), mask).tolist()
  [[0.0, 1.0, 0.0]]
""",
    "unpack": """
Words to -1 and +1, the opposite of sign_pack.

Arguments:
  words: int32 (..., ceil(channels / 32)).
  channels: the number of real channels, at least 1.
  dtype: float32, float16, bfloat16 or float64.
  dim: where the channels go in the result; they stay innermost in memory.
Returns:
  dtype, (..., channels) with the last dimension moved to dim.
Errors:
  words that are not int32 or not as wide as channels ask for, another dtype, a dim that is not
  there.
Example:
  >>> ops.unpack(torch.tensor([[6]], dtype=torch.int32), 3).tolist()
  [[-1.0, 1.0, 1.0]]
""",
    "tile_weight": """
Packed filters in the layout that the CPU kernels read: 16 output channels innermost.

The packed operators take both forms. Tiled filters save a rearrangement a call on CPUs; each group
is filled up with zero rows to a multiple of 16, so out_channels must then be given.

Arguments:
  weight_words: int32 (Cout, kh, kw, words) or (Cout, words).
  groups: of the convolution, a divisor of Cout.
Returns:
  int32 (tiles, kh, kw, words, 16) or (tiles, words, 16).
Errors:
  weight_words of another type or rank, groups that do not divide Cout.
Example:
  >>> ops.tile_weight(torch.zeros(40, 3, 3, 2, dtype=torch.int32)).shape
  torch.Size([3, 3, 3, 2, 16])
""",
    "packed_max_pool2d": """
Maximum of signs in each window, on words: the or of bits. The result is packed again.

Arguments:
  words: int32 (N, H, W, words).
  kernel_size: one or two integers, at least 1.
  stride: one or two; (): as kernel_size.
  padding: at least 0, at most half of kernel_size; it never wins.
  dilation: at least 1.
  ceil_mode: round the output's size up, as nn.MaxPool2d.
Returns:
  int32 (N, OH, OW, words).
Errors:
  words of another type or rank, sizes out of range, a window larger than the padded image.
Example:
  >>> words = ops.sign_pack(torch.randn(1, 64, 8, 8), dim=1)
  >>> ops.packed_max_pool2d(words, 2).shape
  torch.Size([1, 4, 4, 2])
""",
}
