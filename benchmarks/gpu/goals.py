"""What is asked of an H200 or H100 (issues of the kernels and of training), and what a run says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# Times cuDNN's bf16 at batch 256, packed and with fp16 in and out; of the bytes' floor of a block.
CONV = {"64@56": (7.0, 2.3, 0.75), "128@28": (7.0, 3.0, 0.65), "256@14": (9.0, 5.0, 0.5),
        "512@7": (10.0, 7.0, 0.4)}
GEMM = {4096: 6.0, 8192: 10.5, 16384: 12.0}  # POPS, packed
TRITON = "triton"
BLOCK = {"256@14": 0.72, "64@56": 0.65}  # a training step in a graph, of the compiled one's
CONVERTED = ("quicknet", "reactnet18")
LIBRARY = ("cudnn bf16", "cudnn fp16", "cublas bf16")


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
        mark = {True: "met", False: "MISSED", None: "-"}[self.met]
        value = "-" if self.measured is None else f"{self.measured:.2f}"
        return f"{mark:7}{value:>7} {'<=' if self.at_most else '>='} {self.asked:<5g} {self.text}"


def best(us: Mapping[str, float]) -> tuple[str, float] | None:
    """The fastest of ours."""
    own = {name: t for name, t in us.items() if name not in LIBRARY}
    return min(own.items(), key=lambda item: item[1]) if own else None


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def row(found: Sequence[dict], **where: object) -> dict:
    """The first row with these values that has times; empty without one."""
    return next((one for one in found if one.get("us")
                 and all(one.get(k) == v for k, v in where.items())), {})


def over(one: dict, rival: str, name: str | None = None) -> float | None:
    """How many times faster than a rival of the same row our fastest, or the named one, is."""
    us = one.get("us", {})
    ours = best(us)
    return ratio(us.get(rival), us.get(name) if name else ours[1] if ours else None)


def goals(conv: Sequence[dict], gemm: Sequence[dict], block: Sequence[dict],
          trunk: Sequence[dict], train: Sequence[dict], models: Sequence[dict] = ()
          ) -> Iterator[Goal]:
    keyed = {one["key"]: one for one in (*block, *train) if "key" in one}
    for layer, (packed, real, part) in CONV.items():
        at = {"layer": layer, "batch": 256}
        yield Goal(f"conv {layer} packed: times cuDNN bf16", packed,
                   over(row(conv, **at, output="packed"), "cudnn bf16"))
        mixed = row(conv, **at, output="fp16 from fp16")
        yield Goal(f"conv {layer} fp16 in and out: times cuDNN bf16", real,
                   over(mixed, "cudnn bf16"))
        yield Goal(f"conv {layer} fp16 in and out, Triton alone: times cuDNN bf16", 1.0,
                   over(mixed, "cudnn bf16", TRITON))
        of_block = row(conv, **at, output="block")
        ours = best(of_block.get("us", {}))
        yield Goal(f"conv {layer} block: of the bytes' floor", part, ratio(
            of_block.get("floors", {}).get("bytes"), ours and ours[1]))
    for layer in CONV:
        ours = best(row(conv, layer=layer, batch=1, output="packed").get("us", {}))
        yield Goal(f"conv {layer} packed, batch 1: us", 4.0, ours and ours[1], at_most=True)
    for size, asked in GEMM.items():
        ours = best(row(gemm, size=size, output="packed").get("us", {}))
        yield Goal(f"product {size}^3 packed: POPS", asked,
                   2 * size**3 / ours[1] / 1e9 if ours else None)
    us = row(trunk, batch=64).get("us", {})
    fastest = min((t for name, t in us.items() if name.startswith("bf16")), default=None)
    own = min((t for name, t in us.items() if not name.startswith("bf16")), default=None)
    yield Goal("trunk, batch 64: times cuDNN bf16", 6.0, ratio(fastest, own))
    us = keyed.get("256@14 batch 256 inference", {}).get("us", {})
    own = min((t for name, t in us.items() if name not in ("eager", "compiled")), default=None)
    yield Goal("block 256@14, inference: times compiled emulation", 4.0,
               ratio(us.get("compiled"), own))
    for layer, asked in BLOCK.items():
        ours_, kept, one_pass, float8, rival = (
            keyed.get(f"{layer} batch 256 training {form}", {}) for form in (
                "block", "block kept", "block kept, one pass", "block kept, float8",
                "emulation compiled"))
        for what, name, mine, limit in (
                ("graph us", "", ours_, asked), ("peak MiB", "", ours_, 0.45),
                ("graph us", ", dot products kept", kept, asked),
                ("graph us", ", and in one pass", one_pass, asked),
                ("graph us", ", and in float8", float8, asked)):
            yield Goal(f"block {layer}, training{name}: {what} of compiled emulation's", limit,
                       ratio(mine.get(what), rival.get(what)), at_most=True)

    def form(*names: str) -> dict:
        found = [keyed[f"reactnet18 {name}"] for name in names
                 if keyed.get(f"reactnet18 {name}", {}).get("images/s")]
        return max(found, key=lambda one: one["images/s"], default={})

    rival = form("published compiled", "published compiled graph")
    fused, layers = (form(*(f"{name}{way}" for way in (
        "", " graph", " compiled", " compiled graph"))) for name in ("bitkernels", "layers"))
    yield Goal("ReActNet-18, blocks: images/s of compiled emulation's", 1.3,
               ratio(fused.get("images/s"), rival.get("images/s")))
    yield Goal("ReActNet-18, blocks: peak memory of compiled emulation's", 0.4,
               ratio(fused.get("peak MiB"), rival.get("peak MiB")), at_most=True)
    yield Goal("ReActNet-18, layers: images/s of compiled emulation's", 1.1,
               ratio(layers.get("images/s"), rival.get("images/s")))
    for name in CONVERTED:
        us = row(models, key=f"{name} batch 64").get("us", {})
        own = min((t for label, t in us.items() if label.startswith("converted")), default=None)
        yield Goal(f"{name} converted, batch 64: times compiled bf16 emulation", 4.0,
                   ratio(us.get("emulation bf16 compiled"), own))
