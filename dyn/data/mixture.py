"""Mixtures of domains: weights, their dynamic update, and a loader whose weights may change in flight and whose resume is exact.

B sequences a batch, L tokens a sequence, n domains. Weights and rules: LLaMA-MoE, sections 4.2 and 4.3 of its specification.
"""

from __future__ import annotations

import copy
import functools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dyn.data.loader import AWAY
from dyn.data.sources import choose
from dyn.data.tokens import Tokens, blocks_of_epoch

WEIGHTS: dict[str, dict[str, float]] = {
    "llama": {"en_cc": 0.67, "en_c4": 0.15, "github": 0.045, "en_wikipedia": 0.045, "en_book": 0.045, "en_arxiv": 0.025, "en_stack": 0.02},
    "sheared_llama": {"en_cc": 0.361, "en_c4": 0.492, "github": 0.008, "en_wikipedia": 0.031, "en_book": 0.091, "en_arxiv": 0.007, "en_stack": 0.01},
}
"""Published mixes of SlimPajama's seven domains. A third name, "uniform", fits any domains."""


def domain_weights(weights: str | Mapping[str, float], domains: list[str]) -> dict[str, float]:
    """Weights that sum to 1, in the order of `domains`.

    Args:
        weights: "uniform", a name in WEIGHTS (for exactly its domains), or domain -> weight, of any sum.
        domains: the domains there are.

    Raises:
        ValueError: an unknown name, a domain too few or too many, a weight that is negative or not finite, or no weight above 0.
    """
    if isinstance(weights, str):
        choose([weights], ["uniform", *WEIGHTS], "domain weights", "mix")
        weights = dict.fromkeys(domains, 1.0) if weights == "uniform" else WEIGHTS[weights]
    choose(weights, domains, "domain weights")
    if missing := [d for d in domains if d not in weights]:
        raise ValueError(f"domain weights lack {', '.join(missing)}; give 0 to leave a domain out")
    values = {d: float(weights[d]) for d in domains}
    if wrong := {d: w for d, w in values.items() if not (math.isfinite(w) and w >= 0)}:
        raise ValueError(f"domain weights must be finite and at least 0; got {wrong}")
    total = math.fsum(values.values())
    if not total > 0:
        raise ValueError("domain weights are all 0; one at least must be above 0")
    return {d: w / total for d, w in values.items()}


def update_weights(weights: Mapping[str, float], losses: Mapping[str, float], references: Mapping[str, float], *, rule: Literal["a", "b"] = "a",
                   eta: float = 1.0, gamma: float = 1e-4, anchor: Mapping[str, float] | None = None) -> dict[str, float]:
    """New domain weights from how far each domain's loss L lies above its reference R (section 4.3; d = L - R, n domains).

    rule "a" (the official code): u = softmax(log w + eta d), then (1 - gamma) u + gamma / n. Domains below their reference lose weight.
    rule "b" (published by Sheared-LLaMA): proportional to w exp(eta max(0, d)); no floor.

    Args:
        weights: the current weights w.
        losses, references: loss by domain, nats a token.
        anchor: multiply onto these (the initial weights, say) in place of the current ones, so that a lasting gap does not compound.

    Raises:
        ValueError: an unknown rule, gamma outside [0, 1), a negative eta, domains that differ, or a loss that is not finite.
    """
    if rule not in ("a", "b"):
        raise ValueError(f"rule={rule!r} is unknown; allowed: 'a', 'b'")
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma={gamma} must lie in [0, 1)")
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta={eta} must be finite and at least 0")
    domains = list(weights)
    start = domain_weights(weights if anchor is None else anchor, domains)
    for what, values in (("losses", losses), ("references", references)):
        if wrong := [d for d in domains if not math.isfinite(values.get(d, math.nan))]:
            raise ValueError(f"{what} are missing or not finite for {', '.join(wrong)}")
    gap = np.array([losses[d] - references[d] for d in domains])
    if rule == "b":
        gap = np.maximum(gap, 0.0)
    new = np.array(list(start.values())) * np.exp(eta * (gap - gap.max()))
    new /= new.sum()
    if rule == "a":
        new = (1 - gamma) * new + gamma / len(domains)
    return dict(zip(domains, (new / new.sum()).tolist(), strict=True))


class MixtureLoader:
    """Batches whose sequences are drawn from domains by weight; an endless stream, of which one iteration gives `num_batches`.

    Everything follows from (seed, step, blocks used, weights): the domains of a step are drawn by a generator seeded by (seed, step), and a
    domain's blocks come in a permutation seeded by (seed, domain, epoch). That, `state_dict` and `__len__` make resume exact. All ranks draw
    the same global batch and assemble their own part. A domain that is exhausted starts again, in another order.

    Batches: input_ids and labels [B, L] int64 (equal: the model shifts), domain [B] int64 (places in `domains`). With `mask_documents` also
    position_ids [B, L], which begin again at every document, and -100 for the label of a document's first token, which nothing announces.

    Args:
        domains: name -> Tokens.
        weights: whatever `domain_weights` takes.
        block_size, batch_size: L and B (of one rank).
        num_batches: batches an iteration.
        seed: of the draws and orders.
        rank, world_size: this process's part.
        mask_documents: see above.

    Raises:
        ValueError: no domain, sizes below 1, a negative seed, a rank outside the world, weights that do not fit.
    """

    def __init__(self, domains: Mapping[str, Tokens], weights: str | Mapping[str, float] = "uniform", *, block_size: int, batch_size: int, num_batches: int,
                 seed: int, rank: int = 0, world_size: int = 1, mask_documents: bool = False) -> None:
        if not domains:
            raise ValueError("a mixture needs at least one domain")
        for name, value in {"block_size": block_size, "batch_size": batch_size, "num_batches": num_batches, "world_size": world_size}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie in 0 .. world_size - 1 = {world_size - 1}")
        self.tokens, self.domains = dict(domains), list(domains)
        self.block_size, self.batch_size, self.num_batches, self.seed = block_size, batch_size, num_batches, seed
        self.rank, self.world_size, self.mask_documents = rank, world_size, mask_documents
        self.step, self.used = 0, dict.fromkeys(self.domains, 0)
        self.drawn: list[tuple[int, int]] = []  # what the newest batch is made of, as in `assemble`
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        self.set_weights(weights)

    def set_weights(self, weights: str | Mapping[str, float]) -> None:
        """New domain weights, from the next batch on. ValueError as `domain_weights`."""
        self.weights = domain_weights(weights, self.domains)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The rest of the current `num_batches`, from the current state on."""
        for _ in range(self.num_batches - self.step % self.num_batches):
            self.drawn = self._draw()
            yield self.assemble(self.drawn)

    def planned(self, num_batches: int | None = None) -> Iterator[tuple[int, int]]:
        """What the next `num_batches` (None: the rest, as `__iter__`) will be made of on all ranks together, as in `assemble`, as long as weights stay; moves
        nothing."""
        ahead = copy.copy(self)
        ahead.used, ahead._orders = dict(self.used), dict(self._orders)
        ahead.rank, ahead.batch_size, ahead.world_size = 0, self.batch_size * self.world_size, 1
        for _ in range(self.num_batches - self.step % self.num_batches if num_batches is None else num_batches):
            yield from ahead._draw()

    def _draw(self) -> list[tuple[int, int]]:
        """(domain, block of its stream) for each sequence of this rank; moves the state of the whole mixture one step on."""
        total = self.batch_size * self.world_size
        uniform = np.random.Generator(np.random.PCG64([self.seed, self.step])).random(total)
        bounds = np.cumsum(list(self.weights.values()))
        drawn = np.searchsorted(bounds / bounds[-1], uniform, side="right")
        mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        blocks = []
        for place, d in enumerate(drawn.tolist()):
            name = self.domains[d]
            if place in mine:
                blocks.append((d, self._block(name, self.used[name])))
            self.used[name] += 1
        self.step += 1
        return blocks

    def _block(self, name: str, used: int) -> int:
        """The block that a domain gives out as its used-th (from 0)."""
        size, total = self.block_size, self.tokens[name].num_tokens
        epoch = used * size // total
        blocks = blocks_of_epoch(epoch, size, total)
        if self._orders.get(name, (-1,))[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(name.encode()), epoch]))
            self._orders[name] = epoch, generator.permutation(len(blocks))
        return blocks.start + int(self._orders[name][1][used - blocks.start])

    def assemble(self, blocks: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The batch of these sequences, each (place of its domain in `domains`, block of that domain's stream)."""
        domain = np.array([d for d, _ in blocks])
        index = np.array([b for _, b in blocks])
        return _batch(self.tokens, self.domains, domain, index, self.block_size, self.mask_documents)

    def state_dict(self) -> dict:
        """Plain numbers: where the stream stands, and of which stream it speaks."""
        about = {"seed": self.seed, "block_size": self.block_size, "global_batch": self.batch_size * self.world_size, "mask_documents": self.mask_documents,
                 "num_tokens": {d: t.num_tokens for d, t in self.tokens.items()}, "domains": self.domains, "samples": self._samples}
        return {"step": self.step, "used": dict(self.used), "weights": dict(self.weights), **about}

    @functools.cached_property
    def _samples(self) -> list[int]:
        """A checksum of 64 pieces of each domain: its texts may have changed and its length not."""
        return [zlib.crc32(t.blocks(np.linspace(0, t.num_tokens // 16, 64).astype(np.int64), 16).tobytes()) for t in self.tokens.values()]

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken. ValueError when that was another stream (seed, sizes, domains and their order, their tokens)."""
        for key, here in self.state_dict().items():
            if key not in ("step", "used", "weights") and state.get(key, here) != here:
                raise ValueError(f"this checkpoint is of another data stream: {key}={state.get(key)}, here {here}")
        self.step, self.used = state["step"], dict(state["used"])
        self.weights = dict(state["weights"])


def validation_batches(tokens: Tokens, block_size: int, batch_size: int, max_tokens: int | None = None, *, domain: int = 0,
                       mask_documents: bool = False) -> list[dict[str, Tensor]]:
    """The whole blocks of a held-out stream, in order, in batches as `MixtureLoader`'s; always the same, on every rank.

    What is left of the stream after the last whole block is not used; the last batch may hold fewer sequences.

    Args:
        tokens: a domain's validation.
        block_size, batch_size: L and B.
        max_tokens: at most so many tokens, rounded down to whole blocks, one block at least; None: all.
        domain: the domain's place, for the batches' `domain`.
        mask_documents: as in `MixtureLoader`.

    Raises:
        ValueError: fewer tokens than one block.
    """
    count = tokens.num_tokens // block_size
    if not count:
        raise ValueError(f"validation of domain {domain} has {tokens.num_tokens} tokens, fewer than one block: block_size={block_size}; "
                         f"use more text, or block_size <= {tokens.num_tokens}")
    if max_tokens is not None:
        count = min(count, max(max_tokens // block_size, 1))
    batches = []
    for first in range(0, count, batch_size):
        index = np.arange(first, min(first + batch_size, count))
        batches.append(_batch({"": tokens}, [""], np.zeros_like(index), index, block_size, mask_documents) | {"domain": torch.full((len(index),), domain)})
    return batches


def _batch(tokens: Mapping[str, Tokens], names: list[str], domain: np.ndarray, index: np.ndarray, size: int, mask_documents: bool) -> dict[str, Tensor]:
    ids = np.empty((len(index), size), np.int64)
    positions = np.empty_like(ids) if mask_documents else None
    for d in np.unique(domain):
        rows = domain == d
        ids[rows] = tokens[names[d]].blocks(index[rows], size)
        if mask_documents:
            positions[rows] = tokens[names[d]].positions(index[rows], size)
    input_ids = torch.from_numpy(ids)
    batch = {"input_ids": input_ids, "labels": input_ids.clone(), "domain": torch.from_numpy(domain.astype(np.int64))}
    if mask_documents:
        batch["position_ids"] = torch.from_numpy(positions)
        batch["labels"][batch["position_ids"] == 0] = AWAY
    return batch
