"""A block with hooks runs its layers one by one, so that every hook is called."""

from __future__ import annotations

import pytest
from torch import nn

from bitkernels_tests.nn.test_residual_block import batch, reactnet

pytestmark = pytest.mark.usefixtures("one_thread")


def test_hooks_are_called():
    block, calls = reactnet(), []
    handles = [module.register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
               for module in (block.sign, block.conv, block.norm, block.act, block)]
    block(batch())
    assert calls == ["RSign", "BinaryConv2d", "BatchNorm2d", "RPReLU", "BinaryResidualBlock"]
    for handle in handles[:-1]:
        handle.remove()
    block(batch())
    assert calls[5:] == ["BinaryResidualBlock"]
    handles[-1].remove()
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda m, *_: calls.append(type(m).__name__))
    try:
        assert block.unfused(batch()) == "all modules have hooks"
        block(batch())
    finally:
        everywhere.remove()
    assert calls[6:] == calls[:5] and block.unfused(batch()) is None


KINDS_OF_HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook",
                  "full_backward_pre_hook")


@pytest.mark.parametrize("kind", KINDS_OF_HOOKS)
def test_every_kind_of_hook_is_called(kind):
    """Once for each call of its module, on one part or on all modules; without it none is."""
    def called(*_):
        calls.append(kind)

    def train():
        calls.clear()
        x = batch().requires_grad_()
        reason = block.unfused(x)
        block(x).sum().backward()
        return reason

    block, calls = reactnet(), []
    for part in ("sign", "conv", "norm", "act"):
        handle = getattr(getattr(block, part), f"register_{kind}")(called)
        assert train() == f"{part} has hooks" and calls == [kind]
        handle.remove()
        assert train() is None and not calls
    handle = getattr(nn.modules.module, f"register_module_{kind}")(called)
    try:
        assert train() == "all modules have hooks" and calls == [kind] * 5
    finally:
        handle.remove()
    assert train() is None and not calls
