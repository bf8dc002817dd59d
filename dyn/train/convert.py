"""Conversion without training, from a dense checkpoint to a report: the stages of experiments/llama_moe_convert.py.

Every stage's numbers are remembered in the run folder, so that a resumed run goes on where it stopped; what was converted, and before a distillation what is to
be distilled, lies in folders of its own until the run has ended.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyn import env, figures
from dyn.data.sources import JoinedText, choose, read_joined
from dyn.data.store import Store
from dyn.models import llama_moe
from dyn.models.llama_moe import LlamaMoeForCausalLM, from_dense, layer_budgets
from dyn.models.llama_moe_align import align
from dyn.models.llama_moe_construct import METHODS
from dyn.models.llama_moe_dense import load_dense, read_config
from dyn.models.llama_moe_diagnose import domain_losses, ideal_routing, layer_contributions, neuron_oracle, routing_statistics
from dyn.models.packaged import cache_folder, load_tokenizer
from dyn.nn.surgery import count_parameters, flops_per_token
from dyn.train.calibration import budget_text, check_conversion, check_vocabulary, draw_calibration
from dyn.train.distill import parent_hash
from dyn.train.pretrain import MADE, Corpus, find_source, load_corpus
from dyn.train.speed import interleaved

PAPER_SIZE = 6_000_000_000  # parameters of the smallest model of the training-free papers (LLaMA-2-7B)
SAME = ("model.source", "model.align_passes", "model.align_rate", "dtype", "matmul_precision", "leave_out", "calibration_tokens", "calibration_length", "texts",
        "data.text", "data.bos", "data.weights", "data.block_size", "data.validation_tokens")  # what a row and its control share
EXPORT, CLOSED = "export", "closed_form"  # what was converted; the same before its distillation, until that is done
PATIENCE = 15.0  # seconds between lines of progress

HeldOut = dict[str, list[Tensor]]  # domain -> batches of ids [B, L]


def convert(cfg: Any, run: Any) -> dict[str, Any]:
    """Measure the dense model, convert it, measure what came out and what it lost where. Returns the metrics, fills `run.cost` and `run.notes`."""
    if env.world_size() > 1:
        raise ValueError(f"{env.world_size()} processes were started; a conversion is the work of one")
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    source = find_source(cfg, run)
    tokenizer = load_tokenizer(source)
    check(cfg, source, tokenizer)
    corpus = load_corpus(cfg, run, source, tokenizer)
    batches = calibration_batches(cfg, corpus)
    if cfg.texts:
        held_out = {text.name: windows(text, tokenizer, cfg.data.block_size, cfg.data.batch_size) for text in cfg.texts}
    else:
        held_out = {d: [batch["input_ids"] for batch in kept] for d, kept in corpus.validation.items()}
    nets = _Networks(cfg, run, source, tokenizer, list(corpus.train), batches)
    dense = run.stage("dense", lambda: {"losses": _dense_losses(cfg, nets, held_out), **_size(cfg, nets.dense)})
    run.log(f"dense model, {dense['counts']['total']:,} parameters; held-out loss: " + ", ".join(f"{d} {v:.3f}" for d, v in dense["losses"].items()))
    made = run.stage("convert", lambda: {**_size(cfg, nets.converted), **nets.made, "fraction": nets.fraction()})
    if abs(made["fraction"] - float(cfg.model.active())) > 0.005 and cfg.model.kind != "dense":
        run.log(f"warning: {float(cfg.model.active()):.3f} of the feed-forward was asked for, {made['fraction']:.3f} is active")
    losses = run.stage("losses", lambda: nets.losses(held_out, dense["losses"]))
    run.log(f"{cfg.model.what()}: held-out loss " + ", ".join(f"{d} {v:.3f} ({v - dense['losses'][d]:+.3f})" for d, v in losses.items()))
    own = cfg.model.kind in ("moe", "prune")  # networks of their own
    speed = run.stage("timing", lambda: relative_time(nets.converted, nets.dense, next(iter(held_out.values()))[0], cfg.timing_rounds)) if own else {}
    found = run.stage("diagnose", lambda: _diagnose(cfg, run, nets, held_out)) if own and cfg.diagnose else {}
    if not cfg.export:
        shutil.rmtree(run.folder / EXPORT, ignore_errors=True)
    _draw(cfg, run, dense["losses"], losses, found)
    return _numbers(cfg, run, dense, made, losses, speed, found)


def check(cfg: Any, source: Any, tokenizer: Any) -> None:
    """ValueError for what cannot work, before text is sharded and weights are read: sizes, constructions, the tokenizer."""
    dense, model = read_config(source), cfg.model
    check_vocabulary(tokenizer, dense, model.source)
    check_conversion(cfg, dense)


def calibration_batches(cfg: Any, corpus: Corpus) -> list[Tensor]:
    """Ids [B, calibration_length] of training text, calibration_tokens in all (rounded down to sequences), drawn by the domains' weights without `leave_out`.

    Raises:
        ValueError: an unknown domain to leave out, no domain left, or a domain with less text than it should give.
    """
    if cfg.leave_out is not None:
        choose([cfg.leave_out], corpus.train, "leave_out")
    tokens = {d: t for d, t in corpus.train.items() if d != cfg.leave_out}
    weights = {d: corpus.weights[d] for d in tokens}
    if not any(weights.values()):
        known = ", ".join(d for d, w in corpus.weights.items() if w)
        raise ValueError(f"leave_out={cfg.leave_out} leaves no text for calibration; domains with weight: {known}")
    return draw_calibration(tokens, weights, sequences=cfg.calibration_tokens // cfg.calibration_length, length=cfg.calibration_length,
                            batch_size=cfg.data.batch_size, seed=cfg.seed + 1, setting=f"calibration_tokens={cfg.calibration_tokens}")


def windows(text: JoinedText, tokenizer: Any, size: int, batch_size: int) -> list[Tensor]:
    """The text cut into consecutive windows of `size` tokens, ids [B, size]; the tokenizer's BOS, if it puts one, stands at the very beginning alone, and what
    is left after the last whole window is not used (the convention of published perplexities). ValueError for less than a window."""
    ids = torch.tensor(tokenizer(read_joined(text), verbose=False)["input_ids"])
    limit = len(ids) if text.max_tokens is None else min(text.max_tokens, len(ids))
    if limit < size:
        raise ValueError(f"{text.name}: {limit} tokens are less than one window, data.block_size={size}")
    return list(ids[: limit // size * size].view(-1, size).split(batch_size))


class _Networks:
    """The dense model and what becomes of it, each read or made when it is first asked for: a resumed run may need neither."""

    def __init__(self, cfg: Any, run: Any, source: Any, tokenizer: Any, domains: list[str], batches: list[Tensor]) -> None:
        self.cfg, self.run, self.source, self.tokenizer, self.domains, self.batches = cfg, run, source, tokenizer, domains, batches
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.made: dict[str, float] = {"tokens": 0, "seconds": 0.0}

    @cached_property
    def dense(self) -> nn.Module:
        return load_dense(self.source).to(getattr(torch, self.cfg.dtype)).to(self.device).eval()

    @cached_property
    def converted(self) -> nn.Module:
        kind, passes = self.cfg.model.kind, self.cfg.model.align_passes
        if kind in ("dense", "oracle"):
            return self.dense
        make = self._mixture if kind == "moe" else self._pruned
        if not passes or (self.run.folder / EXPORT).is_dir():
            shutil.rmtree(self.run.folder / CLOSED, ignore_errors=True)
            return self._kept(EXPORT, make)
        net, say = self._kept(CLOSED, make), _progress(self.run, "distillation: steps")

        def distilled() -> nn.Module:
            align(net, self.dense, self.batches, passes=passes, rate=self.cfg.model.align_rate, seed=self.cfg.seed, on_step=say)
            return net

        self._kept(EXPORT, distilled)
        shutil.rmtree(self.run.folder / CLOSED, ignore_errors=True)
        return net

    def _kept(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A network from its folder in the run's, or made and kept there."""
        folder = self.run.folder / name
        if folder.is_dir():
            self.made = json.loads((folder / MADE).read_text())
            net = LlamaMoeForCausalLM.from_pretrained(folder, dtype="auto") if self.cfg.model.kind == "moe" else load_dense(folder)
            return net.to(self.device).eval()
        began = time.monotonic()
        net = make().eval()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.made["seconds"] += time.monotonic() - began
        self.run.log(f"{self.cfg.model.what()}{', before the distillation' * (name == CLOSED)}: {self.made['seconds']:.1f} s, {self.made['tokens']:,} "
                     "calibration tokens")
        part = folder.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        net.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        (part / MADE).write_text(json.dumps(self.made))
        part.replace(folder)
        return net

    def _mixture(self) -> nn.Module:
        model = self.cfg.model
        needed = METHODS[model.construction].needs != "nothing" or model.score_scale == "measured"
        net = from_dense(self.dense, num_experts=model.num_experts, num_experts_per_tok=self._budgets(model.construction), construction=model.construction,
                         num_shared_experts=model.num_shared_experts, score_scale=model.score_scale, batches=self._read() if needed else None,
                         seed=self.cfg.seed)
        if net.construction is not None:
            path = Path(self.cfg.data.text.path)
            net.construction.details |= {"data": f"{path.name if path.exists() else path} ({', '.join(d for d in self.domains if d != self.cfg.leave_out)})"}
        return net

    def _pruned(self) -> nn.Module:
        model = self.cfg.model
        keep = [Fraction(k, model.num_experts) for k in self._budgets("prune")] if model.budgets else model.active()
        return llama_moe.prune_dense(self.dense, keep=keep, batches=self._read(), refit=True, seed=self.cfg.seed)

    def _budgets(self, construction: str) -> int | list[int]:
        """num_experts_per_tok, or what is measured for each layer on a part of the calibration text."""
        model = self.cfg.model
        if not model.budgets:
            return model.num_experts_per_tok
        fitted, measured = budget_text(self._read())
        say, layers = _progress(self.run, "budgets: layers"), self.dense.config.num_hidden_layers

        def measure() -> dict[str, Any]:
            began = time.monotonic()
            ks = layer_budgets(self.dense, num_experts=model.num_experts, num_experts_per_tok=model.num_experts_per_tok, batches=fitted, held_out=measured,
                               construction=construction, seed=self.cfg.seed, on_layer=lambda _, layer: say(layer + 1, layers))
            return {"ks": ks, "seconds": time.monotonic() - began}

        asked = time.monotonic()
        found = self.run.stage("budgets", measure)
        self.made["seconds"] += found["seconds"] - (time.monotonic() - asked)  # of a start before this one
        self.run.log(f"neurons by layer, in {model.num_experts}ths: " + ", ".join(map(str, found["ks"])))
        return found["ks"]

    def _read(self) -> list[Tensor]:
        self.made["tokens"] = sum(batch.numel() for batch in self.batches)
        return self.batches

    def fraction(self) -> float:
        """Share of the dense feed-forward's neurons that a token passes through, mean over layers."""
        if self.cfg.model.kind in ("dense", "oracle"):
            return float(self.cfg.model.active())
        shares = []
        for made, dense in zip(self.converted.model.layers, self.dense.model.layers, strict=True):
            mlp, width = made.mlp, dense.mlp.down_proj.in_features
            if self.cfg.model.kind == "prune":
                shares.append(kept_width(mlp) / width)
            else:
                shared = mlp.shared_experts.down_proj.in_features if mlp.shared_experts is not None else 0
                shares.append((mlp.gate.num_experts_per_tok * mlp.experts.intermediate_dim + shared) / width)
        return statistics.fmean(shares)

    @contextmanager
    def measured(self) -> Iterator[nn.Module]:
        """The network that this row is about."""
        if self.cfg.model.kind == "oracle":
            with neuron_oracle(self.dense, self.cfg.model.active()):
                yield self.dense
        else:
            yield self.converted

    def losses(self, held_out: HeldOut, dense: Mapping[str, float]) -> dict[str, float]:
        """Held-out losses of the row's network, written into the card of an exported mixture too."""
        with self.measured() as net:
            losses = domain_losses(net, held_out)
        folder = self.run.folder / EXPORT
        if self.cfg.model.kind == "moe" and folder.is_dir() and net.construction is not None:
            net.construction.details |= {"results": {f"held-out loss, {d} (dense: {dense[d]:.4f})": round(v, 4) for d, v in losses.items()}}
            net.construction.save(folder)
            llama_moe.write_card(net, folder)
        return losses


def _dense_losses(cfg: Any, nets: _Networks, held_out: HeldOut) -> dict[str, float]:
    """Held-out losses of the dense model, kept in the user's cache: every row of a sweep needs the same."""
    dense, facts = nets.dense, env.facts()
    if cfg.model.source == "tiny":
        return domain_losses(dense, held_out)
    key = hashlib.sha256(json.dumps([parent_hash(nets.source), cfg.dtype, cfg.matmul_precision, facts["versions"], facts["device"], facts["threads"]]).encode())
    for domain, batches in held_out.items():
        key.update(domain.encode() + b"".join(str(tuple(ids.shape)).encode() + ids.numpy().tobytes() for ids in batches))
    store, name = Store(str(cache_folder() / "losses")), f"{key.hexdigest()[:16]}.json"
    with store.lock():  # rows that start at once measure once, and do not write over each other
        if not (file := Path(store.root) / name).is_file():
            store.write(name, json.dumps(domain_losses(dense, held_out)).encode())
    return json.loads(file.read_bytes())


def kept_width(mlp: nn.Module) -> int:
    """Neurons of a dense feed-forward that are not of zeros, which `prune_dense` fills narrow layers up with."""
    return int(mlp.down_proj.weight.any(0).sum())


def _size(cfg: Any, net: nn.Module) -> dict[str, Any]:
    """Parameters and FLOPs a token, without neurons of zeros."""
    counts, flops = count_parameters(net), flops_per_token(net, cfg.data.block_size)
    if cfg.model.kind == "prune":
        empty = sum(3 * mlp.down_proj.out_features * (mlp.down_proj.in_features - kept_width(mlp)) for mlp in (layer.mlp for layer in net.model.layers))
        counts, flops = {k: v - empty if v else 0 for k, v in counts.items()}, flops - 2 * empty
    return {"counts": counts, "flops_per_token": flops}


@torch.no_grad()
def relative_time(net: nn.Module, dense: nn.Module, ids: Tensor, rounds: int) -> dict[str, float]:
    """Medians over `rounds` interleaved forward passes of ids [B, L], after one each to warm up: tokens a second of both, and time a token over the dense
    model's in the same round."""
    ids = ids.to(dense.device)
    seconds = interleaved({name: lambda model=model: model(input_ids=ids, use_cache=False) for name, model in (("net", net), ("dense", dense))}, rounds)
    ours, theirs = seconds["net"], seconds["dense"]
    return {"time a token / dense": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
            "tokens_per_second": ids.numel() / statistics.median(ours), "dense tokens_per_second": ids.numel() / statistics.median(theirs)}


def _diagnose(cfg: Any, run: Any, nets: _Networks, held_out: HeldOut) -> dict[str, Any]:
    """Ceilings on all held-out text, layers and gates on `diagnose_tokens` of it."""
    rows = max(1, cfg.diagnose_tokens // (len(held_out) * cfg.data.block_size))
    part = [batch for batches in held_out.values() for batch in torch.cat(batches)[:rows].split(cfg.data.batch_size)]
    found: dict[str, Any] = {"losses": {}, "tokens": sum(batch.numel() for batch in part)}
    run.log("diagnostics: neuron oracle")
    with neuron_oracle(nets.dense, cfg.model.active()):
        found["losses"]["neuron oracle"] = domain_losses(nets.dense, held_out)
    if cfg.model.kind == "moe":
        for name, criterion in (("ideal routing", "norm"), ("ideal routing, least error", "residual")):
            run.log(f"diagnostics: {name}")
            with ideal_routing(nets.converted, criterion):
                found["losses"][name] = domain_losses(nets.converted, held_out)
        found["routing"] = routing_statistics(nets.converted, part)
    gc.collect()
    say, layers = _progress(run, "diagnostics: layers"), len(nets.dense.model.layers)
    found["layers"] = layer_contributions(nets.converted, nets.dense, part, lambda layer: say(layer + 1, layers))
    return found


def _progress(run: Any, what: str) -> Callable[[int, int], None]:
    last = [time.monotonic()]

    def say(done: int, total: int) -> None:
        if time.monotonic() - last[0] > PATIENCE:
            last[0] = time.monotonic()
            run.log(f"{what}, {done} of {total}")

    return say


def _draw(cfg: Any, run: Any, dense: Mapping[str, float], losses: Mapping[str, float], found: Mapping[str, Any]) -> None:
    """Plots, and the held-out losses as the two points of a curve: 0 the dense model, 1 what became of it."""
    points = [dense] if cfg.model.kind == "dense" else [dense, losses]
    lines = [{"step": i, "val/loss": statistics.fmean(p.values()), **{f"val/{d}/loss": v for d, v in p.items()}} for i, p in enumerate(points)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plots = run.folder / "plots"
    figures.loss_bars(plots / "losses.png", {"dense": dense, **found.get("losses", {}), cfg.model.what(): losses})
    if found:
        layers = {"converted alone": found["layers"]["alone"], "dense again": found["layers"]["restored"]}
        figures.by_layer(plots / "layers.png", layers, "cost of the layer (nats a token)", level={"none": 0.0})
    if routed := found.get("routing"):
        chosen = {"ideal experts chosen": routed["accuracy"], "their contribution captured": routed["captured"], "chosen by chance": routed["chance"]}
        figures.by_layer(plots / "gate.png", chosen, "share")
        entropies = {"of the choices": routed["load_entropy"], "of the mean distribution": routed["mean_entropy"], "of a token's": routed["token_entropy"]}
        figures.by_layer(plots / "entropy.png", entropies, "entropy of routing / log E")
        figures.expert_load(plots / "load.png", {"all": routed["load"]})


def _numbers(cfg: Any, run: Any, dense: dict, made: dict, losses: dict, speed: dict, found: dict) -> dict[str, Any]:
    mean = lambda values: statistics.fmean(values.values())  # noqa: E731
    gaps = {d: v - dense["losses"][d] for d, v in losses.items()}
    metrics = {"loss/mean": mean(losses), "gap/mean": mean(gaps), "active fraction": made["fraction"], "calibration tokens": made["tokens"],
               "calibration seconds": made["seconds"], "loss/dense": mean(dense["losses"])}
    metrics |= {"time a token / dense": speed["time a token / dense"], "speed/tokens_per_second": speed["tokens_per_second"]} if speed else {}
    for d, loss in losses.items():
        metrics |= {f"loss/{d}": loss, f"gap/{d}": gaps[d], f"ppl/{d}": math.exp(min(loss, 700.0)), f"dense/{d}/ppl": math.exp(min(dense["losses"][d], 700.0))}
    metrics |= {f"gap/{name}": mean(values) - mean(dense["losses"]) for name, values in found.get("losses", {}).items()}
    if routed := found.get("routing"):
        metrics |= {f"routing/{name}": statistics.fmean(routed[name]) for name in ("accuracy", "captured", "load_entropy", "mean_entropy", "token_entropy")}
    run.cost |= {f"{k}_parameters": v for k, v in made["counts"].items() if k != "trainable"} | {
        "flops_per_token": made["flops_per_token"], "flops / dense": made["flops_per_token"] / dense["flops_per_token"], "calibration_seconds": made["seconds"]}
    large = dense["counts"]["total"] >= PAPER_SIZE
    run.notes |= {
        "main": [k for k in ("loss/mean", "gap/mean", "active fraction", "time a token / dense", "calibration seconds") if k in metrics],
        "compare": ["gap/mean"] + ([f"gap/{cfg.leave_out}"] if f"gap/{cfg.leave_out}" in metrics else []),
        "text": ", ".join(text.path for text in cfg.texts) or cfg.data.text.path,
        "controls": [cfg.control_row()] if cfg.model.kind == "moe" else [], "same": list(SAME),
        "not_tested": [] if large else [f"the published training-free conversions start at 7 billion parameters; this model has {dense['counts']['total']:,}"]}
    if found:
        run.notes["by layer"] = {f"cost {name}": values for name, values in found["layers"].items()} | {
            name: values for name, values in found.get("routing", {}).items() if name != "load"}  # which is in the plots
    if cfg.model.kind == "oracle":
        run.notes["oracle"] = "chooses neurons by activations that it has computed all: a ceiling, whose costs are the dense model's"
    return metrics
