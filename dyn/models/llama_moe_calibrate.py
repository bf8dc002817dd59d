"""Conversion without training, layer after layer: what every layer sees behind the layers already converted, and its down projection refitted.

Two streams of hidden states run side by side, the dense model's and the converted one's. Every refit aims at the dense model's stream behind the layer,
so that later layers repair what earlier ones broke. T tokens, N neurons, D hidden size, E routed experts, F expert width, S shared neurons.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dyn.core.calibrate import Ridge, routed_activations, token_weights
from dyn.models.llama_moe_construct import Method, Sample, generator, layer_source
from dyn.models.llama_moe_measure import check_batches, placed
from dyn.nn.probe import for_statistics

MOST_EXPERTS = 32  # routed experts of a layer where the caller asks for fewer: finer groups score better and run slower
SAMPLE = 65_536  # tokens that groups and gates are fitted on at most; regressions use all
RIDGE = 0.1  # of the mean diagonal of the weighted Gram matrix
REPAIR_RIDGE = 1.0  # the same for what repairs earlier layers' errors
MANY = 50_000  # tokens from which on neurons that are kept for all of them repair with RIDGE; with a quarter of that it is worse (docs/llama_moe.md)
GATE_DEVIATION = 0.02  # of the fitted logits: small, so that chosen experts weigh nearly the same; the choice does not depend on it

Features = Callable[[Tensor, Tensor], Tensor]  # (h_TN, x_TD) -> phi_TP


@dataclass(kw_only=True, slots=True)
class LayerFit:
    """One layer converted. gate_ED is None for a layer without routing, whose kept neurons are `shared_S`; down_DN is in the dense order of neurons."""

    shared_S: Tensor
    groups_EF: Tensor
    gate_ED: Tensor | None
    down_DN: Tensor


def geometry(width: int, active: Sequence[int], most: int) -> tuple[int, list[int], list[int], list[int]]:
    """(E, then K, F and shared experts by layer) with K F + shared F = `active` neurons of a layer exactly and (E + shared) F = `width`.

    The finest groups of which a token leaves out at most three quarters of `most`, a multiple of 8 wide where that still leaves out 4; at most half as many
    as it leaves out are chosen by the gate (in the layer that sets E, which is all layers'); the other active ones, one at least where there are two, are
    shared. Each layer has groups of its own width where one E fits them all, else all have one width. Everything active: K = E.

    Raises:
        ValueError: no active neuron, or more than there are.
    """
    if min(active) < 1 or max(active) > width:
        raise ValueError(f"active neurons {min(active)}..{max(active)} must lie in 1..intermediate_size={width}")
    if min(active) == width:
        experts = next(e for e in range(min(most, width), 0, -1) if width % e == 0)
        return experts, [experts] * len(active), [width // experts] * len(active), [0] * len(active)
    layers, own = len(active), [math.gcd(width, a) for a in active]
    for units, idles in ((own, [width - a for a in active]), ([math.gcd(*own)] * layers, [width - min(active)] * layers)):
        sizes = [_group_size(idle, unit, most) for idle, unit in zip(idles, units, strict=True)]
        experts = max(_experts(width, size, idle, most) for size, idle in zip(sizes, idles, strict=True) if idle)
        # A layer with all its neurons active has no groups that matter: as wide ones as make E of them.
        sizes = [size if idle else max(f for f in range(1, width // experts + 1) if width % f == 0) for size, idle in zip(sizes, idles, strict=True)]
        if all(idle // size < experts <= width // size for size, idle in zip(sizes, idles, strict=True)):
            break
    return experts, [experts - (width - a) // f for a, f in zip(active, sizes, strict=True)], sizes, [width // f - experts for f in sizes]


def _group_size(idle: int, unit: int, most: int) -> int:
    sizes = [f for f in range(1, unit + 1) if unit % f == 0 and (idle // f <= 3 * most // 4 or f == unit)]
    return next((f for f in sizes if f % 8 == 0 and idle // f >= 4), sizes[0])  # grouped products want rows of 16 bytes


def _experts(width: int, size: int, idle: int, most: int) -> int:
    left = idle // size
    return left + max(1, min((width - idle) // size - 1, most - left, left // 2))


def active_neurons(width: int, num_experts: int, num_experts_per_tok: Sequence[int]) -> list[int]:
    """K/N of the width for every layer; ValueError where that is no whole number."""
    shares = [Fraction(k * width, num_experts) for k in num_experts_per_tok]
    if broken := [s for s in shares if s.denominator != 1]:
        raise ValueError(f"num_experts_per_tok / num_experts of intermediate_size={width} is {float(broken[0]):g} neurons, no whole number")
    return [int(s) for s in shares]


@torch.no_grad()
def fit_layers(dense: nn.Module, batches: Sequence[Tensor], method: Method, config: Any, seed: int, *, alone: bool = False) -> Iterator[LayerFit]:
    """Every layer of a dense decoder by a method that needs activations, in order; a layer is not used any more once it is given out. `alone`: see `walk`.

    Raises:
        ValueError: batches that are none of this model, or too few tokens for the regression.
    """
    check_enough(batches, dense, max(config.active_width(i) for i in range(len(dense.model.layers))))
    if (tokens := sum(b.numel() for b in batches)) < config.num_experts:
        raise ValueError(f"batches hold {tokens} tokens, fewer than there are experts ({config.num_experts} a layer)")

    def choose(i: int, mlp: nn.Module, sample: Sample) -> tuple[LayerFit, Features]:
        k = sample.num_experts_per_tok = config.of_layer("num_experts_per_tok", i)
        source = layer_source(config, i, mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach(), seed, sample=sample)
        x_TD = sample.x_TD
        shared_S, groups_EF, gate_ED = (t.to(x_TD.device) for t in method.split(source))
        gate_ED = gate_ED * (GATE_DEVIATION / (x_TD @ gate_ED.T).std().clamp(min=1e-12))
        gate_ED = gate_ED.to(mlp.gate_proj.weight.dtype).float()  # as it will be stored
        return (LayerFit(shared_S=shared_S, groups_EF=groups_EF, gate_ED=gate_ED, down_DN=mlp.down_proj.weight.detach()),
                lambda h_TN, x_TD: routed_activations(h_TN, x_TD, shared_S, groups_EF, gate_ED, k))

    yield from walk(dense, batches, choose, refit=method.refit, seed=seed, alone=alone)


def check_enough(batches: Sequence[Tensor], dense: nn.Module, active: int) -> None:
    """ValueError for batches that are none of this model, or fewer tokens than the regression has active inputs."""
    check_batches(batches, dense.config.vocab_size)
    tokens = sum(b.numel() for b in batches)
    if tokens < active:
        raise ValueError(f"batches hold {tokens} tokens; the regression of {active} active neurons a layer needs that many, better ten times more")


@torch.no_grad()
def walk(dense: nn.Module, batches: Sequence[Tensor], choose: Callable[[int, nn.Module, Sample], tuple[LayerFit, Features]], *, refit: bool,
         seed: int, alone: bool = False, repair: float | None = None) -> Iterator[LayerFit]:
    """Both streams through the layers: sample, choose, refit, go on.

    Activations of one layer and one batch are held at a time, one sample (of `SAMPLE` tokens at most) and the sums of one regression. Both streams are kept
    for every token, in a mapped temporary file ($TMPDIR); memory itself grows by a mark a token alone.

    Args:
        choose: (layer, its feed-forward, a sample of what it sees) -> what becomes of it, and the inputs [T, P] of its down projection: P = N, or P =
            len(shared_S) where there is no gate.
        refit: fit the down projection by ridge regression towards the dense one; else it stays.
        alone: every layer behind the dense ones, as if it were the only one to be converted.
        repair: ridge of what repairs earlier layers' errors. None: RIDGE for layers without a gate from `MANY` tokens on, else REPAIR_RIDGE.

    Raises:
        ValueError: activations that are not finite.
    """
    tokens = sum(b.numel() for b in batches)
    drawn = torch.zeros(tokens, dtype=torch.bool)
    drawn[torch.randperm(tokens, generator=generator(seed, "sample"))[:SAMPLE]] = True
    drawn = drawn.split([b.numel() for b in batches])
    device, dtype = dense.device, dense.dtype
    with for_statistics(dense), tempfile.TemporaryDirectory(prefix="dyn-") as folder:
        arguments = _arguments(dense, batches)
        streams = [_mapped(Path(folder) / name, batches, dense.config.hidden_size, dtype) for name in ("dense", "converted")]
        for place, ids in enumerate(batches):
            for stream in streams:
                stream[place].copy_(dense.get_input_embeddings()(ids.to(device)))
        for i, layer in enumerate(dense.model.layers):
            mlp, parts = layer.mlp, []
            with placed(layer, _Zero()):
                for place, ids in enumerate(batches):
                    kwargs = arguments[tuple(ids.shape)][i]
                    ours, theirs = (_tensor(layer(stream[place].to(device), **kwargs)) for stream in reversed(streams))
                    theirs = theirs + mlp(layer.post_attention_layernorm(theirs))
                    streams[0][place].copy_(theirs)
                    streams[1][place].copy_(ours)
                    rows = drawn[place].to(device)
                    parts.append((ours.flatten(0, 1)[rows], theirs.flatten(0, 1)[rows]))
            ours_TD, theirs_TD = (torch.cat(each) for each in zip(*parts, strict=True))
            del parts
            if not (ours_TD.isfinite().all() and theirs_TD.isfinite().all()):
                raise ValueError(f"layer {i}: hidden states are not finite in {dtype}: a broken checkpoint, or a dtype that is too narrow")
            x_TD = layer.post_attention_layernorm(ours_TD)
            sample = Sample(x_TD=x_TD.float(), h_TN=activations(mlp, x_TD), omega_T=token_weights(theirs_TD),
                            norm_N=mlp.down_proj.weight.float().norm(dim=0), num_experts_per_tok=0)
            fit, features = choose(i, mlp, sample)
            del sample, x_TD, ours_TD, theirs_TD
            kept = slice(None) if fit.gate_ED is not None else fit.shared_S
            down_PD = mlp.down_proj.weight.detach().T[kept].float()
            if refit:
                usual = RIDGE if fit.gate_ED is None and tokens >= MANY else REPAIR_RIDGE
                down_PD = _refit(layer, mlp, streams, device, features, down_PD, usual if repair is None else repair)
                fit.down_DN = fit.down_DN.clone()
                fit.down_DN[:, kept] = down_PD.T.to(dtype)
                down_PD = fit.down_DN.T[kept].float()  # as it will be stored
            if i + 1 < len(dense.model.layers):
                for theirs, ours in zip(*streams, strict=True):
                    if alone:
                        ours.copy_(theirs)
                        continue
                    middle = ours.to(device)
                    phi_TP = _features(layer, mlp, middle, features)
                    ours.copy_(middle + (phi_TP @ down_PD).view_as(middle).to(dtype))
            yield fit


def _refit(layer: nn.Module, mlp: nn.Module, streams: list[list[Tensor]], device: torch.device, features: Features, down_PD: Tensor, repair: float) -> Tensor:
    """The down projection [P, D] that brings the converted stream nearest to the dense one: what does this layer's own work, near the dense weights, and what
    repairs errors of earlier layers, near zero. Behind a gate, or where tokens are few, the repair is held back more: it fits mainly noise there, which later
    layers would be asked to repair in turn."""
    width, hidden = down_PD.shape
    ridge = Ridge(width, 2 * hidden, down_PD)
    for theirs, ours in zip(*streams, strict=True):
        theirs_TD, ours_TD = theirs.to(device).flatten(0, 1).float(), ours.to(device).flatten(0, 1).float()
        x_TD = layer.post_attention_layernorm(ours.to(device)).flatten(0, 1)
        h_TN = activations(mlp, x_TD)
        own_TD = h_TN @ mlp.down_proj.weight.float().T
        ridge.add(features(h_TN, x_TD.float()), torch.cat([own_TD, theirs_TD - ours_TD - own_TD], 1), token_weights(theirs_TD))
    return ridge.solve(down_PD, ridge=RIDGE, outputs=slice(hidden)) + ridge.solve(ridge=repair, outputs=slice(hidden, None))


def _features(layer: nn.Module, mlp: nn.Module, middle: Tensor, features: Features) -> Tensor:
    x_TD = layer.post_attention_layernorm(middle).flatten(0, 1)
    return features(activations(mlp, x_TD), x_TD.float())


def activations(mlp: nn.Module, x_TD: Tensor) -> Tensor:
    """What the down projection sees [T, N], float32."""
    return (nnf.silu(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)).float()


def _tensor(output: Tensor | tuple) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _mapped(file: Path, batches: Sequence[Tensor], hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """A hidden state [B, L, D] for every batch, in a file that is mapped into memory. OSError where the disk has no room for it."""
    numbers = [b.numel() * hidden for b in batches]
    size = sum(numbers) * dtype.itemsize
    with file.open("wb") as empty:
        try:  # not sparse: a page that found no room later would kill the process without a word
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(empty.fileno(), 0, size)
            else:
                empty.truncate(size)
        except OSError as error:
            raise OSError(error.errno, f"calibration needs {size / 1e9:.2f} GB for hidden states ({error.strerror}); set TMPDIR to a folder with room",
                          str(file.parent)) from error
    whole = torch.from_file(str(file), shared=True, size=sum(numbers), dtype=dtype)
    return [part.view(*b.shape, hidden) for part, b in zip(whole.split(numbers), batches, strict=True)]


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _arguments(dense: nn.Module, batches: Sequence[Tensor]) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    """What the model hands its layers beside hidden states (masks, positions), by shape of the batch: one pass for each, with empty feed-forwards."""
    found: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    seen: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for layer in dense.model.layers:
            stack.enter_context(placed(layer, _Zero()))
            stack.callback(layer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(dict(kwargs)), with_kwargs=True).remove)
        for ids in batches:
            if tuple(ids.shape) not in found:
                seen.clear()
                dense.model(input_ids=ids.to(dense.device), use_cache=False)
                for kwargs in seen:
                    kwargs.pop("hidden_states", None)
                found[tuple(ids.shape)] = list(seen)
    return found
