"""The code of the pages runs, their links lead somewhere, and the commands they name are there."""

from __future__ import annotations

import re
import shlex

import pytest

from bitkernels.cli import COMMANDS
from bitkernels.train import recipes
from bitkernels_tests.docs_blocks import DOCS, blocks, run

if not DOCS.exists():
    pytest.skip("installed without docs", allow_module_level=True)

README = DOCS.parent / "README.md"
PAGES = [README, DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files that a page writes are thrown away."""
    monkeypatch.chdir(tmp_path)


def test_readme(one_thread):
    space = run(README)
    assert space["torch"].equal(space["packed"](space["x"].detach()), space["y"])


def test_faq(one_thread, capsys):
    pytest.importorskip("safetensors")
    run(DOCS / "faq.md")
    out = capsys.readouterr().out
    assert "32.0\n" in out and "1.64e+08 OPs\n" in out


def test_models(one_thread):
    run(DOCS / "models.md")


def test_convert(one_thread, capsys):
    pytest.importorskip("safetensors")
    run(DOCS / "convert.md")
    assert "4 products of bits, 3 real" in capsys.readouterr().out


def test_training(one_thread, capsys):
    pytest.importorskip("sklearn")
    space = run(DOCS / "training.md", {"epochs=5": "epochs=1", "(32, 64, 128)": "(4, 8)"})
    assert space["recipe"].settings()["step1.method.weight_decay"] == 1e-4
    assert "%" in capsys.readouterr().out


def test_operators():
    assert {"torch", "F", "ops"} <= set(run(DOCS / "operators.md"))


def anchors(page) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_commands():
    """Every `python -m bitkernels ...` names a command, options and recipes that there are."""
    from bitkernels.cli import Parser
    from bitkernels.train import command

    parser = Parser()
    command.add_arguments(parser)
    seen = set()
    for page in PAGES:
        for language in ("sh", ""):
            for _, text in blocks(page, language):
                for line in text.replace("\\\n", " ").splitlines():
                    if "-m bitkernels" not in line:
                        continue
                    words = shlex.split(line, comments=True)
                    name, *rest = words[words.index("bitkernels") + 1:] or ["doctor"]
                    assert name in COMMANDS or name.startswith("-"), f"{page.name}: {line}"
                    seen.add(name)
                    if name == "train":
                        assert parser.parse_args(rest).recipe in recipes.names()
    assert {"train", "bench", "doctor"} <= seen
