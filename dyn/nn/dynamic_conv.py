"""Convolutions whose kernel depends on the input: DY-Conv, CondConv, ODConv (PAD-Net sections 1.2, 1.5).

B samples, C input and O output channels, K kernels, I = C / groups, h x w the kernel, H x W the map, A width of the attention's hidden layer.

All three are `ops.dynamic_conv2d` under an attention branch of their own, on a bank that may be partial or compact (`dyn.nn.bank`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn.core.mixture import mix
from dyn.core.routing import attend
from dyn.nn.bank import Banked, CompactBank, normal
from dyn.nn.probe import for_statistics, watch
from dyn.ops.dynamic_conv import FORMS, dynamic_conv2d

_log = logging.getLogger(__name__)
_logged: set[str] = set()

Size = int | Sequence[int]


class MixedConv2d(Banked):
    """What the kinds share: arguments of `nn.Conv2d` (zero padding, in numbers), and

    Args:
        bias: a bias for each kernel, zero at first, mixed with the kernels' attention; never partitioned.
        num_kernels: K.
        reduction: the attention's hidden layer has C // reduction units (at least 1; ODConv 16).
        temperature: where the attention's temperature starts; a buffer, so checkpoints hold it. See `set_temperature`.
        form: how the op computes (`ops.dynamic_conv`).

    weight: [K, O, I, h, w]; bias: [K, O].
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size = 0, dilation: Size = 1, groups: int = 1,
                 bias: bool = False, *, num_kernels: int = 4, reduction: int = 16, temperature: float | None = None, form: str = "auto",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        where = f"{type(self).__name__}({in_channels}, {out_channels}, {kernel_size})"
        if any(type(n) is not int or n < 1 for n in (in_channels, out_channels, num_kernels, reduction)):
            raise ValueError(f"{where}: numbers of channels, num_kernels={num_kernels} and reduction={reduction} must be integers, at least 1")
        if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"{where}: temperature={temperature} must be positive and finite")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"{where}: groups={groups} must divide both numbers of channels")
        if form != "auto" and form not in FORMS:
            raise ValueError(f"{where}: form={form!r} is unknown; allowed: auto, {', '.join(FORMS)}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.num_kernels, self.reduction, self.form = num_kernels, reduction, form
        self.kernel_size, self.stride, self.padding, self.dilation = (
            _pair(v, where, least) for v, least in ((kernel_size, 1), (stride, 1), (padding, 0), (dilation, 1)))
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_kernels, out_channels, in_channels // groups, *self.kernel_size, **factory))
        self.bias = nn.Parameter(torch.zeros(num_kernels, out_channels, **factory)) if bias else None
        if temperature is not None:
            self.register_buffer("temperature", torch.tensor(float(temperature), device=device))

    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """N(0, 2 / (h w O)), He's fan-out, which does not divide by groups (section 1.2)."""
        deviation = math.sqrt(2 / (math.prod(self.kernel_size) * self.out_channels))
        return normal((num, *self.weight.shape[1:]), deviation, self.weight, generator)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every kernel by its initialiser, biases zero, attention by its own."""
        self.weight.copy_(self.draw(self.num_kernels))
        if self.bias is not None:
            self.bias.zero_()
        self.attention.reset_parameters()
        self.settle()

    def carry(self) -> tuple[float, float]:
        """Set the attention so that a layer whose kernels are copies starts as one convolution, and say what to multiply that one's weight and bias by."""
        return 1.0, 1.0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']. ValueError for other axes or channels."""
        self._check(x_BCHW)
        alpha_BK = self.alpha(x_BCHW) if self.bias is not None or not self.is_static else None
        if self.is_static:
            return self._with_bias(self._static(x_BCHW, self.partial.static_set()), alpha_BK)
        bank, weight, static = self.mixture(alpha_BK)
        y = dynamic_conv2d(x_BCHW, bank, weight, None, self.stride, self.padding, self.dilation, self.groups, self.form, static_OIhw=static)
        return self._with_bias(y, alpha_BK)

    def alpha(self, x_BCHW: Tensor) -> Tensor:
        """The kernels' weights for every sample, [B, K] in float32."""
        raise NotImplementedError

    def _check(self, x_BCHW: Tensor) -> None:
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.in_channels:
            raise ValueError(f"{type(self).__name__} takes [B, {self.in_channels}, H, W]; got {list(x_BCHW.shape)}")

    @property
    def is_static(self) -> bool:
        """Is the layer compact without a dynamic position? Its attention then weighs biases alone."""
        return isinstance(self.partial, CompactBank) and self.partial.num_dynamic == 0

    def idle(self) -> list[nn.Module]:
        """Parts of the attention that nothing asks where the layer `is_static`."""
        return [self.attention] if self.bias is None else []

    def _static(self, x_BCHW: Tensor, kernel_OIhw: Tensor) -> Tensor:
        return F.conv2d(x_BCHW, kernel_OIhw, None, self.stride, self.padding, self.dilation, self.groups)

    def _with_bias(self, y_BOHW: Tensor, alpha_BK: Tensor | None) -> Tensor:
        if self.bias is None:
            return y_BOHW
        return y_BOHW + mix(self.bias, alpha_BK)[:, :, None, None].to(y_BOHW.dtype)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, num_kernels={self.num_kernels}"
        more = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "form": "auto"}
        return text + "".join(f", {name}={getattr(self, name)}" for name, usual in more.items() if getattr(self, name) != usual)


class Attention(nn.Module):
    """Pooled x -> C // reduction units (no bias), ReLU -> K logits. [B, C, H, W] -> [B, K]."""

    def __init__(self, in_channels: int, num_kernels: int, reduction: int, **factory) -> None:
        super().__init__()
        hidden = max(1, in_channels // reduction)
        self.reduce = nn.Linear(in_channels, hidden, bias=False, **factory)
        self.expand = nn.Linear(hidden, num_kernels, **factory)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 2 / h) and N(0, 2 / K), fan-out each, and a bias of zero (section 1.2)."""
        self.reduce.weight.normal_(0, math.sqrt(2 / self.reduce.out_features))
        self.expand.weight.normal_(0, math.sqrt(2 / self.expand.out_features))
        self.expand.bias.zero_()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See the class."""
        return self.expand(F.relu(self.reduce(x_BCHW.mean((2, 3)))))


class DynamicConv2d(MixedConv2d):
    """DY-Conv: softmax attention over K kernels (section 1.2). Parameters of the attention: C h + h K + K, h = max(1, C // reduction)."""

    def __init__(self, *args, temperature: float = 31.0, **kwargs) -> None:
        super().__init__(*args, temperature=temperature, **kwargs)
        factory = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.attention = Attention(self.in_channels, self.num_kernels, self.reduction, **factory)
        self.reset_parameters()

    def alpha(self, x_BCHW: Tensor) -> Tensor:
        """Softmax over kernels at the layer's temperature."""
        return attend(self.attention(x_BCHW), self.temperature)


class Router(nn.Linear):
    """CondConv's routing function before its sigmoid: pooled x -> K logits, with bias."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K]."""
        return super().forward(x_BCHW.mean((2, 3)))


class CondConv2d(MixedConv2d):
    """CondConv: a sigmoid for each kernel, so weights do not sum to one; a router for every convolution (section 1.5). There is no temperature."""

    sums_to_one = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.attention = Router(self.in_channels, self.num_kernels, device=self.weight.device, dtype=self.weight.dtype)
        self.reset_parameters()

    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """kaiming_uniform(a = sqrt 5) of each kernel, which is uniform within 1 / sqrt(fan-in)."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[2:]))
        drawn = torch.rand((num, *self.weight.shape[1:]), device=generator.device if generator else self.weight.device, generator=generator)
        return ((2 * drawn - 1) * bound).to(self.weight)

    def alpha(self, x_BCHW: Tensor) -> Tensor:
        """Sigmoids."""
        logits = self.attention(x_BCHW)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()

    def expected_set(self) -> Tensor:
        """The kernel of an input that the router says nothing about, sum_k sigmoid(bias_k) W_k."""
        return mix(self.weight.detach(), self.attention.bias.detach().sigmoid()[None])[0]

    @torch.no_grad()
    def carry(self) -> tuple[float, float]:
        """A router that starts at 1 / K for each kernel; at 1/2 for a single one, which is then twice as large."""
        self.attention.weight.zero_()
        self.attention.bias.fill_(-math.log(self.num_kernels - 1) if self.num_kernels > 1 else 0)
        return (1.0, 1.0) if self.num_kernels > 1 else (2.0, 2.0)


class OmniAttention(nn.Module):
    """ODConv's four attentions from one trunk: pooled x -> A units, batch norm, ReLU -> heads over input channels, outputs, kernel positions, kernels.

    A training batch of one sample has no variance over samples: the trunk then takes its running statistics and leaves them as they are (said once in the log).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], groups: int, num_kernels: int, reduction: int, **factory) -> None:
        super().__init__()
        hidden, positions = max(in_channels // reduction, 16), math.prod(kernel_size)
        self.reduce = nn.Linear(in_channels, hidden, bias=False, **factory)
        self.norm = nn.BatchNorm1d(hidden, **factory)
        self.channel = nn.Linear(hidden, in_channels, **factory)
        depthwise = in_channels == groups == out_channels  # input and output channels are the same ones then
        self.filter = None if depthwise else nn.Linear(hidden, out_channels, **factory)
        self.spatial = nn.Linear(hidden, positions, **factory) if positions > 1 else None
        self.kernel = nn.Linear(hidden, num_kernels, **factory) if num_kernels > 1 else None

    @property
    def sigmoid_heads(self) -> list[nn.Linear]:
        """Heads whose factors multiply the kernel."""
        return [head for head in (self.channel, self.filter, self.spatial) if head is not None]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He's fan-out and zero biases."""
        self.norm.reset_parameters()
        for layer in (self.reduce, self.kernel, *self.sigmoid_heads):
            if layer is not None:
                layer.weight.normal_(0, math.sqrt(2 / layer.out_features))
                if layer.bias is not None:
                    layer.bias.zero_()

    def trunk(self, x_BCHW: Tensor) -> Tensor:
        """[B, A]."""
        h_BA = self.reduce(x_BCHW.mean((2, 3)))
        if self.training and len(h_BA) == 1:
            if not torch.compiler.is_compiling() and "batch of one" not in _logged:
                _logged.add("batch of one")
                _log.warning("ODConv: a training batch of one sample; the attention's batch norm uses its running statistics for it")
            norm = self.norm
            return F.relu(F.batch_norm(h_BA, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps))
        return F.relu(self.norm(h_BA))


class ODConv2d(MixedConv2d):
    """ODConv: y = filter * conv(channel * x, sum_k kernel_k spatial * W_k), all four factors from the input (section 1.5).

    Static positions of a partial layer see none of the four: their convolution is added to the dynamic one's.
    """

    sums_to_one = False

    def __init__(self, *args, temperature: float = 1.0, **kwargs) -> None:
        super().__init__(*args, temperature=temperature, **kwargs)
        factory = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.attention = OmniAttention(self.in_channels, self.out_channels, self.kernel_size, self.groups, self.num_kernels, self.reduction, **factory)
        self.reset_parameters()

    def _head(self, head: nn.Linear | None, h_BA: Tensor) -> Tensor | None:
        if head is None:
            return None
        logits = head(h_BA)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature

    def _alpha(self, h_BA: Tensor) -> Tensor:
        logits = self._head(self.attention.kernel, h_BA)
        return torch.ones(len(h_BA), 1, device=h_BA.device) if logits is None else logits.softmax(-1)

    def alpha(self, x_BCHW: Tensor) -> Tensor:
        """Softmax over kernels; ones for a single kernel."""
        return self._alpha(self.attention.trunk(x_BCHW))

    def idle(self) -> list[nn.Module]:
        """See `MixedConv2d.idle`: biases ask for the kernels' weights alone, and of one kernel for nothing."""
        return [self.attention] if self.bias is None or self.attention.kernel is None else self.attention.sigmoid_heads

    def expected_set(self) -> Tensor:
        """The mean over kernels times 1/2 for each of the other factors, where their sigmoids start."""
        return super().expected_set() * 0.5 ** len(self.attention.sigmoid_heads)

    @torch.no_grad()
    def carry(self) -> tuple[float, float]:
        """Heads that start at zero, and kernels that undo the sigmoids' 1/2 each."""
        for head in self.attention.sigmoid_heads:
            head.weight.zero_()
        return 2.0 ** len(self.attention.sigmoid_heads), 1.0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']. ValueError for other axes or channels."""
        if self.is_static:
            return super().forward(x_BCHW)
        self._check(x_BCHW)
        attention = self.attention
        h_BA = attention.trunk(x_BCHW)
        alpha_BK = self._alpha(h_BA)
        sets, static, gain = self.parts()
        channel_BC, filter_BO, spatial = (None if v is None else v.sigmoid() for v in (self._head(h, h_BA) for h in
                                                                                       (attention.channel, attention.filter, attention.spatial)))
        spatial_Bhw = None if spatial is None else spatial.unflatten(1, self.kernel_size)
        x_scaled = x_BCHW * channel_BC[:, :, None, None].to(x_BCHW.dtype)
        y = dynamic_conv2d(x_scaled, sets, alpha_BK if gain is None else alpha_BK * gain, None, self.stride, self.padding, self.dilation, self.groups,
                           self.form, spatial_Bhw)
        if filter_BO is not None:
            y = y * filter_BO[:, :, None, None].to(y.dtype)
        return self._with_bias(y if static is None else y + self._static(x_BCHW, static), alpha_BK)


KINDS: dict[str, type[MixedConv2d]] = {"dyconv": DynamicConv2d, "condconv": CondConv2d, "odconv": ODConv2d}


def set_temperature(model: nn.Module, temperature: float) -> int:
    """Set the attention's temperature in all layers of `model` that have one (in place; no copy, no synchronisation); returns how many.

    `core.routing.annealed_temperature` is the paper's schedule, a value for every step. ValueError for a temperature that is not positive and finite.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    layers = [m for m in model.modules() if isinstance(m, MixedConv2d) and hasattr(m, "temperature")]
    for layer in layers:
        layer.temperature.fill_(temperature)
    return len(layers)


@torch.no_grad()
def attention_entropy(model: nn.Module, images_BCHW: Tensor) -> dict[str, float]:
    """Entropy of every dynamic layer's attention over its kernels as a share of log K, mean over the images, in evaluation mode: 1 for equal weights, 0 for one
    kernel alone. Weights that do not sum to one (CondConv) are divided by their sum. Layers with one kernel are left out."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MixedConv2d) and m.num_kernels > 1}
    found: dict[int, Tensor] = {}

    def look(place: int, x_BCHW: Tensor) -> None:
        alpha_BK = list(layers.values())[place].alpha(x_BCHW)
        found[place] = torch.special.entr(alpha_BK / alpha_BK.sum(1, keepdim=True)).sum(1).mean() / math.log(alpha_BK.shape[1])

    with for_statistics(model), watch(list(layers.values()), look):
        model(images_BCHW)
    reached = [name for i, name in enumerate(layers) if i in found]  # evaluation leaves auxiliary heads out
    return dict(zip(reached, torch.stack([found[i] for i in sorted(found)]).tolist() if found else [], strict=True))


def _pair(value: Size, where: str, least: int) -> tuple[int, int]:
    if isinstance(value, str):
        raise ValueError(f"{where}: padding={value!r} must be given in numbers")
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"{where}: {value} must be an int or two, at least {least}")
    return pair
