"""Distillation over the calibration text, after a conversion in closed form: what was fitted layer by layer is fitted to the dense model's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dyn.models.llama_moe_construct import generator
from dyn.models.llama_moe_measure import check_batches, summed_divergence
from dyn.nn.experts import Gate
from dyn.nn.probe import for_statistics

TOKENS_PER_STEP = 2048
WARMUP_STEPS = 5


def align(net: nn.Module, dense: nn.Module, batches: Iterable[Tensor], *, passes: int = 1, rate: float = 1e-4, seed: int = 0,
          on_step: Callable[[int, int], object] = lambda step, steps: None) -> None:
    """Bring a converted decoder's next-token distribution nearer to its parent's, in place: Adam on the Kullback-Leibler divergence of whole vocabularies.

    All weights move but embeddings, head and gates, whose choice has no gradient; they end as the mean over the second half of the steps, since so little text
    lets single steps fit what is in it by chance (averaging: Izmailov et al. 2018). A refit knows the errors of its own layer; this one knows what they do to
    the prediction, and sees no token that the conversion has not seen.

    Args:
        net, dense: causal decoders with one vocabulary, on one device; `net` in float32.
        batches: calibration text, ids [B, L].
        passes: over the text, in steps of about 2,048 tokens, each in its own order.
        rate: of Adam, after 5 steps of warm-up.
        seed: of the orders.
        on_step: called with (step, steps) after each.

    Raises:
        ValueError: narrower weights than float32 (a step of this size would be rounded away), batches that are none of this model, a rate so high that the
            divergence or a weight is no number any more, models of two vocabularies, passes below 0 or no int, a rate that is not above 0 or infinite.
    """
    batches = list(batches)
    check_batches(batches, dense.config.vocab_size)
    if net.config.vocab_size != dense.config.vocab_size:
        raise ValueError(f"vocab_size={net.config.vocab_size} of the network is not its parent's {dense.config.vocab_size}")
    if not isinstance(passes, int) or passes < 0 or not 0 < rate < math.inf:
        raise ValueError(f"passes={passes} must be an int, 0 or more, and rate={rate} above 0 and finite")
    if net.dtype != torch.float32:
        raise ValueError(f"dtype={str(net.dtype).removeprefix('torch.')}: distillation over the calibration text needs float32 weights")
    sequences = [row for batch in batches for row in batch.split(1)]
    per_step = max(1, TOKENS_PER_STEP // max(s.numel() for s in sequences))
    random = generator(seed, "align")
    steps = [rows.tolist() for _ in range(passes) for rows in torch.randperm(len(sequences), generator=random, device="cpu").split(per_step)]
    with for_statistics(dense), for_statistics(net):
        trained = _moving(net)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(trained, lr=rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
        mean, first = [], len(steps) // 2 + 1
        try:
            with torch.enable_grad():
                for step, rows in enumerate(steps, 1):
                    tokens, total = sum(sequences[row].numel() for row in rows), 0.0
                    for row in rows:
                        ids = sequences[row].to(net.device)
                        with torch.no_grad():
                            theirs_TV = dense(input_ids=ids, use_cache=False).logits.flatten(0, 1)
                        loss = summed_divergence(net(input_ids=ids, use_cache=False).logits.flatten(0, 1), theirs_TV) / tokens
                        loss.backward()
                        total += loss.detach()
                    if not math.isfinite(total):
                        raise ValueError(f"distillation over the calibration text diverged at step {step} of {len(steps)}: lower rate={rate}")
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    if step == first:
                        mean = [parameter.detach().clone() for parameter in trained]
                    elif step > first:
                        torch._foreach_lerp_(mean, [parameter.detach() for parameter in trained], 1 / (step - first + 1))
                    on_step(step, len(steps))
            for parameter, value in zip(trained, mean, strict=bool(mean)):
                parameter.detach().copy_(value)
            if not all(bool(parameter.isfinite().all()) for parameter in trained):  # of the last step no loss was seen
                raise ValueError(f"distillation over the calibration text diverged at step {len(steps)} of {len(steps)}: lower rate={rate}")
        finally:
            for parameter in trained:
                parameter.requires_grad_(False)
                parameter.grad = None


def _moving(net: nn.Module) -> list[nn.Parameter]:
    still = {p for module in net.modules() if isinstance(module, (Gate, nn.Embedding)) for p in module.parameters()}
    still |= set(net.get_output_embeddings().parameters())
    return [p for p in net.parameters() if p not in still]
