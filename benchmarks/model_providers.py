"""What bench_models.py times of a network: one call and its file for each provider."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import common
import larq_interpreter
import model_networks
import resident
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

import bitkernels

IMAGES = 8  # at least, that logits are compared on: more than rounding can spoil
SIGN_LIMIT = 1e-4  # relative distance of logits, of an image without a sign that rounding turned


@dataclass
class Candidate:
    """What is timed. file_bytes: of the network's file. close: of how many images the logits are
    within SIGN_LIMIT of the model's, where that is asked."""

    call: Callable[[], object]
    file_bytes: int
    close: str = ""
    peak: Callable[[], int | None] | None = None


@dataclass
class Network:
    """A network in the forms that are timed, made once for all batches and threads."""

    name: str
    images: Tensor  # of which others are parts
    forms: dict[str, nn.Module] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    close: dict[str, str] = field(default_factory=dict)
    compiles: tuple[str, ...] = ()


def is_wrong(close: str) -> bool:
    """Less than half of the images are close: more than signs that rounding turned."""
    near, _, count = close.partition("/")
    return bool(close) and 2 * int(near) < int(count)


def state_bytes(module: nn.Module) -> int:
    """Of a file of torch.save."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.getbuffer().nbytes


def converted_bytes(network: bitkernels.converter.Converted) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.safetensors")
        bitkernels.save_converted(network, path)
        return path.stat().st_size


def binary(name: str, size: int, batch: int, device: common.Device) -> Network:
    """converted, the model as it is before, and its emulation; on a GPU in bfloat16 too."""
    torch.manual_seed(0)
    model = model_networks.binary_network(name, size)
    found = Network(name, torch.randn(max(batch, IMAGES), 3, size, size))
    emulation = model_networks.emulation(model)
    found.forms = {"converted": bitkernels.convert(model, found.images), "model": model,
                   "emulation": emulation.to(memory_format=torch.channels_last)}
    if device.type == "cuda":
        found.forms["converted bf16"] = bitkernels.convert(model, found.images, real="bfloat16")
    found.forms["emulation bf16"] = copy.deepcopy(emulation).bfloat16()
    found.dtypes = {"emulation bf16": torch.bfloat16}
    found.compiles = ("emulation bf16",) if device.type == "cuda" else (
        "emulation", "emulation bf16")
    found.sizes = {form: state_bytes(module) for form, module in found.forms.items()}
    for form in found.forms:
        if form.startswith("converted"):
            found.sizes[form] = converted_bytes(found.forms[form])
    _place(found, device)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = found.forms["model"](found.images)
        for form in ("converted", "emulation"):
            got = found.forms[form](found.images)
            near = sum(common.close(a, b, SIGN_LIMIT) for a, b in zip(got, wanted, strict=True))
            found.close[form] = f"{near}/{len(wanted)}"
    return found


def real(name: str, size: int, batch: int, device: common.Device, compiled: bool,
         notes: dict[str, str]) -> Network:
    """fp32, bf16 and, on a CPU, static int8 of PyTorch's eager means and of torchao's."""
    torch.manual_seed(0)
    model = model_networks.real_network(name, size).to(memory_format=torch.channels_last)
    found = Network(name, torch.randn(max(batch, IMAGES), 3, size, size))
    found.forms = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16()}
    found.dtypes = {"bf16": torch.bfloat16}
    found.compiles = ("fp32", "bf16", "int8 pt2e")
    if device.type == "cpu":
        for form, make in (("int8", model_networks.int8_eager),
                           *([("int8 pt2e", model_networks.int8_compiled)] * compiled)):
            try:
                found.forms[form] = make(model, found.images)
            except Exception as error:
                notes.setdefault(f"{form} left out", f"{type(error).__name__}: "
                                                     f"{str(error).splitlines()[0]}")
    found.sizes = {form: state_bytes(module) for form, module in found.forms.items()}
    _place(found, device)
    return found


def _place(network: Network, device: common.Device) -> None:
    network.images = network.images.to(device.type, memory_format=torch.channels_last)
    for module in network.forms.values():
        module.to(device.type)


def candidates(network: Network, batch: int, compiled: bool, notes: dict[str, str],
               late: Callable[[], bool]) -> dict[str, Candidate]:
    """By provider. late: whether there is no time to compile any more."""
    found: dict[str, Candidate] = {}
    for form, module in network.forms.items():
        images = network.images[:batch].to(network.dtypes.get(form, torch.float32))
        runs: dict[str, Callable] = {} if form == "int8 pt2e" else {form: module}
        if compiled and form in network.compiles:
            if late():
                notes.setdefault("not compiled for lack of time", "")
                notes["not compiled for lack of time"] += f"{network.name} {form} batch {batch}; "
            else:
                label = "int8 compiled" if form == "int8 pt2e" else f"{form} compiled"
                runs[label] = torch.compile(module, dynamic=False)
        for label, run in runs.items():
            def call(run=run, images=images) -> object:
                with torch.no_grad():
                    return run(images)

            try:
                # Weights are constants, and int8 is matched. As an option of torch.compile Dynamo
                # does not see it (torch 2.13).
                with inductor.patch(freezing=True):
                    call()
            except Exception as error:
                notes[f"{network.name} {label} failed"] = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
                continue
            found[label] = Candidate(call, network.sizes[form], network.close.get(form, ""))
    return found


class Larq:
    """The interpreter in a process of its own, which runs once for each call."""

    def __init__(self, python: str, network: str, folder: Path, threads: int, batch: int,
                 xnnpack: bool) -> None:
        script = Path(larq_interpreter.__file__)
        command = [python, str(script), network, str(folder / f"{network}.tflite"), str(threads),
                   str(batch), str(int(xnnpack))]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True, bufsize=1)
        said = json.loads(self._read())
        self.file_bytes, self.versions = said["file_bytes"], said["versions"]
        self.peak_bytes = said["peak_bytes"]

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines() or ["no reason"]
            raise RuntimeError(f"Larq's interpreter ended: {said[-1]}")
        return line

    def run(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self._read()

    def candidate(self) -> Candidate:
        return Candidate(self.run, self.file_bytes, peak=lambda: self.peak_bytes)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.errors.close()


@contextlib.contextmanager
def larq(python: str | None, network: str, folder: Path, threads: int, batch: int,
         notes: dict[str, str]) -> Iterator[dict[str, Candidate]]:
    """Larq's interpreter with and without XNNPACK for the real layers; nothing where it is not."""
    found: dict[str, Candidate] = {}
    started: list[Larq] = []
    try:
        if python is not None and network in larq_interpreter.NETWORKS:
            for label, xnnpack in (("larq", False), ("larq xnnpack", True)):
                try:
                    one = Larq(python, network, folder, threads, batch, xnnpack)
                except (OSError, RuntimeError) as error:
                    notes[f"{label} left out"] = str(error)
                    continue
                started.append(one)
                notes["larq"] = ", ".join(f"{k} {v}" for k, v in one.versions.items())
                found[label] = one.candidate()
        yield found
    finally:
        for one in started:
            one.close()


def larq_python(given: str | None, notes: dict[str, str]) -> str | None:
    """The Python to run Larq's interpreter in: the one that is named, or this one."""
    if given is not None:
        return given
    try:
        import larq_compute_engine  # noqa: F401
    except ImportError as error:
        notes["larq left out"] = f"{error}; --larq names a Python that has it"
        return None
    return sys.executable


def peak_memory(device: common.Device, one: Candidate) -> int | None:
    if one.peak is not None:
        return one.peak()
    return resident.peak(one.call) if device.type == "cpu" else device.peak_memory(one.call)
