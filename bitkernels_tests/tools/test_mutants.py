"""The list of mutants fits the sources, and what the tool says of a run is what happened."""

from __future__ import annotations

import shutil

import pytest

from bitkernels_tests import mutants
from bitkernels_tests.mutant_list import MUTANTS, Mutant

pytestmark = pytest.mark.skipif(not (mutants.ROOT / "csrc").is_dir(), reason="not in the sources")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_mutant_applies(mutant):
    """Else its line has moved on: write the same mistake into the new one."""
    assert (mutants.ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    for test in () if mutant.tests[0] in mutants.ENGINES else mutant.tests:
        file, _, function = test.partition("::")
        text = (mutants.ROOT / "bitkernels_tests" / file).read_text()
        assert not function or f"def {function.partition('[')[0]}(" in text


def test_there_are_enough_of_them():
    names = [m.name for m in MUTANTS]
    assert len(set(names)) == len(names) >= 30


RUNS = {
    "def test_it():\n    assert True": None,
    "def test_it():\n    assert False": "test_it.py::test_it",
    "import os\ndef test_it():\n    os.abort()": "the process died of signal 6",
    "def test_it():\n    assert (": "pytest ended with",
    "x = 1": "pytest ended with 5",
    "import pytest\ndef test_it():\n    pytest.skip('no')": "no test ran: 1 skipped",
    "import time\ndef test_it():\n    time.sleep(60)": "the tests ran past 3 s",
}


@pytest.mark.parametrize("text,said", RUNS.items())
def test_what_a_run_says(text, said, tmp_path):
    (tmp_path / "bitkernels_tests").mkdir()
    (tmp_path / "bitkernels_tests" / "test_it.py").write_text(text)
    try:
        found = mutants.failing_test(("test_it.py",), tmp_path, 3 if "sleep" in text else 60)
    except mutants.Broken as error:
        assert str(error).startswith(said)
    else:
        assert found == said


@pytest.mark.skipif(shutil.which("git") is None or not (mutants.ROOT / ".git").exists(),
                    reason="not in a repository")
def test_a_mutant_goes_into_the_copy_alone(tmp_path):
    before = (mutants.ROOT / "Makefile").read_text()
    mutants.copy(tmp_path, Mutant("m", "Makefile", ".PHONY: help", "# none: help", ()))
    assert (tmp_path / "Makefile").read_text() == before.replace(".PHONY:", "# none:")
    assert (mutants.ROOT / "Makefile").read_text() == before
    assert (tmp_path / "bitkernels" / "__init__.py").exists()
    assert mutants.tried(Mutant("m", "Makefile", "no such text", "", ()), 1) == (
        False, "applies no more: Makefile has its text 0 times")
