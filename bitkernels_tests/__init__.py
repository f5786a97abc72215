"""The tests, in folders that mirror the package; what several files share lies beside them."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the checkout
