"""What each kind of adapter consists of on a given host: its flags, their defaults and the official ones, and its modules with their places.

A new kind is an entry in `FLAGS` and one in `KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn.utils import skip_init  # values come from `draw`, and nothing else draws from the random state

from dyn.nn.adapter_modules import FLOATS, Activation, AdapterModule, Bottleneck, Fusion, Init, LoRA, Norm, Prefix, PrefixSource, SharedPrefix, check_choice
from dyn.nn.adapter_sites import Place, sites

if TYPE_CHECKING:
    from dyn.models.hosts import Host, Layer

Kind = Literal["houlsby", "pfeiffer", "parallel", "lora", "prefix", "mam", "fusion"]
Projection = Literal["query", "key", "value", "output", "ffn"]
PROJECTIONS = get_args(Projection)

_BLOCK: dict[str, Any] = {"r": 64, "layer_norm": "none", "activation": "relu", "init": "bert", "scale": 1.0, "dropout": 0.0}
_PARALLEL = _BLOCK | {"init": "lora", "scale": 4.0}
FLAGS: dict[str, dict[str, Any]] = {
    "houlsby": _BLOCK | {"attention_layer_norm": None},
    "pfeiffer": _BLOCK,
    "parallel": _PARALLEL,
    "lora": {"r": 8, "alpha": 32.0, "where": ("query", "value"), "init": "lora", "dropout": 0.0},
    "prefix": {"r": 16, "reparam": False, "width": 800, "dropout": 0.0},
    "mam": _PARALLEL | {"r": 16, "length": None, "reparam": False, "width": 800, "prefix_dropout": 0.0},
    "fusion": {"members": (), "value": True},
}
# What the official code does otherwise; a dropout of None is the host's.
OFFICIAL: dict[str, dict[str, Any]] = {
    "houlsby": {"layer_norm": "in", "attention_layer_norm": "in", "dropout": None},
    "pfeiffer": {"layer_norm": "in", "dropout": None},
    "parallel": {"dropout": None},
    "lora": {"init": "bert"},
    "mam": {"dropout": None},
}


@dataclass(frozen=True)
class AdapterConfig:
    """One adapter of a host: its kind, all of its flags, whether it has a head, and which layers have it (None: all)."""

    kind: Kind
    flags: dict[str, Any]
    official: bool = False
    head: bool = True
    layers: tuple[int, ...] | None = None


class Piece(NamedTuple):
    """A module and where it goes; `init` is how it starts."""

    place: Place
    role: str
    module: AdapterModule
    init: Init


def make_config(kind: Kind, flags: Mapping[str, Any], host: Host, *, official: bool, head: bool, layers: Sequence[int] | None) -> AdapterConfig:
    """The configuration with every flag filled in.

    Raises:
        ValueError: an unknown kind, flag or value.
    """
    if kind not in FLAGS:
        raise ValueError(f"kind={kind!r} is unknown; allowed: {', '.join(map(repr, FLAGS))}")
    if unknown := [flag for flag in flags if flag not in FLAGS[kind]]:
        raise ValueError(f"{kind} has no flag {unknown[0]!r}; it has {', '.join(FLAGS[kind])}")
    f = FLAGS[kind] | (OFFICIAL.get(kind, {}) if official else {}) | dict(flags)
    if "dropout" in f and f["dropout"] is None:
        f["dropout"] = host.dropout
    if f.get("attention_layer_norm", "") is None:
        f["attention_layer_norm"] = f["layer_norm"]
    if f.get("length", 0) is None:
        f["length"] = f["r"]
    for key in ("r", "length", "width"):
        if key in f and not (isinstance(f[key], int) and not isinstance(f[key], bool) and f[key] >= 1):
            raise ValueError(f"{kind}: {key}={f[key]!r} must be an int of at least 1")
    for key, allowed in (("layer_norm", Norm), ("attention_layer_norm", Norm), ("activation", Activation), ("init", Init)):
        if key in f:
            check_choice(f"{kind}: {key}", f[key], allowed)
    for key in ("dropout", "prefix_dropout"):
        if not (_is_number(f.get(key, 0)) and 0 <= f.get(key, 0) < 1):
            raise ValueError(f"{kind}: {key}={f[key]!r} must lie in [0, 1)")
    if f.get("scale", 1.0) != "learnable" and not _is_number(f.get("scale", 1.0)):
        raise ValueError(f"{kind}: scale={f['scale']!r} must be a number or 'learnable'")
    if not (_is_number(f.get("alpha", 1.0)) and f.get("alpha", 1.0) > 0):
        raise ValueError(f"{kind}: alpha={f['alpha']!r} must be a number above 0")
    for key in ("where", "members"):
        if key in f:
            f[key] = (f[key],) if isinstance(f[key], str) else tuple(f[key])
    for part in f.get("where", ()):
        check_choice("lora: where", part, Projection)
    if not f.get("where", ("some",)):
        raise ValueError("lora: where=() names no projection")
    if layers is not None:
        layers = tuple(sorted(set(layers)))
        if not layers or layers[0] < 0 or layers[-1] >= len(host.layers):
            raise ValueError(f"layers={list(layers)} must be indices in 0..{len(host.layers) - 1}")
    return AdapterConfig(kind, f, official, head, layers)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def pieces(model: nn.Module, host: Host, config: AdapterConfig, name: str, dtype: torch.dtype | None = None) -> list[Piece]:
    """The modules of one adapter, with places, nothing attached yet.

    Raises:
        ValueError: the kind does not fit the host.
    """
    if config.kind == "fusion":
        return list(_fusion(model, config, name, dtype))
    chosen = host.layers if config.layers is None else [host.layers[i] for i in config.layers]
    return list(KINDS[config.kind](host, chosen, config, name, dtype))


def _like(module: nn.Module, dtype: torch.dtype | None, name: str) -> dict[str, Any]:
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise ValueError(f"attach: the host's {type(module).__name__} has no parameters to sit beside; is it quantised so that weights are packed away?")
    return {"adapter_name": name, "device": parameter.device, "dtype": dtype or (parameter.dtype if parameter.dtype in FLOATS else torch.float32)}


def _block(layer: Layer, place: Place, role: str, config: AdapterConfig, name: str, dtype: torch.dtype | None, norm: str = "layer_norm",
           **fixed: Any) -> Piece:
    f = config.flags | fixed
    module = skip_init(Bottleneck, place.dim, f["r"], norm=f[norm], activation=f["activation"], scale=f["scale"], dropout=f["dropout"],
                        **_like(layer.attentions[0].output, dtype, name))
    return Piece(place, role, module, f["init"])


def _houlsby(host: Host, layers: Sequence[Layer], config: AdapterConfig, name: str, dtype: torch.dtype | None) -> Iterator[Piece]:
    fixed = {"init": "bert", "scale": 1.0} if config.official else {}
    for layer in layers:
        for a in layer.attentions:
            yield _block(layer, a.official if config.official else a.after, "sequential", config, name, dtype, "attention_layer_norm", **fixed)
        yield _block(layer, layer.sequential, "sequential", config, name, dtype)


def _pfeiffer(host: Host, layers: Sequence[Layer], config: AdapterConfig, name: str, dtype: torch.dtype | None) -> Iterator[Piece]:
    return (_block(layer, layer.pfeiffer, "sequential", config, name, dtype) for layer in layers)


def _parallel(host: Host, layers: Sequence[Layer], config: AdapterConfig, name: str, dtype: torch.dtype | None) -> Iterator[Piece]:
    return (_block(layer, layer.parallel, "parallel", config, name, dtype) for layer in layers)


def _lora(host: Host, layers: Sequence[Layer], config: AdapterConfig, name: str, dtype: torch.dtype | None) -> Iterator[Piece]:
    f = config.flags
    for layer in layers:
        linears = [getattr(a, part) for a in layer.attentions for part in f["where"] if part != "ffn"]
        if "ffn" in f["where"]:
            if not layer.linears:
                raise ValueError(f"lora: where={f['where']}: the feed-forward block of {type(host.model).__name__} has no linear map of its own (experts are "
                                 "stacked banks); take query, key, value, output")
            linears += layer.linears
        for linear in linears:
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"lora goes on nn.Linear; {type(host.model).__name__} has a {type(linear).__name__} there")
            module = skip_init(LoRA, linear.in_features, linear.out_features, f["r"], scaling=f["alpha"] / f["r"], dropout=f["dropout"],
                               **_like(linear, dtype, name))
            yield Piece(Place(linear, "input", linear.out_features), "lora", module, f["init"])


def _prefix(host: Host, layers: Sequence[Layer], config: AdapterConfig, name: str, dtype: torch.dtype | None) -> Iterator[Piece]:
    f = config.flags
    length, dropout = f.get("length", f["r"]), f.get("prefix_dropout", f["dropout"])
    sources: dict[str, PrefixSource] = {}
    for layer in layers:
        for a in layer.attentions:
            place, like = Place(a.module, "attention", a.key.out_features), _like(a.key, dtype, name)
            if not f["reparam"]:
                yield Piece(place, "prefix", skip_init(Prefix, place.dim, length, dropout=dropout, **like), "bert")
                continue
            if a.branch not in sources:
                sources[a.branch] = skip_init(PrefixSource, host.dim, length, f["width"], **like)
            yield Piece(place, "prefix", skip_init(SharedPrefix, place.dim, sources[a.branch], dropout=dropout, **like), "bert")
    for branch, source in sources.items():
        yield Piece(Place(host.model.base_model, "source", host.dim), f"prefix_{branch}", source, "bert")


def _mam(host: Host, layers: Sequence[Layer], config: AdapterConfig, name: str, dtype: torch.dtype | None) -> Iterator[Piece]:
    yield from _prefix(host, layers, config, name, dtype)
    yield from _parallel(host, layers, config, name, dtype)


KINDS: dict[str, Callable[..., Iterator[Piece]]] = {
    "houlsby": _houlsby, "pfeiffer": _pfeiffer, "parallel": _parallel, "lora": _lora, "prefix": _prefix, "mam": _mam,
}


def _fusion(model: nn.Module, config: AdapterConfig, name: str, dtype: torch.dtype | None) -> Iterator[Piece]:
    members = config.flags["members"]
    found = sites(model)
    if not members or len(set(members)) < len(members):
        raise ValueError(f"fusion: members={members!r} must name one or more adapters, each once")
    for member in members:
        if not any(member in site for site in found.values()):
            raise ValueError(f"fusion: no adapter {member!r} is attached; there are {', '.join(sorted({n for s in found.values() for n in s})) or 'none'}")
    for path, site in found.items():
        blocks = [site[member] for member in members if member in site and site.how != "replace"]
        if not blocks:
            continue
        if len(blocks) < len(members) or not all(isinstance(block, Bottleneck) for block in blocks):
            raise ValueError(f"fusion: {', '.join(members)} must all be bottleneck adapters (houlsby, pfeiffer, parallel) of the same places; {path} has "
                             f"{', '.join(f'{n} ({type(m).__name__})' for n, m in site.items())}")
        dim = blocks[0].up.out_features
        module = skip_init(Fusion, dim, members, value=config.flags["value"], **_like(blocks[0], dtype, name))
        owner, _, role = path.rpartition(".")
        yield Piece(Place(model.get_submodule(owner), site.how, dim), role, module, "bert")
