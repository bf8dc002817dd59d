"""Continual pre-training, from a dense checkpoint to a report: the stages of experiments/llama_moe_cpt.py.

Every stage's numbers are remembered in the run folder, so that a resumed run goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dyn import figures
from dyn.data.mixture import MixtureLoader, domain_weights, validation_batches
from dyn.data.tokens import Tokens, shard
from dyn.models.llama_moe import LlamaMoeForCausalLM, from_dense, write_card
from dyn.models.llama_moe_construct import METHODS
from dyn.models.llama_moe_convert import load_dense
from dyn.models.packaged import PACKAGED, cache_folder, packaged
from dyn.nn.surgery import count_parameters, flops_per_token
from dyn.train.callbacks import ExpertLoad, Remix, Throughput
from dyn.train.evaluate import domain_distances, overlaps, sample, seconds_per_micro_batch
from dyn.train.plan import meta_model
from dyn.train.tasks import CausalLM
from dyn.train.trainer import fit, make_trainer, world

SHOWN_LAYERS = 4  # of the overlap plot


@dataclass
class Corpus:
    """Training streams, held-out batches and weights by domain, in one order of domains."""

    train: dict[str, Tokens]
    validation: dict[str, list[dict[str, Tensor]]]
    weights: dict[str, float]


def pretrain(cfg: Any, run: Any) -> dict[str, float]:
    """Convert, train, evaluate, export; the control too where it is asked for. Returns the metrics, fills `run.cost` and `run.notes`."""
    cfg.check()
    source = packaged(cfg.model.source) if cfg.model.source in PACKAGED else cfg.model.source
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = load_corpus(cfg, run, tokenizer)
    before = run.stage("dense, untrained", lambda: _measure_dense(cfg, run, source, tokenizer, corpus))
    run.log("held-out loss of the dense model: " + _losses(before["losses"]))
    steps = before["steps"]
    if steps < cfg.steps():
        run.log(f"{cfg.minutes} minutes a training are enough for {steps} of {cfg.steps()} steps on this machine")
    result = run.stage(f"train {cfg.model.kind}", lambda: _train(cfg, run, cfg.model.kind, source, tokenizer, corpus, before, steps))
    control = None
    if cfg.dense_control:
        control = run.stage("train the dense control", lambda: _train(cfg, run, "dense", source, tokenizer, corpus, before, steps, control=True))
    return _report(cfg, run, corpus, before, result, control, steps)


def load_corpus(cfg: Any, run: Any, tokenizer: Any) -> Corpus:
    """Shard (or find) the text, check it against the model's domains and sizes, cut held-out batches."""
    data = cfg.data
    run.log(f"text: {data.text.path}")
    tokens = shard(data.text, tokenizer, str(cache_folder() / "tokens"), log=run.log)
    domains = list(tokens)
    names = [data.stand_for.get(d, d) for d in domains]
    weights = dict(zip(domains, domain_weights(data.weights, names).values(), strict=True)) if isinstance(data.weights, str) else domain_weights(data.weights, domains)
    missing = [f"{d} has no {split} documents" for d in domains for split in ("train", "validation") if split not in tokens[d]]
    if missing:
        raise ValueError(f"data.text={data.text.path}: {'; '.join(missing)}")
    validation = {d: validation_batches(tokens[d]["validation"], data.block_size, data.batch_size, data.validation_tokens, domain=i,
                                        mask_documents=data.mask_documents) for i, d in enumerate(domains)}
    train = {d: tokens[d]["train"] for d in domains}
    run.log(", ".join(f"{d} {t.num_tokens:,}" for d, t in train.items()) + " training tokens")
    return Corpus(train, validation, weights)


def _measure_dense(cfg: Any, run: Any, source: Any, tokenizer: Any, corpus: Corpus) -> dict[str, Any]:
    """The dense model's losses (references for dynamic weights) and samples, and how many steps the time budget holds."""
    net = _dense(source)
    vocabulary = net.config.vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(f"the tokenizer of {cfg.model.source} has {len(tokenizer)} entries, the model's vocab_size is {vocabulary}: they do not belong together")
    run.log(f"dense model: {count_parameters(net)['total']:,} parameters")
    load = ExpertLoad()
    losses = _validate(cfg, run, net, corpus, "dense-untrained", load)
    steps = cfg.steps()
    if cfg.minutes is not None:
        batch = next(iter(_loader(cfg, corpus, 1)))
        dtype = None if cfg.trainer.precision == "32-true" else torch.bfloat16
        # The dense model's step is the longer one; a fifth goes to the optimiser, validation within training, and noise.
        seconds = seconds_per_micro_batch(net, batch, dtype) * cfg.trainer.accumulate
        steps = max(1, min(steps, int(0.8 * 60 * cfg.minutes / seconds)))
    return {"losses": losses, "samples": sample(net, tokenizer, cfg.prompts, cfg.sample_tokens), "steps": steps}


def _train(cfg: Any, run: Any, kind: str, source: Any, tokenizer: Any, corpus: Corpus, dense: Mapping[str, Any], steps: int, control: bool = False) -> dict[str, Any]:
    """Build one network, train it for `steps`, and measure it before and after."""
    name = "dense" if kind == "dense" else "moe"
    net, built_in = _build(cfg, run, kind, source, corpus)
    counts = count_parameters(net)
    config = copy.deepcopy(cfg.trainer)
    config.max_steps, config.val_first = steps, True
    optim = copy.deepcopy(cfg.optim)
    optim.warmup_steps = min(optim.warmup_steps, max(1, steps // 4))
    config.val_every = min(config.val_every, max(1, math.ceil(steps / 2)))
    samples = sample(net, tokenizer, cfg.prompts, cfg.sample_tokens) if kind == "moe" else dense["samples"]
    load, speed = ExpertLoad(), Throughput(torch.float32 if config.precision == "32-true" else torch.bfloat16, log_every=config.log_every)
    callbacks = [load, speed]
    loader = _loader(cfg, corpus, steps * config.accumulate)
    if cfg.data.dynamic != "none" and not control:
        callbacks.append(Remix(loader, dense["losses"], rule=cfg.data.dynamic, anchor=corpus.weights if cfg.data.anchored else None))
    task = CausalLM(net, optim, total_steps=steps, domains=list(corpus.validation))
    trainer = make_trainer(config, run, callbacks, name=name)
    run.log(f"training {'the dense control' if control else name}: {steps} steps of {cfg.tokens_per_step():,} tokens, "
            f"{counts['total']:,} parameters, {counts['active']:,} activated")
    began = time.monotonic()
    fit(trainer, task, loader, corpus.validation, run)
    losses = load.losses  # of the last validation, after the last step
    run.log(f"held-out loss of the {'dense control' if control else name} after training: {_losses(losses)}")
    result = {
        "before": built_in or _first_losses(run, name, corpus) or dense["losses"], "after": losses, "samples_before": samples,
        "samples_after": sample(net, tokenizer, cfg.prompts, cfg.sample_tokens), "counts": counts, "flops": flops_per_token(net, cfg.data.block_size),
        "speed": speed.summary(), "seconds": time.monotonic() - began, "load": {d: v.tolist() for d, v in load.loads.items()},
    }
    if kind == "moe":
        result["export"] = _export(cfg, run, net, tokenizer, corpus, dense["losses"], losses)
        result["overlap"] = overlaps(net.construction.groups) if net.construction and not METHODS[net.construction.method].partition else None
    return result
