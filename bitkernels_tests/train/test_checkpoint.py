"""Checkpoints: all or nothing, of one run only; errors and interruptions leave the last one."""

import csv
import errno
import os
import resource
import sys
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bitkernels import _files
from bitkernels.train import (
    CheckpointError,
    DivergedError,
    Options,
    Schedule,
    TrainError,
    datasets,
    fit,
    recipes,
)
from bitkernels.train import checkpoint as files
from bitkernels.train.checkpoint import replace_file
from bitkernels.train.trainer import Trainer
from bitkernels_tests.train_models import Noisy, exploding

pytest.importorskip("sklearn")
RECIPE = recipes.get("adambnn-digits").scaled(epochs=2, batch_size=30)  # 3 stages of 2 x 7 steps


@pytest.fixture(scope="module")
def data():
    digits = datasets.digits()
    return replace(digits, train=digits.train.first(210), held_out=digits.held_out.first(40))


def run(data, out, recipe=RECIPE, **options):
    how = Options(checkpoint_every=options.pop("checkpoint_every", 3),
                  tensorboard=options.pop("tensorboard", False))
    return fit(options.pop("build", lambda: Noisy(10)), recipe, data, out,
               options=how, name=options.pop("name", "noisy"),
               **options)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    torch.manual_seed(7)
    return out, run(data, out)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("write", [1, 4, 11, 18])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_at_a_write_and_resumed(data, uninterrupted, tmp_path, monkeypatch, write,
                                            when):
    """Dropout, numpy's and Python's random numbers go on as if nothing had happened."""
    reference, whole = uninterrupted
    count, real = [0], os.replace

    def dying(source, target):
        if str(target).endswith("checkpoint.pt"):
            count[0] += 1
        if count[0] == write and when == "before":
            raise Killed
        real(source, target)
        if count[0] == write:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            run(data, tmp_path)
    torch.manual_seed(99)
    np.random.seed(99)
    if write == 1 and when == "before":
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            run(data, tmp_path, resume=True)
        return
    result = run(data, tmp_path, resume=True)
    for stage in RECIPE.stages:
        ours, theirs = (load_file(p / f"{stage.name}.safetensors") for p in (tmp_path, reference))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs) and ours.keys() == theirs.keys()
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in result.rows]
    assert repr(strip) == repr([{k: v for k, v in row.items() if k != "seconds"}
                                for row in whole.rows])
    with open(tmp_path / "metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        (stage.name, str(epoch)) for stage in RECIPE.stages for epoch in (1, 2)]
    assert float(lines[-1]["flip_ratio"]) >= 0 and lines[0]["flip_ratio"] == ""


def test_a_finished_run_resumes_to_its_result(data, uninterrupted):
    out, whole = uninterrupted
    result = run(data, out, resume=True)
    assert result.accuracy == whole.accuracy
    assert all(torch.equal(a, b) for a, b in zip(result.model.state_dict().values(),
                                                 whole.model.state_dict().values(), strict=True))


def test_weights_say_what_they_are(uninterrupted):
    with safe_open(uninterrupted[0] / "step2.safetensors", "pt") as file:
        assert file.metadata() == {"model": "noisy", "recipe": "adambnn-digits", "stage": "step2",
                                   "data": "digits"}


def test_the_same_weights_are_the_same_bytes(tmp_path):
    about = {"model": "quicknet", "recipe": "r", "data": "caf\u00e9", "stage": "s"}
    for i in range(6):
        files.export(tmp_path / str(i), {"b": torch.ones(3), "a": torch.zeros(2, 5)}, about)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == about and torch.equal(file.get_tensor("a"), torch.zeros(2, 5))


@pytest.mark.parametrize("call, code", [("fsync", errno.ENOSPC), ("replace", errno.EIO)])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, code):
    path = tmp_path / "checkpoint.pt"
    replace_file(path, b"old")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError) as error:
        replace_file(path, b"new")
    assert str(error.value) == (f"cannot write {path}: {os.strerror(code)}; the file that was "
                                "there before is intact")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_crash_between_write_and_replace_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    replace_file(path, b"old")

    def crash(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(Killed):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    replace_file(path, b"newer")
    assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_write_that_stops_half_way(data, tmp_path):
    """A real one: the system lets this process write no file of more than 20 kB."""
    out = tmp_path / "run"
    run(data, out, RECIPE.scaled(epochs=1))
    before = (out / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write .*checkpoint.pt: File too large; "
                                                  "the file that was there before is intact"):
            files.save(out / "checkpoint.pt", {"identity": {}, "x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


def test_a_full_disk_stops_the_run_with_one_message(data, tmp_path, monkeypatch):
    written, real = [], os.fsync

    def fsync(file):
        written.append(file)
        if len(written) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match="No space left on device; the file that was"):
            run(data, tmp_path)
    files.load(tmp_path / "checkpoint.pt", torch.load(tmp_path / "checkpoint.pt")["identity"])
    run(data, tmp_path, resume=True)


def test_divergence_names_step_loss_and_rate(data, tmp_path):
    with pytest.raises(DivergedError) as error:
        run(data, tmp_path, build=lambda: exploding(10))
    lr = 3e-3 * Schedule("cosine").at(1, 7, 2)
    assert str(error.value) == ("training diverged: the loss is nan at step 2 of stage teacher, "
                                f"with lr {lr:g} and {lr:g}")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_weight_that_is_no_number_is_not_saved(data, tmp_path):
    """The loss is finite when the update breaks the weights: the checkpoint has to be looked at."""
    with pytest.raises(DivergedError, match="a weight is no finite number at step 1 of stage"):
        run(data, tmp_path, build=lambda: exploding(10), checkpoint_every=1)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_divergence_after_a_checkpoint_leaves_it(data, tmp_path, monkeypatch):
    from bitkernels.train.stages import StageLoss

    calls, real = [0], StageLoss.__call__

    def loss(self, *args):
        calls[0] += 1
        return real(self, *args) * (float("nan") if calls[0] == 6 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(StageLoss, "__call__", loss)
        with pytest.raises(DivergedError, match="the loss is nan at step 6 of stage teacher, with "
                                                "lr .*; the last checkpoint is from before that"):
            run(data, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 3
    run(data, tmp_path, resume=True)


@pytest.mark.parametrize("options, message", [
    (dict(name="binarynet"), "is of model noisy on digits with recipe adambnn-digits; this run is "
                             "model binarynet on digits with recipe adambnn-digits"),
    (dict(recipe=recipes.get("bop-digits")), "is of model noisy on digits with recipe "
     "adambnn-digits; this run is model noisy on digits with recipe bop-digits"),
    (dict(recipe=RECIPE.scaled(epochs=3)), "as this run, but with other settings: recipe "
                                           "teacher.epochs: 2 there, 3 here; recipe step1.epochs"),
    (dict(tensorboard=True), "other settings: tensorboard: False there, True here"),
    (dict(seed=1), "as this run, but with other settings: seed: 0 there, 1 here")])
def test_a_checkpoint_of_another_run(data, uninterrupted, options, message):
    with pytest.raises(CheckpointError) as error:
        run(data, uninterrupted[0], resume=True, **options)
    assert message in str(error.value)


def test_a_checkpoint_of_other_parameters():
    """Of a network that another version made of other layers."""
    trainer = object.__new__(Trainer)
    trainer.model = torch.nn.Linear(1, 1)
    before = trainer.model.weight.clone()
    with pytest.raises(CheckpointError, match=r"Linear with other parameters \(it has no bias\)"):
        trainer.load({"model": {"weight": torch.ones(1, 1), "conv2.0.bias": torch.ones(1)}})
    assert torch.equal(trainer.model.weight, before)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_do_not_share_a_folder(resume, data, tmp_path):
    out = tmp_path / "run"
    with ExitStack() as first:
        if resume:
            run(data, out, RECIPE.scaled(epochs=1))
        out.mkdir(exist_ok=True)
        first.enter_context(_files.locked(out))
        before = sorted(os.listdir(out))
        with pytest.raises(CheckpointError, match=f"another run is writing to {out}: choose"):
            run(data, out, RECIPE.scaled(epochs=1), resume=resume)
        assert sorted(os.listdir(out)) == before
    run(data, out, RECIPE.scaled(epochs=1), resume=resume)  # the folder is free again


def test_a_file_system_without_locks_trains(data, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    run(data, tmp_path, RECIPE.scaled(epochs=1))


def test_an_existing_run_is_not_overwritten(data, uninterrupted):
    with pytest.raises(CheckpointError, match="checkpoint.pt is there already: resume it, or"):
        run(data, uninterrupted[0])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_broken_checkpoint(data, uninterrupted, tmp_path, content):
    whole = (uninterrupted[0] / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:-5000] if content is None else content)
    with pytest.raises(CheckpointError, match="checkpoint.pt is not a checkpoint that can be read"):
        run(data, tmp_path, resume=True)


def test_a_file_of_something_else(data, tmp_path):
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of bitkernels.train"):
        run(data, tmp_path, resume=True)


def test_a_stage_whose_weights_are_gone(data, tmp_path):
    run(data, tmp_path)
    (tmp_path / "step1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read weights from .*step1.safetensors"):
        run(data, tmp_path, resume=True)


def test_a_missing_teacher_is_an_error(data):
    with pytest.raises(ValueError, match="recipe adambnn learns from a teacher that is given"):
        run(data, None, recipes.get("adambnn"))


def test_given_teacher_and_first_weights(data):
    teacher, start = Noisy(10), Noisy(10)
    recipe = recipes.get("adambnn").scaled(epochs=1, batch_size=105, augmentation="shift")
    recipe = replace(recipe, stages=tuple(stage.with_rates(0, 0) for stage in recipe.stages))
    result = fit(lambda: Noisy(10), recipe, data, teacher=teacher, initial=start.state_dict())
    for (name, ours), theirs in zip(result.model.named_parameters(), start.parameters(),
                                    strict=True):
        assert torch.equal(ours, theirs), name  # at a rate of 0 nothing moves, in two stages


def test_another_teacher_is_another_run(data, tmp_path):
    recipe = recipes.get("adambnn").scaled(epochs=1, batch_size=105, augmentation="shift")
    teacher = Noisy(10)
    run(data, tmp_path, recipe, teacher=teacher)
    run(data, tmp_path, recipe, teacher=teacher, resume=True)
    with torch.no_grad():
        next(teacher.parameters()).view(-1)[0] += 1
    with pytest.raises(CheckpointError, match="with other settings: teacher: '[0-9a-f]{16}' there"):
        run(data, tmp_path, recipe, teacher=teacher, resume=True)
    path = tmp_path / "checkpoint.pt"  # of a version that did not look
    state = torch.load(path)
    del state["identity"]["teacher"]
    torch.save(state, path)
    run(data, tmp_path, recipe, teacher=teacher, resume=True)


def test_the_same_seed_gives_the_same_bits_with_workers(data):
    recipe = RECIPE.scaled(epochs=1)
    models = [fit(lambda: Noisy(10), recipe, data, options=Options(workers=workers),
                  seed=seed).model.state_dict() for workers, seed in ((0, 3), (2, 3), (0, 4))]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert not all(torch.equal(models[0][k], models[2][k]) for k in models[0])


def test_safetensors_is_missed_before_the_training(data, tmp_path, monkeypatch):
    """Not after it, when the weights are written."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(TrainError, match="pip install safetensors"):
        fit(lambda: pytest.fail("began"), recipes.get("adambnn-digits"), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
