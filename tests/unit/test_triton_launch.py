"""Launches of what Triton has compiled before, without a device: when it is asked to compile, and what a launch hands over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dyn.ops import triton_launch
from dyn.ops.triton_launch import _kind, _launch

pytest.importorskip("triton")


class Jitted:
    """A kernel of two arguments and the constexprs B and A, in this order."""

    def __init__(self):
        self.params = [SimpleNamespace(name=name) for name in ("x", "n", "B", "A")]
        self.compiled, self.launched = [], []

    def run(self, *args, grid, warmup, **constants):
        self.compiled.append((args, constants))
        launched = self.launched

        class Compiled:
            packed_metadata = ()

            def __getitem__(self, grid):
                return lambda *args: launched.append((grid, args))

        return Compiled()


@pytest.fixture
def jitted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Jitted()


def test_the_same_kinds_compile_once(jitted):
    x, other = torch.zeros(8), torch.ones(16)
    _launch(jitted, (2,), x, 32, A=1, B=2, num_warps=4)
    _launch(jitted, (3, 5), other, 48, A=1, B=2, num_warps=4)
    assert len(jitted.compiled) == 1
    (grid, (tensor, *rest)), = jitted.launched
    assert grid == (3, 5, 1) and tensor is other and rest == [48, 2, 1]  # constexprs in the kernel's order, options left out


@pytest.mark.parametrize("second", [
    dict(x=torch.zeros(8, dtype=torch.bfloat16)), dict(x=torch.zeros(9)[1:]), dict(n=1), dict(n=33), dict(n=2**31), dict(n=None), dict(A=2), dict(num_warps=8),
], ids=str)
def test_other_kinds_compile_again(jitted, second):
    for values in ({}, second):
        x, n, *constants = ({"x": torch.zeros(8), "n": 32, "A": 1, "B": 2, "num_warps": 4} | values).values()
        _launch(jitted, (1,), x, n, **dict(zip(("A", "B", "num_warps"), constants, strict=True)))
    assert len(jitted.compiled) == 2 and not jitted.launched


def test_a_device_of_its_own(jitted, monkeypatch):
    _launch(jitted, (1,), torch.zeros(8), 32, A=1, B=2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    _launch(jitted, (1,), torch.zeros(8), 32, A=1, B=2)
    assert len(jitted.compiled) == 2


def test_descriptors_by_their_tiles():
    one, same, wider = (triton_launch.descriptor(torch.zeros(64, 64), *block) for block in ((16, 16), (16, 16), (16, 32)))
    assert _kind(one) == _kind(same) != _kind(wider)
    assert _kind(triton_launch.descriptor(torch.zeros(64, 64, dtype=torch.bfloat16), 16, 16)) != _kind(one)
