"""Multiply-adds of encoders and shares of dynamic positions."""

import pytest
import torch
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

from dyn.models.encoder import make_moe
from dyn.nn.surgery import compact, dynamic_shares, macs_per_sentence, make_partial

D, F, LAYERS, L = 16, 24, 3, 10
SIZES = dict(vocab_size=40, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=F, embedding_size=8)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_macs(family):
    """By hand; layers that share weights count each time they are applied, experts k times, gates once a token."""
    model = BertModel(BertConfig(**SIZES)) if family == "bert" else AlbertModel(AlbertConfig(**SIZES))
    once = D * D + (L * 8 * D if family == "albert" else 0)  # the pooler sees one token; ALBERT's embeddings are widened
    dense = LAYERS * (L * (4 * D * D + 2 * D * F) + 2 * L * L * D) + once
    assert macs_per_sentence(model, L) == dense
    make_moe(model, 4, 2)
    moe = dense + LAYERS * L * (2 * D * F + 4 * (D + F))
    assert macs_per_sentence(model, L) == moe and model.training
    other = BertModel(BertConfig(**SIZES))
    hidden = make_moe(other, 4, 2, gate="mlp").encoder.layer[0].output.dense.gate.network[0].weight.shape[0]
    gates = LAYERS * L * (hidden * (D + F + 8) - 4 * (D + F))
    assert family == "albert" or macs_per_sentence(other, L) - moe == gates
    make_partial(model, None, None, keep=0.5, method="random")
    assert macs_per_sentence(model, L) == macs_per_sentence(compact(model), L) == moe


def test_shares():
    model = make_moe(BertModel(BertConfig(**SIZES)), 4, 2)
    assert set(dynamic_shares(model).values()) == {1.0} and len(dynamic_shares(model)) == 2 * LAYERS
    make_partial(model, None, None, keep=0.25, method="random", scope="local")
    assert set(dynamic_shares(model).values()) == set(dynamic_shares(compact(model)).values()) == {0.25}
    assert dynamic_shares(torch.nn.Linear(2, 2)) == {}
