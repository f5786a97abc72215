"""What is asked of an H200, and what a run of gpu_check.py or gpu_check_cuda.py says about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

CONV = {"64@56": (1.5, 3.0), "128@28": (2.5, 4.0), "256@14": (3.0, 5.0), "512@7": (3.0, 5.0)}
LINEAR = {"int8": 2.0, "b1": 4.0}
# Of csrc/cuda: POPS by size; times cuDNN's bf16 with fp16 and with packed operands.
CUDA_GEMM = {4096: 4.1, 8192: 7.0, 16384: 8.5}
CUDA_CONV = {"64@56": (1.8, 5.0), "128@28": (3.5, 6.0), "256@14": (5.0, 8.0), "512@7": (5.0, 8.0)}


@dataclass(frozen=True)
class Goal:
    text: str
    asked: float
    measured: float | None  # None: this run does not say
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.asked if self.at_most else self.measured >= self.asked

    def line(self) -> str:
        mark = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        value = "-" if self.measured is None else f"{self.measured:.2f}"
        bound = "at most" if self.at_most else "at least"
        return f"{mark:12s} {self.text:52s} {value:>8s}, {bound} {self.asked:g}"

    def record(self) -> dict:
        return {**asdict(self), "met": self.met}


def _find(tree, *path):
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _ratio(above, below) -> float | None:
    return above / below if isinstance(above, float) and isinstance(below, float) else None


def goals(parts: dict) -> Iterator[Goal]:
    """Every goal, from the results of the parts by name. Times are the cold ones."""
    checks = [v for v in parts.get("selfcheck", {}).values() if isinstance(v, str)]
    yield Goal("operators that differ from the reference, or fail", 0.0,
               float(sum(v != "exact" for v in checks)) if checks else None, at_most=True)
    failing = _find(parts, "tests", "not passed")
    yield Goal("test jobs that do not pass on the GPU", 0.0,
               None if failing is None else float(len(failing)), at_most=True)

    def cold(*path):
        return _find(parts, *path, "cold")

    for inner, asked in LINEAR.items():
        yield Goal(f"linear 8192^3, {inner}, fp16 out: times cuBLAS bf16", asked, _ratio(
            cold("linear", "times", "cublas bf16"),
            cold("linear", "times", f"{inner} fp16 out")))
    for layer, asked_of in CONV.items():
        rows = _find(parts, "conv", "layers", layer) or {}
        for what, asked in zip(("fp16 in and out", "packed in and out"), asked_of, strict=True):
            ours = [_find(row, "cold") for name, row in rows.items() if name.endswith(what)]
            ours = [t for t in ours if isinstance(t, float)]
            yield Goal(f"conv {layer}, {what}: times cuDNN bf16", asked, _ratio(
                _find(rows, "cudnn bfloat16", "cold"), min(ours, default=None)))
    for rival, asked in (("compiled", 3.0), ("eager", 6.0)):
        yield Goal(f"block, inference: times {rival} emulation", asked, _ratio(
            cold("block", "inference", rival), cold("block", "inference", "fused")))
    training = _find(parts, "block", "training") or {}
    yield Goal("block, training step: times compiled emulation", 1.5, _ratio(
        _find(training, "compiled", "cold"), _find(training, "binary compiled", "cold")))
    yield Goal("block, training step: peak memory of compiled emulation's", 0.5, _ratio(
        _find(training, "binary compiled", "peak MiB"), _find(training, "compiled", "peak MiB")),
        at_most=True)
    copy = _find(parts, "bandwidth", "times", "copy", "GB/s")
    for name in ("sign_pack nhwc", "sign_pack nchw", "rprelu", "rprelu_backward"):
        yield Goal(f"{name}: of measured copy bandwidth", 0.8, _ratio(
            _find(parts, "bandwidth", "times", name, "GB/s"), copy))


def cuda_goals(steps: Mapping[str, Mapping], tables: Mapping[str, Sequence[Mapping[str, str]]]
               ) -> Iterator[Goal]:
    """Of csrc/cuda, from the results of the steps and the csv files that they wrote, by name."""
    for text, kind in (("kernels that differ from the reference, fail or hang", "check "),
                       ("shards of the tests that do not pass", "tests ")):
        found = ["failed" in result for name, result in steps.items() if name.startswith(kind)]
        yield Goal(text, 0.0, float(sum(found)) if found else None, at_most=True)

    def value(table: str, column: str, **where: object) -> float | None:
        for row in tables.get(table, ()):
            if all(row.get(key) == str(wanted) for key, wanted in where.items()):
                return float(row[column]) if row.get(column) else None
        return None

    for size, asked in CUDA_GEMM.items():
        yield Goal(f"product {size}^3, packed out: POPS", asked,
                   value("gemm", "POPS", size=size, provider="cuda packed"))
    yield Goal("product 8192^3, packed out: times cuBLAS bf16", 8.0,
               value("gemm", "over bf16", size=8192, provider="cuda packed"))
    for layer, asked_of in CUDA_CONV.items():
        for output, asked in zip(("fp16", "packed"), asked_of, strict=True):
            yield Goal(f"conv {layer}, {output} in and out: times cuDNN bf16", asked,
                       value("conv", "speedup_over_bf16", layer=f"3x3:{layer}", batch=256,
                             kernel_provider=f"cuda {output}"))
    yield Goal("block 256@14, inference: times compiled emulation", 4.0,
               value("block", "cuda_speedup", block="256@14", batch=256, mode="inference",
                     kernel_provider="compiled"))
    over = value("trunk", "graph over bf16", provider="cuda packed")
    yield Goal("trunk in a CUDA graph: of cuDNN bf16's time", 0.2,
               None if over is None else 1 / over, at_most=True)
