"""The screen that a run of check.py ends with, from what its parts have written so far."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import goals
from record import by_kernel, hung, rows

WRONG = "WRONG"
# Of an output: its name here, and room for its cells.
COLUMNS = {"packed": ("packed", 25), "fp16": ("fp16 out", 20),
           "fp16 from fp16": ("fp16 in, out", 25), "block": ("block", 20),
           "moments int16": ("moments", 20)}
WIDTH, MOST_FAILED = 138, 6


def write_state(raw: Path, state: Sequence[Mapping]) -> None:
    (raw / "parts.json").write_text(json.dumps(list(state), indent=1) + "\n")


def status(part: Mapping) -> str:
    if part["jobs"] is None:
        return f"{part['part']:10} not run: no time left" if part["part"] != "interrupted" \
            else "interrupted"
    if not part["jobs"]:
        return f"{part['part']:10} not run: what it needs is not installed here"
    said = f"{part['part']:10} {part['seconds']:5.1f} s"
    if part["failed"]:
        each = [f"{job} ({why})" if job != part["part"] else why
                for job, why in part["failed"].items()]
        more = len(each) - MOST_FAILED
        said += "  FAILED " + ", ".join(
            each[:MOST_FAILED] + [f"and {more} more"] * (more > 0))
    return said


def last_words(raw: Path, part: Mapping) -> list[str]:
    """Of the first job that failed by itself, beside those of tests and tools."""
    for job, why in part["failed"].items():
        name = part["part"] if job == part["part"] else f"{part['part']}-{job}"
        log = raw / "log" / f"{name.replace('/', '_')}.txt"
        if why.startswith("exit") and part["part"] not in ("tests", "sanitizer") and log.exists():
            lines = log.read_text(errors="replace").strip().splitlines()
            return [f"  {job}: {lines[-1]}"[:WIDTH]] if lines else []
    return []


def text(raw: Path, state: Sequence[Mapping], gpu: str, seconds: float) -> str:
    lines = [f"{gpu}, {seconds:.0f} s"]
    for part in state:
        lines += [status(part), *last_words(raw, part)]
    for section in (correctness, tested, compiled, convolutions, products, blocks, trunk,
                    training, models, plan, asked):
        try:
            lines += section(raw)
        except Exception as error:  # a result of a form that is not foreseen hides no other
            lines.append(f"{section.__name__}: {type(error).__name__}: {error}")
    return "\n".join(part for line in lines for part in wrapped(line)) + "\n"


def wrapped(line: str) -> list[str]:
    """Nothing is cut off: what does not fit goes on below."""
    line = line.rstrip()
    return [line] if len(line) <= WIDTH else textwrap.wrap(
        line, WIDTH, subsequent_indent="      ", break_on_hyphens=False)


def asked(raw: Path) -> Iterator[str]:
    every = list(goals.goals(*(rows(raw, part) for part in (
        "conv", "gemm", "block", "trunk", "train", "models"))))
    said = [goal for goal in every if goal.met is not None]
    if said:
        met = sum(goal.met is True for goal in said)
        yield f"goals: {met} met, {len(said) - met} missed, {len(every) - len(said)} not measured"
        yield from (f"  {goal.line()}" for goal in said)


def correctness(raw: Path) -> Iterator[str]:
    found = by_kernel(rows(raw, "correct"))
    if not found:
        return
    exact = {name: sum("wrong" in row and row["wrong"] is None for row in of)
             for name, of in found.items()}
    yield "exact checks: " + ", ".join(f"{name} {count}" for name, count in exact.items())
    for name, of in found.items():
        for row in [row for row in of if row.get("wrong")][:3]:
            yield f"  {WRONG} {name}: {row['key']}: {row['wrong']}"
        if (where := hung(of)) is not None:
            yield f"  {WRONG} {name}: no end in {where}"
        yield from (f"  {name} stopped {row['stopped']}" for row in of if row.get("stopped"))


def tested(raw: Path) -> Iterator[str]:
    """The last line of each test file's output, where it did not pass, and of the sanitizer's."""
    passed = 0
    for log in sorted((raw / "log").glob("tests-*.txt")):
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        count = re.search(r"(\d+) passed", last)
        passed += int(count[1]) if count else 0
        if re.search(r"failed|error", last) or not count:
            yield f"  {log.stem}: {last[-90:] or 'no output'}"
    if passed:
        yield f"tests that passed on the GPU: {passed}"
    logs = sorted((raw / "log").glob("sanitizer-*.txt"))
    clean = 0
    for log in logs:
        said = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", log.read_text(errors="replace"))
        good = bool(said) and re.match(r"0 (?:errors|hazards)", said[-1]) is not None
        clean += good
        if said and not good:
            yield f"  {log.stem}: {said[-1][:80]}"
    if logs:
        yield f"sanitizer: {clean} of {len(logs)} clean"


def compiled(raw: Path) -> Iterator[str]:
    found = rows(raw, "compile")
    done = [row for row in found if "seconds" in row]
    failed = [row for row in found if row.get("failed")]
    if found:
        yield (f"compiled: {len(done)} in {sum(row['seconds'] for row in done):.0f} s of all "
               f"processes, {len(failed)} failed"
               + (f"; first {failed[0]['key']}: {failed[0]['failed'][:60]}" if failed else ""))
    for row in rows(raw, "build")[-1:]:
        yield f"CPU engine: {row.get('said', '')[:100]}"


def cell(row: Mapping) -> str:
    ours = goals.best(row.get("us", {}))
    if ours is None:
        return "-"
    floor = max(row["floors"].values())
    return f"{ours[1]:.1f} {short(ours[0])} {100 * floor / ours[1]:.0f}%"


def short(kernel: str) -> str:
    """resident4_64x64_bulk as r4_64x64+, resident_64x128_turns as r_64x128t."""
    return re.sub(r"^([a-z])[a-z]*(\d*)_(.*?)(_bulk|_turns)?$", lambda found: "".join((
        found[1], found[2], "_", found[3], {"_bulk": "+", "_turns": "t"}.get(found[4], ""))),
        kernel)


def convolutions(raw: Path) -> Iterator[str]:
    found = rows(raw, "conv")
    if not any(row.get("us") for row in found):
        return
    copy = next((row["copy"] for row in found if "copy" in row), None)
    yield ("3x3 convolutions, us of the fastest kernel, of its floor; packed and fp16 times cuDNN "
           f"bf16{f'; copy {copy / 1e12:.2f} TB/s' if copy else ''}")
    yield (f"{'':14}{'cudnn':>6}  "
           + "".join(f"{name:{width}}" for name, width in COLUMNS.values()))
    for layer, batch in dict.fromkeys((row["layer"], row["batch"]) for row in found
                                      if "layer" in row):
        of = {output: goals.row(found, layer=layer, batch=batch, output=output)
              for output in COLUMNS}
        library = of["packed"].get("us", {}).get("cudnn bf16")
        line = f"{layer:8}b{batch:<5}{library or 0:6.1f}  "
        for output, row in of.items():
            rate = goals.over(row, "cudnn bf16")
            said = cell(row) + (f" {rate:.1f}x" if rate else "")
            line += f"{said:{COLUMNS[output][1] - 1}} "
        yield line
    yield from failures(found)


def failures(found: Sequence[Mapping]) -> Iterator[str]:
    failed = [(row["key"], name, why) for row in found
              for name, why in row.get("errors", {}).items()]
    failed += [(row["key"], "", row["failed"]) for row in found if row.get("failed")]
    failed += [("", row["broken"], row.get("error", "")) for row in found if row.get("broken")]
    for key, name, why in failed[:4]:
        yield f"  failed: {name} {key}: {why}"[:WIDTH]
    if len(failed) > 4:
        yield f"  ... and {len(failed) - 4} more"
    yield from (f"  stopped {row['stopped']}" for row in found if row.get("stopped"))


def products(raw: Path) -> Iterator[str]:
    found = rows(raw, "gemm")
    for size in dict.fromkeys(row["size"] for row in found if "size" in row):
        for output in ("packed", "fp16"):
            row = goals.row(found, size=size, output=output)
            rates = sorted(((2 * size**3 / t / 1e9, name) for name, t in row.get("us", {}).items()),
                           reverse=True)
            own = [f"{short(name)} {rate:.2f}" for rate, name in rates
                   if name not in goals.LIBRARY][:4]
            library = [f"{name} {rate:.2f}" for rate, name in rates if name in goals.LIBRARY]
            if own or library:
                yield f"product {size}^3, POPS  {output}: " + ", ".join(own + library)
    yield from failures(found)


def timed(row: dict, what: str) -> Iterator[str]:
    """Microseconds by name, and which of them are of wrong results."""
    yield f"{what}: " + ", ".join(f"{name} {t:.0f}" for name, t in row["us"].items())
    yield from (f"  {WRONG} {name}: {why}" for name, why in row.get("wrong", {}).items())


def blocks(raw: Path) -> Iterator[str]:
    found = rows(raw, "block")
    for row in found:
        if row.get("us"):
            yield from timed(row, f"block {row['key']}, us of {row['blocks']}")
        elif "device us" in row:
            yield (f"block {row['key']:44} graph {row.get('graph us', math.nan):7.0f} us, "
                   f"{row['launches']:3.0f} launches, host {row['host us']:5.0f}, peak "
                   f"{row['peak MiB']:.0f} MiB")
    yield from failures(found)


def trunk(raw: Path) -> Iterator[str]:
    found = rows(raw, "trunk")
    for row in found:
        if row.get("us"):
            yield from timed(row, f"trunk {row['key']}, us")
    yield from failures(found)


def training(raw: Path) -> Iterator[str]:
    found = [row for row in rows(raw, "train") if "key" in row]
    networks: dict[str, list[str]] = {}
    for row in found:
        if row.get("images/s"):
            name, _, form = row["key"].partition(" ")
            networks.setdefault(name, []).append(
                f"{form} {row['images/s']:.0f}/s {row['peak MiB'] / 1024:.1f}G")
    for name, forms in networks.items():
        for at in range(0, len(forms), 4):
            yield f"{name if not at else '':11}" + ", ".join(forms[at:at + 4])
    said = [f"{row['key']}: {'yes' if row['yes'] else 'NO'}" for row in found if "yes" in row]
    said += [f"{row['key']} {row['accuracy']:.3f} ({row['from']:.3f} to {row['to']:.3f})"
             for row in rows(raw, "digits")]
    said += [f"{row['key']}: {'yes' if row[close] else 'NO'}" for row in found
             for close in ["first block close to the emulation"] if close in row]
    if said:
        yield "; ".join(said)
    for row in found:
        if row.get("us"):
            yield from timed(row, f"{row['key']}, us")
    yield from failures(rows(raw, "train"))


def models(raw: Path) -> Iterator[str]:
    found = rows(raw, "models")
    for row in found:
        if row.get("us"):
            yield from timed(row, f"{row['key']}, us")
            yield from (f"  {name}: {why}" for name, why in row.get("notes", {}).items())
    yield from failures(found)


def plan(raw: Path) -> Iterator[str]:
    path = raw / "measured.json"
    if path.exists():
        table = json.loads(path.read_text())
        yield "measured.json: " + ", ".join(
            f"{arch} {len(entry['calls'])} calls" for arch, entry in table.items())
    found = rows(raw, "plan")
    for row in found:
        if row.get("wrong"):
            yield f"  {WRONG} {row['wrong']}"
    yield from failures(found)
