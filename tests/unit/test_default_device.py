"""What a caller made torch's default device changes no conversion, no mask and no initial weight: they are drawn on the CPU from their own seed."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from dyn.models.llama_moe import from_dense, prune_dense
from dyn.models.llama_moe_align import align
from dyn.models.llama_moe_construct import METHODS
from dyn.nn.adapter import attach
from dyn.nn.masking import prune
from dyn.nn.surgery import make_dynamic, make_partial

BATCHES = [torch.randint(60, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(4)]


class Elsewhere(TorchFunctionMode):
    """As with an accelerator for a default device: nothing is drawn there from a CPU's generator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func.__name__}: expected a generator of another device, found one of the CPU")
        return func(*args, **kwargs)


def dense():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)).eval()


def equal(made, expected):
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), expected.state_dict().values(), strict=True))


@pytest.mark.parametrize("where", [lambda: torch.device("meta"), Elsewhere])
@pytest.mark.parametrize("construction", [*METHODS, "prune"])
def test_conversions(construction, where):
    settings = {"copy": dict(reinit=0.5), "sharing_inter": dict(num_experts=3, num_shared_experts=1)}.get(construction, {})

    def convert():
        if construction == "prune":
            return prune_dense(source, 0.5, batches=BATCHES)
        return from_dense(source, **dict(num_experts=4, num_experts_per_tok=2, construction=construction, batches=BATCHES) | settings)

    source = dense()
    expected = convert()
    with where():
        made = convert()
    equal(made, expected)


def test_align():
    expected, made = (from_dense(dense(), num_experts=4, num_experts_per_tok=2, batches=BATCHES) for _ in range(2))
    align(expected, dense(), BATCHES)
    with Elsewhere():
        align(made, dense(), BATCHES)
    equal(made, expected)


@pytest.mark.parametrize("method", ["random", "snip"])
@pytest.mark.parametrize("kind", ["houlsby", "lora"])
def test_adapters_and_their_masks(kind, method):
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    batches = [{"input_ids": BATCHES[0], "labels": torch.tensor([0, 1, 0, 1])}]

    def run():
        torch.manual_seed(0)
        net = BertForSequenceClassification(config).eval()
        attach(net, kind, r=8, seed=1)
        prune(net, batches, lambda net, batch: net(**batch).loss, method=method, keep=0.5)
        return net

    expected = run()
    with Elsewhere():
        made = run()
    equal(made, expected)


@pytest.mark.parametrize("method", ["random", "snip"])
def test_partitions(method):
    batches = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))]

    def run():
        torch.manual_seed(0)
        net = make_dynamic(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)), num_kernels=2)
        make_partial(net, batches, lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]), keep=0.5, method=method)
        return net

    expected = run()
    with Elsewhere():
        made = run()
    equal(made, expected)
