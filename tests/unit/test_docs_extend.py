"""docs/extend.md: what the page says works, and it stays short."""

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyn.models.llama_moe import from_dense
from dyn.models.llama_moe_construct import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "extend.md").read_text()


def test_the_walk_through_works():
    walk = PAGE.split("## Words")[0]
    assert len(walk.splitlines()) <= 50
    code = re.search(r"```python\n(.*?)```", walk, re.S).group(1)
    try:
        exec(code, {})  # the page's own code, from our own file
        sizes = dict(vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=1)
        moe = from_dense(LlamaForCausalLM(LlamaConfig(**sizes)), num_experts=4, num_experts_per_tok=2, construction="dealt")
        assert moe.construction.groups[0].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
        assert moe(input_ids=torch.arange(6)[None]).logits.shape == (1, 6, 31)
    finally:
        METHODS.pop("dealt", None)
