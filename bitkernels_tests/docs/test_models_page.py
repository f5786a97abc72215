"""The table of docs/models.md is that of the networks that there are."""

from __future__ import annotations

import importlib.util

import pytest

from bitkernels import models
from bitkernels_tests import ROOT
from bitkernels_tests.models.summaries import published

PAGE = ROOT / "docs" / "models.md"
if not PAGE.exists():
    pytest.skip("installed without docs", allow_module_level=True)


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_models", PAGE.with_name("make_models.py"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("name", models.list_models())
def test_the_row_is_up_to_date(maker, name):
    row = maker.row(name, published(name))
    assert maker.rows(PAGE.read_text()).get(name) == row, "run python docs/make_models.py"


def test_the_script_writes_rows_that_it_reads(maker, monkeypatch):
    monkeypatch.setattr(models, "list_models", lambda: ["quicknet_small", "quicknet"])
    written = maker.written(PAGE.read_text())
    assert list(maker.rows(written)) == ["quicknet_small", "quicknet"]
    assert maker.written(written) == written
    before, after = (page.partition(maker.START)[0] + page.partition(maker.END)[2]
                     for page in (PAGE.read_text(), written))
    assert before == after
