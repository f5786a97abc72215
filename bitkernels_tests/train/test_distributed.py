"""Two processes compute what one does on the joined batch; batch norm over both is torch's."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from bitkernels import models
from bitkernels.train import CheckpointError, checkpoint, datasets, fit, recipes
from bitkernels.train.distributed import Group, synchronised
from bitkernels_tests import ROOT, forked
from bitkernels_tests.train_models import double_reactnet

pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def test_one_process_keeps_its_batch_norms():
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert synchronised(model, Group(), torch.device("cpu")) is model
    assert type(model[0]) is nn.BatchNorm2d


def torchrun(out, *arguments):
    """The command in two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forked.Program(
        "-m", "bitkernels", "train", *arguments, "--out", out, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
             "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        for rank in range(2)]
    return [(*process.communicate(), process.returncode) for process in processes]


def differences(out, one):
    two = load_file(out)
    assert two.keys() == one.keys()
    return {key: (two[key].double() - one[key].double()).abs().max().item() for key in one}


def test_two_processes_equal_one_by_adam_in_float64(tmp_path):
    """All three stages of AdamBNN, 20 steps each.

    Adam divides by the size of the gradient, so where a gradient is nothing but rounding it decides
    the update; in float64 what is rounded is small enough to compare.
    """
    ends = torchrun(tmp_path, "--model", "bitkernels_tests.train_models:double_reactnet",
                    "--data", "digits", "--recipe", "adambnn-digits", "--epochs", "1",
                    "--batch-size", "70", "--quiet")
    assert [code for *_, code in ends] == [0, 0], ends
    assert ends[0][0].startswith(("1", "2", "3", "4", "5")) and ends[1][0] == ""  # rank 0 reports
    result = fit(lambda: double_reactnet(10), recipes.get("adambnn-digits").scaled(1, 70),
                 datasets.digits())
    found = differences(tmp_path / "step2.safetensors", result.model.state_dict())
    assert max(found.values()) <= 1e-5, found
    assert result.rows[-1]["step"] == 20


def test_two_processes_equal_one_in_float32(tmp_path):
    """QuickNet's recipe, 20 steps: Adam for the latent weights, SGD for the rest."""
    options = dict(filters=(8, 16), blocks=(1, 1))
    ends = torchrun(tmp_path, "--model", "quicknet", "--data", "digits", "--recipe", "quicknet",
                    "--model-option", "filters=(8, 16)", "--model-option", "blocks=(1, 1)",
                    "--model-option", "stem_strides=(1, 1)",
                    "--epochs", "1", "--batch-size", "70", "--augmentation", "shift", "--quiet")
    assert [code for *_, code in ends] == [0, 0], ends
    recipe = recipes.get("quicknet").scaled(1, 70, augmentation="shift")
    model = fit(lambda: models.create("quicknet", in_channels=1, image_size=8, **options),
                recipe, datasets.digits()).model
    found = differences(tmp_path / "quicknet.safetensors", model.state_dict())
    parameters = {name for name, _ in model.named_parameters()}
    assert max(found[name] for name in parameters) <= 1e-5, found
    for name, buffer in model.named_buffers():
        if name in found:
            assert found[name] <= 1e-5 * max(1.0, buffer.double().abs().max().item()), name


def test_a_run_of_two_processes_is_resumed_by_two(tmp_path):
    recipe, data = recipes.get("bop-digits").scaled(1, 700), datasets.digits()

    def run(**options):
        return fit(lambda: models.create("binarynet", in_channels=1, image_size=8, width=2),
                   recipe, data, tmp_path, **options)

    run()
    saved = torch.load(tmp_path / "checkpoint.pt")
    saved["identity"]["processes"] = 2
    checkpoint.save(tmp_path / "checkpoint.pt", saved)
    with pytest.raises(CheckpointError, match="other settings: processes: 2 there, 1 here"):
        run(resume=True)


def test_all_processes_learn_that_the_folder_is_taken(tmp_path):
    """Otherwise the others would wait for the first one."""
    class First(Group):
        def shared(self, value):
            told.append(value)
            return value

    class Second(Group):
        def shared(self, value):
            assert value is None
            return told[0]

    told = []
    (tmp_path / "checkpoint.pt").touch()
    for group in (First(0, 2), Second(1, 2)):
        with pytest.raises(CheckpointError, match="checkpoint.pt is there already"):
            fit(lambda: double_reactnet(10), recipes.get("adambnn-digits"), datasets.digits(),
                tmp_path, group=group)
