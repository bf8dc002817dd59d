"""The trainable pieces that adapters are made of (SparseAdapter section 1). None adds its input to its output: the place where it sits does that.

D hidden size, R bottleneck or rank, P prefix length, N adapters that are fused, T positions (any leading axes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn.nn.masked import dense_weight

Init = Literal["bert", "lora", "zero_up"]
Norm = Literal["none", "in", "out"]
Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
STD = 0.02  # of init="bert"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that one can compute with; float8 is for storage, as integers are


class AdapterModule(nn.Module):
    """What is attached at one place of a host under an adapter's name; pruning and files work on these and on nothing else.

    `prunable` names the weights that pruning takes by default where its kind is "bottleneck" or "lora"; those of kinds "prefix" and "fusion" are pruned on
    demand only, as are `prunable_biases`. All are paths relative to the module. A weight that is the only one of its owner has its mask beside it as the
    buffer `mask` (`down.weight`, `down.mask`); where an owner has several, as `<parameter>_mask` (`key`, `key_mask`).
    """

    kind: str = ""
    prunable: tuple[str, ...] = ()
    prunable_biases: tuple[str, ...] = ()

    def __init__(self, adapter_name: str = "default") -> None:
        super().__init__()
        self.adapter_name = adapter_name

    def draw(self, init: Init, generator: torch.Generator | None = None) -> None:
        """Fill all parameters anew."""
        raise NotImplementedError

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take the width that these shapes of its parameters have, where it has one; values are left open. Other shapes are left as they are."""

    def flow(self) -> Tensor:
        """The module by itself on ones, its layer norm left out (of a constant vector that is zero), as a mean: R of SynFlow (section 2.2)."""
        raise NotImplementedError


@torch.no_grad()
def _normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    if not weight.is_meta:  # drawn on the CPU in float32, so that every device and precision starts alike
        weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * std)


@torch.no_grad()
def _uniform(weight: Tensor, bound: float, generator: torch.Generator | None) -> None:
    if not weight.is_meta:
        weight.copy_((torch.rand(weight.shape, generator=generator, device="cpu") * 2 - 1) * bound)


def _draw_pair(first: Tensor, second: Tensor, init: Init, generator: torch.Generator | None) -> None:
    """Two matrices in a row (section 1.1): "bert" N(0, 0.02^2) both; "lora" Kaiming-uniform with a = sqrt(5), which is U(+-1/sqrt(fan in)), and zero;
    "zero_up" N(0, 0.02^2) and zero."""
    if init == "lora":
        _uniform(first, 1 / math.sqrt(first.shape[1]), generator)
    else:
        _normal(first, STD, generator)
    if init == "bert":
        _normal(second, STD, generator)
    else:
        nn.init.zeros_(second)


def _resize_pair(first: nn.Linear, second: nn.Linear, r: int) -> None:
    for linear, shape in ((first, (r, first.in_features)), (second, (second.out_features, r))):
        old = linear.weight
        linear.weight = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
    if first.bias is not None:
        first.bias = nn.Parameter(first.bias.new_empty(r), requires_grad=first.bias.requires_grad)
    first.out_features = second.in_features = r


class Bottleneck(AdapterModule):
    """A(x) = s (W_up drop(act(W_down n(x) + b_down)) + b_up), [T, D] -> [T, D] (section 1.1): 2DR + R + D parameters.

    Args:
        dim: D.
        r: R.
        norm: a trainable layer norm on the input ("in") or on the scaled output ("out"): 2D parameters more.
        activation: relu | gelu | silu | tanh.
        scale: s, or "learnable": one parameter that starts at 1.
        dropout: probability, on the activated bottleneck.
    """

    kind = "bottleneck"
    prunable = ("down.weight", "up.weight")
    prunable_biases = ("down.bias", "up.bias")

    def __init__(self, dim: int, r: int, *, norm: Norm = "none", activation: Activation = "relu", scale: float | Literal["learnable"] = 1.0,
                 dropout: float = 0.0, adapter_name: str = "default", device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(adapter_name)
        self.down = nn.Linear(dim, r, device=device, dtype=dtype)
        self.up = nn.Linear(r, dim, device=device, dtype=dtype)
        self.norm = None if norm == "none" else nn.LayerNorm(dim, device=device, dtype=dtype)
        self.norm_at, self.activation, self.dropout = norm, activation, dropout
        self.scale: float | nn.Parameter = nn.Parameter(torch.ones(1, device=device, dtype=dtype)) if scale == "learnable" else scale

    def draw(self, init: Init, generator: torch.Generator | None = None) -> None:
        """Weights as in `_draw_pair`, biases 0, layer norm (1, 0), learnable scale 1."""
        _draw_pair(self.down.weight, self.up.weight, init, generator)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if self.norm is not None:
            self.norm.reset_parameters()
        if isinstance(self.scale, Tensor):
            nn.init.ones_(self.scale)

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """See `AdapterModule.resize`."""
        if (r := shapes["down.weight"][0]) != self.down.out_features:
            _resize_pair(self.down, self.up, r)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D], without the residual."""
        h = self.norm(x) if self.norm_at == "in" else x
        h = F.dropout(ACTIVATIONS[self.activation](self.down(h)), self.dropout, self.training)
        h = self.up(h) * self.scale
        return self.norm(h) if self.norm_at == "out" else h

    def flow(self) -> Tensor:
        """See `AdapterModule.flow`."""
        ones = torch.ones(self.down.in_features, device=self.down.weight.device, dtype=self.down.weight.dtype)
        return (self.up(ACTIVATIONS[self.activation](self.down(ones))) * self.scale).mean()


class LoRA(AdapterModule):
    """alpha/r B A x, [T, I] -> [T, O] (section 1.4): R (I + O) parameters, no bias; dropout on A's input only."""

    kind = "lora"
    prunable = ("A.weight", "B.weight")

    def __init__(self, d_in: int, d_out: int, r: int, *, scaling: float, dropout: float = 0.0, adapter_name: str = "default",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(adapter_name)
        self.A = nn.Linear(d_in, r, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(r, d_out, bias=False, device=device, dtype=dtype)
        self.scaling, self.dropout = scaling, dropout

    def draw(self, init: Init, generator: torch.Generator | None = None) -> None:
        """Weights as in `_draw_pair`."""
        _draw_pair(self.A.weight, self.B.weight, init, generator)

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """See `AdapterModule.resize`; the scaling stays."""
        if (r := shapes["A.weight"][0]) != self.A.out_features:
            _resize_pair(self.A, self.B, r)

    def forward(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O], what is added to the linear map's output."""
        return self.B(self.A(F.dropout(x, self.dropout, self.training))) * self.scaling

    def change(self) -> Tensor:
        """What is added to the linear map's weight: alpha/r B A, [O, I]."""
        return self.scaling * (dense_weight(self.B) @ dense_weight(self.A))

    def flow(self) -> Tensor:
        """See `AdapterModule.flow`."""
        return self.forward(torch.ones(self.A.in_features, device=self.A.weight.device, dtype=self.A.weight.dtype)).mean()


class Prefix(AdapterModule):
    """Keys and values that every query of an attention block sees, P positions each, as parameters of their own ("flat"; section 1.5)."""

    kind = "prefix"
    prunable = ("key", "value")

    def __init__(self, dim: int, length: int, *, dropout: float = 0.0, adapter_name: str = "default", device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__(adapter_name)
        self.length, self.dropout = length, dropout
        self.key = nn.Parameter(torch.empty(length, dim, device=device, dtype=dtype))
        self.value = nn.Parameter(torch.empty(length, dim, device=device, dtype=dtype))

    def draw(self, init: Init = "bert", generator: torch.Generator | None = None) -> None:
        """N(0, 0.02^2) whatever `init`: a prefix of zeros is not without effect, and its keys would not learn."""
        _normal(self.key, STD, generator)
        _normal(self.value, STD, generator)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [P, key/value heads * head size] each."""
        return F.dropout(self.key, self.dropout, self.training), F.dropout(self.value, self.dropout, self.training)

    def flow(self) -> Tensor:
        """See `AdapterModule.flow`: a prefix is linear in its values, so SynFlow ranks it by magnitude."""
        return self.key.mean() + self.value.mean()


class PrefixSource(AdapterModule):
    """What re-parametrised prefixes of several attention blocks share: embedding [P, D] -> Linear(D, width) -> tanh (section 1.5)."""

    kind = "prefix"

    def __init__(self, dim: int, length: int, width: int, *, adapter_name: str = "default", device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__(adapter_name)
        self.embedding = nn.Parameter(torch.empty(length, dim, device=device, dtype=dtype))
        self.hidden = nn.Linear(dim, width, device=device, dtype=dtype)

    def draw(self, init: Init = "bert", generator: torch.Generator | None = None) -> None:
        """Embedding N(0, 1), torch's default of nn.Embedding; the linear map N(0, 0.02^2), bias 0."""
        _normal(self.embedding, 1.0, generator)
        _normal(self.hidden.weight, STD, generator)
        nn.init.zeros_(self.hidden.bias)

    def forward(self) -> Tensor:
        """[P, width]."""
        return torch.tanh(self.hidden(self.embedding))


class SharedPrefix(AdapterModule):
    """One attention block's part of a re-parametrised prefix: Linear(width, 2 * key/value size) on the shared source, which lives at the host's root."""

    kind = "prefix"

    def __init__(self, dim: int, source: PrefixSource, *, dropout: float = 0.0, adapter_name: str = "default", device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__(adapter_name)
        self.out = nn.Linear(source.hidden.out_features, 2 * dim, device=device, dtype=dtype)
        self.source = (source,)  # in a tuple, so that its parameters have one name only
        self.length, self.dropout = len(source.embedding), dropout

    def draw(self, init: Init = "bert", generator: torch.Generator | None = None) -> None:
        """N(0, 0.02^2), bias 0."""
        _normal(self.out.weight, STD, generator)
        nn.init.zeros_(self.out.bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [P, key/value heads * head size] each."""
        return F.dropout(self.out(self.source[0]()), self.dropout, self.training).chunk(2, -1)


class Fusion(AdapterModule):
    """AdapterFusion (section 1.6): a = softmax_n((W_q q + b_q) (W_k z_n + b_k)), sum_n a_n W_v z_n over the outputs z of N trained adapters.

    3D^2 + 2D parameters; 2D^2 + 2D without `value` (the static preset).
    """

    kind = "fusion"
    prunable = ("query.weight", "key.weight", "value.weight")
    prunable_biases = ("query.bias", "key.bias")

    def __init__(self, dim: int, members: Sequence[str], *, value: bool = True, adapter_name: str = "default",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(adapter_name)
        self.members = tuple(members)
        self.query = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.key = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.value = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype) if value else None
        if not value:
            self.prunable = self.prunable[:2]

    @torch.no_grad()
    def draw(self, init: Init = "bert", generator: torch.Generator | None = None) -> None:
        """Query and key N(0, 0.02^2), biases 0; value the identity plus 1e-6 off the diagonal."""
        for linear in (self.query, self.key):
            _normal(linear.weight, STD, generator)
            nn.init.zeros_(linear.bias)
        if self.value is not None and not self.value.weight.is_meta:
            self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def forward(self, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Query [T, D] and N outputs [T, D] -> [T, D]."""
        z_TND = torch.stack(tuple(outputs), -2)
        weight_TN = torch.einsum("...d,...nd->...n", self.query(x), self.key(z_TND)).softmax(-1)
        if self.value is not None:
            z_TND = self.value(z_TND)
        return torch.einsum("...n,...nd->...d", weight_TN, z_TND)

    def penalty(self) -> Tensor:
        """||I - W_v||^2, of which 0.01 times is added to the loss."""
        if self.value is None:
            return self.key.weight.new_zeros(())
        weight = dense_weight(self.value)
        return (torch.eye(len(weight), device=weight.device, dtype=weight.dtype) - weight).square().sum()

    def flow(self) -> Tensor:
        """See `AdapterModule.flow`: each matrix by itself."""
        ones = torch.ones(self.query.in_features, device=self.query.weight.device, dtype=self.query.weight.dtype)
        return sum(linear(ones).mean() for linear in (self.query, self.key, self.value) if linear is not None)


def check_choice(what: str, value: object, allowed: object) -> None:
    """ValueError for a value that is not one of a Literal's."""
    if value not in get_args(allowed):
        raise ValueError(f"{what}={value!r} is unknown; allowed: {', '.join(map(repr, get_args(allowed)))}")
