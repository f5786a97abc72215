"""Part train: training steps of whole networks in every form of bench_train.py, eager and compiled;
some also as a CUDA graph, which Python only replays; whether a step trains as one, under
reduce-overhead, in float16 with GradScaler and under DistributedDataParallel with nccl. A probe of
the real stem is in stem.py.

A row for every network and form as soon as it is measured: seconds of a step, steps one behind the
other, images a second, the most memory allocated. train.csv, train.json and train.png are of all
forms that were measured, of networks that were begun.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench_train
import common
import gpu_time
import torch
import torch.distributed as dist
import torch.nn.functional as F
from record import Record, message
from schedule import end_of_job
from torch import Tensor, nn
from training_networks import NETWORKS, in_form

from parts import stem
from parts.block import run_tasks, traced, without_faulty

SIZE, BATCH, PRECISION = 224, 128, "bf16"
# The base of ratios first, then its best form and ours. GRAPHS: also replayed.
FORMS = ("published", "published compiled", "bitkernels", "layers", "bitkernels compiled",
         "layers compiled", "lean", "lean compiled")
GRAPHS = ("published compiled", "bitkernels", "layers", "bitkernels compiled", "layers compiled")
TRACED, KERNELS = 2, 60  # steps under the profiler; kernels in the table of a step
SECONDS = 1.0  # timed, of each form
FIRST, REST = ("reactnet18",), ("quicknet", "reactnet_a")
# Of the steps that are no measurements: device, images, their size.
DEVICE, IMAGES, SIDE = "cuda", 16, 64


def make_case(network: str, batch: int = BATCH, size: int = SIZE) -> bench_train.Case:
    return bench_train.Case(network, PRECISION, batch, size, bench_train.BLOCKS,
                            bench_train.StepDevice(), True)


def one_form(case: bench_train.Case, form: str, times: dict, peaks: dict) -> dict:
    step = partial(case.step, case.models[form])
    start = time.time()
    step()
    torch.cuda.synchronize()
    first = time.time() - start
    taken = common.Times.of(case.device.measure(step, SECONDS))
    peak = case.device.peak_memory(step)
    times[form] = taken
    if peak is not None:
        peaks[form] = peak
    torch.cuda.empty_cache()
    return {"ms": round(1e3 * taken.p50, 3), "images/s": round(len(case.x) / taken.p50, 1),
            "peak MiB": round((peak or 0) / 2**20, 1), "first step s": round(first, 1)}


def graph(case: bench_train.Case, form: str) -> dict:
    """Of a step that is replayed: what is left without Python, kernel by kernel."""
    step = partial(case.step, case.models[form])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ms, errors = gpu_time.in_turns({form: (lambda _: step(), 1)})
    if errors:
        raise errors[form]
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    return {"ms": round(ms[form], 3), "images/s": round(1e3 * len(case.x) / ms[form], 1),
            "peak MiB": round(peak / 2**20, 1), **traced(step, TRACED, KERNELS)}


def network_rows(name: str, case: bench_train.Case, times: dict, peaks: dict, match: bool
                 ) -> bench_train.Row:
    return bench_train.Row(name, PRECISION, len(case.x), case.x.shape[-1], 1, False, dict(times),
                           {}, {}, dict(peaks), match)


def networks(record: Record, names: tuple[str, ...], folder: Path, done: list[bench_train.Row]
             ) -> None:
    for name in names:
        if time.time() > end_of_job():
            record.add(stopped=f"before {name}: out of time")
            return
        try:
            case = make_case(name)
        except Exception as error:
            record.add(key=name, failed=message(error))
            continue
        times: dict[str, common.Times] = {}
        peaks: dict[str, int] = {}
        match: list[bool] = []

        def exact(case=case, match=match) -> dict:
            match.append(case.match())
            return {"first block close to the emulation": match[0]}

        tasks = [(f"{name} {form}", partial(one_form, case, form, times, peaks))
                 for form in FORMS]

        def insert(after: str, what: str, task: Callable[[], dict], tasks=tasks, name=name) -> None:
            at = next(i for i, (key, _) in enumerate(tasks) if key == f"{name} {after}") + 1
            tasks.insert(at, (f"{name} {what}", task))

        insert(bench_train.OURS, "match", exact)
        for form in GRAPHS if torch.cuda.is_available() else ():
            insert(form, f"{form} graph", partial(graph, case, form))
        run_tasks(record, tasks)
        if bench_train.BASE in times:
            done.append(network_rows(name, case, times, peaks, bool(match and match[0])))
            save(folder, done, case.device)
        del case, tasks
        torch.cuda.empty_cache()


def save(folder: Path, done: list[bench_train.Row], device: common.Device) -> None:
    try:
        bench_train.save(folder, done, device, common.environment(device))
    except Exception as error:  # as without matplotlib: the rows are written in any case
        print(f"no chart: {message(error)}")


class Step:
    """Forward, loss, backward and update of a small network, for captures."""

    def __init__(self, form: str, compiled: Callable[[nn.Module], Callable] = lambda m: m,
                 dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        network = NETWORKS["reactnet18"](1).to(DEVICE, memory_format=torch.channels_last)
        self.model, self.dtype = in_form(network, form), dtype
        self.call = compiled(self.model)
        x = torch.randn(IMAGES, 3, SIDE, SIDE, device=DEVICE)
        self.x = x.to(memory_format=torch.channels_last)
        self.labels = torch.arange(IMAGES, device=DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def loss(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, self.dtype, cache_enabled=False):
            return F.cross_entropy(self.call(self.x).float(), self.labels)

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def captured(form: str) -> dict:
    """Whether a CUDA graph of a whole step trains as the step does."""
    step = Step(form)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    step.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    state = copy.deepcopy(step.model.state_dict())
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(loss.item())
    step.model.load_state_dict(state)
    eager = [step().item() for _ in range(3)]
    same = all(math.isclose(a, b, rel_tol=2e-2) for a, b in zip(replayed, eager, strict=True))
    return {"yes": same, "replayed": replayed, "eager": eager}


def reduced(form: str) -> dict:
    """Whether torch.compile(fullgraph=True, mode="reduce-overhead") trains, with its graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    step = Step(form, lambda model: torch.compile(model, fullgraph=True, mode="reduce-overhead"))
    losses = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        losses.append(step().item())
    skips = int(counters["inductor"].get("cudagraph_skips", 0))
    return {"yes": all(map(math.isfinite, losses)) and not skips, "losses": losses,
            "graphs skipped": skips}


def scaled(form: str) -> dict:
    """Whether GradScaler sees an overflow of float16, skips those steps and trains on."""
    step, scales = Step(form, dtype=torch.float16), []
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24)
    before = copy.deepcopy(step.model.state_dict())
    skipped = moved = False
    for _ in range(40):
        scaler.scale(step.loss()).backward()
        scaler.step(step.optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved = not all(torch.equal(before[name], p) for name, p in step.model.named_parameters())
        skipped |= not moved
        if moved:
            break
    finite = all(p.isfinite().all() for p in step.model.parameters())
    return {"yes": bool(skipped and moved and finite), "scale": scales[-1], "steps": len(scales)}


def parallel(form: str) -> dict:
    """Whether DistributedDataParallel, of one process, gives the gradients of the model itself."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=0, world_size=1,
                                init_method=f"file://{folder}/store")
        try:
            found = []
            for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
                step = Step(form, wrap)
                step.loss().backward()
                found.append(torch.cat([p.grad.flatten() for p in step.model.parameters()]))
        finally:
            dist.destroy_process_group()
    distance = float((found[0] - found[1]).norm() / found[0].norm())
    return {"yes": distance < 1e-2, "distance": distance}


def run(folder: Path) -> None:
    record = Record(folder, "train")
    torch.backends.cudnn.benchmark = True
    record.add(left_out=sorted(without_faulty(folder)), size=SIZE, batch=BATCH)
    done: list[bench_train.Row] = []
    networks(record, FIRST, folder, done)
    run_tasks(record, [
        *((f"captured {form}", partial(captured, form)) for form in ("bitkernels", "layers")),
        *((f"{name} bitkernels", partial(call, "bitkernels")) for name, call in (
            ("reduce-overhead", reduced), ("float16 with GradScaler", scaled),
            ("DistributedDataParallel", parallel))),
        ("stem", stem.probe)])
    networks(record, REST, folder, done)


def warm(network: str, form: str) -> None:
    """Compiles what this part gives torch.compile."""
    case = make_case(network)
    case.step(case.models[f"{form} compiled"])
    torch.cuda.synchronize()


