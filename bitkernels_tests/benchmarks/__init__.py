import os
import subprocess
from pathlib import Path

import bitkernels
from bitkernels_tests import ROOT, forked


def program(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A program of benchmarks/ with short times, of the package that is tested."""
    return forked.run(str(ROOT / "benchmarks" / script), "--min-run-time", "0.01", *options,
                      env=os.environ | {"PYTHONPATH": str(Path(bitkernels.__file__).parents[1])})
