"""What a stage makes of a network: quantizers, optimizers, losses, strict transfer."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bitkernels import models
from bitkernels.nn import BinaryLayer, BinaryLinear
from bitkernels.optim import Bop, binary_weights
from bitkernels.train import (
    CheckpointError,
    DataError,
    Loss,
    Method,
    Stage,
    TrainError,
    fit,
    recipes,
)
from bitkernels.train.checkpoint import transfer
from bitkernels.train.data import Data, Tensors
from bitkernels.train.distillation import Teachers, soft_labels_loss
from bitkernels.train.stages import StageLoss, configure, make_optimizer, make_scheduler
from bitkernels_tests.models import plain_reactnet as plain

STEP1, STEP2 = recipes.get("adambnn").stages
TANH = replace(STEP1, activations="tanh")


def reactnet(**options):
    return models.create("reactnet", in_channels=1, image_size=8, channels=(8, 16), **options)


def made(stage, model):
    configure(model, stage)
    return make_optimizer(model, stage)


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("stage, signs, tanhs", [(STEP1, True, False), (STEP2, True, False),
                                                 (TANH, False, True)])
def test_configure(name, stage, signs, tanhs):
    """Names stay; weights are binary or not; activations are signs or in the range of tanh."""
    torch.manual_seed(0)
    model = models.create(name, in_channels=1, image_size=8)
    keys = list(model.state_dict())
    configure(model, stage)
    assert list(model.state_dict()) == keys
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BinaryLayer)}
    seen = {}
    for key, layer in layers.items():
        layer.register_forward_hook(
            lambda m, args, out, key=key: seen.__setitem__(key, m._real_operands(args[0])[0]))
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    binary = stage.weights == "binary"
    assert all(layer.on_bits == (binary and signs) or name == "binarynet"
               for layer in layers.values())
    assert len(binary_weights(model)) == (len(layers) if binary else 0)
    if name == "binarynet":
        seen.pop("features.0")  # it takes the image
    for x in seen.values():
        values = x.detach().abs().unique()
        assert (len(values) == 1 and values.item() == 1) if signs else (
            len(values) > 100 and values.max() <= 1)


def test_real_weights_are_the_weights():
    model = reactnet()
    configure(model, STEP1)
    layer = model.blocks[0].spatial.conv
    x = torch.randn(2, 8, 8, 8).sign()
    assert torch.equal(layer(x), nn.functional.conv2d(x, layer.weight, padding=1))


def test_a_model_without_binary_layers_is_an_error():
    with pytest.raises(TrainError, match="Linear has no binary layers"):
        configure(nn.Linear(3, 3), STEP1)


def test_step1_weights_load_strictly_into_step2():
    step1, step2 = reactnet(), reactnet()
    configure(step1, STEP1)
    configure(step2, STEP2)
    transfer(step1.state_dict(), step2, "step1")
    assert all(torch.equal(a, b) for a, b in zip(step1.state_dict().values(),
                                                 step2.state_dict().values(), strict=True))


def test_transfer_knows_names_of_the_published_code():
    model = reactnet()
    entries = plain.entries((8, 16), classes=10)
    state = plain.generated(((n, s if n != "feature.0.conv1.weight" else (8, 1, 3, 3))
                             for n, s in entries), 0)
    transfer(state, model, "the given file")
    assert torch.equal(model.blocks[0].spatial.conv.weight, state["feature.1.binary_3x3.weight"])
    bnext = models.BNext(10, channels=(8, 8))
    with pytest.raises(CheckpointError, match="the weights of here cannot be used: BNext: feature"):
        transfer({"feature.1.FFN.binary_conv.weight": torch.ones(8, 8, 1, 1)}, bnext, "here")


def test_transfer_lists_what_differs_and_changes_nothing():
    """The published step 2 called `weight` `weights`, and every binary weight was lost."""
    model = reactnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {k: torch.zeros_like(v) for k, v in before.items()}
    weights["blocks.0.spatial.conv.weights"] = weights.pop("blocks.0.spatial.conv.weight")
    weights["stem.0.weight"] = torch.zeros(8, 1, 5, 5)
    with pytest.raises(CheckpointError) as error:
        transfer(weights, model, "stage step1")
    assert str(error.value) == (
        "the weights of stage step1 are not those of ReActNet: missing: "
        "blocks.0.spatial.conv.weight; unknown: blocks.0.spatial.conv.weights; of another shape: "
        "stem.0.weight (8, 1, 5, 5), not (8, 1, 3, 3)")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_decay_is_of_the_filters_alone():
    model = reactnet()
    groups = made(STEP1, model).param_groups
    decayed = {n for g in groups for n in g["param_names"] if g["weight_decay"] == 5e-6}
    assert decayed == {n for n, p in model.named_parameters() if p.dim() == 4}
    assert {n for g in groups for n in g["param_names"]} == {n for n, _ in model.named_parameters()}
    assert {g["weight_decay"] for g in made(STEP2, reactnet()).param_groups} == {0.0}


def test_decay_of_all_but_the_filters_apart_from_the_gradient():
    model = reactnet()
    optimizer = made(recipes.get("bnext").stages[0], model)
    assert type(optimizer) is torch.optim.AdamW
    decayed = {n for g in optimizer.param_groups for n in g["param_names"] if g["weight_decay"]}
    assert decayed == {n for n, p in model.named_parameters() if p.dim() != 4}


def test_bop_starts_from_signs_and_leaves_the_rest_to_adam():
    (stage,) = recipes.get("bop-cifar10").stages
    model = models.create("binarynet", in_channels=1, image_size=8, width=4)
    signs = {n: torch.where(p < 0, -1.0, 1.0) for n, p in binary_weights(model).items()}
    optimizer = made(stage, model)
    bop, adam = optimizer.optimizers
    assert type(bop) is Bop and type(adam) is torch.optim.Adam
    assert set(bop.param_groups[0]["param_names"]) == set(signs)
    assert all(torch.equal(p, signs[n]) for n, p in binary_weights(model).items())
    scheduler = make_scheduler(optimizer, stage, steps_per_epoch=1)
    optimizer.step()
    for _ in range(250):
        scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-6, 1e-2])


def test_quicknet_clips_its_latent_weights():
    (stage,) = recipes.get("quicknet").stages
    model = models.create("quicknet", in_channels=1, image_size=8, filters=(8,), blocks=(1,))
    optimizer = made(stage, model)
    weight = model.sections[0][0].conv.weight
    with torch.no_grad():
        weight.fill_(7.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert weight.unique().tolist() == [1.25]


def test_rest_of_a_stage_with_real_weights():
    stage = Stage("a", 1, 1, Method("adam", 1e-3), rest=Method("sgd", 1e-1), weights="real")
    adam, _ = made(stage, reactnet()).optimizers
    assert adam.param_groups[0]["param_names"] == [
        "blocks.0.spatial.conv.weight", "blocks.0.pointwise.conv.weight"]


def test_loss_is_the_weighted_sum():
    torch.manual_seed(1)
    student, teacher = reactnet(), reactnet().eval()
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    parts = {}
    for name, loss in {
            "labels": Loss(label_smoothing=0.1), "distribution": Loss(labels=0, distribution=1),
            "matching": Loss(labels=0, matching=1, temperature=2),
            "attention": Loss(labels=0, attention=1)}.items():
        stage_loss = StageLoss(loss, student, teacher if loss.needs_teacher else None)
        parts[name] = stage_loss(images, student(images), labels)
        stage_loss.close()
    logits, target = student(images), teacher(images)
    assert parts["labels"].item() == pytest.approx(nn.functional.cross_entropy(
        logits, labels, label_smoothing=0.1).item())
    assert parts["distribution"].item() == pytest.approx(
        -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    assert parts["attention"] > 0
    joined = StageLoss(Loss(0.5, 0.1, 2, 3, 2, 30), student, teacher)
    total = joined(images, student(images), labels)
    assert total.item() == pytest.approx(sum(
        w * parts[n].item() for n, w in zip(parts, (0.5, 2, 3, 30), strict=True)), rel=1e-5)
    total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    joined.close()


def test_several_teachers_are_one_module():
    student, teacher = reactnet(), Teachers([reactnet(), reactnet()]).eval()
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    loss = StageLoss(Loss(labels=0.5, teachers=2), student, teacher)
    logits = student(images)
    wanted = 0.5 * nn.functional.cross_entropy(logits, labels) + 2 * soft_labels_loss(
        logits, torch.stack([network(images) for network in teacher]))
    torch.testing.assert_close(loss(images, logits, labels), wanted)
    one = StageLoss(Loss(labels=0, teachers=1), student, teacher[0])
    with pytest.raises(TrainError, match=r"\(teachers, 4, 10\) of the teacher, got \(4, 10\)"):
        one(images, logits, labels)
    with pytest.raises(ValueError, match="teachers cannot be joined"):
        Loss(teachers=1, attention=1)


def test_attention_by_patterns():
    model = reactnet()
    loss = StageLoss(Loss(attention=1, points=("blocks.*",)), model, model)
    assert loss.taps[0].names == ("blocks.0",)
    with pytest.raises(TrainError, match="ReActNet has no module layer1"):
        StageLoss(Loss(attention=1, points=("layer1",)), model, model)
    with pytest.raises(TrainError, match="Sequential has no attention_layers"):
        StageLoss(Loss(attention=1), model, nn.Sequential())


def test_a_teacher_of_other_classes_is_an_error():
    student, teacher = reactnet(), reactnet(num_classes=5)
    images = torch.randn(2, 1, 8, 8)
    with pytest.raises(TrainError, match=r"teacher's outputs are \(2, 5\), the student's \(2, 10"):
        StageLoss(Loss(matching=1), student, teacher)(
            images, student(images), torch.zeros(2, dtype=torch.long))


def linear(classes=3, **options):
    return nn.Sequential(nn.Flatten(), BinaryLinear(64, 8, **options), nn.Linear(8, classes))


def test_what_a_stage_cannot_train():
    (bop,), (quicknet,) = (recipes.get(name).stages for name in ("bop-digits", "quicknet-digits"))
    with pytest.raises(TrainError, match="no weight of a binary layer of Sequential requires"):
        make_optimizer(linear().requires_grad_(False), bop)
    with pytest.raises(TrainError, match="stage step1: no parameter of Sequential requires grad"):
        make_optimizer(linear().requires_grad_(False), STEP1)
    with pytest.raises(ValueError, match="Bop cannot train the weight of 1: .*ApproxSign"):
        make_optimizer(linear(weight_quantizer="approx_sign"), bop)
    make_optimizer(linear(weight_quantizer="approx_sign"), quicknet)


@pytest.mark.parametrize("labels,classes,message", [
    (3, 3, "labels of mine must be integers from 0 to 2, got 3 to 3"),
    (-1, 3, "labels of mine must be integers from 0 to 2, got -1 to -1"),
    (1, 2, r"Sequential must give \(8, 3\) for 8 images of mine, got \(8, 2\)")])
def test_classes_that_do_not_fit(labels, classes, message, one_thread):
    source = Tensors(torch.randn(16, 1, 8, 8), torch.full((16,), labels))
    data = Data("mine", 3, 1, 8, source, source, plain=torch.clone, augmented={})
    recipe = recipes.get("quicknet-digits").scaled(epochs=1, batch_size=8, augmentation="none")
    with pytest.raises(TrainError, match=message) as raised:
        fit(lambda: linear(classes), recipe, data)
    assert raised.type is (TrainError if classes == 2 else DataError)
