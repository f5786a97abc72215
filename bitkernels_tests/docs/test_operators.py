"""Every operator has its text: all arguments, examples that run, a page that is up to date."""

from __future__ import annotations

import doctest
import importlib.util
import pydoc
import runpy
import shutil

import pytest
import torch
import torch.nn.functional as F

import bitkernels
from bitkernels import ops
from bitkernels.ops._record import GROUPS, OPERATORS
from bitkernels_tests import ROOT

DOCS = ROOT / "docs"
NAMES = ops.__all__


def overloads(name):
    packet = getattr(torch.ops.bitkernels, name)
    return [getattr(packet, overload) for overload in packet.overloads()]


def test_every_operator_is_in_a_section():
    assert {operator.group for operator in OPERATORS.values()} == set(GROUPS)


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_are_those_of_the_schemas(name):
    known = {argument.name for op in overloads(name) for argument in op._schema.arguments}
    assert set(ops.arguments(name)) == known
    assert all(text and not text.startswith(":") for text in ops.arguments(name).values())
    parts = ops.parts(name)
    assert set(parts) == {"", *ops.PARTS} and all(parts.values())
    for op in overloads(name):  # an overload is spoken of by its name
        assert op._overloadname == "default" or f".{op._overloadname}" in parts[""]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name):
    space = {"torch": torch, "F": F, "ops": ops}
    example = doctest.DocTestParser().get_doctest(ops.parts(name)["Example"], space, name, None, 0)
    assert example.examples and name in ops.parts(name)["Example"]
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_it(name):
    operator = getattr(bitkernels.ops, name)
    assert operator is getattr(torch.ops.bitkernels, name)
    shown = pydoc.plain(pydoc.render_doc(operator))
    for schema in ops.schemas(name):
        assert schema in shown
    assert "Example:" in shown and ops.parts(name)[""].splitlines()[0] in shown


def test_an_unknown_operator_names_those_there_are():
    with pytest.raises(AttributeError, match="no operator 'conv'; there are binary_conv2d, "):
        getattr(ops, "conv")  # noqa: B009


def test_operators_compile_under_their_short_names():
    compiled = torch.compile(lambda x: ops.sign_pack(x), fullgraph=True, backend="eager")
    x = torch.randn(3, 40)
    assert torch.equal(compiled(x), torch.ops.bitkernels.sign_pack(x))


def test_the_page_is_up_to_date():
    if not DOCS.exists():
        pytest.skip("installed without docs")
    spec = importlib.util.spec_from_file_location("make_operators", DOCS / "make_operators.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert maker.PAGE.read_text() == maker.page(), "run python docs/make_operators.py"
    assert maker.STUB.read_text() == maker.stub(), "run python docs/make_operators.py"
    assert maker.SCHEMAS.read_text() == maker.schemas(), "run python docs/make_operators.py"


def test_pages_of_another_tree_are_not_written(tmp_path):
    """Run in a copy, with the package installed from here."""
    if not DOCS.exists():
        pytest.skip("installed without docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "bitkernels" / "ops").mkdir(parents=True)
    maker = shutil.copy(DOCS / "make_operators.py", tmp_path / "docs")
    with pytest.raises(SystemExit, match="another tree; set PYTHONPATH"):
        runpy.run_path(maker, run_name="__main__")
    assert not [*tmp_path.rglob("*.md"), *tmp_path.rglob("*.pyi")]
