"""What conversions hold while more and more calibration text goes by: bytes of tensors that are alive at once."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyn.models import llama_moe_calibrate as calibrate
from dyn.models.llama_moe import from_dense, prune_dense
from tests.unit.test_convert import tiny

HIDDEN = 32
INDICES = 24  # bytes a token for ids, orders and masks; one hidden state in float32 would be 128


class Alive(TorchDispatchMode):
    """Bytes of storages that operations have made and that still live: now, and at most. Views share one; inputs and mapped files are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.mapped = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.meet((args, kwargs), lambda size: 0)
        out = op(*args, **kwargs or {})
        self.meet(out, self.map if op is torch.ops.aten.from_file.default else lambda size: size)
        return out

    def map(self, size: int) -> int:
        self.mapped += size
        return 0

    def meet(self, tree, cost) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.known:
                self.known.add(key)
                size = cost(storage.nbytes())
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def held(convert, batches) -> Alive:
    dense = tiny(hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=3)
    with Alive() as alive:
        convert(dense, batches)
    gc.collect()
    return alive


def moe(construction, **changes):
    return lambda dense, batches: from_dense(dense, num_experts=4, num_experts_per_tok=2, construction=construction, batches=batches, **changes)


def text(tokens):
    return [torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(tokens // 64)]


STREAMED = {name: moe(name) for name in ("calibrated", "cmoe", "expert_weaver")} | {
    "prune": lambda dense, batches: prune_dense(dense, 0.5, batches=batches),
    "prune, taylor": lambda dense, batches: prune_dense(dense, 0.5, batches=batches, importance="taylor")}
SUMMED = {"coactivation": moe("coactivation"), "gradient": moe("gradient"), "sharing_inner": moe("sharing_inner", moe_intermediate_size=12),
          "measured": moe("random", score_scale="measured")}


@pytest.mark.parametrize("name", STREAMED | SUMMED)
def test_memory_does_not_grow_with_tokens(name, monkeypatch):
    """Beyond the two residual streams, which lie in a mapped file by design, and beside a sample of fixed size."""
    monkeypatch.setattr(calibrate, "SAMPLE", 128)
    few, many = (held((STREAMED | SUMMED)[name], text(tokens)) for tokens in (512, 2048))
    assert many.peak - few.peak <= INDICES * (2048 - 512)
    for alive, tokens in ((few, 512), (many, 2048)):
        assert alive.mapped == (2 * 4 * HIDDEN * tokens if name in STREAMED else 0)
        assert alive.now == 0, "a conversion leaves tensors behind that nothing frees"


@pytest.mark.parametrize("name", STREAMED)
def test_the_sample_grows_until_it_is_full(name, monkeypatch):
    """Which also shows that what is kept of every token would be seen above."""
    monkeypatch.setattr(calibrate, "SAMPLE", 1024)
    few, many, more = (held(STREAMED[name], text(tokens)).peak for tokens in (256, 1024, 2048))
    assert many - few >= 4 * HIDDEN * (1024 - 256) and more - many <= INDICES * 1024
