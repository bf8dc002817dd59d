"""What a pre-training or a conversion would be, from shapes alone: parameters, FLOPs, tokens, steps, memory. Nothing is downloaded where the configuration is
embedded."""

from __future__ import annotations

from typing import Any

import torch

from dyn.models.llama_moe_calibrate import SAMPLE
from dyn.models.llama_moe_convert import moe_config
from dyn.models.llama_moe_dense import fresh
from dyn.models.llama_moe_prune import kept_neurons
from dyn.models.packaged import dense_config
from dyn.nn.experts import Gate
from dyn.nn.surgery import count_parameters, flops_per_token, train_only
from dyn.train.calibration import check_conversion

GIB = 1 << 30


def shape(model: Any, dense: Any) -> Any:
    """Configuration of the network that an experiment's ModelConfig asks for, from that of the dense model."""
    if model.kind != "moe":
        if model.kind == "prune":
            dense.intermediate_size = kept_neurons(model.keep(), dense.intermediate_size)
        dense.attention_dropout = model.attention_dropout
        return dense
    config = moe_config(dense, model.construction, num_experts=model.num_experts, num_experts_per_tok=model.num_experts_per_tok,
                      num_shared_experts=model.num_shared_experts, moe_intermediate_size=model.moe_intermediate_size, overlap=model.overlap, gate=model.gate,
                      gate_noise=model.gate_noise, capacity_factor=model.capacity_factor, balance=model.balance, score_scale=model.score_scale)
    config.balance_weight, config.z_loss_weight, config.attention_dropout = model.balance_weight, model.z_loss_weight, model.attention_dropout
    return config


def memory_per_device(net: torch.nn.Module, *, batch_size: int, block_size: int, shards: int, bf16: bool, checkpointing: bool) -> dict[str, float]:
    """A first-order estimate in GiB: weights, gradients and Adam's moments of what is trained, in float32 cut into `shards`, the computing copy of two
    layers and the embeddings (of everything where weights are not cut: autocast keeps its copies), saved activations (only each layer's input with
    checkpointing, and one layer's inside), and the logits with their gradient in float32."""
    config, counts, width = net.config, count_parameters(net), 2 if bf16 else 4
    tokens, hidden, layers = batch_size * block_size, config.hidden_size, config.num_hidden_layers
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    per_layer = (counts["total"] - embeddings) / layers
    inner = counts["active"] - embeddings if counts["active"] > embeddings else counts["active"]
    # Inside a layer about one value is kept for each unit of every matrix product's input: norms and attention 8 D, the feed-forward 3 of its active width.
    ffn = max((inner / layers - 4 * hidden**2) / (3 * hidden), 0)
    inside = tokens * (8 * hidden + 3 * ffn) * width
    parts = {
        "weights, gradients, moments": (4 * counts["total"] + 12 * counts["trainable"]) / shards,
        "computing copy": (2 * per_layer + embeddings if shards > 1 else counts["total"]) * width if shards > 1 or bf16 else 0,
        "activations": tokens * hidden * layers * width + inside if checkpointing else inside * layers,
        "logits": 2 * 4 * tokens * config.vocab_size,
    }
    return {k: v / GIB for k, v in parts.items()} | {"total": sum(parts.values()) / GIB}


def plan_pretraining(cfg: Any) -> dict[str, Any]:
    """For `make exp ... DRY=1`: see the module. `cfg` is the Config of experiments/llama_moe_cpt.py."""
    config = shape(cfg.model, dense_config(cfg.model.source))
    with torch.device("meta"):
        net = fresh(config)
    if cfg.model.train == "gates":
        train_only(net, Gate)
    counts = count_parameters(net)
    per_token = flops_per_token(net, cfg.data.block_size)
    passes = 2 if cfg.model.train == "gates" else 3  # gradients of activations cost a forward pass, those of weights another
    steps, tokens_per_step = cfg.steps(), cfg.tokens_per_step()
    world = cfg.trainer.devices * cfg.trainer.num_nodes
    sharded = cfg.trainer.kind == "fsdp2"
    memory = memory_per_device(net, batch_size=cfg.data.batch_size, block_size=cfg.data.block_size, shards=world if sharded else 1,
                               bf16=cfg.trainer.precision != "32-true", checkpointing=cfg.trainer.gradient_checkpointing)
    return {
        "parameters": {"total": counts["total"], "activated (without gates)": counts["active"], "gates": counts["gate"]},
        "training": {"tokens a step": tokens_per_step, "steps": steps, "tokens": steps * tokens_per_step, "devices": world},
        "FLOPs": {"forward, a token": per_token, "training, in all": passes * per_token * steps * tokens_per_step},
        "memory, GiB a device (estimate)": {k: round(v, 2) for k, v in memory.items()},
    }


def plan_conversion(cfg: Any) -> dict[str, Any]:
    """What the run would be, from shapes alone. `cfg` is the Config of experiments/llama_moe_convert.py."""
    model, config = cfg.model, dense_config(cfg.model.source)
    mixture = check_conversion(cfg, config)
    with torch.device("meta"):
        dense = fresh(config)
    layers, width, hidden = config.num_hidden_layers, config.intermediate_size, config.hidden_size
    feed_forward = sum(p.numel() for layer in dense.model.layers for p in layer.mlp.parameters())
    total, forward, idle = count_parameters(dense)["total"], flops_per_token(dense, cfg.data.block_size), round((1 - model.active()) * feed_forward)
    gates = layers * mixture.num_experts * hidden if mixture else 0
    saved = 0 if model.kind in ("dense", "oracle") else idle  # an oracle computes all before it chooses
    bytes_each, tokens = getattr(torch, cfg.dtype).itemsize, cfg.calibration_tokens // cfg.calibration_length * cfg.calibration_length
    memory = {"dense and converted weights": bytes_each * (2 if model.kind in ("moe", "prune") else 1) * total,
              "hidden states, two streams": 2 * tokens * hidden * bytes_each, "a layer's products of activations": 4 * width**2,
              "a layer's sample of activations": 4 * min(tokens, SAMPLE) * width}
    memory |= {"gradients, moments and mean of distillation": 16 * (total - (saved if model.kind == "prune" else 0))} if model.align_passes else {}
    return {
        "parameters": {"total": total + gates - (saved if model.kind == "prune" else 0), "activated (without gates)": total - saved, "gates": gates},
        "active fraction of the feed-forward": float(model.active()),
        "FLOPs": {"forward, a token": forward - 2 * saved + 2 * gates, "of the dense model": forward},
        "calibration": {"tokens": tokens, "sequences": tokens // cfg.calibration_length,
                        "FLOPs (rough: 3 dense passes, 4 more a pass of distillation)": (3 + 4 * model.align_passes) * forward * tokens},
        "memory, GiB (estimate)": {k: round(v / GIB, 2) for k, v in (memory | {"total": sum(memory.values())}).items()},
    }
