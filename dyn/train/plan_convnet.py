"""What a run of experiments/padnet_resnet50.py would be, from shapes alone: parameters, multiply-adds, memory, steps. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from dyn.nn.bank import Banked
from dyn.nn.count import summed
from dyn.nn.surgery import macs_per_image
from dyn.train.convnet import build, local_model
from dyn.train.padnet import by_method, planned_parameters
from dyn.train.plan import GIB
from dyn.train.trainer import on_gpu

IMAGES = {"ILSVRC/imagenet-1k": (1_281_167, 1000), "cifar10": (50_000, 10), "uoft-cs/cifar10": (50_000, 10), "fashion-mnist": (60_000, 10),
          "local": (60_000, 10), "digits": (1_438, 10), "tiny": (60, 3)}  # to train on, and classes


def plan_convnets(cfg: Any) -> dict[str, Any]:
    """What the run would be, from shapes alone. `cfg` is the Config of experiments/padnet_resnet50.py."""
    model = local_model(cfg.model, cfg.data.size, on_gpu(cfg.trainer))
    images, classes = IMAGES.get(cfg.data.path, (None, 1000))
    models = by_method(model, cfg.beside)
    planned = {method: _planned(cfg, model, classes) for method, model in models.items()}
    made = {"network": ", ".join(f"{m.what()}, {m.backbone} at {cfg.data.size} x {cfg.data.size}" for m in models.values())}
    if images is None and cfg.images is None:
        training = {"epochs": cfg.epochs, "steps": f"known once {cfg.data.path} is open"}
    else:
        used = min(images or cfg.images, cfg.data.train_limit or math.inf)
        used -= round(cfg.data.tuning * used)
        steps = cfg.steps(used)
        training = {"images": used, "images a step": cfg.images_per_step(), "steps": steps, "devices": cfg.trainer.world_size, "limit, minutes": cfg.minutes,
                    "FLOPs (3 x 2 x MACs x images)": sum(6 * found["MACs an image"] for found in planned.values()) * steps * cfg.images_per_step()}
    return made | {"training": training} | (planned if len(planned) > 1 else planned[model.method])


def _planned(cfg: Any, model: Any, classes: int) -> dict[str, Any]:
    """Parameters, multiply-adds and memory of one network."""
    with torch.device("meta"):
        net = build(cfg, dataclasses.replace(model, pretrained=False), classes)
    shape = (3, cfg.data.size, cfg.data.size)
    parameters, positions, static = planned_parameters(net, model, model.num_kernels)
    width = 4 if cfg.trainer.precision == "32-true" else 2
    memory = {"weights, gradients, momentum": (16 if cfg.optim.optimizer == "adamw" else 12) * parameters["total"],
              "activations": _outputs(net, shape) * cfg.batch_size * width, "mixed kernels, at most": positions * cfg.batch_size * width}
    return {"parameters": parameters,
            "MACs an image": macs_per_image(net, shape) - static * model.num_kernels,
            "memory, GiB a device (estimate)": {key: round(value / GIB, 2) for key, value in (memory | {"total": sum(memory.values())}).items()}}


def _outputs(net: nn.Module, shape: tuple[int, ...]) -> int:
    """Numbers that the network's layers give for one image: about what a backward pass needs kept."""
    return summed(net, lambda m: isinstance(m, Banked) or not any(m.children()), lambda _, out: out.numel(), torch.empty(1, *shape, device="meta"))
