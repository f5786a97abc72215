"""Record what Larq Zoo's own networks compute, for models/test_larq_zoo.py.

  TF_USE_LEGACY_KERAS=1 python make_larq_zoo.py [NAME ...]     needs tensorflow-cpu, larq, larq_zoo

Writes larq_zoo.npz beside this script: for each network the layout of its h5 file as Keras writes
it and the logits (before the softmax) for the weights and the image of `models/generated.py`. Of
several seeds the one is kept whose values are farthest from the thresholds of the signs, relative
to their layer: a sign that another order of summation turns would change all logits.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "models"))

import generated  # noqa: E402

TRIES = 24
WANTED = 2e-5

# record: the original's name, height and width, classes. Heights below 50 have another stem.
MODELS = {
    "quicknet_small": ("QuickNetSmall", (64, 32), 1000),
    "quicknet": ("QuickNet", (64, 32), 1000),
    "quicknet_large": ("QuickNetLarge", (64, 32), 1000),
    "binary_alexnet": ("BinaryAlexNet", (96, 96), 100),
    "xnornet": ("XNORNet", (224, 224), 100),
    "dorefanet": ("DoReFaNet", (96, 96), 100),
    "birealnet18": ("BiRealNet", (64, 32), 1000),
    "binary_resnet_e18": ("BinaryResNetE18", (64, 32), 1000),
    "binary_resnet_e18:small": ("BinaryResNetE18", (16, 24), 10),
    "binary_densenet28": ("BinaryDenseNet28", (64, 32), 1000),
    "binary_densenet28:small": ("BinaryDenseNet28", (16, 8), 10),
    "binary_densenet37": ("BinaryDenseNet37", (64, 32), 1000),
    "binary_densenet37_dilated": ("BinaryDenseNet37Dilated", (64, 32), 1000),
    "binary_densenet45": ("BinaryDenseNet45", (64, 32), 1000),
    "meliusnet22": ("MeliusNet22", (64, 32), 1000),
    "real_to_binary_net": ("RealToBinaryNet", (64, 32), 1000),
}


def layout(model) -> list:
    """[layer, [[weight, shape], ...]] for all layers, as an h5 file of the model has them."""
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "w.h5")
        model.save_weights(path)
        with h5py.File(path) as file:
            return [[layer, [[name, list(file[layer][name].shape)]
                             for name in file[layer].attrs["weight_names"]]]
                    for layer in file.attrs["layer_names"]]


def assign(model, layers: list, seed: int) -> None:
    index, values = 0, {}
    for layer, weights in layers:
        values[layer] = []
        for name, shape in weights:
            kind = generated.kind_of(layer, name)
            values[layer].append(generated.weight(seed, index, kind, shape))
            index += 1
    for layer in model.layers:
        layer.set_weights(values[layer.name])


def distances(x: np.ndarray, quantizer) -> float:
    """Of all values to the nearest threshold of the quantizer, the least, over the layer's RMS."""
    thresholds = [1 / 6, 1 / 2, 5 / 6] if "DoReFa" in type(quantizer).__name__ else [0]
    gaps = min(np.abs(x - np.float32(t)).min() for t in thresholds)
    return float(gaps / np.sqrt(np.mean(np.square(x))))


def record(name: str) -> tuple[list, np.ndarray, dict]:
    import larq_zoo
    import tensorflow as tf

    tf.keras.backend.clear_session()
    original, size, classes = MODELS[name]
    build = getattr(larq_zoo.literature, original, None) or getattr(larq_zoo.sota, original)
    model = build(weights=None, input_shape=(*size, 3), num_classes=classes)
    layers = layout(model)
    quantized = [layer for layer in model.layers if getattr(layer, "input_quantizer", None)]
    watched = tf.keras.Model(model.input,
                             [layer.input for layer in quantized] + [model.layers[-1].input])
    best: tuple = (-1.0, None, None)
    for seed in range(TRIES):
        assign(model, layers, seed)
        *inputs, logits = (np.asarray(v) for v in watched(generated.image(seed, size)))
        margin = min(distances(x, layer.input_quantizer)
                     for x, layer in zip(inputs, quantized, strict=True))
        if margin > best[0]:
            best = margin, seed, logits
        if best[0] > WANTED:
            break
    margin, seed, logits = best
    about = dict(seed=seed, size=size, classes=classes, margin=margin)
    print(name, about, "logits", float(np.abs(logits).max()), logits.std(), flush=True)
    return layers, logits.astype(np.float32), about


def main() -> None:
    import larq
    import tensorflow as tf

    path = HERE / "larq_zoo.npz"
    names = sys.argv[1:] or list(MODELS)
    entries = dict(np.load(path)) if path.exists() and sys.argv[1:] else {}
    for name in names:
        layers, logits, about = record(name)
        entries[name] = logits
        entries[f"{name}/layers"] = np.frombuffer(json.dumps([about, layers]).encode(), np.uint8)
    entries["header"] = np.array(f"tensorflow {tf.__version__}, larq {larq.__version__}, "
                                 "larq_zoo 2.4, float32 on a CPU")
    np.savez_compressed(path, **entries)
    print(path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
