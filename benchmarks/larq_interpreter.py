"""Larq Compute Engine's interpreter on QuickNet, for bench_models.py, in an environment of its own:

  python3.11 -m venv lce; lce/bin/pip install --no-deps larq-compute-engine==0.16.0
  lce/bin/pip install "tensorflow-cpu<2.16" "numpy<2" larq larq-zoo terminaltables
  python benchmarks/bench_models.py --larq lce/bin/python

Run as `larq_interpreter.py MODEL FILE THREADS BATCH XNNPACK`: makes FILE, a network of Larq Zoo
with random weights as .tflite, where it is not there, answers with a line of JSON, and then runs
once for each line of its input and answers with an empty line. peak_bytes: from before the file is
loaded to after the first call, since the interpreter allocates its tensors once.
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

    if not path.exists():
        make(network, path)
    import numpy as np
    from larq_compute_engine.tflite.python.interpreter import Interpreter

    images = np.random.default_rng(0).standard_normal((batch, SIZE, SIZE, 3), np.float32)
    made: list[Interpreter] = []

    def first() -> None:
        made.append(Interpreter(path.read_bytes(), num_threads=threads, use_xnnpack=xnnpack))
        made[0].predict(images)

    said = {"peak_bytes": resident.peak(first), "file_bytes": path.stat().st_size,
            "versions": versions()}
    print(json.dumps(said), file=answers, flush=True)
    for _ in sys.stdin:
        made[0].predict(images)
        print(file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")
