"""A network's convolutions, made dynamic in place (PAD-Net sections 1.4, 1.5)."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dyn.nn.dynamic_conv import KINDS, MixedConv2d
from dyn.nn.probe import is_bare

_log = logging.getLogger(__name__)

Start = Literal["copies", "one_copy", "fresh"]
CLASSIFIERS = ("classifier", "fc", "head", "last_linear", "pre_logits")  # where timm and torchvision keep a network's classifier, on top
INNER = ("classifier", "aux_classifier", "cls_logits", "bbox_pred")  # the same of a part of a network: of a wrapped one, auxiliary, of a detector
# Of timm and torchvision; the last is torchvision's RegNet.
DOWN_SAMPLE = re.compile(r"(^|\.)(downsample|shortcut|project|skip|c1x1_w_s[12]|block\d+-\d+\.proj)(\.|$)")
DOWN_SAMPLE_STATIC = ("condconv", "odconv")  # kinds that leave such convolutions static; the published counts arise this way (section 1.6)


def make_dynamic(model: nn.Module, kind: str = "dyconv", num_kernels: int = 4, reduction: int = 16, skip: str | Sequence[str] | None = None, *,
                 start: Start = "copies", noise: float = 0.01, form: str = "auto") -> nn.Module:
    """Replace the convolutions of a CNN (timm, torchvision or your own) by dynamic ones, in place; returns the model.

    The stem (the first convolution, with the others of its module where those are less than half of all) and the classifier's convolutions stay static; with
    condconv and odconv those of down-sample paths too. Convolutions that are no plain zero-padded `nn.Conv2d` (weight standardisation, weight and spectral
    norms, padding that follows the input's size), and those with hooks, stay static, which the log says.

    Args:
        kind: one of `dyn.nn.dynamic_conv.KINDS`.
        num_kernels, reduction: K and the attention's reduction.
        skip: a regular expression, or several, found in the names of convolutions that stay static too.
        start: what the kernels are. copies: the network's weights, each kernel with normal noise of `noise` times the weight's standard deviation, so that
            they can part; attention starts so that the network computes what it did, up to the noise. one_copy: kernel 0 is the weight, the others are
            drawn. fresh: all are drawn, for training from scratch.
        form: how the layers compute (`dyn.ops.dynamic_conv`).

    Raises:
        ValueError: an unknown kind or start, a model without convolutions to replace, a pattern of `skip` that finds none.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"make_dynamic takes a network, got {type(model).__name__}")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; allowed: {', '.join(KINDS)}")
    if start not in get_args(Start):
        raise ValueError(f"start={start!r} is unknown; allowed: {', '.join(get_args(Start))}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise={noise} must be a number, not negative")
    found = _convertible(model, kind, [skip] if isinstance(skip, str) else list(skip or ()))
    made: dict[nn.Conv2d, MixedConv2d] = {}
    for conv in found.values():
        if conv not in made:  # a convolution used in two places stays one layer
            made[conv] = _dynamic(conv, kind, num_kernels, reduction, start, noise, form)
    for name, conv in found.items():  # all of them or none
        model.set_submodule(name, made[conv])
    return model


def _convertible(model: nn.Module, kind: str, skip: list[str]) -> dict[str, nn.Conv2d]:
    convs = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Conv2d)}
    if not convs:
        raise ValueError(f"{type(model).__name__} has no convolution (nn.Conv2d) to make dynamic")
    for pattern in skip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"skip={pattern!r} is no regular expression: {error}") from None
        if not any(re.search(pattern, name) for name in convs):
            raise ValueError(f"skip={pattern!r} finds none of the {len(convs)} convolutions of {type(model).__name__}: {', '.join(list(convs)[:6])}, ...")
    parts = _parts(convs)
    stem = [name for name, part in parts.items() if part == next(iter(parts.values()))]
    stem = {convs[name] for name in (stem if 2 * len(stem) < len(convs) else stem[:1])}
    heads = {name for name, part in parts.items() if part in CLASSIFIERS or set(name.split(".")) & set(INNER)}
    if heads:
        _log.info("make_dynamic: %d convolutions stay static as the classifier's: %s", len(heads), ", ".join(sorted(heads)[:6]))
    chosen = {name: conv for name, conv in convs.items() if conv not in stem and name not in heads
              and not any(re.search(pattern, name) for pattern in skip) and not (kind in DOWN_SAMPLE_STATIC and DOWN_SAMPLE.search(name))}
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    unfit = [name for name, conv in chosen.items() if not _is_plain(conv) or any(owners[id(p)] > 1 for p in conv.parameters(recurse=False))]
    if unfit:
        _log.warning("make_dynamic: %d convolutions stay static, as they are no plain zero-padded nn.Conv2d, share weights, or others hang on them: %s",
                     len(unfit), ", ".join(unfit[:6]))
        chosen = {name: conv for name, conv in chosen.items() if name not in unfit}
    if not chosen:
        if any(isinstance(m, MixedConv2d) for m in model.modules()):
            raise ValueError(f"{type(model).__name__} is dynamic already; start from a static network")
        raise ValueError(f"{type(model).__name__} has no convolution left to make {kind}: the first of {', '.join(list(convs)[:6])} is the "
                         "stem's, and the others are the classifier's, down-sample paths, skipped, or no plain nn.Conv2d")
    return chosen


def _parts(convs: dict[str, nn.Conv2d]) -> dict[str, str]:
    """In which part of the network each convolution lies: the first name behind what the names of all have in common."""
    names = {name: name.split(".") for name in convs}
    shared = next((i for i, parts in enumerate(zip(*names.values(), strict=False)) if len(set(parts)) > 1), 0)
    return {name: parts[shared] for name, parts in names.items()}


def _is_plain(conv: nn.Conv2d) -> bool:
    """Zero-padded, real, of the size that it says, nothing on it."""
    return (type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and _padding(conv) is not None and is_bare(conv) and not conv.weight.is_complex()
            and conv.weight.shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size))


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """In numbers; None where both sides of a map would get different ones."""
    if not isinstance(conv.padding, str):
        return tuple(conv.padding)
    if conv.padding == "valid":
        return 0, 0
    both = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)


@torch.no_grad()
def _dynamic(conv: nn.Conv2d, kind: str, num_kernels: int, reduction: int, start: Start, noise: float, form: str) -> MixedConv2d:
    weight = conv.weight
    layer = KINDS[kind](conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, _padding(conv), conv.dilation, conv.groups, conv.bias is not None,
                        num_kernels=num_kernels, reduction=reduction, form=form, device=weight.device, dtype=weight.dtype)
    of_weight, of_bias = layer.carry() if start != "fresh" else (1.0, 1.0)
    if start != "fresh":
        target = weight * of_weight
        if start == "copies":
            layer.weight.copy_(target.expand_as(layer.weight))
            if noise:
                layer.weight.add_(torch.randn_like(layer.weight) * (noise * _deviation(target)))
        else:
            layer.weight[0].copy_(target)
    if conv.bias is not None:
        layer.bias.copy_((conv.bias * of_bias).expand_as(layer.bias))
    for parameter, old in ((layer.weight, weight), (layer.bias, conv.bias)):
        if parameter is not None:
            parameter.requires_grad_(old.requires_grad)
    return layer.train(conv.training)


def _deviation(weight: Tensor) -> Tensor | float:
    """Standard deviation; of a single number its size."""
    return weight.std() if weight.numel() > 1 else weight.abs().mean()
