"""The text that conversions look at: how much each of them needs, and the batches; refused where they would be too few, or repeat themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyn.data.tokens import Tokens
from dyn.models.llama_moe_calibrate import active_neurons
from dyn.models.llama_moe_construct import METHODS, fitted
from dyn.models.llama_moe_convert import moe_config


def check_vocabulary(tokenizer: Any, dense: Any, source: str) -> None:
    """ValueError for a tokenizer with more entries than the model has embeddings."""
    if len(tokenizer) > dense.vocab_size:
        raise ValueError(f"model.source={source}: the tokenizer has {len(tokenizer)} entries and the model vocab_size={dense.vocab_size}; "
                         "they do not belong together")


def reads_text(model: Any) -> bool:
    """Does the conversion that an experiment's ModelConfig asks for look at data?"""
    if model.start == "scratch" or model.kind == "dense":
        return False
    return model.kind == "prune" or METHODS[model.construction].needs != "nothing" or model.score_scale == "measured"


def check_amount(model: Any, config: Any, length: int) -> None:
    """ValueError for fewer calibration sequences than a conversion needs, by sizes alone, and for a ridge that is none.

    Args:
        model: the experiment's ModelConfig.
        config: configuration of the network that comes out (`dyn.train.plan.shape`).
        length: tokens a calibration sequence.
    """
    if not reads_text(model):
        return
    if model.repair_ridge is not None and not 0 < model.repair_ridge < math.inf:
        raise ValueError(f"model.repair_ridge={model.repair_ridge} must be above 0 and finite, or null")
    needs = "activations" if model.kind == "prune" else METHODS[model.construction].needs
    least, why = 1, "statistics need one at least"
    if needs == "scores":
        least, why = model.num_experts, f"they cannot make a group for each of model.num_experts={model.num_experts}"
    elif needs == "activations":
        active = config.intermediate_size if model.kind == "prune" else max(config.active_width(i) for i in range(config.num_hidden_layers))
        tokens = active if model.kind == "prune" else max(active, config.num_experts)
        least, why = math.ceil(tokens / length), f"the regression of {active} active neurons a layer needs {tokens} tokens, better ten times more"
    if model.calibration_sequences < least:
        raise ValueError(f"model.calibration_sequences={model.calibration_sequences} of {length} tokens are too few: {why}; use {least} or more")


def check_conversion(cfg: Any, dense: Any) -> Any:
    """The configuration of the mixture that comes out (None: of no mixture); ValueError for a conversion that cannot work, by sizes alone.

    Args:
        cfg: the Config of experiments/llama_moe_convert.py.
        dense: configuration of the dense model.
    """
    model, mixture = cfg.model, None
    needs = "activations" if model.kind == "prune" else "nothing"
    if model.kind == "moe":
        mixture = moe_config(dense, model.construction, num_experts=model.num_experts, num_experts_per_tok=model.num_experts_per_tok,
                             num_shared_experts=model.num_shared_experts, score_scale=model.score_scale)
        needs = METHODS[model.construction].needs
        if model.budgets and model.construction not in fitted():
            raise ValueError(f"model.budgets=true is for model.construction={', '.join(fitted())} and model.kind=prune, got {model.construction}")
    sequences = cfg.calibration_tokens // cfg.calibration_length
    if needs == "scores" and sequences < model.num_experts:
        raise ValueError(f"calibration_tokens={cfg.calibration_tokens} are {sequences} sequences of calibration_length={cfg.calibration_length}: too few for a "
                         f"group for each of model.num_experts={model.num_experts}")
    if needs == "activations":
        [active] = active_neurons(dense.intermediate_size, model.num_experts, [model.num_experts_per_tok])
        if cfg.calibration_tokens < active:
            raise ValueError(f"calibration_tokens={cfg.calibration_tokens} are fewer than a layer has active neurons, {active}; take ten times more")
        if model.budgets and (part := budget_sequences(sequences)[0] * cfg.calibration_length) < active:
            raise ValueError(f"model.budgets=true converts single layers with a sixth of calibration_tokens={cfg.calibration_tokens}, {part} tokens in whole "
                             f"sequences: fewer than a layer has active neurons, {active}; raise calibration_tokens or lower calibration_length")
    return mixture


def draw_calibration(tokens: Mapping[str, Tokens], weights: Mapping[str, float], *, sequences: int, length: int, batch_size: int, seed: int,
                     setting: str) -> list[Tensor]:
    """Exactly `sequences` sequences of training text, by the domains' weights: ids [B, length], of which the last batch may hold fewer.

    A domain's share is rounded, not left to chance, and where there are as many sequences as domains each has one: what calibration never saw costs most.

    Args:
        tokens, weights: text and weight by domain; a domain of weight 0 gives none.
        sequences, length, batch_size: how many, of how many tokens, B, which changes no text.
        seed: of what is drawn from a domain, and of the order.
        setting: key=value of what asks for so many, for the error.

    Raises:
        ValueError: a domain has less text than it should give: statistics of repeated text would count it twice.
    """
    shares = {d: sequences * w / sum(weights.values()) for d, w in weights.items() if w > 0}
    counts = dict.fromkeys(shares, int(sequences >= len(shares)))
    for _ in range(sequences - sum(counts.values())):
        counts[max(counts, key=lambda d: shares[d] - counts[d])] += 1
    short = [f"{d} has {tokens[d].num_tokens:,} training tokens and should give {n * length:,}" for d, n in counts.items() if n * length > tokens[d].num_tokens]
    if short:
        raise ValueError(f"{setting} would repeat text: {'; '.join(short)}. Lower {setting.partition('=')[0]}, raise data.text.max_tokens, or change "
                         "data.weights")
    random = np.random.default_rng(seed)
    drawn = [tokens[d].blocks(random.choice(tokens[d].num_tokens // length, n, replace=False), length) for d, n in counts.items() if n]
    return list(torch.from_numpy(random.permutation(np.concatenate(drawn))).split(batch_size)) if drawn else []


def budget_text(batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(to convert single layers, to measure them): a sixth and a twenty-fourth of the calibration text's sequences, ids [1, L] each; no others, so that no
    row has seen more text. ValueError for a single sequence."""
    sequences = [row for batch in batches for row in batch.split(1)]
    converts, measured = budget_sequences(len(sequences))
    return sequences[measured: measured + converts], sequences[:measured]


def budget_sequences(total: int) -> tuple[int, int]:
    """(sequences that convert single layers, sequences that measure them) of `total`. ValueError for a single one."""
    if total < 2:
        raise ValueError("budgets need two sequences of calibration text, got one; raise calibration_tokens or lower calibration_length")
    return max(1, total // 6), max(1, total // 24)


def gate_lr(cfg: Any, kind: str) -> float | None:
    """`optim.gate_lr` of a training. Where it is not set, gates that were fitted to activations have a hundredth of the peak rate: their weights are so small
    that a few dozen steps at the rate itself rewrite them (docs/llama_moe.md)."""
    model = cfg.model
    slow = kind == "moe" and model.construction in fitted() and model.start == "pretrained" and model.train == "all"
    return 0.01 * cfg.optim.lr if slow and cfg.optim.gate_lr is None else cfg.optim.gate_lr
