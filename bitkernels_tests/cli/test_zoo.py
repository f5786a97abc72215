"""The commands on networks: summary, models, evaluate, predict, on generated pictures."""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

import bitkernels
from bitkernels import models
from bitkernels.cli import zoo as cli_zoo
from bitkernels.models import preprocessing
from bitkernels_tests.cli.test_cli import call

CLASSES, SIZE = 6, 64


def test_summary_prints_what_the_function_finds(capsys):
    status, out, err = call(capsys, "summary", "quicknet_small", "--size", 64, "--num-classes", 10)
    with torch.device("meta"):
        model = models.create_model("quicknet_small", num_classes=10)
    found = bitkernels.summary(model, (3, 64, 64))
    assert status == 0 and not err and out == f"{found}\n"
    status, out, _ = call(capsys, "summary", "quicknet_small", "--size", 64, "--num-classes", 10,
                          "--json", "--depth", 1, "--packed")
    data = json.loads(out)
    assert status == 0 and data["larq"] == found.to_dict()["larq"]
    assert [row["name"] for row in data["layers"]][:2] == ["stem", "sections"]


def test_summary_as_published_and_of_other_channels(capsys):
    data = json.loads(call(capsys, "summary", "quicknet_small", "--json")[1])
    assert data["input_shapes"] == [[1, 3, 224, 224]] and data["larq"]["bytes"] == 4_197_152
    data = json.loads(call(capsys, "summary", "reactnet", "--in-channels", 1, "--size", 8,
                           "--json")[1])
    assert data["input_shapes"] == [[1, 1, 8, 8]]


@pytest.mark.parametrize("form", ["latent", "packed"])
def test_commands_take_the_folder_of_a_network(capsys, tmp_path, form, keeps_threads):
    pytest.importorskip("safetensors")
    model = models.create("reactnet", in_channels=1, image_size=8, channels=(32, 64)).eval()
    if form == "packed":
        model = cli_zoo.packed(model)
    models.save_pretrained(model, tmp_path)
    expected = bitkernels.summary(model, (1, 8, 8))
    status, out, err = call(capsys, "summary", tmp_path, "--size", 8)
    assert status == 0 and not err and out == f"{expected}\n"
    for command in ("explain", "profile"):
        status, out, err = call(capsys, command, tmp_path, "--json", "--size", 8, *(
            ("--threads", 1) if command == "profile" else ()))
        assert status == 0 and not err and json.loads(out)
    for command in ("explain", "summary"):
        for option in ("--num-classes", "--in-channels"):
            status, out, err = call(capsys, command, tmp_path, option, 3)
            assert status == 1 and not out and err == (
                f"bitkernels {command}: {option} is for networks by name; {tmp_path} has its own\n")
    (tmp_path / "config.json").unlink()
    for command in ("explain", "profile", "summary", "predict"):
        status, out, err = call(capsys, command, tmp_path, *(["x.png"] * (command == "predict")))
        assert status == 1 and not out and "has no config.json" in err and err.count("\n") == 1


def test_models_lists_all_of_the_registry(capsys):
    status, out, err = call(capsys, "models", "quicknet*")
    assert status == 0 and not err
    published, classes = (table.splitlines() for table in out.split("\n\n"))
    assert [row.split()[0] for row in published[1:]] == models.list_models("quicknet*")
    assert [row.split()[0] for row in classes[1:]] == ["quicknet"]
    cells = next(row.split() for row in published if row.startswith("quicknet_small"))
    assert cells[1] == "11,980,800" and cells[-1] == "59.4"
    # Words are whole here, for all channels are multiples of 32.
    state = models.create_model("quicknet_small").state_dict().values()
    size = sum(t.numel() * t.element_size() for t in state)
    assert cells[3:5] == [f"{size / 1e6:.2f}", f"{(size - 31 / 8 * 11_980_800) / 1e6:.2f}"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, torchvision):
    """(weights, folder of ROOT/val/CLASS/*.png, the pictures in order)."""
    pytest.importorskip("safetensors")
    from PIL import Image
    from safetensors.torch import save_file

    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("zoo")
    model = models.create_model("quicknet_small", num_classes=CLASSES)
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(CLASSES):
        (root / "val" / f"class{i}").mkdir(parents=True)
        for j in range(3):
            coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
            path = root / "val" / f"class{i}" / f"{j}.png"
            Image.fromarray(coarse).save(path)
            pictures.append((path, i, coarse))
    images = torch.stack([preprocessing.get("larq").at(SIZE).array(p) for _, _, p in pictures])
    for module in model.modules():  # statistics of these pictures, so that they differ in classes
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        logits = model(images)
        model.classifier.weight /= logits.std()
        model.classifier.bias.copy_(-logits.mean(0) / logits.std())
    save_file(model.state_dict(), str(root / "weights.safetensors"))
    return root, model.eval(), pictures


def arguments(zoo, command, *more):
    root = zoo[0]
    return (command, "quicknet_small", "--weights", root / "weights.safetensors", "--size", SIZE,
            "--num-classes", CLASSES, "--threads", 1, *more)


@pytest.fixture(scope="module")
def logits(zoo):
    rule = preprocessing.get("larq").at(SIZE)
    with torch.no_grad():
        return torch.stack([zoo[1](rule.array(pixels)[None])[0] for _, _, pixels in zoo[2]])


@pytest.mark.parametrize("packed", [False, True])
def test_evaluate(zoo, logits, capsys, packed, keeps_threads):
    labels = torch.tensor([label for _, label, _ in zoo[2]])
    order = logits.argsort(1, descending=True)
    top1 = 100 * (order[:, 0] == labels).double().mean().item()
    top5 = 100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item()
    assert 0 < top1 < top5 < 100 and len(set(order[:, 0].tolist())) > 1
    more = ("--root", zoo[0], "--batch-size", 5, *(["--packed"] if packed else []))
    status, out, err = call(capsys, *arguments(zoo, "evaluate", "--json", "--quiet", *more))
    assert status == 0 and not err
    found = json.loads(out)
    assert (found["images"], found["packed"]) == (18, packed)
    assert (found["top1"], found["top5"]) == (pytest.approx(top1), pytest.approx(top5))
    if not packed:
        status, out, err = call(capsys, *arguments(zoo, "evaluate", *more))
        assert status == 0 and f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of 18 images" in out
        assert "published: top-1 59.4 %, top-5 81.8 %" in out and "batch" in err


def test_a_limit_is_spread_over_the_classes(zoo, logits, capsys, keeps_threads):
    chosen = [i * 18 // 4 for i in range(4)]
    right = sum(int(logits[i].argmax()) == zoo[2][i][1] for i in chosen)
    status, out, _ = call(capsys, *arguments(zoo, "evaluate", "--json", "--quiet", "--root", zoo[0],
                                             "--data", "folder", "--limit", 4))
    found = json.loads(out)
    assert status == 0 and found["images"] == 4 and found["top1"] == 25 * right


def test_predict(zoo, logits, capsys, tmp_path, keeps_threads):
    paths = [zoo[2][0][0], zoo[2][7][0]]
    shares = logits[[0, 7]].softmax(1)
    status, out, err = call(capsys, *arguments(zoo, "predict", *paths, "--json", "--top", 9))
    assert status == 0 and not err
    for row, share, path in zip(json.loads(out), shares, paths, strict=True):
        assert row["picture"] == str(path) and len(row["classes"]) == CLASSES
        assert [c["index"] for c in row["classes"]] == share.argsort(descending=True).tolist()
        assert [c["probability"] for c in row["classes"]] == pytest.approx(
            share.sort(descending=True).values.tolist(), rel=1e-4)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"animal {i}\n" for i in range(CLASSES)) + "\n")
    status, out, _ = call(capsys, *arguments(zoo, "predict", paths[0], "--labels", labels,
                                             "--top", 2, "--packed"))
    lines = out.splitlines()
    assert status == 0 and lines[0] == str(paths[0]) and len(lines) == 3
    best = int(shares[0].argmax())
    assert lines[1] == f"  {100 * float(shares[0, best]):5.1f} %  animal {best}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, torchvision):
    """(folder of pictures, folder of a training on them, share of the held-out that was right)."""
    pytest.importorskip("safetensors")
    from PIL import Image

    from bitkernels.train import datasets, fit, recipes

    root, run = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("trained") / "run"
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 5)):
        for i, name in enumerate(("black", "grey", "white")):
            (root / part / name).mkdir(parents=True)
            for j in range(count):
                shades = rng.integers(0, 120, (20, 25, 3)) + 65 * i
                Image.fromarray(shades.astype(np.uint8)).save(root / part / name / f"{j}.png")
    recipe = recipes.get("quicknet-digits").scaled(epochs=3, batch_size=8, augmentation="none")
    result = fit(lambda: models.create("quicknet", num_classes=3, image_size=16, blocks=(1, 1),
                                       filters=(32, 32)), recipe, datasets.folder(root, 16), run)
    return root, run, result.accuracy


def test_a_training_is_evaluated_by_its_folder(trained, capsys, keeps_threads):
    """Its pictures went through ReActNet's preprocessing, not through QuickNet's."""
    import PIL.Image

    root, run, accuracy = trained
    assert 1 / 3 < accuracy
    for packed in ((), ("--packed",)):
        status, out, err = call(capsys, "evaluate", run, "--data", "folder", "--root", root,
                                "--json", "--quiet", "--threads", 1, *packed)
        assert status == 0 and not err
        assert json.loads(out)["top1"] == pytest.approx(100 * accuracy)
    picture = root / "val" / "white" / "0.png"
    status, out, err = call(capsys, "predict", run, picture, "--json")
    assert status == 0 and not err
    found = json.loads(out)[0]["classes"]
    with PIL.Image.open(picture) as file:
        data = preprocessing.get("imagenet").at(16).array(np.array(file))
    with torch.no_grad():
        shares = models.from_pretrained(run)(data[None])[0].softmax(0)
    assert {row["label"]: row["probability"] for row in found} == {
        name: pytest.approx(float(share), rel=1e-4)
        for name, share in zip(("black", "grey", "white"), shares, strict=True)}


def test_weights_of_a_training_bring_their_preprocessing(trained):
    file = trained[1] / "quicknet.safetensors"
    for weights, rule in ((file, preprocessing.get("imagenet").at(16)),
                          (trained[1], preprocessing.get("imagenet").at(16)),
                          ("quicknet.larq", preprocessing.get("larq"))):
        options = Namespace(model="quicknet", weights=str(weights), num_classes=3, size=None)
        assert cli_zoo.asked(options).rule == rule
        options.size = 32
        assert cli_zoo.asked(options).rule == rule.at(32)


def test_weights_that_say_nothing_of_pictures(zoo, capsys, tmp_path, keeps_threads):
    """A folder with a file of weights alone, as load_weights takes it: as published."""
    (tmp_path / "model.safetensors").write_bytes((zoo[0] / "weights.safetensors").read_bytes())
    given = [x if x != zoo[0] / "weights.safetensors" else tmp_path for x in arguments(
        zoo, "evaluate", "--root", zoo[0], "--json", "--quiet")]
    found = json.loads(call(capsys, *given)[1])
    expected = json.loads(call(capsys, *arguments(
        zoo, "evaluate", "--root", zoo[0], "--json", "--quiet"))[1])
    assert found["top1"] == expected["top1"] and found["weights"] == str(tmp_path)


def test_folders_that_do_not_fit_are_one_line(trained, capsys, tmp_path, keeps_threads):
    root, run, _ = trained
    config = json.loads((run / "config.json").read_text())
    for name, change in (("grey", {"in_channels": 1}), ("unknown", {"preprocessing": None}),
                         ("others", {"labels": ["black", "grey", "blue"]}),
                         ("fewer", {"num_classes": 2, "labels": ["black", "grey"]})):
        (tmp_path / name).mkdir()
        written = {key: value for key, value in {**config, **change}.items() if value is not None}
        (tmp_path / name / "config.json").write_text(json.dumps(written))
    folder, picture = ("--data", "folder", "--root", root, "--quiet"), root / "val/grey/0.png"
    for given, message in (
            (("evaluate", "quicknet", *folder), "--weights is needed for quicknet, a published"),
            (("evaluate", run, "--weights", "x", *folder), "--weights is for published networks; "),
            (("predict", run, "--num-classes", 3, picture), "--num-classes is for published"),
            (("predict", tmp_path / "grey", picture), "takes images of 1 channels, and pictures"),
            (("predict", tmp_path / "unknown", picture), "config.json of "),
            (("predict", tmp_path, picture), "has no config.json"),
            (("evaluate", tmp_path / "others", *folder), "only one of them has blue, white"),
            (("evaluate", tmp_path / "fewer", *folder), "has 3 classes and ")):
        status, out, err = call(capsys, *given)
        assert status == 1 and not out and err.count("\n") == 1, (given, err)
        assert message in err and err.startswith(f"bitkernels {given[0]}: "), (given, err)


def test_imagenet_has_its_labels(torchvision):
    from bitkernels.cli.predict import labels

    names = labels(None, 1000)
    assert len(names) == 1000 and names[0] == "tench" and names[281] == "tabby"
    assert labels(None, 3) == ["0", "1", "2"]


def test_bad_files_and_sizes_are_one_line(zoo, capsys, tmp_path, keeps_threads):
    broken = tmp_path / "val" / "a"
    broken.mkdir(parents=True)
    (broken / "x.png").write_bytes(b"no picture")
    (tmp_path / "labels").write_text("one\ntwo\n")
    root = zoo[0]
    picture = zoo[2][0][0]
    weights = ("--weights", root / "weights.safetensors")
    evaluate = ("evaluate", "quicknet_small", "--quiet")
    for given, message in (
            ((*evaluate, *weights, "--root", root), "has 6 classes and quicknet_small 1000"),
            ((*evaluate, *weights, "--root", tmp_path / "none"), "there is no folder"),
            ((*evaluate, *weights, "--root", root / "val"), "val/val"),
            ((*evaluate, *weights, "--root", tmp_path, "--data", "cifar10"), "no CIFAR-10 in"),
            ((*evaluate, *weights, "--root", root, "--limit", 0), "--limit must be at least 1"),
            ((*evaluate, *weights, "--root", root, "--workers", -1), "--workers must be at least"),
            ((*evaluate, *weights, "--root", tmp_path, "--num-classes", 1), "weights"),
            (("evaluate", "resnet", *weights, "--root", root), "no model is called 'resnet'"),
            (arguments(zoo, "evaluate", "--root", root, "--quiet", "--device", "banana"),
             "--device banana"),
            (arguments(zoo, "predict", tmp_path / "none.png"), "there is no picture"),
            (arguments(zoo, "predict", picture, broken / "x.png"), f"cannot read {broken}/x.png"),
            (arguments(zoo, "predict", picture, "--labels", tmp_path / "labels"),
             "a line for each of 6 classes, and"),
            (arguments(zoo, "predict", picture, "--labels", tmp_path / "absent"), "absent"),
            (arguments(zoo, "predict", picture, "--top", 0), "--top must be at least 1"),
            (("predict", "quicknet_small", "--weights", tmp_path / "absent", "--num-classes", 6,
              picture), "absent"),
            (("summary", "resnet"), "no model is called 'resnet'; there are "),
            (("summary", "quicknet_small", "--size", 0), "--size must be at least 1, got 0"),
            (("summary", "quicknet_small", "--size", 3), "does not run on an input of shape")):
        status, out, err = call(capsys, *given)
        assert status == 1 and not out and err.count("\n") == 1, (given, err)
        assert message in err and err.startswith(f"bitkernels {given[0]}: "), (given, err)


def test_an_unreadable_picture_ends_an_evaluation(zoo, capsys, tmp_path, keeps_threads):
    for i in range(CLASSES):
        (tmp_path / "val" / str(i)).mkdir(parents=True)
        (tmp_path / "val" / str(i) / "x.png").write_bytes(b"no picture")
    status, out, err = call(capsys, *arguments(zoo, "evaluate", "--quiet", "--root", tmp_path))
    assert status == 1 and not out and "cannot read" in err and err.count("\n") == 1
