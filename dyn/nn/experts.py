"""Gate, experts and the feed-forward block that they make.

T tokens, D hidden size, E routed experts, K experts per token, F expert width.
Papers: Shazeer et al. 2017 (noisy top-k), Fedus et al. 2022 (switch), LLaMA-MoE (EMNLP 2024) section 3, DeepSeek-V3 (bias balancing).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn.core import routing
from dyn.ops.experts import experts
from dyn.ops.route import route

Balance = Literal["importance_load", "switch", "bias", "none"]


class Routing(NamedTuple):
    """What a gate decides for T tokens, and what there is to say about it. Statistics are None where they were not asked for."""

    idx_TK: Tensor  # int64
    weight_TK: Tensor  # float32
    logits_TE: Tensor | None = None  # float32, clean (without noise and selection bias); None: the gate has no parameters
    balance_loss: Tensor | None = None  # scalar, without its weight
    z_loss: Tensor | None = None  # scalar, without its weight
    load_E: Tensor | None = None  # tokens that chose each expert, a hard count, no gradient
    importance_E: Tensor | None = None  # sum of the scores that each expert got, no gradient
    dropped_mass: Tensor | None = None  # mean probability (softmax over all experts) outside the chosen ones; all of a token's that is over the capacity
    choice: Choice | None = None  # what statistics can be had from later; only where they were not asked for

    def stats(self) -> tuple[Tensor, ...]:
        """(balance_loss, z_loss, load_E, importance_E, dropped_mass), the part that a layer hands up."""
        return self.balance_loss, self.z_loss, self.load_E, self.importance_E, self.dropped_mass


class Choice(NamedTuple):
    """A gate's choice for T tokens with the logits that it came from; None where the gate has none, or (std) no noise."""

    idx_TK: Tensor  # int64
    weight_TK: Tensor  # float32 (of float64 tokens float64)
    clean_TE: Tensor | None = None
    noisy_TE: Tensor | None = None
    std_TE: Tensor | None = None  # of the noise


class Matrix(nn.Module):
    """`weight` [O, I] alone, which its owner multiplies with in float32. No `nn.Linear`: what looks for those to put something in their place (adapters,
    quantisation) would not be asked."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))


@dataclass(frozen=True)
class GateKind:
    """One kind of gate; `GATES` has them by name. D hidden size, E experts, K experts a token, T tokens.

    choose: (clean logits [T, E] and what choice goes by, with noise, or None for a kind without logits; x [T, D], E, K, selection bias [E] or None) ->
        (ids [T, K] int64, scores [T, K]).
    parts: (D, E) -> its parameters and modules by name; none for a kind that does not look at x.
    logits: (gate, x [T, D] in the gate's arithmetic) -> clean logits [T, E]; None: no logits.
    noise: of what distribution, where Gate(noise=True) wants it: "normal" of a learnt deviation, "gumbel", or None.
    only_k: E -> the one K that fits, or None for any.
    sums_to_one: whether the scores of a token do.
    """

    choose: Callable[[Tensor | None, Tensor | None, Tensor, int, int, Tensor | None], tuple[Tensor, Tensor]]
    parts: Callable[[int, int], dict[str, nn.Module | nn.Parameter]] = lambda D, E: {}
    logits: Callable[[Gate, Tensor], Tensor] | None = None
    noise: Literal["normal", "gumbel"] | None = None
    only_k: Callable[[int], int | None] = lambda E: None
    sums_to_one: bool = True


def _matrix(D: int, E: int) -> dict[str, nn.Module | nn.Parameter]:
    return {"weight": nn.Parameter(torch.empty(E, D))}


def _matrix_logits(gate: Gate, x_TD: Tensor) -> Tensor:
    return F.linear(x_TD, _float(gate.weight, x_TD))


def _network(D: int, E: int) -> dict[str, nn.Module | nn.Parameter]:
    return {"network": nn.Sequential(Matrix(D, E), nn.Tanh(), Matrix(E, E))}


def _network_logits(gate: Gate, x_TD: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x_TD, _float(gate.network[0].weight, x_TD))), _float(gate.network[2].weight, x_TD))


def _top_k(clean_TE: Tensor, noisy_TE: Tensor, x_TD: Tensor, E: int, k: int, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    return route(noisy_TE, k, bias_E=bias_E)


def _top_1_of_all(clean_TE: Tensor, noisy_TE: Tensor, x_TD: Tensor, E: int, k: int, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    idx_TK, _ = route(noisy_TE, k, bias_E=bias_E)
    return idx_TK, clean_TE.softmax(-1).gather(-1, idx_TK)


def _every(clean_TE: None, noisy_TE: None, x_TD: Tensor, E: int, k: int, bias_E: None) -> tuple[Tensor, Tensor]:
    return torch.arange(E, device=x_TD.device).expand(len(x_TD), E), _equal(x_TD, k)


def _by_chance(clean_TE: None, noisy_TE: None, x_TD: Tensor, E: int, k: int, bias_E: None) -> tuple[Tensor, Tensor]:
    return torch.rand(len(x_TD), E, dtype=torch.float32, device=x_TD.device).topk(k, dim=-1).indices, _equal(x_TD, k)


def _equal(x_TD: Tensor, k: int) -> Tensor:
    return torch.full((len(x_TD), k), 1.0 / k, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device)


GATES = {
    "linear": GateKind(_top_k, _matrix, _matrix_logits, "normal"),
    "mlp": GateKind(_top_k, _network, _network_logits, "normal"),
    "switch": GateKind(_top_1_of_all, _matrix, _matrix_logits, "gumbel", only_k=lambda E: 1, sums_to_one=False),
    "uniform": GateKind(_every, only_k=lambda E: E),
    "random": GateKind(_by_chance),
}


class Gate(nn.Module):
    """Choose K of E experts a token. All arithmetic in float32 (as exact as torch.set_float32_matmul_precision says), whatever the model's dtype.

    kind       | choice                      | weights                       | parameters
    linear     | top-k of W x                | softmax over the chosen       | weight [E, D]
    mlp        | top-k of W2 tanh(W1 x)      | softmax over the chosen       | network.0 [E, D], network.2 [E, E] (the released models)
    switch     | top-1 of W x                | its probability among all E   | weight [E, D]
    uniform    | all E (K = E)               | 1 / E                         | none
    random     | K at random, a token each   | 1 / K                         | none

    With `noise`, training adds n * (softplus(W_noise x) + epsilon), n ~ N(0, 1), to the logits of linear and mlp gates (W_noise starts
    at zero) and Gumbel noise to the switch's; evaluation has none. Noise comes from torch's global generator.

    Args:
        hidden_size, num_experts, num_experts_per_tok: D, E, K.
        kind: as above.
        noise, noise_epsilon: section 2.2 of the LLaMA-MoE specification.
        balance: importance_load: CV^2(importance) + CV^2(load); switch: E * sum f_e P_e; bias: no loss, a selection bias that
            `update_bias` moves (DeepSeek-V3); none.
        legacy_load: the official code's load estimator (it compares the noise alone with the threshold), for parity only.
        capacity_factor: K = 1 only: in training an expert takes floor(factor * T / E) of T tokens at most, drawn by chance; the others weigh 0 (section 2.5,
            "switch-drop-token"). Evaluation drops none: what a token gets must not depend on its neighbours there. None: no limit.

    Raises:
        ValueError: K over E, switch with K != 1, uniform with K != E, noise on a gate without logits, an unknown kind or balance, a capacity with K > 1.
    """

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int, kind: str = "linear", *, noise: bool = False,
                 noise_epsilon: float = 0.01, balance: Balance = "importance_load", legacy_load: bool = False,
                 capacity_factor: float | None = None) -> None:
        super().__init__()
        check_gate(num_experts, num_experts_per_tok, kind, noise, balance, capacity_factor)
        self.num_experts, self.num_experts_per_tok, self.kind = num_experts, num_experts_per_tok, kind
        self.noise_epsilon, self.balance, self.legacy_load, self.capacity_factor = noise_epsilon, balance, legacy_load, capacity_factor
        self.has_noise = noise
        for name, part in GATES[kind].parts(hidden_size, num_experts).items():
            setattr(self, name, part)
        if noise and GATES[kind].noise == "normal":
            self.noise = Matrix(hidden_size, num_experts)
        if balance == "bias":
            self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """N(0, std^2) for the logits' weights and zero for the noise's. Zero logits would tie: every token would get the same experts."""
        with torch.no_grad():
            for name, weight in self.named_parameters():
                weight.zero_() if name.startswith("noise") else weight.normal_(0.0, std, generator=generator)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Clean logits [T, E] in float32 (float64 stays)."""
        return GATES[self.kind].logits(self, _float(x_TD))

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None, stats: bool = True) -> Routing:
        """Route x [T, D]; mask_T (bool, True = a real token) leaves padding out of the statistics, and behind real tokens where capacity is short."""
        choice = self.choose(x_TD)
        if self.capacity_factor is not None and self.training:
            most = routing.capacity(len(x_TD), self.num_experts, self.capacity_factor)
            kept_T = routing.within_capacity(choice.idx_TK[:, 0], most, mask_T)
            choice = choice._replace(weight_TK=torch.where(kept_T[:, None], choice.weight_TK, 0))
        return self.statistics(choice, mask_T) if stats else Routing(choice.idx_TK, choice.weight_TK, choice.clean_TE, choice=choice)

    def choose(self, x_TD: Tensor) -> Choice:
        """Route x [T, D], and keep what `statistics` needs: for layers that see their tokens in parts, or without knowing which are padding."""
        with _exact(x_TD):
            return self._choose(x_TD)

    def _choose(self, x_TD: Tensor) -> Choice:
        kind, clean_TE, noisy_TE, std_TE = GATES[self.kind], None, None, None
        if kind.logits is not None:
            clean_TE = noisy_TE = self.logits(x_TD)
        if self.has_noise and self.training:
            if kind.noise == "gumbel":
                noisy_TE = clean_TE - torch.empty_like(clean_TE).exponential_().log()
            else:
                std_TE = F.softplus(F.linear(_float(x_TD), _float(self.noise.weight, clean_TE))) + self.noise_epsilon
                noisy_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        bias_E = self.selection_bias if self.balance == "bias" else None
        idx_TK, weight_TK = kind.choose(clean_TE, noisy_TE, x_TD, self.num_experts, self.num_experts_per_tok, bias_E)
        return Choice(idx_TK, weight_TK, clean_TE, noisy_TE, std_TE)

    def statistics(self, choice: Choice, mask_T: Tensor | None = None) -> Routing:
        """What there is to say about a choice of this gate."""
        with _exact(choice.weight_TK):
            return self._statistics(*choice, mask_T)

    def _statistics(self, idx_TK: Tensor, weight_TK: Tensor, clean_TE: Tensor | None, noisy_TE: Tensor | None, std_TE: Tensor | None,
                    mask_T: Tensor | None) -> Routing:
        E = self.num_experts
        zero = weight_TK.new_zeros(())
        importance_E = routing.importance(idx_TK, weight_TK, E, mask_T)
        load_E = routing.hard_load(idx_TK, E, mask_T)
        balance = z = dropped = zero
        if clean_TE is not None:
            z = routing.z_loss(clean_TE, mask_T)
            chosen_T = (clean_TE.detach().softmax(-1).gather(-1, idx_TK) * (weight_TK.detach() != 0)).sum(-1)
            dropped = routing.masked_mean((1 - chosen_T)[:, None], mask_T).squeeze(0)
            if self.balance == "importance_load":
                load = load_E
                if std_TE is not None and self.num_experts_per_tok < E:
                    load = routing.soft_load(clean_TE, noisy_TE, std_TE, self.num_experts_per_tok, mask_T, legacy=self.legacy_load)
                balance = routing.importance_load_loss(importance_E, load)
            elif self.balance == "switch":
                balance = routing.switch_loss(clean_TE, idx_TK, mask_T)
        return Routing(idx_TK, weight_TK, clean_TE, balance, z, load_E, importance_E.detach(), dropped)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, rate: float = 1e-3) -> None:
        """Move the selection bias by `rate` towards an equal load (DeepSeek-V3; `load_E` counts tokens). ValueError without balance="bias"."""
        if self.balance != "bias":
            raise ValueError(f"update_bias needs a gate with balance='bias'; this one has balance={self.balance!r}")
        self.selection_bias.copy_(routing.update_bias(self.selection_bias, load_E.to(self.selection_bias.device), rate))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """The selection bias stays in float32 at least: its steps are lost in a narrower type."""
        before = getattr(self, "selection_bias", None)
        super()._apply(fn, recurse)
        if before is not None and self.selection_bias.dtype.itemsize < before.dtype.itemsize:
            self.selection_bias = before.to(self.selection_bias.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_experts_per_tok} of {self.num_experts}, kind={self.kind}, noise={self.has_noise}, balance={self.balance}"


class Experts(nn.Module):
    """E gated MLPs in stacked weights: gate_up_proj [E, 2F, D] (gate rows, then up rows) and down_proj [E, D, F], the layout of transformers.

    forward(x_TD, idx_TK, weight_TK) -> [T, D] = sum over a token's experts of weight * W_down (silu(W_gate x) * W_up x).
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_size, width
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """N(0, std^2)."""
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """See the class."""
        return experts(x_TD, self.gate_up_proj, self.down_proj, idx_TK, weight_TK)


def statistics_of_layers(gates: Sequence[Gate], choices: Sequence[Choice], mask_T: Tensor | None = None) -> tuple[Tensor, ...]:
    """`Routing.stats` of gates that differ in K alone, each stacked over layers: [layers], [layers], [layers, E], [layers, E], [layers].

    Once for all layers of one K: layer by layer they are over a hundred small operations each, which keep a GPU waiting for its host. Some tensors of
    [layers, T, E] are kept for backward, also where layers are checkpointed.
    """
    layers_of: dict[int, list[int]] = {}
    for i, gate in enumerate(gates):
        layers_of.setdefault(gate.num_experts_per_tok, []).append(i)
    device, stats_of = choices[0].weight_TK.device, {}
    for layers in layers_of.values():
        gate, first = gates[layers[0]], choices[layers[0]]
        stacked = [None if part is None else torch.stack([choices[i][n].to(device) for i in layers]) for n, part in enumerate(first)]
        with _exact(first.weight_TK):
            alike = torch.vmap(lambda *parts, gate=gate: gate._statistics(*parts, mask_T).stats(), tuple(None if part is None else 0 for part in stacked))
            found = alike(*stacked)
        if len(layers) == len(gates):
            return found
        stats_of |= zip(layers, zip(*found, strict=True), strict=True)
    return tuple(torch.stack(each) for each in zip(*(stats_of[i] for i in range(len(gates))), strict=True))


class GatedMLP(nn.Module):
    """A dense SwiGLU feed-forward of one width, without biases: W_down (silu(W_gate x) * W_up x). Key names as in LLaMA."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoeFeedForward(nn.Module):
    """Routed experts, times a scale, plus always-on shared ones: y = c * sum_j s_j E_j(x) + shared(x)  (LLaMA-MoE, sections 2.2 and 1.8).

    Args:
        gate, experts: the modules above (or any with their forward).
        shared_width: width of the shared experts together; 0: none.
        score_scale: c, a constant; with `learnable_scale` the start of a scalar parameter.
    """

    def __init__(self, gate: Gate, experts: nn.Module, *, shared_width: int = 0, score_scale: float = 1.0, learnable_scale: bool = False) -> None:
        super().__init__()
        if not math.isfinite(score_scale):
            raise ValueError(f"score_scale={score_scale} is not finite")
        self.gate, self.experts = gate, experts
        self.shared_experts = GatedMLP(experts.hidden_dim, shared_width) if shared_width else None
        self.initial_scale = score_scale
        self.score_scale = nn.Parameter(torch.tensor([float(score_scale)])) if learnable_scale else score_scale

    def forward(self, x: Tensor, mask: Tensor | None = None, stats: bool = True) -> tuple[Tensor, Routing]:
        """x [..., D], mask [...] (True = a real token) -> (y [..., D], Routing over the flattened tokens)."""
        x_TD = x.reshape(-1, x.shape[-1])
        routed = self.gate(x_TD, None if mask is None else mask.reshape(-1), stats)
        y_TD = self.experts(x_TD, routed.idx_TK, routed.weight_TK * self.score_scale)
        y = y_TD.view_as(x)
        return (y if self.shared_experts is None else y + self.shared_experts(x)), routed


def check_gate(num_experts: int, k: int, kind: str, noise: bool, balance: str, capacity_factor: float | None = None, where: str = "") -> None:
    """Raise ValueError when a gate of these settings cannot be; `where` (a layer, say) ends the message."""
    where = f" ({where})" if where else ""
    if kind not in GATES:
        near = difflib.get_close_matches(str(kind), GATES, 1)
        raise ValueError(f"gate={kind!r} is unknown{where}; allowed: {', '.join(GATES)}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if balance not in get_args(Balance):
        raise ValueError(f"balance={balance!r} is unknown{where}; allowed: {', '.join(get_args(Balance))}")
    if type(num_experts) is not int or type(k) is not int or not 1 <= k <= num_experts:
        raise ValueError(f"num_experts_per_tok={k} must be between 1 and num_experts={num_experts}, both integers{where}")
    if (only := GATES[kind].only_k(num_experts)) not in (None, k):
        raise ValueError(f"gate={kind!r} needs num_experts_per_tok={only}, got {k} of {num_experts} experts{where}")
    if (noise or balance == "bias") and GATES[kind].logits is None:
        raise ValueError(f"gate={kind!r} has no logits, so gate_noise and balance='bias' do not fit it{where}")
    if noise and GATES[kind].noise is None:
        raise ValueError(f"gate={kind!r} has no noise, so gate_noise=True does not fit it{where}")
    if capacity_factor is not None and (k != 1 or not 0 < capacity_factor < math.inf):
        raise ValueError(f"capacity_factor={capacity_factor} must be above 0, or None for no limit, and needs num_experts_per_tok=1, got {k}{where}")


def _float(x: Tensor, like: Tensor | None = None) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32) if like is None else like.dtype)


def _exact(x: Tensor) -> AbstractContextManager:
    """No autocast; on the meta device, which has none, nothing to switch off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
