"""`python -m bitkernels`: its commands, their help on a base install, and wrong arguments."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitkernels
from bitkernels import models
from bitkernels.backends import cpu
from bitkernels.cli import COMMANDS, doctor, main
from bitkernels.cli import bench as bench_command

ROOT = str(Path(bitkernels.__file__).parents[1])

# As if torch alone were installed.
BARE = """
import importlib.metadata, sys
from importlib.machinery import PathFinder
HIDDEN = {"numpy", "safetensors", "tqdm", "sklearn", "tensorboard", "torchvision", "triton", "cupy",
          "cuda", "nvidia", "onnx", "matplotlib", "scipy", "h5py", "huggingface_hub", "timm"}
find, distribution = PathFinder.find_spec, importlib.metadata.distribution
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else find(name, path, target)
def hidden(name):
    if name.partition("-")[0] in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)
PathFinder.find_spec, importlib.metadata.distribution = find_spec, hidden
"""


def call(capsys, *arguments):
    """(exit status, stdout, stderr) of the command in this process."""
    try:
        main([str(a) for a in arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A process with torch alone, in which every help and some commands run one after the other."""
    script = tmp_path_factory.mktemp("bare") / "script.py"
    script.write_text(BARE + """
import contextlib, io, json
from bitkernels.cli import main
found = {}
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    found[" ".join(arguments)] = [status, out.getvalue(), err.getvalue()]
# Training from Python, without a folder for results.
from bitkernels import models
from bitkernels.train import datasets, fit, recipes
recipe, data = recipes.get("quicknet-digits").scaled(1, 20), datasets.generated(0, 40, 20)
result = fit(lambda: models.create("quicknet", filters=(8, 16), blocks=(1, 1)), recipe, data)
assert not HIDDEN & {name.partition(".")[0] for name in sys.modules}
found["fit"] = len(result.rows)
print(json.dumps(found))
""")
    out = str(script.parent / "out")
    train = ["train", "--recipe", "quicknet-digits", "--data", "digits", "--out", out]
    calls = [["--help"], [], ["doctor"], ["models", "quicknet"],
             *([name, "--help"] for name in COMMANDS), train, [*train, "--show"],
             [*train[:4], "generated", *train[5:], "--quiet"]]
    run = subprocess.run([sys.executable, str(script), json.dumps(calls)], text=True,
                         capture_output=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT})
    assert run.returncode == 0, run.stderr
    return {key.replace(out, "OUT"): value for key, value in json.loads(run.stdout).items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_with_torch_alone(bare, name):
    status, out, err = bare[f"{name} --help"]
    assert status == 0 and not err
    assert len(re.findall(rf"-m bitkernels {name}\b", out)) >= 3  # its usage and two examples
    assert name in bare["--help"][1]


def test_without_a_command_it_is_the_doctor(bare):
    assert bare[""] == bare["doctor"] and bare["doctor"][0] == 0
    out = bare["doctor"][1]
    assert re.search(r"^triton +not installed$", out, re.M)
    assert "pip install safetensors tqdm scikit-learn tensorboard" in out


def test_models_and_recipes_need_torch_alone(bare):
    status, out, _ = bare["models quicknet"]
    assert status == 0 and "1,548,288" in out
    status, out, _ = bare["train --recipe quicknet-digits --data digits --out OUT --show"]
    assert status == 0 and "model quicknet" in out


def test_training_from_python_needs_torch_alone(bare):
    """Without numpy too, whose random numbers are then nobody's."""
    assert bare["fit"] == 1


def test_a_run_names_all_that_is_missing_at_its_start(bare):
    status, out, err = bare["train --recipe quicknet-digits --data digits --out OUT"]
    assert status == 1 and not out and err.count("\n") == 1
    assert err.endswith(": pip install safetensors tqdm scikit-learn\n")
    status, out, err = bare["train --recipe quicknet-digits --data generated --out OUT --quiet"]
    assert status == 1 and not out
    assert "safetensors (writes the weights): pip install safetensors\n" in err


def test_doctor_says_what_helps(capsys, monkeypatch):
    assert call(capsys, "doctor")[0] == 0
    monkeypatch.setattr(cpu, "why_not", "the extension bitkernels._C is not built")
    assert "the CPU engine is missing" in doctor.remedies()[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "cuda_remedy", lambda: "no NVRTC")
    said = " ".join(doctor.remedies())
    assert "pip install triton" in said and "no NVRTC" in said
    monkeypatch.setenv("BITKERNELS_CPU", "reference")
    assert "unset it" in doctor.remedies()[0]


@pytest.mark.parametrize("arch,reason,expected", (
    ("sm_90a", "NVRTC does not load (pip install x)",
     r"csrc/cuda, on sm_90a \d\.\d to \d\.\d times as fast as Triton in \d+ measured calls .*: "
     r"NVRTC does not load \(pip install x\)"),
    ("sm_80", "no NVRTC", r"csrc/cuda \(on sm_80 by BITKERNELS_CUDA=1 alone\) .*: no NVRTC"),
    ("sm_90a", None, None), (None, "sm_100 has no 1-bit tensor core", None)))
def test_doctor_says_what_the_cuda_kernels_would_bring(monkeypatch, arch, reason, expected):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(doctor.launch, "architecture", lambda device: arch)
    monkeypatch.setattr(doctor.cuda, "why_unusable", lambda device: reason)
    said = doctor.cuda_remedy()
    assert said is None if expected is None else re.fullmatch(expected, said)


def test_doctor_knows_a_torch_without_cuda_beside_a_driver(monkeypatch):
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("this torch has CUDA")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert any("built for CPUs" in line for line in doctor.remedies())


def test_models_counts(capsys):
    status, out, err = call(capsys, "models", "reactnet-18", "--num-classes", 1000, "--size", 224)
    assert status == 0 and not err
    model = models.create("reactnet-18", num_classes=1000)
    total = sum(p.numel() for p in model.parameters())
    assert total == 11_704_424  # the published code's
    binary, real = (int(n.replace(",", "")) for n in out.splitlines()[1].split()[1:3])
    assert (binary, binary + real) == (10_985_472, total)
    listed = call(capsys, "models")[1]
    assert all(name in listed for name in models.names())


def test_doctor_tells_variables_that_do_nothing(monkeypatch):
    said = doctor.remedies()
    monkeypatch.setenv("BITKERNELS_CACHE", "/tmp")
    monkeypatch.setenv("BITKERNELS_TRITON", "off")
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    new = [line for line in doctor.remedies() if line not in said]
    assert new[0].startswith("BITKERNELS_CACHE is not read; there are BITKERNELS_CPU, ")
    assert new[1:] == ["BITKERNELS_TRITON must be 0 or 1, got 'off'"]
    page = Path(ROOT, "docs", "environment.md").read_text()
    assert list(doctor.VARIABLES) == re.findall(r"^\| `(BITKERNELS_\w+)`", page, re.M)


def test_bench_is_exact_and_says_where(capsys, keeps_threads):
    status, out, err = call(capsys, "bench", "--seconds", 0.002, "--device", "cpu", "--layers",
                            "3x3:33@7", "1x1:64@5", "5x5:8@9", "--batch", 2)
    assert status == 0 and not err
    head, _, columns, *rows = out.rstrip().splitlines()
    assert f"torch {torch.__version__}" in head and "1 thread, batch 2" in head
    assert [row.split()[0] for row in rows] == ["3x3:33@7", "1x1:64@5", "5x5:8@9"]
    assert all(row.endswith("yes") for row in rows) and columns.endswith("exact")


def test_bench_tells_a_wrong_result(capsys, monkeypatch):
    monkeypatch.setattr(bench_command, "measure", lambda *a: [1.0, 1.0, 1.0, 1.0, False])
    status, out, _ = call(capsys, "bench", "--device", "cpu", "--layers", "3x3:8@8")
    assert status == 1 and out.rstrip().endswith("NO")


def test_explain_of_a_network(capsys):
    status, out, err = call(capsys, "explain", "quicknet", "--target", "cpu")
    assert status == 0 and not err and out.startswith("on cpu\n")
    assert re.search(r"^sections\.0\.0 +QuickNetBlock, one operator +latent ", out, re.M)
    status, out, _ = call(capsys, "explain", "quicknet", "--packed", "--target", "sm_80", "--json")
    layers = {layer["name"]: layer for layer in json.loads(out)["layers"]}
    assert status == 0 and layers["sections.0.0"]["form"] == "packed"
    assert layers["sections.0.0"]["calls"][0]["backend"] == "triton"
    status, out, err = call(capsys, "explain", "binary_alexnet", "--size", 57)  # made for it
    assert status == 0 and not err and "classifier.0" in out


FULL = "python -m bitkernels: cannot write the output: No space left on device"


@pytest.mark.parametrize("command", ("--version", "summary quicknet_small --json",
                                     "summary quicknet_small"))
@pytest.mark.parametrize("unbuffered", (False, True))
def test_output_that_cannot_be_written_is_one_line(monkeypatch, command, unbuffered):
    """Little and much of it, kept in a buffer and not; where nobody reads on it is no error to
    speak of, and where there is none no error."""
    reader, writer = os.pipe()
    os.close(reader)
    for where, status in ("/dev/full", FULL), (writer, 1), (None, 0):
        stream = where and (io.TextIOWrapper(io.FileIO(where, "w"), write_through=True)
                            if unbuffered else open(where, "w"))
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            main(command.split())
        assert (stop.value.code or 0) == status
        sys.stdout.close()  # as at the end of a process: with what is left in it


@pytest.mark.parametrize("where, status, said", [
    ("> /dev/full", 1, f"{FULL}\n"), (">&-", 0, ""), ("| true", 0, "")])
def test_streams_of_the_shell(where, status, said):
    """As above, from a start of Python to its end."""
    done = subprocess.run(
        f"{sys.executable} -m bitkernels --version {where}", shell=True, text=True, cwd=ROOT,
        executable="/bin/bash", capture_output=True)
    assert (done.returncode, done.stderr) == (status, said)


def test_errors_do_not_go_to_stdout_where_stderr_is_closed():
    done = subprocess.run(f"{sys.executable} -m bitkernels models nonsense 2>&-", shell=True,
                          executable="/bin/bash", cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stdout == ""


def test_names_that_the_terminal_cannot_show():
    code = ("import sys\nfrom bitkernels.cli import main\nimport bitkernels.cli.doctor as d\n"
            "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 1\n"
            "d.report = lambda: [('caf\u00e9', '')]\nmain(['doctor'])")
    done = subprocess.run(
        [sys.executable, "-c", code, "summary", "caf\u00e9"], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "no model is called 'caf\\xe9'" in done.stderr
    assert done.stdout.startswith("caf\\xe9"), done.stdout


def test_explain_of_every_operator(capsys):
    from bitkernels.cli.explain import ARGUMENTS

    for name in ARGUMENTS:
        status, out, err = call(capsys, "explain", name, "--target", "sm_90", "--kernel", 1,
                                "--size", 14, "--batch", 64)
        assert status == 0 and not err and re.search("triton:|cuda:", out), name
    out = call(capsys, "explain", "packed_conv2d", "--channels", 256, "--size", 14, "--batch", 256,
               "--target", "sm_90")[1]
    assert "cuda: resident_64x128" in out and "NVIDIA H200" in out


@pytest.mark.parametrize("arguments, message", [
    (["banana"], "invalid choice: 'banana'"),
    (["--banana"], "unrecognized arguments: --banana"),
    (["doctor", "--fast"], "unrecognized arguments: --fast"),
    (["models", "resnet"], "no model is called 'resnet'; there are binary_alexnet, "),
    (["models", "--size", "0"], "--size must be at least 1, got 0"),
    (["models", "--num-classes", "ten"], "--num-classes: invalid int value: 'ten'"),
    (["models", "binarynet", "--size", "1"], "binarynet with --in-channels 3 --size 1"),
    (["models", "--size", 20 * "9"], "--size: must be below 2**32, got 99999999999999999999"),
    (["train", "--recipe", "quicknet-digits", "--data", "digits", "--out", ""],
     "--out: must not be empty"),
    (["predict", "quicknet", "--weights", "w.h5", ""], "must not be empty"),
    (["profile", "quicknet", "--chart", "no/folder/chart.png"], "--chart must be a file in a"),
    (["explain", "quicknet", "--channels", "64"], "--channels is of operators, quicknet is a"),
    (["explain", "sign_pack", "--train"], "--train is of networks, sign_pack is an operator"),
    (["explain"], "required: MODEL_OR_OP"),
    (["explain", "mask_grad"], "mask_grad takes more than sizes: give bitkernels.explain("),
    (["explain", "resnet"], "no network or operator is called 'resnet'; there are binarynet, "),
    (["explain", "reactnet", "--target", "H100"], "target must be 'cpu' or an architecture"),
    (["explain", "reactnet", "--batch", "0"], "--batch must be at least 1, got 0"),
    (["explain", "quicknet", "--packed", "--train"], "give one of --packed and --train"),
    (["bench", "--device", "banana"], "--device must be cpu"),
    (["bench", "--threads", "0"], "--threads must be at least 1, got 0"),
    (["bench", "--threads", "1025"], "--threads must be at most 1024, got 1025"),
    (["profile", "quicknet", "--threads", "5000"], "--threads must be at most 1024, got 5000"),
    (["profile", "quicknet", "--device", "meta"], "--device meta: tensors have no values"),
    (["bench", "--batch", "-1"], "--batch must be at least 1, got -1"),
    (["bench", "--seconds", "0"], "--seconds must be above 0"),
    (["bench", "--layers", "3x5:8@8"], "--layers takes KxK:CHANNELS@SIZE"),
    (["bench", "--layers", "conv"], "got 'conv'"),
    (["train", "--recipe", "none"], "--recipe: invalid choice: 'none'"),
    (["train", "--epochs", "many"], "--epochs: invalid int value: 'many'")])
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    status, out, err = call(capsys, *arguments)
    assert status in (1, 2) and not out
    assert message in err and err.count("\n") == 1 and err.startswith(
        ("python -m bitkernels", "bitkernels "))


def test_version_and_kernels(capsys):
    assert call(capsys, "--version") == (0, f"{bitkernels.__version__}\n", "")
    status, out, _ = call(capsys, "--cpu-kernels")
    assert status == 0
    assert out.split() == [name for name, supported in cpu.kernels() if supported]
