"""Larq Compute Engine's interpreter on QuickNet, for bench_models.py, in an environment of its own:

  python3.11 -m venv lce; lce/bin/pip install --no-deps larq-compute-engine==0.16.0
  lce/bin/pip install "tensorflow-cpu<2.16" "numpy<2" larq larq-zoo terminaltables
  python benchmarks/bench_models.py --larq lce/bin/python

Run as `larq_interpreter.py MODEL FILE THREADS BATCH XNNPACK`: makes FILE, a network of Larq Zoo
with random weights as .tflite, where it is not there, answers with a line of JSON, and then to each
line of its input with one as soon as it has run once: {} to "run", {"peak_bytes": ...} to "peak".
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import resident

NETWORKS = {"quicknet_small": "QuickNetSmall", "quicknet": "QuickNet",
            "quicknet_large": "QuickNetLarge"}
PACKAGES = ("larq-compute-engine", "larq-zoo", "larq", "tensorflow-cpu", "tensorflow")
SIZE = 224


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make(network: str, path: Path) -> None:
    import larq_compute_engine
    import larq_zoo

    model = getattr(larq_zoo.sota, NETWORKS[network])(weights=None)
    partial = path.with_suffix(".partial")
    partial.write_bytes(larq_compute_engine.convert_keras_model(model))
    partial.replace(path)


def main(network: str, path: Path, threads: int, batch: int, xnnpack: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # TensorFlow talks on the standard output

    def answer(**said: object) -> None:
        print(json.dumps(said), file=answers, flush=True)

    if not path.exists():
        make(network, path)
    import numpy as np
    from larq_compute_engine.tflite.python.interpreter import Interpreter

    interpreter = Interpreter(path.read_bytes(), num_threads=threads, use_xnnpack=xnnpack)
    images = np.random.default_rng(0).standard_normal((batch, SIZE, SIZE, 3), np.float32)
    answer(file_bytes=path.stat().st_size, versions=versions())
    for line in sys.stdin:
        if line.strip() == "peak":
            answer(peak_bytes=resident.peak(lambda: interpreter.predict(images)))
        else:
            interpreter.predict(images)
            answer()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")
