"""Dense model -> mixture of experts, one layer at a time.

N neurons of the dense feed-forward, D hidden size, E routed experts, F expert width, S shared neurons, L layers.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dyn.core.split import nearest_divisors
from dyn.models.llama_moe import LlamaMoeForCausalLM, ScaleMode, filled
from dyn.models.llama_moe_calibrate import MOST_EXPERTS, active_neurons, fit_layers, geometry
from dyn.models.llama_moe_config import SHARED_FIELDS, LlamaMoeConfig
from dyn.models.llama_moe_construct import METHODS, Construction, generator, layer_source
from dyn.models.llama_moe_dense import causal, check_family, load_dense, plain_arithmetic, read_config
from dyn.models.llama_moe_measure import dense_ratios, install_measured_scales, layer_coactivations, layer_scores
from dyn.nn.experts import Balance, check_gate

KEPT = (*SHARED_FIELDS, "intermediate_size", "rope_parameters", "attention_dropout")
CHUNK_BYTES = 4 << 30  # co-activation graphs of as many layers as fit are gathered in one pass over the batches


@plain_arithmetic()
def from_dense(
    dense: PreTrainedModel | str | Path,
    *,
    num_experts: int = 8,
    num_experts_per_tok: int | list[int] = 4,
    construction: str = "random",
    num_shared_experts: int | list[int] | None = None,
    moe_intermediate_size: int | list[int] | None = None,
    overlap: bool = False,
    gate: str | None = None,
    gate_noise: bool = False,
    capacity_factor: float | None = None,
    balance: Balance = "importance_load",
    score_scale: ScaleMode | float | list[float] | None = None,
    reinit: float = 0.0,
    features: Literal["up", "gate"] = "up",
    batches: Iterable[Tensor] | Sequence[Sequence[Tensor]] | None = None,
    seed: int = 0,
    license: str | None = None,
) -> LlamaMoeForCausalLM:
    """Split every feed-forward network of a dense decoder into experts and put a gate in front (LLaMA-MoE sections 1 and 2).

    A model given as an object stays as it is and the result shares no memory with it; given as a folder or hub id it is loaded in its own dtype and taken apart
    layer by layer, so that the whole needs little more than one layer beyond the weights (coactivation: about the feed-forward weights again).

    Args:
        dense: Llama, Mistral, Qwen2 or Qwen3 for causal language modelling, or a folder or hub id of one (safetensors).
        num_experts: routed experts E.
        num_experts_per_tok: K of E, routed experts only; one number or a list of one a layer (so are the next two).
        construction: random | kmeans | coactivation | gradient | sharing_inner | sharing_inter | copy, or without training, by activations: calibrated (ours),
            cmoe, expert_weaver. These three choose the numbers of groups and shared neurons themselves unless num_shared_experts or moe_intermediate_size
            says them: num_experts_per_tok / num_experts is then the share of the dense neurons that every token passes through, exactly, and a layer has
            max(32, num_experts) routed experts at most. Their gate is linear and fitted, and chosen experts weigh (almost) 1.
        num_shared_experts: always-on experts of width F, with weight 1, outside the scale; None: 0, for sharing_inter 1.
        moe_intermediate_size: F; None: N / (E + shared), for copy N. sharing_inner, sharing_inter with overlap, and copy may take others.
        overlap: sharing_inter only: whether routed experts may share neurons among themselves.
        gate, gate_noise, capacity_factor, balance: see `dyn.nn.experts.Gate`; None is a linear gate with small random weights.
        score_scale: c: n_over_k (E/K, the paper's; the default), n (E), k (K), sqrt_kn, learnable (starts at E/K), measured (by layer, needs batches), a
            number, or a list of one number a layer. Section 2.3 says what each preserves. With a fitted gate K is the default.
        reinit: copy only: the share of each copy's neurons that is drawn anew.
        features: kmeans only: cluster rows of the up or of the gate projection.
        batches: token ids [B, L], read once into a list. gradient and the sharing methods group sequences by k-means of mean hidden states, or take E lists.
        seed: for splits, groups, gates and re-drawn neurons.
        license: licence of the source, for manifest and model card (a folder's own card is read when None).

    Raises:
        ValueError: a family or setting that does not fit, naming the field; sizes that do not add up; missing batches.
    """
    method = METHODS[_known(construction)]
    dense = causal(dense)
    consume = not isinstance(dense, nn.Module)
    name, license = _provenance(dense, license)
    config = moe_config(read_config(dense), construction, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok,
                        num_shared_experts=num_shared_experts, moe_intermediate_size=moe_intermediate_size, overlap=overlap, gate=gate,
                        gate_noise=gate_noise, capacity_factor=capacity_factor, balance=balance, score_scale=score_scale)
    for setting, is_set, owner in ((f"reinit={reinit}", reinit, "copy"), ("overlap=True", overlap, "sharing_inter"),
                                   (f"features={features!r}", features == "gate", "kmeans")):
        if is_set and construction != owner:
            raise ValueError(f"{setting} belongs to construction={owner!r}, got {construction!r}")
    if not 0.0 <= reinit <= 1.0:
        raise ValueError(f"reinit={reinit} must lie in [0, 1]")
    if features not in ("up", "gate"):
        raise ValueError(f"features={features!r} is unknown; allowed: up, gate")
    grouped = None if batches is None else list(batches)
    if grouped is None and (method.needs != "nothing" or score_scale == "measured"):
        raise ValueError(f"construction={construction!r} with score_scale={score_scale!r} needs batches: an iterable of token ids [B, L]")
    if consume:  # only now: what can be refused by sizes alone was, before gigabytes are read
        dense = load_dense(dense).eval().requires_grad_(False)
    layers = dense.model.layers
    scores = layer_scores(dense, grouped, num_experts, seed) if method.needs == "scores" else None
    flat = [b for group in grouped for b in (group if isinstance(group, (list, tuple)) else [group])] if grouped else []
    ratios = dense_ratios(dense, flat) if score_scale == "measured" else None

    groups, shared, gates, state, adjacency = [], [], [], {}, {}
    fits = fit_layers(dense, flat, method, config, seed) if method.needs == "activations" else None
    hasher = hashlib.sha256()
    per_pass = max(1, CHUNK_BYTES // (4 * config.intermediate_size**2))
    for i, layer in enumerate(layers):
        if method.needs == "coactivations" and i % per_pass == 0:
            adjacency = layer_coactivations(dense, flat, range(i, min(i + per_pass, len(layers))))
        mlp = layer.mlp
        weights = [mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach(), mlp.down_proj.weight.detach()]
        for weight in weights:
            hasher.update(weight.contiguous().view(torch.uint8).cpu().numpy())
        if fits is not None:
            fit = next(fits)
            shared_S, groups_EF, weights[2] = fit.shared_S, fit.groups_EF, fit.down_DN
            gates.append(fit.gate_ED)
        else:
            shared_S, groups_EF = method.split(layer_source(
                config, i, weights[0], weights[1], seed, overlap=overlap, features=features, scores_EN=None if scores is None else scores[i],
                adjacency_NN=adjacency.pop(i, None)))
        _check_split(construction, shared_S, groups_EF, config, i)
        groups.append(groups_EF.cpu())
        shared.append(shared_S.cpu())
        state.update({f"model.layers.{i}.mlp.{k}": v for k, v in _experts(weights, shared_S, groups_EF, reinit, generator(seed, "reinit", i)).items()})
        # The graph pass of a later chunk runs the dense layers before it, so with co-activations nothing may go until all chunks are in.
        if consume and (method.needs != "coactivations" or i >= (len(layers) - 1) // per_pass * per_pass):
            layer.mlp = None
    if fits is not None:
        next(fits, None)  # lets go of its temporary file, and of the modes and flags that the dense model has meanwhile
    moe = _assemble(dense, config, state, consume, seed)
    for layer, gate_ED in zip(moe.model.layers, gates, strict=bool(gates)):
        layer.mlp.gate.weight.data.copy_(gate_ED)
    if ratios is not None:
        with torch.random.fork_rng([moe.device] if moe.device.type == "cuda" else []):  # a gate that chooses by chance draws too
            torch.manual_seed(seed)
            install_measured_scales(moe, ratios, flat)
    details = {"overlap": overlap, "reinit": reinit, "features": features, "score_scale": score_scale or ("k" if gates else "n_over_k"),
               "calibration_tokens": sum(b.numel() for b in flat)}
    moe.construction = Construction(method=construction, seed=seed, source=name, source_hash=hasher.hexdigest(), source_license=license, details=details,
                                    groups=groups, shared=shared)
    return moe


def moe_config(dense: PretrainedConfig, construction: str, *, num_experts: int, num_experts_per_tok, num_shared_experts=None, moe_intermediate_size=None,
               overlap: bool = False, gate: str | None = None, gate_noise: bool = False, capacity_factor: float | None = None,
               balance: str = "importance_load", score_scale=None) -> LlamaMoeConfig:
    """The configuration that `from_dense` (see there) gives a dense one, every size checked, in the plainest form (one number where all layers agree)."""
    check_family(dense)
    method = METHODS[_known(construction)]
    E, k, shared, width, scale, gate = num_experts, num_experts_per_tok, num_shared_experts, moe_intermediate_size, score_scale, gate or "linear"
    check_ints(num_experts=E)
    if E < 1:
        raise ValueError(f"num_experts={E} must be at least 1")
    layers, units = dense.num_hidden_layers, dense.intermediate_size
    ks = _per_layer("num_experts_per_tok", k, layers)
    if method.needs == "activations":
        if gate != "linear":
            raise ValueError(f"construction={construction!r} fits a linear gate; got gate={gate!r}")
        if scale not in (None, "k"):
            raise ValueError(f"construction={construction!r} fits experts that weigh 1 each, score_scale='k'; got {scale!r}")
        if shared is None and width is None:
            for i, kk in enumerate(ks):
                check_gate(E, kk, gate, gate_noise, balance, capacity_factor, f"layer {i}")
            E, ks, width, shared = geometry(units, active_neurons(units, E, ks), max(MOST_EXPERTS, E))
        scale = "k"
    shared = (method.shared or 0) if shared is None else shared
    shareds = _per_layer("num_shared_experts", shared, layers)
    if min(shareds) < 0:
        raise ValueError(f"num_shared_experts={shared} must be at least 0")
    if method.shared is None and any(shareds):
        raise ValueError(f"construction={construction!r} has no shared experts, got num_shared_experts={shared}; sharing_inter has")
    if width is None:
        uneven = [E + s for s in shareds if units % (E + s)]
        if construction == "copy":
            width = units
        elif uneven:
            raise ValueError(f"num_experts + num_shared_experts = {uneven[0]} does not divide intermediate_size={units}; "
                             f"nearest: {nearest_divisors(units, uneven[0])}")
        else:
            width = [units // (E + s) for s in shareds]
    widths = _per_layer("moe_intermediate_size", width, layers)
    free = not method.partition or (construction == "sharing_inter" and overlap)
    for i, (kk, f, s) in enumerate(zip(ks, widths, shareds, strict=True)):
        check_gate(E, kk, gate, gate_noise, balance, capacity_factor, f"layer {i}")
        if not 1 <= f <= units:
            raise ValueError(f"moe_intermediate_size={f} must lie in 1..{units} (intermediate_size), layer {i}")
        if not free and (E + s) * f != units:
            raise ValueError(f"construction={construction!r} keeps every neuron once: (num_experts + num_shared_experts) * moe_intermediate_size = "
                             f"({E} + {s}) * {f} = {(E + s) * f}, not intermediate_size={units} (layer {i})")
    named = {"n_over_k": [E / kk for kk in ks], "n": [float(E)] * layers, "k": [float(kk) for kk in ks], "sqrt_kn": [math.sqrt(kk * E) for kk in ks]}
    named |= {None: named["n_over_k"], "learnable": named["n_over_k"], "measured": [1.0] * layers}
    if isinstance(scale, str) and scale not in named:
        raise ValueError(f"score_scale={scale!r} is unknown; allowed: {', '.join(n for n in named if n)}, a number, or a list of one a layer")
    scales = named[scale] if scale is None or isinstance(scale, str) else [float(c) for c in _per_layer("score_scale", scale, layers)]
    if scale == "measured" and any(shareds):
        raise ValueError("score_scale='measured' compares the routed sum with the dense feed-forward, so it needs num_shared_experts=0")
    if wrong := [c for c in scales if not 0 < c < math.inf]:
        raise ValueError(f"score_scale={wrong[0]} must be a finite number above 0: it multiplies what the experts add")
    kept = {name: copy.deepcopy(getattr(dense, name)) for name in KEPT if hasattr(dense, name)}
    bias = dense.model_type == "qwen2" or getattr(dense, "attention_bias", False)
    window = getattr(dense, "sliding_window", None)
    kinds = list(getattr(dense, "layer_types", None) or ()) or ["full_attention" if window is None else "sliding_attention"] * layers
    return LlamaMoeConfig(
        **kept, head_dim=getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads, attention_bias=bias,
        attention_output_bias=bias and dense.model_type != "qwen2", qk_norm=dense.model_type == "qwen3", sliding_window=window, layer_types=kinds,
        num_experts=E, num_experts_per_tok=_plain(ks), moe_intermediate_size=_plain(widths), num_shared_experts=_plain(shareds), gate=gate,
        gate_noise=gate_noise, capacity_factor=capacity_factor, balance=balance, score_scale=_plain(scales), learnable_scale=scale == "learnable")


def _check_split(construction: str, shared_S: Tensor, groups_EF: Tensor, config: LlamaMoeConfig, i: int) -> None:
    """ValueError for what a method of one's own did wrong: other sizes, neurons that there are not, one of them twice in an expert."""
    sizes = (config.shared_width(i),), (config.num_experts, config.of_layer("moe_intermediate_size", i))
    if (tuple(shared_S.shape), tuple(groups_EF.shape)) != sizes:
        raise ValueError(f"construction={construction!r}, layer {i}: shared {list(shared_S.shape)} and groups {list(groups_EF.shape)} must be "
                         f"{list(sizes[0])} and {list(sizes[1])}")
    ids = torch.cat([shared_S.flatten(), groups_EF.flatten()]).sort().values
    if ids.numel() and not 0 <= ids[0] <= ids[-1] < config.intermediate_size:
        raise ValueError(f"construction={construction!r}, layer {i}: neurons {ids[0]}..{ids[-1]} lie outside 0..{config.intermediate_size - 1}")
    if any((part.sort(-1).values.diff(dim=-1) == 0).any() for part in (shared_S, groups_EF)):
        raise ValueError(f"construction={construction!r}, layer {i}: an expert holds a neuron twice")


def _known(construction: str) -> str:
    if not isinstance(construction, str) or construction not in METHODS:
        near = difflib.get_close_matches(str(construction), METHODS, 1)
        raise ValueError(f"construction={construction!r} is unknown; allowed: {', '.join(METHODS)}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return construction


def _per_layer(name: str, value, layers: int) -> list:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * layers
    if len(values) != layers:
        raise ValueError(f"{name} has {len(values)} entries; one value or one for each of the {layers} layers is allowed")
    if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, (int, float) if name == "score_scale" else int)]:
        raise ValueError(f"{name}={wrong[0]!r} must be {'a number' if name == 'score_scale' else 'an int'}, or a list of such, one a layer")
    return values


def check_ints(**values: Any) -> None:
    """ValueError for what is no whole number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}={value!r} must be an int")


def _plain(values: list):
    return values[0] if len(set(values)) == 1 else values


def _experts(weights: list[Tensor], shared_S: Tensor, groups_EF: Tensor, reinit: float, draw: torch.Generator) -> dict[str, Tensor]:
    """Rows of the gate and up projections and columns of the down projection, by the same index lists (section 1.1)."""
    gate_ND, up_ND, down_DN = weights
    shared_S, groups_EF = shared_S.to(gate_ND.device), groups_EF.to(gate_ND.device)
    gate_EFD, up_EFD, down_EDF = gate_ND[groups_EF], up_ND[groups_EF], down_DN[:, groups_EF].permute(1, 0, 2).contiguous()
    if reinit:
        # Drop-Upcycling: new neurons follow mean and deviation of the matrix that they replace a part of.
        for expert in range(len(groups_EF)):
            fresh = torch.randperm(groups_EF.shape[1], generator=draw)[: round(reinit * groups_EF.shape[1])].to(gate_ND.device)
            for bank, weight in ((gate_EFD[expert], gate_ND), (up_EFD[expert], up_ND), (down_EDF[expert].T, down_DN)):
                noise = torch.empty(len(fresh), bank.shape[1]).normal_(generator=draw).to(weight.device)
                bank[fresh] = (weight.float().mean() + weight.float().std() * noise).to(weight.dtype)
    state = {"experts.gate_up_proj": torch.cat([gate_EFD, up_EFD], dim=1), "experts.down_proj": down_EDF}
    if len(shared_S):
        state |= {"shared_experts.gate_proj.weight": gate_ND[shared_S], "shared_experts.up_proj.weight": up_ND[shared_S],
                  "shared_experts.down_proj.weight": down_DN[:, shared_S].contiguous()}
    return state


def _assemble(dense: PreTrainedModel, config: LlamaMoeConfig, state: dict[str, Tensor], consume: bool, seed: int) -> LlamaMoeForCausalLM:
    """Put the experts and everything else of the dense model into a new one; only gates are new."""
    config.dtype = dense.dtype
    with torch.device("meta"):
        moe = LlamaMoeForCausalLM._from_config(config, dtype=dense.dtype)
    device = dense.device
    for i, layer in enumerate(moe.model.layers):
        mlp = layer.mlp
        if config.learnable_scale:
            mlp.score_scale = nn.Parameter(torch.full((1,), mlp.initial_scale, dtype=dense.dtype, device=device))
        mlp.gate.to_empty(device="cpu")
        mlp.gate.reset_parameters(std=0.02, generator=generator(seed, "gate", i))
        if config.balance == "bias":
            mlp.gate.selection_bias.zero_()
        mlp.gate.to(device)
    return in_place_of(dense, moe, state, consume)


def in_place_of(dense: PreTrainedModel, net: PreTrainedModel, state: dict[str, Tensor], consume: bool) -> PreTrainedModel:
    """A decoder on meta gets its feed-forwards from `state`, and all else, the dense model's own tensors if `consume`, from the dense model."""
    state |= {key: value if consume else value.clone() for key, value in dense.state_dict().items() if ".mlp." not in key}
    filled(net, state, dense.device)
    if dense.generation_config is not None:
        net.generation_config = copy.deepcopy(dense.generation_config)
    return net.train(dense.training)


def _provenance(dense: nn.Module | str | Path, license: str | None) -> tuple[str, str | None]:
    """(name without private folders, licence) of a source."""
    path = str(getattr(dense, "name_or_path", "") if isinstance(dense, nn.Module) else dense)
    if not path:
        return type(dense).__name__, license
    if license is None and (Path(path) / "README.md").is_file():
        from huggingface_hub import ModelCard
        license = ModelCard.load(Path(path) / "README.md").data.get("license")
    return Path(path).name if Path(path).exists() else path, license
