"""Experts that are one linear layer each: what PAD-Net makes of a Transformer's feed-forward linears (section 2).

T tokens, E experts, K experts a token, I inputs, O outputs. The product is `dyn.ops.linear`, on a bank that may be partial or compact (`dyn.nn.bank`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn.nn.bank import Banked, CompactBank, PartialBank, normal
from dyn.nn.experts import GATES, Balance, Choice, Gate
from dyn.ops.linear import partial_routed_linear, routed_linear, score_matrix


class LinearExperts(Banked):
    """E linear layers in place of one, of which a gate chooses and weighs K for every token: y = sum_k s_k (W_k x + b_k), the scores s of a token sum to one.

    weight: [E, O, I]; bias: [E, O], never partitioned. A token is computed with K experts; static positions (`partition`) are the same in all of them.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        num_experts, num_experts_per_tok: E, K.
        gate, gate_noise, noise_epsilon, balance: see `dyn.nn.experts.Gate`.
        gate_std: deviation of the gate's first weights. 0 is the official code's; then all tokens have the same experts until there is noise or training.
        form: how partial layers compute, "merged" or "factorised" (`dyn.ops.linear.partial_routed_linear`); `partition` sets what multiplies less, and
            "static" where nothing is dynamic.

    Raises:
        ValueError: what `Gate` refuses, and gate="switch", whose scores do not sum to one.
    """

    def __init__(self, in_features: int, out_features: int, num_experts: int, num_experts_per_tok: int, bias: bool = True, *, gate: str = "linear",
                 gate_noise: bool = True, noise_epsilon: float = 0.01, balance: Balance = "importance_load", gate_std: float = 0.02, form: str = "merged",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if gate in GATES and not GATES[gate].sums_to_one:
            raise ValueError(f"gate={gate!r} gives scores that do not sum to one, so copies of a linear would not be that linear; allowed: "
                             f"{', '.join(name for name, kind in GATES.items() if kind.sums_to_one)}")
        self.in_features, self.out_features, self.form, self.backend = in_features, out_features, form, "auto"
        self.sets_per_input = num_experts_per_tok
        self.gate = Gate(in_features, num_experts, num_experts_per_tok, gate, noise=gate_noise, noise_epsilon=noise_epsilon, balance=balance)
        self.gate.to(device=device, dtype=dtype).reset_parameters(gate_std)
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **factory)) if bias else None
        self.reset_parameters()
        self.record: list[tuple[torch.Size, Choice]] | None = None  # what the gate chose in each call, while somebody listens

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every expert by the initialiser, biases zero."""
        self.weight.copy_(self.draw(len(self.weight)))
        if self.bias is not None:
            self.bias.zero_()
        self.settle()

    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """N(0, 0.02^2), as encoders are initialised."""
        return normal((num, *self.weight.shape[1:]), 0.02, self.weight, generator)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, num_experts: int, num_experts_per_tok: int, *, noise: float = 0.0, **kwargs) -> LinearExperts:
        """Experts that are copies of a linear layer, plus noise of `noise` times its weights' deviation; without noise they compute the same (section 2.4)."""
        weight = linear.weight
        made = cls(linear.in_features, linear.out_features, num_experts, num_experts_per_tok, linear.bias is not None, device=weight.device,
                   dtype=weight.dtype, **kwargs)
        made.weight.copy_(weight.expand_as(made.weight))
        if noise:
            made.weight.add_(torch.randn_like(made.weight) * (noise * weight.std()))
        made.weight.requires_grad_(weight.requires_grad)
        if linear.bias is not None:
            made.bias.copy_(linear.bias.expand_as(made.bias)).requires_grad_(linear.bias.requires_grad)
        return made.train(linear.training)

    def fit_form(self) -> None:
        """The form becomes the one that multiplies less; without a dynamic position the bank is not trained."""
        mask = self.partial.mask
        if self.form == "static" and mask.any():
            self.weight.requires_grad_(self.partial.static is None or self.partial.static.requires_grad)
        if not mask.any():
            self.form = "static"
            self.weight.requires_grad_(False)
            return
        area = [int(m.any(0).sum()) * int(m.any(1).sum()) for m in (mask, ~mask)]
        self.form = "factorised" if area[1] + self.sets_per_input * area[0] < self.sets_per_input * mask.numel() else "merged"

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        x_TI = x.reshape(-1, self.in_features)
        choice = self.gate.choose(x_TI)
        if self.record is not None:
            self.record.append((x.shape[:-1], choice))
        return self._product(x_TI, choice.idx_TK, choice.weight_TK).view(*x.shape[:-1], self.out_features)

    def _product(self, x_TI: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
        partial = self.partial
        if partial is None:
            return routed_linear(x_TI, self.weight, idx_TK, weight_TK, self.bias, self.backend)
        if isinstance(partial, PartialBank) and partial.static is not None and partial.on is None:
            dynamic, static = partial.scale()
            if self.form == "static":
                return self._linear(x_TI, partial.static * static, idx_TK, weight_TK)
            return partial_routed_linear(x_TI, self.weight, partial.static, partial.mask, idx_TK, weight_TK, self.bias, dynamic_scale=dynamic,
                                         static_scale=static, form=self.form, backend=self.backend)
        if isinstance(partial, CompactBank) and partial.num_dynamic == 0:  # one linear for all
            return self._linear(x_TI, partial.static_set(), idx_TK, weight_TK)
        sets_EOI, gain = partial.sets(self.weight)
        return routed_linear(x_TI, sets_EOI if gain is None else sets_EOI * gain, idx_TK, weight_TK, self.bias, self.backend)

    def _linear(self, x_TI: Tensor, weight_OI: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
        y_TO = F.linear(x_TI, weight_OI)
        return y_TO if self.bias is None else y_TO + score_matrix(idx_TK, weight_TK, len(self.bias), y_TO.dtype).to(y_TO.dtype) @ self.bias.to(y_TO.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, form={self.form}"
