"""How an adapter experiment makes its network: which adapter, pruned how (SparseAdapter); what its rows are called and compared with."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyn.core.rounds import kept_counts
from dyn.core.saliency import Loss
from dyn.nn.adapter import adapter_parameters, attach, head_parameters
from dyn.nn.adapter_build import FLAGS
from dyn.nn.adapter_sites import adapter_modules
from dyn.nn.masking import large_sparse, mask_hash, masks, prune, set_masks
from dyn.nn.structured import dead_units
from dyn.train.settings import check_trainings, seeded_rows
from dyn.train.speed import on_device

RATES, WHOLE_RATES = [1e-4, 3e-4, 1e-3, 3e-3], [1e-5, 3e-5, 1e-4]  # of adapters, from BERT-base to MiniLM, and of full fine-tuning


@dataclass(kw_only=True, slots=True)
class SparseConfig:
    """An adapter and its pruning at initialisation; `attach` and `prune` explain the fields that they share. The defaults are the paper's: SNIP, keep 0.6."""

    kind: Literal["none", "houlsby", "pfeiffer", "parallel", "lora", "prefix", "mam"] = "houlsby"  # none: full fine-tuning
    r: int = 64
    factor: int = 1  # Large-Sparse: a bottleneck of factor x r, of which 1 / factor is kept: as many weights train as in the dense adapter of r
    method: Literal["random", "magnitude", "erdos_renyi", "snip", "grasp", "synflow"] = "snip"
    keep: float | None = 0.6  # 1: dense; with a factor null, for 1 / factor exactly
    scope: Literal["global", "local", "erdos_renyi"] = "global"
    form: Literal["mask", "flat", "unit", "2:4"] = "mask"
    shuffle: bool = False  # each mask inside its tensor: the control that tells a criterion from its layer ratios
    samples: int = 320  # training examples that scores look at
    rounds: int = 1
    by_epoch: bool = False  # the first round before the training, each other at the start of the next epoch, in place of all before the training
    rescale: bool = False  # density-corrected start (section 7.12)
    prefix: bool = False  # prune prefixes too
    fuse: bool = False  # AdapterFusion (section 1.6): then, on every task of the run, a fusion over the adapters that were trained on all of them
    official: bool = False  # the official code's placement and defaults, and as there no head is trained
    name: str = "default"
    lr: float | None = None  # of this network, in place of optim.lr; full fine-tuning wants a smaller one
    flags: dict[str, Any] = field(default_factory=dict)  # of `attach`: alpha, where, length, scale, init, layer_norm, ...

    def check(self) -> None:
        """ValueError for settings that exclude each other, before anything is loaded."""
        for name in ("r", "factor", "samples", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.kind != "none" and (self.keep is None) is (self.factor == 1):
            raise ValueError(f"keep={self.keep} with factor={self.factor}: Large-Sparse keeps 1 / factor exactly, set keep=null; without a factor give keep")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must lie in (0, 1]")
        if self.form == "2:4" and self.share() not in (1, Fraction(1, 2)):
            raise ValueError(f"keep={self.keep}, factor={self.factor}: form=2:4 keeps exactly half; set keep=0.5")
        if self.kind == "prefix" and not self.dense() and not self.prefix:
            raise ValueError(f"kind=prefix, keep={self.keep}: a prefix is all that there is to prune; set prefix=true, or keep=1")
        if self.form == "2:4" and not self.dense() and (self.rounds > 1 or "erdos_renyi" in (self.method, self.scope)):
            raise ValueError(f"form=2:4 keeps two of every four at once; rounds={self.rounds}, method={self.method}, scope={self.scope} do not go with it")
        if self.by_epoch and (self.rounds < 2 or self.form != "mask" or self.rescale or "erdos_renyi" in (self.method, self.scope)):
            raise ValueError(f"by_epoch=true spreads rounds=2 or more of form=mask over a training, without rescale and erdos_renyi; got rounds={self.rounds}, "
                             f"form={self.form}, rescale={self.rescale}, method={self.method}, scope={self.scope}")
        if self.method == "erdos_renyi" and self.scope == "local":
            raise ValueError("method=erdos_renyi is an allocation over tensors, which scope=local excludes")
        if self.fuse and self.kind not in ("houlsby", "pfeiffer", "parallel"):
            raise ValueError(f"fuse=true, kind={self.kind}: a fusion is over bottleneck adapters; allowed: houlsby, pfeiffer, parallel")
        if self.dense() and (self.shuffle or self.by_epoch):
            raise ValueError(f"{'shuffle=true permutes' if self.shuffle else 'by_epoch=true finds'} a mask, and there is none: everything is kept")
        wide = self.r * self.factor
        if self.form == "2:4" and not self.dense() and wide % 4:
            raise ValueError(f"form=2:4 takes groups of four along the bottleneck, and 4 does not divide r={wide}")
        if self.form == "unit" and self.prefix:
            raise ValueError("form=unit takes units out of bottlenecks; prefix=true names a prefix, which has none")
        if self.kind != "none" and (unknown := self.flags.keys() - FLAGS[self.kind].keys() - {"layers"}):
            raise ValueError(f"flags: {self.kind} has no flag {min(unknown)!r}; it has {', '.join(FLAGS[self.kind])}")

    def share(self) -> Fraction:
        """The share of the adapter's weights that trains."""
        return Fraction(1, self.factor) if self.keep is None else Fraction(str(self.keep))

    def dense(self) -> bool:
        """Nothing is pruned."""
        return self.kind == "none" or self.share() == 1

    def what(self) -> str:
        """The row in words: a row and its controls are found by these."""
        if self.kind == "none":
            return "full fine-tuning"
        made = [f"{self.kind} {self.r * self.factor}"]
        if not self.dense():
            share = f"1/{self.factor}" if self.keep is None else f"{self.keep:g}"
            made.append(f"{self.method.replace('_', '-')} {share}")
            usual = SparseConfig()
            scope = self.scope.replace("_", "-")
            rounds = f"{self.rounds} rounds{' by epoch' * self.by_epoch}"
            made += [text for text, wanted in ((scope, scope != "global"), (rounds, self.rounds > 1), ("shuffled", self.shuffle),
                                               ("rescaled", self.rescale), ("prefix too", self.prefix), (self.form, self.form in ("unit", "2:4")),
                                               (f"{self.samples} samples", self.samples != usual.samples)) if wanted]
        made += [f"{key} {value}" for key, value in sorted(self.flags.items())] + (["official"] if self.official else []) + (["fused"] if self.fuse else [])
        return ", ".join(made)

    def controls(self) -> list[str]:
        """Rows that this one is compared with: full fine-tuning; of a pruned adapter the dense one of its r and that of its budget; of a criterion random masks
        and its own shuffled."""
        alone = [self.members().what()] if self.fuse else []
        if self.dense():
            return [] if self.kind == "none" else ["full fine-tuning", *alone]
        plain = self.plain()
        if self.shuffle:
            return [plain.what(), dataclasses.replace(self, shuffle=False).what()]
        found = ["full fine-tuning", *alone, plain.what()]
        if self.method not in ("random", "erdos_renyi"):
            found += [self.twin().what(), dataclasses.replace(self, method="random").what(), dataclasses.replace(self, shuffle=True).what()]
        return list(dict.fromkeys(found))

    def members(self) -> SparseConfig:
        """The adapters that a fusion is over."""
        return dataclasses.replace(self, fuse=False)

    def twin(self) -> SparseConfig:
        """The dense adapter that trains about as many weights: of r x keep, rounded; of Large-Sparse exactly as many."""
        r = self.r if self.keep is None else max(1, round(self.r * self.share()))
        flags = self.flags if self.keep is None or self.prefix else self.made_flags()
        return dataclasses.replace(self.plain(), r=r, flags=flags)

    def plain(self) -> SparseConfig:
        """The dense adapter of the same r."""
        return dataclasses.replace(self, factor=1, keep=1.0, shuffle=False, rescale=False, scope="global", rounds=1, by_epoch=False, prefix=False,
                                   form="mask")

    def made_flags(self) -> dict[str, Any]:
        """Flags as attached: a prefix of mam that pruning spares is as long as r says, however wide the bottlenecks beside it, so that budgets are equal."""
        return {"length": self.r} | self.flags if self.kind == "mam" and not self.prefix and not self.dense() else self.flags


def with_controls(*rows: SparseConfig) -> list[SparseConfig]:
    """Rows, each with the dense adapter of its r, its twin, random masks, and its own shuffled."""
    return [made for row in rows for made in (row.plain(), row.twin(), row, dataclasses.replace(row, method="random"),
                                              dataclasses.replace(row, shuffle=True))]


def adapter_rows(*networks: SparseConfig, seeds: int = 3, suffix: str = "", choose: bool = False, **more: Any) -> list[dict[str, Any]]:
    """Sweep rows for so many seeds from 42, one a name; `more` as in `seeded_rows`. choose: a row tries the rates of its kind, and a tenth
    of the training examples, never reported, says which is best."""
    rows = seeded_rows("sparse", networks, range(42, 42 + seeds), suffix, **more)
    return [row | {"rates": WHOLE_RATES if row["sparse.kind"] == "none" else RATES, "data.tuning": 0.1} for row in rows] if choose else rows


def check_adapter_run(cfg: Any) -> None:
    """ValueError for settings of an adapter experiment that cannot be; `cfg` has what `dyn.train.adapt` reads."""
    check_trainings(cfg)
    if any(rate <= 0 for rate in cfg.rates) or len(set(cfg.rates)) < len(cfg.rates) or (cfg.rates and not cfg.data.tuning):
        raise ValueError(f"rates={cfg.rates} must be positive and differ, and are chosen by examples that are held out: data.tuning={cfg.data.tuning} must be "
                         "above 0")
    if any(sparse.fuse for sparse in [*cfg.beside, cfg.sparse]) and len(getattr(cfg, "tasks", [])) < 2:
        raise ValueError("fuse=true is over the adapters of several tasks: set tasks to two or more, in an experiment that has them (sparse_adapter_glue)")
    names = [sparse.what() for sparse in [*cfg.beside, cfg.sparse]]
    if len(set(names)) < len(names):
        raise ValueError(f"beside and sparse must be networks that differ, got {'; '.join(names)}")


def sparsify(net: nn.Module, cfg: SparseConfig, batches: Callable[[], Iterable[Mapping[str, Tensor]]], loss_fn: Loss, *, seed: int = 0,
             device: str | torch.device = "cpu", log: Callable[[str], None] = print) -> dict[str, Any]:
    """Attach the adapter and prune it, in place; kind "none" leaves the network as it is, all of it trained. With `by_epoch` this is the first round.

    What was drawn and kept follows from the network, the seed and the batches, so that it is found again when a run is resumed.

    Args:
        net: the network, on the CPU; it is there again afterwards.
        cfg: what to make.
        batches: gives batches of training examples, until there are `samples` of them; called where scores look at data.
        loss_fn: (network, batch) -> scalar.
        seed: of the adapter's start, of random scores, ties and shuffles.
        device: where scores are computed.
        log: gets a line.

    Returns:
        Plain facts: weights (of the adapter that could be pruned), kept of them, keep (their ratio), trained_parameters, adapter_parameters among them (kept
        weights, biases, norms), head_parameters, density (by tensor), mask (hash; "" where there is none), seconds (of attaching and pruning).

    Raises:
        ValueError: as `attach` and `prune`.
    """
    began = time.monotonic()
    if cfg.kind == "none":
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        log(f"{cfg.what()}: {trained:,} parameters are trained")
        return {"weights": 0, "kept": 0, "keep": 1.0, "trained_parameters": trained, "adapter_parameters": 0, "head_parameters": 0, "density": {}, "mask": "",
                "seconds": 0.0}
    attach(net, cfg.kind, cfg.r if cfg.keep is not None else large_sparse(cfg.r, cfg.factor).r, cfg.name, official=cfg.official, seed=seed, **cfg.made_flags())
    before = {key: p.numel() for key, p in adapter_parameters(net, cfg.name).items()}
    if not cfg.dense():
        net.to(device)
        try:
            _prune(net, cfg, 0, batches, loss_fn, seed, device)
        finally:
            net.cpu()
    facts = mask_facts(net, cfg, before) | {"seconds": time.monotonic() - began}
    dead = 0 if cfg.dense() else sum(dead_units(net).values())
    log(f"{cfg.what()}: {facts['kept']:,} of {facts['weights']:,} adapter weights train, {facts['trained_parameters']:,} parameters in all, found in "
        f"{facts['seconds']:.1f} s" + (f"; {dead:,} units of bottlenecks do nothing any more" if dead else ""))
    return facts


def round_steps(rounds: int, steps: int, epoch: float) -> list[int]:
    """Before which optimiser steps the later rounds of `by_epoch` come: one an epoch (of so many steps), closer where the training ends too early for that.

    Raises:
        ValueError: more rounds than steps.
    """
    if steps < rounds:
        raise ValueError(f"by_epoch=true: rounds={rounds} do not fit into a training of {steps} steps")
    return [math.floor(number * max(1, min(epoch, steps / rounds))) for number in range(1, rounds)]


def prune_again(net: nn.Module, cfg: SparseConfig, number: int, batches: Callable[[], Iterable[Mapping[str, Tensor]]], loss_fn: Loss,
                optimizer: torch.optim.Optimizer, *, seed: int = 0, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Round `number` (from 1) of an adapter that `sparsify` began with `by_epoch`, in place on the device where the net is: score it as it is trained by now,
    prune, and clear the moments of what went. Other arguments as there. Returns `mask_facts`."""
    _prune(net, cfg, number, batches, loss_fn, seed, device)
    set_masks(net, _own_masks(net, cfg), optimizer=optimizer)
    return mask_facts(net, cfg)


def mask_facts(net: nn.Module, cfg: SparseConfig, before: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The facts of `sparsify` about an adapter as it is. before: sizes of its parameters as they were attached; None: under masks, which do not change them."""
    now = adapter_parameters(net, cfg.name)
    before = before or {key: p.numel() for key, p in now.items()}
    matrices, found = _matrices(net, cfg), _own_masks(net, cfg)
    after = {key: int(found[key].sum()) if key in found else p.numel() for key, p in now.items()}
    weights, kept = (sum(counts[key] for key in matrices) for counts in (before, after))
    head = sum(p.numel() for p in head_parameters(net, cfg.name).values())
    return {"weights": weights, "kept": kept, "keep": kept / weights if weights else 1.0, "trained_parameters": sum(after.values()) + head,
            "adapter_parameters": sum(after.values()), "head_parameters": head, "density": {key: after[key] / before[key] for key in matrices},
            "mask": mask_hash(found) if found else ""}


def _prune(net: nn.Module, cfg: SparseConfig, number: int, batches: Callable[[], Iterable[Mapping[str, Tensor]]], loss_fn: Loss, seed: int,
           device: str | torch.device) -> None:
    """All rounds, or of those by epoch the one of this number."""
    keep, rounds = cfg.share(), cfg.rounds
    if cfg.by_epoch:
        weights = sum(net.get_parameter(key).numel() for key in _matrices(net, cfg))
        keep, rounds = Fraction(kept_counts(weights, keep, rounds)[number], weights), 1
    prune(net, _moved(batches, device), loss_fn, cfg.method, keep, cfg.scope, cfg.form, name=cfg.name, prefix=cfg.prefix, rounds=rounds,
          samples=cfg.samples, shuffle="within_tensor" if cfg.shuffle else None, rescale=cfg.rescale, seed=seed)


def _matrices(net: nn.Module, cfg: SparseConfig) -> list[str]:
    """Keys of what pruning takes."""
    return [f"{path}.{key}" for path, module in adapter_modules(net).items() if module.adapter_name == cfg.name
            and (module.kind not in ("prefix", "fusion") or cfg.prefix) for key in module.prunable]


def _own_masks(net: nn.Module, cfg: SparseConfig) -> dict[str, Tensor]:
    own = adapter_parameters(net, cfg.name)
    return {key: mask for key, mask in masks(net).items() if key in own}


def _moved(batches: Callable[[], Iterable[Mapping[str, Tensor]]], device: str | torch.device) -> Iterator[Mapping[str, Tensor]]:
    """Batches on a device, once; `batches` is called when they are read."""
    for batch in batches():
        yield on_device(batch, device)
