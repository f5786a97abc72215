"""Part block: a chain of residual blocks in inference; one in a training step, kernel by kernel.

In training, `graph us` is a step replayed as a CUDA graph, `device us` the sum of the times of all
its kernels (of which one that starts before the one before it has ended lasts from its start),
`launches` their number, `host us` what the host takes to enqueue a step, `wall us` steps one behind
the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import calls
import gpu_time
import torch
from gpu_backends import backend
from record import Record, context_works, faulty, message, rows
from residual_block import Block, Emulated, Fused, training_step
from schedule import end_of_job
from torch import Tensor, nn
from training_networks import layer_by_layer

from bitkernels.backends.cuda import kernels

SHAPES = ((256, 14), (64, 56), (128, 28), (512, 7))
TRAINED = SHAPES[:2]
BATCH, DEPTH = 256, 3
DEVICE, HALF = "cuda", torch.float16
STEPS, KERNELS = 10, 30  # steps under the profiler; kernels in the table of a step


def without_faulty(folder: Path) -> set[str]:
    """Takes kernels that the part `correct` found at fault out of this process; their names."""
    bad, wrong = faulty(folder)
    names = bad | {name for name, _ in wrong}
    for name in names:
        kernels.ALL.pop(name, None)
    return names


def blocks(channels: int, count: int) -> list[Block]:
    generator = torch.Generator().manual_seed(0)
    made = [Block(channels) for _ in range(count)]
    for block in made:
        block.randomize(generator)
    return made


def place(model: nn.Module) -> nn.Module:
    return model.to(DEVICE, HALF, memory_format=torch.channels_last)


def image(channels: int, size: int) -> Tensor:
    x = torch.randn(BATCH, channels, size, size, device=DEVICE, dtype=HALF)
    return x.to(memory_format=torch.channels_last)


def compiled_chain(made: list[Block]) -> tuple[nn.Module, Callable]:
    emulated = nn.Sequential(*map(Emulated, made)).eval()
    torch._dynamo.reset()
    return emulated, torch.compile(emulated, dynamic=False)


def forms(channels: int) -> dict[str, Callable[[], tuple[nn.Module, Callable]]]:
    """(the module, what to call) of a training block by its form."""
    def make(kind: Callable | None, compiled: bool, recompute: bool = True, one_pass: bool = False,
             input_grad_dtype: torch.dtype | None = None) -> tuple[nn.Module, Callable]:
        os.environ["BITKERNELS_ONE_PASS"] = str(int(one_pass))
        (block,) = blocks(channels, 1)
        block.recompute, block.input_grad_dtype = recompute, input_grad_dtype
        model = place(block if kind is None else kind(block)).train()
        torch._dynamo.reset()
        return model, torch.compile(model, dynamic=False) if compiled else model

    return {"block": partial(make, None, False), "block kept": partial(make, None, False, False),
            "block kept, one pass": partial(make, None, False, False, True),
            "block kept, float8": partial(make, None, False, False,
                                          input_grad_dtype=torch.float8_e5m2),
            "layers": partial(make, layer_by_layer, False),
            "emulation compiled": partial(make, Emulated, True),
            "emulation eager": partial(make, Emulated, False),
            "block compiled": partial(make, None, True)}


def fastest(folder: Path, name: str) -> str | None:
    """The kernel of csrc/cuda that the part conv found fastest for a call."""
    for row in rows(folder, "conv"):
        if row.get("key") == name:
            own = {k: t for k, t in row.get("us", {}).items() if k in kernels.ALL}
            return min(own, key=own.__getitem__, default=None)
    return None


def on(kernel: str | None, name: str, call: Callable[[], object]) -> Callable[[int], object]:
    """The call by a backend, in a kernel of csrc/cuda if one is named."""
    def run(_: int) -> object:
        if kernel is None:
            os.environ.pop("BITKERNELS_CUDA_KERNEL", None)
        else:
            os.environ["BITKERNELS_CUDA_KERNEL"] = kernel
        with backend(name):
            return call()

    return run


def expected(fused: Fused, x: Tensor) -> Tensor:
    """The chain's exact output, without the package."""
    words = calls.pack(~(x.permute(0, 2, 3, 1).float() + fused.shifts[0] < 0))
    for i, filters in enumerate(fused.words):
        kw = fused.keywords(i, x)
        residual = kw.pop("residual")
        call = calls.Call("", "packed_conv2d", ((words, residual),),
                          (filters, fused.channels, *fused.GEOMETRY),
                          {**kw, "real": True, "packed": i + 1 < len(fused.words)}, 0, 0)
        x, words = calls.expected(call)  # type: ignore[assignment]
    return x


def inference(channels: int, size: int, folder: Path) -> dict:
    made = blocks(channels, DEPTH)
    for block in made:
        place(block)
    fused, x = Fused(made), image(channels, size)
    emulated, compiled = compiled_chain(made)
    runs: dict[str, Callable[[int], object]] = {
        "eager": lambda _: emulated(x), "compiled": lambda _: compiled(x),
        "triton": on(None, "triton", partial(fused, x)),
        "cuda": on(None, "cuda", partial(fused, x))}
    best = fastest(folder, f"3x3:{channels}@{size} batch {BATCH} block")
    if best is not None:
        runs[f"cuda {best}"] = on(best, "cuda", partial(fused, x))
    with torch.no_grad():
        right = expected(fused, x)
        wrong = {}
        for name, run in list(runs.items()):
            try:
                equal = name in ("eager", "compiled") or torch.equal(run(0), right)
            except Exception as error:
                wrong[name] = message(error)
                del runs[name]
            else:
                if not equal:
                    wrong[name] = "differs from the reference"
        us, errors = gpu_time.in_turns({name: (run, 8) for name, run in runs.items()})
    os.environ.pop("BITKERNELS_CUDA_KERNEL", None)
    return {"blocks": DEPTH, "us": {name: round(1e3 * t, 2) for name, t in us.items()},
            "wrong": wrong, "errors": {name: message(error) for name, error in errors.items()}}


def traced(step: Callable[[], object], steps: int = STEPS, most: int = KERNELS) -> dict:
    """Of one step: microseconds and number of its kernels, those that take most, by name.

    A profiler comes twice: before it our operators run one by one, which is another way the first
    times, and what is launched is compared with its repetition.
    """
    from torch.profiler import ProfilerActivity, profile

    for count in (3, steps):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            for _ in range(count):
                step()
            torch.cuda.synchronize()
    gpu = torch.autograd.DeviceType.CUDA
    table = sorted(([event.key[:160], round(event.self_device_time_total / steps, 2),
                     round(event.count / steps, 2)] for event in seen.key_averages()
                    if event.device_type == gpu and not event.is_user_annotation),
                   key=lambda line: -line[1])
    return {"device us": round(sum(line[1] for line in table), 1),
            "launches": round(sum(line[2] for line in table), 1), "kernels": table[:most]}


def peak(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)


def training(make: Callable[[], tuple[nn.Module, Callable]], channels: int, size: int) -> dict:
    _, call = make()
    x, grad = image(channels, size).requires_grad_(), image(channels, size)
    step = partial(training_step, _Called(call), x, grad)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    host = (time.perf_counter() - start) / STEPS
    torch.cuda.synchronize()
    wall = gpu_time.back_to_back(step, 0.1)
    found = {"host us": round(1e6 * host, 1), "wall us": round(1e6 * min(wall), 1),
             "peak MiB": peak(step), **traced(step)}
    ms, errors = gpu_time.in_turns({"step": (lambda _: step(), 1)})
    if errors:
        return {**found, "errors": {"graph": message(errors["step"])}}
    return {**found, "graph us": round(1e3 * ms["step"], 1)}


class _Called:
    """What training_step takes, of a model or its torch.compile."""

    def __init__(self, call: Callable) -> None:
        self.call = call

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)

    def zero_grad(self, set_to_none: bool) -> None:
        self.call.zero_grad(set_to_none=set_to_none)


def run(folder: Path) -> None:
    record = Record(folder, "block")
    torch.backends.cudnn.benchmark = True
    record.add(left_out=sorted(without_faulty(folder)))
    tasks: list[tuple[str, Callable[[], dict]]] = []
    for channels, size in SHAPES:
        where = f"{channels}@{size} batch {BATCH}"
        tasks.append((f"{where} inference", partial(inference, channels, size, folder)))
        if (channels, size) in TRAINED:
            tasks += [(f"{where} training {form}", partial(training, make, channels, size))
                      for form, make in forms(channels).items()]
    tasks.sort(key=lambda task: SHAPES.index(_shape(task[0])) >= 2)
    run_tasks(record, tasks)


def _shape(name: str) -> tuple[int, int]:
    channels, _, size = name.split()[0].partition("@")
    return int(channels), int(size)


def run_tasks(record: Record, tasks: list[tuple[str, Callable[[], dict]]]) -> None:
    """Each by itself, as far as time goes: a row, or why there is none."""
    for name, task in tasks:
        if name in record.done or name in record.bad:
            continue
        if time.time() > end_of_job():
            record.add(stopped=f"before {name}: out of time")
            return
        start = time.time()
        try:
            found = task()
        except gpu_time.Broken as error:
            record.broken(name, error.__cause__ or error)
        except Exception as error:
            if not context_works():
                record.broken(name, error)
            found = {"failed": message(error)}
        record.add(key=name, seconds=round(time.time() - start, 2), **found)


def warm() -> None:
    """Compiles what this part gives torch.compile."""
    for channels, size in SHAPES[:2]:
        x = image(channels, size)
        with torch.no_grad():
            made = blocks(channels, DEPTH)
            for block in made:
                place(block)
            compiled_chain(made)[1](x)
        for name, make in forms(channels).items():
            if name.endswith("compiled"):
                _, call = make()
                training_step(_Called(call), x.clone().requires_grad_(), torch.randn_like(x))
    torch.cuda.synchronize()


