"""Networks with weights of generated files against the plain forward of `plain_classic`."""

from __future__ import annotations

import pytest
import torch

from bitkernels.models import create_model, load_weights
from bitkernels_tests.models import generated
from bitkernels_tests.models.recorded import write_h5

plain = pytest.importorskip("bitkernels_tests.models.plain_classic")  # needs h5py

CLASSES = 7
BLOCKS, CHANNELS = (1, 2, 1), (8, 16, 32)


class Layout:
    """What Keras' save_weights writes of layers; the counters in names start anywhere."""

    def __init__(self) -> None:
        self.layers: list = []
        self.count = 37

    def add(self, kind: str, **shapes: tuple[int, ...]) -> None:
        name = f"{kind}_{self.count}"
        self.count += 1
        self.layers.append([name, [[f"{name}/{key}:0", shape] for key, shape in shapes.items()]])

    def conv(self, *shape: int) -> None:
        self.add("quant_conv2d", kernel=shape)

    def norm(self, channels: int, scale: bool = True) -> None:
        names = (["gamma"] if scale else []) + ["beta", "moving_mean", "moving_variance"]
        self.add("batch_normalization", **dict.fromkeys(names, (channels,)))
        self.add("activation")  # layers without weights are written too

    def residual(self) -> None:
        before = CHANNELS[0]
        for section, (count, width) in enumerate(zip(BLOCKS, CHANNELS, strict=True)):
            for i in range(count):
                self.conv(3, 3, before, width)
                if section and not i:
                    self.add("conv2d", kernel=(1, 1, before, width))
                    self.norm(width)
                self.norm(width)
                before = width
        self.add("dense", kernel=(before, CLASSES), bias=(CLASSES,))


def birealnet18() -> Layout:
    layout = Layout()
    layout.conv(7, 7, 3, CHANNELS[0])
    layout.norm(CHANNELS[0])
    layout.residual()
    return layout


def resnet_e(small: bool = False) -> Layout:
    layout = Layout()
    layout.conv(*((3, 3) if small else (7, 7)), 3, CHANNELS[0])
    for _ in range(0 if small else 2):
        layout.norm(CHANNELS[0])
    layout.residual()
    return layout


def xnornet() -> Layout:
    layout = Layout()
    layout.conv(11, 11, 3, 96)
    layout.norm(96, False)
    layout.norm(96, False)
    for shape in ((5, 5, 96, 256), (3, 3, 256, 384), (3, 3, 384, 384), (3, 3, 384, 256),
                  (6, 6, 256, 16), (1, 1, 16, 16)):
        layout.conv(*shape)
        layout.norm(shape[3], False)
    layout.add("dense", kernel=(16, CLASSES))
    return layout


def binary_alexnet() -> Layout:
    layout = Layout()
    for shape in ((11, 11, 3, 64), (5, 5, 64, 192), (3, 3, 192, 384), (3, 3, 384, 384),
                  (3, 3, 384, 256), (1, 1, 4 * 256, 16), (1, 1, 16, 16), (1, 1, 16, CLASSES)):
        layout.conv(*shape)
        layout.norm(shape[3], False)
    return layout


def dorefanet() -> Layout:
    layout = Layout()
    layout.add("conv2d", kernel=(12, 12, 3, 96), bias=(96,))
    for shape in ((5, 5, 96, 256), (3, 3, 256, 384), (3, 3, 384, 384), (3, 3, 384, 256),
                  (4 * 256, 16), (16, 16)):
        layout.add("quant", kernel=shape)
        layout.norm(shape[-1], False)
    layout.add("dense", kernel=(16, CLASSES), bias=(CLASSES,))
    return layout


RESIDUAL = dict(blocks=BLOCKS, channels=CHANNELS)
# Options, layout, size of the image, arguments of the plain forward.
CASES = {
    "birealnet18": (RESIDUAL, birealnet18(), (37, 64), dict(blocks=BLOCKS)),
    "binary_resnet_e18": (RESIDUAL, resnet_e(), (64, 33), dict(blocks=BLOCKS)),
    "binary_resnet_e18:small": (dict(stem="cifar", **RESIDUAL), resnet_e(True), (16, 11),
                                dict(blocks=BLOCKS, small=True)),
    "xnornet": (dict(hidden=16), xnornet(), (224, 224), {}),
    "binary_alexnet": (dict(hidden=16, image_size=96), binary_alexnet(), (96, 96), {}),
    "dorefanet": (dict(hidden=16, image_size=76), dorefanet(), (76, 76), {}),
}


def check_logits(model, images, forward):
    """By a plain forward of (images, signs), of which no sign may be one that rounding decides: it
    changes logits by percents."""
    compared = 0
    for x in images:
        signs = plain.Signs()
        wanted = forward(x, signs)
        if signs.margin < 3e-6:
            continue
        compared += 1
        with torch.no_grad():
            logits = model(x)
        assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert compared


@pytest.mark.parametrize("case", CASES)
def test_file_and_images_give_the_plain_logits(case, tmp_path):
    options, layout, size, arguments = CASES[case]
    name = case.partition(":")[0]
    model = create_model(name, num_classes=CLASSES, **options).eval()
    path = tmp_path / "weights"
    write_h5(path, layout.layers, 5)
    load_weights(model, path)
    file = plain.read(path)
    check_logits(model, (torch.from_numpy(generated.image(seed, size)).permute(0, 3, 1, 2)
                         for seed in range(4)),
                 lambda x, signs: getattr(plain, name)(file, x, signs, **arguments))


def authors_state(seed: int) -> dict[str, torch.Tensor]:
    """A state dict of Bi-Real Net's PyTorch code."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (CHANNELS[0], 3, 7, 7)}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", CHANNELS[0])
    before = CHANNELS[0]
    for section, (count, width) in enumerate(zip(BLOCKS, CHANNELS, strict=True), 1):
        for i in range(count):
            shapes[f"layer{section}.{i}.binary_conv.weights"] = (before * width * 9, 1)
            norm(f"layer{section}.{i}.bn1", width)
            if section > 1 and not i:
                shapes[f"layer{section}.{i}.downsample.1.weight"] = (width, before, 1, 1)
                norm(f"layer{section}.{i}.downsample.2", width)
            before = width
    shapes |= {"fc.weight": (CLASSES, before), "fc.bias": (CLASSES,)}
    state = {}
    for index, (name, shape) in enumerate(shapes.items()):
        low, high = (0.5, 2.0) if "var" in name else (-0.5, 1.0) if len(shape) == 1 else (-0.1, 0.1)
        value = torch.from_numpy(generated.uniform(seed, index, shape, low, high))
        state[name] = torch.tensor(12) if "num_batches" in name else value
    return state


@pytest.mark.parametrize("prefix, flat", [("module.", True), ("", False)])
def test_authors_checkpoints_give_the_plain_logits(prefix, flat, tmp_path):
    state = authors_state(3)
    saved = {}
    for key, value in state.items():
        if "binary_conv" in key and not flat:
            before = state[key.replace("binary_conv.weights", "bn1.bias")].shape[0]
            key, value = key.removesuffix("s"), value.view(before, -1, 3, 3)
        saved[prefix + key] = value
    torch.save({"epoch": 7, "state_dict": saved}, tmp_path / "model_best.pth.tar")
    model = create_model("birealnet34", num_classes=CLASSES, **RESIDUAL).eval()
    load_weights(model, tmp_path / "model_best.pth.tar")
    check_logits(model, (torch.from_numpy(generated.uniform(seed, 9, (2, 3, 64, 32), -2, 2))
                         for seed in range(4)),
                 lambda x, signs: plain.birealnet_pytorch(state, x, signs, BLOCKS))


def test_a_style_refuses_the_others_files(tmp_path):
    torch.save(authors_state(3), tmp_path / "pytorch")
    write_h5(tmp_path / "larq", birealnet18().layers, 5)
    for style, file, message in (("larq", "pytorch", "for style='pytorch'"),
                                 ("pytorch", "larq", "for style='larq'")):
        model = create_model("birealnet18", num_classes=CLASSES, style=style, **RESIDUAL)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_weights(model, tmp_path / file)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_authors_checkpoint_of_another_depth_is_refused(tmp_path):
    torch.save(authors_state(3), tmp_path / "file")
    model = create_model("birealnet34", num_classes=CLASSES, blocks=(1, 1, 1), channels=CHANNELS)
    with pytest.raises(ValueError, match=r"unknown.*layer2\.1\.binary_conv\.weights"):
        load_weights(model, tmp_path / "file")
