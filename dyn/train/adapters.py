"""Adapters on sentences, dense and pruned at initialisation, from data to a report: the stages of experiments/sparse_adapter_glue.py.

Every stage's numbers are remembered in the run folder, so that a resumed run goes on where it stopped. A run trains `cfg.sparse` on every task of `cfg.tasks`,
and for comparison the networks of `cfg.beside`, for equally many steps on the same batches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyn import figures
from dyn.core.partition import kept_count
from dyn.data.glue import DOCSTRINGS, TASKS, SentenceData
from dyn.models.packaged import sentence_classifier
from dyn.nn.adapter import attach, save_adapter
from dyn.nn.surgery import macs_per_sentence
from dyn.train import sentences
from dyn.train.encoders import EXAMPLES, NOT_IN_MEANS
from dyn.train.fit import train_classifier
from dyn.train.plan import GIB
from dyn.train.sparse import SparseConfig, sparsify
from dyn.train.trainer import check_world, world

# What a row and its control share; the rate is each row's own, chosen on examples that are not reported
SAME = ("tasks", "epochs", "batch_size", "source", "data", "rates", "optim.schedule", "optim.warmup_share", "optim.weight_decay", "trainer.accumulate",
        "trainer.precision")
CLAIMS = {"large": ("Large-Sparse above the dense adapter of the same budget on GLUE (the paper: +1.3 points on average)", "dense"),
          "pruned": ("40 % of an adapter's weights pruned by SNIP, no loss against the dense adapter on GLUE (the paper: up to +0.6 points)", "dense")}
ANSWERS = 6000  # validation examples of a task up to which a result holds what was said to each: for resampling


def train_adapters(cfg: Any, run: Any) -> dict[str, Any]:
    """Attach, prune, train, save, measure. Returns the metrics, fills `run.cost` and `run.notes`."""
    check_world(cfg.trainer)
    data = {task: sentences.open_task(cfg, run, cfg.source, task) for task in cfg.tasks}
    for caveat in (warnings := sentences.caveats(cfg.source, (d.task for d in data.values()))):
        run.log(f"warning: {caveat}")
    nets = {sparse.what(): sparse for sparse in [*cfg.beside, cfg.sparse]}
    steps = run.stage("steps", lambda: _steps(cfg, run, data, nets))
    results = {task: {what: run.stage(f"{task}-{slug(what)}", functools.partial(_train, cfg, run, data[task], task, sparse, steps[task]))
                      for what, sparse in nets.items()} for task in data}
    if world(cfg.trainer)[0]:
        return {}
    _draw(run, results)
    return _numbers(cfg, run, data, results, steps, warnings)


def slug(what: str) -> str:
    """A row's name as part of a file's."""
    return re.sub(r"[^\w.]+", "-", what)


def _made(cfg: Any, run: Any, sparse: SparseConfig, data: SentenceData) -> tuple[nn.Module, dict[str, Any]]:
    """The network as it starts, and what `sparsify` says of it; the same whenever it is made again."""
    net = sentences.build(cfg, run, cfg.source, data)
    size = min(cfg.batch_size * cfg.trainer.accumulate * cfg.trainer.world_size, len(data.train))
    facts = sparsify(net, sparse, lambda: sentences.scoring_batches(cfg, data, math.ceil(sparse.samples / size)), sentences.sentence_loss, seed=cfg.seed,
                     device="cuda" if sentences.gpu(cfg.trainer) else "cpu", log=run.log)
    return net, facts


def _steps(cfg: Any, run: Any, data: Mapping[str, SentenceData], nets: Mapping[str, SparseConfig]) -> dict[str, int]:
    first = next(iter(data.values()))
    makers = [lambda sparse=sparse: _made(cfg, run, dataclasses.replace(sparse, method="random"), first)[0] for sparse in nets.values()]
    return sentences.fitting_steps(cfg, run, {task: sentences.full_steps(cfg, len(d.train)) for task, d in data.items()}, makers, first)


# One training


def _train(cfg: Any, run: Any, data: SentenceData, task: str, sparse: SparseConfig, steps: int) -> dict[str, Any]:
    """One network on one task: its learning rate, its training, its file."""
    label = f"{task}-{slug(sparse.what())}"
    rate = cfg.full_lr if sparse.kind == "none" else cfg.optim.lr
    if cfg.rates:
        tried = {lr: run.stage(f"{label}-rate-{lr:g}", functools.partial(_tried, cfg, run, data, label, sparse, steps, lr)) for lr in cfg.rates}
        rate = max(tried, key=tried.get)
        run.log(f"{label}: learning rate {rate:g}, by the score on {len(data.tuning):,} examples that are not reported ("
                + ", ".join(f"{lr:g}: {score:.4f}" for lr, score in tried.items()) + ")")
    net, facts = _made(cfg, run, sparse, data)
    trained = _fit(cfg, run, data, label, net, steps, rate)
    result = {"what": sparse.what(), "facts": facts, "rate": rate, "scores": sentences.scores(trained.metrics, data) | {"loss": trained.metrics["val/loss"]},
              "cost": trained.cost, "optimizer_bytes": sum(8 * p.numel() for p in net.parameters() if p.requires_grad),
              "macs": macs_per_sentence(trained.net.cpu(), round(float(data.train.lengths.mean())))}
    if world(cfg.trainer)[0] == 0:
        sentences.write_answers(run.folder / "answers" / f"{label}.json", trained.answers)
        result["file_bytes"] = _file(cfg, run, label, sparse, trained.net)
        if sum(len(found.labels) for found in trained.answers.values()) <= ANSWERS:
            result["answers"] = {"metric": data.metrics[0], "predictions": [v for found in trained.answers.values() for v in found.predictions.tolist()],
                                 "labels": [v for found in trained.answers.values() for v in found.labels.tolist()]}
    return result


def _tried(cfg: Any, run: Any, data: SentenceData, label: str, sparse: SparseConfig, steps: int, rate: float) -> float:
    """The score on the tuning examples after a training at this rate."""
    part = dataclasses.replace(data, validation={"tuning": data.tuning})
    trained = _fit(cfg, run, part, f"{label}-rate-{rate:g}", _made(cfg, run, sparse, data)[0], steps, rate)
    return sentences.scores(trained.metrics, part)["score"]


def _fit(cfg: Any, run: Any, data: SentenceData, label: str, net: nn.Module, steps: int, rate: float) -> Any:
    train, validation = sentences.loaders(cfg, data, steps)
    trainer = dataclasses.replace(cfg.trainer, max_steps=steps, seed=cfg.seed)
    return train_classifier(net, train, validation, run=run, name=label, optim=dataclasses.replace(cfg.optim, lr=rate), trainer=trainer,
                            num_labels=data.num_labels, metrics=data.metrics, classify=cfg.classify)


def _file(cfg: Any, run: Any, label: str, sparse: SparseConfig, net: nn.Module) -> int:
    """Bytes of what a task needs beside the host, without its head: adapter.safetensors; the whole network where all of it was trained."""
    if sparse.kind == "none":
        return sum(p.numel() * p.element_size() for p in net.parameters())
    folder = save_adapter(net, run.folder / "export" / label, sparse.name)
    size = (Path(folder) / "adapter.safetensors").stat().st_size
    if not cfg.export:
        shutil.rmtree(folder)
    return size


# Figures, numbers


def _draw(run: Any, results: Mapping[str, Mapping[str, Any]]) -> None:
    plots, first = run.folder / "plots", next(iter(results.values()))
    if len(first) > 1:
        share = {what: (found["facts"]["trained_parameters"] / 1e6, _mean(results, what)) for what, found in first.items()}
        figures.points(plots / "score.png", share, "trained parameters, millions", "score", log=True)
        adapters = {what: (found["facts"]["keep"], _mean(results, what)) for what, found in first.items() if found["facts"]["weights"]}
        figures.points(plots / "keep.png", adapters, "keep", "score")
    for what, found in first.items():
        if found["facts"]["mask"]:
            figures.by_layer(plots / f"density-{slug(what)}.png", densities(found["facts"]["density"]), "density",
                             level={"keep": found["facts"]["keep"]})


def densities(by_tensor: Mapping[str, float]) -> dict[str, list[float]]:
    """Kept shares by matrix, a line of values over the layers for each: keys that differ in the layer's number alone are of one matrix."""
    lines: dict[str, list[float]] = {}
    for key, share in by_tensor.items():
        parts = [part for part in key.split(".") if not part.isdigit()]
        place = [part for part in parts if part in ("attention", "self", "query", "key", "value", "intermediate", "output", "ffn")]
        lines.setdefault(" ".join([*dict.fromkeys(place), *parts[-2:]]).removesuffix(" weight"), []).append(share)
    return lines


def _mean(results: Mapping[str, Mapping[str, Any]], what: str) -> float:
    """Average score over tasks, as GLUE's without WNLI."""
    tasks = [task for task in results if task != NOT_IN_MEANS] or list(results)
    return statistics.fmean(results[task][what]["scores"]["score"] for task in tasks)


def _numbers(cfg: Any, run: Any, data: Mapping[str, SentenceData], results: Mapping[str, Mapping[str, Any]], steps: Mapping[str, int],
             warnings: list[str]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    own, first, head = cfg.sparse.what(), next(iter(results.values())), ["network", "score", "keep", "trained", "file MB", "AdamW MB", "steps/s"]
    table = []
    for what, found in first.items():
        prefix, facts, rate = "" if what == own else f"{what}/", found["facts"], found["cost"].get("steps_per_second", math.nan)
        metrics |= {f"{prefix}score": _mean(results, what), f"{prefix}keep": facts["keep"]}
        for task, by_net in results.items():
            metrics |= {f"{prefix}{task}/{key}": value for key, value in by_net[what]["scores"].items()}
            metrics |= {f"{prefix}{task}/learning rate": by_net[what]["rate"], f"{prefix}{task}/mask": by_net[what]["facts"]["mask"]}
        cost = found["cost"] | {key: facts[key] for key in ("trained_parameters", "adapter_parameters", "head_parameters")} | {
            "file_bytes": found["file_bytes"], "optimizer_bytes": found["optimizer_bytes"], "seconds_scoring": facts["seconds"],
            "macs_per_example": found["macs"], "flops_per_example": 2 * found["macs"],
            "seconds_training": sum(by_net[what]["cost"]["seconds_training"] for by_net in results.values())}
        run.cost |= cost if not prefix else {what: cost}
        table.append([what, round(metrics[f"{prefix}score"], 4), round(facts["keep"], 4), facts["trained_parameters"], round(found["file_bytes"] / 1e6, 2),
                      round(found["optimizer_bytes"] / 1e6, 2), round(rate, 2)])
    metrics |= {f"train/steps/{task}": count for task, count in steps.items()}
    suffix = run.row.removeprefix(own) if run.row.startswith(own) else ""
    threads = "" if sentences.gpu(cfg.trainer) else f" on {torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)}"
    about = f"{cfg.source}, {', '.join(f'{count:,} steps on {task}' for task, count in steps.items())}, {cfg.sentences_per_step()} sentences each"
    full = cfg.source in ("google-bert/bert-base-uncased", "FacebookAI/roberta-base") and {*results, NOT_IN_MEANS} == TASKS.keys() and not cfg.minutes
    run.notes |= {
        "main": [f"{p}{key}" for key in ("score", "keep") for p in ("", *(f"{what}/" for what in first if what != own))],
        "compare": ["score"], "same": list(SAME), "controls": [name + suffix for name in cfg.sparse.controls()] if run.row else [],
        "about": [*(f"sentences: {d.what}" for d in data.values()), about + threads + (", one seed, networks side by side" if cfg.beside else ""), *warnings],
        "answers": {task: found[own]["answers"] for task, found in results.items() if "answers" in found[own]},
        "points": {"x": "keep", "y": "score"}, "claims": _claims(cfg, suffix) if run.row else [],
        "tables": {"networks of this run": [head, *table]} if cfg.beside else {},
        "not_tested": [] if full else [f"the paper's numbers are averages over GLUE with BERT-base and RoBERTa-base; here: {about}"]}
    return metrics


def _claims(cfg: Any, suffix: str) -> list[dict[str, str]]:
    sparse, usual = cfg.sparse, SparseConfig()
    if sparse.dense() or sparse.shuffle or sparse.method != usual.method:
        return []
    kind = "large" if sparse.factor > 1 else "pruned" if sparse.keep == usual.keep else None
    if kind is None:
        return []
    return [{"text": CLAIMS[kind][0], "metric": "score", "against": dataclasses.replace(sparse, factor=1, keep=1.0).what() + suffix, "wants": "higher"}]


# Plan


def plan_adapters(cfg: Any) -> dict[str, Any]:
    """What the run would be, from shapes alone. `cfg` is the Config of experiments/sparse_adapter_glue.py."""
    used = {task: min(EXAMPLES[task], cfg.data.train_limit or EXAMPLES[task]) for task in cfg.tasks if task in EXAMPLES}
    steps = {task: sentences.full_steps(cfg, count - round(cfg.data.tuning * count)) for task, count in used.items()}
    nets = [*cfg.beside, cfg.sparse]
    planned = {sparse.what(): _planned(cfg, sparse) for sparse in nets}
    training = {"steps, each network": steps or "known once the data are open", "trainings a task": len(nets) * (1 + len(cfg.rates)),
                "sentences a step": cfg.sentences_per_step(), "limit, minutes": cfg.minutes}
    return {"network": f"{cfg.source}: {'; '.join(planned)}", "training": training} | (planned if len(planned) > 1 else next(iter(planned.values())))


def _planned(cfg: Any, sparse: SparseConfig) -> dict[str, Any]:
    """Parameters, multiply-adds and memory of one network."""
    labels = max((TASKS.get(task, DOCSTRINGS).labels for task in cfg.tasks), default=2)
    with torch.device("meta"):
        net = sentence_classifier("google-bert/bert-base-uncased" if cfg.source == "tiny" else cfg.source, max(1, labels))
        total = sum(p.numel() for p in net.parameters())
        if sparse.kind != "none":
            attach(net, sparse.kind, sparse.r * sparse.factor, sparse.name, official=sparse.official, **sparse.flags)
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    matrices = sum(p.numel() for key, p in trained.items() if p.ndim > 1 and ".default." in f".{key}.".replace(f".{sparse.name}.", ".default."))
    kept = kept_count(matrices, sparse.share()) if sparse.kind != "none" else 0
    numel = sum(p.numel() for p in trained.values())
    return {"parameters": {"host": total, "trained": numel - (matrices - kept if sparse.kind != "none" else 0)},
            f"MACs a sentence of {cfg.data.max_length} tokens": macs_per_sentence(net, cfg.data.max_length),
            "memory, GiB (weights, gradients, AdamW)": round((4 * total + 12 * numel) / GIB, 2)}
