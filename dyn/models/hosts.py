"""Where adapters sit in each family of transformers, which modules are its head, and prefixes in its attention (SparseAdapter sections 1.2 to 1.7).

`dyn.nn.adapter` asks for a `Host` and knows no family itself. B samples, H key/value heads, Q queries, K keys, P prefix positions.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from dyn.nn.adapter_sites import ROLES, Place, Site

Branch = Literal["encoder", "self", "cross"]
PREFIX_ATTENTION = "dyn_prefix"


@dataclass
class Attention:
    """One attention block: its projections, and where an adapter goes after it (`official`: before the dropout, where the two differ)."""

    module: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    after: Place
    official: Place
    branch: Branch = "encoder"


@dataclass
class Layer:
    """One layer: its attention blocks, the places around its feed-forward block, and that block's linear maps."""

    attentions: list[Attention]
    sequential: Place
    pfeiffer: Place
    parallel: Place
    linears: list[nn.Module] = field(default_factory=list)


@dataclass
class Host:
    """What there is to know about a network that carries adapters."""

    model: PreTrainedModel
    layers: list[Layer]
    heads: list[nn.Module]

    @property
    def dim(self) -> int:
        """D, the hidden size."""
        return self.layers[0].sequential.dim

    @property
    def dropout(self) -> float:
        """The probability of its hidden dropout."""
        config = self.model.config
        return float(next((v for key in ("hidden_dropout_prob", "dropout", "resid_pdrop") if (v := getattr(config, key, None)) is not None), 0.0))

    def identity(self) -> dict[str, Any]:
        """What must agree for an adapter to fit, and a fingerprint of the weights that it was trained on."""
        config, base = self.model.config, self.model.base_model
        return {"model_type": config.model_type, "hidden_size": self.dim, "num_layers": len(self.layers), "weights": _fingerprint(base)}


def _fingerprint(base: nn.Module) -> str | None:
    """Names a host's weights by the first values of each tensor, rounded to bfloat16 so that the precision of loading does not matter; None on meta."""
    hasher = hashlib.sha256()
    for path, parameter in base.named_parameters():
        if parameter.is_meta:
            return None
        if not any(part in ROLES for part in path.split(".")):
            head = parameter.detach().flatten()[:16].to(torch.bfloat16).cpu().view(torch.int16)
            hasher.update(f"{path}\n".encode() + head.numpy().tobytes())
    return hasher.hexdigest()[:16]


def find_host(model: nn.Module) -> Host:
    """The (outermost) network of transformers in `model`, with its layers and head.

    Raises:
        ValueError: none, or one of a family whose layers are not known.
    """
    host = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if host is None:
        raise ValueError(f"{type(model).__name__} holds no model of transformers; adapters sit on {', '.join(FAMILIES)} and Llama-like decoders")
    kind = host.config.model_type
    read = FAMILIES.get(kind.removeprefix("dyn_moe_"), _llama_layer)  # encoders with experts have their family's layers
    layers = [layer for m in host.modules() if (layer := read(m)) is not None]
    if not layers:
        raise ValueError(f"{type(host).__name__} (model_type {kind!r}) has no layer whose parts are known; adapters sit on {', '.join(FAMILIES)}, and on "
                         "decoders with self_attn.{q,k,v,o}_proj, mlp, input_layernorm and post_attention_layernorm")
    return Host(host, layers, list(_heads(host)))


def _heads(host: PreTrainedModel) -> Iterator[nn.Module]:
    """Modules outside the base model, but for one that gives logits over the vocabulary, which is part of what was pre-trained."""
    base, output = host.base_model, host.get_output_embeddings()
    if base is not host:
        for child in host.children():
            if child is not base and next(child.parameters(), None) is not None and all(m is not output for m in child.modules()):
                yield child


def _has(module: nn.Module, *paths: str) -> bool:
    for path in paths:
        here: Any = module
        for part in path.split("."):
            here = getattr(here, part, None)
        if not isinstance(here, nn.Module):
            return False
    return True


def _bert_layer(m: nn.Module) -> Layer | None:
    if not _has(m, "attention.self.query", "attention.output.dropout", "intermediate", "output.dropout", "output.LayerNorm"):
        return None
    attentions = []
    for name, branch in (("attention", "self" if m.is_decoder else "encoder"), ("crossattention", "cross")):
        if _has(m, name):
            block = getattr(m, name)
            inner, out = block.self, block.output
            dim = out.dense.out_features
            attentions.append(Attention(inner, inner.query, inner.key, inner.value, out.dense, Place(out.dropout, "output", dim),
                                        Place(out.dense, "output", dim), branch))
    dim = attentions[0].output.out_features
    linears = [linear for part in (m.intermediate, m.output) if isinstance(linear := getattr(part, "dense", None), nn.Linear)]
    # The feed-forward block's input is also the residual that its output module adds before the layer norm.
    return Layer(attentions, Place(m.output.dropout, "output", dim), Place(m.output.LayerNorm, "before_norm", dim),
                 Place(m.output, "second_input", dim), linears)


def _albert_layer(m: nn.Module) -> Layer | None:
    if not _has(m, "attention.query", "attention.output_dropout", "ffn", "ffn_output", "full_layer_layer_norm"):
        return None
    a = m.attention
    dim = a.dense.out_features
    block = Attention(a, a.query, a.key, a.value, a.dense, Place(a.output_dropout, "output", dim), Place(a.dense, "output", dim))
    linears = [linear for linear in (m.ffn, m.ffn_output) if isinstance(linear, nn.Linear)]
    return Layer([block], Place(m.ffn_output, "output", dim), Place(m.full_layer_layer_norm, "before_norm", dim),
                 Place(m.ffn_output, "entry_input", dim, m.ffn), linears)


def _distilbert_layer(m: nn.Module) -> Layer | None:
    if not _has(m, "attention.q_lin", "attention.out_lin", "ffn.lin1", "output_layer_norm"):
        return None
    a = m.attention
    dim = a.out_lin.out_features
    after = Place(a.out_lin, "output", dim)  # there is no dropout behind it
    block = Attention(a, a.q_lin, a.k_lin, a.v_lin, a.out_lin, after, after)
    return Layer([block], Place(m.ffn, "output", dim), Place(m.output_layer_norm, "before_norm", dim), Place(m.ffn, "input", dim), [m.ffn.lin1, m.ffn.lin2])


def _bart_layer(m: nn.Module) -> Layer | None:
    if not _has(m, "self_attn.out_proj", "fc1", "fc2", "final_layer_norm"):
        return None
    attentions = []
    for name, branch in (("self_attn", "self" if _has(m, "encoder_attn") else "encoder"), ("encoder_attn", "cross")):
        if _has(m, name):
            a = getattr(m, name)
            after = Place(a.out_proj, "output", a.out_proj.out_features)  # dropout behind it is a function, without a place of its own
            attentions.append(Attention(a, a.q_proj, a.k_proj, a.v_proj, a.out_proj, after, after, branch))
    dim = m.fc2.out_features
    return Layer(attentions, Place(m.fc2, "output", dim), Place(m.final_layer_norm, "before_norm", dim), Place(m.final_layer_norm, "into_norm", dim, m.fc1),
                 [m.fc1, m.fc2])


_LLAMA_NORMS = {"input_layernorm", "post_attention_layernorm"}


def _llama_layer(m: nn.Module) -> Layer | None:
    if not _has(m, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp", *_LLAMA_NORMS):
        return None
    if {name for name, _ in m.named_children() if "norm" in name} != _LLAMA_NORMS:  # norms behind the blocks: other places than these
        return None
    a = m.self_attn
    dim = a.o_proj.out_features
    after = Place(a.o_proj, "output", dim)
    linears = [linear for name in ("gate_proj", "up_proj", "down_proj") if isinstance(linear := getattr(m.mlp, name, None), nn.Linear)]
    # Pfeiffer on a pre-norm layer: x + h + A(x + h), without a norm in between (section 1.3).
    return Layer([Attention(a, a.q_proj, a.k_proj, a.v_proj, a.o_proj, after, after, "self")], Place(m.mlp, "output", dim), Place(m, "output", dim),
                 Place(m.mlp, "input", dim), linears)


FAMILIES: dict[str, Callable[[nn.Module], Layer | None]] = {
    "bert": _bert_layer, "roberta": _bert_layer, "xlm-roberta": _bert_layer, "electra": _bert_layer, "albert": _albert_layer,
    "distilbert": _distilbert_layer, "bart": _bart_layer,
}


class PrefixConfig:
    """An attention block's view of its configuration: everything as it is there, but for the attention function, which puts prefixes in front."""

    def __init__(self, config: Any) -> None:
        self.dyn_config = config

    def __getattr__(self, name: str) -> Any:
        if name == "dyn_config":  # while a copy is being made
            raise AttributeError(name)
        return PREFIX_ATTENTION if name == "_attn_implementation" else getattr(self.dyn_config, name)


def check_prefix(attention: nn.Module) -> None:
    """ValueError for an attention function that takes no mask that could be widened."""
    if not isinstance(attention.config, PrefixConfig):
        _inner(attention, attention.config)


def see_prefix(attention: nn.Module) -> None:
    """Let an attention block use the prefixes of its site `prefix`."""
    if not isinstance(attention.config, PrefixConfig):
        attention.config = PrefixConfig(attention.config)


def forget_prefix(attention: nn.Module) -> None:
    """Undo `see_prefix`."""
    if isinstance(attention.config, PrefixConfig):
        attention.config = attention.config.dyn_config


def _inner(module: nn.Module, config: Any) -> tuple[str, Callable[..., tuple[Tensor, Tensor | None]]]:
    name = config._attn_implementation or "eager"
    if name == "sdpa":
        return name, ALL_ATTENTION_FUNCTIONS[name]
    if name == "eager":
        for cls in type(module).__mro__:
            if (found := getattr(sys.modules[cls.__module__], "eager_attention_forward", None)) is not None:
                return name, found
    raise ValueError(f"a prefix needs attn_implementation 'eager' or 'sdpa', got {name!r} ({type(module).__name__})")


def prefix_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Attention over [prefix; keys], [prefix; values], prefix positions always visible: query [B, heads, Q, size], key and value [B, H, K, size].

    The cache never sees the prefix, so positions, rotations and generation are the host's.
    """
    name, inner = _inner(module, module.config.dyn_config)
    site: Site = module.prefix
    if not site.acting():
        return inner(module, query, key, value, attention_mask, **kwargs)
    batch, heads, _, size = key.shape
    first_key, first_value, seen_BP = _prefixes(site, key)
    mask, queries = attention_mask, query.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and name == "sdpa" and causal and queries > 1:  # sdpa was to mask by itself; it would start at the prefix
        key, value = key[:, :, :queries], value[:, :, :queries]
        mask = torch.ones(queries, queries, dtype=torch.bool, device=key.device).tril()[None, None]
    if mask is None and seen_BP is not None:
        mask = torch.ones(batch, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
        mask = mask if name == "sdpa" else torch.zeros_like(mask, dtype=query.dtype)
    if mask is not None:
        if seen_BP is None:
            mask = F.pad(mask, (first_key.shape[1], 0), value=True if mask.dtype == torch.bool else 0.0)
        else:
            front = seen_BP if mask.dtype == torch.bool else torch.zeros_like(seen_BP, dtype=mask.dtype).masked_fill(~seen_BP, torch.finfo(mask.dtype).min)
            mask = torch.cat([front[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1), mask.expand(batch, -1, -1, -1)], -1)
    key, value = (torch.cat([first.unflatten(-1, (heads, size)).transpose(1, 2).to(t.dtype).expand(batch, -1, -1, -1), t], 2)
                  for first, t in ((first_key, key), (first_value, value)))
    return inner(module, query, key, value, mask, **kwargs)


def _prefixes(site: Site, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [B or 1, P, H * size] of the prefixes that act, and which of their positions each sample sees [B, P] (None: all)."""
    names, batch = site.acting(), like.shape[0]
    rows = [site.active.rows_of(name, like) for name in names]
    pairs = [site[name]() for name in names]
    if rows[0] is None:
        return pairs[0][0][None], pairs[0][1][None], None
    longest = max(len(key) for key, _ in pairs)
    seen_BP = torch.zeros(batch, longest, dtype=torch.bool, device=like.device)
    both = [torch.zeros(batch, longest, pairs[0][0].shape[1], dtype=like.dtype, device=like.device) for _ in range(2)]
    for where, pair in zip(rows, pairs, strict=True):
        seen_BP[where, : len(pair[0])] = True
        both = [t.index_add(0, where, F.pad(p, (0, 0, 0, longest - len(p))).to(t.dtype).expand(len(where), -1, -1)) for t, p in zip(both, pair, strict=True)]
    return both[0], both[1], seen_BP


ALL_ATTENTION_FUNCTIONS.register(PREFIX_ATTENTION, prefix_attention)
