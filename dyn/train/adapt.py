"""Networks with adapters, pruned or not, on a task, from data to a report: the stages of experiments/sparse_adapter_*.py.

A run trains `cfg.sparse` and, for comparison on the same batches, the networks of `cfg.beside`; its numbers are remembered in the run folder stage by stage.
A fusion comes after its members, which are trained on all tasks first.
What is special about a task is a `Job`; a run has one, or several by name. A Config has what is read here: `seed`, `source`, `sparse`, `beside`, `rates`,
`epochs`, `minutes`, `batch_size`, `eval_batch_size`, `workers`, `export`, `optim`, `trainer`, `data`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyn import env, figures
from dyn.core.partition import kept_count
from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.nn.adapter import adapter_parameters, attach, fusion_penalty, head_parameters, load_adapter, save_adapter
from dyn.nn.masking import masks, set_masks
from dyn.train import sentences
from dyn.train.annealing import Rounds
from dyn.train.fit import Trained, scoring, train_task, warnings_in
from dyn.train.plan import GIB
from dyn.train.settings import TrainerConfig
from dyn.train.sparse import SparseConfig, mask_facts, prune_again, round_steps, sparsify
from dyn.train.supervised import Supervised
from dyn.train.trainer import check_world, on_threads, own_device, row_suffix, world

# What a row and its control share
SAME = ("source", "tasks", "epochs", "minutes", "batch_size", "data", "optim", "rates", "classify", "generate", "answer", "trainer.accumulate",
        "trainer.precision", "trainer.devices", "trainer.num_nodes")
ANSWERS = 12_000  # validation examples up to which a result holds what was said to each


class Job(NamedTuple):
    """A task, opened: its data (train, validation, tuning, what), how its network begins, its loss of a batch, and what trains and measures it.

    task: (network, names of the validation sets, their data, optimiser, trainer) -> Supervised. scores: the metrics of a validation set, the leading one first.
    answers: what was said to the examples of a set -> plain data, a list. claims: of the paper, about "pruned" and "80 %" (SNIP at keep 0.6 and 0.2) or "large"
    (Large-Sparse) -> against "dense" (the adapter of its r) or "full" (fine-tuning) -> text; tested: on these networks and data only. numbers: what was said in
    all sets -> what `dyn.verdicts.resampled` wants.
    """

    data: Any
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    task: Callable[[nn.Module, Mapping[str, Any], Any, TrainerConfig], Supervised]
    scores: tuple[str, ...]
    answers: Callable[[Any], list[Any]]
    claims: Mapping[str, Mapping[str, str]]
    tested: Mapping[str, Any]
    numbers: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    mean: bool = False  # the task's score is the mean of `scores`, as GLUE has it
    caveats: tuple[str, ...] = ()  # to be said beside results


def train_adapters(cfg: Any, run: Any, jobs: Mapping[str, Job]) -> dict[str, Any]:
    """Attach, prune, train, measure; jobs: by name, "" for the only one. Returns the metrics, fills `run.cost` and `run.notes`."""
    check_world(cfg.trainer)
    networks = {_key(sparse): sparse for sparse in [*cfg.beside, cfg.sparse]}
    members = {name: _key(sparse.members()) for name, sparse in networks.items() if sparse.fuse}
    networks = {_key(sparse.members()): sparse.members() for sparse in networks.values()} | networks
    steps = run.stage("steps", lambda: _steps(cfg, run, jobs, networks.values()))
    for task, job in jobs.items():
        for sparse in networks.values():
            _rounds(cfg, job, sparse, steps[task])  # refuses too many before anything is trained
    results: dict[str, dict[str, Any]] = {task: {} for task in jobs}
    for name, sparse in networks.items():
        for task, job in jobs.items():
            fused = {other: found[members[name]] for other, found in results.items()} if sparse.fuse else {}
            results[task][name] = _best(cfg, run, job, f"{task}-{name}".lstrip("-"), sparse, steps[task], fused)
    if world(cfg.trainer)[0]:
        return {}
    for folder in ["start", *([] if cfg.export else ["adapters"])]:
        shutil.rmtree(run.folder / folder, ignore_errors=True)  # all trainings are done
    _draw(run, jobs, results)
    return _numbers(cfg, run, jobs, results, steps)


def _best(cfg: Any, run: Any, job: Job, name: str, sparse: SparseConfig, steps: int, members: Mapping[str, Any]) -> dict[str, Any]:
    """The network trained at its rate, or at each of `cfg.rates`: the best of them on examples that are not reported. members: of a fusion, by task."""
    tried = {rate: run.stage(f"{name}-lr{rate:g}", functools.partial(_train, cfg, run, job, name, sparse, rate, steps, members))
             for rate in cfg.rates or [sparse.lr or cfg.optim.lr]}
    best = max(tried.values(), key=lambda found: (not math.isnan(found["chosen by"]), found["chosen by"]))
    if cfg.rates:
        run.log(f"{sparse.what()}: lr {best['lr']:g} is best on the examples held out for that, {job.scores[0]} "
                + ", ".join(f"{found['chosen by']:.4f} ({rate:g})" for rate, found in tried.items()))
    return best


def _key(sparse: SparseConfig) -> str:
    """A row's words as a name for files."""
    return re.sub(r"[^\w.]+", "-", sparse.what())


def _network(cfg: Any, run: Any, job: Job, sparse: SparseConfig, *, quiet: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The network as its training begins, and the facts of `sparsify`; scores look at other batches than the training's first."""
    net = job.build()
    facts = sparsify(net, sparse, functools.partial(_scored, cfg, job, sparse), job.loss, seed=cfg.seed, device=own_device(cfg.trainer),
                     log=(lambda _: None) if quiet else run.log)
    return net, facts


def _rounds(cfg: Any, job: Job, sparse: SparseConfig, steps: int) -> list[int]:
    """Before which steps rounds of pruning come."""
    return round_steps(sparse.rounds, steps, sentences.epoch_steps(cfg, len(job.data.train))) if sparse.by_epoch else []


def _scored(cfg: Any, job: Job, sparse: SparseConfig) -> ResumableLoader:
    """Batches that scores look at."""
    count = len(job.data.train)
    size, enough = min(cfg.batch_size, count), sparse.samples < count
    return ResumableLoader(job.data.train, batch_size=size, seed=cfg.seed + 1, drop_last=enough,
                           num_batches=math.ceil(sparse.samples / size) if enough else None)


def _fused(cfg: Any, run: Any, job: Job, sparse: SparseConfig, members: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A network with the adapters of all tasks, frozen, and a fusion over them, whose penalty joins the loss (section 1.6). Facts of pruning are a member's."""
    net, began = job.build(), time.monotonic()
    for task, found in members.items():
        folder = run.folder / "adapters" / found["label"]
        env.once(folder, lambda _: None, world(cfg.trainer)[0])  # rank 0 has written it, or is about to
        load_adapter(net, folder, task, head=False)
    attach(net, "fusion", name=sparse.name, head=not sparse.official, seed=cfg.seed, members=list(members))

    def penalise(module: nn.Module, _: Any, output: Any) -> None:
        if module.training:
            output.aux_loss = fusion_penalty(module, sparse.name)

    net.register_forward_hook(penalise)
    own, head = (sum(p.numel() for p in found(net, sparse.name).values()) for found in (adapter_parameters, head_parameters))
    return net, next(iter(members.values()))["facts"] | {
        "trained_parameters": own + head, "adapter_parameters": own, "head_parameters": head, "density": {}, "mask": "", "seconds": time.monotonic() - began}


def _started(cfg: Any, run: Any, job: Job, name: str, sparse: SparseConfig, members: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The same; what was pruned is kept, so that every process and a resumed run trains this mask and no other (sums of scores on GPUs differ in last bits)."""
    if sparse.fuse:
        return _fused(cfg, run, job, sparse, members)
    if sparse.dense():
        return _network(cfg, run, job, sparse)
    folder = run.folder / "start" / name

    def make(part: Path) -> None:
        with scoring(run):
            net, facts = _network(cfg, run, job, sparse)
        save_adapter(net, part / "adapter", sparse.name)
        (part / "facts.json").write_text(json.dumps(facts))

    env.once(folder, make, world(cfg.trainer)[0])
    net = load_adapter(job.build(), folder / "adapter", sparse.name)
    if sparse.form == "flat":
        set_masks(net, masks(net), "flat")
    return net, json.loads((folder / "facts.json").read_text())


def _steps(cfg: Any, run: Any, jobs: Mapping[str, Job], networks: Iterable[SparseConfig]) -> dict[str, int]:
    """Of each training, by job; masks cost the same whatever they keep."""
    first = next(iter(jobs.values()))
    nets = [functools.partial(lambda sparse: _network(cfg, run, first, sparse, quiet=True)[0], dataclasses.replace(sparse.members(), method="random"))
            for sparse in networks for _ in cfg.rates or [0]]
    wanted = {task: sentences.full_steps(cfg, len(job.data.train)) for task, job in jobs.items()}
    return sentences.fitting_steps(cfg, run, wanted, nets, first.data, first.loss)


def _train(cfg: Any, run: Any, job: Job, name: str, sparse: SparseConfig, rate: float, steps: int, members: Mapping[str, Any]) -> dict[str, Any]:
    """Build one network, prune and train it at one learning rate."""
    net, facts = _started(cfg, run, job, name, sparse, members)
    train, validation = sentences.loaders(cfg, job.data, steps)
    parts = dict(job.data.validation)
    if cfg.rates:
        parts, validation = {"tuning": job.data.tuning} | parts, {"tuning": EvaluationLoader(job.data.tuning, cfg.eval_batch_size)} | validation
    trainer = dataclasses.replace(cfg.trainer, max_steps=steps, seed=cfg.seed, val_every=min(cfg.trainer.val_every, steps))
    task = job.task(net, parts, dataclasses.replace(cfg.optim, lr=rate), trainer)
    label = f"{name}-lr{rate:g}" if cfg.rates else name
    rounds = None
    if sparse.by_epoch and not sparse.fuse:
        def prune_on(number: int, optimizer: torch.optim.Optimizer) -> float:
            with warnings_in(run):
                found = prune_again(net, sparse, number, functools.partial(_scored, cfg, job, sparse), job.loss, optimizer, seed=cfg.seed,
                                    device=own_device(cfg.trainer))
            run.log(f"{name}: round {number + 1} of {sparse.rounds}, {found['kept']:,} of {found['weights']:,} adapter weights are left")
            return found["keep"]

        rounds = Rounds(_rounds(cfg, job, sparse, steps), prune_on)
    trained = train_task(task, train, validation, run=run, name=label, callbacks=[rounds] if rounds else [])
    if rounds:
        facts = facts | mask_facts(trained.net, sparse) | {"seconds": facts["seconds"] + rounds.seconds}
    sets = [f"val/{split}/" for split in job.data.validation] if len(parts) > 1 else ["val/"]
    scores = {key: statistics.fmean(trained.metrics[f"{split}{key}"] for split in sets) for key in (*job.scores, "loss")
              if f"{sets[0]}{key}" in trained.metrics}
    scores |= {"score": statistics.fmean(scores[key] for key in job.scores)} if job.mean else {}
    chosen_by = trained.metrics[f"val/tuning/{job.scores[0]}" if cfg.rates else f"{sets[0]}{job.scores[0]}"]
    result = {"what": sparse.what(), "label": label, "lr": rate, "chosen by": chosen_by, "scores": scores, "facts": facts, "cost": trained.cost}
    if world(cfg.trainer)[0] == 0:
        result |= _keep(cfg, run, job, label, sparse, trained)
    return result


def _keep(cfg: Any, run: Any, job: Job, label: str, sparse: SparseConfig, trained: Trained) -> dict[str, Any]:
    """What was said to each example, and the adapter, as files; bytes of the adapter's file (its head lies in another), and of Adam's moments."""
    for split in job.data.validation:
        path = run.folder / "answers" / f"{label}-{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(job.answers(trained.answers[split])) + "\n")
    trainable = [p for p in trained.net.parameters() if p.requires_grad]
    numbers = job.numbers({split: trained.answers[split] for split in job.data.validation})
    numbers = numbers if len(numbers["labels"]) <= ANSWERS else {"limit": ANSWERS}
    sizes = {"optimizer bytes": 8 * sum(p.numel() for p in trainable), "numbers": numbers}
    if sparse.kind == "none":
        if cfg.export:
            trained.net.save_pretrained(run.folder / "export" / label)
        return sizes | {"file bytes": sum(p.numel() * p.element_size() for p in trainable)}
    folder = save_adapter(trained.net.cpu(), run.folder / "adapters" / label, sparse.name)
    return sizes | {"file bytes": (folder / "adapter.safetensors").stat().st_size}


def _lead(jobs: Mapping[str, Job]) -> str:
    """The metric that a run is read by: the only job's leading one, or the mean score of several."""
    return jobs[""].scores[0] if "" in jobs else "score"


def _draw(run: Any, jobs: Mapping[str, Job], results: Mapping[str, Mapping[str, Any]]) -> None:
    plots, lead, first = run.folder / "plots", _lead(jobs), next(iter(results.values()))
    if len(first) > 1:
        scores = {name: sentences.mean_score(results, name, lead) for name in first}
        figures.points(plots / "score.png", {found["what"]: (found["facts"]["trained_parameters"], scores[name]) for name, found in first.items()},
                       "trained parameters", lead, log=True)
        if keeps := {found["what"]: (found["facts"]["keep"], scores[name]) for name, found in first.items() if found["facts"]["weights"]}:
            figures.points(plots / "keep.png", keeps, "keep", lead)
    for name, found in first.items():
        if found["facts"]["mask"]:
            figures.by_layer(plots / f"density-{name}.png", densities(found["facts"]["density"]), "density", level={"keep": found["facts"]["keep"]})


def densities(by_tensor: Mapping[str, float]) -> dict[str, list[float]]:
    """Kept shares by matrix, a line of values over the layers for each: keys that differ in the layer's number alone are of one matrix."""
    lines: dict[str, list[float]] = {}
    for key, share in by_tensor.items():
        parts = [part for part in key.split(".") if not part.isdigit()]
        place = [part for part in parts if part in ("attention", "self", "query", "key", "value", "intermediate", "output", "ffn", "crossattention")]
        lines.setdefault(" ".join([*dict.fromkeys(place), *parts[-2:]]).removesuffix(" weight"), []).append(share)
    return lines


def _numbers(cfg: Any, run: Any, jobs: Mapping[str, Job], results: Mapping[str, Mapping[str, Any]], steps: Mapping[str, int]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    main, lead, first = _key(cfg.sparse), _lead(jobs), next(iter(results.values()))
    for name, found in first.items():
        prefix, facts, cost = "" if name == main else f"{name}/", found["facts"], dict(found["cost"])
        metrics |= {f"{prefix}{lead}": sentences.mean_score(results, name, lead)}
        for task, by_net in results.items():
            inner = f"{prefix}{task}/" if task else prefix
            metrics |= {f"{inner}{key}": value for key, value in by_net[name]["scores"].items()} | {f"{inner}learning rate": by_net[name]["lr"]}
        metrics |= {f"{prefix}keep": facts["keep"], f"{prefix}trained parameters": facts["trained_parameters"], f"{prefix}file bytes": found["file bytes"]}
        metrics |= {f"{prefix}density": list(facts["density"].values())} if facts["density"] else {}
        cost |= {key: facts[key] for key in ("weights", "kept", "trained_parameters", "adapter_parameters", "head_parameters", "mask")}
        cost |= {"seconds_pruning": facts["seconds"], "file_bytes": found["file bytes"], "optimizer_bytes": found["optimizer bytes"],
                 "seconds_training": sum(by_net[name]["cost"]["seconds_training"] for by_net in results.values())}
        cost |= {"seconds_per_step": 1 / cost["steps_per_second"]} if cost.get("steps_per_second") else {}
        run.cost |= {name: cost} if prefix else cost
    metrics |= {f"train/steps/{task}".rstrip("/"): count for task, count in steps.items()}
    what = cfg.sparse.what()
    suffix = row_suffix(run, what)
    size = cfg.batch_size * cfg.trainer.accumulate * cfg.trainer.world_size
    counts = ", ".join(f"{count:,} steps of {size}{f' on {task}' if task else ''}" for task, count in steps.items())
    about = f"{cfg.source}, {counts}{on_threads(cfg.trainer)}{', one seed, networks side by side' if cfg.beside else ''}"
    job = next(iter(jobs.values()))
    against = {"dense": dataclasses.replace(cfg.sparse, keep=1.0, factor=1).what() + suffix, "full": SparseConfig(kind="none").what() + suffix}
    claims = job.claims.get(_claimed(cfg.sparse) or "", {}) if run.row else {}
    tested = all(getattr(cfg, key, getattr(cfg.data, key, None)) == value for key, value in job.tested.items())
    tested = tested and not cfg.data.train_limit and cfg.minutes is None
    run.notes |= {
        "main": [f"{p}{key}" for key in (lead, "keep", "trained parameters") for p in ("", *(f"{_key(s)}/" for s in cfg.beside))],
        "compare": [lead], "same": [key for key in SAME if hasattr(cfg, key.split(".")[0])],
        "controls": [name + suffix for name in cfg.sparse.controls()] if run.row else [],
        "about": [*(f"{task}: {job.data.what}".lstrip(": ") for task, job in jobs.items()), about, *(text for job in jobs.values() for text in job.caveats)],
        "points": {"x": "keep", "y": lead},
        "answers": {task or lead: found for task, by_net in results.items() if (found := by_net[main]["numbers"])},
        "claims": [{"text": text, "metric": lead, "against": against[other], "wants": "higher"} for other, text in claims.items()],
        "not_tested": [] if tested else [f"the paper's claims are about {job.tested['source']} on {job.tested['path']}; here: {about}"]}
    return metrics


def _claimed(sparse: SparseConfig) -> str | None:
    """Which of the paper's claims a row is about."""
    if sparse.dense() or sparse.fuse or sparse.shuffle or sparse.method != "snip":
        return None
    return "large" if sparse.factor > 1 else {0.6: "pruned", 0.2: "80 %"}.get(sparse.keep)


def plan_adapters(cfg: Any, build: Callable[[], nn.Module], examples: int | None, unit: str) -> dict[str, Any]:
    """What the run would be, from shapes alone: of the run's own network, and how long."""
    sparse = cfg.sparse
    with torch.device("meta"):
        net = build()
        total = sum(p.numel() for p in net.parameters())
        facts = sparsify(net, dataclasses.replace(sparse.members(), keep=1.0, factor=1, r=sparse.r * sparse.factor, shuffle=False,
                                              flags=sparse.members().made_flags()), list, lambda *_: None,
                         device="meta", log=lambda _: None)
    pruned = facts["weights"] - kept_count(facts["weights"], sparse.share()) if facts["weights"] else 0
    trained = facts["trained_parameters"] - pruned
    networks = {net.what() for one in [*cfg.beside, sparse] for net in (one.members(), one)}
    held = trained if sparse.form in ("flat", "unit") else facts["trained_parameters"]  # under a mask gradients and moments are dense
    whole = total + facts["adapter_parameters"]
    steps = None if examples is None else sentences.full_steps(cfg, examples)
    return {
        "network": f"{sparse.what()}, {cfg.source}",
        "parameters": {"network": whole, "adapter weights": facts["weights"], "kept": facts["weights"] - pruned, "trained": trained,
                       "of them in the head": facts["head_parameters"]},
        "training": {unit: examples or f"known once {cfg.data.path} is open", "a step": cfg.batch_size * cfg.trainer.accumulate * cfg.trainer.world_size,
                     "steps": steps or f"known once {cfg.data.path} is open", "networks": len(networks),
                     "rates": len(cfg.rates or [0]), "devices": cfg.trainer.world_size},
        "memory, GiB a device (estimate, without activations)": {"weights": round(4 * whole / GIB, 2), "gradients and moments": round(12 * held / GIB, 2)},
    }
