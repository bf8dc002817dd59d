"""Layers whose weight is a bank of K parameter sets, and the part of it that is static: mode mask, scale factors, compact form (PAD-Net section 3).

K sets, P positions of one set (any shape), D dynamic ones, B inputs. `Banked` is what mode partition and compaction work on: a layer class that derives from it
(dynamic convolutions, experts) has both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dyn.core.mixture import Scales, check_scales, held, partial_parts, partial_sets, scale_factors
from dyn.core.partition import pack_bits, positions, unpack_bits

StaticStart = Literal["mean", "fresh"]  # of a position that turns static: what its K values are on average, or a new draw of the layer's initialiser


class Banked(nn.Module):
    """A layer with K parameter sets for one weight: `weight` [K, ...] (None in compact form) and `partial`, None while there are no modes.

    A subclass computes with `mixture` (or `parts`), never with `weight` itself, and defines `draw`.
    """

    sums_to_one = True  # do an input's weights of the sets sum to one? Then the compact form has static values in every set, and they cost nothing
    sets_per_input: int = 1  # parameter sets that one input is computed with, after mixing
    weight: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.partial: PartialBank | CompactBank | None = None
        self.register_load_state_dict_post_hook(_settle)  # after the children's, so by the mask that was loaded

    def draw(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """`num` new parameter sets of the layer's initialiser, on the weight's device and in its dtype: [num, ...]."""
        raise NotImplementedError(f"{type(self).__name__} has no initialiser for its bank")

    def expected_set(self) -> Tensor:
        """The parameters that an input gets on average, as far as the bank knows: the mean over the K sets."""
        return self.weight.detach().mean(0)

    def mixture(self, weight_BK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(sets [K, ...], weights [B, K], static [...] or None): an input's parameters are the weighted sum of the sets and the static part (section 3.2)."""
        if self.partial is not None and self.sums_to_one:  # a second product, with the static set, would cost a small network more than a pass over the sets
            (sets, gain), static = self.partial.sets(self.weight), None
        else:
            sets, static, gain = self.parts()
        return sets, weight_BK if gain is None else weight_BK * gain, static

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(sets [K, ...], zero where static; lambda_s * static, zero where dynamic, or None; lambda_d, or None for 1)."""
        return (self.weight, None, None) if self.partial is None else self.partial.parts(self.weight)

    @property
    def trained(self) -> bool:
        """Do its values train? The bank of a layer without a dynamic position does not, whoever trains its static values."""
        static = getattr(self.partial, "static", None)
        return self.weight is None or self.weight.requires_grad or (static is not None and static.requires_grad)

    def add_partial(self, scales: Scales = "both") -> PartialBank:
        """Give the layer modes, all positions dynamic. ValueError if it is compact or has others already."""
        if isinstance(self.partial, CompactBank) or (self.partial is not None and self.partial.scales != scales):
            kind = "a compact form" if isinstance(self.partial, CompactBank) else f"modes with scales={self.partial.scales!r}"
            raise ValueError(f"{type(self).__name__} has {kind} already; scales={scales!r} cannot be set")
        if self.partial is None:
            self.partial = PartialBank(scales, device=self.weight.device, dtype=self.weight.dtype).train(self.training)
            self.partial.train_factor(torch.ones(1, dtype=torch.bool, device="cpu"), self.trained)
        return self.partial

    @torch.no_grad()
    def static_start(self, static: StaticStart = "mean", generator: torch.Generator | None = None) -> Tensor:
        """Values for positions that turn static; those that are static keep theirs."""
        if static not in get_args(StaticStart):
            raise ValueError(f"static={static!r} is unknown; allowed: {', '.join(get_args(StaticStart))}")
        new, there = self.expected_set() if static == "mean" else self.draw(1, generator)[0], self.partial
        if there is not None and static == "mean":  # what they come to now, seen through the other factor
            lambda_d, lambda_s = there.scale()
            new = new * (lambda_d / lambda_s)
        return new if there is None or there.mask is None or there.static is None else torch.where(there.mask, new, there.static)

    @torch.no_grad()
    def partition(self, mask: Tensor, static: Tensor | StaticStart = "mean") -> None:
        """Fix the modes for good: positions outside `mask` are static from now on.

        Dead entries (sets outside the mask, static values inside it) become zero; their gradient is exactly zero, so neither weight decay nor momentum of an
        optimiser can move them. The bank is a new parameter, so that one that was made before, with momentum of dead entries, moves nothing here. Without a
        static position there are no static parameters.
        """
        if self.weight is not None and (mask.dtype != torch.bool or mask.shape != self.weight.shape[1:]):
            raise ValueError(f"mask must be bool {list(self.weight.shape[1:])}, one set of the bank; got {mask.dtype} {list(mask.shape)}")
        if isinstance(static, Tensor) and static.shape != mask.shape:
            raise ValueError(f"static values must be {list(mask.shape)}, as the mask; got {list(static.shape)}")
        partial, values = self.add_partial(self.partial.scales if self.partial else "both"), static if isinstance(static, Tensor) else self.static_start(static)
        trained = self.trained
        partial.train_factor(mask, trained)
        if mask.all():
            partial.hold(None, None)
            return
        self.weight = nn.Parameter(self.weight.masked_fill(~mask, 0), trained)
        partial.hold(mask.clone(), None if partial.scales == "prune" else values.masked_fill(mask, 0), trained)
        self.fit_form()

    def fit_form(self) -> None:
        """Compute in the way that suits the modes that are there now; called whenever they change, from files too."""

    @torch.no_grad()
    def settle(self) -> None:
        """Make dead entries zero again, in place, as a layer with modes computes with them: after whatever writes parameters without asking for modes."""
        partial = self.partial
        if isinstance(partial, PartialBank) and partial.mask is not None and not self.weight.is_meta:
            self.weight.masked_fill_(~partial.mask, 0)
            if partial.static is not None:
                partial.static.masked_fill_(partial.mask, 0)
            self.fit_form()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Banked:
        """Banks, masks and static values stay in their order when a model is moved to channels_last, which tensors of five axes do not know."""
        return super()._apply(lambda t: fn(t.flatten(1)).view(t.shape) if t.ndim in (4, 5) else fn(t), recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list, errors: list) -> None:
        """Modes that a file has and the layer has not yet: make room, so that a fully dynamic network loads a partitioned one."""
        there, mask = self.partial, state_dict.get(f"{prefix}partial.mask")
        if isinstance(there, PartialBank) and mask is not None:
            static, shape = state_dict.get(f"{prefix}partial.static"), self.weight.shape[1:]
            if mask.dtype != torch.bool or mask.shape != shape:
                errors.append(f"{prefix}partial.mask must be bool {list(shape)}, one set of the bank; got {mask.dtype} {list(mask.shape)}")
                return
            if (static is None) != (there.scales == "prune"):
                errors.append(f"{prefix}partial has scales={there.scales!r}, and the file {'no' if static is None else 'has'} static values beside the mask")
                return
            if there.mask is None:
                room = None if static is None else torch.zeros_like(self.weight[0])
                there.hold(torch.ones_like(mask, device=self.weight.device), room, self.weight.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def _settle(layer: Banked, _: object) -> None:  # not a lambda: layers are pickled
    layer.settle()
    if isinstance(partial := layer.partial, PartialBank) and partial.mask is not None and partial.scales in ("s", "d"):
        partial.train_factor(partial.mask, layer.trained)


class PartialBank(nn.Module):
    """Which positions of a bank are dynamic, the static values of the others, and the scale factors of both.

    mask: bool, True = dynamic; None: all are. static: one value a position, zero inside the mask; None: there are none (all dynamic, or pruned).
    phi: one scalar, lambda_d = 2 sigmoid(phi), lambda_s = 2 sigmoid(-phi); None for scales "none" and "prune". It is a parameter like others, so an optimiser's
    weight decay pulls both factors towards 1.
    """

    def __init__(self, scales: Scales = "both", device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_scales(scales)
        self.scales, self.settled = scales, True
        self.register_buffer("mask", None)
        self.register_parameter("static", None)
        self.phi = nn.Parameter(torch.zeros(1, device=device, dtype=dtype)) if scales not in ("none", "prune") else None
        self.register_parameter("on", None)
        self.register_parameter("off", None)

    def hold(self, mask: Tensor | None, static: Tensor | None, requires_grad: bool = True, settled: bool = True) -> None:
        """Take a mask and static values as they are; `settled`: the bank is zero outside the mask and static values inside it, so products can be spared."""
        self.mask, self.settled = mask, settled
        self.static = None if static is None else nn.Parameter(static, requires_grad=requires_grad)

    def train_factor(self, mask: Tensor, trained: bool) -> None:
        """Train phi with the bank if that is `trained`, the one factor of scales "s" or "d" only where a position of `mask` has it: processes wait for the
        gradients of all that is trained. A mask on meta says nothing: call this again when it is there."""
        if self.phi is not None and not mask.is_meta:
            self.phi.requires_grad_(trained and (self.scales == "both" or (not bool(mask.all()) if self.scales == "s" else bool(mask.any()))))

    def watch(self, shape: torch.Size, like: Tensor) -> None:
        """Let the mask be real-valued leaves, `on` in the dynamic term and `off` in the static one: their gradients sum to dL/dM of the mode switch
        (section 4.2), and that of `on` alone is what removing a position does."""
        start = torch.ones(shape, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        if self.mask is not None:
            start = self.mask.to(start.dtype)
        self.on, self.off = nn.Parameter(start), nn.Parameter(start.clone())

    def unwatch(self) -> None:
        """A bool mask again."""
        self.on = self.off = None

    @property
    def has_static(self) -> bool:
        """Are there static values?"""
        return self.static is not None

    def scale(self) -> tuple[Tensor | float, Tensor | float]:
        """(lambda_d, lambda_s)."""
        return scale_factors(self.phi, self.scales)

    def sets(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """(sets with static values in their places, divided by lambda_d; lambda_d, or None for 1): for weights that sum to one."""
        dynamic, static = self.scale()
        gain = dynamic if isinstance(dynamic, Tensor) else None
        if self.on is not None:
            weight = weight * self.on
            return weight if self.static is None else weight + (1 - self.off) * (self.static * (static / dynamic)), gain
        if self.mask is None:
            return weight, gain
        if not self.settled:
            return partial_sets(weight, self.mask, self.static, static / dynamic), gain
        return held(weight, self.mask, self.static, static / dynamic, fresh=True), gain

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `Banked.parts`."""
        dynamic, static = self.scale()
        gain = dynamic if isinstance(dynamic, Tensor) else None
        if self.on is not None:
            return weight * self.on, None if self.static is None else (1 - self.off) * (self.static * static), gain
        if self.mask is None:
            return weight, None, gain
        if not self.settled:
            return (*partial_parts(weight, self.mask, self.static, static), gain)
        return held(weight, self.mask, fresh=True), None if self.static is None else held(self.static, ~self.mask) * static, gain

    def extra_repr(self) -> str:
        return f"scales={self.scales}, " + ("all dynamic" if self.mask is None else f"mask {list(self.mask.shape)}")


class CompactBank(nn.Module):
    """The same with nothing that is dead (section 3.6): a bitmask, the dynamic positions' K values, the static positions' single ones, lambda folded into both.

    bits: uint8 [ceil(P / 8)]; dynamic [K, D]; static [P - D] (in pruned layers empty). With `expand` the dense sets are built once, so that a forward pass is
    as fast as the dynamic layer's; files are the same with and without.
    """

    def __init__(self, shape: torch.Size, bits: Tensor, dynamic: Tensor, static: Tensor, *, pruned: bool = False, expand: bool = False,
                 folded: bool = True, requires_grad: bool = True) -> None:
        """shape: of one set; `pruned`: static positions are zero, and `static` is empty; `folded`: `sets` is what the layer will ask for, else `parts`."""
        super().__init__()
        self.num_sets, self.shape, self.pruned, self.expand, self.folded, self.trains = len(dynamic), shape, pruned, expand, folded, requires_grad
        self.register_buffer("bits", bits)
        self.dynamic, self.static, self.dense = (*(nn.Parameter(t[..., :0], requires_grad) for t in (dynamic, static)), None)
        self._take(dynamic, static)

    @classmethod
    def of(cls, bank: Tensor, mask: Tensor, static: Tensor | None, *, requires_grad: bool = True, **kwargs: bool) -> CompactBank:
        """From bank [K, ...], mask and static values (None: pruned) of one set's shape; `kwargs` as above."""
        return cls(mask.shape, pack_bits(mask), bank.flatten(1)[:, mask.flatten()], bank.new_zeros(0) if static is None else static[~mask],
                   pruned=static is None, requires_grad=requires_grad, **kwargs)

    @torch.no_grad()
    def _take(self, dynamic: Tensor, static: Tensor) -> None:
        """Other values, whose sizes may differ. Parameters stay the objects that they are, which an optimiser may have, unless the device is another."""
        self.num_dynamic = dynamic.shape[1]
        if self.dense is not None:
            self.dynamic, self.static = (nn.Parameter(t, requires_grad=False) for t in (dynamic, static))  # to build from
        for name, values in (("dynamic", dynamic), ("static", static)):
            self._put(name, values)
        if self.expand:
            dense = self._build()
            self.dynamic = self.static = None
            if self.dense is None:
                self.dense = nn.Parameter(dense, requires_grad=False)
            self._put("dense", dense)

    def _put(self, name: str, values: Tensor) -> None:
        there = getattr(self, name)
        # Without an element there is no gradient, which processes that train together would wait for.
        requires_grad = values.numel() > 0 and (there.requires_grad if there.numel() else self.trains)
        if (there.device, there.dtype) == (values.device, values.dtype):
            there.data = values
            there.requires_grad_(requires_grad)
        else:
            setattr(self, name, nn.Parameter(values, requires_grad))

    @property
    def num_stored(self) -> int:
        """Parameters in the compact form."""
        return self.num_sets * self.num_dynamic + (0 if self.pruned else math.prod(self.shape) - self.num_dynamic)

    @property
    def has_static(self) -> bool:
        """Are there static values?"""
        return not self.pruned and self.num_dynamic < math.prod(self.shape)

    def mask(self) -> Tensor:
        """The bool mask."""
        return unpack_bits(self.bits, self.shape, check=False)

    def _build(self) -> Tensor:
        """Dense sets: [K, ...] with static values in all of them; not folded, those without and one more with the static values, if any: [K + 1, ...]."""
        mask_P, number = self.mask().flatten(), self.num_sets
        static_P = self.dynamic.new_zeros(len(mask_P))
        if self.has_static:
            static_P.scatter_(0, positions(~mask_P, len(self.static)), self.static)
        if self.folded:
            sets_KP = static_P.repeat(number, 1)
        else:
            sets_KP = torch.cat([static_P.new_zeros(number, len(mask_P)), static_P[None]][: 1 + self.has_static])
        sets_KP[:number].scatter_(1, positions(mask_P, self.num_dynamic).expand(number, -1), self.dynamic)
        return sets_KP.unflatten(1, self.shape)

    def sets(self, _: None = None) -> tuple[Tensor, None]:
        """See `PartialBank.sets`; not folded, the static set is the last one."""
        return self._build() if self.dense is None else self.dense, None

    def parts(self, _: None = None) -> tuple[Tensor, Tensor | None, None]:
        """See `Banked.parts`."""
        dense, _ = self.sets()
        if not self.has_static:
            return dense, None, None
        return (*partial_parts(dense, self.mask(), dense[0]), None) if self.folded else (dense[:-1], dense[-1], None)

    def static_set(self) -> Tensor:
        """The one parameter set of a layer without dynamic positions."""
        return self.dense[-1] if self.dense is not None else self.static.new_zeros(self.shape) if self.pruned else self.static.view(self.shape)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (dense := destination.pop(f"{prefix}dense", None)) is not None:
            mask = self.mask()
            destination[f"{prefix}dynamic"] = dense[: self.num_sets].flatten(1)[:, mask.flatten()]
            destination[f"{prefix}static"] = dense.new_zeros(0) if self.pruned else dense[-1][~mask]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list, errors: list) -> None:
        """Sizes follow the file: how many positions are dynamic is part of what it says."""
        found = {name: state_dict.get(prefix + name) for name in ("bits", "dynamic", "static")}
        if absent := [prefix + name for name, value in found.items() if value is None]:
            missing += absent
            return
        bits, dynamic, static = (value.detach() for value in found.values())
        try:
            mask = unpack_bits(bits, self.shape)
        except ValueError as error:
            errors.append(f"{prefix}bits: {error}")
            return
        number, total = int(mask.sum()), mask.numel()
        if dynamic.shape != (self.num_sets, number) or static.shape != (0 if self.pruned else total - number,) or not dynamic.is_floating_point():
            errors.append(f"{prefix}: the bits say {number} of {total} positions; dynamic {dynamic.dtype} {list(dynamic.shape)} and static {static.dtype} "
                          f"{list(static.shape)} do not fit {self.num_sets} sets{' of a pruned layer' if self.pruned else ''}")
            return
        if metadata.get("assign_to_params_buffers", False):
            self.bits = bits
        else:
            like = self.dense if self.dense is not None else self.dynamic
            self.bits.copy_(bits)
            dynamic, static = (value.to(like, copy=True) for value in (dynamic, static))
        self._take(dynamic, static)

    def check(self) -> None:
        """ValueError where the bits say another number of dynamic positions than there are values: for loaders without `load_state_dict`."""
        if (said := int(self.mask().sum())) != self.num_dynamic:
            raise ValueError(f"the bits say {said} of {math.prod(self.shape)} positions are dynamic, and there are values for {self.num_dynamic}")

    def make_dense(self) -> None:
        """As if made with `expand`."""
        if self.dense is None:
            self.expand = True
            self._take(self.dynamic.detach(), self.static.detach())

    def extra_repr(self) -> str:
        return f"{self.num_sets} x {self.num_dynamic} of {math.prod(self.shape)}, expand={self.expand}"


def normal(shape: tuple[int, ...], deviation: float, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """N(0, deviation^2) drawn in float32 on the generator's device, so that a seed means the same on every device."""
    return (torch.randn(shape, device=generator.device if generator else like.device, generator=generator) * deviation).to(like)
