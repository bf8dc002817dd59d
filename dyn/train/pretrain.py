"""Continual pre-training, from a dense checkpoint to a report: the stages of experiments/llama_moe_cpt.py.

Every stage's numbers are remembered in the run folder, so that a resumed run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyn import env, figures
from dyn.data.filters import FILTERS, WEB, Fluency
from dyn.data.mixture import WEIGHTS, MixtureLoader, domain_weights, validation_batches
from dyn.data.sources import choose
from dyn.data.teacher import fingerprint
from dyn.data.tiny import tiny_corpus, tiny_tokenizer
from dyn.data.tokens import Tokens, shard
from dyn.models.llama_moe import LlamaMoeForCausalLM, from_dense, prune_dense
from dyn.models.llama_moe_dense import check_weights, fresh, load_dense, read_config
from dyn.models.packaged import PACKAGED, cache_folder, dense_config, load_tokenizer, packaged
from dyn.nn.experts import Gate
from dyn.nn.surgery import count_parameters, flops_per_token, train_only
from dyn.train.calibration import check_amount, check_vocabulary, draw_calibration, gate_lr, reads_text
from dyn.train.callbacks import ExpertLoad, Remix, Throughput
from dyn.train.distill import parent_hash, taught
from dyn.train.evaluate import domain_distances, perplexity, sample, shared_neurons
from dyn.train.export import load_net
from dyn.train.optim import OptimConfig
from dyn.train.plan import shape
from dyn.train.speed import seconds_per_micro_batch
from dyn.train.tasks import CausalLM
from dyn.train.trainer import check_world, evaluate, find_checkpoint, fit, make_trainer, on_gpu, own_device, world

PAPER_TOKENS = 5_000_000_000  # the shortest of its comparisons (score scales, section 2.3)
SAME = ("tokens", "minutes", *(f"optim.{f.name}" for f in dataclasses.fields(OptimConfig) if f.name != "gate_lr"), "model.source", "data.text",
        "data.bos", "data.weights", "data.dynamic", "data.filters", "data.block_size", "data.batch_size", "data.validation_tokens",
        "trainer.accumulate", "trainer.precision")  # what a row and its control share
SHOWN_LAYERS = 4  # of the overlap plot
MADE = "conversion.json"  # beside a converted model: `_conversion`, the tokens that were read for it, the seconds that it took (weights read, too)
LONGEST = 2048  # tokens of a calibration sequence


@dataclass
class Corpus:
    """Training streams, held-out batches and weights by domain, in one order of domains."""

    train: dict[str, Tokens]
    validation: dict[str, list[dict[str, Tensor]]]
    weights: dict[str, float]


def pretrain(cfg: Any, run: Any) -> dict[str, float]:
    """Convert, train, evaluate, export; the control too where it is asked for. Returns the metrics, fills `run.cost` and `run.notes`."""
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    source = find_source(cfg, run, world(cfg.trainer)[0])
    tokenizer = load_tokenizer(source)
    if cfg.data.prepare_only:
        check_vocabulary(tokenizer, read_config(source), cfg.model.source)
        return {f"tokens/{d}": float(t.num_tokens) for d, t in load_corpus(cfg, run, source, tokenizer).train.items()}
    check(cfg, run, source, tokenizer)
    corpus = load_corpus(cfg, run, source, tokenizer)
    calibration_batches(cfg, corpus)  # refuses too little text before references are measured and teachers asked
    before = run.stage("dense, untrained", lambda: _measure_dense(cfg, source, tokenizer, corpus))
    gc.collect()  # trainers and their networks hold each other; two at once would not fit a small machine
    if broken := [d for d, loss in before["losses"].items() if not math.isfinite(loss)]:
        raise ValueError(f"model.source={cfg.model.source}: the dense model's held-out loss is not finite ({', '.join(broken)}); are its weights whole?")
    run.log(f"dense model, {before['parameters']:,} parameters; held-out loss: " + ", ".join(f"{d} {v:.3f}" for d, v in before["losses"].items()))
    steps = before["steps"]
    if steps < cfg.steps():
        run.log(f"minutes={cfg.minutes} a training hold {steps} of {cfg.steps()} steps on this machine")
    kind = cfg.model.kind
    result = run.stage(kind, lambda: _train(cfg, run, kind, source, tokenizer, corpus, before, kind))
    gc.collect()
    control = run.stage("control", lambda: _train(cfg, run, "dense", source, tokenizer, corpus, before, "control")) if cfg.dense_control else None
    return _report(cfg, run, corpus, before, result, control, steps)


def check(cfg: Any, run: Any, source: Any, tokenizer: Any) -> None:
    """ValueError for what cannot work, before text is sharded and weights are read: sizes, gates, constructions, tokenizer, processes, disk."""
    check_world(cfg.trainer)
    dense = read_config(source)
    check_vocabulary(tokenizer, dense, cfg.model.source)
    config = shape(cfg.model, dense)
    check_amount(cfg.model, config, _calibration_length(cfg))
    with torch.device("meta"):
        size = 4 * count_parameters(fresh(config))["total"]
    # The converted and the exported model, and for each training its checkpoints: weights and two moments, one more while it is being written.
    needed = size * (2 + 3 * (cfg.trainer.keep_checkpoints + 1) * (2 if cfg.dense_control else 1))
    free = shutil.disk_usage(run.folder).free
    if not run.resumed and free < needed:
        raise ValueError(f"{run.folder} needs about {needed / 1e9:.1f} GB for models and checkpoints, {free / 1e9:.1f} GB are free; make room, "
                         "put runs elsewhere (runs=FOLDER) or lower trainer.keep_checkpoints")


def find_source(cfg: Any, run: Any, rank: int = 0) -> Any:
    """The folder or hub id of `cfg.model.source`: generated ("tiny"), unpacked (packaged), or as it is. ValueError for a folder that is no model."""
    name = cfg.model.source
    source = _tiny(cfg, run, rank) if name == "tiny" else packaged(name) if name in PACKAGED else name
    if cfg.data.block_size > (places := read_config(source).max_position_embeddings):
        run.log(f"warning: data.block_size={cfg.data.block_size} is more than the {places} positions that {name} was made for (max_position_embeddings)")
    return source


def load_corpus(cfg: Any, run: Any, source: Any, tokenizer: Any) -> Corpus:
    """Shard the text (or find it sharded) and cut held-out batches.

    Raises:
        ValueError: a domain without training or held-out documents, or with fewer held-out tokens than a block; weights for other domains.
    """
    data = cfg.data

    def weigh(domains: list[str]) -> dict[str, float]:
        choose(data.stand_for, domains if data.text.domains is None else {**data.stand_for}, "data.stand_for")
        choose(data.stand_for.values(), WEIGHTS["llama"], "data.stand_for", "domain of the paper")
        shares = domain_weights(data.weights, [data.stand_for.get(d, d) for d in domains])
        return {d: shares[data.stand_for.get(d, d)] for d in domains}

    tokens = shard(data.text, tokenizer, data.cache or str(cache_folder() / "tokens"), keep=_filters(cfg, source, tokenizer), bos=data.bos, accept=weigh,
                   log=run.log, lead=env.rank() == 0)
    missing = [f"{d} has no {split} documents" for d in tokens for split in ("train", "validation") if split not in tokens[d]]
    if missing:
        raise ValueError(f"data.text.path={data.text.path}: {'; '.join(missing)}")
    short = [f"{d} has {t['validation'].num_tokens}" for d, t in tokens.items() if t["validation"].num_tokens < data.block_size]
    if short:
        raise ValueError(f"held-out tokens of {', '.join(short)}: fewer than one block, data.block_size={data.block_size}")
    validation = {d: validation_batches(tokens[d]["validation"], data.block_size, data.batch_size, data.validation_tokens, domain=i,
                                        mask_documents=data.mask_documents) for i, d in enumerate(tokens)}
    run.log(f"text {data.text.path}: " + ", ".join(f"{d} {t['train'].num_tokens:,}" for d, t in tokens.items()) + " training tokens")
    return Corpus({d: t["train"] for d, t in tokens.items()}, validation, weigh(list(tokens)))


def _filters(cfg: Any, source: Any, tokenizer: Any) -> dict[str, Any]:
    """Document filters by name, for the domains that are or stand for web text, else for all; the fluency filter scores with the dense model itself."""
    if unknown := [name for name in cfg.data.filters if name not in FILTERS]:
        raise ValueError(f"data.filters={unknown[0]} is unknown; allowed: {', '.join(FILTERS)}")
    domains = tuple(d for d, paper in cfg.data.stand_for.items() if paper in WEB) or (WEB if cfg.data.text.domain_field else None)
    chosen: dict[str, Any] = {name: FILTERS[name](domains=domains) for name in cfg.data.filters if name != "fluency"}
    if "fluency" in cfg.data.filters:
        low, high = cfg.data.fluency_band
        net = functools.cache(lambda: _pretrained(source).eval().to(own_device(cfg.trainer)))  # read by the process that writes shards, if one has to
        chosen["fluency"] = Fluency(lambda texts: perplexity(net(), tokenizer, texts), low, high, model=str(cfg.model.source), domains=domains)
    return chosen


def _measure_dense(cfg: Any, source: Any, tokenizer: Any, corpus: Corpus) -> dict[str, Any]:
    """The untrained dense model: losses (the references of dynamic weights), samples, and how many steps the time budget holds."""
    net = _pretrained(source)
    samples = _samples(cfg, net, tokenizer) if world(cfg.trainer)[0] == 0 else []  # before evaluating, which may shard the network
    steps = cfg.steps()
    if cfg.minutes is not None:
        net.to(own_device(cfg.trainer))
        batch = {k: v.to(net.device) for k, v in next(iter(_loader(cfg, corpus, 1, 0, 1))).items() if k != "domain"}
        # The dense model's step is the longer one; a fifth of the time goes to the optimiser, to validations within training, and to noise.
        seconds = seconds_per_micro_batch(net, lambda: net(**batch, use_cache=False).loss, cfg.trainer.dtype) * cfg.trainer.accumulate
        steps = max(2, min(steps, int(0.8 * 60 * cfg.minutes / seconds)))
        net.cpu()
    return {"losses": evaluate(net, corpus.validation, cfg.trainer), "samples": samples, "steps": steps, "parameters": count_parameters(net)["total"]}


def _train(cfg: Any, run: Any, kind: str, source: Any, tokenizer: Any, corpus: Corpus, dense: dict[str, Any], name: str) -> dict[str, Any]:
    """Build one network, train it, and measure it before and after."""
    steps = dense["steps"]
    rank, size = world(cfg.trainer)
    loader = _loader(cfg, corpus, steps * cfg.trainer.accumulate, rank, size)
    distill = cfg.distill.weight if name != "control" else 0.0
    if distill:  # before the network is built: the teacher is in memory meanwhile
        loader = taught(cfg, run, source, tokenizer, loader)
    net = _build(cfg, run, kind, source, corpus)
    if cfg.model.train == "gates" and name != "control":
        train_only(net, Gate)
    counts, flops = count_parameters(net), flops_per_token(net, cfg.data.block_size)
    before = [] if rank else dense["samples"] if kind == "dense" and cfg.model.start != "scratch" else _samples(cfg, net, tokenizer)
    config = dataclasses.replace(cfg.trainer, max_steps=steps, seed=cfg.seed, val_first=True, val_every=min(cfg.val_every(), math.ceil(steps / 2)))
    optim = dataclasses.replace(cfg.optim, warmup_steps=min(cfg.optim.warmup_steps, steps // 4), gate_lr=gate_lr(cfg, kind))
    load = ExpertLoad()
    mixing = [Remix(loader, dense["losses"], rule=cfg.data.dynamic, anchor=corpus.weights if cfg.data.anchored else None)] if cfg.data.dynamic != "none" else []
    task = CausalLM(net, optim, list(corpus.validation), config, distill)
    trainer = make_trainer(config, run, [load, *mixing], name=name)
    run.log(f"training {name}: {steps} steps of {cfg.tokens_per_step():,} tokens, {counts['total']:,} parameters, {counts['active']:,} activated, "
            f"{optim.warmup_steps} steps of warm-up")
    began = time.monotonic()
    after = fit(trainer, task, loader, corpus.validation)
    speed = next(c for c in trainer.callbacks if isinstance(c, Throughput)).summary()
    if size > 1:  # a sharded network cannot generate or be saved by one rank; its checkpoint is whole
        net = load_net(find_checkpoint(run.folder, name)) if rank == 0 else None
    result = {"before": _first_losses(run, name, corpus), "after": after, "samples_before": before,
              "samples_after": _samples(cfg, net, tokenizer) if rank == 0 else [], "counts": counts, "flops_per_token": flops,
              "gate_lr": optim.gate_lr, "speed": speed, "seconds": time.monotonic() - began, "load": {d: v.tolist() for d, v in load.loads.items()}}
    if kind != "dense" and rank == 0:
        if (made := run.folder / "converted" / MADE).is_file():
            result["conversion"] = json.loads(made.read_text())
        result |= {"overlap": shared_neurons(getattr(net, "construction", None)), "export": _export(cfg, run, net, tokenizer, corpus, dense["losses"], after)}
    return result


def _build(cfg: Any, run: Any, kind: str, source: Any, corpus: Corpus) -> nn.Module:
    """The network to train, in float32 (its computing copies are bf16). A converted model is kept in the run folder, for resumes and for the user."""
    model = cfg.model
    if model.start == "scratch":
        torch.manual_seed(cfg.seed)
        return fresh(shape(dataclasses.replace(model, kind=kind), dense_config(source)))
    if kind == "dense":
        return _pretrained(source, attention_dropout=model.attention_dropout)
    folder = run.folder / "converted"

    def convert(part: Path) -> None:
        key = _conversion(cfg, source, corpus)
        if twin := next((f.parent for f in run.folder.parent.glob(f"*/converted/{MADE}") if _is_whole(f, key)), None):
            shutil.copytree(twin, part, copy_function=env.link)
            run.log(f"converted as in {twin.parent.name}: the same settings, source and text")
            return
        began, batches = time.monotonic(), calibration_batches(cfg, corpus)
        net, tokens = _convert(cfg, source, batches), sum(b.numel() for b in batches or [])
        seconds = time.monotonic() - began
        net.save_pretrained(part)
        (part / MADE).write_text(json.dumps({"key": key, "tokens": tokens, "seconds": seconds}))
        run.log(f"converted by {model.construction if kind == 'moe' else 'prune_dense'} in {seconds:.0f} s, {tokens:,} calibration tokens")

    env.once(folder, convert, world(cfg.trainer)[0])
    check_weights(folder, f"delete {folder} to convert again")
    if kind == "prune":
        return _pretrained(folder, attention_dropout=model.attention_dropout)
    return LlamaMoeForCausalLM.from_pretrained(folder, attention_dropout=model.attention_dropout, dtype=torch.float32)


def _conversion(cfg: Any, source: Any, corpus: Corpus) -> str:
    """Names all that decides what `_convert` makes, so that rows of a sweep that train one start differently convert once. All text is read for it, where
    any is."""
    facts, text = env.facts(), {d: fingerprint(t) for d, t in corpus.train.items()} if reads_text(cfg.model) else {}
    model = dataclasses.asdict(cfg.model)
    del model["train"]  # comes after
    about = [model, cfg.seed, cfg.matmul_precision, corpus.weights, cfg.data.block_size, cfg.data.batch_size, parent_hash(source),
             text, facts["versions"], facts["device"], facts["threads"], env.code("core", "models", "nn", "ops")]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _is_whole(made: Path, key: str) -> bool:
    """Whether a conversion that another run keeps is the wanted one, undamaged."""
    try:
        check_weights(made.parent)
        return json.loads(made.read_text())["key"] == key
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _calibration_length(cfg: Any) -> int:
    return min(cfg.data.block_size, LONGEST)


def calibration_batches(cfg: Any, corpus: Corpus) -> list[Tensor] | None:
    """What the conversion reads, ids [B, L]; None where it looks at no data. ValueError for a domain with less text than it should give."""
    if not reads_text(cfg.model):
        return None
    return draw_calibration(corpus.train, corpus.weights, sequences=cfg.model.calibration_sequences, length=_calibration_length(cfg),
                            batch_size=cfg.data.batch_size, seed=cfg.seed + 1, setting=f"model.calibration_sequences={cfg.model.calibration_sequences}")


def _convert(cfg: Any, source: Any, batches: list[Tensor] | None) -> nn.Module:
    model = cfg.model
    if on_gpu(cfg.trainer) and batches is not None:  # statistics are forward and backward passes
        source = load_dense(source).to(own_device(cfg.trainer))
    if model.kind == "prune":
        return prune_dense(source, model.keep(), batches=batches, seed=cfg.seed, repair_ridge=model.repair_ridge).float().cpu()
    moe = from_dense(
        source, num_experts=model.num_experts, num_experts_per_tok=model.num_experts_per_tok, construction=model.construction, overlap=model.overlap,
        num_shared_experts=model.num_shared_experts, moe_intermediate_size=model.moe_intermediate_size, gate=model.gate, gate_noise=model.gate_noise,
        capacity_factor=model.capacity_factor, balance=model.balance, score_scale=model.score_scale, reinit=model.reinit, features=model.features,
        batches=batches, seed=cfg.seed).float().cpu()
    moe.config.balance_weight, moe.config.z_loss_weight, moe.config.attention_dropout = model.balance_weight, model.z_loss_weight, model.attention_dropout
    return moe


def _tiny(cfg: Any, run: Any, rank: int) -> Any:
    """For smoke runs: a random model, a byte tokenizer and generated text, in the run folder."""
    folder = run.folder / "tiny"

    def make(part: Path) -> None:
        torch.manual_seed(cfg.seed)
        fresh(dense_config("tiny")).save_pretrained(part)
        tiny_tokenizer().save_pretrained(part)
        tiny_corpus(part / "text")

    env.once(folder, make, rank)
    if cfg.data.text.path == "tiny":
        cfg.data.text.path, cfg.data.cache = str(folder / "text"), str(run.folder / "tokens")
    return folder


def _pretrained(source: Any, **changes: Any) -> nn.Module:
    return load_dense(source, **changes).float()


def _loader(cfg: Any, corpus: Corpus, batches: int, rank: int, world: int) -> MixtureLoader:
    data = cfg.data
    return MixtureLoader(corpus.train, corpus.weights, block_size=data.block_size, batch_size=data.batch_size, num_batches=batches, seed=cfg.seed,
                         rank=rank, world_size=world, mask_documents=data.mask_documents)


def _samples(cfg: Any, net: nn.Module, tokenizer: Any) -> list[str]:
    return sample(net, tokenizer, cfg.prompts, cfg.sample_tokens) if cfg.sample_tokens else []


def _first_losses(run: Any, name: str, corpus: Corpus) -> dict[str, float]:
    """Held-out losses at step 0, from the metrics file: a resumed training did not measure them."""
    rows = [r for r in figures.read_metrics(run.folder / "metrics.jsonl") if r.get("stage") == name and r["step"] == 0 and "val/loss" in r]
    return {d: rows[0][f"val/{d}/loss"] for d in corpus.validation} if rows else {}


def _export(cfg: Any, run: Any, net: nn.Module, tokenizer: Any, corpus: Corpus, dense: dict[str, float], losses: dict[str, float]) -> str:
    """The trained model for `transformers`, with tokenizer and card, written whole or not at all."""
    folder, part = run.folder / "export", run.folder / "export.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    if getattr(net, "construction", None) is not None:  # the card reads these, in every format that this model is saved in later too
        path = Path(cfg.data.text.path)
        net.construction.details |= {"data": f"{path.name if path.exists() else path} ({', '.join(corpus.train)})",
                                     "results": {f"held-out loss, {d} (dense, untrained: {dense[d]:.4f})": round(v, 4) for d, v in losses.items()}}
    net.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.replace(folder)
    return folder.name


def _report(cfg: Any, run: Any, corpus: Corpus, before: dict, result: dict, control: dict | None, steps: int) -> dict[str, float]:
    """Figures, samples, cost and metrics from what the stages left; rank 0 has them."""
    if world(cfg.trainer)[0] != 0:
        return {}
    domains, plots, name = list(corpus.train), run.folder / "plots", cfg.model.kind
    rows = figures.read_metrics(run.folder / "metrics.jsonl")
    stages = {name: name} | ({"dense, same tokens": "control"} if control else {})
    curves = {label: [r for r in rows if r.get("stage") == stage] for label, stage in stages.items()}
    figures.loss_curves(plots / "loss.png", curves, domains, level=before["losses"])
    if cfg.data.dynamic == "none":
        run.log("domain weights are static: " + ", ".join(f"{d} {w:.3f}" for d, w in corpus.weights.items()))
    figures.domain_weights(plots / "weights.png", curves[name], domains, corpus.weights)
    if result["load"]:
        figures.expert_load(plots / "load.png", result["load"])
        figures.domain_distances(plots / "distances.png", *domain_distances(result["load"]))
    if result.get("overlap"):
        layers = sorted({round(i * (len(result["overlap"]) - 1) / (SHOWN_LAYERS - 1)) for i in range(SHOWN_LAYERS)})
        figures.neuron_overlap(plots / "overlap.png", [result["overlap"][i] for i in layers], layers)
    samples = [{"prompt": p, "dense": d, "converted": b, "trained": a} for p, d, b, a in
               zip(cfg.prompts, before["samples"], result["samples_before"], result["samples_after"], strict=False)]
    (run.folder / "samples.json").write_text(json.dumps(samples, indent=1, ensure_ascii=False))
    return _numbers(cfg, run, before, result, control, steps)


def _numbers(cfg: Any, run: Any, before: dict, result: dict, control: dict | None, steps: int) -> dict[str, float]:
    mean = lambda losses: math.fsum(losses.values()) / len(losses)  # noqa: E731
    dense, end = mean(before["losses"]), mean(result["after"])
    start = mean(result["before"]) if result["before"] else math.nan  # lost with the metrics file that it was written to
    metrics = {"loss/dense untrained": dense, "loss/before": start, "loss/after": end, "train/steps": steps, "train/tokens": steps * cfg.tokens_per_step()}
    metrics = {key: value for key, value in metrics.items() if not math.isnan(value)}
    metrics |= {f"val/{d}/loss": v for d, v in result["after"].items()} | {f"val/{d}/ppl": math.exp(v) for d, v in result["after"].items()}
    metrics |= {f"before/{d}/loss": v for d, v in result["before"].items()} | {f"dense untrained/{d}/loss": v for d, v in before["losses"].items()}
    if start - dense > 0.01 and cfg.model.start == "pretrained":
        metrics["gap closed"] = (start - end) / (start - dense)
        run.log(f"conversion cost {start - dense:.3f} nats a token; training won {start - end:.3f} back: "
                f"{metrics['gap closed']:.0%} of the gap to the untrained dense model")
    if control:
        trained = mean(control["after"])
        metrics |= {"loss/dense, same tokens": trained} | {f"dense, same tokens/{d}/loss": v for d, v in control["after"].items()}
        if start - trained > 0.01:
            metrics["gap closed to dense, same tokens"] = (start - end) / (start - trained)
        if "steps_per_second" in control["speed"] and "steps_per_second" in result["speed"]:
            metrics["time a token / dense"] = control["speed"]["tokens_per_second"] / result["speed"]["tokens_per_second"]
    speed = result["speed"]
    metrics |= {f"speed/{k}": speed[k] for k in ("tokens_per_second", "mfu") if k in speed}
    run.cost |= {f"{k}_parameters": v for k, v in result["counts"].items()} | {
        "flops_per_token": result["flops_per_token"], "steps_per_second": speed.get("steps_per_second"), "peak_flops_from": speed["peak_flops_from"],
        "seconds_training": result["seconds"]}
    if (made := result.get("conversion")) and made["tokens"]:  # a twin's seconds are the first's, which did the work
        metrics |= {"calibration tokens": made["tokens"], "calibration seconds": made["seconds"]}
        run.cost |= {"calibration_tokens": made["tokens"], "conversion_seconds": made["seconds"]}
    main = ("train/tokens", "loss/dense untrained", "loss/before", "loss/after", "loss/dense, same tokens", "gap closed", "gap closed to dense, same tokens")
    run.notes |= {"main": [k for k in main if k in metrics], "compare": ["loss/after"], "text": cfg.data.text.path,
                  "controls": [] if control or cfg.model.kind == "dense" else ["dense, same tokens"], "same": list(SAME),
                  "not_tested": [] if metrics["train/tokens"] >= PAPER_TOKENS else [
                      f"the paper's findings are not tested at this scale: {metrics['train/tokens']:,} training tokens, its shortest comparison has 5 billion"],
                  "about": [f"MFU counts activated parameters against the {speed['peak_flops_from']}",
                            *([f"gates trained at a peak rate of {rate:g}"] if (rate := result.get("gate_lr")) is not None else [])]}
    if result.get("export"):
        run.log(f"exported to {run.folder / result['export']} (import dyn.models; AutoModelForCausalLM.from_pretrained)")
    return metrics
