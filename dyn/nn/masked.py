"""A fixed mask on a parameter: pruned positions are exactly 0.0 in the forward pass, after every optimiser step and in every file (SparseAdapter section 2.4).

The parameter keeps its key. Its mask lies beside it in one of two forms:

mask: the parameter is dense, the mask a bool buffer, `mask` where the module has one weight, else `<parameter>_mask`. The forward pass sees the weight
    masked, so that pruned positions have zero gradients, and with them zero moments in SGD and in Adam's family.
flat: the parameter is the 1-D tensor of surviving values, in the weight's own order, so that gradients and moments are as small; the mask is packed, 8
    positions a byte, as the buffer `bits` or `<parameter>_bits`. The dense weight exists while a pass needs it: in nn.Linear one at a time, elsewhere from the
    forward pass to the backward pass. Zeros fill the values up to a multiple of 32: fused optimisers round what is left over from their vectors in another
    way, and the two forms are to train bit by bit alike.

Nothing here is bound to a kind of module: hooks put what the forward pass is to see before the parameter, under its name. Its parameters are the optimiser's,
under DDP and FSDP2 too (`prune` first, then shard; masks are not sharded). Copies of a model are whole, but for the output projection of
nn.MultiheadAttention, which is read past its module: in a copy that is to be trained, set its mask again.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn.core.partition import pack_bits, positions, unpack_bits
from dyn.ops.arguments import autocast

Form = Literal["mask", "flat"]
LINE = 32  # values that no vectorised loop splits: 128 bytes of float32


class _Held(NamedTuple):
    """What a module remembers of a masked parameter of its own."""

    buffer: str  # the name of the mask, or of the bits
    shape: torch.Size | None = None  # flat: of the dense weight
    count: int = 0  # flat: survivors


class _Scatter(torch.autograd.Function):
    """The first of the values in the places of a packed mask, zeros elsewhere; keeps the bits alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, values_K: Tensor, bits: Tensor, shape: torch.Size, count: int) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.shape, ctx.count = shape, count
        return values_K.new_zeros(shape.numel()).scatter_(0, positions(unpack_bits(bits, shape, check=False), count), values_K[:count]).view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grad, ctx.saved_tensors[0], ctx.count), None, None, None


class _Linear(torch.autograd.Function):
    """x W^T + b, [..., I] -> [..., O], W [O, I] of a flat parameter: built for each pass, so that none is held in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values_K: Tensor, bits: Tensor, bias: Tensor | None, shape: torch.Size, count: int) -> Tensor:
        ctx.save_for_backward(x, values_K, bits)
        ctx.shape, ctx.count = shape, count
        return F.linear(x, _Scatter.apply(values_K, bits, shape, count), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values_K, bits = ctx.saved_tensors
        grad_TO, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        wanted = ctx.needs_input_grad
        return (grad @ _Scatter.apply(values_K, bits, ctx.shape, ctx.count) if wanted[0] else None,
                _gather(grad_TO.T @ x_TI, bits, ctx.count) if wanted[1] else None,  # in the order that torch takes: the same bits
                None, grad_TO.sum(0) if wanted[3] else None, None, None)


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The bool mask of every masked parameter, True = kept, by the parameter's key; in either form. Those of form "mask" are the buffers themselves."""
    return {key: _mask(module, name) for key, module, name in _masked(model)}


def dense_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """A module's parameter as its forward pass sees it: zero where pruned, of its full shape in either form; one without a mask as it is.

    What reads a weight past its module's own forward pass (merging, files) reads it here. Gradients flow to the parameter. A sharded one is gathered, which
    all processes must do together.
    """
    return _seen(module, name) if name in getattr(module, "_kept", ()) else getattr(module, name)


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """`dense_weight` of every masked parameter, by key."""
    return {key: dense_weight(module, name) for key, module, name in _masked(model)}


@torch.no_grad()
def set_masks(model: nn.Module, masks: Mapping[str, Tensor], form: Form = "mask", optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Mask parameters, in place; returns the model. Pruned positions become 0.0, gradients of these parameters are cleared; others stay as they are.

    Args:
        model: any. A parameter that is masked already gets the new mask instead; positions that it brings back start at 0.0.
        masks: bool tensors of the parameters' shapes, True = kept, by the parameters' keys.
        form: "mask" or "flat" (see the module). Under "flat" the parameters are new ones: make the optimiser afterwards.
        optimizer: of a training that goes on: its moments of pruned positions become zero too, without which they would move the weights.

    Raises:
        ValueError: a key that the model does not have, a mask of another shape or type, a parameter that is sharded or (flat) shared; nothing is changed then.
    """
    if form not in ("mask", "flat"):
        raise ValueError(f"form={form!r} is unknown; allowed: mask, flat")
    if form == "flat" and optimizer is not None:
        raise ValueError("form='flat' makes new parameters, which an optimiser that exists does not hold; make it afterwards")
    owners = {key: (module, name) for key, module, name in _parameters(model)}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for key, mask in masks.items():
        if key not in owners:
            raise ValueError(f"{type(model).__name__} has no parameter {key!r} to mask; it has {', '.join(list(owners)[:6])}, ...")
        module, name = owners[key]
        p = module._parameters[name]
        shape = _dense_shape(module, name)
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(f"the mask of {key} must be bool {list(shape)}, as the parameter; got {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}")
        found[key] = [(m, n) for m, n in owners.values() if m._parameters[n] is p]
        if _is_sharded(p):
            raise ValueError(f"{key} is sharded over processes; set masks first, then shard")
        if form == "flat" and isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(f"{key} is read by nn.MultiheadAttention past its module's call, which form='flat' cannot serve; take form='mask'")
        if optimizer is not None and p.shape != shape:
            raise ValueError(f"{key} is in flat form, and its dense weight will be a new parameter, which the optimiser does not hold; make it afterwards")
        if form == "flat" and len(found[key]) > 1:
            raise ValueError(f"{key} is shared by {len(found[key])} modules, which form='flat' cannot serve; take form='mask'")
        for m, n in found[key]:
            taken = _buffer(m, n, form, mask.ndim)
            if hasattr(m, taken) and getattr(m, "_kept", {}).get(n, _Held("")).buffer != taken:
                raise ValueError(f"{type(m).__name__} has something else named {taken!r}, where the mask of its {n!r} belongs")
    for key, mask in masks.items():
        (module, name), *sharers = found[key]
        dense = dense_weight(module, name).detach()
        mask = mask.to(dense.device, copy=True)
        _release(module, name)
        if form == "flat":
            values = dense[mask]
            module._parameters[name] = nn.Parameter(_fill(values), requires_grad=module._parameters[name].requires_grad)
            _hold(module, name, pack_bits(mask), mask.shape, len(values))
            continue
        p = module._parameters[name]
        if p.shape != mask.shape:  # it was flat
            p = module._parameters[name] = nn.Parameter(dense, requires_grad=p.requires_grad)
        p.masked_fill_(~mask, 0)
        p.grad = None
        _hold(module, name, mask)
        for sharer, own in sharers:
            _release(sharer, own)
            _hold(sharer, own, mask, persistent=False)
        for moment in (optimizer.state.get(p, {}).values() if optimizer is not None else ()):
            if isinstance(moment, Tensor) and moment.shape == p.shape:
                moment.masked_fill_(~mask, 0)
    return model


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """Make pruned positions 0.0 again, in place: what `dyn.train.annealing.KeepMask` does after each step of an optimiser that mixes elements (Muon)."""
    for _, module, name in _masked(model):
        p, held = module._parameters[name], module._kept[name]
        if held.shape is None:
            mask = getattr(module, held.buffer)
            (p.to_local() if _is_sharded(p) else p).masked_fill_(~(_local(mask, p) if _is_sharded(p) else mask), 0)


@torch.no_grad()
def drop_masks(model: nn.Module) -> nn.Module:
    """Make every masked parameter an ordinary dense one, zeros where it was pruned, in place; returns the model."""
    for _, module, name in list(_masked(model)):
        p, dense = module._parameters[name], dense_weight(module, name).detach()
        _release(module, name)
        if p.shape != dense.shape:
            module._parameters[name] = nn.Parameter(dense, requires_grad=p.requires_grad)
    for module in model.modules():  # those that share a parameter with another
        for name in list(getattr(module, "_kept", ())):
            _release(module, name)
    return model


def flat_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that hold the surviving values of a matrix or kernel: 1-D by form only, so that weight decay treats them as what they are."""
    return [module._parameters[name] for _, module, name in _masked(model) if len(module._kept[name].shape or ()) >= 2]


def count_pruned(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many positions of each masked parameter are dead: stored, but pruned."""
    return {p: int((~getattr(module, held.buffer)).sum()) if held.shape is None else p.numel() - held.count for _, module, name in _masked(model)
            for p, held in [(module._parameters[name], module._kept[name])]}


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(key, owner, name in the owner) of every parameter, shared ones under each of their keys."""
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                yield f"{path}.{name}".lstrip("."), module, name


def _masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    seen: set[int] = set()
    for key, module, name in _parameters(model):
        p = module._parameters[name]
        if name in getattr(module, "_kept", ()) and id(p) not in seen:
            seen.add(id(p))
            yield key, module, name


def _gather(grad: Tensor, bits: Tensor, count: int) -> Tensor:
    """The survivors' part of a dense gradient. Their number is given: a masked selection would wait for the device to find it."""
    return _fill(grad.flatten().index_select(0, positions(unpack_bits(bits, grad.shape, check=False), count)))


def _fill(values_K: Tensor) -> Tensor:
    return nn.functional.pad(values_K, (0, -len(values_K) % LINE))


def _is_sharded(p: Tensor) -> bool:
    return hasattr(p, "full_tensor")


def _local(mask: Tensor, p: Any) -> Tensor:
    """This process's part of a mask, as FSDP2 shards its parameter: chunks along one axis of a mesh of one dimension."""
    (placement,) = p.placements
    if not placement.is_shard():
        return mask
    parts = mask.chunk(p.device_mesh.size(), placement.dim)
    rank = p.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else mask.narrow(placement.dim, 0, 0)


def _dense_shape(module: nn.Module, name: str) -> torch.Size:
    held = getattr(module, "_kept", {}).get(name)
    return module._parameters[name].shape if held is None or held.shape is None else held.shape


def _mask(module: nn.Module, name: str) -> Tensor:
    held = module._kept[name]
    there = getattr(module, held.buffer)
    return there if held.shape is None else unpack_bits(there, held.shape, check=False)


def _seen(module: nn.Module, name: str) -> Tensor:
    """What the forward pass sees of a masked parameter."""
    p, held = module._parameters[name], module._kept[name]
    there = getattr(module, held.buffer)
    if _is_sharded(p):
        p = p.full_tensor()
    return torch.where(there, p, 0) if held.shape is None else _Scatter.apply(p, there, held.shape, held.count)


def _buffer(module: nn.Module, name: str, form: Form, axes: int) -> str:
    # A bias beside its matrix is no weight, beside the vector of a norm it is one.
    weights = [n for n, p in module._parameters.items() if p is not None and (n == name or len(_dense_shape(module, n)) >= axes)]
    what = "mask" if form == "mask" else "bits"
    return what if weights == [name] else f"{name}_{what}"


def _hold(module: nn.Module, name: str, stored: Tensor, shape: torch.Size | None = None, count: int = 0, persistent: bool = True) -> None:
    """Remember a mask (or, given the dense shape, bits), and hang the hooks if this is the module's first."""
    held = _Held(_buffer(module, name, "mask" if shape is None else "flat", len(module._parameters[name].shape if shape is None else shape)), shape, count)
    module.register_buffer(held.buffer, stored, persistent=persistent)
    if not hasattr(module, "_kept"):
        module._kept = {}
        module.register_forward_pre_hook(_show)
        module.register_forward_hook(_hide, always_call=True)
        module.register_load_state_dict_pre_hook(_read)
    module._kept[name] = held
    if shape is not None and name == "weight" and type(module).forward is nn.Linear.forward:
        module.forward = functools.partial(_flat_linear, module)
    if shape is None:
        # For whoever reads a weight past its module's call, as nn.MultiheadAttention does with its projection. The hook of a copy is gone, so that `_show` is
        # what everything else relies on.
        p = module._parameters[name]
        if not any(isinstance(hook, _GradientMask) for hook in (p._backward_hooks or {}).values()) and p.requires_grad:
            p.register_hook(_GradientMask(module, name))


class _GradientMask:
    """A parameter's hook that zeroes its gradient where the module says that it is pruned."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = weakref.ref(module), name

    def __call__(self, grad: Tensor) -> Tensor | None:
        module = self.module()
        held = None if module is None else getattr(module, "_kept", {}).get(self.name)
        return None if held is None else torch.where(getattr(module, held.buffer), grad, 0)


def _release(module: nn.Module, name: str) -> None:
    """Forget a mask. The module's hooks stay, with nothing to do."""
    if name in getattr(module, "_kept", ()):
        delattr(module, module._kept.pop(name).buffer)
        if name == "weight" and getattr(vars(module).get("forward"), "func", None) is _flat_linear:
            del module.forward


# Hooks. They hold no state, so that those of a copy see the copy.


def _show(module: nn.Module, _: tuple) -> None:
    for name in module._kept:
        if name != "weight" or "forward" not in vars(module):
            vars(module)[name] = _seen(module, name)  # found before the parameter of the same name, which stays where it is


def _hide(module: nn.Module, *_: Any) -> None:
    for name in module._kept:
        vars(module).pop(name, None)


def _flat_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """nn.Linear's forward pass where the weight is flat."""
    held, values, bias = module._kept["weight"], module._parameters["weight"], module.bias
    x, values, bias = autocast(x, values, bias)
    return _Linear.apply(x, values, getattr(module, held.buffer), bias, held.shape, held.count)


@torch.no_grad()
def _read(module: nn.Module, state: dict[str, Tensor], prefix: str, _: dict, __: bool, ___: list, ____: list, errors: list[str]) -> None:
    """Files of the other form are read too, and the number of survivors follows the file."""
    for name, held in module._kept.items():
        stem = held.buffer.removesuffix("mask" if held.shape is None else "bits")
        values, mask, bits = (state.get(prefix + key) for key in (name, f"{stem}mask", f"{stem}bits"))
        p = module._parameters[name]
        try:
            if held.shape is None and bits is not None and values is not None:
                mask = unpack_bits(bits, p.shape)
                state[f"{prefix}{stem}mask"] = mask
                state[prefix + name] = values.new_zeros(p.shape).masked_scatter_(mask, values)
                del state[f"{prefix}{stem}bits"]
            elif held.shape is None and values is not None and values.shape == p.shape and not _is_sharded(p):
                # Of a file without masks too, whose pruned weights are not zero.
                state[prefix + name] = values.where((getattr(module, held.buffer) if mask is None else mask).to(values.device), 0)
            elif held.shape is not None and values is not None:
                if mask is not None and values.shape == mask.shape == held.shape:
                    state[prefix + name] = values = _fill(values[mask])
                    state[f"{prefix}{stem}bits"] = bits = pack_bits(state.pop(f"{prefix}{stem}mask"))
                if bits is not None:
                    count = int(unpack_bits(bits, held.shape).sum())
                    if len(values) != count + -count % LINE:
                        raise ValueError(f"{count} positions survive by the bits, the file has {len(values)} values")
                    module._kept[name] = held._replace(count=count)
                    if len(values) != len(p) and not _is_sharded(p):
                        p.data = p.new_empty(len(values))
        except (ValueError, RuntimeError) as error:
            errors.append(f"{prefix}{name}: {error}")
