"""`bitkernels.explain`: every layer, every backend, and no trace of the question."""

from __future__ import annotations

import json
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bitkernels
from bitkernels import nn as bnn
from bitkernels.backends import cpu, gpus
from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.triton import dispatch as triton
from bitkernels.explain import FUSED, Call, Layer

ops = torch.ops.bitkernels
CPU_KERNEL = ("reference", "PyTorch") if cpu.why_not else ("cpu", cpu.active())
VARIABLES = ("BITKERNELS_CUDA", "BITKERNELS_CUDA_KERNEL", "BITKERNELS_TRITON",
             "BITKERNELS_TRITON_INNER", "BITKERNELS_TRITON_AUTOTUNE")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for backend in (cuda, triton):
        backend.clear()
    yield
    for backend in (cuda, triton):
        backend.clear()


def words(*shape: int) -> torch.Tensor:
    return torch.empty(*shape[:-1], -(-shape[-1] // 32), dtype=torch.int32, device="meta")


def conv(channels=256, size=14, batch=256, kernel=3):
    return (words(batch, size, size, channels), words(channels, kernel, kernel, channels), channels)


def only(found) -> Call:
    (layer,) = found.layers
    (call,) = layer.calls
    return call


def kernel(found) -> str:
    call = only(found)
    return f"{call.backend}: {call.kernel}"


def small() -> nn.Sequential:
    torch.manual_seed(1)
    block = bnn.BinaryResidualBlock(bnn.BinaryConv2d(64, 64, 3, padding=1, bias=False),
                                    nn.BatchNorm2d(64), act=bnn.RPReLU(64))
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.Dropout(0.5), block, bnn.RSign(64),
                         bnn.BinaryConv2d(64, 32, 1), nn.Flatten(),
                         bnn.BinaryLinear(32 * 36, 10))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def operators(layer: Layer) -> list[str]:
    return [call.operator for call in layer.calls]


# Whole models.


def test_each_layer_of_a_model_in_evaluation():
    model = small().eval()
    with torch.no_grad():
        found = bitkernels.explain(model, IMAGES)
    by_name = {layer.name: layer for layer in found}
    assert list(by_name) == ["0", "2", "3", "4", "6"] and found.target == "cpu"
    assert [layer.form for layer in found] == ["real", "latent", "", "latent", "latent"]
    assert by_name["0"].calls[0].backend == "pytorch"
    assert by_name["2"].note == FUSED and by_name["2"].kind == "BinaryResidualBlock"
    assert operators(by_name["2"]) == ["sign_pack", "sign_pack", "packed_conv2d"]
    assert operators(by_name["3"]) == ["rsign"]
    assert operators(by_name["6"]) == ["sign_pack", "sign_pack", "packed_linear"]
    assert {(c.backend, c.kernel) for layer in found for c in layer.calls} == {
        CPU_KERNEL, ("pytorch", "the library's")}


def test_in_training_with_gradients():
    found = {layer.name: layer for layer in bitkernels.explain(small().train(), IMAGES)}
    assert operators(found["2"])[-2:] == ["packed_conv2d_moments", "residual_block_forward"]
    assert found["2"].note == FUSED
    assert "rsign" in operators(found["3"])


def test_packed_layers():
    model = bnn.pack(small().eval())
    with torch.no_grad():
        found = {layer.name: layer for layer in bitkernels.explain(model, IMAGES)}
    assert {found[name].form for name in ("2", "4", "6")} == {"packed"}
    assert operators(found["4"]) == ["sign_pack", "packed_conv2d"]


def test_a_block_that_is_not_one_operator_says_why():
    model = small().eval()
    model[2].conv.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        found = {layer.name: layer for layer in bitkernels.explain(model, IMAGES)}
    assert found["2"].note == "separate layers: conv has hooks" and not found["2"].calls
    assert found["2.conv"].calls and found["2.act"].calls
    # What the model does, not what a question about it would change.
    found = {layer.name: layer for layer in bitkernels.explain(small().eval(), IMAGES)}
    assert found["2"].note == "separate layers: gradients with running statistics"


def test_a_shortcut_of_another_type():
    class Half(nn.Module):
        def forward(self, x):
            return x.half()

    model = small().eval()
    model[2].shortcut = Half()
    with torch.no_grad():
        found = {layer.name: layer for layer in bitkernels.explain(model, IMAGES)}
    assert found["2"].note == "separate layers: the shortcut's output is of another type"


def test_a_converted_model_is_a_graph_on_bits():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), bnn.BinaryConv2d(64, 32, 1)).eval()
    network = bitkernels.convert(model, IMAGES)
    whole, layer = bitkernels.explain(network, IMAGES)
    assert whole.kind == "Converted" and ("C++ engine runs" in whole.note) == (
        not isinstance(network.engine(IMAGES), str))
    assert (layer.name, layer.form) == ("graph_module", "packed")
    assert "real operators" in layer.note and operators(layer) == ["sign_pack", "packed_conv2d"]


def test_a_binary_layer_on_real_numbers():
    layer = bnn.BinaryConv2d(8, 8, 3, input_quantizer="ste_tern")
    found = next(iter(bitkernels.explain(layer, torch.randn(1, 8, 5, 5))))
    assert (found.name, found.form) == ("", "real")
    assert "do not both return -1 and +1" in found.note and found.calls[0].backend == "pytorch"


def test_the_question_leaves_no_trace():
    model = small().train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    draw = (lambda: torch.rand(3).tolist()), random.random, np.random.random
    expected = [f() for f in draw]
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    call = nn.Module.__call__
    bitkernels.explain(model, IMAGES)
    assert [f() for f in draw] == expected
    assert nn.Module.__call__ is call
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == attributes
    assert all(p.grad is None for p in model.parameters())


def test_an_error_of_the_model_is_its_own_and_nothing_stays_patched():
    call = nn.Module.__call__
    with pytest.raises(RuntimeError, match="expected input"):
        bitkernels.explain(small(), torch.randn(1, 5, 8, 8))
    assert nn.Module.__call__ is call


def test_models_of_other_threads_are_not_listed():
    other, ran = nn.Sequential(bnn.BinaryLinear(32, 8)), []

    class Waits(nn.Module):
        def forward(self, x):
            thread = threading.Thread(target=lambda: ran.append(other(torch.randn(2, 32))))
            thread.start()
            thread.join()
            return x

    model = nn.Sequential(Waits(), bnn.BinaryLinear(32, 4))
    assert [layer.name for layer in bitkernels.explain(model, torch.randn(1, 32))] == ["1"]
    assert ran[0].shape == (2, 8)


def test_a_compiled_model_is_explained_as_it_was_written():
    model = small().eval()
    with torch.no_grad():
        found = bitkernels.explain(torch.compile(model), IMAGES)
        assert found == bitkernels.explain(model, IMAGES)


def test_a_model_that_cannot_be_copied():
    model = small()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="works on a deep copy, and this Sequential has none"):
        bitkernels.explain(model, IMAGES)


def test_a_model_on_meta_is_planned_for_a_gpu():
    model = bnn.pack(small().eval()).to("meta")
    images = torch.empty(2, 3, 8, 8, device="meta")
    with torch.no_grad():
        found = {x.name: x for x in bitkernels.explain(model, images, target="sm_90")}
        assert found["4"].calls[-1].backend == "triton"
        with pytest.raises(ValueError, match="target='cpu' or a GPU's"):
            bitkernels.explain(model, images)


# Operators.


def test_a_call_on_the_cpu():
    x = torch.randn(2, 64, 5, 5)
    for given in ("sign_pack", "bitkernels::sign_pack", ops.sign_pack, ops.sign_pack.default):
        assert kernel(bitkernels.explain(given, x, dim=1)) == ": ".join(CPU_KERNEL)
    call = only(bitkernels.explain("packed_conv2d.packed", *conv(), padding=1, target="cpu"))
    assert (call.operator, call.backend) == ("packed_conv2d.packed", CPU_KERNEL[0])


def test_a_device_without_a_backend():
    answer = bitkernels.backends.explain("sign_pack", torch.zeros(1, 3), device="mps")
    assert answer.backend == "reference"
    assert "no other backend has sign_pack for mps" in answer.reason
    x = torch.empty(2, 64, 5, 5, device="meta")
    call = only(bitkernels.explain("packed_conv2d_weight_grad", x, words(2, 5, 5, 64), 64, 1,
                                   target="sm_90"))
    assert call.backend == "reference" and "no other backend" in call.reason


@pytest.mark.skipif(bool(cpu.why_not), reason="the engine is off")
def test_what_names_the_cpu_kernel(monkeypatch):
    monkeypatch.delenv("BITKERNELS_CPU", raising=False)
    x = torch.randn(2, 64)
    assert "the best" in only(bitkernels.explain("sign_pack", x)).reason
    monkeypatch.setattr(cpu, "why_not", "the extension bitkernels._C is not built")
    call = only(bitkernels.explain("sign_pack", x))
    assert call.backend == "reference" and "not cpu: the extension" in call.reason


@pytest.mark.parametrize("target,expected", [
    ("sm_70", "reference: PyTorch"), ("sm_80", "triton: b1 128x64"),
    ("sm_90", "cuda: resident"), ("sm_90a", "cuda: resident"),  # which one, a GPU's run says
    ("sm_100", "triton: int8 128x64"), ("hip", "triton: int8 128x64")])
def test_what_a_gpu_would_run(target, expected):
    """None of these is here; the table of measured kernels is of sm_90."""
    found = bitkernels.explain("packed_conv2d", *conv(), padding=1, target=target)
    assert kernel(found) == expected or expected == "cuda: resident" and kernel(
        found).startswith(expected)
    assert not gpus.planned()


def test_why_a_gpu_would_run_it():
    def reason(target, *args, **kw):
        return only(bitkernels.explain("packed_conv2d", *args, padding=1, target=target, **kw)
                    ).reason

    assert "measured near this shape" in reason("sm_90", *conv())
    assert "BITKERNELS_CUDA=1 opts in" in reason("sm_80", *conv())
    assert "no 1-bit tensor core" in reason("sm_100", *conv())
    assert "few products" in reason("sm_90", *conv(batch=1, channels=32))
    grouped = words(64, 14, 14, 256), words(256, 3, 3, 16), 256
    said = reason("sm_90", *grouped, groups=16)
    assert "groups that split words" in said and "do not take groups" in said
    first, filters, channels = conv()
    assert "an output without channels" in reason("sm_90", first, filters[:0], channels)
    said = reason("sm_90", *conv(), dtype=torch.float64)
    assert said.startswith("plain PyTorch, slow; not cuda: these kernels do not take float64; "
                           "not triton: the kernels do not take float64")


def test_variables_are_part_of_the_reason(monkeypatch):
    def found():
        return only(bitkernels.explain("packed_conv2d", *conv(), padding=1, target="sm_90"))

    monkeypatch.setenv("BITKERNELS_CUDA", "0")
    monkeypatch.setenv("BITKERNELS_TRITON_AUTOTUNE", "1")
    assert found().kernel == "b1" and "BITKERNELS_CUDA is 0" in found().reason
    assert "the fastest of 3 tiles" in found().reason
    monkeypatch.delenv("BITKERNELS_TRITON_AUTOTUNE")
    assert found().kernel == "b1 32x64", "not large"
    monkeypatch.setenv("BITKERNELS_TRITON_AUTOTUNE", "0")
    assert found().kernel == "b1 32x64"
    monkeypatch.setenv("BITKERNELS_TRITON_INNER", "popc")
    assert found().kernel == "popc 32x32" and "INNER names it" in found().reason
    monkeypatch.setenv("BITKERNELS_TRITON", "0")
    assert found().backend == "reference" and "BITKERNELS_TRITON is 0" in found().reason


def test_an_operator_that_is_made_of_others():
    x, weight = torch.empty(64, 64, 56, 56, device="meta"), torch.empty(64, 64, 3, 3, device="meta")
    found = bitkernels.explain("binary_conv2d", x, weight, padding=1, target="sm_90")
    assert operators(found.layers[0]) == ["sign_pack", "sign_pack", "packed_conv2d"]
    assert found.layers[0].calls[-1].kernel.startswith("resident")
    found = bitkernels.explain("binary_conv2d", x, weight.requires_grad_(), padding=1,
                               target="sm_90")
    assert operators(found.layers[0])[-1] == "packed_conv2d"
    found = bitkernels.explain("binary_residual_block", x, weight, padding=1, target="sm_90")
    assert operators(found.layers[0])[2:] == [
        "packed_conv2d_moments", "residual_block_statistics", "residual_block_forward"]
    found = bitkernels.explain("binary_conv_transpose2d", x, weight, stride=2, target="sm_80")
    assert operators(found.layers[0]).count("packed_conv2d") == 4, "one a phase"


def test_nothing_is_computed(monkeypatch):
    """Not even for tensors with memory: no kernel runs, none is checked."""
    calls = []
    monkeypatch.setattr(triton, "run", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(triton.trust, "has", lambda *a: calls.append(a))
    monkeypatch.setattr(cuda.trust, "has", lambda *a: calls.append(a))
    x = torch.randn(1 << 10, 64, 1, 1).expand(-1, -1, 1 << 10, 1 << 10)  # 256 GB, were it written
    bitkernels.explain("sign_pack", x, None, 1, target="sm_90")
    bitkernels.explain("rsign", x, torch.zeros(64), target="sm_90")
    assert not calls


def test_what_is_distrusted_is_named(monkeypatch):
    """As after a failure on a GPU that is there."""
    gpu = gpus.named("sm_90")
    monkeypatch.setattr(gpus, "of", lambda device: gpu)
    for module in (cuda, triton):
        monkeypatch.setattr(module, "why_unusable", lambda device: None)

    def found():
        args = tuple(torch.zeros(t.shape, dtype=t.dtype) if isinstance(t, torch.Tensor) else t
                     for t in conv(batch=64))
        with torch.no_grad():
            return bitkernels.backends.explain("packed_conv2d", *args, (1, 1), (1, 1),
                                               device="cuda", real=True, packed=False)

    device = torch.device("cpu")
    first = found().kernel
    assert first.startswith("resident") and found().trust == "not checked yet"
    assert cuda.trust.has(("packed_conv2d", first), device, lambda: None)
    assert found().trust == "checked"
    with pytest.warns(UserWarning, match=first):
        cuda.trust.withdraw(("packed_conv2d", first), device, "differs")
    assert found().backend == "cuda" and found().kernel != first
    assert f"{first} differs" in found().reason
    monkeypatch.setenv("BITKERNELS_CUDA", "0")
    with pytest.warns(UserWarning, match="b1"):
        triton.trust.withdraw(("packed_conv2d", "b1"), device, "failed: no room")
    assert found().kernel == "int8 128x64" and found().trust.startswith("b1 failed: no room; ")


def test_the_answer_is_what_dispatch_does(monkeypatch):
    """One decision: a rule that changes, changes both."""
    from bitkernels.backends.triton import plan

    monkeypatch.setattr(triton.trust, "has", lambda *a: True)
    monkeypatch.setattr(triton, "_usable", lambda device: True)
    ran = []
    monkeypatch.setattr(triton, "_launch", lambda op, *a, inner=None, **k: ran.append(inner) or "r")
    with gpus.planning_for(gpus.named("sm_90")):
        for limit in (1 << 22, 1 << 60):
            monkeypatch.setattr(plan, "SMALL", limit)
            triton.run("packed_conv2d", *conv(), (1, 1), (1, 1))
            said = triton.explain("packed_conv2d", *conv(), (1, 1), (1, 1))
            assert said.kernel.split()[0] == ran[-1]
    assert ran == ["b1", "popc"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(8, 64, 7, 7)
        on_gpu = torch.empty(8, 64, 7, 7, device="cuda")
    assert kernel(bitkernels.explain("sign_pack", x, None, 1)) == ": ".join(CPU_KERNEL)
    assert kernel(bitkernels.explain("sign_pack", on_gpu, None, 1, target="sm_90")) == (
        "triton: sign_pack")
    with pytest.raises(ValueError, match="the first tensor is on cuda"):
        bitkernels.explain("sign_pack", on_gpu, None, 1)


def test_it_is_a_table_and_a_dictionary():
    with torch.no_grad():
        found = bitkernels.explain(small().eval(), IMAGES)
    lines = str(found).splitlines()
    assert lines[0] == "on cpu" and lines[2].split() == ["layer", "kind", "form", "operator",
                                                        "kernel", "why"]
    (row,) = (line for line in lines if line.startswith("2 "))
    assert "BinaryResidualBlock, one operator" in row and "2 x sign_pack" in row
    assert lines[-1].startswith("[2] ") and len(set(lines[-2:])) == 2
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["layers"][1]["calls"][0]["operator"] == "sign_pack"
    with pytest.raises(AttributeError):
        found.layers[0].calls[0].kernel = "another"


WRONG = {
    "no operator": (("packed_conv3d",), {}, ValueError, "no operator is called 'packed_conv3d'"),
    "no overload": (("packed_conv2d.all",), {}, ValueError, "'packed_conv2d.all'"),
    "internal": (("_cpu_active",), {}, ValueError, "'_cpu_active'"),
    "another's operator": ((torch.ops.aten.relu,), {}, TypeError, "takes a module, an operator"),
    "a class": ((bnn.BinaryConv2d,), {}, TypeError, "got <class"),
    "target": (("sign_pack", torch.zeros(1)), {"target": "H100"}, ValueError,
               "target must be 'cpu' or an architecture; .* got 'H100'"),
    "a number": (("sign_pack", torch.zeros(1)), {"target": 90}, ValueError,
                 "target must be 'cpu' or an architecture; .* got 90"),
    "arguments": (("sign_pack", torch.zeros(1, dtype=torch.int32)), {}, RuntimeError,
                  "bitkernels::sign_pack: input must be"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(what):
    args, kw, error, text = WRONG[what]
    with pytest.raises(error, match=text):
        bitkernels.explain(*args, **kw)
