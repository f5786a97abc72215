"""What the records promise: kernels that equal their references, rooms, and a recipe that holds."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitkernels.ops._record import OPERATORS, OUTPUTS
from bitkernels_tests import ROOT, mutants

TOY = "packed_min_pool2d"
FILES = ROOT / "bitkernels_tests" / "data" / TOY
# From below: a file imports from its own room and from those before it.
ROOMS = ("_arguments _compile_cache _dispatch _files _fx _packages _tensor_file", "ops _onnx",
         "backends reference", "thresholds _estimators", "quantizers", "packed", "nn interop",
         "optim metrics explain counting converter", "models", "train", "cli __main__")
# Each whole package is above its rooms, and so is what stands for it.
ABOVE = ("", "autograd", "residual_block")


def same(got, expected, exactly=True):
    if isinstance(got, torch.Tensor):
        got, expected = (got,), (expected,)
    for have, want in zip(got, expected, strict=True):
        if want is not None and exactly:
            assert torch.equal(have, want) and have.dtype == want.dtype
        elif want is not None:
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, o in OPERATORS.items() if o.reference is not None])
def test_the_kernel_in_use_equals_the_reference(name):
    """On each sample, that is on the cases of GPU kernels too; swish_sign but for its exponentials,
    sums of real numbers but for their order."""
    from bitkernels.ops._samples import Values

    operator = OPERATORS[name]
    for sample in operator.samples(Values()):
        with torch.no_grad():
            got = operator.overloads[sample.overload](*sample.args, **sample.kw)
            expected = operator.launcher(lambda _, *args, **kw: operator.reference(*args, **kw),
                                         sample.overload)(*sample.args, **sample.kw)
        same(got, expected, "swish_sign" not in sample.kw.values() and not name.endswith("_grad"))


def test_cases_are_calls_of_kernels():
    for name, operator in OPERATORS.items():
        for args, kw in operator.cases():
            assert not any(t.requires_grad for t in args if isinstance(t, torch.Tensor)), name
            operator.reference(*args, **kw)
    assert OPERATORS["packed_conv2d"].cases()[0].kw["packed"] is True
    assert dict(OUTPUTS) == {"": (True, False), "packed": (False, True), "both": (True, True)}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, names: set[str]) -> set[str]:
    """The modules of the package that a file imports when it is imported."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in [n for part in tree.body for n in
                 (part.body if isinstance(part, (ast.With, ast.Try)) else [part])]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                # bitkernels.ops.NAME is the operator there, not the file.
                is_file = whole in names and node.module != "bitkernels.ops"
                if whole.rpartition(".")[2].startswith("_") or alias.name == "geometry":
                    is_file = whole in names
                found.add(whole if is_file else node.module or "")
    return found & names


def graph() -> dict[str, set[str]]:
    files = {module_name(path): path for path in sources("bitkernels")}
    return {name: imported(path, set(files)) - {name} for name, path in files.items()}


def room(name: str) -> int:
    first = name.split(".")[1] if "." in name else ""
    if first in ABOVE:
        return len(ROOMS)
    found = [i for i, members in enumerate(ROOMS) if first in members.split()]
    assert found, f"give {first} its place among ROOMS"
    return found[0]


def test_no_arrow_from_a_lower_room_to_a_higher():
    wrong = [(name, other) for name, others in graph().items() for other in others
             if other != "bitkernels" and room(other) > room(name)]
    assert wrong == []


def test_no_circle_of_imports():
    """The package itself, which imports its rooms, aside."""
    edges = {name: others - {"bitkernels"} for name, others in graph().items()}
    while leaves := [name for name, others in edges.items() if not others & set(edges)]:
        for name in leaves:
            del edges[name]
    edges.pop("bitkernels", None)
    assert edges == {}, f"a circle among {sorted(edges)}"


def test_no_file_passes_450_lines():
    if not (ROOT / "csrc").is_dir():
        pytest.skip("not in the sources")
    files = [*sources("bitkernels"), *sources("bitkernels_tests"), *sources("benchmarks"),
             *(p for end in ("cpp", "h", "inc", "cuh") for p in (ROOT / "csrc").rglob(f"*.{end}"))]
    long = {str(p.relative_to(ROOT)): n for p in files
            if (n := len(p.read_text().splitlines())) > 450}
    assert long == {}


@pytest.fixture
def with_toy(tmp_path):
    """A copy of the sources with the files of an operator more, as CONTRIBUTING says to add one."""
    if not (ROOT / "csrc").is_dir() or not (ROOT / ".git").exists():
        pytest.skip("not in a checkout")
    mutants.copy(tmp_path)
    for path in tmp_path.glob("bitkernels/_C*.so"):
        path.unlink()  # which knows nothing of it
    added = [p.relative_to(FILES) for p in FILES.rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    for path in added:
        assert not (tmp_path / path).exists()
        shutil.copy(FILES / path, tmp_path / path)
    return tmp_path, added


def ran(tree, command, **environment) -> str:
    code, out = mutants.run([sys.executable, *command], tree, 500, **environment)
    assert code == 0, out[-4000:]
    return out


def passed(tree, *arguments, **environment) -> set[str]:
    # Assertions as they are: to rewrite those of all other tests takes longer than to run these.
    out = ran(tree, ["-m", "pytest", "-q", "-rp", "--assert=plain", "-p", "no:cacheprovider",
                     "-k", TOY, *arguments],
              **environment)
    return {name for name, at in re.findall(r"^PASSED \S+::(\w+)\[(.*?)\]$", out, re.M)
            if TOY in at}


CONTRACT = ["bitkernels_tests/ops", "bitkernels_tests/docs/test_operators.py",
            "bitkernels_tests/toolchains/test_func.py"]
GENERAL = {
    "test_opcheck", "test_fake_and_meta_outputs_equal_eager", "test_raw_operators_refuse_gradients",
    "test_wrong_tensors_of_a_sample", "test_the_kernel_in_use_equals_the_reference",
    "test_the_example_runs", "test_help_shows_it", "test_the_arguments_are_those_of_the_schemas",
    "test_batching_rules"}


def test_an_operator_is_at_most_five_files(with_toy):
    """Schema, fake, refusal, reference, samples, help, wrong arguments, sizes of 0, vmap, check at
    first use and Triton's launch come with them; generated pages are written by a command."""
    tree, added = with_toy
    assert len(added) <= 5
    ran(tree, ["docs/make_operators.py"], PYTHONPATH=str(tree))
    changed = {str(p.relative_to(tree)) for p in tree.rglob("*")
               if p.is_file() and p.suffix != ".pyc" and p.relative_to(tree) not in added
               and p.read_bytes() != (ROOT / p.relative_to(tree)).read_bytes()}
    assert changed == {"docs/operators.md", "bitkernels/ops/__init__.pyi",
                       "csrc/torch/operator_schemas.inc"}
    assert f"### {TOY}" in (tree / "docs/operators.md").read_text()
    engineless = dict(BITKERNELS_CPU="reference")
    assert passed(tree, *CONTRACT, **engineless) >= GENERAL
    zero = ran(tree, ["-m", "bitkernels_tests.zero_sizes", TOY], **engineless).splitlines()
    assert len(zero) > 10 and not [line for line in zero if "failed" in line]
    # The build finds the entry and the kernel.
    assert {f'glob("{path.parent}/*.cpp")' in (tree / "setup.py").read_text()
            for path in added if path.suffix == ".cpp"} == {True}


def test_its_triton_kernel_is_launched_and_checked(with_toy):
    pytest.importorskip("triton")
    tree, _ = with_toy
    assert "test_every_kernel_takes_64_bit_offsets" in passed(
        tree, "bitkernels_tests/backends/triton/test_interpret_offsets.py", TRITON_INTERPRET="1",
        BITKERNELS_CPU="reference")


@pytest.mark.every
def test_its_engine_is_built_and_equals_the_reference(with_toy):
    tree, _ = with_toy
    ran(tree, ["setup.py", "-q", "build_ext", "--inplace"], MAX_JOBS="2")
    has = "import torch, bitkernels; print(torch._C._dispatch_has_kernel_for_dispatch_key(" \
          f"'bitkernels::{TOY}', 'CPU'))"
    assert subprocess.run([sys.executable, "-c", has], cwd=tree, capture_output=True,
                          text=True).stdout == "True\n"
    assert passed(tree, *CONTRACT[:1]) >= {n for n in GENERAL if "example" not in n
                                           and "help" not in n and "arguments_are" not in n
                                           and "batching" not in n}
