"""Dynamic and partially dynamic ResNets and MobileNetV2s in timm's registry (PAD-Net sections 1.4-1.6).

    timm.create_model("padnet_resnet50", num_kernels=4)

Names are {padnet, dyconv, condconv, odconv}_{resnet10, resnet18, resnet34, resnet50, resnet101, mobilenetv2_050, mobilenetv2_075, mobilenetv2_100}.
padnet_* starts fully dynamic, with one scale parameter a layer; `dyn.nn.surgery.make_partial` makes a part of it static.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import timm
from timm.models import build_model_with_cfg, register_model
from timm.models.efficientnet import mobilenetv2_050, mobilenetv2_075, mobilenetv2_100
from timm.models.resnet import BasicBlock, ResNet, resnet18, resnet34, resnet50, resnet101
from torch import nn

from dyn.core.mixture import Scales
from dyn.nn.bank import Banked
from dyn.nn.convert_conv import make_dynamic


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


def _entry(family: str, backbone: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, num_kernels: int = 4, reduction: int = 16, scales: Scales = "both", **kwargs) -> nn.Module:
        model = BACKBONES[backbone](pretrained=pretrained, **kwargs)
        make_dynamic(model, FAMILIES[family], num_kernels, reduction, start="copies" if pretrained else "fresh")
        if family == "padnet":
            for layer in model.modules():
                if isinstance(layer, Banked):
                    layer.add_partial(scales)
        return model

    create.__name__ = create.__qualname__ = f"{family}_{backbone}"
    create.__doc__ = f"timm's {backbone} with {FAMILIES[family]} convolutions" + (", a part of which can become static." if family == "padnet" else ".")
    return create


ENTRIES = {f"{family}_{backbone}": register_model(_entry(family, backbone)) for family in FAMILIES for backbone in BACKBONES}
