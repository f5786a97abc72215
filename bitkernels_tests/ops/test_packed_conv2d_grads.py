"""packed_conv2d_input_grad and _weight_grad: real gradients of a convolution from bits, against
PyTorch's backward in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bitkernels.ops._record import OPERATORS
from bitkernels_tests.cases import ConvCase, reals, words_of

ops = torch.ops.bitkernels

CASES = (
    ConvCase(channels=40, out_channels=20, size=(7, 6)),
    ConvCase(channels=33, out_channels=17, size=(8, 5), padding=(1, 2, 0, 1)),
    ConvCase(channels=32, out_channels=64, size=(10, 10), padding=(2, 2), dilation=(2, 1)),
    ConvCase(channels=70, out_channels=48, size=(5, 40), kernel=(1, 1), padding=(0, 0)),
    ConvCase(channels=16, out_channels=16, size=(8, 8), kernel=(5, 3), padding=(2, 1), batch=3),
    ConvCase(channels=3, out_channels=5, size=(13, 13), kernel=(7, 6), padding=(3, 7)),
    ConvCase(channels=64, out_channels=33, size=(9, 40), padding=(0, 1), batch=1),
)
STRIDED = (
    ConvCase(channels=64, out_channels=64, size=(9, 9), stride=(2, 2)),
    ConvCase(channels=40, out_channels=20, size=(8, 6), stride=(1, 3), padding=(0, 1)),
)
TYPES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def grad_of(case: ConvCase, **kw):
    return reals(*case.output_shape, **kw)


def padded(x, case, value):
    top, bottom, left, right = case.pad4
    return F.pad(x, (left, right, top, bottom), value=float(value))


def close(a, b, limit):
    return bool((a.double() - b).norm() <= limit * b.norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pad_value", (0, 1, -1))
@pytest.mark.parametrize("case", CASES + STRIDED, ids=str)
def test_weight_grad(case, pad_value, dtype, device):
    x, _ = case.reals(device=device)
    grad = grad_of(case, device=device).to(dtype)
    words = ops.sign_pack(x, None, 1)
    out = ops.packed_conv2d_weight_grad(grad, words, case.channels, case.kernel, case.stride,
                                        case.padding, case.dilation, pad_value)
    signs = padded(ops.unpack(words, case.channels, torch.float64, 1), case, pad_value)
    weight = torch.zeros(case.weight_shape, dtype=torch.float64, device=device).requires_grad_()
    F.conv2d(signs, weight, None, case.stride, 0, case.dilation).backward(grad.double())
    assert out.dtype == torch.float32 and close(out, weight.grad, 2e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_grad(case, scaled, dtype, device):
    grad = grad_of(case, device=device).to(dtype)
    weight_words = words_of(case.out_channels, *case.kernel, case.channels, device=device)
    scale = reals(case.out_channels, device=device) if scaled else None
    out = ops.packed_conv2d_input_grad(grad, weight_words, case.channels, scale, case.size,
                                       case.padding, case.dilation)
    weight = ops.unpack(weight_words, case.channels, torch.float64, 1)
    if scaled:
        weight = weight * scale.double().view(-1, 1, 1, 1)
    x = torch.zeros(case.input_shape, dtype=torch.float64, device=device).requires_grad_()
    F.conv2d(padded(x, case, 0), weight, None, 1, 0, case.dilation).backward(grad.double())
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert close(out, x.grad, TYPES[dtype])


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_gradients_of_any_layout_and_of_an_empty_batch(case, device):
    x, w = case.reals(device=device)
    words, weight_words = ops.sign_pack(x, None, 1), ops.sign_pack(w, None, 1)
    rest = case.padding, case.dilation

    def both(grad, words):
        return (ops.packed_conv2d_weight_grad(grad, words, case.channels, case.kernel, (1,), *rest),
                ops.packed_conv2d_input_grad(grad, weight_words, case.channels, None, case.size,
                                             *rest))

    grad = grad_of(case, device=device)
    wide = torch.stack([grad, grad], -1)[..., 0]
    for other in (grad.to(memory_format=torch.channels_last), wide):
        assert all(map(torch.equal, both(grad, words), both(other, words)))
    weight_grad, input_grad = both(grad[:0], words[:0])
    assert not weight_grad.any() and input_grad.shape == (0, *case.input_shape[1:])


def test_the_number_of_threads_does_not_matter(keeps_threads):
    case = ConvCase(channels=96, out_channels=80, size=(20, 20), batch=3)
    x, w = case.reals(device="cpu")
    grad = grad_of(case, device="cpu")
    words, weight_words = ops.sign_pack(x, None, 1), ops.sign_pack(w, None, 1)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((
            ops.packed_conv2d_weight_grad(grad, words, 96, (3,), (1,), (1,)),
            ops.packed_conv2d_input_grad(grad, weight_words, 96, None, (20, 20), (1,))))
    assert all(map(torch.equal, *results))


def wrong_weight_grad(text, **kw):
    given = dict(grad=torch.zeros(2, 8, 5, 6), words=torch.zeros(2, 5, 6, 2, dtype=torch.int32),
                 channels=40, kernel_size=(3, 3), stride=(1,), padding=(1,), dilation=(1,),
                 pad_value=0)
    return "packed_conv2d_weight_grad", text, tuple((given | kw).values())


def wrong_input_grad(text, **kw):
    given = dict(grad=torch.zeros(2, 8, 5, 6),
                 weight_words=torch.zeros(8, 3, 3, 2, dtype=torch.int32), channels=40, scale=None,
                 input_size=(5, 6), padding=(1,), dilation=(1,))
    return "packed_conv2d_input_grad", text, tuple((given | kw).values())


REAL_GRAD = "grad must be float32, float16 or bfloat16 of shape (N, Cout, OH, OW), got "
WRONG = [make(text, **kw) for make in (wrong_weight_grad, wrong_input_grad) for text, kw in (
    (REAL_GRAD + "float64 of shape (2, 8, 5, 6)",
     dict(grad=torch.zeros(2, 8, 5, 6, dtype=torch.float64))),
    ("grad must be of shape (2, 8, 5, 6), got float32 of shape (2, 8, 6, 5)",
     dict(grad=torch.zeros(2, 8, 6, 5))),
    ("dilation must be at least 1, got [0]", dict(dilation=[0])),
    ("padding must be at least 0, got [-1]", dict(padding=[-1])),
    ("kernel must be at most the padded input size 7, got a reach of 9", dict(dilation=[4])))
] + [
    wrong_weight_grad(REAL_GRAD + "float32 of shape (8, 5, 6)", grad=torch.zeros(8, 5, 6)),
    wrong_weight_grad("words must be 1 words wide for 32 channels, got int32 of shape (2, 5, 6, 2)",
                      channels=32),
    wrong_weight_grad("pad_value must be -1, 0 or 1, got 2", pad_value=2),
    wrong_weight_grad("kernel_size must be at least 1, got [3, 0]", kernel_size=[3, 0]),
    wrong_weight_grad("stride must be one or two integers, got [1, 1, 1]", stride=[1, 1, 1]),
    wrong_input_grad("grad must be of shape (N, 8, OH, OW), got float32 of shape (2, 7, 5, 6)",
                     grad=torch.zeros(2, 7, 5, 6)),
    wrong_input_grad("scale must be of shape (8,), got float32 of shape (7,)",
                     scale=torch.zeros(7)),
    wrong_input_grad("input_size must be at least 1, got [0, 6]", input_size=[0, 6]),
    wrong_input_grad(
        "weight_words must be int32 words, got float32 of shape (8, 3, 3, 2)",
        weight_words=torch.zeros(8, 3, 3, 2)),
]


@pytest.mark.parametrize("name,text,args", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_arguments(name, text, args):
    """The operator, the fake one and the launcher in Python say the same."""
    def meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def reached(op, *args, **kw):
        pytest.fail(f"{op} runs")

    op = getattr(ops, name)
    for call in (lambda: op(*args), lambda: op(*map(meta, args)),
                 lambda: OPERATORS[name].launcher(reached)(*args)):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == f"bitkernels::{name}: {text}"
