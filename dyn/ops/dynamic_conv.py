"""Convolution with kernels mixed for every sample (PAD-Net section 1.2):

    y_b = x_b * W_b + bias_b,        W_b = s_b . (sum_k alpha_bk W_k + S),        bias_b = sum_k alpha_bk bias_k

B samples, C input and O output channels, K kernels, I = C / groups, H x W the map, h x w the kernel, L output positions of a sample, P = O I h w, G groups.
A name ends in the shape of its tensor: `bank_KOIhw` is [K, O, I, h, w]. s (optional) is a factor for each kernel position of a sample (ODConv,
section 1.5), S (optional) a kernel of all samples (the static part of section 3.2).

`_loop` is the specification. The other forms compute the same in another order, and none is best everywhere:

    form    | what it does                                                  | multiply-adds beside the plain L P | where it is good
    grouped | mixes kernels, one convolution of B G groups                  | K P                                | CPU, large maps; groups
    unfold  | mixes kernels, one matrix product a sample over x's patches   | K P, copies patches (not for 1x1)  | CUDA, 1x1; CPU, small spatial maps
    scale   | alpha multiplies x, one convolution with K C input channels   | (K - 1) L P                        | one kernel; CUDA
    outputs | one convolution with K O output channels, alpha mixes outputs | (K - 1) L P                        | CPU, small maps

Mixing is a matrix product, so its backward is two: dbank = alpha^T dW and dalpha = dW bank^T. All forms are made of operations that torch compiles and
differentiates twice (GraSP does), so there is no custom operator here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn.ops.arguments import autocast, check_devices, given

Pair = tuple[int, int]
Window = tuple[Pair, Pair, Pair]  # stride, padding, dilation
SMALL_MAP = 64  # output positions of a sample below which a K-fold convolution costs less on a CPU than samples' own kernels
CACHED = 1 << 20  # numbers in all samples' kernels that are written and read so fast that they pay on any map (measured: benchmarks.dynamic_conv --layers)


def dynamic_conv2d(x_BCHW: Tensor, bank_KOIhw: Tensor, alpha_BK: Tensor, bias_KO: Tensor | None = None, stride: int | Pair = 1, padding: int | Pair = 0,
                   dilation: int | Pair = 1, groups: int = 1, form: str = "auto", spatial_Bhw: Tensor | None = None,
                   static_OIhw: Tensor | None = None) -> Tensor:
    """Convolve every sample with its own mixture of K kernels: [B, O, H', W'] in x's dtype.

    Args:
        x_BCHW: floating; any memory format.
        bank_KOIhw: the kernels, in x's dtype; groups divides O, and C = I * groups.
        alpha_BK: weights of the kernels for each sample, any floating dtype; they need not sum to one.
        bias_KO: a bias for each kernel, mixed alike.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; ints or pairs.
        form: one of `FORMS`, or "auto" (see `choose`).
        spatial_Bhw: factors of the kernel positions of each sample. Only the forms that build kernels take it: loop, grouped, unfold.
        static_OIhw: a kernel that counts once in every sample, in x's dtype.

    Under autocast all are cast first, as a convolution does.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown form, one that cannot take spatial_Bhw.
    """
    x_BCHW, bank_KOIhw, bias_KO, static_OIhw = autocast(x_BCHW, bank_KOIhw, bias_KO, static_OIhw)
    _check(x_BCHW, bank_KOIhw, alpha_BK, bias_KO, groups, spatial_Bhw, static_OIhw)
    window = _pair(stride), _pair(padding), _pair(dilation)
    if bank_KOIhw.shape[3:] == (1, 1):  # looks at nothing between its steps
        (down, right), (top, left) = window[:2]
        window = (1, 1), (0, 0), (1, 1)
        x_BCHW = (F.pad(x_BCHW, (left, left, top, top)) if top or left else x_BCHW)[:, :, ::down, ::right]
    if form == "auto":
        form = choose(x_BCHW, bank_KOIhw, window, spatial_Bhw is not None)
    if form not in FORMS:
        raise ValueError(f"form={form!r} of dynamic_conv2d is unknown; allowed: auto, {', '.join(FORMS)}")
    alpha_BK = alpha_BK.to(x_BCHW.dtype)
    if spatial_Bhw is not None:
        if form in WITHOUT_KERNELS:
            raise ValueError(f"form={form!r} builds no kernel of a sample's own, which spatial_Bhw needs; allowed: loop, grouped, unfold")
        spatial_Bhw = spatial_Bhw.to(x_BCHW.dtype)
    y_BOHW = FORMS[form](x_BCHW, bank_KOIhw, alpha_BK, static_OIhw, spatial_Bhw, window, groups)
    return y_BOHW if bias_KO is None else y_BOHW + (alpha_BK @ bias_KO)[:, :, None, None]


def choose(x_BCHW: Tensor, bank_KOIhw: Tensor, window: Window, spatial: bool = False) -> str:
    """The form that "auto" takes.

    A graph for any number of samples (torch.export, torch.compile) chooses by the other sizes. One kernel without spatial factors: scale, which is the plain
    convolution then. No sample: unfold, which computes nothing. CUDA: without groups unfold for 1x1 kernels, where it is one batch of products on x as it
    lies, and scale for larger ones (with spatial factors unfold); else grouped. (On an H200 in bfloat16 a step of ResNet-50 takes 10.6 times the static one's
    with grouped convolutions, 3.6 with scale and 3.3 with unfold alone; of ResNet-18 9.2, 2.8 and 3.9.) Elsewhere: grouped where samples' own kernels pay, on
    maps of `SMALL_MAP` output positions or more, for kernels that stay in the cache, and for depthwise ones (whose products would be of single rows); else
    outputs, or, with spatial factors, which need a kernel for each sample, unfold.
    """
    if len(bank_KOIhw) == 1 and not spatial:
        return "scale"
    B, height_width = x_BCHW.shape[0], math.prod(_out_size(x_BCHW, bank_KOIhw, window))
    fixed = not isinstance(B, torch.SymInt)  # a graph for any number of samples asks nothing of it
    if fixed and not B:
        return "unfold"
    own = height_width >= SMALL_MAP or (fixed and B * bank_KOIhw[0].numel() <= CACHED)
    if x_BCHW.device.type == "cuda" and bank_KOIhw.shape[2] == x_BCHW.shape[1]:
        return "unfold" if spatial or bank_KOIhw.shape[3:] == (1, 1) else "scale"
    if x_BCHW.device.type == "cuda" or bank_KOIhw.shape[2] == 1 or own:
        return "grouped"
    return "unfold" if spatial else "outputs"


def _check(x_BCHW: Tensor, bank_KOIhw: Tensor, alpha_BK: Tensor, bias_KO: Tensor | None, groups: int, spatial_Bhw: Tensor | None,
           static_OIhw: Tensor | None) -> None:
    tensors = {"x": x_BCHW, "bank": bank_KOIhw, "alpha": alpha_BK, "bias": bias_KO, "spatial": spatial_Bhw, "static": static_OIhw}
    tensors = {name: t for name, t in tensors.items() if t is not None}

    def refuse(why: str) -> None:
        raise ValueError(f"dynamic_conv2d{why}; {given(tensors)}, groups {groups}")

    if x_BCHW.ndim != 4 or bank_KOIhw.ndim != 5:
        refuse(" needs x [B, C, H, W] and bank [K, O, C / groups, h, w]")
    K, O, I, h, w = bank_KOIhw.shape
    if groups < 1 or O % groups or x_BCHW.shape[1] != I * groups:
        refuse(f": x must have {I} * groups channels and groups must divide {O} outputs")
    for name, shape in {"alpha": (x_BCHW.shape[0], K), "bias": (K, O), "spatial": (x_BCHW.shape[0], h, w), "static": (O, I, h, w)}.items():
        if name in tensors and tensors[name].shape != shape:
            refuse(f": {name} must be {list(shape)}")
    if not x_BCHW.is_floating_point() or any(tensors[name].dtype != x_BCHW.dtype for name in ("bank", "bias", "static") if name in tensors):
        refuse(": x, bank, bias and static must share a floating dtype")
    check_devices("dynamic_conv2d", tensors)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else tuple(value)


def _out_size(x_BCHW: Tensor, bank_KOIhw: Tensor, window: Window) -> Pair:
    sizes = zip(x_BCHW.shape[2:], bank_KOIhw.shape[3:], *window, strict=True)
    return tuple((size + 2 * pad - dil * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, dil in sizes)


def _mixed(bank_KOIhw: Tensor, alpha_BK: Tensor, static_OIhw: Tensor | None, spatial_Bhw: Tensor | None) -> Tensor:
    """Every sample's kernel, [B, O, I, h, w]."""
    bank_KP = bank_KOIhw.flatten(1)
    mixed_BP = alpha_BK @ bank_KP if static_OIhw is None else torch.addmm(static_OIhw.reshape(1, -1), alpha_BK, bank_KP)
    mixed_BOIhw = mixed_BP.unflatten(1, bank_KOIhw.shape[1:])
    return mixed_BOIhw if spatial_Bhw is None else mixed_BOIhw * spatial_Bhw[:, None, None]


# The forms, one signature ----------------------------------------------------------------------------------------------------------------------------


def _loop(x_BCHW: Tensor, bank_KOIhw: Tensor, alpha_BK: Tensor, static_OIhw: Tensor | None, spatial_Bhw: Tensor | None, window: Window,
          groups: int) -> Tensor:
    rows = []
    for b in range(len(x_BCHW)):
        kernel_OIhw = sum(alpha_BK[b, k] * bank_KOIhw[k] for k in range(len(bank_KOIhw)))
        if static_OIhw is not None:
            kernel_OIhw = kernel_OIhw + static_OIhw
        if spatial_Bhw is not None:
            kernel_OIhw = kernel_OIhw * spatial_Bhw[b]
        rows.append(F.conv2d(x_BCHW[b : b + 1], kernel_OIhw, None, *window, groups))
    return torch.cat(rows)


def _grouped(x_BCHW: Tensor, bank_KOIhw: Tensor, alpha_BK: Tensor, static_OIhw: Tensor | None, spatial_Bhw: Tensor | None, window: Window,
             groups: int) -> Tensor:
    B, C, H, W = x_BCHW.shape
    kernels = _mixed(bank_KOIhw, alpha_BK, static_OIhw, spatial_Bhw).flatten(0, 1)  # [B O, I, h, w]
    y = F.conv2d(x_BCHW.reshape(1, B * C, H, W), kernels, None, *window, groups * B)
    return y.view(B, bank_KOIhw.shape[1], *y.shape[2:])


def _unfold(x_BCHW: Tensor, bank_KOIhw: Tensor, alpha_BK: Tensor, static_OIhw: Tensor | None, spatial_Bhw: Tensor | None, window: Window,
            groups: int) -> Tensor:
    B, G, (O, I, h, w), (stride, padding, dilation) = x_BCHW.shape[0], groups, bank_KOIhw.shape[1:], window
    height, width = _out_size(x_BCHW, bank_KOIhw, window)
    kernels = _mixed(bank_KOIhw, alpha_BK, static_OIhw, spatial_Bhw).reshape(B * G, O // G, I * h * w)
    if (h, w) == (1, 1) and G == 1 and x_BCHW.stride(1) == 1:  # channels_last, and y as well: nothing is copied unless a stride skips
        patches_BLI = x_BCHW.permute(0, 2, 3, 1).reshape(B, height * width, I)
        return torch.bmm(patches_BLI, kernels.transpose(1, 2)).view(B, height, width, O).permute(0, 3, 1, 2)
    patches = x_BCHW if (h, w) == (1, 1) else F.unfold(x_BCHW, (h, w), dilation, padding, stride)
    return torch.bmm(kernels, patches.reshape(B * G, I * h * w, height * width)).view(B, O, height, width)


def _scale(x_BCHW: Tensor, bank_KOIhw: Tensor, alpha_BK: Tensor, static_OIhw: Tensor | None, _: None, window: Window, groups: int) -> Tensor:
    (B, C, H, W), (K, O, I, h, w) = x_BCHW.shape, bank_KOIhw.shape
    kernel = bank_KOIhw.transpose(0, 1).reshape(O, K * I, h, w)
    # Channels of a group lie together: [group, kernel, channel of the group].
    if x_BCHW.is_contiguous(memory_format=torch.channels_last) and not x_BCHW.is_contiguous():
        x_BHWG1I = x_BCHW.permute(0, 2, 3, 1).view(B, H, W, groups, 1, I)
        scaled = (x_BHWG1I * alpha_BK.view(B, 1, 1, 1, K, 1)).view(B, H, W, K * C).permute(0, 3, 1, 2)
    else:
        scaled = (x_BCHW.reshape(B, groups, 1, I, H, W) * alpha_BK.view(B, 1, K, 1, 1, 1)).reshape(B, K * C, H, W)
    y = F.conv2d(scaled, kernel, None, *window, groups)
    return y if static_OIhw is None else y + F.conv2d(x_BCHW, static_OIhw, None, *window, groups)


def _outputs(x_BCHW: Tensor, bank_KOIhw: Tensor, alpha_BK: Tensor, static_OIhw: Tensor | None, _: None, window: Window, groups: int) -> Tensor:
    B, G, (K, O, I, h, w) = x_BCHW.shape[0], groups, bank_KOIhw.shape
    kernels = bank_KOIhw.view(K, G, O // G, I, h, w).transpose(0, 1).reshape(G * K * (O // G), I, h, w) if G > 1 else bank_KOIhw.flatten(0, 1)
    y = F.conv2d(x_BCHW, kernels, None, *window, groups)
    height, width = y.shape[2:]
    weights = alpha_BK.repeat_interleave(G, 0)[:, None] if G > 1 else alpha_BK[:, None]  # [B G, 1, K]
    mixed = torch.bmm(weights, y.reshape(B * G, K, (O // G) * height * width)).view(B, O, height, width)
    return mixed if static_OIhw is None else mixed + F.conv2d(x_BCHW, static_OIhw, None, *window, groups)


FORMS: dict[str, Callable[..., Tensor]] = {"loop": _loop, "grouped": _grouped, "unfold": _unfold, "scale": _scale, "outputs": _outputs}
WITHOUT_KERNELS = ("scale", "outputs")
