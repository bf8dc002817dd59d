"""Static, MoE and partially dynamic MoE encoders on sentences, from data to a report: the stages of experiments/padnet_bert_glue.py.

Every stage's numbers are remembered in the run folder, so that a resumed run goes on where it stopped. A run trains `cfg.model` on every task of `cfg.tasks`,
and for comparison the networks of `cfg.beside`, for equally many steps on the same batches.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import shutil
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from dyn import env, figures
from dyn.data.glue import DOCSTRINGS, EXAMPLES, NOT_IN_MEANS, TASKS, SentenceData, SentenceSet
from dyn.models.encoder import make_moe, moe_layers
from dyn.models.packaged import sentence_classifier, with_places
from dyn.nn.bank import Banked
from dyn.nn.experts import check_gate
from dyn.nn.surgery import compact, dynamic_shares, macs_per_sentence
from dyn.train import sentences
from dyn.train.fit import Trained, scoring, train_classifier
from dyn.train.padnet import by_method, compare_forms, first_batches, forms_to_time, overall, partition, partition_at_random, planned_parameters
from dyn.train.plan import GIB
from dyn.train.trainer import check_world, on_threads, own_device, row_suffix, world

# What a row and its control share
SAME = ("tasks", "epochs", "minutes", "batch_size", "model.source", "data", "optim", "classify", "trainer.accumulate", "trainer.precision", "trainer.devices",
        "trainer.num_nodes")
CLAIM = "fully dynamic (MoE) BERT on GLUE: 1.9 points less average score than with 50 % dynamic parameters (the paper's abstract)"


def train_encoders(cfg: Any, run: Any) -> dict[str, Any]:
    """Partition, train, compact, measure. Returns the metrics, fills `run.cost` and `run.notes`."""
    check_world(cfg.trainer)
    check_gate(cfg.model.num_experts, cfg.model.num_experts_per_tok, cfg.model.gate, False, "importance_load", where="model.gate")
    # The docstring task under its own name.
    data = {found.task: found for task in cfg.tasks for found in (sentences.open_task(cfg, run, cfg.model.source, task, "model.source"),)}
    for caveat in (warnings := sentences.caveats(cfg.model.source, data)):
        run.log(f"warning: {caveat}")
    models = by_method(cfg.model, cfg.beside)
    first = next(iter(data.values()))
    precision = run.stage("precision", lambda: sentences.faster_precision(cfg, run, lambda: build(cfg, run, next(iter(models.values())), first), first))
    cfg = dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, precision=precision))
    steps = run.stage("steps", lambda: _steps(cfg, run, data, models))
    for task in data:  # all before the first training, since several processes only meet there, and one of them does this
        for name, model in models.items():
            if model.method == "pad":
                env.once(run.folder / "start" / f"{task}-{name}", functools.partial(_partition, cfg, run, data[task], model), world(cfg.trainer)[0])
    results: dict[str, dict[str, Any]] = {task: {} for task in data}
    for task, found in results.items():
        for name, model in models.items():
            found[name] = run.stage(f"{task}-{name}", functools.partial(_train, cfg, run, data[task], task, name, model, steps[task]))
            gc.collect()  # trainers and their networks hold each other
    if world(cfg.trainer)[0]:
        return {}
    shutil.rmtree(run.folder / "start", ignore_errors=True)  # all trainings are done
    speed = run.stage("timing", lambda: _timing(cfg, run, first, models))
    _draw(run, results, cfg.model)
    return _numbers(cfg, run, data, results, speed, steps, warnings)


def build(cfg: Any, run: Any, model: Any, data: SentenceData) -> nn.Module:
    """The network of a ModelConfig as it starts, all positions dynamic."""
    return _with_experts(sentences.build(cfg, run, model.source, data), model)


def _with_experts(net: nn.Module, model: Any) -> nn.Module:
    if model.method == "static":
        return net
    return make_moe(net, model.num_experts, model.num_experts_per_tok, model.where, noise=model.noise, gate=model.gate, gate_noise=model.gate_noise,
                    gate_std=model.gate_std, balance_weight=model.balance_weight)


def _steps(cfg: Any, run: Any, data: Mapping[str, SentenceData], models: Mapping[str, Any]) -> dict[str, int]:
    first = next(iter(data.values()))
    nets = [lambda model=model: partition_at_random(build(cfg, run, model, first), model) for model in models.values()]
    return sentences.fitting_steps(cfg, run, {task: sentences.full_steps(cfg, len(d.train)) for task, d in data.items()}, nets, first)


# One training


def _train(cfg: Any, run: Any, data: SentenceData, task: str, name: str, model: Any, steps: int) -> dict[str, Any]:
    """Build one network, with the modes that it got, train it on one task, compact and export it."""
    label, device = f"{task}-{name}", own_device(cfg.trainer)
    train, validation = sentences.loaders(cfg, data, steps)
    net = build(cfg, run, model, data)
    if model.method == "pad":
        modes = load_file(run.folder / "start" / label / "modes.safetensors")
        for layer_name, layer in moe_layers(net).items():
            layer.add_partial(model.scales)
            layer.partition(modes[f"{layer_name}.mask"], modes.get(f"{layer_name}.static", "mean"))
    trainer = dataclasses.replace(cfg.trainer, max_steps=steps, seed=cfg.seed, val_every=min(cfg.trainer.val_every, math.ceil(steps / 2)))
    trained = train_classifier(net, train, validation, run=run, name=label, optim=cfg.optim, trainer=trainer, num_labels=data.num_labels,
                               metrics=data.metrics, classify=cfg.classify)
    part = next(iter(data.validation.values()))
    length = round(float(part.lengths.mean()))
    result = {"scores": sentences.scores(trained.metrics, data) | {"loss": trained.metrics["val/loss"]}, "cost": trained.cost, "length": length,
              "macs": macs_per_sentence(trained.net, length), "dynamic": dynamic_shares(trained.net), "load": expert_load(cfg, trained.net.to(device), part),
              "what": model.what()}
    if world(cfg.trainer)[0] == 0:
        sentences.write_answers(run.folder / "answers" / f"{label}.json", trained.answers)
        result |= _finish(cfg, run, data, label, name, model, trained)
    return result


def _partition(cfg: Any, run: Any, data: SentenceData, model: Any, part: Any) -> None:
    """Iterative mode partition on training batches (section 4.4); writes masks and static values, so that a resumed run has these and no others."""
    net = build(cfg, run, model, data)
    batches = sentences.scoring_batches(cfg, data, model.batches)
    with scoring(run):
        partition(net.to(own_device(cfg.trainer)), batches, sentences.sentence_loss, model, temperature=None, seed=cfg.seed)
    modes = {}
    for name, layer in moe_layers(net).items():
        mask, static = layer.partial.mask, layer.partial.static
        modes[f"{name}.mask"] = (torch.ones_like(layer.weight[0], dtype=torch.bool) if mask is None else mask).cpu()
        modes |= {} if static is None else {f"{name}.static": static.detach().cpu()}
    part.mkdir(parents=True)
    save_file(modes, part / "modes.safetensors")
    run.log(f"{model.what()}: modes by {model.criterion} in {model.rounds} rounds on {model.batches} batches of {len(batches[0]['labels'])} sentences")


@torch.no_grad()
def expert_load(cfg: Any, net: nn.Module, part: SentenceSet, limit: int = 256) -> list[list[float]]:
    """Tokens that each expert gets, [layers of experts, E], over the first `limit` examples in evaluation; empty without experts."""
    if not any(isinstance(m, Banked) for m in net.modules()):
        return []
    device, loads = next(net.parameters()).device, []
    net.eval()
    for batch in first_batches(part, min(limit, len(part)), cfg.eval_batch_size, device):
        batch.pop("labels")
        loads.append(net(**batch, output_router_stats=True).expert_load)
    return torch.stack(loads).sum(0).tolist()


def _finish(cfg: Any, run: Any, data: SentenceData, label: str, name: str, model: Any, trained: Trained) -> dict[str, Any]:
    """The compact form of a partially dynamic network, held against the trained one; the folder that is kept."""
    net, result = trained.net.eval(), {}
    made = compact(net) if model.method == "pad" else net
    if made is not net:
        part = next(iter(data.validation.values()))
        count = min(len(part), cfg.compact_examples or len(part))
        found = compare_forms(net, made, _logits, first_batches(part, count, cfg.eval_batch_size, next(net.parameters()).device))
        result["compact"] = {"parameters": sum(p.numel() for p in made.parameters()), "examples": count} | {
            key: found[key] for key in ("same answers", "difference")}
        run.log("compact form: {parameters:,} parameters; {same answers:.4f} of {examples:,} answers are the same, largest difference of logits "
                "{difference:.1e}".format(**result["compact"]))
    if cfg.export and name == cfg.model.method:
        folder = run.folder / "export" / label
        made.save_pretrained(folder)
        AutoTokenizer.from_pretrained(sentences.encoder_folder(model.source, run)).save_pretrained(folder)
    return result


def _logits(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return net(**{key: value for key, value in batch.items() if key != "labels"}).logits


# Time, figures, numbers


def _timing(cfg: Any, run: Any, data: SentenceData, models: Mapping[str, Any]) -> dict[str, float]:
    """Seconds an example of a forward pass: every network of the run, the static one, and compact forms."""
    nets = forms_to_time(cfg, models, lambda model: partition_at_random(build(cfg, run, model, data), model))
    return sentences.seconds_per_example(cfg, nets, next(iter(data.validation.values())), cfg.timing_batch, cfg.timing_rounds)


def _draw(run: Any, results: Mapping[str, Mapping[str, Any]], model: Any) -> None:
    plots, first = run.folder / "plots", next(iter(results.values()))
    if len(first) > 1:
        points = {result["what"]: (overall(name, model), sentences.mean_score(results, name)) for name, result in first.items()}
        figures.points(plots / "score.png", points, "share of dynamic positions", "score")
    if "pad" in first:
        lines = {task: list(found["pad"]["dynamic"].values()) for task, found in results.items()}
        figures.by_layer(plots / "dynamic.png", lines, "share of dynamic positions", level={"budget": model.keep})
    if loads := {f"{task}, {result['what']}": result["load"] for task, found in results.items() for result in found.values() if result["load"]}:
        figures.expert_load(plots / "load.png", loads)


def _variation(load: list[list[float]]) -> float:
    """Coefficient of variation of the experts' loads, mean over layers."""
    return statistics.fmean(statistics.pstdev(layer) / statistics.fmean(layer) for layer in load)


def _numbers(cfg: Any, run: Any, data: Mapping[str, SentenceData], results: Mapping[str, Mapping[str, Any]], speed: Mapping[str, float],
             steps: Mapping[str, int], warnings: list[str]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    first = next(iter(results.values()))
    for name in first:
        prefix = "" if name == cfg.model.method else f"{name}/"
        metrics |= {f"{prefix}score": sentences.mean_score(results, name), f"{prefix}dynamic share": overall(name, cfg.model),
                    f"{prefix}time an example / static": speed[name] / speed["static"]}
        for task, found in results.items():
            metrics |= {f"{prefix}{task}/{key}": value for key, value in found[name]["scores"].items()}
            metrics |= {f"{prefix}{task}/variation of load": _variation(found[name]["load"])} if found[name]["load"] else {}
            metrics |= {f"{prefix}{task}/compact/{key}": value for key, value in found[name].get("compact", {}).items()}
            metrics |= {f"{prefix}{task}/dynamic share by layer": list(found[name]["dynamic"].values())} if name == "pad" else {}
        if name == "pad":
            metrics |= {f"{prefix}{form}/time an example / static": speed[f"{name}, {form}"] / speed["static"] for form in ("compact", "compact, expanded")}
        cost = first[name]["cost"] | {"seconds_training": sum(found[name]["cost"]["seconds_training"] for found in results.values()),
                                      "macs_per_example": first[name]["macs"], "flops_per_example": 2 * first[name]["macs"],
                                      "tokens_per_example": first[name]["length"], "seconds_per_example": speed[name]}
        run.cost |= cost if not prefix else {name: cost}
    metrics |= {f"train/steps/{task}": count for task, count in steps.items()}
    what = cfg.model.what()
    suffix = row_suffix(run, what)
    threads = f"{on_threads(cfg.trainer)}, {cfg.trainer.precision}" if on_threads(cfg.trainer) else ""
    about = f"{cfg.model.source}, {', '.join(f'{count:,} steps on {task}' for task, count in steps.items())}, {cfg.sentences_per_step()} sentences each"
    full = cfg.model.source == "google-bert/bert-base-uncased" and {*data, NOT_IN_MEANS} == TASKS.keys() and not cfg.data.train_limit and cfg.minutes is None
    run.notes |= {
        "main": [f"{p}{key}" for key in ("score", "dynamic share", "time an example / static") for p in ("", *(f"{name}/" for name in cfg.beside))],
        "compare": ["score"], "same": list(SAME), "controls": [name + suffix for name in cfg.model.controls()] if run.row else [],
        "about": [*(f"sentences: {d.what}" for d in data.values()), about + threads + (", one seed, networks side by side" if cfg.beside else ""), *warnings],
        "points": {"x": "dynamic share", "y": "score"},
        "claims": [{"text": CLAIM, "metric": "score", "against": f"{dataclasses.replace(cfg.model, method='moe').what()}{suffix}", "wants": "higher"}]
        if run.row and what == type(cfg.model)(source=cfg.model.source).what() else [],
        "not_tested": [] if full else [
            f"the paper's claim is about BERT-base on GLUE (+1.9 points of average score over the fully dynamic network); here: {about}"]}
    return metrics


# Plan


def plan_encoders(cfg: Any) -> dict[str, Any]:
    """What the run would be, from shapes alone. `cfg` is the Config of experiments/padnet_bert_glue.py."""
    models = by_method(cfg.model, cfg.beside)
    used = {task: min(EXAMPLES[task], cfg.data.train_limit or EXAMPLES[task]) for task in cfg.tasks if task in EXAMPLES}
    steps = {task: sentences.full_steps(cfg, count - round(cfg.data.tuning * count)) for task, count in used.items()}
    planned = {method: _planned(cfg, model) for method, model in models.items()}
    per_example = sum(found[f"MACs a sentence of {cfg.data.max_length} tokens"] for found in planned.values())
    training = {"steps, each network": steps or "known once the data are open", "sentences a step": cfg.sentences_per_step(), "limit, minutes": cfg.minutes,
                "FLOPs, at most (3 x 2 x MACs x sentences)": 6 * per_example * sum(steps.values()) * cfg.sentences_per_step()}
    return {"network": ", ".join(f"{model.what()}, {model.source}" for model in models.values()), "training": training} | (
        planned if len(planned) > 1 else planned[cfg.model.method])


def _planned(cfg: Any, model: Any) -> dict[str, Any]:
    """Parameters, multiply-adds and memory of one network."""
    labels = max((TASKS.get(task, DOCSTRINGS).labels for task in cfg.tasks), default=2)
    with torch.device("meta"):
        net = sentence_classifier("google-bert/bert-base-uncased" if model.source == "tiny" else model.source, max(1, labels))
        net = _with_experts(with_places(net, cfg.data.max_length), model)
    parameters, _, _ = planned_parameters(net, model, model.num_experts)
    return {"parameters": parameters, f"MACs a sentence of {cfg.data.max_length} tokens": macs_per_sentence(net, cfg.data.max_length),
            "memory, GiB (weights, gradients, AdamW)": round(16 * parameters["total"] / GIB, 2)}
