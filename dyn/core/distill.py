"""Distillation from the top of a teacher's next-token distribution.

B sequences, L tokens, T = B L positions, V entries of the vocabulary, K of them kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_VALUES = 1 << 25  # logits that are held in float32 at a time: 128 MiB


def top_logp(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest entries and their log-probabilities under the full softmax, likeliest first: ids [..., K] int64, logp [..., K] float32 or float64.

    Raises ValueError for k outside 1 .. V.
    """
    if not 1 <= k <= logits_TV.shape[-1]:
        raise ValueError(f"k={k} must lie in 1 .. vocabulary={logits_TV.shape[-1]}")
    logits_TV = _precise(logits_TV)
    top = logits_TV.topk(k, dim=-1)
    return top.indices, top.values - logits_TV.logsumexp(-1, keepdim=True)


def distillation_loss(logits_BLV: Tensor, ids_BLK: Tensor, logp_BLK: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """KL(teacher || student), nats a target, of the two distributions over K + 1 buckets: the teacher's K kept entries, and everything else together.

    It is at least 0, 0 where the two agree on the buckets, at most the KL over the whole vocabulary, and equal to that for K = V.
    A temperature is left out: the mass that the kept log-probabilities leave over fixes the last bucket at temperature 1 only.

    Args:
        logits_BLV: of the student.
        ids_BLK: entries that the teacher's rows keep, without repeats in a row; any integer type.
        logp_BLK: their log-probabilities under the teacher's full softmax. Where rounding (float16) makes them sum to more than 1, they are scaled to 1.
        mask_BL: positions that count, True = yes; None: all. None at all gives 0.

    Returns:
        The mean over positions that count, float64 for float64 logits, else float32; its gradient goes to the logits only.

    Raises:
        ValueError: shapes that do not belong together.
    """
    expected = [*logits_BLV.shape[:-1]]
    if [*ids_BLK.shape[:-1]] != expected or ids_BLK.shape != logp_BLK.shape or not 1 <= ids_BLK.shape[-1] <= logits_BLV.shape[-1]:
        raise ValueError(f"ids {list(ids_BLK.shape)} and log-probabilities {list(logp_BLK.shape)} must have one shape [..., K] that fits "
                         f"the logits {list(logits_BLV.shape)}: the same leading sizes, K in 1 .. {logits_BLV.shape[-1]}")
    if mask_BL is not None and [*mask_BL.shape] != expected:
        raise ValueError(f"the mask {list(mask_BL.shape)} must have the leading sizes of the logits {list(logits_BLV.shape)}")
    vocabulary, k = logits_BLV.shape[-1], ids_BLK.shape[-1]
    kl_T = _Divergence.apply(logits_BLV.reshape(-1, vocabulary), ids_BLK.reshape(-1, k), logp_BLK.reshape(-1, k))
    if mask_BL is None:
        return kl_T.sum() / max(kl_T.numel(), 1)
    mask_T = mask_BL.reshape(-1)
    return kl_T.masked_fill(~mask_T, 0.0).sum() / mask_T.sum().clamp(min=1)


class _Divergence(torch.autograd.Function):
    """`divergence` a chunk of rows at a time, with its gradient by hand: autograd would keep several float32 copies of all logits, and computing chunks again
    took six times as long."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, ids_TK: Tensor, logp_TK: Tensor) -> Tensor:
        parts = [divergence(*part) for part in zip(*(x.split(_rows(logits_TV)) for x in (logits_TV, ids_TK, logp_TK)), strict=True)]
        kl_T, surplus_TK, rest_surplus_T, outside_T = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(logits_TV, ids_TK, surplus_TK, rest_surplus_T, outside_T)
        return kl_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, ids_TK, surplus_TK, rest_surplus_T, outside_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        surplus_TK, rest_surplus_T = surplus_TK * grad_T[:, None], rest_surplus_T * grad_T
        chunks = (x.split(_rows(logits_TV)) for x in (grad_TV, logits_TV, ids_TK, surplus_TK, rest_surplus_T, outside_T))
        for out_TV, part_TV, part_TK, kept_TK, rest_T, log_T in zip(*chunks, strict=True):
            share_TV = (part_TV - log_T[:, None]).exp_()  # of the rest's probability; nonsense for kept entries, which are set below
            out_TV.copy_(share_TV.mul_(rest_T[:, None]).scatter_(-1, part_TK.long(), kept_TK))
        return grad_TV, None, None


def divergence(logits_TV: Tensor, ids_TK: Tensor, logp_TK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL of each row [T], and what its gradient is made of: how far the student lies above the teacher on kept entries [T, K] and on the rest [T], and the
    logarithm of the rest's unnormalised mass [T]. Differentiable, so that it is also the reference for the gradient."""
    logits_TV, ids_TK = _precise(logits_TV), ids_TK.long()
    logp_TK = logp_TK.to(logits_TV.dtype)
    top_TK = logits_TV.gather(-1, ids_TK)
    if ids_TK.shape[-1] == logits_TV.shape[-1]:  # there is no rest
        logp_TK, logq_TK = logp_TK.log_softmax(-1), top_TK.log_softmax(-1)
        zero_T = torch.zeros_like(logq_TK[:, 0])
        return _terms(logp_TK.exp(), logp_TK - logq_TK).sum(-1), logq_TK.exp() - logp_TK.exp(), zero_T, zero_T
    logp_TK = logp_TK - logp_TK.exp().sum(-1, keepdim=True).clamp(min=1).log()
    p_TK = logp_TK.exp()
    rest_T = (1 - p_TK.sum(-1)).clamp(min=0)
    # Not 1 - sum of the student's kept probabilities: that loses everything once they come near 1, and its gradient with it.
    outside_T = logits_TV.scatter(-1, ids_TK, -torch.inf).logsumexp(-1)
    norm_T = torch.logaddexp(top_TK.logsumexp(-1), outside_T)
    logq_TK, logq_T = top_TK - norm_T[:, None], outside_T - norm_T
    kl_T = _terms(p_TK, logp_TK - logq_TK).sum(-1) + _terms(rest_T, rest_T.log() - logq_T)
    return kl_T, logq_TK.exp() - p_TK, logq_T.exp() - rest_T, outside_T


def _rows(logits_TV: Tensor) -> int:
    return max(1, CHUNK_VALUES // logits_TV.shape[-1])


def _terms(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p log(p / q), 0 where p is 0."""
    return torch.where(p > 0, p * log_ratio, 0.0)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
