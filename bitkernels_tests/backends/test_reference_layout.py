"""The reference's results lie in memory as the fakes promise, whatever the engine in use."""

from __future__ import annotations

import pytest
import torch

from bitkernels.backends import cpu, reference
from bitkernels.ops._record import OPERATORS
from bitkernels.ops._samples import Values


@pytest.mark.parametrize("name", [n for n, o in OPERATORS.items() if o.launched])
def test_every_result_has_the_promised_strides(name, monkeypatch):
    monkeypatch.setattr(cpu, "warn_slow", lambda: None)
    operator = OPERATORS[name]
    for sample in operator.samples(Values()):
        def both(op, *args, **kw):
            results, promised = reference.run(op, *args, **kw), operator.fake(*args, **kw)
            if isinstance(results, torch.Tensor):
                results, promised = (results,), (promised,)
            for result, fake in zip(results, promised, strict=True):
                assert (result is None) == (fake is None)
                if result is not None:
                    assert (result.shape, result.stride(), result.dtype) == \
                           (fake.shape, fake.stride(), fake.dtype)
            return results

        with torch.no_grad():
            operator.launcher(both, sample.overload)(*sample.args, **sample.kw)
