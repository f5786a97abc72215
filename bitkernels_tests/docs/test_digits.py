"""examples/digits.py: two epochs learn something, and packing changes no prediction."""

import importlib.util

import pytest
import torch

from bitkernels_tests import ROOT

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

EXAMPLE = ROOT / "examples" / "digits.py"


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shifted_moves_by_at_most_one_pixel(digits):
    images = torch.full((64, 1, 8, 8), -1.0)
    images[:, 0, 3, 4] = 1.0
    torch.manual_seed(0)
    places = (digits.shifted(images) > 0).nonzero()
    assert len(places) == 64
    moves = {(row - 3, column - 4) for _, _, row, column in places.tolist()}
    assert moves == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def test_two_epochs_pack_to_equal_predictions(digits):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        labels, trained, packed = digits.main(["--epochs", "2", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert torch.equal(trained, packed)
    assert (packed == labels).float().mean() > 0.5
