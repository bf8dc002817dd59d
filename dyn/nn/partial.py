"""Which positions of a network's parameter banks stay dynamic: Iterative Mode Partition, and the compact form of its result (PAD-Net sections 3.6, 4).

`make_partial` and `compact` work on every layer that derives from `dyn.nn.bank.Banked`. K sets; masks and scores have the shape of one set.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dyn.core.mixture import Scales
from dyn.core.partition import Keep, Scope, keep_masks
from dyn.core.rounds import Masks, Schedule, kept_counts, partition_in_rounds
from dyn.core.saliency import APART, DATA_DRIVEN, Loss, gradient, listed, score
from dyn.nn.bank import Banked, CompactBank, PartialBank, StaticStart
from dyn.nn.dynamic_conv import DynamicConv2d, MixedConv2d, set_temperature
from dyn.nn.linear_experts import LinearExperts

_log = logging.getLogger(__name__)

Layers = dict[str, Banked]
Flow = Callable[[nn.Module], Tensor]


class _WithModes:
    def __init__(self, *args, mask: Tensor | None = None, static: Tensor | StaticStart = "mean", scales: Scales = "both", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.add_partial(scales)
        if mask is not None:
            self.partition(mask, static)


class PartialConv2d(_WithModes, DynamicConv2d):
    """A DY-Conv layer with modes from the start (section 3.2). Any other kind gets them by `layer.add_partial(scales)` and `layer.partition(mask, static)`.

    Args:
        mask: bool [O, I, h, w], True = dynamic; None: all.
        static: values of static positions: "mean" of the kernels there, "fresh" ones, or a tensor [O, I, h, w].
        scales: both | s | d | none: which of lambda_s and lambda_d are learnt; prune: zero instead of static.
        The others as in `DynamicConv2d`.
    """


class PartialExperts(_WithModes, LinearExperts):
    """Linear experts with modes from the start (section 3.2): E'_e = lambda_d M * W_e + lambda_s (1 - M) * static.

    Args:
        mask: bool [O, I], True = dynamic; None: all.
        static, scales: as in `PartialConv2d`.
        The others as in `LinearExperts`.
    """


def make_partial(model: nn.Module, batches: Iterable[Any], loss_fn: Loss, keep: Keep = 0.3, rounds: int = 3, schedule: Schedule = "exponential",
                 method: str = "snip", *, scope: Scope = "global", monotone: bool = True, scales: Scales = "both", static: StaticStart = "mean",
                 temperature: float | None = 31.0, shuffle: Literal["within_tensor"] | None = None, seed: int = 0,
                 flow: Flow | None = None) -> nn.Module:
    """Iterative Mode Partition: leave `keep` of the positions of all banks dynamic and make the others static, in place; returns the model (section 4).

    Exactly N - floor((1 - keep) N) positions stay dynamic. Weights are not trained meanwhile; gradients of the scored parameters are cleared; batch-norm
    statistics, dropout, modes and the random state are as before. Make the optimiser afterwards: static values and scale factors are new parameters.

    Args:
        model: with dynamic layers (`make_dynamic`, or experts that derive from `Banked`); a second call goes on from the modes that are there.
        batches, loss_fn: as in `dyn.core.saliency.score`; the same batches serve every round.
        keep: a share in [0, 1], 0 the static network and 1 the dynamic one; an int from 2 on is a count.
        rounds, schedule: as in `dyn.core.rounds.kept_counts` (section 4.3).
        method: one of `CRITERIA`. Identical parameter sets have no mode-switch gradient (section 4.2): where all layers are so (with a budget for each layer:
            in those), snip ranks by removal and says so in the log.
        scope: global: one ranking over all layers; local: the share in every layer; erdos_renyi.
        monotone: a static position stays static. False ranks all anew each round (the official code), and like `shuffle` needs a model without modes.
        scales: which scale factors are learnt (section 3.3).
        static: what a position that turns static becomes: the mean of its K values (for kinds whose weights do not sum to one: what an input gets on
            average), or a fresh draw of the layer's initialiser.
        temperature: of the attention while scoring, where layers have one (31 is the official code's; near-uniform); None: as it is.
        shuffle: "within_tensor" permutes every mask inside its layer: the control that tells a criterion from its layer ratios.
        seed: of random scores, ties, fresh values and the shuffle.

    Raises:
        ValueError: no dynamic layer, an unknown method, a budget out of range, scores that carry no information (then the model is as before).
    """
    if method not in CRITERIA:
        raise ValueError(f"method={method!r} is unknown; allowed: {', '.join(CRITERIA)}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Banked) and not isinstance(m.partial, CompactBank)}
    if not layers:
        if any(isinstance(m, Banked) for m in model.modules()):
            raise ValueError(f"make_partial: {type(model).__name__} is compact already, which modes cannot be added to; partition it before")
        raise ValueError(f"make_partial: {type(model).__name__} has no dynamic layer; call make_dynamic (convolutions) or make_moe (encoders) first")
    if (not monotone or shuffle) and (there := [name for name, m in layers.items() if m.partial is not None and m.partial.mask is not None]):
        how = "monotone=False ranks" if not monotone else "shuffle moves"
        raise ValueError(f"{how} positions that are static already, whose kernels are gone: {there[0]}; start from a fully dynamic model")
    total = sum(m.weight[0].numel() for m in layers.values())
    keep = float(keep) if type(keep) is int and keep in (0, 1) else keep  # 1 means all, also where it is written as an int
    count = kept_counts(total, keep, rounds, schedule, "up")[-1]
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is unknown; allowed: {', '.join(get_args(Scope))}")
    batches = listed(batches)
    before = {name: (m.partial, *((m.partial.mask, m.partial.static) if m.partial else (None, None))) for name, m in layers.items()}
    try:
        generator = torch.Generator().manual_seed(seed + APART)
        values = {name: m.static_start(static, generator) for name, m in layers.items()}
        for m in layers.values():
            m.add_partial(scales)
        masks = {name: torch.ones_like(values[name], dtype=torch.bool) if m.partial.mask is None else m.partial.mask for name, m in layers.items()}

        trained = {name: m.trained for name, m in layers.items()}

        def apply(masks: Masks) -> None:
            for name, m in layers.items():
                m.partial.hold(masks[name], None if scales == "prune" else values[name], trained[name], settled=False)

        apply(masks)
        if count == 0:
            masks = {name: torch.zeros_like(mask) for name, mask in masks.items()}
        elif count < total or not all(mask.all() for mask in masks.values()):
            if loss_fn is None and method in ("snip", "removal", "grasp"):
                raise ValueError(f"method={method!r} looks at a loss; give loss_fn(model, batch) -> scalar")
            criterion = CRITERIA[method](model, layers, batches, loss_fn, seed, scope, flow)
            with _at_temperature(model, temperature), _twice_differentiable(layers, method):
                masks = partition_in_rounds(criterion, masks, keep=keep, rounds=rounds, schedule=schedule, scope=scope, seed=seed, rounding="up",
                                            monotone=monotone, informative=method if method in SAYING else None, apply=apply)
        if shuffle:
            masks = keep_masks({name: mask.float() for name, mask in masks.items()}, sum(int(m.sum()) for m in masks.values()), seed=seed, shuffle=shuffle)
        for name, m in layers.items():
            m.partition(masks[name], values[name])
            m.weight.grad = None
    except BaseException:
        for name, (partial, mask, values_before) in before.items():
            layers[name].partial = partial
            if partial is not None:
                partial.mask, partial.static, partial.settled = mask, values_before, True
        raise
    _log.info("make_partial: %d of %d positions dynamic in %d layers (%s, %d rounds)", count, total, len(layers), method, rounds)
    return model


@contextmanager
def _at_temperature(model: nn.Module, temperature: float | None) -> Iterator[None]:
    held = {m: m.temperature.clone() for m in model.modules() if isinstance(m, Banked) and hasattr(m, "temperature")}
    if temperature is not None:
        set_temperature(model, temperature)
    try:
        yield
    finally:
        for m, value in held.items():
            m.temperature.copy_(value)


@contextmanager
def _twice_differentiable(layers: Layers, method: str) -> Iterator[None]:
    """GraSP differentiates gradients, which the fast product of experts has none of."""
    experts = {m: m.backend for m in layers.values() if isinstance(m, LinearExperts)} if method == "grasp" else {}
    for m in experts:
        m.backend = "eager"
    try:
        yield
    finally:
        for m, backend in experts.items():
            m.backend = backend


# Criteria: (model, layers, batches, loss_fn, seed, scope, flow) -> a function of the current masks, to scores of the same shapes ------------------------------

Criterion = Callable[[Masks], dict[str, Tensor]]


def _key(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def switches(model: nn.Module, layers: Layers, batches: list[Any], loss_fn: Loss, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(dL/dM of the mode switch, dL/dM of removal), signed, for every position of every layer (section 4.2).

    mode switch: sum_n G_n (lambda_d sum_k alpha_nk W_k - lambda_s static), G_n the loss's gradient by the parameters of input n. removal: sum_k W_k dL/dW_k,
    its first term alone. The two terms have real-valued masks of their own, so one backward pass a batch gives both.
    """
    for m in layers.values():
        m.partial.watch(m.weight.shape[1:], m.weight)
    try:
        found = gradient(model, batches, loss_fn, [_key(name, leaf) for name in layers for leaf in ("partial.on", "partial.off")], seed=seed)
    finally:
        for m in layers.values():
            m.partial.unwatch()
    removal = {name: found[_key(name, "partial.on")] for name in layers}
    return {name: found[_key(name, "partial.off")] + on for name, on in removal.items()}, removal


def _snip(model: nn.Module, layers: Layers, batches: list[Any], loss_fn: Loss, seed: int, scope: Scope, _: Flow | None) -> Criterion:
    by_removal: set[str] = set()  # layers that once were found degenerate are ranked alike in all rounds
    told: set[str] = set()
    unseen = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and not m.num_batches_tracked for m in model.modules())
    hint = ". Batch norms have seen no data yet: where nothing gets through them, let the network see some batches in training mode first" if unseen else ""

    def scores(masks: Masks) -> dict[str, Tensor]:
        switch, removal = switches(model, layers, batches, loss_fn, seed)
        size = {name: (switch[name][mask].norm().item(), removal[name][mask].norm().item()) for name, mask in masks.items()}
        eps = torch.finfo(next(iter(switch.values())).dtype).eps
        blind = {name for name, (s, r) in size.items() if _is_noise(s, r, eps)}
        mute = {name for name, (s, r) in size.items() if s == r == 0 and masks[name].any()}
        # One ranking over all layers needs one criterion: removal where all together are degenerate. Else a blind layer's positions, whose mode has no
        # effect, go first. Where each layer has its own budget, each has its own criterion.
        if scope == "global":
            together = _is_noise(*(math.hypot(*column) for column in zip(*size.values(), strict=True)), eps)
            by_removal.update(masks if together else ())
        else:
            by_removal.update(blind)
        for names, how in ((by_removal - told, "positions are ranked by |sum_k W_k dL/dW_k|, the effect of removing them"),
                           (blind - by_removal - told, "positions there turn static first")):
            if names:
                _log.warning("make_partial: in %d of %d layers (%s, ...) the parameter sets, or their weights, are so alike that switching a position's mode "
                             "changes nothing; %s%s", len(names), len(masks), min(names), how, hint)
        if mute - told:
            _log.warning("make_partial: in %d of %d layers (%s, ...) no position has any effect on the loss (is a batch norm behind them zero, as timm "
                         "starts ResNets from scratch?); positions there turn static first", len(mute - told), len(masks), min(mute))
        told.update(blind | by_removal | mute)
        return {name: (removal if name in by_removal else switch)[name].abs() for name in masks}

    return scores


def _is_noise(switch: float, removal: float, eps: float) -> bool:
    """Is the mode-switch gradient (by its norm) no more than what rounding leaves of equal terms?"""
    return removal > 0 and switch <= eps**0.75 * removal


def _removal(model: nn.Module, layers: Layers, batches: list[Any], loss_fn: Loss, seed: int, *_: Any) -> Criterion:
    return lambda masks: {name: s.abs() for name, s in switches(model, layers, batches, loss_fn, seed)[1].items()}


def _over_sets(method: str) -> Callable[..., Criterion]:
    """A criterion for parameters, averaged over the K sets (section 4.6)."""

    def make(model: nn.Module, layers: Layers, batches: list[Any], loss_fn: Loss, seed: int, _: Scope, flow: Flow | None) -> Criterion:
        keys = {name: _key(name, "weight") for name in layers}
        if flow is None and all(isinstance(m, LinearExperts) for m in layers.values()):
            flow = _feed_forwards_alone(list(layers.values()))

        def scores(_: Masks) -> dict[str, Tensor]:
            found = score(model, batches, loss_fn, method, list(keys.values()), seed=seed, flow=flow)
            return {name: found[key].mean(0) for name, key in keys.items()}

        return scores

    return make


def _feed_forwards_alone(layers: list[LinearExperts]) -> Flow:
    """R of SynFlow for encoders, whose inputs are ids: the sum over feed-forwards, each by itself on ones, of what its experts give on average."""
    blocks: list[list[LinearExperts]] = []
    for layer in layers:
        if blocks and layer.in_features == blocks[-1][-1].out_features != blocks[-1][0].in_features:
            blocks[-1].append(layer)
        else:
            blocks.append([layer])

    def flow(_: nn.Module) -> Tensor:
        ends = []
        for block in blocks:
            x = block[0].weight.new_ones(block[0].in_features)
            for layer in block:
                sets, weight_1E, static = layer.mixture(x.new_full((1, len(layer.weight)), 1 / len(layer.weight)))
                x = ((weight_1E.T.unsqueeze(-1) * sets).sum(0) + (0 if static is None else static)) @ x
            ends.append(x.sum())
        return torch.stack(ends).sum()

    return flow


def _random(model: nn.Module, layers: Layers, batches: list[Any], loss_fn: Loss, seed: int, *_: Any) -> Criterion:
    generator = torch.Generator().manual_seed(seed + APART + 1)
    drawn = {name: torch.rand(m.weight.shape[1:], generator=generator, device="cpu").to(m.weight.device) for name, m in layers.items()}
    return lambda masks: drawn  # one draw for all rounds: a new one each would make more rounds no different from one


CRITERIA: dict[str, Callable[..., Criterion]] = {
    "snip": _snip, "removal": _removal, "random": _random, "magnitude": _over_sets("magnitude"), "grasp": _over_sets("grasp"), "synflow": _over_sets("synflow"),
}
SAYING = (*DATA_DRIVEN, "removal")  # whose scores can say nothing


def settle(model: nn.Module) -> nn.Module:
    """Make the dead entries of all layers with modes zero again, in place; returns the model.

    Adam and SGD leave them alone, since their gradients are exactly zero. Call it after each step of optimisers that mix the elements of a tensor (Muon), or
    after writing parameters by hand: masked layers trust those zeros.
    """
    for m in model.modules():
        if isinstance(m, Banked):
            m.settle()
    return model


@torch.no_grad()
def compact(model: nn.Module, expand: bool = False) -> nn.Module:
    """A new model in the compact form (section 3.6): for each layer with modes a bitmask, the dynamic positions' K values and the static ones' single values.

    Scale factors are folded in; outputs are equal. Its state dict goes into safetensors as it is, and loads into `compact` of any model of the same
    architecture whose layers have modes (sizes follow the file). `expand` builds the dense banks at once and again whenever a file is loaded: the small file
    with the dynamic layer's speed, for inference (the dense banks do not train).

    Raises:
        ValueError: no layer has modes.
    """
    layers = [m for m in model.modules() if isinstance(m, Banked) and isinstance(m.partial, PartialBank)]
    if not layers:
        if any(isinstance(m, Banked) and m.partial is not None for m in model.modules()):
            raise ValueError(f"compact: {type(model).__name__} is compact already")
        raise ValueError(f"compact: no layer of {type(model).__name__} has modes; call make_partial first")
    # Copied with their banks replaced, so that the dense ones are never held twice.
    swaps: dict[int, Any] = {}
    for m in layers:
        swaps[id(m.partial)] = _compact_bank(m, expand)
        swaps[id(m.weight)] = nn.Parameter(m.weight.new_empty(0), requires_grad=False)
    made = copy.deepcopy(model, swaps)
    for m in made.modules():
        if isinstance(m, Banked) and isinstance(m.partial, CompactBank) and m.weight is not None:
            m.weight = None
        if isinstance(m, MixedConv2d) and isinstance(m.partial, CompactBank):
            _fit_attention(m)
            m.register_load_state_dict_post_hook(_fit_attention)
    return made


def _fit_attention(layer: MixedConv2d, _: object = None) -> None:
    """What nothing asks of the attention does not train: processes wait for gradients of all that does. A file with dynamic positions makes it train again."""
    trains, idle = getattr(layer, "attention_trains", False), layer.idle()
    if layer.is_static:
        layer.attention_trains = trains or any(p.requires_grad for part in idle for p in part.parameters())
    for part in idle:
        if layer.is_static or trains:
            part.requires_grad_(not layer.is_static)


def _compact_bank(layer: Banked, expand: bool) -> CompactBank:
    partial, bank = layer.partial, layer.weight
    dynamic, static = partial.scale()
    mask = torch.ones_like(bank[0], dtype=torch.bool) if partial.mask is None else partial.mask
    values = None if partial.scales == "prune" else torch.zeros_like(bank[0]) if partial.static is None else partial.static * static
    return CompactBank.of(bank * dynamic, mask, values, expand=expand, folded=layer.sums_to_one, requires_grad=layer.trained).train(layer.training)
