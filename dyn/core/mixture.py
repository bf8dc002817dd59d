"""A mixture of parameter sets, theta(x) = sum_k pi_k(x) theta_k, and the partial mixture that shares one static set.

B inputs, K sets, P positions of one set (any shape); `bank_KP` holds the K sets of a layer, `mask_P` (bool) is True where a position is dynamic.

PAD-Net section 3.2: theta(x) = lambda_d M * sum_k pi_k(x) theta_k + lambda_s (1 - M) * static. Both factors come from one learnable scalar phi
(section 3.3). `lambda_d` is a common factor of the dynamic part, so the functions below leave it out of the bank: it multiplies pi, which is tiny.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

Scales = Literal["both", "s", "d", "none", "prune"]  # which of lambda_s and lambda_d are learnt; prune: positions that are not dynamic are zero


def mix(bank: Tensor, weight_BK: Tensor) -> Tensor:
    """Sum of the K sets of `bank` [K, ...], weighted for every input: [B, ...] in the bank's dtype.

    One matrix product, so that no product of B x K x P numbers ever exists, and so that autograd's backward is two matrix products too.

    Raises:
        ValueError: weights that are not [B, K].
    """
    if weight_BK.ndim != 2 or weight_BK.shape[1] != len(bank):
        raise ValueError(f"a bank of {len(bank)} sets is mixed by weights [B, {len(bank)}]; got {list(weight_BK.shape)}")
    return (weight_BK.to(bank.dtype) @ bank.flatten(1)).unflatten(1, bank.shape[1:])


def scale_factors(phi: Tensor | None, scales: Scales = "both") -> tuple[Tensor | float, Tensor | float]:
    """(lambda_d, lambda_s) of a layer: 2 sigmoid(phi) and 2 sigmoid(-phi), which sum to 2 (section 3.3); the ablations "s" and "d" hold the other one at 1."""
    check_scales(scales)
    return 2 * torch.sigmoid(phi) if scales in ("both", "d") else 1.0, 2 * torch.sigmoid(-phi) if scales in ("both", "s") else 1.0


def check_scales(scales: str) -> None:
    """Raise ValueError for scales that do not exist."""
    if scales not in get_args(Scales):
        raise ValueError(f"scales={scales!r} is unknown; allowed: {', '.join(get_args(Scales))}")


def partial_sets(bank: Tensor, mask: Tensor, static: Tensor | None, ratio: Tensor | float = 1.0) -> Tensor:
    """[K, ...]: the sets where `mask` is True, ratio * static elsewhere (zero without static), the same in all of them.

    With weights that sum to one the mixture of these sets is the partial mixture, divided by lambda_d when `ratio` is lambda_s / lambda_d. Gradients are
    exactly zero for sets outside the mask and for static values inside it.
    """
    if static is None:
        return bank * mask.to(bank.dtype)
    return torch.addcmul(static * ratio * ~mask, bank, mask.to(bank.dtype))  # one pass over K sets each way; `where` takes three, and a sum


class _Held(torch.autograd.Function):
    """bank (+ static * scale); backward zeroes the bank's gradient where the mask is False, and static's where it is True."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bank: Tensor, mask: Tensor, static: Tensor | None, scale: Tensor | None, fresh: bool) -> Tensor:
        return bank.view_as(bank) if static is None else torch.addcmul(bank, static, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        _, mask, static, scale, ctx.fresh = inputs
        ctx.save_for_backward(mask, static, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, static, scale = ctx.saved_tensors
        mask = mask.to(grad.dtype)  # once: a product of floats and bools is cast number by number, which takes a CPU three times as long
        shared = factor = None
        if static is not None:
            shared = grad.sum(0)
            shared = torch.addcmul(shared, shared, mask, value=-1)
            factor = (shared * static).sum().view_as(scale) if ctx.needs_input_grad[3] else None
            shared = shared * scale
        if not ctx.fresh or torch.is_grad_enabled() or torch.compiler.is_compiling() or not grad.is_contiguous():
            return grad * mask, None, shared, factor, None
        return grad.mul_(mask), None, shared, factor, None


def held(bank: Tensor, mask: Tensor, static: Tensor | None = None, scale: Tensor | float = 1.0, *, fresh: bool = False) -> Tensor:
    """`bank` [..., P], which is zero outside `mask` [P] already; its gradient there is exactly zero too, without a product with the mask in forward.

    static: [P], zero inside the mask and held so; it comes into every set, times `scale` (a float or one number). fresh: the gradient comes from one product,
    so nobody else reads it, and it is masked where it lies: a second one of K sets costs as much as a small convolution.
    """
    if static is not None and not isinstance(scale, Tensor):
        scale = bank.new_full((1,), scale)
    return _Held.apply(bank, mask, static, None if static is None else scale, fresh)


def partial_parts(bank: Tensor, mask: Tensor, static: Tensor | None, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor | None]:
    """(sets [K, ...], zero outside the mask; scale * static, zero inside it).

    For weights that do not sum to one, and for products taken apart (section 3.6).
    """
    return bank * mask.to(bank.dtype), None if static is None else static * scale * ~mask
