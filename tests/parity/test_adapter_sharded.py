"""Adapters on a host that FSDP2 shards over two processes: outputs and gradients are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from dyn.nn.adapter import adapter_parameters, adapters, attach, set_active

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99, max_position_embeddings=64, initializer_range=0.2)


def make(kind):
    torch.manual_seed(0)
    if kind == "reparam":
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0, use_cache=False)).eval()
        attach(model, "prefix", 4, reparam=True, width=8)
    else:
        model = BertForSequenceClassification(BertConfig(**sizes)).eval()
        attach(model, "pfeiffer", 4, "a")
        if kind == "fusion":
            attach(model, "fusion", name="b", members=["a"])
        else:
            set_active(attach(model, "mam", 4, "b"), ["a", "b"], train=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in adapters(model):
            for p in adapter_parameters(model, name).values():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


for kind in ("reparam", "fusion", "mixed"):
    ids = torch.randint(3, 98, (4, 7), generator=torch.Generator().manual_seed(0))
    whole, sharded = make(kind), make(kind)
    outputs = [whole(input_ids=part).logits for part in ids.split(2)]
    (sum(o.square().mean() for o in outputs) / 2).backward()
    for layer in [m for m in sharded.modules() if type(m).__name__ in ("BertLayer", "LlamaDecoderLayer")]:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    output = sharded(input_ids=ids.split(2)[rank]).logits
    output.square().mean().backward()
    assert torch.allclose(output, outputs[rank], atol=1e-5), kind
    pairs = [(key, p.grad, q.grad) for (key, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True) if q.grad is not None]
    assert len(pairs) > 5 and all(torch.allclose(g.full_tensor(), h, atol=1e-5) for _, g, h in pairs), kind
    assert any(h.abs().max() > 1e-3 for _, _, h in pairs), kind
dist.destroy_process_group()
"""


def test_sharded_is_whole(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "CUDA_VISIBLE_DEVICES": ""}
    ranks = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE, text=True)
             for rank in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
