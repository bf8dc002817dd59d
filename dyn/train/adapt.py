"""Networks with adapters, pruned or not, on a task, from data to a report: the stages of experiments/sparse_adapter_*.py.

A run trains `cfg.sparse` and, for comparison on the same batches, the networks of `cfg.beside`; its numbers are remembered in the run folder stage by stage.
What is special about a task is a `Job`. A Config has what is read here: `seed`, `source`, `sparse`, `beside`, `rates`, `epochs`, `minutes`, `batch_size`,
`eval_batch_size`, `workers`, `export`, `optim`, `trainer`, `data`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyn import figures
from dyn.core.partition import kept_count
from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.nn.adapter import save_adapter
from dyn.train import sentences
from dyn.train.fit import Trained, train_task
from dyn.train.plan import GIB
from dyn.train.settings import TrainerConfig
from dyn.train.sparse import SparseConfig, sparsify
from dyn.train.supervised import Supervised
from dyn.train.trainer import check_world, world

# What a row and its control share
SAME = ("source", "epochs", "batch_size", "rates", "data", "optim", "trainer.accumulate", "trainer.precision")


class Job(NamedTuple):
    """A task, opened: its data (train, validation, tuning, what), how its network begins, its loss of a batch, and what trains and measures it.

    task: (network, names of the validation sets, their data, optimiser, trainer) -> Supervised. scores: the metrics of a validation set, the leading one first.
    answer: what was said to an example -> plain data. claim: of the paper, about SNIP at keep 0.6 against the dense adapter; tested: on these networks and
    data only.
    """

    data: Any
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    task: Callable[[nn.Module, Mapping[str, Any], Any, TrainerConfig], Supervised]
    scores: tuple[str, ...]
    answer: Callable[[Any], Mapping[str, Any]]
    claim: str
    tested: Mapping[str, str]


def train_adapters(cfg: Any, run: Any, job: Job) -> dict[str, Any]:
    """Attach, prune, train, measure. Returns the metrics, fills `run.cost` and `run.notes`."""
    check_world(cfg.trainer)
    networks = {_key(sparse): sparse for sparse in [*cfg.beside, cfg.sparse]}
    steps = run.stage("steps", lambda: _steps(cfg, run, job, networks.values()))
    results = {}
    for name, sparse in networks.items():
        tried = {rate: run.stage(f"{name}-lr{rate:g}", functools.partial(_train, cfg, run, job, name, sparse, rate, steps))
                 for rate in cfg.rates or [cfg.optim.lr]}
        results[name] = max(tried.values(), key=lambda found: found["chosen by"])
        if cfg.rates:
            run.log(f"{sparse.what()}: lr {results[name]['lr']:g} is best on the examples held out for that, {job.scores[0]} "
                    + ", ".join(f"{found['chosen by']:.4f} ({rate:g})" for rate, found in tried.items()))
    if world(cfg.trainer)[0]:
        return {}
    _draw(run, job, results)
    return _numbers(cfg, run, job, results, steps)


def _key(sparse: SparseConfig) -> str:
    """A row's words as a name for files."""
    return re.sub(r"[^\w.]+", "-", sparse.what())


def _network(cfg: Any, run: Any, job: Job, sparse: SparseConfig, *, quiet: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The network as its training begins, and the facts of `sparsify`; scores look at other batches than the training's first."""
    net = job.build()
    size = min(cfg.batch_size, len(job.data.train))
    batches = lambda: ResumableLoader(job.data.train, batch_size=size, seed=cfg.seed + 1, num_batches=math.ceil(sparse.samples / size))  # noqa: E731
    facts = sparsify(net, sparse, batches, job.loss, seed=cfg.seed, device="cuda" if sentences.gpu(cfg.trainer) else "cpu",
                     log=(lambda _: None) if quiet else run.log)
    return net, facts


def _steps(cfg: Any, run: Any, job: Job, networks: Iterable[SparseConfig]) -> int:
    """Of each training; masks cost the same whatever they keep."""
    nets = [functools.partial(lambda sparse: _network(cfg, run, job, sparse, quiet=True)[0], dataclasses.replace(sparse, method="random"))
            for sparse in networks for _ in cfg.rates or [0]]
    wanted = {"task": sentences.full_steps(cfg, len(job.data.train))}
    return sentences.fitting_steps(cfg, run, wanted, nets, job.data, job.loss)["task"]


def _train(cfg: Any, run: Any, job: Job, name: str, sparse: SparseConfig, rate: float, steps: int) -> dict[str, Any]:
    """Build one network, prune and train it at one learning rate."""
    net, facts = _network(cfg, run, job, sparse)
    train, validation = sentences.loaders(cfg, job.data, steps)
    parts = dict(job.data.validation)
    if cfg.rates:
        parts, validation = {"tuning": job.data.tuning} | parts, {"tuning": EvaluationLoader(job.data.tuning, cfg.eval_batch_size)} | validation
    trainer = dataclasses.replace(cfg.trainer, max_steps=steps, seed=cfg.seed, val_every=min(cfg.trainer.val_every, steps))
    task = job.task(net, parts, dataclasses.replace(cfg.optim, lr=rate), trainer)
    label = f"{name}-lr{rate:g}" if cfg.rates else name
    trained = train_task(task, train, validation, run=run, name=label)
    sets = [f"val/{split}/" for split in job.data.validation] if len(parts) > 1 else ["val/"]
    scores = {key: statistics.fmean(trained.metrics[f"{split}{key}"] for split in sets) for key in (*job.scores, "loss")
              if f"{sets[0]}{key}" in trained.metrics}
    chosen_by = trained.metrics[f"val/tuning/{job.scores[0]}" if cfg.rates else f"{sets[0]}{job.scores[0]}"]
    result = {"what": sparse.what(), "lr": rate, "chosen by": chosen_by, "scores": scores, "facts": facts, "cost": trained.cost}
    if world(cfg.trainer)[0] == 0:
        result |= _keep(cfg, run, job, label, sparse, trained)
    return result


def _keep(cfg: Any, run: Any, job: Job, label: str, sparse: SparseConfig, trained: Trained) -> dict[str, Any]:
    """What was said to each example, and the adapter, as files; sizes in bytes of what a task needs beside its host, and of Adam's moments."""
    for split in job.data.validation:
        path = run.folder / "answers" / f"{label}-{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([job.answer(said) for said in trained.answers[split]]) + "\n")
    trainable = [p for p in trained.net.parameters() if p.requires_grad]
    sizes = {"optimizer bytes": 8 * sum(p.numel() for p in trainable)}
    if sparse.kind == "none":
        if cfg.export:
            trained.net.save_pretrained(run.folder / "export" / label)
        return sizes | {"file bytes": sum(p.numel() * p.element_size() for p in trainable)}
    folder = save_adapter(trained.net.cpu(), run.folder / "adapters" / label, sparse.name)
    sizes |= {"file bytes": (folder / "adapter.safetensors").stat().st_size}
    if not cfg.export:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return sizes


def _draw(run: Any, job: Job, results: Mapping[str, Mapping[str, Any]]) -> None:
    plots, lead = run.folder / "plots", job.scores[0]
    if len(results) > 1:
        points = {result["what"]: (result["facts"]["trained_parameters"], result["scores"][lead]) for result in results.values()}
        figures.points(plots / "score.png", points, "trained parameters", lead)
    if density := {result["what"]: list(result["facts"]["density"].values()) for result in results.values() if result["facts"]["mask"]}:
        figures.by_layer(plots / "density.png", density, "kept share, matrix by matrix")


def _numbers(cfg: Any, run: Any, job: Job, results: Mapping[str, Mapping[str, Any]], steps: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    main, lead = _key(cfg.sparse), job.scores[0]
    for name, result in results.items():
        prefix, facts, cost = "" if name == main else f"{name}/", result["facts"], result["cost"]
        metrics |= {f"{prefix}{key}": value for key, value in result["scores"].items()}
        metrics |= {f"{prefix}keep": facts["keep"], f"{prefix}trained parameters": facts["trained_parameters"], f"{prefix}file bytes": result["file bytes"],
                    f"{prefix}learning rate": result["lr"]}
        metrics |= {f"{prefix}density": list(facts["density"].values())} if facts["density"] else {}
        cost |= {key: facts[key] for key in ("weights", "kept", "adapter_parameters", "head_parameters", "mask")}
        cost |= {"seconds_pruning": facts["seconds"], "optimizer_bytes": result["optimizer bytes"]}
        cost |= {"seconds_per_step": 1 / cost["steps_per_second"]} if cost.get("steps_per_second") else {}
        run.cost |= {name: cost} if prefix else cost
    metrics["train/steps"] = steps
    what = cfg.sparse.what()
    suffix = run.row.removeprefix(what) if run.row.startswith(what) else ""
    size = cfg.batch_size * cfg.trainer.accumulate * cfg.trainer.world_size
    threads = "" if sentences.gpu(cfg.trainer) else f" on {torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)}"
    about = f"{cfg.source}, {steps:,} steps of {size}{threads}{', one seed, networks side by side' if cfg.beside else ''}"
    dense = dataclasses.replace(cfg.sparse, keep=1.0, factor=1)
    claimed = run.row and not cfg.sparse.dense() and not cfg.sparse.shuffle and cfg.sparse.method == "snip" and cfg.sparse.keep == 0.6
    tested = cfg.source == job.tested["source"] and cfg.data.path == job.tested["path"] and not cfg.data.train_limit and cfg.minutes is None
    run.notes |= {
        "main": [f"{p}{key}" for key in (lead, "keep", "trained parameters") for p in ("", *(f"{_key(s)}/" for s in cfg.beside))],
        "compare": [lead], "same": list(SAME), "controls": [name + suffix for name in cfg.sparse.controls()] if run.row else [],
        "about": [job.data.what, about], "points": {"x": "trained parameters", "y": lead},
        "claims": [{"text": job.claim, "metric": lead, "against": dense.what() + suffix, "wants": "higher"}] if claimed else [],
        "not_tested": [] if tested else [f"the paper's claim ({job.claim}) is about {job.tested['source']} on {job.tested['path']}; here: {about}"]}
    return metrics


def plan_adapters(cfg: Any, build: Callable[[], nn.Module], examples: int | None, unit: str) -> dict[str, Any]:
    """What the run would be, from shapes alone: of the run's own network, and how long."""
    sparse = cfg.sparse
    with torch.device("meta"):
        net = build()
        total = sum(p.numel() for p in net.parameters())
        facts = sparsify(net, dataclasses.replace(sparse, keep=1.0, factor=1, r=sparse.r * sparse.factor, shuffle=False), list, lambda *_: None,
                         device="meta", log=lambda _: None)
    pruned = facts["weights"] - kept_count(facts["weights"], sparse.share()) if facts["weights"] else 0
    trained = facts["trained_parameters"] - pruned
    held = trained if sparse.form in ("flat", "unit") else facts["trained_parameters"]  # under a mask gradients and moments are dense
    whole = total + facts["adapter_parameters"]
    steps = None if examples is None else sentences.full_steps(cfg, examples)
    return {
        "network": f"{sparse.what()}, {cfg.source}",
        "parameters": {"network": whole, "adapter weights": facts["weights"], "kept": facts["weights"] - pruned, "trained": trained,
                       "of them in the head": facts["head_parameters"]},
        "training": {unit: examples or f"known once {cfg.data.path} is open", "a step": cfg.batch_size * cfg.trainer.accumulate * cfg.trainer.world_size,
                     "steps": steps or f"known once {cfg.data.path} is open", "networks": 1 + len(cfg.beside), "rates": len(cfg.rates or [0]),
                     "devices": cfg.trainer.world_size},
        "memory, GiB a device (estimate, without activations)": {"weights": round(4 * whole / GIB, 2), "gradients and moments": round(12 * held / GIB, 2)},
    }
