"""What a language model's run shows beside its losses: sampled text, distances between domains, overlap of experts.

M domains, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyn.core.split import overlap_matrix
from dyn.models.llama_moe import Construction


@torch.no_grad()
def sample(net: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy continuations of `prompts`, without the prompts."""
    training = net.training
    net.eval()
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(net.device)
        with torch.autocast(net.device.type, torch.bfloat16):
            out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True,
                               pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        texts.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
    net.train(training)
    return texts


@torch.no_grad()
def perplexity(net: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int = 512) -> Tensor:
    """Perplexity of each text under `net`, over its first `max_tokens` tokens: float64 [len(texts)]; infinite for a text of fewer than two tokens."""
    values = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=max_tokens).input_ids], device=net.device)
        with torch.autocast(net.device.type, torch.bfloat16):
            values.append(net(input_ids=ids, labels=ids, use_cache=False).loss.double().exp().cpu() if ids.shape[1] > 1 else torch.tensor(torch.inf).double())
    return torch.stack(values)


def domain_distances(load: Mapping[str, Tensor], layer: int = -1) -> tuple[list[str], Tensor]:
    """L2 distances between the domains' min-max normalised expert loads in one layer (LLaMA-MoE section 5.6, item 3): names, [M, M].

    `load`: domain -> counts [layers, E]. A load that is equal everywhere normalises to zeros.
    """
    vectors_ME = torch.stack([torch.as_tensor(counts, dtype=torch.float64)[layer] for counts in load.values()])
    low_M1, high_M1 = vectors_ME.amin(1, keepdim=True), vectors_ME.amax(1, keepdim=True)
    normal_ME = (vectors_ME - low_M1) / (high_M1 - low_M1).clamp(min=1e-12)
    return list(load), torch.cdist(normal_ME, normal_ME)


def overlaps(groups: Sequence[Tensor]) -> list[list[list[float]]]:
    """Share of common neurons between the experts of every layer (section 1.7's diagnostic); `groups`: a LongTensor [E, F] a layer."""
    return [overlap_matrix(groups_EF).tolist() for groups_EF in groups]


def shared_neurons(made: Construction | None) -> list[list[list[float]]] | None:
    """`overlaps` of a construction whose experts may share neurons; None for others."""
    return overlaps(made.groups) if made is not None and (made.method == "sharing_inner" or made.details.get("overlap")) else None
