"""Static, dynamic and partially dynamic convolutional networks on images, from data to a report: the stages of experiments/padnet_resnet50.py.

Every stage's numbers are remembered in the run folder, so that a resumed run goes on where it stopped. A run trains `cfg.model`, and for comparison those of
`cfg.beside`, for equally many steps on the same batches.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
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
from dyn.core.partition import kept_count
from dyn.core.routing import annealed_temperature
from dyn.data.images import ImageData, open_images
from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.tiny import tiny_image_folder
from dyn.models.resnet import make_network
from dyn.nn.bank import Banked
from dyn.nn.surgery import compact, count_parameters, macs_per_image, make_partial, set_temperature
from dyn.train.annealing import AttentionEntropy, Temperature
from dyn.train.fit import Trained, train_classifier
from dyn.train.plan import GIB
from dyn.train.speed import interleaved, seconds_per_micro_batch
from dyn.train.trainer import check_world, world

SAME = ("epochs", "batch_size", "model.backbone", "model.stem", "model.dropout", "model.pretrained", "model.reduction", "data", "optim", "classify",
        "trainer.accumulate", "trainer.precision")  # what a row and its control share
FAMILY = {"static": "", "dyconv": "dyconv_", "condconv": "condconv_", "odconv": "odconv_", "pad": "padnet_"}  # of the names in timm's registry
CLAIM = "fully dynamic ResNet-50 on ImageNet: 0.7 points less top-1 accuracy than with 30 % dynamic parameters (the paper's abstract)"
IMAGENET = (1000, 50_000)  # classes, validation images
TOLERANCE = 0.01  # between the logits of a network and of its compact form, of the largest; TF32 rounds to 0.001


def train_convnets(cfg: Any, run: Any) -> dict[str, Any]:
    """Partition, train, compact, measure. Returns the metrics, fills `run.cost` and `run.notes`."""
    check_world(cfg.trainer)
    rank, _ = world(cfg.trainer)
    gpu = _gpu(cfg)
    cfg = dataclasses.replace(cfg, model=local_model(cfg.model, cfg.data.size, gpu))
    data = open_data(cfg, run, rank)
    models = {method: dataclasses.replace(cfg.model, method=method) for method in [*cfg.beside, cfg.model.method]}
    steps = run.stage("steps", lambda: _steps(cfg, run, data, models))
    results = {name: run.stage(name, lambda name=name: _train(cfg, run, data, name, models[name], steps)) for name in models}
    if rank:
        return {}
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
    kind = {"static": None, "pad": "dyconv"}.get(model.method, model.method)
    return make_network(model.backbone, kind, partial=model.method == "pad", num_kernels=model.num_kernels, reduction=model.reduction, scales=model.scales,
                        stem=model.stem, pretrained=model.pretrained, num_classes=classes, drop_rate=model.dropout)


def _gpu(cfg: Any) -> bool:
    return torch.cuda.is_available() and cfg.trainer.accelerator != "cpu"


def _steps(cfg: Any, run: Any, data: ImageData, models: Mapping[str, Any]) -> int:
    """Of every training; fewer than the epochs hold where they would not fit into `cfg.minutes`, by a measured step of each network."""
    steps = cfg.steps(len(data.train))
    if steps < 2:
        raise ValueError(f"epochs={cfg.epochs} of {len(data.train)} images are {steps} steps of {cfg.images_per_step()}; at least 2 are needed")
    if cfg.minutes is None:
        return steps
    device = "cuda" if _gpu(cfg) else "cpu"
    batch = next(iter(ResumableLoader(data.train, batch_size=cfg.batch_size, seed=cfg.seed, num_batches=1)))
    images, labels = batch["images"].to(device), batch["labels"].to(device)
    seconds = 0.0
    for model in models.values():
        net = _partitioned(cfg, model, len(data.classes)).to(device)
        seconds += seconds_per_micro_batch(net, functools.partial(_loss, net, (images, labels), 0.0), cfg.trainer.dtype) * cfg.trainer.accumulate
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)  # its time counts: these networks store far more than an image is computed with
        seconds += min(interleaved({"step": optimizer.step}, 3)["step"])
    fitting = max(2, int(0.8 * 60 * cfg.minutes / seconds))  # the rest goes to validations, and to noise
    if fitting < steps:
        run.log(f"minutes={cfg.minutes} hold {fitting} of {steps} steps for each network on this machine ({seconds:.2f} s for one of each)")
    return min(steps, fitting)


def _loss(net: nn.Module, batch: tuple[Tensor, Tensor], smoothing: float) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], label_smoothing=smoothing)


def _partitioned(cfg: Any, model: Any, classes: int) -> nn.Module:
    """The network with a random mask of the right size: what it costs does not depend on which positions are dynamic."""
    net = build(cfg, model, classes)
    return make_partial(net, None, None, keep=model.keep, method="random", scales=model.scales, static=model.static) if model.method == "pad" else net


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
    shares = {layer: _share(m) for layer, m in trained.net.named_modules() if isinstance(m, Banked)}
    result = {"metrics": trained.metrics, "cost": trained.cost, "macs": macs_per_image(trained.net, (3, cfg.data.size, cfg.data.size)),
              "dynamic": shares, "entropy": watching.layers, "what": model.what()}
    if rank == 0:
        result |= _finish(cfg, run, data, name, model, trained)
        (start / "model.safetensors").unlink(missing_ok=True)
    return result


def _partition(cfg: Any, run: Any, data: ImageData, net: nn.Module, model: Any, part: Any) -> None:
    """Iterative mode partition on training batches, augmented as in training; writes the network that it leaves (section 4.4)."""
    device = "cuda" if _gpu(cfg) else "cpu"
    loader = ResumableLoader(data.train, batch_size=min(cfg.images_per_step(), len(data.train)), seed=cfg.seed + 1, num_batches=model.batches)
    batches = [(batch["images"].to(device), batch["labels"].to(device)) for batch in loader]
    make_partial(net.to(device), batches, functools.partial(_loss, smoothing=cfg.classify.label_smoothing),
                 keep=model.keep, rounds=model.rounds, schedule=model.schedule, method=model.criterion, scope=model.scope, monotone=model.monotone,
                 scales=model.scales, static=model.static, temperature=model.partition_temperature, seed=cfg.seed,
                 shuffle="within_tensor" if model.shuffle else None)
    net.cpu()
    part.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, part / "model.safetensors")
    run.log(f"{model.what()}: modes by {model.criterion} in {model.rounds} rounds on {model.batches} batches of {len(batches[0][1])} images")


def _share(layer: Banked) -> float:
    """Share of a layer's positions that is dynamic."""
    partial = layer.partial
    return 1.0 if partial is None or partial.mask is None else partial.mask.double().mean().item()


def _finish(cfg: Any, run: Any, data: ImageData, name: str, model: Any, trained: Trained) -> dict[str, Any]:
    """The compact form of a partially dynamic network, held against the trained one; the file that is kept."""
    device = "cuda" if _gpu(cfg) else "cpu"
    net, result = trained.net.to(device).eval(), {}
    made = compact(net) if model.method == "pad" else net
    if made is not net:
        count = min(len(data.validation), cfg.compact_images or len(data.validation))
        result["compact"] = {"parameters": sum(p.numel() for p in made.parameters())} | _compare(cfg, net, made, data, count, device)
        run.log("compact form: {parameters:,} parameters, accuracy {accuracy:.4f} on {images:,} images, {trained accuracy:.4f} before; "
                "largest difference of logits {difference:.1e}".format(**result["compact"]))
    if cfg.export and name == cfg.model.method:
        arguments = {"num_classes": len(data.classes), "stem": model.stem, "drop_rate": model.dropout}
        arguments |= {} if model.method == "static" else {"num_kernels": model.num_kernels, "reduction": model.reduction}
        arguments |= {"scales": model.scales} if model.method == "pad" else {}
        folder = run.folder / "export"
        folder.mkdir(exist_ok=True)
        save_file({key: value.cpu().contiguous() for key, value in made.state_dict().items()}, folder / "model.safetensors")
        about = {"timm": FAMILY[model.method] + model.backbone, "arguments": arguments, "compact": made is not net, "classes": data.classes, "data": data.what}
        (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")
    return result


@torch.no_grad()
def _compare(cfg: Any, net: nn.Module, made: nn.Module, data: ImageData, count: int, device: str) -> dict[str, float]:
    """Both forms on the first `count` validation images in float32. RuntimeError when their logits differ by more than rounding."""
    right, ours, theirs, largest, difference = 0, 0, 0, 0.0, 0.0
    for places in np.split(np.arange(count), range(cfg.eval_batch_size, count, cfg.eval_batch_size)):
        batch = data.validation.batch(places, None)
        images, labels = batch["images"].to(device), batch["labels"].to(device)
        a, b = net(images), made(images)
        ours, theirs = ours + int((a.argmax(1) == labels).sum()), theirs + int((b.argmax(1) == labels).sum())
        right += int((a.argmax(1) == b.argmax(1)).sum())
        largest, difference = max(largest, a.abs().max().item()), max(difference, (a - b).abs().max().item())
    if not difference <= TOLERANCE * largest:
        raise RuntimeError(f"the compact form's logits differ by {difference:.3g} from the trained network's, whose largest is {largest:.3g}")
    return {"images": count, "accuracy": theirs / count, "trained accuracy": ours / count, "same answers": right / count, "difference": difference}


# Time, figures, numbers


@contextmanager
def _inference(cfg: Any, device: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and cfg.trainer.precision != "32-true"):
        yield


def _timing(cfg: Any, data: ImageData, models: Mapping[str, Any]) -> dict[str, float]:
    """Seconds an image of a forward pass, medians over interleaved rounds: every network of the run, the static one, and compact forms."""
    device = "cuda" if _gpu(cfg) else "cpu"
    nets: dict[str, nn.Module] = {}
    for name, model in ({"static": dataclasses.replace(cfg.model, method="static")} | dict(models)).items():
        net = nets[name] = _partitioned(cfg, model, len(data.classes)).eval().to(device)
        if model.method == "pad":
            nets |= {f"{name}, compact": compact(net), f"{name}, compact, expanded": compact(net, expand=True)}
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
    share = {result["what"]: (_overall(name, model), result["metrics"]["val/accuracy"]) for name, result in results.items()}
    if len(share) > 1:
        figures.points(plots / "accuracy.png", share, "share of dynamic positions", "validation accuracy")
    figures.attention_curves(plots / "attention.png", {results[name]["what"]: lines for name, lines in by_network.items()})
    if (result := results.get("pad")) is not None:
        figures.by_layer(plots / "dynamic.png", {result["what"]: list(result["dynamic"].values())}, "share of dynamic positions", level={"budget": model.keep})
    if entropies := {result["what"]: list(result["entropy"].values()) for result in results.values() if result["entropy"]}:
        figures.by_layer(plots / "entropy.png", entropies, "entropy of the attention / log K", level={"equal weights": 1.0})


def _overall(method: str, model: Any) -> float:
    return {"static": 0.0, "pad": model.keep}.get(method, 1.0)


def _numbers(cfg: Any, run: Any, data: ImageData, results: Mapping[str, Any], speed: Mapping[str, float], steps: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name, result in results.items():
        prefix = "" if name == cfg.model.method else f"{name}/"
        compacted = result.get("compact") or {}
        metrics |= {f"{prefix}accuracy": result["metrics"]["val/accuracy"], f"{prefix}loss": result["metrics"]["val/loss"],
                    f"{prefix}dynamic share": _overall(name, cfg.model), f"{prefix}time an image / static": speed[name] / speed["static"]}
        metrics |= {f"{prefix}compact/{key}": value for key, value in compacted.items()}
        metrics |= {f"{prefix}compact/time an image / static": speed[f"{name}, compact"] / speed["static"],
                    f"{prefix}compact, expanded/time an image / static": speed[f"{name}, compact, expanded"] / speed["static"]} if compacted else {}
        metrics |= {f"{prefix}attention/entropy": statistics.fmean(result["entropy"].values())} if result["entropy"] else {}
        metrics |= {f"{prefix}dynamic share by layer": list(result["dynamic"].values())} if name == "pad" else {}
        cost = result["cost"] | {"macs_per_image": result["macs"], "seconds_per_image": speed[name]}
        run.cost |= cost if not prefix else {name: cost}
    metrics |= {"train/steps": steps, "train/images": steps * cfg.images_per_step()}
    main = [f"{prefix}{key}" for key in ("accuracy", "dynamic share", "time an image / static") for prefix in ("", *(f"{name}/" for name in cfg.beside))]
    what, full = cfg.model.what(), (len(data.classes), len(data.validation)) == IMAGENET
    suffix = run.row.removeprefix(what) if run.row.startswith(what) else ""
    about = f"{cfg.model.backbone} at {cfg.data.size} x {cfg.data.size}, stem {cfg.model.stem}, {steps:,} steps of {cfg.images_per_step()} images each"
    threads = "" if _gpu(cfg) else f" on {torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)}"
    run.notes |= {
        "main": main, "compare": ["accuracy"], "same": list(SAME), "controls": [name + suffix for name in cfg.model.controls()] if run.row else [],
        "about": [f"images: {data.what}", about + threads + (", one seed, networks side by side" if cfg.beside else "")],
        "points": {"x": "dynamic share", "y": "accuracy"},
        "claims": [{"text": CLAIM, "metric": "accuracy", "against": f"DY-Conv, K = 4{suffix}", "wants": "higher"}] if run.row and _is_claimed(cfg) else [],
        "not_tested": [] if full and cfg.model.backbone == "resnet50" else [
            f"the paper's claim is about ResNet-50 on ImageNet (+0.7 points of top-1 accuracy over the fully dynamic network); here: {about}, {data.what}"]}
    return metrics


def _is_claimed(cfg: Any) -> bool:
    return cfg.model.method == "pad" and cfg.model.keep == 0.3 and not cfg.model.shuffle and cfg.model.scales == "both" and cfg.model.criterion == "snip"


# Plan

IMAGES = {"ILSVRC/imagenet-1k": (1_281_167, 1000), "cifar10": (50_000, 10), "uoft-cs/cifar10": (50_000, 10), "fashion-mnist": (60_000, 10),
          "local": (60_000, 10), "digits": (1_438, 10), "tiny": (60, 3)}  # to train on, and classes


def plan_convnets(cfg: Any) -> dict[str, Any]:
    """What the run would be, from shapes alone. `cfg` is the Config of experiments/padnet_resnet50.py."""
    model = local_model(cfg.model, cfg.data.size, _gpu(cfg))
    images, classes = IMAGES.get(cfg.data.path, (None, 1000))
    methods = [*cfg.beside, model.method]
    planned = {method: _planned(cfg, dataclasses.replace(model, method=method), classes) for method in methods}
    made = {"network": ", ".join(f"{dataclasses.replace(model, method=m).what()}, {model.backbone} at {cfg.data.size} x {cfg.data.size}" for m in methods)}
    if images is None:
        training = {"epochs": cfg.epochs, "steps": f"known once {cfg.data.path} is open"}
    else:
        used = min(images, cfg.data.train_limit or images)
        used -= round(cfg.data.tuning * used)
        steps = cfg.steps(used)
        training = {"images": used, "images a step": cfg.images_per_step(), "steps": steps, "devices": cfg.trainer.world_size, "limit, minutes": cfg.minutes,
                    "FLOPs (3 x 2 x MACs x images)": sum(6 * found["MACs an image"] for found in planned.values()) * steps * cfg.images_per_step()}
    return made | {"training": training} | (planned if len(planned) > 1 else planned[model.method])


def _planned(cfg: Any, model: Any, classes: int) -> dict[str, Any]:
    """Parameters, multiply-adds and memory of one network."""
    with torch.device("meta"):
        net = build(cfg, model, classes)
    shape = (3, cfg.data.size, cfg.data.size)
    counts, macs = count_parameters(net), macs_per_image(net, shape)
    banks = [m for m in net.modules() if isinstance(m, Banked)]
    positions = sum(m.weight[0].numel() for m in banks)
    static = positions - kept_count(positions, model.keep, "up") if model.method == "pad" else 0
    if static and model.scales != "prune":
        counts["total"] += positions  # while it trains, a partially dynamic layer holds K whole kernels and a whole static one
    counts["stored"] -= static * (model.num_kernels - (model.scales != "prune"))
    width = 4 if cfg.trainer.precision == "32-true" else 2
    mixed = sum(m.weight[0].numel() for m in banks) * cfg.batch_size * width
    memory = {"weights, gradients, momentum": (16 if cfg.optim.optimizer == "adamw" else 12) * counts["total"],
              "activations": _outputs(net, shape) * cfg.batch_size * width, "mixed kernels, at most": mixed}
    return {"parameters": {"total": counts["total"], "activated (without gates)": counts["active"], "stored (compact)": counts["stored"],
                           "gates": counts["gate"]},
            "MACs an image": macs - static * model.num_kernels,
            "memory, GiB a device (estimate)": {key: round(value / GIB, 2) for key, value in (memory | {"total": sum(memory.values())}).items()}}


def _outputs(net: nn.Module, shape: tuple[int, ...]) -> int:
    """Numbers that the network's layers give for one image: about what a backward pass needs kept."""
    counted = [0]

    def add(_: nn.Module, __: tuple, out: Tensor) -> None:
        counted[0] += out.numel()

    handles = [m.register_forward_hook(add) for m in net.modules() if isinstance(m, Banked) or not any(m.children())]
    with torch.no_grad():
        net.eval()(torch.empty(1, *shape, device="meta"))
    for handle in handles:
        handle.remove()
    return counted[0]
