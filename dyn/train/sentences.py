"""Encoders on labelled sentences: what experiments on GLUE share. Encoder and tokenizer by name, task data, loaders, the number of steps, the loss outside a
training, GLUE's scores, the time of an example, answers in a file.

An experiment's Config has what is read here: `source` of the encoder (a packaged model's name, a folder, a hub id, or "tiny"), `data` (SentenceSource),
`epochs`, `minutes`, `batch_size`, `eval_batch_size`, `workers`, `seed`, `trainer`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn import env
from dyn.data.glue import NOT_IN_MEANS, SentenceData, SentenceSet, open_sentences
from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.tiny import tiny_glue, tiny_tokenizer
from dyn.models.packaged import PACKAGED, SEEN, load_tokenizer, packaged, sentence_classifier, tiny_encoder, with_places
from dyn.train.classify import Answers
from dyn.train.speed import interleaved, on_device, seconds_per_micro_batch
from dyn.train.trainer import on_gpu, own_device, world

Inputs = dict[str, Tensor]


def open_task(cfg: Any, run: Any, source: str, task: str, setting: str = "source") -> SentenceData:
    """The data of one task for the encoder `source`, which `setting` names; the path "tiny" is generated into the run folder. The log says what was taken."""
    data, rank = dataclasses.replace(cfg.data, task=task), world(cfg.trainer)[0]
    if data.path == "tiny":
        env.once(run.folder / "tiny-glue", lambda part: tiny_glue(part, ("cola", "mrpc", "stsb")), rank)
        data = dataclasses.replace(data, path=str(run.folder / "tiny-glue"))
    tokenizer = load_tokenizer(encoder_folder(source, run, rank), setting)
    return open_sentences(data, tokenizer, multiple=8 if on_gpu(cfg.trainer) else 1, log=run.log)


def encoder_folder(source: str, run: Any, rank: int = 0) -> str | Path:
    """Where the encoder and its tokenizer are; "tiny" is generated into the run folder."""
    if source != "tiny":
        return packaged(source) if source in PACKAGED else source

    def make(part: Path) -> None:
        tokenizer = tiny_tokenizer()
        tiny_encoder(part, len(tokenizer))
        tokenizer.save_pretrained(part)

    env.once(run.folder / "tiny-encoder", make, rank)
    return run.folder / "tiny-encoder"


def build(cfg: Any, run: Any, source: str, data: SentenceData) -> nn.Module:
    """The encoder with a head for the task; the head, and what is drawn after it, follow from `cfg.seed`."""
    folder = encoder_folder(source, run, world(cfg.trainer)[0])
    torch.manual_seed(cfg.seed)
    net = with_places(sentence_classifier(folder, data.num_labels), cfg.data.max_length)
    if net.config.pad_token_id is None:
        net.config.pad_token_id = data.train.pads["input_ids"]  # decoders look for a sentence's last token by it
    if not on_gpu(cfg.trainer):
        net.set_attn_implementation("eager")  # with dropout a CPU has no fused attention, and the plain one has fewer passes
    return net


def loaders(cfg: Any, data: Any, steps: int) -> tuple[ResumableLoader, dict[str, EvaluationLoader]]:
    """(this rank's training batches, of examples of similar length; validation sets in whole)."""
    rank, size = world(cfg.trainer)
    train = ResumableLoader(data.train, batch_size=cfg.batch_size, seed=cfg.seed, num_batches=steps * cfg.trainer.accumulate, lengths=data.train.lengths,
                            drop_last=len(data.train) >= cfg.batch_size * size, rank=rank, world_size=size, workers=cfg.workers)
    return train, {split: EvaluationLoader(part, cfg.eval_batch_size) for split, part in data.validation.items()}


def full_steps(cfg: Any, examples: int) -> int:
    """Optimiser steps in the epochs."""
    return max(1, math.floor(cfg.epochs * epoch_steps(cfg, examples)))


def epoch_steps(cfg: Any, examples: int) -> float:
    """Optimiser steps in an epoch."""
    return max(1, examples // (cfg.batch_size * cfg.trainer.world_size)) / cfg.trainer.accumulate  # fewer examples than a batch are one


def fitting_steps(cfg: Any, run: Any, wanted: Mapping[str, int], nets: Iterable[Callable[[], nn.Module]], data: Any,
                  loss: Callable[[nn.Module, Inputs], Tensor] | None = None) -> dict[str, int]:
    """Steps by task; fewer than wanted, all by one factor, where those of all `nets` do not fit into `cfg.minutes`, by a measured step of each on `data`.
    loss: of a batch; None: `sentence_loss`."""
    if cfg.minutes is None:
        return dict(wanted)
    loss = loss or sentence_loss
    device, seconds = own_device(cfg.trainer), 0.0
    batch = on_device(typical_batch(data.train, cfg.batch_size), device)
    for make in nets:
        net = make().to(device)
        seconds += seconds_per_micro_batch(net, lambda net=net: loss(net, batch), cfg.trainer.dtype) * cfg.trainer.accumulate
        trained = [p for p in net.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(trained, lr=0.0)  # its time counts: experts are many more parameters than a token is computed with
        seconds += min(interleaved({"step": optimizer.step}, 3)["step"])
    fitting = int(0.8 * 60 * cfg.minutes / seconds)  # the rest goes to validations, and to noise
    if fitting >= (total := sum(wanted.values())):
        return dict(wanted)
    run.log(f"minutes={cfg.minutes} hold {fitting} of {total} steps for each network on this machine ({seconds:.2f} s for one of each)")
    return {task: max(2, math.floor(steps * fitting / total)) for task, steps in wanted.items()}


def faster_precision(cfg: Any, run: Any, make: Callable[[], nn.Module], data: Any) -> str:
    """`cfg.trainer.precision`; where the run has a limit in minutes and no GPU, float32 in place of bfloat16 if that is faster here, by a measured step."""
    precision = cfg.trainer.precision
    if cfg.minutes is None or on_gpu(cfg.trainer) or precision != "bf16-mixed":
        return precision
    net, batch = make(), typical_batch(data.train, cfg.batch_size)
    exact, short = (seconds_per_micro_batch(net, lambda: sentence_loss(net, batch), dtype, 2) for dtype in (torch.float32, torch.bfloat16))
    if exact >= short:
        return precision
    run.log("bfloat16 is slower than float32 on this CPU: training in float32")
    return "32-true"


def typical_batch(part: Any, count: int) -> Inputs:
    """A batch of examples about as long as they are on average."""
    return part.batch(np.argsort(np.abs(part.lengths - part.lengths.mean()), kind="stable")[:count], None)


def sentence_loss(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy, or squared error for one output, plus the auxiliary loss of nets that have one: `loss_fn` of saliencies, and for timing."""
    labels, inputs = batch["labels"], {key: value for key, value in batch.items() if key not in ("labels", "index")}
    out = net(**inputs)
    loss = F.mse_loss(out.logits.float().squeeze(-1), labels) if out.logits.shape[-1] == 1 else F.cross_entropy(out.logits.float(), labels)
    aux = getattr(out, "aux_loss", None)
    return loss if aux is None else loss + aux


def scoring_batches(cfg: Any, data: SentenceData, count: int) -> list[Inputs]:
    """Random training examples, as many as in `count` steps, for criteria that look at data; other ones than the training's first. In batches of the training's
    own size, since one device scores."""
    size, device = min(cfg.batch_size, len(data.train)), own_device(cfg.trainer)
    number = count * max(1, min(cfg.batch_size * cfg.trainer.accumulate * cfg.trainer.world_size, len(data.train)) // size)
    return [on_device(batch, device) for batch in ResumableLoader(data.train, batch_size=size, seed=cfg.seed + 1, num_batches=number)]


def scores(metrics: Mapping[str, float], data: SentenceData) -> dict[str, float]:
    """GLUE's numbers of a task from a training's metrics: each of its metrics (mean over validation sets), and their mean as "score"."""
    splits = [f"val/{split}/" for split in data.validation] if len(data.validation) > 1 else ["val/"]
    found = {metric: statistics.fmean(metrics[split + metric] for split in splits) for metric in data.metrics}
    return found | {"score": statistics.fmean(found.values())}


def mean_score(results: Mapping[str, Mapping[str, Any]], name: str, key: str = "score") -> float:
    """Average over tasks of the network `name`, as GLUE's without WNLI; results: by task and network, with "scores"."""
    tasks = [task for task in results if task != NOT_IN_MEANS] or list(results)
    return statistics.fmean(results[task][name]["scores"][key] for task in tasks)


def write_answers(path: Path, answers: Mapping[str, Answers]) -> None:
    """What was said to every validation example, by set: for tests that pair two nets' answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: {key: column.tolist() for key, column in found._asdict().items()} for name, found in answers.items()}) + "\n")


def caveats(source: str, tasks: Iterable[str]) -> list[str]:
    """What is to be said beside results of this encoder on these tasks: that it has seen something like them."""
    return [f"{task}: {source} was trained on {SEEN[source][task]}, so this task is not new to it" for task in tasks if task in SEEN.get(source, {})]


@torch.no_grad()
def seconds_per_example(cfg: Any, nets: Mapping[str, nn.Module], part: SentenceSet, count: int, rounds: int) -> dict[str, float]:
    """Of a forward pass over `count` examples of average length, in evaluation: medians over interleaved rounds."""
    device = own_device(cfg.trainer)
    batch = {key: value for key, value in on_device(typical_batch(part, count), device).items() if key != "labels"}
    nets = {name: net.eval().to(device) for name, net in nets.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.trainer.precision != "32-true"):
        runs: dict[str, Callable[[], Any]] = {name: lambda net=net: net(**batch) for name, net in nets.items()}
        seconds = interleaved(runs, rounds)
    return {name: statistics.median(values) / len(batch["input_ids"]) for name, values in seconds.items()}
