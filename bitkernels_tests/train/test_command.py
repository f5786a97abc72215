"""`python -m bitkernels train`: killed at random moments, interrupted, and given bad arguments."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bitkernels import models
from bitkernels.__main__ import main
from bitkernels.train import recipes
from bitkernels.train.command import builder
from bitkernels_tests import ROOT, forked

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

BASE = ["--model", "bitkernels_tests.train_models:Noisy", "--data", "digits",
        "--recipe", "adambnn-digits"]
TAUGHT = [*BASE[:4], "--recipe", "adambnn", "--augmentation", "shift", "--batch-size", "100"]


def start(out, *more, environment=()):
    """The command in a process that Ctrl-C reaches, even where this one ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "bitkernels", "train", *BASE, "--out", str(out), *more], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fork(out, *more):
    return forked.Program("-m", "bitkernels", "train", *BASE, "--out", out, *more, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def call(monkeypatch, *arguments):
    """The exit status of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["bitkernels", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def wait_for_checkpoints(process, path, count):
    """Until the run has replaced its checkpoint `count` times, or has ended."""
    seen: set[int] = set()
    while len(seen) <= count and process.poll() is None:
        seen.add(path.stat().st_mtime_ns if path.exists() else 0)
        time.sleep(0.002)


# One thread as in the processes that `start` starts: sums of several differ in the last bit.
def test_killed_at_three_random_moments(tmp_path, monkeypatch, one_thread):
    """SIGKILL leaves no time to tidy up: the weights of every stage are bit-equal all the same."""
    arguments = ["--epochs", "2", "--batch-size", "100", "--checkpoint-every", "4", "--quiet"]
    assert call(monkeypatch, *BASE, *arguments, "--out", tmp_path / "whole") == 0
    out, moments = tmp_path / "killed", random.Random()
    kills = 0
    for attempt in range(3):
        process = fork(out, *arguments, *(["--resume"] if attempt else []))
        wait_for_checkpoints(process, out / "checkpoint.pt", moments.randint(1, 6))
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    assert torch.load(out / "checkpoint.pt")["stage"] < 3
    last = fork(out, *arguments, "--resume")
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    for stage in ("teacher", "step1", "step2"):
        ours, theirs = (load_file(p / f"{stage}.safetensors") for p in (out, tmp_path / "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), stage


def test_ctrl_c_leaves_the_checkpoint(tmp_path, monkeypatch, capsys):
    process = start(tmp_path, "--batch-size", "100", "--checkpoint-every", "2", "--quiet",
                    "--epochs", "1000")
    wait_for_checkpoints(process, tmp_path / "checkpoint.pt", 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "\ninterrupted; --resume goes on from the last checkpoint\n"
    assert torch.load(tmp_path / "checkpoint.pt")["stage"] == 0
    assert call(monkeypatch, *BASE, "--out", tmp_path) == 1
    assert "checkpoint.pt is there already" in capsys.readouterr().err


def test_one_stage_after_the_other_by_files(tmp_path, monkeypatch, capsys):
    """The two steps run apart, as published: weights and teacher are files."""
    small = ["--model", "reactnet", "--model-option", "channels=(4, 8)", "--data", "digits",
             "--epochs", "1", "--batch-size", "400", "--threads", torch.get_num_threads()]
    recipe = ["--recipe", "adambnn", "--augmentation", "shift"]
    assert call(monkeypatch, *small, "--recipe", "adambnn-digits", "--stage", "teacher",
                "--out", tmp_path / "teacher") == 0
    assert re.search(r"^teacher 1/1: loss \d.*, held out \d", capsys.readouterr().out, re.M)
    teacher = ["--teacher", "bitkernels_tests.train_models:tanh_teacher",
               "--teacher-weights", tmp_path / "teacher" / "teacher.safetensors"]
    assert call(monkeypatch, *small, *recipe, *teacher, "--stage", "step1", "--quiet",
                "--out", tmp_path / "1") == 0
    step2 = [*small, *recipe, *teacher, "--stage", "step2", "--quiet", "--out", tmp_path / "2"]
    assert call(monkeypatch, *step2) == 1
    assert "starts from the weights of step1: give them with --init" in capsys.readouterr().err
    weights = tmp_path / "1" / "step1.safetensors"
    assert call(monkeypatch, *step2, "--init", weights) == 0
    assert re.search(r"\d+\.\d\d% of 360 held-out images; weights in .*2/step2.safetensors",
                     capsys.readouterr().out)
    assert call(monkeypatch, "--model", "quicknet", *step2[2:-1], tmp_path / "3",
                "--init", weights) == 1


def test_show(monkeypatch, capsys):
    assert call(monkeypatch, "--recipe", "quicknet", "--lr", "1e-3", "--show") == 0
    out = capsys.readouterr().out
    assert "lr=0.001" in out and "latent_clip = 1.25" in out and "  model quicknet blocks=" in out


def test_a_recipe_brings_its_model(tmp_path, monkeypatch, capsys):
    """Its options too, of which the last of a name counts."""
    run = ["--recipe", "quicknet-digits", "--data", "digits", "--epochs", "1", "--batch-size",
           "400", "--quiet", "--threads", torch.get_num_threads(), "--model-option",
           "filters=(8, 8, 8)"]
    assert call(monkeypatch, *run, "--out", tmp_path) == 0
    weights = load_file(tmp_path / "quicknet.safetensors")
    assert weights["classifier.weight"].shape == (10, 8) and "sections.2.1.conv.weight" in weights
    assert "sections.2.2.conv.weight" not in weights  # blocks=(1, 1, 1) is of the recipe
    with safe_open(tmp_path / "quicknet.safetensors", "pt") as file:
        assert file.metadata()["model"].startswith("quicknet blocks=(1, 1, 1) filters=")
    for model in ("quicknet", "reactnet"):  # named: the recipe's own has its options, others not
        out = tmp_path / model
        assert call(monkeypatch, *run[:-2], "--model", model, "--out", out) == 0
        options = " blocks=(1, 1, 1) filters=(32, 64, 128)" if model == "quicknet" else ""
        with safe_open(out / "quicknet.safetensors", "pt") as file:
            assert file.metadata()["model"] == model + options
    assert call(monkeypatch, "--recipe", "bop-imagenet", "--data", "digits", "--out", tmp_path) == 1
    assert "--model is needed" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipes.names())
def test_the_model_of_a_recipe_can_be_made(name):
    recipe = recipes.get(name)
    if recipe.model:
        data = SimpleNamespace(classes=10, channels=3, size=64)
        with torch.device("meta"):  # the largest has 400 MB
            model = builder(recipe.model, data, list(recipe.model_options))()
            assert models.create(recipe.model, image_size=64).__class__ is model.__class__
    else:
        assert name in ("bop-imagenet", "real-to-binary")


def test_published_networks_by_their_names():
    data = SimpleNamespace(classes=7, channels=1, size=16)
    for name, options in (("reactnet18", ["stem=cifar", "blocks=(1, 1, 1, 1)"]), ("binarynet", [])):
        model = builder(name, data, options)()
        assert model.eval()(torch.zeros(1, 1, 16, 16)).shape == (1, 7)
    with pytest.raises(ValueError, match="resnet'; there are binarynet, .*, bnext_t, "):
        builder("resnet", data, [])()


@pytest.mark.parametrize("arguments, message", [
    (["--model", "reactnet"], "--recipe is needed; there are adambnn, "),
    ([*BASE], "--out is needed"),
    ([*BASE, "--model", "resnet", "--out", "OUT"], "no model is called 'resnet'; there are bina"),
    ([*BASE, "--model", "os:nothing", "--out", "OUT"], "module 'os' has no attribute 'nothing'"),
    ([*BASE, "--model", "reactnet", "--model-option", "deep", "--out", "OUT"], "NAME=VALUE"),
    ([*BASE, "--stage", "step3", "--out", "OUT"], "--stage: recipe adambnn-digits has no "
     "stage step3, only teacher, step1, step2"),
    ([*BASE, "--gamma", "1", "--out", "OUT"], "--gamma: recipe adambnn-digits has no gamma"),
    ([*BASE[:2], *BASE[4:], "--out", "OUT"], "--data is needed"),
    ([*BASE, "--batch-size", "5000", "--out", "OUT"], "--batch-size: a batch of 5000 images is"),
    ([*BASE, "--out", "OUT", "--resume"], "there is no checkpoint OUT/checkpoint.pt"),
    ([*BASE, "--resume", "--out", "OUT/none"], "--resume: there is no checkpoint OUT/none/check"),
    ([*BASE, "--checkpoint-every", "0", "--out", "OUT"], "--checkpoint-every must be at least 1"),
    ([*BASE, "--epochs", "0", "--out", "OUT"], "--epochs must be at least 1, got 0"),
    ([*BASE, "--epochs", "-1", "--show"], "--epochs must be at least 1, got -1"),
    ([*BASE, "--batch-size", "0", "--out", "OUT"], "--batch-size must be at least 1, got 0"),
    ([*BASE, "--threads", "0", "--out", "OUT"], "--threads must be at least 1, got 0"),
    ([*BASE, "--threads", "-1", "--out", "OUT"], "--threads must be at least 1, got -1"),
    ([*BASE, "--threads", "1025", "--out", "OUT"], "--threads must be at most 1024, got 1025"),
    ([*BASE, "--workers", "-1", "--out", "OUT"], "--workers must be at least 0, got -1"),
    ([*BASE, "--size", "0", "--out", "OUT"], "--size must be at least 1, got 0"),
    ([*BASE, "--lr", "0", "--out", "OUT"], "--lr must be above 0 and finite, got 0.0"),
    ([*BASE, "--lr", "nan", "--out", "OUT"], "--lr must be above 0 and finite, got nan"),
    ([*BASE, "--seed", "-1", "--out", "OUT"], "--seed must be from 0 to 4294967295, got -1"),
    ([*BASE, "--device", "banana", "--out", "OUT"], "--device must be cpu, cuda or cuda:INDEX"),
    ([*BASE, "--device", "cuda:99", "--out", "OUT"], "--device cuda:99: "),
    ([*BASE, "--device", "meta", "--out", "OUT"], "--device meta: torch "),
    ([*BASE, "--device", "cuda:x", "--out", "OUT"], "--device must be cpu"),
    ([*BASE, "--out", "OUT/file"], "--out must be a folder, and OUT/file is a file"),
    ([*BASE, "--out", "OUT/file/deep/er"], "--out must be a folder, and OUT/file is a file"),
    ([*BASE, "--data", "imagenet", "--root", "OUT/none", "--out", "OUT"], "--root must be the fol"),
    ([*BASE, "--data", "cifar10", "--root", "OUT/file", "--out", "OUT"], "--root must be the"),
    ([*BASE, "--root", "OUT", "--out", "OUT"], "digits takes no root and no size (--root"),
    ([*BASE, "--model", "reactnet", "--model-option", "channels=5", "--out", "OUT"],
     "--model reactnet --model-option 'channels=5': cannot be made: "),
    ([*BASE, "--model", "reactnet", "--model-option", "deep=5", "--out", "OUT"], "no option deep"),
    ([*BASE, "--model", "bitkernels.models:QuickNet", "--out", "OUT"],
     "does not take images of 1x8x8: "),
    ([*BASE, "--model", "torch.nn:Identity", "--out", "OUT"], "must give (N, 10) for N images"),
    ([*BASE, "--recipe", "adambnn", "--augmentation", "none", "--out", "OUT"],
     "--teacher and --teacher-weights are needed: recipe adambnn learns from a trained network in "
     "step1 and step2"),
    ([*BASE, "--teacher", "reactnet", "--teacher-weights", "OUT/file", "--out", "OUT"],
     "--teacher: recipe adambnn-digits learns from no network that is given"),
    ([*BASE, "--teacher-weights", "OUT/file", "--out", "OUT"], "--teacher-weights needs --teacher"),
    ([*TAUGHT, "--teacher", "none:x", "--teacher-weights", "OUT/file", "--out",
      "OUT"], "--teacher none:x: No module named 'none'"),
    ([*TAUGHT, "--teacher", "reactnet", "--teacher-weights", "OUT/file", "--out", "OUT"],
     "--teacher-weights: cannot read weights"),
    ([*BASE, "--teacher", "reactnet", "--out", "OUT"], "--teacher needs --teacher-weights"),
    ([*BASE, "--init", "OUT/none", "--out", "OUT"], "--init: cannot read weights from OUT/none"),
    ([*BASE, "--augmentation", "resized-crop", "--out", "OUT"], "--augmentation: digits has no"),
    ([*BASE, "--data", "imagenet", "--out", "OUT"], "imagenet needs the folder of its files"),
    ([*BASE, "--recipe", "quicknet", "--augmentation", "shift", "--batch-size", "400", "--out",
      "/proc/none"],
     "cannot make /proc/none")])
def test_bad_arguments_are_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    (tmp_path / "file").write_text("no folder, no weights")
    arguments = [a.replace("OUT", str(tmp_path)) for a in arguments]
    assert call(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert message.replace("OUT", str(tmp_path)) in error
    assert error.count("\n") == 1 and error.startswith("bitkernels train: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing was begun


def test_a_device_that_is_not_there(monkeypatch, capsys, tmp_path):
    """One of two GPUs, none, and another accelerator, none of them real."""
    run = [*BASE, "--out", tmp_path, "--device"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert call(monkeypatch, *run, "cuda:2") == 1
    assert "--device cuda:2: there are 2 of them, counted from 0" in capsys.readouterr().err
    assert call(monkeypatch, *run, "mps") == 1
    assert "finds no such device here, only cpu and cuda" in capsys.readouterr().err
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert call(monkeypatch, *run, "cuda") == 1
    assert "finds no such device here, only cpu\n" in capsys.readouterr().err


def test_the_device_is_asked_for_when_it_runs(monkeypatch):
    """Neither --help nor --show looks for a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert call(monkeypatch, "--recipe", "quicknet", "--show") == 0
    assert not call(monkeypatch, "--help")


def test_options_of_computing(tmp_path, monkeypatch):
    """bf16, channels-last, workers and no metrics give a run that learns as the plain one."""
    small = ["--model", "reactnet", "--model-option", "channels=(4, 8)", "--data", "digits",
             "--recipe", "adambnn-digits", "--stage", "teacher", "--epochs", "2", "--quiet"]
    assert call(monkeypatch, *small, "--bf16", "--channels-last", "--workers", "1", "--no-watch",
                "--out", tmp_path) == 0
    losses = [float(line.split(",")[4]) for line in
              (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert losses[1] < losses[0] < 2.5
    assert load_file(tmp_path / "teacher.safetensors")["stem.0.weight"].dtype == torch.float32


def test_tensorboard(tmp_path, monkeypatch):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator")
    assert call(monkeypatch, *BASE, "--model", "reactnet", "--model-option", "channels=(4, 8)",
                "--batch-size", "400", "--epochs", "2", "--tensorboard", "--quiet",
                "--out", tmp_path) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "step2"))
    events.Reload()
    tags = events.Tags()
    for metric in ("flip_ratio", "c2i_ratio", "dead_weights"):
        assert f"{metric}/blocks.0.spatial.conv" in tags["scalars"]
        assert [event.step for event in events.Scalars(f"run/{metric}")] == [3, 6]
    assert "saturation/blocks.0.spatial.sign" in tags["scalars"]
    assert {"histogram/weight/blocks.0.spatial.conv",
            "histogram/activation/blocks.0.spatial.sign"} <= set(tags["histograms"])
    latent = load_file(tmp_path / "step2.safetensors")["blocks.0.spatial.conv.weight"]
    histogram = events.Histograms("histogram/weight/blocks.0.spatial.conv")[-1].histogram_value
    assert histogram.num == latent.numel()
    assert histogram.max == pytest.approx(latent.abs().max().item(), rel=0.05)


def test_without_tensorboard_or_tqdm_one_message(tmp_path, monkeypatch, capsys):
    arguments = [*BASE, "--model", "reactnet", "--batch-size", "400", "--epochs", "1"]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert call(monkeypatch, *arguments, "--out", tmp_path / "1") == 1
    assert ("not installed: tqdm (draws progress bars; --quiet does without): pip install tqdm\n"
            in capsys.readouterr().err)
    assert not (tmp_path / "1").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert call(monkeypatch, *arguments, "--quiet", "--tensorboard", "--out", tmp_path / "2") == 1
    assert "plots need tensorboard, which cannot be imported" in capsys.readouterr().err
