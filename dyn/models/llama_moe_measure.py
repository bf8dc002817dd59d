"""Statistics of a dense decoder that constructions need, and score scales measured by layer.

T tokens, N neurons, E data groups (one for each routed expert), L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn.core import split
from dyn.nn.probe import for_statistics, taylor_scores, watch


@contextmanager
def placed(layer: nn.Module, mlp: nn.Module) -> Iterator[None]:
    """Within the block `mlp` is the feed-forward of a layer."""
    kept, layer.mlp = layer.mlp, mlp
    try:
        yield
    finally:
        layer.mlp = kept


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Summed next-token cross-entropy of ids [B, L] (L - 1 targets a sequence)."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().long().to(logits.device), reduction="sum")


def summed_divergence(logits_TV: Tensor, parent_TV: Tensor) -> Tensor:
    """Kullback-Leibler divergence of predictions from a parent's, in nats, summed over T tokens, in float32."""
    log_q_TV, log_p_TV = (logits.float().log_softmax(-1) for logits in (logits_TV, parent_TV))
    return F.kl_div(log_q_TV, log_p_TV, reduction="sum", log_target=True)


def check_batches(batches: Sequence[Tensor], vocabulary: int) -> None:
    """ValueError unless every batch is token ids [B, L >= 2] of this vocabulary."""
    if not batches:
        raise ValueError("batches is empty; token ids [B, L] are needed")
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 2 or not len(batch) or batch.shape[1] < 2 or batch.dtype not in (torch.int64, torch.int32):
            found = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"a batch must be a LongTensor [B, L] with B >= 1 and L >= 2, got {found}")
        if int(batch.min()) < 0 or int(batch.max()) >= vocabulary:
            raise ValueError(f"token ids {int(batch.min())}..{int(batch.max())} do not fit vocab_size={vocabulary}: is this the model's own tokenizer?")


@torch.no_grad()
def group_sequences(model: nn.Module, batches: Sequence[Tensor], num_groups: int, seed: int) -> list[list[Tensor]]:
    """Section 1.5, data grouping: sequences by k-means of their mean last hidden state (the paper uses a sentence encoder). Returns batches by group."""
    from sklearn.cluster import KMeans

    with for_statistics(model), torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.float32):
        means = torch.cat([model.model(input_ids=b.to(model.device), use_cache=False)[0].float().mean(1).cpu() for b in batches])
    if len(means) < num_groups:
        raise ValueError(f"{len(means)} sequences cannot make {num_groups} groups; give more batches")
    labels = torch.from_numpy(KMeans(num_groups, n_init=10, random_state=seed % (1 << 32)).fit(F.normalize(means).numpy()).labels_)
    sequences = [row for batch in batches for row in batch]
    size = max(len(b) for b in batches)
    groups = []
    for g in range(num_groups):
        members = [sequences[i] for i in (labels == g).nonzero().flatten().tolist()]
        if not members:
            raise ValueError(f"data group {g} of {num_groups} is empty: the sequences are too much alike; give more varied batches, or {num_groups} lists")
        alike = [[m for m in members if len(m) == n] for n in sorted({len(m) for m in members})]
        groups.append([torch.stack(same[i: i + size]) for same in alike for i in range(0, len(same), size)])
    return groups


def layer_scores(model: nn.Module, batches: Sequence, num_groups: int, seed: int) -> Tensor:
    """Importance of every neuron for every data group: [L, E, N], section 1.5. `batches`: a list of ids, grouped here, or `num_groups` lists of them."""
    if batches and isinstance(batches[0], (list, tuple)):
        if len(batches) != num_groups:
            raise ValueError(f"batches has {len(batches)} lists; one for each of num_experts={num_groups} is needed")
        groups = batches
        for group in groups:
            check_batches(group, model.config.vocab_size)
    else:
        check_batches(batches, model.config.vocab_size)
        groups = group_sequences(model, batches, num_groups, seed)
    downs = [layer.mlp.down_proj for layer in model.model.layers]
    # The paper's statistics are taken in bfloat16; a float32 model computes in it, and sums in float32.
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.float32):
        return torch.stack([taylor_scores(model, downs, group, next_token_loss, model.get_input_embeddings()) for group in groups], dim=1)


@torch.no_grad()
def layer_coactivations(model: nn.Module, batches: Sequence[Tensor], layers: Sequence[int]) -> dict[int, Tensor]:
    """Co-activation graph [N, N] of each of `layers`, one pass over the batches (section 1.4)."""
    check_batches(batches, model.config.vocab_size)
    graphs: dict[int, Tensor] = {}

    def visit(i: int, h: Tensor) -> None:
        part = split.coactivate(h.reshape(-1, h.shape[-1]).float())
        graphs[layers[i]] = part if layers[i] not in graphs else graphs[layers[i]].add_(part)

    with for_statistics(model), watch([model.model.layers[i].mlp.down_proj for i in layers], visit):
        for batch in batches:
            model.model(input_ids=batch.to(model.device), use_cache=False)
    return graphs


class _Ratio:
    """Running L1 norms of residual stream and feed-forward output over tokens; their ratio is section 2.3's rho."""

    def __init__(self) -> None:
        self.residual = self.output = 0.0

    def add(self, residual: Tensor, output: Tensor) -> None:
        self.residual += residual.abs().sum(dtype=torch.float64)
        self.output += output.abs().sum(dtype=torch.float64)

    def value(self) -> float:
        return float(self.residual / self.output)


@torch.no_grad()
def dense_ratios(model: nn.Module, batches: Sequence[Tensor]) -> list[float]:
    """rho of every dense layer: mean ||residual stream before the feed-forward||_1 over mean ||feed-forward output||_1."""
    check_batches(batches, model.config.vocab_size)
    ratios, streams = [_Ratio() for _ in model.model.layers], {}
    hooks = [layer.mlp.register_forward_hook(lambda _, __, out, i=i: ratios[i].add(streams.pop(i), out)) for i, layer in enumerate(model.model.layers)]
    try:
        with for_statistics(model), watch([layer.post_attention_layernorm for layer in model.model.layers], streams.__setitem__):
            for batch in batches:
                model.model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [r.value() for r in ratios]


class _Stop(Exception):
    """Ends a forward pass once the layer of interest has been seen."""


@torch.no_grad()
def install_measured_scales(moe: nn.Module, dense: Sequence[float], batches: Sequence[Tensor]) -> None:
    """Set score_scale by layer to rho_moe / rho_dense, in order, each measured with scale 1 behind the layers already set (section 2.3). A layer that adds
    nothing, dense or routed, keeps 1. ValueError for activations without a finite ratio."""
    scales = []
    for i, layer in enumerate(moe.model.layers):
        layer.mlp.score_scale, ratio, stream = 1.0, _Ratio(), {}

        def measure(_, __, out, ratio=ratio, stream=stream) -> None:
            ratio.add(stream.pop(0), out[0])
            raise _Stop

        hook = layer.mlp.register_forward_hook(measure)
        try:
            with for_statistics(moe), watch([layer.post_attention_layernorm], stream.__setitem__):
                for batch in batches:
                    try:
                        moe.model(input_ids=batch.to(moe.device), use_cache=False)
                    except _Stop:
                        continue
        finally:
            hook.remove()
        found = ratio.value()
        scale = 1.0 if found == dense[i] == math.inf else found / dense[i]
        if not 0 < scale < math.inf:
            raise ValueError(f"layer {i}: score_scale='measured' found no finite ratio of norms: a broken checkpoint, or a dtype that is too narrow")
        layer.mlp.score_scale = layer.mlp.initial_scale = scale
        scales.append(layer.mlp.score_scale)
    moe.config.score_scale = scales
