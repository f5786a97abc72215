"""save_pretrained and from_pretrained: folders, and the Hugging Face Hub without a network."""

from __future__ import annotations

import copy
import json
import os
import sys

import pytest
import torch
from torch import nn

from bitkernels import _files, models
from bitkernels import nn as bnn
from bitkernels.models import preprocessing
from bitkernels.models.weights import hub

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {"README.md", "config.json", "model.safetensors"}
SMALL = {
    "reactnet-18": dict(blocks=(1, 1), channels=(16, 32)),
    "quicknet": dict(blocks=(1, 1), filters=(32, 64)),
    "binarynet": dict(width=16, image_size=16),
}
IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def made(name: str = "quicknet") -> nn.Module:
    model = models.create(name, num_classes=4, in_channels=1, **SMALL[name])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def packed(model: nn.Module) -> nn.Module:
    return bnn.pack(model, filter=lambda name, layer: layer.pack_obstacle() is None)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("form", [copy.deepcopy, packed, lambda m: packed(copy.deepcopy(m))],
                         ids=["latent", "packed", "packed copy"])
def test_a_folder_makes_the_same_model(tmp_path, name, form):
    model = form(made(name))
    models.save_pretrained(model, tmp_path / "new" / "folder")
    assert set(os.listdir(tmp_path / "new" / "folder")) == FILES
    found = models.from_pretrained(tmp_path / "new" / "folder")
    assert not found.training and torch.equal(found(IMAGES), model(IMAGES))
    assert found.pretrained_config == model.pretrained_config
    assert [type(m) for m in found.modules()] == [type(m) for m in model.modules()]
    models.save_pretrained(found, tmp_path / "again")
    for file in FILES - {"model.safetensors"}:  # whose metadata have no order
        assert (tmp_path / "again" / file).read_text() == (
            tmp_path / "new" / "folder" / file).read_text()


def test_a_wrapped_model_is_saved_as_itself(tmp_path):
    model = made()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        models.save_pretrained(wrapped, tmp_path)
        assert torch.equal(models.from_pretrained(tmp_path)(IMAGES), model(IMAGES))


def test_a_published_network(tmp_path):
    sizes = dict(num_classes=7, in_channels=2, blocks=(1, 2), filters=(32, 64))  # less to write
    model = models.create_model("quicknet_small", **sizes).half()
    models.save_pretrained(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"] == "quicknet_small" and config["maker"] == "create_model"
    assert (config["num_classes"], config["in_channels"]) == (7, 2)
    assert config["library_name"] == "bitkernels" and config["dtype"] == "float16"
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: bitkernels\n") and "arXiv 2011.09398" in card
    parameters = sum(p.numel() for p in model.parameters())
    size = (tmp_path / "model.safetensors").stat().st_size
    for row in (f"| parameters | {parameters:,} |", "| of them binary | 82,944 |",
                f"| bytes of model.safetensors | {size:,} |"):
        assert row in card
    found = models.from_pretrained(str(tmp_path))
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) and value.dtype == state[key].dtype
               for key, value in found.state_dict().items())
    assert found.stem[1].stride == (2, 2)  # as published
    other = models.create_model("quicknet_small", **sizes, weights=tmp_path)
    assert torch.equal(other.classifier.weight, model.classifier.weight.float())


def test_models_that_cannot_be_made_again_are_refused(tmp_path):
    class Odd(nn.Linear):
        pretrained_config = dict(maker="create", model="odd", num_classes=1, in_channels=1,
                                 options={"quantizer": nn.Identity()})

    mixed, changed = made(), made()
    mixed.classifier.half()
    changed.classifier = nn.Linear(64, 9, bias=False)
    for model, match in ((nn.Linear(2, 2), "Linear was not made by create_model or create"),
                         (Odd(2, 2), "an option of odd cannot be written to config.json"),
                         (changed, "quicknet is not as create made it: 1 missing: classifier.bias; "
                          r"1 of another shape: classifier.weight \(9, 64\), not \(4, 64\)"),
                         (packed(changed), "quicknet is not as create made it: 1 missing: class"),
                         (mixed, "several dtypes: torch.float16, torch.float32")):
        with pytest.raises(ValueError, match=match):
            models.save_pretrained(model, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_code_that_is_not_in_the_state_is_compared_too(tmp_path):
    """Other quantizers, or another activation, have the same tensors."""
    gelu, quantizer = made(), made()
    gelu.relu = nn.GELU()
    quantizer.sections[0][0].conv.weight_scale = "xnor"
    for model, match in ((gelu, r"relu is GELU\(approximate='none'\), made as ReLU\(\)"),
                         (quantizer, r"sections\.0\.0\.conv is .*xnor.*, made as BinaryConv2d")):
        with pytest.raises(ValueError, match=f"quicknet is not as create made it: {match}"):
            models.save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_pictures_go_through(tmp_path):
    """As recorded, else as published; small networks have none of their own."""
    model = made()
    models.save_pretrained(model, tmp_path)
    assert hub.config_of(str(tmp_path))["preprocessing"] is None
    model.pretrained_config |= {"preprocessing": {"name": "cifar", "size": 16},
                                "labels": ["tea", "caf\u00e9", "milk", "water"]}
    for form in (model, packed(model)):
        models.save_pretrained(form, tmp_path)
        assert models.from_pretrained(tmp_path).pretrained_config == model.pretrained_config
        found = hub.config_of(str(tmp_path))
        assert found["preprocessing"] == preprocessing.get("cifar").at(16)
        assert found["labels"] == model.pretrained_config["labels"]
    models.save_pretrained(models.create_model("quicknet_small", blocks=(1,), filters=(32,)),
                           tmp_path)
    assert hub.config_of(str(tmp_path))["preprocessing"] == preprocessing.get("larq")


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch, fails):
    models.save_pretrained(made(), tmp_path)
    (tmp_path / "LICENSE").write_text("mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    put, calls = _files.put, []

    def full(temporary, path):
        calls.append(path)
        if len(calls) == fails:
            raise OSError(28, "No space left on device")
        put(temporary, path)

    monkeypatch.setattr(_files, "put", full)
    with pytest.raises(OSError, match="No space left"):
        models.save_pretrained(made("reactnet-18"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change, match", [
    (lambda c: c.update(model="resnet50"), "no model is called 'resnet50'"),
    (lambda c: c.update(model=3), r"no config.json of save_pretrained.*\(model\)"),
    (lambda c: c.update(maker="os.system"), "maker or dtype"),
    (lambda c: c.update(dtype="load"), "maker or dtype"),
    (lambda c: c.pop("options"), r"\(options\)"),
    (lambda c: c.update(num_classes=True), r"\(num_classes\)"),
    (lambda c: c["options"].update(depth=4), "quicknet has no option depth"),
    (lambda c: c["options"].update(filters=[1]), "each section has a number of blocks"),
    (lambda c: c["options"].update(filters="ab"), "config.json: "),
    (lambda c: c.update(num_classes=-9), "config.json: .*at least 1, got -9"),
    (lambda c: c.update(num_classes=9), r"classifier\.weight \(4, 64\), not \(9, 64\)"),
    (lambda c: c.update(packed=True), "not one of save_packed"),
    (lambda c: c.update(preprocessing="larq"), "preprocessing in .* must have a name, of larq, .*"
     "and a size of at least 1, got larq"),
    (lambda c: c.update(preprocessing={"name": ["larq"], "size": 8}), "must have a name"),
    (lambda c: c.update(preprocessing={"name": "larq", "size": 0}), "a size of at least 1"),
    (lambda c: c.update(labels=["a", "b", "c"]), "must be 4 strings, one a class"),
    (lambda c: c.update(labels=[1, 2, 3, 4]), "must be 4 strings"),
])
def test_folders_of_something_else_are_refused(tmp_path, change, match):
    models.save_pretrained(made(), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        models.from_pretrained(tmp_path)


def test_broken_and_missing_files(tmp_path):
    models.save_pretrained(packed(made()), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        models.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no config.json of save_pretrained"):
        models.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        models.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match='no folder ./a/b, .*"hf-hub:owner/name"'):
        models.from_pretrained("./a/b")
    with pytest.raises(ValueError, match=r"packed model: use bitkernels\.nn\.load_packed"):
        models.load_weights(made(), tmp_path)


def errors():
    return pytest.importorskip("huggingface_hub.errors")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A Hub with one repository, "owner/net", whose files lie in the folder that this returns."""
    library = pytest.importorskip("huggingface_hub")
    folder = tmp_path / "repository"
    folder.mkdir()

    class NotFound(errors().RepositoryNotFoundError):
        def __init__(self, text):  # without an answer of a server
            OSError.__init__(self, text)

    def hf_hub_download(name, file, *, revision=None):
        folder.joinpath("asked").write_text(f"{name} {file} {revision}")
        if name != "owner/net":
            raise NotFound("404 Client Error.\n\nRepository Not Found")
        if not (folder / file).is_file():
            raise errors().EntryNotFoundError(f"404: no {file}")
        return str(folder / file)

    monkeypatch.setattr(library, "hf_hub_download", hf_hub_download)
    return folder


def test_from_the_hub(repository):
    model = made()
    models.save_pretrained(model, repository)
    assert torch.equal(models.from_pretrained("hf-hub:owner/net@v1.0")(IMAGES), model(IMAGES))
    assert (repository / "asked").read_text() == "owner/net model.safetensors v1.0"
    assert torch.equal(models.from_pretrained("owner/net")(IMAGES), model(IMAGES))
    other = made()
    models.load_weights(other, "hf-hub:owner/net")
    assert torch.equal(other(IMAGES), model(IMAGES))
    assert (repository / "asked").read_text() == "owner/net model.safetensors None"


def test_other_peoples_repositories_have_a_pickle(repository):
    model, other = made(), made()
    torch.save(model.state_dict(), repository / "pytorch_model.bin")
    models.load_weights(other, "hf-hub:owner/net")
    assert torch.equal(other(IMAGES), model(IMAGES))
    with pytest.raises(FileNotFoundError, match="hf-hub:owner/net: no config.json from the Hugg"):
        models.from_pretrained("hf-hub:owner/net")
    (repository / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors or pytorch_model.bin from"):
        models.load_weights(other, "hf-hub:owner/net")


def test_what_the_hub_does_not_have(repository, monkeypatch):
    library = pytest.importorskip("huggingface_hub")

    with pytest.raises(FileNotFoundError, match="hf-hub:no/body: no .* Hub: 404.*Not Found"):
        models.load_weights(made(), "hf-hub:no/body")

    def offline(*_, **__):
        raise errors().LocalEntryNotFoundError("Cannot find it; check your connection.")

    monkeypatch.setattr(library, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match="check your connection"):
        models.load_weights(made(), "hf-hub:owner/net")


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:net", "hf-hub:a/b/c", "hf-hub:../x/y"])
def test_names_of_no_repository(name):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ValueError, match='is "hf-hub:owner/name" or'):
        models.load_weights(made(), name)
    with pytest.raises(FileNotFoundError, match=f"no folder {name}, and it is no repository"):
        models.from_pretrained(name)


def test_push(tmp_path, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            files = {f: open(os.path.join(folder_path, f), "rb").read()
                     for f in os.listdir(folder_path)}
            calls.append((repo_id, files, commit_message))
            return "https://hub/commit"

    monkeypatch.setattr(library, "HfApi", Api)
    model = made()
    assert models.push_to_hub(model, "owner/net", private=True) == "https://hub/commit"
    (created, options), (name, files, _) = calls
    assert created == name == "owner/net" and options == {"private": True, "exist_ok": True}
    assert set(files) == FILES and b'from_pretrained("hf-hub:owner/net")' in files["README.md"]
    with pytest.raises(ValueError, match="was not made by"):
        models.push_to_hub(nn.Linear(1, 1), "owner/net")
    assert len(calls) == 2


@pytest.mark.parametrize("package, call", [
    ("huggingface_hub", lambda _: models.load_weights(made(), "hf-hub:owner/net")),
    ("huggingface_hub", lambda _: models.push_to_hub(made(), "owner/net")),
    ("safetensors", lambda folder: models.save_pretrained(made(), folder)),
])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, call):
    for name in (package, f"{package}.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"need {package}, .*: pip install {package}$"):
        call(tmp_path)
    assert not list(tmp_path.iterdir())
