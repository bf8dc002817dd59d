"""Batches of labelled examples, images or sentences: orders, augmentation and resume that follow from (seed, epoch, index) alone.

B examples a batch, W processes (world_size), N examples in all.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_POOL = 50  # global batches whose examples are sorted by length together: long enough to pad little, short enough to stay random
AWAY = -100  # a label that does not count (torch's ignore_index): a token that the loss leaves out, or a row that only fills a batch up


class Draw(NamedTuple):
    """What augmentation may depend on, beside the example's index."""

    seed: int
    epoch: int


class Examples(Protocol):
    """A data set that gives whole batches."""

    def __len__(self) -> int: ...

    def batch(self, index: np.ndarray, draw: Draw | None) -> dict[str, Tensor]:
        """Examples `index` (int64 [B]) with `labels` [B]; augmented as `draw` says, not at all for None."""
        ...


def uniform(draw: Draw, index: np.ndarray, count: int) -> np.ndarray:
    """Random numbers in [0, 1), float64 [B, count], of which each row follows from (seed, epoch, its index): whoever draws it, whenever.

    A counter put through SplitMix64's finaliser twice; for augmentation, not for cryptography.
    """
    key = np.random.Generator(np.random.PCG64([draw.seed, draw.epoch, 0x6C6F61])).integers(0, 2**63, dtype=np.uint64)
    row = _scatter(np.asarray(index, np.int64).astype(np.uint64) ^ key)
    bits = _scatter(row[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scatter(bits: np.ndarray) -> np.ndarray:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


@contextlib.contextmanager
def seeded(draw: Draw, index: int) -> Iterator[None]:
    """Torch's, numpy's and python's global generators set by (seed, epoch, index) inside, put back afterwards: for transforms that draw from them."""
    seed = int(uniform(draw, np.array([index]), 1)[0, 0] * 2**32)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch every device
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def carve(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The places 0 .. count - 1 in two parts, both in ascending order: (kept, taken away); round(share x count) are taken, by seed.

    Raises:
        ValueError: a share outside [0, 1), or one that leaves either part empty (0 takes nothing and is allowed).
    """
    taken = round(share * count)
    if not 0 <= share < 1 or taken == count or (share > 0 and not taken):
        raise ValueError(f"a share of {share} of {count} examples cannot be held out: it must lie in [0, 1) and leave some on both sides")
    order = np.random.Generator(np.random.PCG64([seed, 0x637276])).permutation(count)
    return np.sort(order[taken:]), np.sort(order[:taken])


def chosen(count: int, limit: int | None, seed: int, salt: int) -> np.ndarray:
    """At most `limit` (None: all) of the places 0 .. count - 1, in ascending order, by (seed, salt)."""
    return np.sort(np.random.Generator(np.random.PCG64([seed, salt])).permutation(count)[:limit])


def batches_per_epoch(count: int, batch_size: int, world_size: int = 1, drop_last: bool = True) -> int:
    """How many batches each process gets of one pass over `count` examples."""
    whole = batch_size * world_size
    return count // whole if drop_last else -(-count // whole)


class ResumableLoader:
    """Training batches: an endless row of epochs, of which one iteration gives `num_batches`.

    The order of an epoch follows from (seed, epoch), augmentation from (seed, epoch, index), so neither workers nor interruptions can change what is trained
    on; the state is the number of batches given out. All processes plan the same global batches of B x W examples and take every W-th example of each.

    Batches: what the data give, and `index` [B] int64, the examples' places.

    Args:
        data: the examples.
        batch_size: B, of one process.
        num_batches: batches an iteration; None: one epoch.
        seed: of orders and augmentation.
        lengths: [N]; group examples of similar length into batches, in random order (less padding). None: no grouping.
        drop_last: leave out each epoch's last examples that fill no global batch; else the last one is smaller (on several processes filled up to equal
            parts with examples from the epoch's beginning).
        rank, world_size: this process's part.
        workers: processes that prepare batches; 0: this one.

    Raises:
        ValueError: sizes below 1, a negative seed, a rank outside the world, lengths that do not fit, too few examples for one batch.
    """

    def __init__(self, data: Examples, *, batch_size: int, seed: int, num_batches: int | None = None, lengths: Sequence[int] | np.ndarray | None = None,
                 drop_last: bool = True, rank: int = 0, world_size: int = 1, workers: int = 0) -> None:
        for name, value in {"batch_size": batch_size, "num_batches": 1 if num_batches is None else num_batches, "world_size": world_size}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, value in {"seed": seed, "workers": workers}.items():
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie in 0 .. world_size - 1 = {world_size - 1}")
        if lengths is not None and len(lengths) != len(data):
            raise ValueError(f"{len(lengths)} lengths for {len(data)} examples")
        self.data, self.batch_size, self.seed, self.drop_last = data, batch_size, seed, drop_last
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.per_epoch = batches_per_epoch(len(data), batch_size, world_size, drop_last)
        if not self.per_epoch:
            raise ValueError(f"{len(data)} training examples do not fill one batch of batch_size={batch_size} on {world_size} processes")
        self.num_batches = self.per_epoch if num_batches is None else num_batches
        self.step = 0
        self._planned: tuple[int, list[np.ndarray]] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The rest of the current `num_batches`, from the current state on."""
        steps = range(self.step, self.step - self.step % self.num_batches + self.num_batches)
        for batch in _prepared(self.data, _Plan(self, steps), self.workers, self.seed):
            self.step += 1
            yield batch

    def indices(self, step: int) -> np.ndarray:
        """This process's examples of batch `step` (from 0): int64 [B]."""
        epoch, place = divmod(step, self.per_epoch)
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        return self._planned[1][place][self.rank :: self.world_size]

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """The global batches of an epoch."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order, whole = generator.permutation(len(self.data)), self.batch_size * self.world_size
        if self.drop_last:
            order = order[: self.per_epoch * whole]
        elif missing := -len(order) % self.world_size:
            order = np.concatenate([order, np.resize(order, missing)])
        if self.lengths is not None:  # the last batch of the last pool is the incomplete one
            pools = [order[i : i + _POOL * whole] for i in range(0, len(order), _POOL * whole)]
            order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = [order[i : i + whole] for i in range(0, len(order), whole)]
        return batches if self.lengths is None else [batches[i] for i in generator.permutation(len(batches))]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: where the row of batches stands, and of which row it speaks."""
        return {"step": self.step, "seed": self.seed, "examples": len(self.data), "global_batch": self.batch_size * self.world_size,
                "grouped": self.lengths is not None, "drop_last": self.drop_last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. ValueError when that was another row of batches."""
        for key, here in self.state_dict().items():
            if key != "step" and state.get(key) != here:
                raise ValueError(f"this checkpoint is of another row of batches: {key}={state.get(key)}, here {here}")
        self.step = state["step"]


class EvaluationLoader:
    """All examples, once and in order, without augmentation; the last batch may be smaller.

    Batches as `ResumableLoader`'s. `shard` gives a process's part.

    Args:
        data: the examples.
        batch_size: of one process.
        workers: as in `ResumableLoader`.

    Raises:
        ValueError: no examples, or a size below 1.
    """

    def __init__(self, data: Examples, batch_size: int, workers: int = 0) -> None:
        if batch_size < 1 or not len(data):
            raise ValueError(f"batch_size={batch_size} must be at least 1, and there must be examples to evaluate on: {len(data)}")
        self.data, self.batch_size, self.workers = data, batch_size, workers
        self.rank, self.world_size = 0, 1

    def shard(self, rank: int, world_size: int) -> EvaluationLoader:
        """Every `world_size`-th batch from the `rank`-th on; as many on each process: where one is missing, a batch whose labels say that it does not count
        (-100, NaN for real-valued labels)."""
        part = EvaluationLoader(self.data, self.batch_size, self.workers)
        part.rank, part.world_size = rank, world_size
        return part

    def __len__(self) -> int:
        return batches_per_epoch(len(self.data), self.batch_size, self.world_size, drop_last=False)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """See the class."""
        starts = range(self.rank * self.batch_size, len(self.data), self.batch_size * self.world_size)
        plan = [(np.arange(start, min(start + self.batch_size, len(self.data))), None) for start in starts]
        yield from _prepared(self.data, plan, self.workers, 0)
        if len(plan) < len(self):
            yield blank(_prepare(self.data, (np.arange(1), None)))


def blank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with labels that say: this does not count."""
    labels = batch["labels"]
    return {**batch, "labels": torch.full_like(labels, float("nan") if labels.is_floating_point() else AWAY)}


def counts(labels: Tensor) -> Tensor:
    """Which rows count, bool [B]: those that are not of a `blank` batch."""
    return ~labels.isnan() if labels.is_floating_point() else labels != AWAY


class _Plan(Sequence):
    """(indices, draw) of the steps of a loader, worked out when asked for."""

    def __init__(self, loader: ResumableLoader, steps: range) -> None:
        self.loader, self.steps = loader, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> tuple[np.ndarray, Draw]:
        step = self.steps[place]
        return self.loader.indices(step), Draw(self.loader.seed, step // self.loader.per_epoch)


class _Prepared(Dataset):
    """For torch's workers: an item is a whole batch."""

    def __init__(self, data: Examples, plan: Sequence[tuple[np.ndarray, Draw | None]]) -> None:
        self.data, self.plan = data, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, place: int) -> dict[str, Tensor] | ValueError:
        try:
            return _prepare(self.data, self.plan[place])
        except ValueError as error:  # what it says of the data; raised in a worker it would be buried in a traceback
            return error


def _prepare(data: Examples, planned: tuple[np.ndarray, Draw | None]) -> dict[str, Tensor]:
    index, draw = planned
    return {**data.batch(index, draw), "index": torch.from_numpy(index.astype(np.int64))}


def _prepared(data: Examples, plan: Sequence[tuple[np.ndarray, Draw | None]], workers: int, seed: int) -> Iterator[dict[str, Tensor]]:
    pinned = torch.cuda.is_initialized()  # the training is on a GPU: copies out of pinned memory need not wait
    if not workers:
        for place in range(len(plan)):  # not over the plan: a sequence is iterated until IndexError
            batch = _prepare(data, plan[place])
            yield {name: tensor.pin_memory() for name, tensor in batch.items()} if pinned else batch
        return
    # Its own generator: a DataLoader would otherwise draw the workers' seed from the training's random stream. Forked, as Python 3.14 no longer does by itself:
    # workers come anew every epoch, and would import everything again.
    for batch in DataLoader(_Prepared(data, plan), batch_size=None, shuffle=False, num_workers=workers, pin_memory=pinned,
                            generator=torch.Generator().manual_seed(seed), multiprocessing_context="fork" if sys.platform == "linux" else None):
        if isinstance(batch, ValueError):
            raise batch
        yield batch
