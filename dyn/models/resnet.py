"""Dynamic and partially dynamic ResNets and MobileNetV2s in timm's registry (PAD-Net sections 1.4-1.6).

    timm.create_model("padnet_resnet50", num_kernels=4)

Names are {padnet, dyconv, condconv, odconv}_{resnet10, resnet18, resnet34, resnet50, resnet101, mobilenetv2_050, mobilenetv2_075, mobilenetv2_100}.
padnet_* starts fully dynamic, with one scale parameter a layer; `dyn.nn.surgery.make_partial` makes a part of it static.

Unlike timm's own, their batch norms all start at 1, as in the official code: with timm's zero at the end of every residual branch no weight inside it has any
effect on the loss at first, and mode partition by the loss could tell none of them from another.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Literal, get_args

import timm
from timm.models import build_model_with_cfg, register_model, register_notrace_module
from timm.models.efficientnet import mobilenetv2_050, mobilenetv2_075, mobilenetv2_100
from timm.models.resnet import BasicBlock, ResNet, resnet18, resnet34, resnet50, resnet101
from torch import nn

from dyn.core.mixture import Scales
from dyn.nn.bank import Banked
from dyn.nn.convert_conv import make_dynamic
from dyn.nn.dynamic_conv import KINDS


def resnet10(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet of basic blocks [1, 1, 1, 1], which timm has only with another stem. ValueError for pretrained: there are no weights."""
    if pretrained:
        raise ValueError("resnet10 has no pre-trained weights; pretrained=False is allowed")
    kwargs["pretrained_cfg"] = dataclasses.replace(timm.get_pretrained_cfg("resnet18"), architecture="resnet10", tag=None, url=None, hf_hub_id=None)
    return build_model_with_cfg(ResNet, "resnet10", False, block=BasicBlock, layers=(1, 1, 1, 1), **kwargs)


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f for f in (resnet10, resnet18, resnet34, resnet50, resnet101, mobilenetv2_050, mobilenetv2_075, mobilenetv2_100)
}
FAMILIES = {"padnet": "dyconv", "dyconv": "dyconv", "condconv": "condconv", "odconv": "odconv"}


Stem = Literal["imagenet", "stride1", "stride2"]  # as the network has it; or, for small images, a 3x3 convolution of that stride and no pooling


def make_network(backbone: str, kind: str | None = None, *, partial: bool = False, num_kernels: int = 4, reduction: int = 16, scales: Scales = "both",
                 stem: Stem = "imagenet", pretrained: bool = False, **kwargs) -> nn.Module:
    """A network of timm, static (kind None) or with dynamic convolutions, whose banks have modes where `partial` says so (all dynamic at first).

    Args:
        backbone: one of BACKBONES, or any model of timm.
        kind, num_kernels, reduction: as in `make_dynamic`. Kernels are drawn, or copies of the weights of a pre-trained network.
        scales: of the modes.
        stem: for small images two others than the network's own, of ResNets and MobileNets.
        pretrained: timm's weights.
        kwargs: for timm (num_classes, drop_rate, ...).

    Raises:
        ValueError: an unknown backbone, a stem that it cannot have, and as in `make_dynamic`.
    """
    if backbone not in BACKBONES and not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, [*BACKBONES, *timm.list_models()], n=1, cutoff=0.0)[0]
        raise ValueError(f"backbone={backbone!r} is unknown; nearest: {near!r}; allowed: {', '.join(BACKBONES)} and every model of timm")
    create = BACKBONES.get(backbone) or (lambda **more: timm.create_model(backbone, **more))
    if not pretrained and _is_residual(backbone):
        kwargs = {"zero_init_last": False} | kwargs
    model = create(pretrained=pretrained, **kwargs)
    _set_stem(model, stem)
    if kind is not None:
        make_dynamic(model, kind, num_kernels, reduction, start="copies" if pretrained else "fresh")
    for layer in model.modules() if partial else ():
        if isinstance(layer, Banked):
            layer.add_partial(scales)
    return model


def _is_residual(backbone: str) -> bool:
    """Is it of timm's class ResNet?"""
    return timm.models.model_entrypoint(backbone).__module__ == ResNet.__module__ if timm.is_model(backbone) else backbone == "resnet10"


def _set_stem(model: nn.Module, stem: Stem) -> None:
    if stem not in get_args(Stem):
        raise ValueError(f"stem={stem!r} is unknown; allowed: {', '.join(get_args(Stem))}")
    if stem == "imagenet":
        return
    name = next((name for name in ("conv1", "conv_stem") if isinstance(getattr(model, name, None), nn.Conv2d)), None)
    if name is None:
        raise ValueError(f"stem={stem!r} is for ResNets and MobileNets whose stem is one convolution, not {type(model).__name__}")
    old = getattr(model, name)
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, int(stem[-1]), 1, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    setattr(model, name, new)
    if hasattr(model, "maxpool"):
        model.maxpool = nn.Identity()


def _entry(family: str, backbone: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, num_kernels: int = 4, reduction: int = 16, scales: Scales = "both", stem: Stem = "imagenet", **kwargs) -> nn.Module:
        return make_network(backbone, FAMILIES[family], partial=family == "padnet", num_kernels=num_kernels, reduction=reduction, scales=scales, stem=stem,
                            pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = f"{family}_{backbone}"
    create.__doc__ = f"timm's {backbone} with {FAMILIES[family]} convolutions" + (", a part of which can become static." if family == "padnet" else ".")
    return create


for _kind in KINDS.values():
    register_notrace_module(_kind)  # torch.fx takes such a layer whole: what it does depends on shapes
ENTRIES = {f"{family}_{backbone}": register_model(_entry(family, backbone)) for family in FAMILIES for backbone in BACKBONES}
