"""benchmarks/gpu/check.py without a GPU: budget, limits, kills, what a run leaves, its screen."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bitkernels_tests import ROOT, conftest

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import check
import goals
import record
import schedule
import summary
from schedule import Job, Part

PYTHON = (sys.executable, "-c")


def part(name, *codes, seconds=20.0, least=1.0, first=0, at_once=8, margin=0.5):
    jobs = [Job(name if not i else f"{name}{i}", [*PYTHON, code]) for i, code in enumerate(codes)]
    return Part(name, lambda: jobs, seconds, least, first, at_once, margin)


def run(stages, tmp_path, budget=60.0):
    """{part: (seconds, ended)}"""
    found = {}
    schedule.run(stages, budget, tmp_path / "log", tmp_path,
                 lambda one, seconds, ended: found.update({one.name: (seconds, ended)}))
    return found


def test_a_job_that_hangs_is_killed_with_what_it_started(tmp_path):
    code = ("import subprocess, sys, time; "
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
            "print(child.pid, flush=True); time.sleep(99)")
    start = time.time()
    found = run([[part("hangs", code, "print('well')", seconds=3)], [part("next", "pass")]],
                tmp_path)
    assert time.time() - start < 30
    hung, well = found["hangs"][1]
    assert hung.code is None and hung.failed.startswith("killed after") and well.failed is None
    assert found["next"][1][0].failed is None
    child = int((tmp_path / "log" / "hangs.txt").read_text())  # written before the kill
    assert (tmp_path / "log" / "hangs-hangs1.txt").read_text() == "well\n"
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child of a killed job lives on")


def test_failures_and_missing_programs_are_told(tmp_path):
    stage = [part("fails", "raise SystemExit(3)"),
             Part("absent", lambda: [Job("absent", ["/no/such/program"])], 9, 1, 0),
             Part("unlisted", lambda: 1 / 0, 9, 1, 0), Part("nothing", list, 9, 1, 0)]
    found = {name: ended for name, (_, ended) in run([stage], tmp_path).items()}
    assert [one.failed for one in found["fails"]] == ["exit 3"]
    assert [one.failed for one in found["absent"]] == ["exit 127"]
    assert [one.failed for one in found["unlisted"]] == ["exit 1"] and found["nothing"] == []
    assert "ZeroDivisionError" in (tmp_path / "log" / "unlisted.txt").read_text()


def test_a_job_knows_its_end(tmp_path):
    code = f"import os, time; print(float(os.environ['{schedule.END}']) - time.time())"
    run([[part("asks", code, seconds=9, margin=4)]], tmp_path)
    assert 3 < float((tmp_path / "log" / "asks.txt").read_text()) < 5
    assert schedule.end_of_job() == float("inf")


def test_jobs_behind_others_are_not_started_after_the_end(tmp_path):
    ended = run([[part("queue", *["import time; time.sleep(9)"] * 3, seconds=2, at_once=1)]],
                tmp_path)["queue"][1]
    assert [one.code for one in ended] == [None] * 3
    assert ended[1].failed == ended[2].failed == "no time left to start"


@pytest.mark.parametrize("left, expected", [
    (100, 50),  # its limit
    (40, 30),  # what matters more keeps its least
    (14, 0),  # too little
])
def test_shares_of_the_time_that_is_left(left, expected):
    later = [part("more", seconds=60, least=10, first=1), part("less", least=30, first=9)]
    assert schedule.share(part("this", seconds=50, least=5, first=3), later, left) == expected


def test_parts_without_time_are_not_run(tmp_path):
    found = run([[part("first", "import time; time.sleep(1)", seconds=2)],
                 [part("second", "pass", least=9)]], tmp_path, budget=4)
    assert found["second"] == (0.0, None) and found["first"][1][0].code == 0


def test_parts_of_a_stage_run_side_by_side(tmp_path):
    wait = "import os, time\nopen('{}', 'w')\nwhile not os.path.exists('{}'): time.sleep(0.02)"
    found = run([[part("a", wait.format("a", "b")), part("b", wait.format("b", "a"))]], tmp_path)
    assert [one.code for _, ended in found.values() for one in ended] == [0, 0]


def test_a_part_may_span_the_next_stage_and_no_more(tmp_path):
    begun = "import time; open('{}', 'w').write(str(time.time()))"
    slow = Part("slow", lambda: [Job("slow", [*PYTHON, "import time; time.sleep(4); "
                                              "open('slow', 'w').write(str(time.time()))"])],
                20, 1, 0, spans=True)
    found = run([[part("a", begun.format("a")), slow], [part("b", begun.format("b"))],
                 [part("c", begun.format("c"))]], tmp_path)
    at = {name: float((tmp_path / name).read_text()) for name in ("a", "b", "c", "slow")}
    assert at["a"] < at["b"] < at["slow"] < at["c"] and set(found) == {"slow", "a", "b", "c"}


# The command.


def planned(**kw):
    return [one for stage in check.stages(ROOT / "nowhere", check.PARTS, **kw) for one in stage]


def test_the_default_parts_fit_seven_minutes_about():
    """Some end early, and what matters least gives way to what matters more."""
    stages = check.stages(ROOT / "nowhere", check.DEFAULT)
    assert 400 <= sum(max(one.seconds for one in stage if not one.spans)
                      for stage in stages) <= 440
    assert sum(max(one.least for one in stage) for stage in stages) <= 180
    assert [one.name for one in planned()] == list(check.PARTS)
    assert all(two.seconds == 2 * one.seconds
               for one, two in zip(planned(), planned(scale=2), strict=True))


def test_only_what_is_not_timed_shares_the_gpu():
    for stage in check.stages(ROOT / "nowhere", check.PARTS):
        if len(stage) > 1:
            assert {one.name for one in stage} in (
                {"compile", "whole", "build"}, {"tests", "digits", "sanitizer"})
    order = [one.name for one in planned()]
    assert [one.name for one in planned() if one.spans] == ["whole", "build"]
    assert order[3] == "correct"
    assert not any(one.spans for stage in check.stages(ROOT, ("build", "conv")) for one in stage)
    assert order.index("correct") < order.index("conv") < order.index("tests")


def test_a_dry_run_lists_parts_limits_and_commands(monkeypatch, capsys):
    monkeypatch.setattr(check, "gpu_name", lambda: None)
    monkeypatch.setattr(check, "sanitizer", lambda: ("/opt/compute-sanitizer",))
    assert check.main(["--dry-run", "--parts", "correct,conv", "tests", "sanitizer"]) == 0
    said = capsys.readouterr().out
    for kernel in check.kernel_names():
        assert kernel in said
    assert "correct      40   15 s" in said and "--run conv" in said
    assert "-m pytest" in said and "--tool memcheck" in said and "train " not in said


@pytest.mark.parametrize("parts, also", [("compile,models", True), ("compile,conv", False),
                                         ("models", False)])
def test_what_compiles_does_so_for_whole_networks_too(monkeypatch, capsys, parts, also):
    monkeypatch.setattr(check, "gpu_name", lambda: None)
    assert check.main(["--dry-run", "--parts", parts]) == 0
    assert ("--run whole --job models quicknet" in capsys.readouterr().out) == also


def test_every_job_is_one_that_the_script_runs(monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(check, "sanitizer", lambda: ("/opt/compute-sanitizer",))
    for jobs in (*(one.jobs() for one in planned() if one.name not in ("tests", "ncu")),):
        assert jobs
        for job in jobs:
            called = job.command[job.command.index("--run") + 1]
            ran = []
            monkeypatch.setattr(check.importlib, "import_module", lambda name, ran=ran: type(
                "Module", (), {"__getattr__": lambda self, function: (
                    lambda *args: ran.append((name, function, args)))})())
            check.run_job(called, job.name, Path("out"))
            assert ran
            monkeypatch.undo()
            monkeypatch.setattr(check.shutil, "which", lambda name: f"/opt/{name}")
            monkeypatch.setattr(check, "sanitizer", lambda: ("/opt/compute-sanitizer",))
    assert all((ROOT / "bitkernels_tests" / f"{name}.py").exists() for name in check.TESTS)


def test_without_a_gpu_nothing_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check, "gpu_name", lambda: None)
    assert check.main(["--out", str(tmp_path / "out")]) == 1
    assert "no GPU" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", (["--parts", "nothing"], ["--minutes", "0"], ["--parts", ","]))
def test_bad_options_are_refused(options):
    with pytest.raises(SystemExit):
        check.main(options)


ROWS = "import json; print(json.dumps({'key': 'x'}), file=open('out/raw/conv.jsonl', 'w'))"


@pytest.fixture
def stays(monkeypatch):
    """What a run changes in this process."""
    monkeypatch.setattr(check, "ask_kernel_names", lambda: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = dict(os.environ)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


def test_a_run_leaves_a_summary_and_one_archive(tmp_path, monkeypatch, stays, capsys):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    stages = [[part("conv", ROWS)],
              [part("train", "print('here', flush=True); import time; time.sleep(99)", seconds=3)],
              [Part("tests", list, 9, 1, 0), part("gemm", "print('at last'); raise SystemExit(1)")],
              [part("plan", "pass", least=500)]]
    assert check.follow(stages, 60, tmp_path / "out", "a GPU") == 1
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["results.tar.gz", "summary.txt"]
    with tarfile.open(out / "results.tar.gz") as tar:
        assert {"conv.jsonl", "parts.json", "log/conv.txt", "log/train.txt"} <= set(tar.getnames())
        assert tar.extractfile("log/train.txt").read() == b"here\n"
        state = {one["part"]: one for one in json.load(tar.extractfile("parts.json"))}
    assert state["conv"]["failed"] == {} and "killed after" in state["train"]["failed"]["train"]
    said = (out / "summary.txt").read_text()
    assert said in capsys.readouterr().out
    for line in ("train .* FAILED killed after 3 s", "plan .* no time left",
                 "tests .* not installed", "gemm .* FAILED exit 1\n  gemm: at last"):
        assert re.search(line, said), said


def test_an_interrupted_run_packs_what_it_has(tmp_path):
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks/gpu')!r}]\n"
            "import check; from schedule import Job, Part; from pathlib import Path\n"
            "check.ROOT = Path.cwd(); check.ask_kernel_names = lambda: None\n"
            "def part(name, code): return Part(name, lambda: [Job(name, "
            "[sys.executable, '-c', code])], 60, 1, 0)\n"
            f"stages = [[part('conv', {ROWS!r} + '; open(\"begun\", \"w\"); import time; "
            "time.sleep(99)')], [part('gemm', 'open(\"never\", \"w\")')]]\n"
            "raise SystemExit(check.follow(stages, 60, Path('out').resolve(), 'a GPU'))")
    child = subprocess.Popen([*PYTHON, code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=40)
    assert "interrupted" in said and not (tmp_path / "never").exists()
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as tar:
        assert tar.extractfile("conv.jsonl").read() == b'{"key": "x"}\n'


# Records.


def test_a_line_that_a_kill_cut_is_left_out(tmp_path):
    one = record.Record(tmp_path, "conv")
    one.add(key="a", us=1)
    with one.path.open("a") as file:
        file.write('{"key": "b", "u')
    assert record.rows(tmp_path, "conv") == [{"key": "a", "us": 1}]
    assert record.Record(tmp_path, "conv").done == {"a"}


def test_a_broken_context_starts_the_process_anew_once(tmp_path, monkeypatch):
    monkeypatch.setattr(record.os, "execv", lambda *args: (_ for _ in ()).throw(SystemExit))
    error = RuntimeError("an illegal\nmemory access")
    with pytest.raises(SystemExit):
        record.Record(tmp_path, "conv").broken("kernel a", error)
    again = record.Record(tmp_path, "conv")
    assert again.bad == {"kernel a"}
    with pytest.raises(RuntimeError, match="illegal"):
        again.broken("kernel a", error)


def test_kernels_at_fault_are_known_by_their_checks(tmp_path):
    for name, lines in {
            "right": [{"begun": "x"}, {"key": "x", "wrong": None}, {"stopped": None}],
            "hangs": [{"begun": "x"}, {"key": "x", "wrong": None}, {"begun": "y"}],
            "triton": [{"begun": "x"}],
            "breaks": [{"begun": "x"}, {"key": "x", "wrong": "illegal", "broken": True}],
            "differs": [{"begun": "x"}, {"key": "x", "wrong": "output 0 differs"},
                        {"stopped": "before y: out of time"}]}.items():
        one = record.Record(tmp_path, f"correct-{name}")
        for line in lines:
            one.add(kernel=name, **line)
    assert record.faulty(tmp_path) == ({"hangs", "breaks"}, {("differs", "x")})
    said = "\n".join(summary.correctness(tmp_path))
    assert f"{summary.WRONG} hangs: no end in y" in said and "right 1" in said
    assert f"{summary.WRONG} differs: x: output 0 differs" in said and "stopped before y" in said


# The screen.


def results(folder):
    conv = record.Record(folder, "conv")
    conv.add(copy=4.1e12, gpu="a GPU")
    floors = {"tensor": 4.4, "bytes": 25.0}
    for output, us in {"packed": {"mine_a": 12.0, "triton": 30.0, "cudnn bf16": 90.0},
                       "fp16 from fp16": {"mine_a": 20.0, "triton": 100.0, "cudnn bf16": 90.0},
                       "block": {"mine_a": 50.0}}.items():
        conv.add(key=f"c {output}", layer="256@14", batch=256, output=output, us=us, floors=floors,
                 errors={"mine_b": "not exact when it was checked"} if output == "block" else {})
    conv.add(stopped="before 512@7: out of time")
    gemm = record.Record(folder, "gemm")
    gemm.add(key="g", size=4096, output="packed", us={"bulk": 25.0, "cublas bf16": 180.0})
    block = record.Record(folder, "block")
    block.add(key="256@14 batch 256 inference", blocks=3,
              us={"compiled": 400.0, "triton": 500.0, "cuda": 90.0}, wrong={"triton": "differs"})
    for form, device, peak in (("block", 600.0, 30.0), ("block kept", 350.0, 45.0),
                               ("emulation compiled", 500.0, 100.0)):
        block.add(key=f"256@14 batch 256 training {form}", **{
            "device us": 2 * device, "graph us": device, "launches": 30, "host us": 1.0,
            "peak MiB": peak})
    record.Record(folder, "trunk").add(key="batch 64", batch=64, us={
        "cuda": 100.0, "bf16 channels_last": 700.0, "bf16 contiguous": 900.0})
    train = record.Record(folder, "train")
    for form, rate, peak in (
            ("published compiled", 1000.0, 20480.0), ("bitkernels", 1200.0, 8192.0),
            ("bitkernels compiled", 1400.0, 7168.0), ("layers", 900.0, 9999.0)):
        train.add(key=f"reactnet18 {form}", **{"images/s": rate, "peak MiB": peak})
    train.add(key="captured layers", yes=False)
    record.Record(folder, "models").add(key="quicknet batch 64", us={
        "converted": 300.0, "converted bf16": 200.0, "emulation bf16": 5000.0,
        "emulation bf16 compiled": 1000.0}, wrong={"converted": "1/64 images close"})
    record.Record(folder, "digits-cuda").add(key="digits cuda", accuracy=0.9,
                                             **{"from": 0.8, "to": 0.95})


def test_goals_compare_with_what_is_asked(tmp_path):
    results(tmp_path)
    found = {goal.text: goal for goal in goals.goals(*(record.rows(tmp_path, name) for name in (
        "conv", "gemm", "block", "trunk", "train", "models")))}
    measured = {text: (round(goal.measured, 3), goal.met) for text, goal in found.items()
                if goal.met is not None}
    assert measured == {
        "conv 256@14 packed: times cuDNN bf16": (7.5, False),
        "conv 256@14 fp16 in and out: times cuDNN bf16": (4.5, False),
        "conv 256@14 fp16 in and out, Triton alone: times cuDNN bf16": (0.9, False),
        "conv 256@14 block: of the bytes' floor": (0.5, True),
        "product 4096^3 packed: POPS": (5.498, False),
        "trunk, batch 64: times cuDNN bf16": (7.0, True),
        "block 256@14, inference: times compiled emulation": (4.444, True),
        "block 256@14, training: graph us of compiled emulation's": (1.2, False),
        "block 256@14, training: peak MiB of compiled emulation's": (0.3, True),
        "block 256@14, training, dot products kept: graph us of compiled emulation's":
            (0.7, True),
        "ReActNet-18, blocks: images/s of compiled emulation's": (1.4, True),
        "ReActNet-18, blocks: peak memory of compiled emulation's": (0.35, True),
        "ReActNet-18, layers: images/s of compiled emulation's": (0.9, False),
        "quicknet converted, batch 64: times compiled bf16 emulation": (5.0, True),
    }
    assert len(found) == 40 and all(goal.met is None for goal in goals.goals([], [], [], [], []))
    assert "MISSED" in found["conv 256@14 packed: times cuDNN bf16"].line()


def test_the_screen_shows_every_part(tmp_path):
    results(tmp_path)
    (tmp_path / "log").mkdir()
    for name, last in (("tests-a", "12 passed in 3.1s"), ("tests-b", "1 failed, 8 passed in 2s"),
                       ("tests-c", "..."), ("sanitizer-memcheck-x", "= ERROR SUMMARY: 0 errors"),
                       ("sanitizer-racecheck-x", "= RACECHECK SUMMARY: 2 hazards displayed")):
        (tmp_path / "log" / f"{name}.txt").write_text(f"output\n{last}\n")
    (tmp_path / "measured.json").write_text(json.dumps({"sm_90a": {"calls": [1, 2]}}))
    record.Record(tmp_path, "plan").add(wrong="mine_b in y: output 0 differs")
    state = [{"part": "conv", "seconds": 9.0, "failed": {}, "jobs": 1}]
    said = summary.text(tmp_path, state, "a GPU", 99.0)
    for text in ("a GPU, 99 s", "12.0 m_a 208% 7.5x", "copy 4.10 TB/s",
                 "4096^3, POPS  packed: bulk 5.50",
                 "inference, us of 3: compiled 400", "WRONG triton: differs", "us,  30 launches",
                 "trunk batch 64, us: cuda 100", "published compiled 1000/s 20.0G",
                 "captured layers: NO; digits cuda 0.900", "sm_90a 2 calls", "WRONG mine_b in y",
                 "stopped before 512@7", "failed: mine_b", "passed on the GPU: 20",
                 "tests-b: 1 failed", "tests-c: ...", "sanitizer: 1 of 2 clean", "goals: 8 met, 6",
                 "quicknet batch 64, us: converted 300", "WRONG converted: 1/64"):
        assert text in said, text
    assert len(said.splitlines()) < 60 and summary.text(tmp_path / "none", [], "g", 0) == "g, 0 s\n"


def test_the_screen_cuts_nothing_off(tmp_path):
    """Of the H200's results, with more to say than it had."""
    found = ROOT / "benchmarks" / "results" / "nvidia-h200"
    if not found.exists():
        pytest.skip("installed without results")
    for name in ("conv.jsonl", "gemm.jsonl"):
        (tmp_path / name).write_text((found / name).read_text())
    for number in range(30):
        record.Record(tmp_path, "correct").add(kernel=f"a_kernel_{number}", key="x", wrong=None)
        record.Record(tmp_path, "train").add(key=f"captured form {number}", yes=number < 29)
    state = [{"part": "compile", "seconds": 9.0, "jobs": 30,
              "failed": {f"job {number}": "killed after 80 s" for number in range(30)}}]
    said = summary.text(tmp_path, state, "a GPU", 1.0)
    assert max(map(len, said.splitlines())) <= summary.WIDTH
    for each in ("a_kernel_29 1", "captured form 29: NO", "and 24 more", "22.5 r4_64x64+ 17% 5.9x ",
                 "POPS  fp16: b_128x256_ahead 9.81", "36.4 r_128x64 72%"):
        assert each in said, each


def test_a_result_of_another_form_hides_no_other(tmp_path):
    results(tmp_path)
    record.Record(tmp_path, "gemm").add(key="odd", size=8192, output="packed", us={"bulk": None})
    said = summary.text(tmp_path, [], "a GPU", 1.0)
    assert "products: TypeError" in said and "trunk batch 64" in said


def test_shards_are_all_the_tests_once(monkeypatch):
    class Item:
        def get_closest_marker(self, name):
            return None

    every, seen = [Item() for _ in range(7)], []
    for shard in range(3):
        monkeypatch.setenv("BITKERNELS_TEST_SHARD", f"{shard}/3")
        items = list(every)
        conftest.pytest_collection_modifyitems(items)
        seen += items
    assert len(seen) == 7 and set(seen) == set(every)
