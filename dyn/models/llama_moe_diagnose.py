"""What a conversion loses and where: ceilings (neuron oracle, ideal routing), routing statistics, contributions of layers, losses by domain.

T tokens, N neurons of the dense feed-forward, D hidden size, E routed experts, K experts per token, F expert width, L layers.
An expert's contribution to a token is the norm of its output with weight 1. Nothing here changes a model for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn.core import routing
from dyn.models.llama_moe_measure import check_batches, next_token_loss, placed
from dyn.nn.experts import GATES, Experts, Gate, MoeFeedForward, Routing
from dyn.nn.probe import for_statistics

Criterion = Literal["norm", "residual"]
CHUNK = 1 << 24  # numbers of the experts' outputs that are held at a time


@contextmanager
def neuron_oracle(dense: nn.Module, keep: float | Fraction) -> Iterator[None]:
    """Within the block every feed-forward of a dense decoder uses, of each token's N activations h, only the round(keep * N) with the largest
    |h_i| * ||column i of the down projection||.

    The choice needs all activations, so it saves nothing: it is the ceiling of every grouping into experts without a refit (TEAL, ICLR 2025, with the norms of
    the columns). keep=1 is the dense model exactly.

    Raises:
        ValueError: keep outside (0, 1], or so small that no neuron is left; a model that is not a dense decoder.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must lie in (0, 1]")
    with ExitStack() as stack:
        for number, mlp in enumerate(_dense_blocks(dense)):
            count = round(keep * mlp.down_proj.in_features)
            if count < 1:
                raise ValueError(f"keep={keep} leaves none of the {mlp.down_proj.in_features} neurons of layer {number}")
            stack.callback(mlp.down_proj.register_forward_pre_hook(_Largest(mlp.down_proj, count)).remove)
        yield


class _Largest:
    """Zeroes all but the `count` inputs of a projection that matter most for a token."""

    def __init__(self, down: nn.Linear, count: int) -> None:
        self.count, self.norms_N = count, down.weight.detach().float().norm(dim=0)

    def __call__(self, down: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor] | None:
        h, = args
        if self.count == h.shape[-1]:
            return None
        chosen = (h.detach().float().abs() * self.norms_N).topk(self.count, dim=-1).indices
        return (torch.zeros_like(h).scatter(-1, chosen, h.gather(-1, chosen)),)


@contextmanager
def ideal_routing(moe: nn.Module, criterion: Criterion = "norm") -> Iterator[None]:
    """Within the block each layer of a LlamaMoeForCausalLM chooses its K experts by their outputs, which it computes for all E.

    The mixing weights are those that the model's own gate would give to these experts (for linear and mlp gates the softmax of its logits over the
    chosen), and shared experts and scale stay, so that with K = E it is the model itself.

    Args:
        moe: the model.
        criterion: norm: the K largest contributions; residual: greedily those whose sum comes nearest to the sum of all E.

    Raises:
        ValueError: a model without mixtures, or an unknown criterion.
    """
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion={criterion!r} is unknown; allowed: {', '.join(get_args(Criterion))}")
    with ExitStack() as stack:
        for mlp in _mixtures(moe):
            stack.callback(mlp.gate.register_forward_hook(_Ideal(mlp.experts, criterion)).remove)
        yield


class _Ideal:
    """Puts the experts that should have been chosen in place of those that a gate chose."""

    def __init__(self, experts: Experts, criterion: Criterion) -> None:
        self.experts, self.criterion = experts, criterion

    def __call__(self, gate: Gate, args: tuple[Tensor, ...], routed: Routing) -> Routing:
        x_TD, mask_T = args[0], args[1] if len(args) > 1 else None
        idx_TK = ideal_experts(self.experts, x_TD, gate.num_experts_per_tok, self.criterion)
        weight_TK = _weights(gate, routed, idx_TK)
        if routed.load_E is not None:
            routed = routed._replace(load_E=routing.hard_load(idx_TK, gate.num_experts, mask_T),
                                     importance_E=routing.importance(idx_TK, weight_TK, gate.num_experts, mask_T).detach())
        return routed._replace(idx_TK=idx_TK, weight_TK=weight_TK)


def _weights(gate: Gate, routed: Routing, idx_TK: Tensor) -> Tensor:
    """The weights that a gate gives to experts, whoever chose them."""
    if routed.logits_TE is None:
        return torch.full_like(routed.weight_TK, 1.0 / gate.num_experts_per_tok)
    if GATES[gate.kind].sums_to_one:
        return routed.logits_TE.gather(-1, idx_TK).softmax(-1)
    return routed.logits_TE.softmax(-1).gather(-1, idx_TK)


@torch.no_grad()
def contributions(experts: Experts, x_TD: Tensor) -> Tensor:
    """Norm of every expert's output with weight 1: [T, E] in float32."""
    return torch.stack([y_TD.float().norm(dim=-1) for y_TD in _outputs(experts, x_TD)], dim=-1)


@torch.no_grad()
def ideal_experts(experts: Experts, x_TD: Tensor, k: int, criterion: Criterion = "norm") -> Tensor:
    """The K experts that a gate which knows their outputs would choose: [T, K], best first; see `ideal_routing`."""
    if criterion == "norm":
        return contributions(experts, x_TD).topk(k, dim=-1).indices
    rows = max(1, CHUNK // (experts.num_experts * x_TD.shape[-1]))
    return torch.cat([_greedy(torch.stack(list(_outputs(experts, part_TD)), dim=1).float(), k) for part_TD in x_TD.split(rows)])


def _greedy(y_TED: Tensor, k: int) -> Tensor:
    """K experts a token, each in turn the one that lowers ||sum of all - sum of the chosen|| most: [T, K].

    With r what is left, ||r - y||^2 - ||r||^2 = ||y||^2 - 2 <r, y>, and inner products of outputs are all that it takes.
    """
    gram_TEE = y_TED @ y_TED.transpose(1, 2)
    left_TE, square_TE = gram_TEE.sum(-1), gram_TEE.diagonal(dim1=1, dim2=2)
    chosen = []
    taken_TE = torch.zeros_like(left_TE, dtype=torch.bool)
    for _ in range(k):
        best_T1 = (2 * left_TE - square_TE).masked_fill(taken_TE, -math.inf).argmax(-1, keepdim=True)
        chosen.append(best_T1)
        taken_TE.scatter_(1, best_T1, True)
        left_TE = left_TE - gram_TEE.gather(2, best_T1[:, None].expand(-1, gram_TEE.shape[1], 1)).squeeze(2)
    return torch.cat(chosen, dim=1)


def _outputs(experts: Experts, x_TD: Tensor) -> Iterator[Tensor]:
    """Every expert's output [T, D] with weight 1, one at a time."""
    for gate_up_2FD, down_DF in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate_TF, up_TF = F.linear(x_TD, gate_up_2FD).chunk(2, dim=-1)
        yield F.linear(F.silu(gate_TF) * up_TF, down_DF)


@torch.no_grad()
def routing_statistics(moe: nn.Module, batches: Sequence[Tensor]) -> dict[str, list]:
    """How each layer's gate routes the tokens of `batches` (ids [B, L]), and how near that is to the ideal: lists of one entry a layer.

    load_entropy: entropy of how often each expert was chosen; mean_entropy, token_entropy: of the mean routing distribution (softmax over all E), and the mean
    of a token's. In units of log E: 1 is uniform. Gates that were fitted have small weights, so the latter two are near 1 whatever they choose.
    accuracy: share of the K largest contributions that the gate chose; chance: what a random choice gives, K / E. captured: sum of the chosen contributions
    over that of the K largest.
    load: tokens that chose each expert, [E].

    Only sums are kept, so memory does not grow with the number of tokens.

    Raises:
        ValueError: a model without mixtures; batches that are not token ids of its vocabulary.
    """
    check_batches(batches, moe.config.vocab_size)
    blocks = _mixtures(moe)
    sums = [_RoutingSums(mlp) for mlp in blocks]
    with for_statistics(moe), ExitStack() as stack:
        for mlp, kept in zip(blocks, sums, strict=True):
            stack.callback(mlp.gate.register_forward_hook(kept.add).remove)
        for batch in batches:
            moe.model(input_ids=batch.to(moe.device), use_cache=False)
    return {name: [kept.values()[name] for kept in sums] for name in sums[0].values()}


class _RoutingSums:
    """Running sums of one layer, in float64 where they are of real numbers."""

    def __init__(self, mlp: MoeFeedForward) -> None:
        self.experts, self.chance, self.tokens = mlp.experts, mlp.gate.num_experts_per_tok / mlp.experts.num_experts, 0
        self.right = self.chosen = self.ideal = self.entropy = 0.0
        self.probability_E = self.load_E = 0.0

    def add(self, gate: Gate, args: tuple[Tensor, ...], routed: Routing) -> None:
        norm_TE = contributions(self.experts, args[0])
        best = norm_TE.topk(gate.num_experts_per_tok, dim=-1)
        ours_TE = torch.zeros_like(norm_TE).scatter_(1, routed.idx_TK, 1.0)
        p_TE = torch.full_like(norm_TE, 1.0 / gate.num_experts) if routed.logits_TE is None else routed.logits_TE.softmax(-1)
        self.tokens += len(norm_TE)
        self.right += float(ours_TE.gather(1, best.indices).sum())
        self.chosen += float((norm_TE * ours_TE).sum(dtype=torch.float64))
        self.ideal += float(best.values.sum(dtype=torch.float64))
        self.entropy += float(torch.special.entr(p_TE).sum(dtype=torch.float64))
        self.probability_E = self.probability_E + p_TE.sum(0, dtype=torch.float64)
        self.load_E = self.load_E + ours_TE.sum(0, dtype=torch.float64)

    def values(self) -> dict[str, float | list[int]]:
        unit = max(math.log(self.experts.num_experts), 1e-9)  # one expert: 0 over anything
        of = lambda p_E: float(torch.special.entr(p_E).sum()) / unit  # noqa: E731
        return {"load_entropy": of(self.load_E / self.load_E.sum()), "mean_entropy": of(self.probability_E / self.tokens),
                "token_entropy": self.entropy / self.tokens / unit, "accuracy": self.right / float(self.load_E.sum()), "chance": self.chance,
                "captured": self.chosen / self.ideal if self.ideal else 1.0, "load": self.load_E.long().tolist()}


@torch.no_grad()
def layer_contributions(converted: nn.Module, dense: nn.Module, batches: Sequence[Tensor],
                        on_layer: Callable[[int], object] = lambda layer: None) -> dict[str, list[float]]:
    """What each layer's conversion costs, in nats a token over `batches` (ids [B, L]): two lists of one number a layer.

    alone: the dense model's loss with this one feed-forward converted, above the dense loss. restored: how far the converted model's loss falls when this
    one feed-forward is the dense one again. The two differ where layers repair or amplify each other's errors: a layer that was refitted behind converted
    ones can look bad alone. 2 L + 2 passes over the batches.

    Args:
        converted: from `from_dense` or `prune_dense` of the second.
        dense: the dense model.
        batches: token ids.
        on_layer: called with each layer's number when it is done.

    Raises:
        ValueError: models of different depth or width, or on different devices.
    """
    check_batches(batches, dense.config.vocab_size)
    ours, theirs = converted.model.layers, dense.model.layers
    _dense_blocks(dense)
    for name, one, two in (("number of layers", len(ours), len(theirs)), ("hidden_size", converted.config.hidden_size, dense.config.hidden_size),
                           ("device", converted.device, dense.device)):
        if one != two:
            raise ValueError(f"{name}: {one} in the converted model, {two} in the dense one; they do not belong together")
    loss = lambda model: domain_losses(model, {"": batches})[""]  # noqa: E731
    result: dict[str, list[float]] = {"alone": [], "restored": []}
    with for_statistics(converted), for_statistics(dense):
        of_dense, of_converted = loss(dense), loss(converted)
        for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            mixture, block = isinstance(our.mlp, MoeFeedForward), our.mlp
            with placed(their, _AsDense(block) if mixture else block):
                result["alone"].append(loss(dense) - of_dense)
            with placed(our, _AsMixture(their.mlp) if mixture else their.mlp):
                result["restored"].append(of_converted - loss(converted))
            on_layer(i)
    return result


class _AsDense(nn.Module):
    """A mixture where a dense feed-forward is expected."""

    def __init__(self, block: MoeFeedForward) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, None, False)[0]


class _AsMixture(nn.Module):
    """A dense feed-forward where a mixture is expected; it has no routing to speak of."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, mask: Tensor | None = None, stats: bool = True) -> tuple[Tensor, Routing]:
        return self.block(x), Routing(None, None)


@torch.no_grad()
def domain_losses(model: nn.Module, domains: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Next-token loss by domain, in nats a token over all targets of its batches (ids [B, L], L - 1 targets a sequence), in evaluation mode.

    Raises:
        ValueError: a domain without batches, or batches that are not token ids of the model's vocabulary.
    """
    losses = {}
    with for_statistics(model):
        for domain, batches in domains.items():
            check_batches(batches, model.config.vocab_size)
            total = math.fsum(float(next_token_loss(model, batch)) for batch in batches)
            losses[domain] = total / sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    return losses


def _dense_blocks(dense: nn.Module) -> list[nn.Module]:
    blocks = [layer.mlp for layer in dense.model.layers] if hasattr(getattr(dense, "model", None), "layers") else []
    if not blocks or not all(hasattr(mlp, "down_proj") for mlp in blocks):
        raise ValueError(f"a dense decoder whose layers have mlp.down_proj is needed, got {type(dense).__name__}")
    return blocks


def _mixtures(moe: nn.Module) -> list[MoeFeedForward]:
    blocks = [module for module in moe.modules() if isinstance(module, MoeFeedForward)]
    if not blocks:
        raise ValueError(f"a model with mixtures of experts is needed (LlamaMoeForCausalLM), got {type(moe).__name__}")
    return blocks
