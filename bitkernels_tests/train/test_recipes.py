"""Recipes hold the published numbers, print and change; schedules give the published rates."""

import ast
import dataclasses
import hashlib

import pytest

from bitkernels import models
from bitkernels.optim import binary_weights
from bitkernels.train import Loss, Method, Recipe, Schedule, Stage, datasets, fit, recipes
from bitkernels.train.distillation import Teachers


@pytest.mark.parametrize("name, epochs, batch, lr, decay", [
    ("adambnn", 256, 256, 1.25e-3, 5e-6), ("reactnet-a", 128, 256, 1.25e-3, 1e-5),
    ("reactnet-18", 128, 512, 2.5e-3, 1e-5)])
def test_two_step_recipes(name, epochs, batch, lr, decay):
    step1, step2 = recipes.get(name).stages
    assert [s.weights for s in (step1, step2)] == ["real", "binary"]
    assert [s.activations for s in (step1, step2)] == ["binary", "binary"]
    assert [s.method.weight_decay for s in (step1, step2)] == [decay, 0]
    assert step2.start == "step1" and step1.start is None
    for stage in (step1, step2):
        assert (stage.epochs, stage.batch_size, stage.method.lr) == (epochs, batch, lr)
        assert stage.method.name == "adam" and stage.method.betas == (0.9, 0.999)
        assert stage.loss == Loss(labels=0, distribution=1) and stage.teacher == "given"


def test_epoch_schedule_wastes_no_epoch():
    schedule = recipes.get("adambnn").stages[0].method.schedule
    rates = [schedule.at(step, 10, 4) for step in range(40)]
    assert rates == [1.0] * 10 + [0.75] * 10 + [0.5] * 10 + [0.25] * 10


def test_bop_cifar10_staircase():
    (stage,) = recipes.get("bop-cifar10").stages
    assert (stage.epochs, stage.batch_size, stage.method.threshold) == (500, 50, 1e-8)
    assert (stage.rest.name, stage.rest.lr, stage.rest.schedule) == ("adam", 1e-2, Schedule())
    rates = [stage.method.lr * stage.method.schedule.at(e * 1000, 1000, 500)
             for e in (0, 99, 100, 199, 200, 300, 400, 499)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-7, 1e-8, 1e-8])


def test_bop_imagenet_ends():
    (stage,) = recipes.get("bop-imagenet").stages
    last = 7 * stage.epochs - 1
    for method, first, final in ((stage.method, 1e-4, 1e-6), (stage.rest, 2.5e-3, 5e-6)):
        assert method.lr * method.schedule.at(0, 7, stage.epochs) == pytest.approx(first)
        assert method.lr * method.schedule.at(last, 7, stage.epochs) == pytest.approx(final)


def test_quicknet_warm_up_and_cosine():
    (stage,) = recipes.get("quicknet").stages
    assert (stage.epochs, stage.batch_size, stage.latent_clip) == (600, 2048, 1.25)
    assert (stage.method.name, stage.method.lr) == ("adam", 1e-2)
    assert (stage.rest.name, stage.rest.lr, stage.rest.momentum) == ("sgd", 0.1, 0.9)
    factor = [stage.method.schedule.at(s, 100, 600) for s in (0, 499, 500, 30249, 30250, 59999)]
    assert factor[:3] == [0.0, 1.0, 1.0] and factor[5] == pytest.approx(0.0)
    assert factor[3] > 0.5 > factor[4]  # the middle between warm-up and end


def test_bnext():
    (stage,) = recipes.get("bnext").stages
    method = stage.method
    assert (stage.epochs, stage.batch_size, stage.latent_clip, stage.gradient_clip) == (
        512, 512, 1.5, 5)
    assert (method.name, method.lr, method.weight_decay, method.decay) == (
        "adamw", 1e-3, 1e-3, "others")
    assert stage.loss == Loss(labels=0, teachers=1) and stage.teacher == "given"
    rates = [method.schedule.at(100 * epoch, 100, 512) for epoch in (0, 5, 256, 511)]
    assert rates == pytest.approx([0, 1, 0.5, 1e-4], abs=1e-3)
    assert rates[3] >= 1e-4


def test_real_to_binary_stages():
    real, activations, binary = recipes.get("real-to-binary").stages
    stages = (real, activations, binary)
    assert [(s.activations, s.weights, s.start, s.teacher) for s in stages] == [
        ("tanh", "real", None, "given"), ("binary", "real", None, "real"),
        ("binary", "binary", "binary-activations", "binary-activations")]
    assert (real.loss.attention, real.loss.matching) == (30, 3)
    assert (binary.loss.attention, binary.loss.matching, binary.method.lr) == (0, 0.8, 2e-4)
    steps = [real.method.schedule.at(e * 10, 10, 75) for e in (5, 39, 40, 60, 70)]
    assert steps == pytest.approx([1, 1, 0.3, 0.09, 0.027])


@pytest.mark.parametrize("name", recipes.names())
def test_prints_and_changes(name):
    recipe = recipes.get(name)
    text = str(recipe)
    assert recipe.name in text and all(stage.name in text for stage in recipe.stages)
    small = recipe.scaled(epochs=3, batch_size=16, augmentation="none")
    assert {(s.epochs, s.batch_size, s.augmentation) for s in small.stages} == {(3, 16, "none")}
    assert recipe == recipes.get(name) != small
    first = dataclasses.replace(recipe.stages[0], epochs=7)
    assert dataclasses.replace(recipe, stages=(first, *recipe.stages[1:])) != recipe
    changed = {k for k, v in small.settings().items() if recipe.settings()[k] != v}
    assert {k.split(".")[-1] for k in changed} >= {"epochs", "batch_size", "augmentation"}


def test_scaled_keeps_shares_and_ratios():
    (stage,) = recipes.get("bop-cifar10").scaled(epochs=5, lr=0.1, gamma=1e-3).stages
    assert stage.method.schedule.milestones == (1, 2, 3, 4)
    assert (stage.method.lr, stage.rest.lr) == (1e-3, 0.1)
    (stage,) = recipes.get("quicknet").scaled(epochs=120, lr=1e-3).stages
    assert (stage.method.lr, stage.rest.lr) == pytest.approx((1e-3, 1e-2))
    assert stage.method.schedule.warmup == 1
    with pytest.raises(ValueError, match="quicknet has no gamma"):
        recipes.get("quicknet").scaled(gamma=1e-3)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_runs(name):
    """Two updates a stage; each stage starts from the weights and has the teacher that it names."""
    pytest.importorskip("sklearn")
    digits = datasets.digits()
    digits = dataclasses.replace(digits, train=digits.train.first(60),
                                 held_out=digits.held_out.first(20))
    recipe = recipes.get(name).scaled(1, 30, augmentation="none")
    stages = [dataclasses.replace(stage, loss=dataclasses.replace(stage.loss, teacher_points=()))
              for stage in recipe.stages]  # the teacher here is no ResNet-18
    model = "binarynet" if name.startswith("bop") else "reactnet"
    options = dict(width=2) if model == "binarynet" else dict(channels=(4, 8, 8))

    def build():
        return models.create(model, in_channels=1, image_size=8, **options)

    teacher = Teachers([build(), build()]) if name == "bnext" else build()
    result = fit(build, dataclasses.replace(recipe, stages=tuple(stages)), digits,
                 teacher=teacher if any(s.teacher == "given" for s in stages) else None)
    assert [row["stage"] for row in result.rows] == [stage.name for stage in stages]
    assert all(0 < row["train_loss"] < 100 for row in result.rows)
    weights = list(binary_weights(result.model).values())
    if name.startswith("bop"):
        assert all(w.abs().unique().tolist() == [1.0] for w in weights)
    assert weights


def test_gradients_are_clipped_to_their_norm():
    pytest.importorskip("sklearn")
    digits = datasets.digits()
    digits = dataclasses.replace(digits, train=digits.train.first(30),
                                 held_out=digits.held_out.first(20))
    stage = Stage("a", 1, 30, Method("sgd", 1.0), augmentation="none", gradient_clip=1e-3)
    starts = []

    def build():
        model = models.create("reactnet", in_channels=1, image_size=8, channels=(4, 8))
        starts.append([p.detach().clone() for p in model.parameters()])
        return model

    result = fit(build, Recipe("clipped", (stage,)), digits)
    moved = sum((p - start).square().sum().item()
                for p, start in zip(result.model.parameters(), starts[-1], strict=True)) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_quicknet_digits_learns(one_thread):
    """In 4 of its 20 epochs, which give 99 %."""
    pytest.importorskip("sklearn")
    recipe = recipes.get("quicknet-digits")
    options = dict(option.split("=") for option in recipe.model_options)
    result = fit(lambda: models.create(recipe.model, in_channels=1, image_size=8, **{
        name: ast.literal_eval(value) for name, value in options.items()}),
        recipe.scaled(epochs=4), datasets.digits())
    assert result.accuracy > 0.85


ADAM = Method("adam", 1e-3)


@pytest.mark.parametrize("stages, message", [
    ((), "has no stages"),
    ((Stage("a", 1, 1, ADAM, start="b"), Stage("b", 1, 1, ADAM)), "no earlier stage 'b'"),
    ((Stage("a", 1, 1, ADAM), Stage("a", 1, 1, ADAM)), "name is taken"),
    ((Stage("checkpoint", 1, 1, ADAM),), "name is taken"),
    ((Stage("a", 1, 1, ADAM, loss=Loss(matching=1)),), "need each other"),
    ((Stage("a", 1, 1, ADAM, teacher="given"),), "need each other"),
    ((Stage("a", 0, 1, ADAM),), "epochs must be an integer of at least 1, got 0")])
def test_refuses(stages, message):
    with pytest.raises(ValueError, match=message):
        Recipe("mine", stages)


def test_unknown_recipe_names_those_there_are():
    with pytest.raises(ValueError, match="no recipe 'adamnn'.*adambnn"):
        recipes.get("adamnn")


@pytest.mark.parametrize("name, epoch, rate", [
    ("binary-alexnet", 149, 1e-2 * 0.5**14), ("binary-alexnet", 9, 1e-2),
    ("birealnet", 150, 2.5e-3), ("binary-resnet-e18", 95, 4e-3 * 0.09)])
def test_rates_of_larq_zoo(name, epoch, rate):
    (stage,) = recipes.get(name).stages
    assert recipes.get(name).model in models.list_models()
    factor = stage.method.schedule.at(epoch * 1000, 1000, stage.epochs)
    assert stage.method.lr * factor == pytest.approx(rate, rel=1e-4)


EARLIER = ("adambnn", "reactnet-a", "reactnet-18", "bop-cifar10", "bop-imagenet", "quicknet",
           "real-to-binary", "adambnn-digits", "bop-digits", "quicknet-digits")
KEYS_OF_0_1 = "45caa81852c4a31b54a124d9c1dfaa9b761392bb691e6031d5f6083c1a96f228"


def test_settings_are_those_that_checkpoints_of_0_1_hold():
    """The hash of the keys of all settings of these recipes, as they first were."""
    keys = sorted(key for name in EARLIER for key in recipes.get(name).settings())
    assert hashlib.sha256(" ".join(keys).encode()).hexdigest() == KEYS_OF_0_1
    (stage,) = recipes.get("quicknet").stages
    clipped = dataclasses.replace(recipes.get("quicknet"), stages=(
        dataclasses.replace(stage, gradient_clip=1.0),))
    assert clipped.settings()["quicknet.gradient_clip"] == 1
    assert any(key.endswith("loss.teachers") for key in recipes.get("bnext").settings())


def test_numbers_of_images_are_integers():
    with pytest.raises(ValueError, match="stage bop: batch_size must be an integer .* got 2.5"):
        recipes.get("bop-digits").scaled(batch_size=2.5)
    with pytest.raises(ValueError, match="stage bop: epochs must be an integer .* got 0"):
        recipes.get("bop-digits").scaled(epochs=0)
