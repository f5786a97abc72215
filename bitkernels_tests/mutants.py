"""Do the tests notice mistakes? Puts each mutant of `mutant_list.py` into a copy of the tree.

    python -m bitkernels_tests.mutants [--list] [--only NAME ...] [--jobs N] [--seconds S]

The tests that should notice it must fail there, and pass on a copy without it, which is checked
first. Exit status 1 if a mutant is not noticed, its tests do not run, or it applies no more: then
the tests lack one of its kind, or the list is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitkernels_tests import ROOT
from bitkernels_tests.mutant_list import MUTANTS, Mutant

OBJECTS = ROOT / "build" / "mutants"  # of the engine's test, by what the preprocessor makes of it
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-O1", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-w", "-Icsrc")
ENGINES = {"engine": (), "races": ("-fsanitize=thread", "-DREAL_THREADS")}
ISA = "scalar"  # the kernel that the engine's test runs: others are compiled without the mutant


class Broken(Exception):
    """Why a run says nothing of a mutant."""


def copy(to: Path, mutant: Mutant | None = None) -> Path:
    """The files that git knows or would add, and the built extension."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = {n for n in listed.split("\0") if n}
    for name in names | {str(p.relative_to(ROOT)) for p in ROOT.glob("bitkernels/_C*.so")}:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    if mutant is not None:
        path = to / mutant.file
        text = path.read_text() if path.exists() else ""
        if text.count(mutant.old) != 1:
            raise Broken(f"applies no more: {mutant.file} has its text {text.count(mutant.old)} "
                         "times")
        path.write_text(text.replace(mutant.old, mutant.new))
    return to


def run(command, cwd: Path, seconds: float, **environment: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, cwd=cwd, timeout=seconds, capture_output=True, text=True, errors="replace",
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                 "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment})
    except subprocess.TimeoutExpired:
        raise Broken(f"the tests ran past {seconds:g} s") from None
    return done.returncode, done.stdout + done.stderr


def failing_test(tests: tuple[str, ...], tree: Path, seconds: float) -> str | None:
    """The first test that fails, or None if all pass. Raises Broken if they do not run."""
    interpret = {"TRITON_INTERPRET": "1"} if "triton/test_interpret" in tests[0] else {}
    code, said = run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                      *(f"bitkernels_tests/{test}" for test in tests)], tree, seconds, **interpret)
    last = said.strip().splitlines()[-1]
    if code == 0 and " passed" not in last:
        raise Broken(f"no test ran: {last}")
    if code == 0:
        return None
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code < 0:  # a signal
        return f"the process died of signal {-code}"
    if code != 1 or not failed:
        raise Broken(f"pytest ended with {code}: {failed[0] if failed else last}")
    return failed[0].split(" - ")[0].removeprefix("FAILED bitkernels_tests/")


def engine_failure(which: str, tree: Path, seconds: float) -> str | None:
    """As `failing_test`, of the engine's own test."""
    made_with, objects = (*FLAGS, *ENGINES[which]), []
    OBJECTS.mkdir(parents=True, exist_ok=True)
    for source in sorted([*tree.glob("csrc/cpu/*.cpp"), *tree.glob("csrc/tests/*.cpp")]):
        other = source.name.startswith("kernels_") and source.name != f"kernels_{ISA}.cpp"
        path = (ROOT if other else tree) / source.relative_to(tree)
        flags = tuple(flag for flag in made_with  # as `make kernel-test` does
                      if source.parent.name != "tests" or not flag.startswith("-fsanitize"))
        code, text = run([COMPILER, *flags, "-E", "-P", path], tree, seconds)
        key = hashlib.sha256("\0".join((COMPILER, *flags, text)).encode()).hexdigest()[:24]
        made = OBJECTS / f"{key}.o"
        if not made.exists():
            part = made.with_suffix(f".{time.monotonic_ns()}.o")
            code, said = run([COMPILER, *flags, "-c", path, "-o", part], tree, seconds)
            if code:
                raise Broken(f"{source.name} does not compile: {said.splitlines()[0]}")
            part.replace(made)
        objects.append(made)
    program = tree / "kernel_test"
    code, said = run([COMPILER, *made_with, *objects, "-o", program], tree, seconds)
    if code:
        raise Broken(f"the engine's test does not link: {said.splitlines()[0]}")
    code, said = run([program, ISA], tree, seconds, TSAN_OPTIONS="halt_on_error=1")
    if code == 0:
        return None
    wrong = [line for line in said.splitlines() if "WARNING: ThreadSanitizer" in line] or [
        line for line in said.splitlines() if line] or [f"exit status {code}"]
    return f"kernel_test: {wrong[0].strip()}"


def failure(tests: tuple[str, ...], tree: Path, seconds: float) -> str | None:
    if tests[0] in ENGINES:
        return engine_failure(tests[0], tree, seconds)
    return failing_test(tests, tree, seconds)


def clean_runs(mutants: list[Mutant]) -> list[tuple[str, ...]]:
    """All tests of these mutants, in as few runs as they can share; those of a file together."""
    groups: dict[str, set[str]] = {}
    for mutant in mutants:
        first = mutant.tests[0]
        kind = first if first in ENGINES else str("triton/test_interpret" in first)
        groups.setdefault(kind, set()).update(mutant.tests)
    return [tuple(sorted(test for test in tests
                         if "::" not in test or test.partition("::")[0] not in tests))
            for tests in groups.values()]


def tried(mutant: Mutant, seconds: float) -> tuple[bool, str]:
    """(whether it was noticed, by what or why not)."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = failure(mutant.tests, copy(Path(folder), mutant), seconds)
        except Broken as error:
            return False, str(error)
    took = f"{time.monotonic() - started:.0f} s"
    return (True, f"{found} ({took})") if found else (False, f"not noticed ({took})")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bitkernels_tests.mutants",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time")
    parser.add_argument("--seconds", type=float, default=600, metavar="S",
                        help="that the tests of one mutant may take (600)")
    options = parser.parse_args()
    names = [m.name for m in MUTANTS]
    if unknown := sorted(set(options.only or ()) - set(names)):
        parser.error(f"no mutant {', '.join(unknown)}; --list shows those there are")
    mutants = [m for m in MUTANTS if not options.only or m.name in options.only]
    if options.list:
        for m in mutants:
            print(f"{m.name}\n  {m.file}\n  - {m.old.strip()}\n  + {m.new.strip()}\n"
                  f"  noticed by {' '.join(m.tests)}")
        return 0
    for tests in clean_runs(mutants):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = failure(tests, copy(Path(folder)), 10 * options.seconds)
            except Broken as error:
                found = str(error)
        if found is not None:
            print(f"the tests do not pass without a mutant: {found}")
            return 1
    missed = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for m, (noticed, what) in zip(
                mutants, pool.map(lambda m: tried(m, options.seconds), mutants), strict=True):
            print(f"{'noticed' if noticed else 'MISSED '}  {m.name}: {what}", flush=True)
            missed += [] if noticed else [m.name]
    print(f"{len(mutants) - len(missed)} of {len(mutants)} mutants noticed"
          + (f"; not {', '.join(missed)}" if missed else ""))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
