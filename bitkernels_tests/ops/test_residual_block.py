"""`binary_residual_block`: values and every gradient against the block composed in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from bitkernels_tests import oracles
from bitkernels_tests.cases import FORMATS, LAYOUTS, ConvCase, dyadic, reals

ops = torch.ops.bitkernels
block = ops.binary_residual_block.default
# Sums of float32 numbers: 2-norms over whole tensors. float64 differs by the order of its sums.
NEAR = {torch.float64: 1e-9, torch.float32: 1e-5}

VECTORS = ("norm_weight", "norm_bias", "shift_in", "slope", "shift_out")
AFFINE, RPRELU = VECTORS[:2], VECTORS[2:]
SAME = ConvCase(channels=40, out_channels=40, size=(7, 6))
DOWN = ConvCase(channels=40, out_channels=48, size=(7, 6), stride=(2, 2), batch=3)
# name -> (geometry, parts given, options)
BLOCKS = {
    "plain": (SAME, (), {}),
    "bireal": (SAME, AFFINE, dict(input_estimator="approx_sign")),
    "bireal_scaled": (SAME, (*AFFINE, "slope", "scale"),
                      dict(input_estimator="approx_sign", scale_weight_grad=False)),
    "reactnet": (SAME, ("sign_shift", *VECTORS, "scale"), dict(input_estimator="approx_sign")),
    "reactnet_ste": (SAME, ("sign_shift", *VECTORS), {}),
    "reactnet_down": (DOWN, ("residual", "sign_shift", *VECTORS, "scale"),
                      dict(input_estimator="approx_sign")),
    "down_ste": (DOWN, ("residual", *VECTORS), dict(input_clip=1.25)),
    "down_shift": (DOWN, ("residual", "sign_shift", *AFFINE), dict(input_clip=0.75)),
    "quicknet": (SAME, AFFINE, dict(relu=True, input_clip=1.25, weight_clip=1.25)),
    "quicknet_scaled": (SAME, (*AFFINE, "scale"), dict(relu=True)),
    "relu_rprelu": (DOWN, ("residual", *VECTORS), dict(relu=True, input_clip=None)),
    "prelu": (SAME, (*AFFINE, "slope"), dict(weight_clip=None)),
    "affine_off": (SAME, RPRELU, dict(input_estimator="identity")),
    "norm_bias": (SAME, ("norm_bias", "slope", "shift_out"), {}),
    "swish": (SAME, ("sign_shift", *VECTORS),
              dict(input_estimator="swish_sign", weight_estimator="swish_sign", beta=3.0)),
    "no_sign_gradient": (SAME, VECTORS, dict(input_estimator="none", weight_estimator="none")),
    "weight_identity": (DOWN, ("residual", "sign_shift", *AFFINE),
                        dict(input_estimator="swish_sign", weight_estimator="identity")),
    "groups": (ConvCase(channels=40, out_channels=48, groups=2, size=(5, 6)),
               ("residual", *VECTORS, "scale"), dict(input_estimator="approx_sign")),
    "depthwise": (ConvCase(channels=33, out_channels=33, groups=33), VECTORS, {}),
    "one_channel": (ConvCase(channels=1, out_channels=1, size=(8, 9)), VECTORS, {}),
    "padded_ones": (ConvCase(channels=40, out_channels=40, pad_value=1, dilation=(2, 1),
                             padding=(2, 1), size=(6, 6)), VECTORS, dict(relu=True)),
    "padded_minus": (ConvCase(channels=37, out_channels=19, pad_value=-1, stride=(2, 1),
                              padding=(1, 0, 2, 1), size=(6, 6)),
                     ("residual", "sign_shift", *VECTORS), {}),
    "uneven": (ConvCase(channels=37, out_channels=19, stride=(2, 1), padding=(1, 0, 2, 1),
                        size=(6, 6)), ("residual", *VECTORS), dict(input_estimator="approx_sign")),
    "pointwise": (ConvCase(channels=70, out_channels=33, kernel=(1, 1), padding=(0,)),
                  ("residual", *AFFINE), {}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def operands(case: ConvCase, parts, dtype=torch.float32, device="cpu") -> dict[str, torch.Tensor]:
    """Leaves for a block; shifts are dyadic, so that sums with exact inputs are exact."""
    cin, cout = case.channels, case.out_channels
    made = dict(
        input=lambda: reals(*case.input_shape), weight=lambda: reals(*case.weight_shape),
        residual=lambda: reals(*case.output_shape), sign_shift=lambda: dyadic(cin) / 8,
        norm_weight=lambda: reals(cout), norm_bias=lambda: torch.randn(cout),
        shift_in=lambda: dyadic(cout) / 8, slope=lambda: reals(cout),
        shift_out=lambda: reals(cout), scale=lambda: torch.rand(cout) + 0.1)
    return {name: make().to(device, dtype).requires_grad_()
            for name, make in made.items() if name in ("input", "weight", *parts)}


def call(case: ConvCase, tensors, **options):
    stride, padding, dilation, groups = case.args
    return block(**tensors, stride=stride, padding=padding, dilation=dilation, groups=groups,
                 pad_value=case.pad_value, **options)


def oracle(case: ConvCase, tensors, **options):
    leaves = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors.items()}
    return leaves, oracles.residual_block(**leaves, case=case, **options)


def assert_near(what: str, actual, expected, limit: float) -> None:
    """In the 2-norm; sums of terms near 1 may cancel, so no smaller scale than 1 counts."""
    distance = (actual.double() - expected).norm()
    assert distance <= limit * expected.norm().clamp_min(1.0), (what, distance, expected.norm())


def assert_matches(case: ConvCase, tensors, limit: float, **options) -> None:
    """Outputs and the gradient of every leaf are those of the float64 block, layer by layer."""
    if "scale" in tensors and "eps" not in options:
        options["eps"] = 10.0  # with little eps a norm cancels the scale, and its gradient is 0
    outputs = call(case, tensors, **options)
    leaves, expected = oracle(case, tensors, **options)
    for what, a, e in zip(("output", "mean", "variance"), outputs, expected, strict=True):
        assert a.shape == e.shape
        assert_near(what, a, e, limit)
    assert outputs[0].dtype == tensors["input"].dtype
    assert not outputs[1].requires_grad and not outputs[2].requires_grad
    grad = torch.randn(outputs[0].shape, dtype=torch.float64, device=outputs[0].device)
    outputs[0].backward(grad.to(outputs[0].dtype))
    expected[0].backward(grad.to(outputs[0].dtype).double())
    for name, t in tensors.items():
        if not t.requires_grad:
            assert t.grad is None, name
            continue
        wanted = leaves[name].grad
        if wanted is None or not wanted.any():
            assert t.grad is None or not t.grad.any(), name
            continue
        assert t.grad.dtype == t.dtype and t.grad.shape == t.shape
        assert_near(f"gradient of {name}", t.grad, wanted, limit)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_values_and_gradients(name, dtype, device):
    case, parts, options = BLOCKS[name]
    assert_matches(case, operands(case, parts, dtype, device), NEAR[dtype], **options)


@st.composite
def blocks(draw):
    """(geometry, parts, options, dtype) of any block."""
    def some(*values):
        return draw(st.sampled_from(values))

    # A float32 sum that cancels is near to its terms, not to itself: float32 gets more channels.
    dtype = some(*NEAR)
    channels = (16, 31, 33) if dtype == torch.float32 else (3, 5, 16, 31, 33)
    groups = some(1, 1, 2, 3)
    kernel = (some(1, 2, 3), some(1, 3))
    case = ConvCase(
        channels=groups * some(*channels), out_channels=groups * some(*channels),
        size=(draw(st.integers(3, 8)), draw(st.integers(3, 8))), kernel=kernel,
        stride=(some(1, 2), some(1, 2, 3)), padding=some((0,), (1,), (1, 0), (0, 2, 1, 0)),
        dilation=(some(1, 2), 1), groups=groups, pad_value=some(-1, 0, 0, 1),
        batch=draw(st.integers(1, 4)))
    n, _, height, width = case.output_shape
    # Of fewer values, or with little eps of few products, a norm leaves a gradient of rounding.
    assume(height > 0 and width > 0 and n * height * width >= 8)
    parts = [p for p in ("residual", "sign_shift", *AFFINE, "scale") if draw(st.booleans())]
    if draw(st.booleans()):
        # Without a bias, a mean dot product on a residual of 0 is 0 but for rounding: a kink.
        parts += ["slope", *(p for p in ("shift_in", "shift_out") if draw(st.booleans()))]
        parts += ["norm_bias"] * ("norm_bias" not in parts)
    if case.input_shape != case.output_shape and "residual" not in parts:
        parts.append("residual")
    estimators = ("ste_sign", "approx_sign", "swish_sign", "identity", "none")
    options = dict(relu=draw(st.booleans()), eps=some(1.0, 30.0),
                   input_estimator=some(*estimators), weight_estimator=some(*estimators),
                   input_clip=some(1.0, 0.5, None), weight_clip=some(1.0, 2.0, None),
                   beta=some(5.0, 2.0), scale_weight_grad=draw(st.booleans()))
    return case, tuple(parts), options, dtype


# The float32 examples are always the same ones: rounding next to a kink is rare, but it happens.
@settings(max_examples=150, deadline=None, derandomize=True)
@given(blocks())
def test_generated_blocks(generated):
    case, parts, options, dtype = generated
    torch.manual_seed(5)
    assert_matches(case, operands(case, parts, dtype), NEAR[dtype], **options)


@pytest.mark.parametrize("name", ["reactnet_down", "quicknet_scaled"])
def test_frozen_parameters(name):
    """Each one alone and each one left out: its gradient is there exactly where it is asked for."""
    case, parts, options = BLOCKS[name]
    names = list(operands(case, parts))
    for wanted in [{n} for n in names] + [set(names) - {n} for n in names]:
        tensors = {n: t.detach().requires_grad_(n in wanted)
                   for n, t in operands(case, parts).items()}
        assert_matches(case, tensors, 1e-5, **options)


@pytest.mark.parametrize("name", ["reactnet", "reactnet_down", "quicknet", "down_ste"])
def test_values_without_gradients_are_the_same(name):
    case, parts, options = BLOCKS[name]
    tensors = operands(case, parts)
    expected = call(case, tensors, **options)
    with torch.no_grad():
        assert all(map(torch.equal, call(case, tensors, **options), expected))
    with torch.inference_mode():
        assert all(map(torch.equal, call(case, tensors, **options), expected))


@pytest.mark.parametrize("values", [(0.0,), (-0.5,), (0.0, -0.0, -2.0, 0.25, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_slopes_that_cannot_be_inverted(values, dtype):
    """Nothing is recovered from the output, so a slope may be 0 or negative."""
    tensors = operands(SAME, VECTORS, dtype)
    with torch.no_grad():
        tensors["slope"].copy_(torch.tensor(values).repeat(40)[:40])
    assert_matches(SAME, tensors, NEAR[dtype])
    assert tensors["slope"].grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["reactnet", "quicknet", "down_shift", "swish"])
def test_half_precision_streams(name, dtype):
    """One rounding of every output, arithmetic in float32 between."""
    case, parts, options = BLOCKS[name]
    tensors = operands(case, parts)
    for n in ("input", "residual"):
        if n in tensors:
            tensors[n] = tensors[n].detach().to(dtype).requires_grad_()
    unit = torch.finfo(dtype).eps
    # Outputs: half a unit each, whose 2-norm is half a unit of the whole. Gradients: the gradient
    # of the dot product is rounded too, and sums of its roundings stay below a few units.
    options = options | dict(eps=10.0)
    out, mean, variance = call(case, tensors, **options)
    leaves, expected = oracle(case, tensors, **options)
    assert out.dtype == dtype and mean.dtype == variance.dtype == torch.float32
    assert_near("output", out, expected[0], unit / 2 + 1e-5)
    assert_near("mean", mean, expected[1], 1e-5)
    assert_near("variance", variance, expected[2], 1e-5)
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    expected[0].backward(grad.double())
    for n, t in tensors.items():
        assert t.grad.dtype == t.dtype
        assert_near(f"gradient of {n}", t.grad, leaves[n].grad, 4 * unit)


@pytest.mark.parametrize("name", ["reactnet", "reactnet_down"])
def test_autocast_rounds_the_gradient_of_the_convolution_alone(name):
    case, parts, options = BLOCKS[name]
    plain = operands(case, parts)
    cast = {n: t.detach().clone().requires_grad_() for n, t in plain.items()}
    expected = call(case, plain, **options)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(case, cast, **options)
    assert all(map(torch.equal, out, expected))
    grad = torch.randn(out[0].shape)
    expected[0].backward(grad)
    out[0].backward(grad)
    for n in ("residual", *VECTORS):
        if n in plain:
            assert torch.equal(cast[n].grad, plain[n].grad), n
    for n in ("input", "weight"):
        assert not torch.equal(cast[n].grad, plain[n].grad)
        assert_near(n, cast[n].grad, plain[n].grad.double(), 4 * 2**-8)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "offset"])
@pytest.mark.parametrize("name", ["reactnet", "reactnet_down", "quicknet"])
def test_any_layout_is_the_same_block(name, layout):
    """Bit for bit, but for the gradients that PyTorch's convolution and our sums add up."""
    case, parts, options = BLOCKS[name]
    results = []
    for change in (LAYOUTS["contiguous"], LAYOUTS[layout]):
        torch.manual_seed(3)
        tensors = operands(case, parts)
        for n in ("input", "weight", "residual"):
            if n in tensors:
                tensors[n] = change(tensors[n].detach()).requires_grad_()
        out = call(case, tensors, **options)
        assert out[0].is_contiguous(memory_format=torch.channels_last)
        torch.manual_seed(4)
        (out[0] * change(torch.randn(out[0].shape))).sum().backward()
        results.append((out, {n: t.grad for n, t in tensors.items()}))
    (a, a_grads), (b, b_grads) = results
    assert all(map(torch.equal, a, b))
    for n in a_grads:
        assert_near(n, b_grads[n], a_grads[n].double(), 1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_images_have_their_memory_format(name, format, device):
    case, parts, options = BLOCKS[name]
    tensors = operands(case, parts, device=device)
    for which in {"input", "residual"} & tensors.keys():
        t = tensors[which].detach().contiguous(memory_format=format)
        tensors[which] = t.requires_grad_()
    for grad_format in FORMATS:
        out = call(case, tensors, **options)[0]
        grad = torch.randn(out.shape, device=device).contiguous(memory_format=grad_format)
        images = {n: t for n, t in tensors.items() if n in ("input", "residual")}
        grads = torch.autograd.grad(out, list(images.values()), grad, allow_unused=True)
        for (which, t), got in zip(images.items(), grads, strict=True):
            assert got is None or got.stride() == t.stride(), which


def test_small_gradients_are_not_lost_in_half_precision():
    """Times a scale of 2^-10 they would leave float16's normal numbers."""
    case, parts = SAME, (*AFFINE, "scale")
    plain = operands(case, parts, torch.float64)
    plain["scale"] = torch.full_like(plain["scale"], 2**-10, requires_grad=False)
    half = {n: t.detach().float().requires_grad_(t.requires_grad) for n, t in plain.items()}
    grad = torch.randn(case.output_shape, dtype=torch.float64) * 1e-5
    call(case, plain)[0].backward(grad)
    call(case, half, dtype=torch.float16)[0].backward(grad.float())
    expected = plain["weight"].grad
    distance = (half["weight"].grad.double() - expected).norm()
    assert distance <= 4 * torch.finfo(torch.float16).eps * expected.norm()


@pytest.mark.parametrize("name", ["reactnet", "reactnet_down"])
def test_non_finite_streams(name):
    """NaN and the infinities stay where the layers leave them, and everything else is right."""
    case, parts, options = BLOCKS[name]
    options = options | dict(eps=10.0)
    tensors = operands(case, parts)
    nan, inf = float("nan"), float("inf")
    with torch.no_grad():
        for n in ("input", "residual"):
            if n in tensors:
                tensors[n][0, :3, 0, 0] = torch.tensor([nan, inf, -inf])
    out = call(case, tensors, **options)
    leaves, expected = oracle(case, tensors, **options)
    grad = torch.randn(out[0].shape)
    out[0].backward(grad)
    expected[0].backward(grad.double())
    pairs = {"output": (out[0], expected[0])} | {
        f"gradient of {n}": (t.grad, leaves[n].grad) for n, t in tensors.items()}
    for what, (a, e) in pairs.items():
        finite = e.isfinite()
        assert torch.equal(a[~finite].double().nan_to_num(9), e[~finite].nan_to_num(9)), what
        assert_near(what, torch.where(finite, a, 0), torch.where(finite, e, 0), 1e-5)
    assert not out[0].isfinite().all() and not tensors["slope"].grad.isfinite().all()


def grads_of(function, tensors) -> dict:
    """Gradients of every leaf under a function of the operator's output."""
    for t in tensors.values():
        t.grad = None
    function().backward()
    return {n: t.grad for n, t in tensors.items()}


def weighted(out):
    return (out * torch.arange(out.numel()).view_as(out).cos()).sum()


def test_double_use_of_the_output():
    """Two readers of one output: their gradients add up, in the block and in what it kept."""
    case, parts, options = BLOCKS["reactnet"]
    tensors = operands(case, parts)

    def twice():
        first = call(case, tensors, **options)[0]
        second = call(case, tensors | {"input": first}, **options)[0]
        return weighted(first * second)

    grads = grads_of(twice, tensors)
    leaves = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    first = oracles.residual_block(**leaves, case=case, **options)[0]
    second = oracles.residual_block(**leaves | {"input": first}, case=case, **options)[0]
    weighted(first * second).backward()
    for n in tensors:
        if n != "scale":  # the norm leaves nothing of its gradient
            assert_near(n, grads[n], leaves[n].grad, 3e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    case, parts, options = BLOCKS["reactnet_down"]
    tensors = operands(case, parts)
    names = list(tensors)

    def run(*values):
        return call(case, dict(zip(names, values, strict=True)), **options)[0]

    plain = grads_of(lambda: weighted(run(*tensors.values())), tensors)
    again = grads_of(lambda: weighted(checkpoint(run, *tensors.values(), use_reentrant=reentrant)),
                     tensors)
    for n in names:
        assert torch.equal(again[n], plain[n]), n


@pytest.mark.parametrize("name", ["reactnet", "quicknet", "reactnet_down"])
def test_threads_do_not_change_a_bit(name):
    """Enough rows for many tasks; PyTorch's own convolution backward is left out."""
    case, parts, options = BLOCKS[name]
    case = ConvCase(**{**case.__dict__, "size": (31, 33), "batch": 4})
    tensors = operands(case, parts)
    tensors["weight"].requires_grad_(False)
    options = options | dict(input_estimator="none")
    stream = "residual" if "residual" in tensors else "input"
    wanted = [n for n in (stream, *VECTORS) if n in tensors]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        outputs = call(case, tensors, **options)
        grads = torch.autograd.grad(weighted(outputs[0]), [tensors[n] for n in wanted])
        results.append((*outputs, *grads))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def saved_bytes(function, parameters) -> dict[torch.dtype, int]:
    """Bytes kept for the backward by type, each storage once, parameters apart."""
    own = {t.untyped_storage().data_ptr() for t in parameters}
    kept: dict[int, tuple] = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = t.dtype, storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = function()
    del out
    totals: dict[torch.dtype, int] = {}
    for dtype, size in kept.values():
        totals[dtype] = totals.get(dtype, 0) + size
    return totals


@pytest.mark.parametrize("name, words, streams", [
    ("reactnet", 1, 1),    # signs; the stream, which is the input and tells |x|
    ("prelu", 1, 1),       # the same: the clip's mask is read off the stream
    ("bireal", 1, 1),      # no activation, but an estimator of |x|
    ("down_ste", 2, 1),    # signs and the clip's mask; the residual
    ("quicknet", 2, 0), ("down_shift", 2, 0), ("plain", 2, 0),
    ("weight_identity", 1, 1), ("affine_off", 1, 1)])
def test_what_is_kept_for_the_backward(name, words, streams):
    case, parts, options = BLOCKS[name]
    case = ConvCase(size=(16, 16), channels=64, out_channels=64)
    tensors = operands(case, parts)
    parameters = [t for n, t in tensors.items() if n not in ("input", "residual")]
    kept = saved_bytes(lambda: call(case, tensors, **options), parameters)
    elements = tensors["input"].numel()
    assert kept.pop(torch.int32) == (words * elements + tensors["weight"].numel()) // 8
    # The rest are statistics: some vectors of the channels in float64.
    assert kept.pop(torch.float64) <= 8 * 8 * 64
    assert kept == ({torch.float32: 4 * elements} if streams else {})
