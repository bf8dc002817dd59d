"""Static, dynamic and partially dynamic convolutional networks on images, from data to a report: the stages of experiments/padnet_resnet50.py.

Every stage's numbers are remembered in the run folder, so that a resumed run goes on where it stopped. A run trains `cfg.model`, and for comparison those of
`cfg.beside`, for equally many steps on the same batches.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dyn import env, figures
from dyn.core.routing import annealed_temperature
from dyn.data.images import ImageData, open_images
from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.tiny import tiny_image_folder
from dyn.models.resnet import make_network
from dyn.nn.surgery import compact, dynamic_shares, macs_per_image, set_temperature
from dyn.train.annealing import AttentionEntropy, Temperature
from dyn.train.fit import Trained, scoring, train_classifier
from dyn.train.padnet import by_method, compare_forms, first_batches, forms_to_time, overall, partition, partition_at_random
from dyn.train.speed import interleaved, seconds_per_micro_batch
from dyn.train.trainer import check_world, on_gpu, on_threads, own_device, row_suffix, world

# What a row and its control share
SAME = ("epochs", "images", "minutes", "batch_size", "model.backbone", "model.stem", "model.dropout", "model.pretrained", "model.reduction", "data", "optim",
        "classify", "trainer.accumulate", "trainer.precision", "trainer.devices", "trainer.num_nodes")
CLAIM = "PAD-Net's abstract: with 30 % dynamic parameters better than fully dynamic (ResNet-50 on ImageNet, +0.7 points of top-1 accuracy)"
IMAGENET = (1000, 50_000)  # classes, validation images


def train_convnets(cfg: Any, run: Any) -> dict[str, Any]:
    """Partition, train, compact, measure. Returns the metrics, fills `run.cost` and `run.notes`."""
    check_world(cfg.trainer)
    rank, _ = world(cfg.trainer)
    gpu = on_gpu(cfg.trainer)
    cfg = dataclasses.replace(cfg, model=local_model(cfg.model, cfg.data.size, gpu))
    data = open_data(cfg, run, rank)
    models = by_method(cfg.model, cfg.beside)
    length = run.stage("length", lambda: _length(cfg, run, data, models))
    steps, cfg = length["steps"], dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, precision=length["precision"]))
    results = {}
    for name, model in models.items():
        results[name] = run.stage(name, lambda name=name, model=model: _train(cfg, run, data, name, model, steps))
        gc.collect()  # trainers and their networks hold each other
    if rank:
        return {}
    shutil.rmtree(run.folder / "start", ignore_errors=True)  # checkpoints hold what is in it
    speed = run.stage("timing", lambda: _timing(cfg, data, models))
    _draw(run, results, cfg.model)
    return _numbers(cfg, run, data, results, speed, steps)


def local_model(model: Any, size: int, gpu: bool) -> Any:
    """The model with what "auto" stands for on this machine."""
    small = "imagenet" if size > 64 else "stride1" if gpu else "stride2"
    return dataclasses.replace(model, backbone=model.backbone if model.backbone != "auto" else "resnet50" if gpu else "resnet10",
                               stem=model.stem if model.stem != "auto" else small)


def open_data(cfg: Any, run: Any, rank: int = 0) -> ImageData:
    """The images; "tiny" are generated into the run folder."""
    source = cfg.data
    if source.path == "tiny":
        env.once(run.folder / "tiny", lambda part: tiny_image_folder(part, count=60, size=source.size), rank)
        source = dataclasses.replace(source, path=str(run.folder / "tiny"))
    return open_images(source, log=run.log)


def build(cfg: Any, model: Any, classes: int) -> nn.Module:
    """The network of a ModelConfig as it starts, all positions dynamic; the random state is set by the seed."""
    torch.manual_seed(cfg.seed)
    return make_network(**_network(model, classes), pretrained=model.pretrained)


def _network(model: Any, classes: int) -> dict[str, Any]:
    """The arguments of `make_network`."""
    kind = {"static": None, "pad": "dyconv"}.get(model.method, model.method)
    return dict(backbone=model.backbone, kind=kind, partial=model.method == "pad", num_kernels=model.num_kernels, reduction=model.reduction,
                scales=model.scales, stem=model.stem, num_classes=classes, drop_rate=model.dropout)


def _length(cfg: Any, run: Any, data: ImageData, models: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of every training, and the precision. Where `cfg.minutes` is set, a step of each network is measured: fewer steps where the epochs would not fit,
    and float32 on a CPU on which bfloat16 is slower."""
    steps, precision = cfg.steps(len(data.train)), cfg.trainer.precision
    if steps < 2:
        given = f"epochs={cfg.epochs} of {len(data.train)} images" if cfg.images is None else f"images={cfg.images}"
        raise ValueError(f"{given} are {steps} steps of {cfg.images_per_step()}; at least 2 are needed")
    if cfg.minutes is None:
        return {"steps": steps, "precision": precision}
    device = own_device(cfg.trainer)
    batch = next(iter(ResumableLoader(data.train, batch_size=cfg.batch_size, seed=cfg.seed, num_batches=1)))
    images, labels = batch["images"].to(device), batch["labels"].to(device)
    nets = {name: partition_at_random(build(cfg, model, len(data.classes)), model).to(device) for name, model in models.items()}

    def seconds(name: str, dtype: torch.dtype) -> float:
        return seconds_per_micro_batch(nets[name], functools.partial(_loss, nets[name], (images, labels), 0.0), dtype)

    first, dtype = next(iter(nets)), cfg.trainer.dtype
    if device.type == "cpu" and precision == "bf16-mixed" and seconds(first, torch.float32) < seconds(first, dtype):
        run.log("bfloat16 is slower than float32 on this CPU: training in float32")
        precision, dtype = "32-true", torch.float32
    total = sum(seconds(name, dtype) for name in nets) * cfg.trainer.accumulate
    for net in nets.values():
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)  # its time counts: these networks store far more than an image is computed with
        total += min(interleaved({"step": optimizer.step}, 3)["step"])
    fitting = max(2, int(0.8 * 60 * cfg.minutes / total))  # the rest goes to mode partition, validations, and noise
    if fitting < steps:
        run.log(f"minutes={cfg.minutes} hold {fitting} of {steps} steps for each network on this machine ({total:.2f} s for one of each)")
    return {"steps": min(steps, fitting), "precision": precision}


def _loss(net: nn.Module, batch: tuple[Tensor, Tensor], smoothing: float) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], label_smoothing=smoothing)


# One training


def _train(cfg: Any, run: Any, data: ImageData, name: str, model: Any, steps: int) -> dict[str, Any]:
    """Build and partition one network, train it, compact and export it."""
    rank, size = world(cfg.trainer)
    loader = ResumableLoader(data.train, batch_size=cfg.batch_size, seed=cfg.seed, num_batches=steps * cfg.trainer.accumulate, rank=rank, world_size=size,
                             workers=cfg.workers)
    held = EvaluationLoader(data.validation, cfg.eval_batch_size, cfg.workers)
    net = build(cfg, model, len(data.classes))
    start = run.folder / "start" / name
    if model.method == "pad":  # kept, so that a resumed training has these modes and no others
        env.once(start, lambda part: _partition(cfg, run, data, net, model, part), rank)
        net.load_state_dict(load_file(start / "model.safetensors"))
    trainer = dataclasses.replace(cfg.trainer, max_steps=steps, seed=cfg.seed, val_every=min(cfg.trainer.val_every, math.ceil(steps / 2)))
    watching = AttentionEntropy(next(iter(held))["images"], cfg.classify.compile)
    annealing = round(model.temperature_share * steps)
    temperature = functools.partial(annealed_temperature, total_steps=max(1, annealing), start=model.temperature if annealing else 1.0)
    callbacks: list[Any] = [watching]
    if set_temperature(net, temperature(0)):  # CondConv has none
        callbacks.append(Temperature(temperature, functools.partial(set_temperature, net), cfg.trainer.log_every))
    trained = train_classifier(net, loader, {"validation": held}, run=run, name=name, optim=cfg.optim, trainer=trainer, num_labels=len(data.classes),
                               classify=cfg.classify, callbacks=callbacks)
    result = {"metrics": trained.metrics, "cost": trained.cost, "macs": macs_per_image(trained.net, (3, cfg.data.size, cfg.data.size)),
              "dynamic": dynamic_shares(trained.net), "entropy": watching.layers, "what": model.what()}
    if rank == 0:
        result |= _finish(cfg, run, data, name, model, trained)
    return result


def _partition(cfg: Any, run: Any, data: ImageData, net: nn.Module, model: Any, part: Any) -> None:
    """Iterative mode partition on training batches, augmented as in training; writes the network that it leaves (section 4.4)."""
    device = own_device(cfg.trainer)
    # Batches of a step's images in all, as large as training holds at once: gradients are sums over them.
    size = min(cfg.batch_size, len(data.train))
    loader = ResumableLoader(data.train, batch_size=size, seed=cfg.seed + 1, num_batches=max(1, model.batches * cfg.images_per_step() // size))
    batches = [(batch["images"].to(device), batch["labels"].to(device)) for batch in loader]
    with scoring(run):
        partition(net.to(device), batches, functools.partial(_loss, smoothing=cfg.classify.label_smoothing), model,
                  temperature=model.partition_temperature, seed=cfg.seed)
    net.cpu()
    part.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, part / "model.safetensors")
    run.log(f"{model.what()}: modes by {model.criterion} in {model.rounds} rounds on {len(batches)} batches of {size} images")


def _finish(cfg: Any, run: Any, data: ImageData, name: str, model: Any, trained: Trained) -> dict[str, Any]:
    """The compact form of a partially dynamic network, held against the trained one; the file that is kept."""
    device = own_device(cfg.trainer)
    net, result = trained.net.to(device).eval(), {}
    made = compact(net) if model.method == "pad" else net
    if made is not net:
        count = min(len(data.validation), cfg.compact_images or len(data.validation))
        found = compare_forms(net, made, lambda form, batch: form(batch["images"]), first_batches(data.validation, count, cfg.eval_batch_size, device))
        result["compact"] = {"parameters": sum(p.numel() for p in made.parameters()), "images": count} | found
        run.log("compact form: {parameters:,} parameters, accuracy {accuracy:.4f} on {images:,} images, {trained accuracy:.4f} before; "
                "largest difference of logits {difference:.1e}".format(**result["compact"]))
    if cfg.export and name == cfg.model.method:
        folder = run.folder / "export"
        folder.mkdir(exist_ok=True)
        save_file({key: value.cpu().contiguous() for key, value in made.state_dict().items()}, folder / "model.safetensors")
        about = {"network": _network(model, len(data.classes)), "compact": made is not net, "classes": data.classes, "data": data.what}
        (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")
    return result


# Time, figures, numbers


@contextmanager
def _inference(cfg: Any, device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and cfg.trainer.precision != "32-true"):
        yield


def _timing(cfg: Any, data: ImageData, models: Mapping[str, Any]) -> dict[str, float]:
    """Seconds an image of a forward pass, medians over interleaved rounds: every network of the run, the static one, and compact forms."""
    device = own_device(cfg.trainer)
    nets = forms_to_time(cfg, models, lambda model: partition_at_random(build(cfg, model, len(data.classes)), model).eval().to(device))
    images = data.validation.batch(np.arange(min(cfg.timing_batch, len(data.validation))), None)["images"].to(device)
    if cfg.classify.channels_last:
        images, nets = images.contiguous(memory_format=torch.channels_last), {name: net.to(memory_format=torch.channels_last) for name, net in nets.items()}
    with _inference(cfg, device):
        runs: dict[str, Callable[[], Tensor]] = {name: lambda net=net: net(images) for name, net in nets.items()}
        seconds = interleaved(runs, cfg.timing_rounds)
    return {name: statistics.median(values) / len(images) for name, values in seconds.items()}


def _draw(run: Any, results: Mapping[str, Any], model: Any) -> None:
    plots, rows = run.folder / "plots", figures.read_metrics(run.folder / "metrics.jsonl")
    by_network = {name: [row for row in rows if row.get("stage") == name] for name in results}
    share = {result["what"]: (overall(name, model), result["metrics"]["val/accuracy"]) for name, result in results.items()}
    if len(share) > 1:
        figures.points(plots / "accuracy.png", share, "share of dynamic positions", "validation accuracy")
    figures.attention_curves(plots / "attention.png", {results[name]["what"]: lines for name, lines in by_network.items()})
    if (result := results.get("pad")) is not None:
        figures.by_layer(plots / "dynamic.png", {result["what"]: list(result["dynamic"].values())}, "share of dynamic positions", level={"budget": model.keep})
    if entropies := {result["what"]: list(result["entropy"].values()) for result in results.values() if result["entropy"]}:
        figures.by_layer(plots / "entropy.png", entropies, "entropy of the attention / log K", level={"equal weights": 1.0})


def _numbers(cfg: Any, run: Any, data: ImageData, results: Mapping[str, Any], speed: Mapping[str, float], steps: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    table = [["network", "accuracy", "parameters, stored", "parameters, effective", "MACs an image", "ms an image", "time / static"]]
    for name, result in results.items():
        prefix, compacted, counts = "" if name == cfg.model.method else f"{name}/", result.get("compact") or {}, result["cost"]
        times = {"": speed[name]} | ({f"{form}/": speed[f"{name}, {form}"] for form in ("compact", "compact, expanded")} if compacted else {})
        metrics |= {f"{prefix}accuracy": result["metrics"]["val/accuracy"], f"{prefix}loss": result["metrics"]["val/loss"],
                    f"{prefix}dynamic share": overall(name, cfg.model)}
        metrics |= {f"{prefix}{form}time an image / static": seconds / speed["static"] for form, seconds in times.items()}
        metrics |= {f"{prefix}compact/{key}": value for key, value in compacted.items()}
        metrics |= {f"{prefix}attention/entropy": statistics.fmean(result["entropy"].values())} if result["entropy"] else {}
        metrics |= {f"{prefix}dynamic share by layer": list(result["dynamic"].values())} if name == "pad" else {}
        cost = counts | {"macs_per_image": result["macs"], "seconds_per_image": speed[name], "time_an_image / static": speed[name] / speed["static"]}
        run.cost |= cost if not prefix else {name: cost}
        for form, seconds in times.items():
            stored = compacted["parameters"] if form else counts["total_parameters"]  # both compact forms have one file
            table.append([result["what"] + (f", {form[:-1]}" if form else ""), compacted["accuracy"] if form else result["metrics"]["val/accuracy"], stored,
                          counts["active_parameters"], result["macs"], 1000 * seconds, seconds / speed["static"]])
    metrics |= {"train/steps": steps, "train/images": steps * cfg.images_per_step()}
    main = [f"{prefix}{key}" for key in ("accuracy", "dynamic share", "time an image / static") for prefix in ("", *(f"{name}/" for name in cfg.beside))]
    what = cfg.model.what()
    suffix = row_suffix(run, what)
    about = (f"{cfg.model.backbone} at {cfg.data.size} x {cfg.data.size}, stem {cfg.model.stem}: {steps:,} steps of {cfg.images_per_step()} images"
             f"{' for each network, one seed' if cfg.beside else ''}{on_threads(cfg.trainer)}")
    full = (len(data.classes), len(data.validation)) == IMAGENET and cfg.model.backbone == "resnet50"
    claims = [{"text": CLAIM, "metric": "accuracy", "against": f"DY-Conv, K = 4{suffix}", "wants": "higher"}] if run.row and _is_claimed(cfg.model) else []
    run.notes |= {
        "main": main, "compare": ["accuracy"], "same": list(SAME), "controls": [name + suffix for name in cfg.model.controls()] if run.row else [],
        "about": [f"images: {data.what}", about], "tables": {"Networks": table}, "points": {"x": "dynamic share", "y": "accuracy"},
        "claims": claims, "not_tested": [] if full else [f"ImageNet, and with it the paper's +0.7 points for ResNet-50; here {data.what}; {about}"]}
    return metrics


def _is_claimed(model: Any) -> bool:
    """Is it the network of the paper's claim?"""
    usual = (model.method, model.keep, model.criterion, model.scales, model.shuffle)
    return usual == ("pad", 0.3, "snip", "both", False)
