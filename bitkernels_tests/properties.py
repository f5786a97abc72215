"""hypothesis, or where it is not installed a stand-in by which its tests are skipped."""

from __future__ import annotations

import pytest

try:
    from hypothesis import assume, given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    class _Anything:
        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kw):
            return self

    assume = st = _Anything()

    def given(*args, **kw):
        def skipped(test):
            @pytest.mark.skip(reason="hypothesis is not installed")
            def stand_in():
                pass

            stand_in.__name__, stand_in.__doc__ = test.__name__, test.__doc__
            return stand_in

        return skipped

    def settings(*args, **kw):
        return lambda test: test

__all__ = ["assume", "given", "settings", "st"]
