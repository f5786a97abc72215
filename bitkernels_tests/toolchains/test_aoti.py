"""AOTInductor: converted and packed networks as packages, called by Python and by a C++ program."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch

import bitkernels
from bitkernels import models
from bitkernels.backends import cpu
from bitkernels_tests import ROOT

EXAMPLE = ROOT / "examples" / "cpp"
SIZE = 24
MEAN, DEVIATION = (torch.tensor(v).view(3, 1, 1) for v in (
    (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

pytestmark = [
    pytest.mark.every,  # a minute of compilers: .ci/run
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(cpu.active() is None, reason="the engine is not built or not asked for"),
    pytest.mark.skipif(not EXAMPLE.exists(), reason="no examples beside an installed package"),
    pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None,
                       reason="needs g++ and make")]


def compile_network(network, path):
    spec = importlib.util.spec_from_file_location("aoti_package", EXAMPLE / "aoti_package.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.compile_network(network, path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with aoti_classify and net.pt2, the network)"""
    folder = tmp_path_factory.mktemp("aoti")
    build = subprocess.Popen(
        ["make", "-C", str(EXAMPLE), f"PYTHON={sys.executable}", "CXXFLAGS=-O0", f"BUILD={folder}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    torch.manual_seed(0)
    model = models.ReActNet18(10, blocks=(1, 1), channels=(32, 64)).eval()
    network = bitkernels.convert(model, torch.randn(2, 3, SIZE, SIZE))
    compile_network(network, folder / "net.pt2")
    said, _ = build.communicate()
    assert build.returncode == 0, said
    return folder, network


def classify(folder, image, engine=None, package="net.pt2"):
    from bitkernels import _C

    return subprocess.run([str(folder / "aoti_classify"), engine or _C.__file__,
                           str(folder / package), str(image)],
                          capture_output=True, text=True, check=False, timeout=60)


def write_ppm(path, pixels):
    _, height, width = pixels.shape
    head = f"P6\n{width} {height}\n255\n".encode()
    path.write_bytes(head + bytes(pixels.permute(1, 2, 0).flatten().tolist()))
    return path


def logits(run):
    assert run.returncode == 0, run.stderr
    *values, chosen = run.stdout.splitlines()
    found = torch.tensor([float(v) for v in values])
    assert chosen == f"class {found.argmax()}"
    return found


def test_python_runs_the_package_at_any_batch(made):
    folder, network = made
    package = torch._inductor.aoti_load_package(str(folder / "net.pt2"))
    for batch in (1, 5):
        images = torch.randn(batch, 3, SIZE, SIZE)
        torch.testing.assert_close(package(images), network(images), rtol=0, atol=1e-5)


def test_a_program_without_python_gives_the_same_logits(made):
    folder, network = made
    image = torch.randn(1, 3, SIZE, SIZE)
    (folder / "image.raw").write_bytes(image.numpy().tobytes())
    got = logits(classify(folder, folder / "image.raw"))
    torch.testing.assert_close(got, network(image)[0], rtol=0, atol=1e-5)


def test_it_reads_pictures(made):
    folder, network = made
    pixels = torch.randint(256, (3, SIZE, SIZE))
    got = logits(classify(folder, write_ppm(folder / "image.ppm", pixels)))
    image = (pixels / 255 - MEAN) / DEVIATION
    torch.testing.assert_close(got, network(image[None])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("what, message", [
    ("size", "image: must be 24 x 24, got 25 x 24"), ("short", "must have 6912 bytes"),
    ("end", "ends early"), ("kind", "is not a PPM"), ("none", "cannot read"),
    ("engine", "engine: ")])
def test_bad_files_are_named(made, what, message):
    folder, _ = made
    pixels = torch.zeros(3, SIZE, SIZE + (what == "size"), dtype=torch.int64)
    image = write_ppm(folder / f"{what}.ppm", pixels)
    if what in ("short", "none"):
        image = folder / f"{what}.raw"
    if what == "short":
        image.write_bytes(bytes(100))
    elif what == "end":
        image.write_bytes(image.read_bytes()[:-1])
    elif what == "kind":
        image.write_bytes(b"P5" + image.read_bytes()[2:])
    engine = str(folder / "no.so") if what == "engine" else None
    run = classify(folder, image, engine)
    assert run.returncode == 1 and message in run.stderr


def test_packed_models_compile_too(tmp_path):
    torch.manual_seed(0)
    packed = bitkernels.nn.pack(models.QuickNet(10, blocks=(1,), filters=(32,)).eval())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        program = torch.export.export(packed, (images,))
        path = torch._inductor.aoti_compile_and_package(program,
                                                        package_path=str(tmp_path / "net.pt2"))
        package = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(package(images), packed(images), rtol=0, atol=1e-5)


def test_operators_without_a_kernel_in_the_engine_are_refused(tmp_path):
    layer = torch.nn.Sequential(bitkernels.nn.BinaryConvTranspose2d(3, 8, 3)).eval()
    network = bitkernels.convert(layer, torch.randn(2, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match="calls packed_conv_transpose2d"):
        compile_network(network, tmp_path / "net.pt2")


def test_other_inputs_are_refused(tmp_path):
    layer = torch.nn.Sequential(bitkernels.nn.BinaryLinear(64, 8)).eval()
    network = bitkernels.convert(layer, torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"must take images .*takes tensors of \[.*64"):
        compile_network(network, tmp_path / "net.pt2")
