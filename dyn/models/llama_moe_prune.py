"""The control without routing: a smaller dense decoder that keeps the same neurons for every token. T tokens, N neurons, D hidden size, L layers."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import PreTrainedModel

from dyn.core.calibrate import dominant, energies
from dyn.models.llama_moe_calibrate import Features, LayerFit, check_enough, walk
from dyn.models.llama_moe_construct import Sample
from dyn.models.llama_moe_convert import in_place_of
from dyn.models.llama_moe_dense import causal, fresh, load_dense, plain_arithmetic, read_config
from dyn.models.llama_moe_measure import next_token_loss
from dyn.nn.probe import taylor_scores


@plain_arithmetic()
def prune_dense(dense: PreTrainedModel | str | Path, keep: float | Fraction | Sequence[float | Fraction] = 0.5, *, batches: Iterable[Tensor],
                refit: bool = True, importance: Literal["energy", "taylor"] = "energy", seed: int = 0, repair_ridge: float | None = None) -> PreTrainedModel:
    """A model of the same class with `keep` of every feed-forward's neurons, the same for every token; plain transformers loads it.

    Layer after layer, on the inputs that the already pruned model gives it, the most important neurons (and those that write massive activations) are kept
    and the down projection is refitted by ridge regression in closed form, towards the dense model's residual stream behind the layer. The refit is that of
    construction="calibrated", with the strength that suits it, so the difference between the two is what routing buys.

    Args:
        dense: Llama, Mistral, Qwen2 or Qwen3, or a folder or hub id of one; an object stays as it is.
        keep: share of neurons in (0, 1], read as a decimal: keep * intermediate_size must be a whole number. A list has one a layer; plain classes know one
            width, so layers that keep less than the widest are filled up with neurons of zeros, which are stored and computed, and change nothing.
        batches: token ids [B, L], read once into a list.
        refit: without it kept neurons have the dense weights.
        importance: energy: mean of (h - its mean)^2 |w_down|^2 over tokens, weighted by 1 / |residual stream|^2; taylor: mean |h dL/dh|, dense model.
        seed: of the sample of tokens that energies are measured on.
        repair_ridge: of the part of the refit that repairs earlier layers' errors, in mean diagonals of its Gram matrix. None: 0.1 from 50,000 tokens on, 1.0
            below (docs/llama_moe.md).

    Raises:
        ValueError: keep, importance or repair_ridge out of range, a family that does not fit, batches of another tokenizer or too short for the regression.
    """
    if importance not in ("energy", "taylor"):
        raise ValueError(f"importance={importance!r} is unknown; allowed: energy, taylor")
    if repair_ridge is not None and not 0 < repair_ridge < math.inf:
        raise ValueError(f"repair_ridge={repair_ridge} must be above 0 and finite, or None")
    dense = causal(dense)
    consume = not isinstance(dense, nn.Module)
    found = read_config(dense)
    if batches is None:
        raise ValueError("prune_dense looks at activations; batches=None gives it no text")
    layers, batches = found.num_hidden_layers, list(batches)
    keeps = [keep] * layers if isinstance(keep, str) or not hasattr(keep, "__iter__") else list(keep)
    if len(keeps) != layers:
        raise ValueError(f"keep has {len(keeps)} entries; one value or one for each of the {layers} layers is allowed")
    kept = [kept_neurons(each, found.intermediate_size) for each in keeps]
    if consume:  # only now: what can be refused by sizes alone was, before gigabytes are read
        dense = load_dense(dense).eval().requires_grad_(False)
    check_enough(batches, dense, max(kept))
    scores = None
    if importance == "taylor":
        downs = [layer.mlp.down_proj for layer in dense.model.layers]
        scores = taylor_scores(dense, downs, batches, next_token_loss, dense.get_input_embeddings())

    config = copy.deepcopy(dense.config)
    config.intermediate_size = max(kept)
    state = {}
    for i, fit in enumerate(walk(dense, batches, keep_neurons(kept, scores), refit=refit, seed=seed, repair=repair_ridge)):
        layer, chosen_S = dense.model.layers[i], fit.shared_S
        rest = max(kept) - kept[i]
        state |= {f"model.layers.{i}.mlp.gate_proj.weight": nnf.pad(layer.mlp.gate_proj.weight.detach()[chosen_S], (0, 0, 0, rest)),
                  f"model.layers.{i}.mlp.up_proj.weight": nnf.pad(layer.mlp.up_proj.weight.detach()[chosen_S], (0, 0, 0, rest)),
                  f"model.layers.{i}.mlp.down_proj.weight": nnf.pad(fit.down_DN[:, chosen_S], (0, rest)).contiguous()}
        if consume:
            layer.mlp = None
    with torch.device("meta"):
        small = fresh(config, dense.dtype)
    return in_place_of(dense, small, state, consume)


def keep_neurons(kept: Sequence[int], scores: Tensor | None = None) -> Callable[[int, nn.Module, Sample], tuple[LayerFit, Features]]:
    """What `walk` asks: in layer i the kept[i] neurons of most energy, or highest scores [L, N], and those that write massive activations."""

    def choose(i: int, mlp: nn.Module, sample: Sample) -> tuple[LayerFit, Features]:
        always_on = dominant(sample.h_TN, sample.omega_T, sample.norm_N, kept[i] // 4)
        score_N = scores[i].to(sample.h_TN.device) if scores is not None else energies(sample.h_TN, sample.omega_T, sample.norm_N).mean(0)
        score_N[always_on] = torch.inf
        chosen_S = score_N.topk(kept[i]).indices.sort().values
        fit = LayerFit(shared_S=chosen_S, groups_EF=chosen_S.new_empty(0, 0), gate_ED=None, down_DN=mlp.down_proj.weight.detach())
        return fit, lambda h_TN, _: h_TN[:, chosen_S]

    return choose


def kept_neurons(keep: float | Fraction, width: int) -> int:
    """keep * width, exactly. ValueError for keep outside (0, 1] or no whole number of neurons."""
    number = isinstance(keep, numbers.Real) and not isinstance(keep, bool) and math.isfinite(keep)
    exact = keep if isinstance(keep, Fraction) else Fraction(str(keep)) if number else Fraction(0)
    if not 0 < exact <= 1:
        raise ValueError(f"keep={keep!r} must lie in (0, 1]")
    if (exact * width).denominator != 1:
        near = f"Fraction({max(1, round(exact * width))}, {width})"
        raise ValueError(f"keep={keep} of intermediate_size={width} is {float(exact * width):g} neurons; nearest: {near}")
    return int(exact * width)
