"""`python -m bitkernels COMMAND`, one module a command with `add_arguments` and `main`.

A module is imported when its command is called. Its main returns the exit status; errors that the
user can mend are one line on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from typing import Any, NoReturn

__all__ = ["COMMANDS", "main"]

PROGRAM = "python -m bitkernels"

# command: its module, and what it does.
COMMANDS = {
    "doctor": ("bitkernels.cli.doctor",
               "what is installed here, which kernels would run and why, and what to do about it"),
    "explain": ("bitkernels.cli.explain",
                "which backend and kernel a call or each layer of a network gets, and why"),
    "models": ("bitkernels.cli.models",
               "the networks: parameters, bytes in float32 and packed, accuracies, recipes"),
    "profile": ("bitkernels.cli.profile",
                "where the time of a converted network goes, call by call"),
    "summary": ("bitkernels.cli.summary",
                "one network layer by layer: weights, bytes, multiply-adds"),
    "evaluate": ("bitkernels.cli.evaluate", "the accuracy of weights on a set of images"),
    "predict": ("bitkernels.cli.predict", "the classes of pictures"),
    "bench": ("bitkernels.cli.bench",
              "binary against float convolutions on this machine, in less than a minute"),
    "train": ("bitkernels.train.command", "train a network by a recipe"),
}

DESCRIPTION = """\
Binary neural networks in PyTorch on real 1-bit arithmetic. Without a command: doctor.

  python -m bitkernels                  what is installed here, and which kernels run
  python -m bitkernels explain reactnet which kernel each of its layers gets
  python -m bitkernels bench            how fast it is here
  python -m bitkernels models           which networks there are
  python -m bitkernels train --recipe quicknet-digits --data digits --out run --threads 1
  python -m bitkernels COMMAND --help   examples and options
"""


def _int(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**32:  # beyond any size, and beyond what PyTorch takes for one
        raise argparse.ArgumentTypeError(f"must be below 2**32, got {text}")
    return value


class Parser(argparse.ArgumentParser):
    """Help as it is written; of an error one line, without the usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("type", int, _int)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help)\n")


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its status: 0, or 1 or 2 for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.stdout is None:  # closed by the caller, as by >&-
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:  # print would take stdout for it
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):  # a name may have what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough, as head does
        _let_go()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:  # not the output, which has no name
            raise
        _let_go()
        sys.exit(f"{PROGRAM}: cannot write the output: {error.strerror}")
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    """The status of the command."""
    # The options before a command take no values, so this is its name.
    chosen = next((word for word in arguments if not word.startswith("-")), "doctor")
    parser = Parser(prog=PROGRAM, description=DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument("--cpu-kernels", action="store_true",
                        help="print only the names of the CPU kernels that this machine runs")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    module: Any = None
    for name, (place, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        if name == chosen:
            module = importlib.import_module(place)
            module.add_arguments(command)
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value == "" or isinstance(value, list) and "" in value:  # as of a variable not set
            commands.choices[chosen].error(f"argument --{name.replace('_', '-')}: must not be "
                                           "empty")
    if options.version:
        import bitkernels

        print(bitkernels.__version__)
    elif options.cpu_kernels:
        from bitkernels.backends import cpu

        print("\n".join(name for name, supported in cpu.kernels() if supported))
    else:
        return module.main(options)
    return 0


def _let_go() -> None:
    """Of stdout: what is left in it would be written once more at the end, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
