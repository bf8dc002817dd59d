"""Saliency: how much the loss would change without a unit. Scores are additive over batches: sum them, then divide.

Shapes: T tokens, N neurons of the feed-forward network (inputs of its down projection).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KERNELS = {"plain": lambda x: x, "l1": torch.abs, "l2": torch.square}


def taylor(
    h_TN: Tensor, grad_TN: Tensor, *, kernel: Literal["plain", "l1", "l2"] = "l1", use_value: bool = True
) -> Tensor:
    """First-order estimate of what zeroing each neuron does to the loss, summed over the tokens of one batch.

    v_N = sum over tokens of kernel(h * dL/dh), the kernel applied per token ("sample" accumulation;
    llama_moe section 1.5). Padding and positions without a target have zero gradient and add nothing; count the
    others to turn sums into means.

    h_TN: [T, N] neuron outputs. grad_TN: [T, N] gradient of the loss at them. kernel: "plain" signed, "l1" absolute
    (the paper's recipe), "l2" squared. use_value=False leaves out the factor h.
    Returns [N], float64 for float64 input, else float32. Raises ValueError for other shapes or kernels.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}; allowed: {', '.join(map(repr, KERNELS))}")
    if h_TN.ndim != 2 or h_TN.shape != grad_TN.shape:
        raise ValueError(
            f"h_TN {list(h_TN.shape)} and grad_TN {list(grad_TN.shape)} must have one shape [tokens, neurons]"
        )
    # Products of bfloat16 lose the small per-token terms that the sum is made of.
    dtype = torch.float64 if torch.float64 in (h_TN.dtype, grad_TN.dtype) else torch.float32
    effect_TN = grad_TN.detach().to(dtype)
    if use_value:
        effect_TN = effect_TN * h_TN.detach().to(dtype)
    return KERNELS[kernel](effect_TN).sum(0)
