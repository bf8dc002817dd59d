"""Attach adapters to a frozen host, switch them, mix them in a batch, merge them, take them off (SparseAdapter section 1)."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dyn.nn.adapter_build import AdapterConfig as AdapterConfig
from dyn.nn.adapter_build import Kind, make_config, pieces
from dyn.nn.adapter_modules import FLOATS, AdapterModule, Fusion, LoRA, Prefix, SharedPrefix
from dyn.nn.adapter_sites import Active, Place, Site, check_place, choose, modules_of, open_site, own_parameters, sites


def attach(model: nn.Module, kind: Kind, r: int | None = None, name: str = "default", *, head: bool | None = None, official: bool = False,
           layers: Sequence[int] | None = None, seed: int | None = None, dtype: torch.dtype | None = None, **flags: Any) -> nn.Module:
    """Put an adapter on a network of transformers, let it act and train it alone: the host and other adapters are frozen. In place; returns the model.

    Hosts: BERT, RoBERTa, ALBERT (whose shared layers share their adapters), ELECTRA, DistilBERT, BART, Llama-like decoders; they may be part of `model`.

    Args:
        kind: houlsby (a block after attention and one after the feed-forward block), pfeiffer (one block), parallel (beside the feed-forward block), lora,
            prefix, mam (prefix and parallel), fusion (of `members`, attached before, which stay frozen).
        r: bottleneck, rank, or prefix length. Default 64; lora 8; prefix and mam 16.
        name: of the adapter; part of its keys.
        head: train the modules on top (classifier, score, qa_outputs, ...) too; a pooler or a language-model head is never trained. The first adapter trains
            the host's own, each further one a copy of what that is now. Default: yes; with `official` no, as there.
        official: placement and defaults of the official code: layer norms "in" before every block, the attention block before the dropout and always of
            init "bert" and scale 1, the host's dropout in the bottleneck, LoRA with both matrices random.
        layers: indices of the layers that get it, an encoder's before its decoder's; default all.
        seed: of the initial values; None: torch's random state.
        dtype: of the adapter's parameters; None: the host's.
        flags: those of `adapter_build.FLAGS[kind]`.
            layer_norm, attention_layer_norm: none | in | out; the second is that of Houlsby's attention blocks, None: the same.
            activation: relu | gelu | silu | tanh. scale: a number or "learnable". dropout: in the bottleneck, on A's input, or of the prefix.
            init: bert (both matrices N(0, 0.02^2)) | lora (Kaiming-uniform and zero) | zero_up (N(0, 0.02^2) and zero).
            alpha, where: LoRA's, of query, key, value, output, ffn. length: of mam's prefix, None: r. reparam, width: a prefix out of an MLP.
            members, value: of a fusion; value=False is its static preset.

    Raises:
        ValueError: an unknown kind, flag or value, a name in use, a host that the kind does not fit.
    """
    host, active = hosts().find_host(model), _active(model) or Active()
    config = make_config(kind, flags if r is None else {"r": r, **flags}, host, official=official, head=not official if head is None else head, layers=layers)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(Site(Active(), "output"), name):
        raise ValueError(f"name={name!r}: an adapter's name is made of letters, digits, - and _, and is no attribute of the module that holds adapters")
    if name in active.configs:
        raise ValueError(f"an adapter {name!r} is attached already; detach it first, or take another name")
    refuse_merged(model)
    generator, made = None if seed is None else torch.Generator().manual_seed(seed), pieces(model, host, config, name, dtype)
    for piece in made:
        check_place(piece.place, piece.role)
        if piece.place.how == "attention":
            hosts().check_prefix(piece.place.module)
    for piece in made:
        piece.module.draw(piece.init, generator)
        open_site(piece.place, piece.role, active)[name] = piece.module.train(model.training)
        if piece.place.how == "attention":
            hosts().see_prefix(piece.place.module)
    own = {id(p) for module in modules_of(model, name).values() for p in module.parameters()}
    for p in host.model.parameters():
        if id(p) not in own:
            p.requires_grad_(False)
    if config.head:
        _give_head(host.heads, name, active)
    active.configs[name] = config
    choose(active, name)
    return model


def hosts() -> ModuleType:
    """`dyn.models.hosts`: where adapters sit in each family. Imported late, since transformers is needed only where there is a host of it."""
    from dyn.models import hosts

    return hosts


def _active(model: nn.Module) -> Active | None:
    return next((site.active for site in sites(model).values()), None)


def _known(model: nn.Module, name: str | None) -> Active:
    """The state of a model's adapters, among which `name` is.

    Raises:
        ValueError: no adapter of that name.
    """
    active = _active(model)
    if active is None or (name is not None and name not in active.configs):
        there = ", ".join(map(repr, active.configs)) if active else "none"
        raise ValueError(f"{type(model).__name__} has no adapter {name!r}; attached: {there}" if name is not None else f"{type(model).__name__} has no adapter")
    return active


def refuse_merged(model: nn.Module) -> None:
    """ValueError while a LoRA is merged into the host's weights, which are then not what adapters were trained on."""
    active = _active(model)
    if active is not None and active.merged is not None:
        raise ValueError(f"adapter {active.merged!r} is merged into the weights; unmerge first")


def _give_head(heads: Sequence[nn.Module], name: str, active: Active) -> None:
    if active.head_owner is None:
        active.head_owner = name
        for part in heads:
            for p in own_parameters(part).values():
                p.requires_grad_(True)
        return
    for part in heads:
        site = open_site(Place(part, "replace", 0), "heads", active)
        beside, hooks = part._modules.pop("heads"), part._forward_hooks
        part._forward_hooks = type(hooks)()
        try:
            site[name] = copy.deepcopy(part).requires_grad_(True)
        finally:
            part._forward_hooks = hooks
            part.heads = beside


def adapters(model: nn.Module) -> dict[str, AdapterConfig]:
    """The adapters of a model, by name."""
    active = _active(model)
    return dict(active.configs) if active else {}


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Parameters of one adapter by their key in the model, without its head.

    Raises:
        ValueError: no adapter of that name.
    """
    _known(model, name)
    modules = {path: m for path, m in modules_of(model, name).items() if isinstance(m, AdapterModule)}
    return {f"{path}.{key}": p for path, m in modules.items() for key, p in m.named_parameters()}


def head_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Parameters of an adapter's head by their key in the model: the host's own, or its copy of it; {} where it has none.

    Raises:
        ValueError: no adapter of that name.
    """
    active = _known(model, name)
    if not active.configs[name].head:
        return {}
    if active.head_owner != name:
        return {f"{path}.{key}": p for path, m in modules_of(model, name).items() if not isinstance(m, AdapterModule) for key, p in m.named_parameters()}
    parts = hosts().find_host(model).heads
    own = {id(p) for part in parts for p in own_parameters(part).values()}
    return {key: p for key, p in model.named_parameters() if id(p) in own}


def set_active(model: nn.Module, names: str | Sequence[str | None] | None, *, train: bool = False) -> nn.Module:
    """Choose who acts from now on: one adapter, a name for each sample of the batch (None: the host alone), or None for the host alone; returns the model.

    The choice must still stand when gradients are computed, where layers are checkpointed. Heads go with their adapters.

    Args:
        model: with adapters.
        names: as said. A batch of several times as many samples (beams) repeats each name.
        train: True: train the adapters that act, with their heads, and freeze the others; False: leave that as it is.

    Raises:
        ValueError: an unknown name, a LoRA that is merged.
    """
    wanted = dict.fromkeys([names] if names is None or isinstance(names, str) else names)
    for name in wanted:
        active = _known(model, name)
    if not wanted:
        raise ValueError("set_active: an empty list names no sample")
    if active.merged is not None and list(wanted) != [active.merged]:
        refuse_merged(model)
    choose(active, names)
    if train:
        for name in active.configs:
            for p in (*adapter_parameters(model, name).values(), *head_parameters(model, name).values()):
                p.requires_grad_(name in wanted)
    return model


def detach(model: nn.Module, name: str = "default") -> nn.Module:
    """Take an adapter off; its host's weights are as before, apart from a head that it trained. In place; returns the model.

    Raises:
        ValueError: an unknown name, a LoRA that is merged, a member of a fusion.
    """
    active = _known(model, name)
    refuse_merged(model)
    for other, config in active.configs.items():
        if name in config.flags.get("members", ()):
            raise ValueError(f"adapter {name!r} is a member of the fusion {other!r}; detach that first")
    _remove(model, name, lambda site: True)
    if active.head_owner == name:
        active.head_owner = None
        for part in hosts().find_host(model).heads:
            for p in own_parameters(part).values():
                p.requires_grad_(False)
    del active.configs[name]
    if name in active.names:
        choose(active, None)
    return model


def keep_choice(model: nn.Module) -> Callable[[], None]:
    """A function that gives the model the adapters that act now and what is trained now, after one that was attached in between is taken off again."""
    trained, active = {p: p.requires_grad for p in model.parameters()}, _active(model)
    chosen = None if active is None else (active.names, active.rows, active.batch)

    def restore() -> None:
        for p, wanted in trained.items():
            p.requires_grad_(wanted)
        if chosen is not None:
            active.names, active.rows, active.batch = chosen

    return restore


def _remove(model: nn.Module, name: str, which: Callable[[Site], bool]) -> None:
    for path, site in sites(model).items():
        if name not in site or not which(site):
            continue
        del site[name]
        if not site:
            parent, _, role = path.rpartition(".")
            for handle in site.handles:
                handle.remove()
            owner = model.get_submodule(parent)
            delattr(owner, role)
            for m in model.modules():
                if getattr(m, "adapter_exit", (None,))[0] is site:
                    del m.adapter_exit
            if site.how == "attention":
                hosts().forget_prefix(owner)


@torch.no_grad()
def merge(model: nn.Module, name: str | None = None) -> nn.Module:
    """Put a LoRA into its host's weights, W + alpha/r B A, so that it costs nothing. In place; returns the model.

    `unmerge` gives the weights back bit for bit: the old ones are kept beside, outside the state dict, at the cost of their memory.

    Args:
        model: with adapters.
        name: of a LoRA; None: the one that acts.

    Raises:
        ValueError: no such adapter, one that is no LoRA (nothing else is linear), one that is merged already, several that act, a host's weight with a mask or
            quantised.
    """
    active = _known(model, name)
    refuse_merged(model)
    if name is None:
        if active.rows is not None or len(active.names) != 1:
            raise ValueError(f"merge needs one adapter; acting: {', '.join(active.names) or 'none'}")
        (name,) = active.names
    if active.configs[name].kind != "lora":
        raise ValueError(f"adapter {name!r} is of kind {active.configs[name].kind}, which no weight can express; only lora can be merged")
    found = loras(model, name)
    if pruned := {owner for owner, _, _ in found} & {m for m in model.modules() if "weight" in getattr(m, "_kept", ())}:
        path = next(path for path, m in model.named_modules() if m in pruned)
        raise ValueError(f"{path}.weight is pruned, and a mask would take from a merged sum what it adds there; first drop_masks(model)")
    if integer := {owner for owner, _, _ in found if owner.weight.dtype not in FLOATS}:
        path, m = next((path, m) for path, m in model.named_modules() if m in integer)
        raise ValueError(f"{path}.weight is {m.weight.dtype}: a quantised weight cannot take a LoRA; merge into the weights from before quantisation")
    for owner, site, module in found:
        weight = owner.weight
        site.original = weight.data
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.data = (weight.to(wide) + module.change().to(wide)).to(weight.dtype)
    active.merged = name
    choose(active, name)
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, bit for bit. In place; returns the model.

    Raises:
        ValueError: nothing is merged.
    """
    active = _known(model, None)
    if active.merged is None:
        raise ValueError("no adapter is merged")
    for owner, site, _ in loras(model, active.merged):
        owner.weight.data = site.original.to(owner.weight)
        site.original = None
    active.merged = None
    return model


def loras(model: nn.Module, name: str) -> list[tuple[nn.Linear, Site, LoRA]]:
    """The linear maps that a LoRA sits on, with its modules."""
    found = {path: site for path, site in sites(model).items() if name in site and isinstance(site[name], LoRA)}
    return [(model.get_submodule(path.rpartition(".")[0]), site, site[name]) for path, site in found.items()]


@torch.no_grad()
def flatten_prefix(model: nn.Module, name: str = "default") -> nn.Module:
    """Make a re-parametrised prefix a flat one with the same keys and values: small to save, and pruning can take it. In place; returns the model.

    Raises:
        ValueError: no such adapter, or one without a re-parametrised prefix.
    """
    active = _known(model, name)
    config = active.configs[name]
    if not config.flags.get("reparam"):
        raise ValueError(f"adapter {name!r} ({config.kind}) has no re-parametrised prefix")
    for site in sites(model).values():
        if name in site and isinstance(old := site[name], SharedPrefix):
            key, value = old.out(old.source[0]()).chunk(2, -1)
            site[name] = Prefix(key.shape[1], len(key), dropout=old.dropout, adapter_name=name, device=key.device, dtype=key.dtype).train(old.training)
            site[name].key.copy_(key)
            site[name].value.copy_(value)
            site[name].requires_grad_(old.out.weight.requires_grad)
    _remove(model, name, lambda site: site.how == "source")
    active.configs[name] = dataclasses.replace(config, flags=config.flags | {"reparam": False})
    return model


def fusion_penalty(model: nn.Module, name: str = "default", weight: float = 0.01) -> Tensor:
    """weight * sum ||I - W_v||^2 over a fusion's value matrices, to be added to the loss (section 1.6).

    Raises:
        ValueError: no fusion of that name.
    """
    _known(model, name)
    found = [m for m in modules_of(model, name).values() if isinstance(m, Fusion)]
    if not found:
        raise ValueError(f"adapter {name!r} is no fusion")
    return weight * torch.stack([m.penalty() for m in found]).sum()

