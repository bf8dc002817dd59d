"""Places in a host where adapters act: hooks on the host's own modules, whose classes, keys and code stay as they are.

A site is a child module of the module it changes, named after what it does there (`ROLES`); its own children are one `AdapterModule` a name, so that a key
reads `encoder.layer.0.output.dropout.sequential.NAME.down.weight`. Hooks hold no state and find their site through the module, so that copies of a model
are whole. B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dyn.nn.adapter_modules import AdapterModule, Fusion

ROLES = ("sequential", "parallel", "lora", "prefix", "prefix_encoder", "prefix_self", "prefix_cross", "heads")
How = Literal["output", "input", "second_input", "before_norm", "into_norm", "entry_input", "attention", "source", "replace"]


@dataclass
class Place:
    """A module of the host, and how an adapter acts there.

    output: out + A(out). input: out + A(in). second_input: A(second input) is added to the second input, which is a residual that goes straight into a layer
    norm. before_norm: a layer norm's input s becomes s + A(norm(s)). into_norm: a layer norm's input s becomes s + A(x), x the input of `entry`, a module that
    runs earlier; entry_input: the same with the module's output. attention: the attention function looks the prefix up. source: nothing, others use
    it. replace: A(in) instead of out.
    """

    module: nn.Module
    how: How
    dim: int
    entry: nn.Module | None = None


@dataclass
class Active:
    """Which adapters of a host act now; one object for all of its sites."""

    names: tuple[str, ...] = ()  # those that act on some sample
    rows: dict[str, Tensor] | None = None  # mixed in a batch: the samples of each name
    batch: int = 0
    merged: str | None = None  # whose LoRA stands in the weights
    configs: dict[str, Any] = field(default_factory=dict)
    head_owner: str | None = None  # the adapter that trains the host's own head; others have a copy each

    def rows_of(self, name: str, x: Tensor) -> Tensor | None:
        """The rows of `x` that `name` acts on; None for all. Beams and copies of a sample, which lie side by side, follow it.

        Raises:
            ValueError: a batch that is no multiple of the one that names were given for.
        """
        if self.rows is None:
            return None
        times, rest = divmod(x.shape[0], self.batch)
        if rest or not times:
            raise ValueError(f"adapters were chosen for {self.batch} samples, the batch has {x.shape[0]}; call set_active again")
        rows = self.rows[name]
        if rows.device != x.device and not x.is_meta:  # shapes alone: the next batch has a device
            rows = self.rows[name] = rows.to(x.device)  # once, not at every place
        return rows if times == 1 else (rows[:, None] * times + torch.arange(times, device=x.device)).flatten()


class Site(nn.ModuleDict):
    """The adapters at one place of a host, by name."""

    def __init__(self, active: Active, how: How) -> None:
        super().__init__()
        self.active, self.how = active, how
        self.handles: list[RemovableHandle] = []
        self.held: Tensor | None = None  # the input of the entry until the place takes it

    def acting(self) -> list[str]:
        """Names with a module here that act now; a LoRA that is merged into the weight does so already."""
        return [name for name in self.active.names if name in self and name != self.active.merged]

    def delta(self, name: str, x: Tensor) -> Tensor:
        """What adapter `name` adds, given its input, in the adapter's precision."""
        module = self[name]
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(module.parameters()).dtype)
        return module(x, [self[member](x) for member in module.members]) if isinstance(module, Fusion) else module(x)

    def add(self, target: Tensor, x: Tensor) -> Tensor:
        """`target`, in its precision, plus what the acting adapters make of `x`, each on its samples."""
        for name in self.acting():
            rows = self.active.rows_of(name, x)
            if rows is None:
                target = target + self.delta(name, x).to(target.dtype)
            else:
                target = target.index_add(0, rows, self.delta(name, x[rows]).to(target.dtype))
        return target


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _output_hook(module: nn.Module, args: tuple, output: Any) -> Any:
    return _first(output, lambda out: module.sequential.add(out, out))


def _parallel_hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    return _first(output, lambda out: module.parallel.add(out, _input(args, kwargs)))


def _lora_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return module.lora.add(output, args[0])


def _second_input_hook(module: nn.Module, args: tuple) -> tuple:
    return (args[0], module.parallel.add(args[1], args[1]), *args[2:])


def _before_norm_hook(module: nn.Module, args: tuple) -> tuple:
    site = module.sequential
    if not site.acting():
        return args
    return (site.add(args[0], module.forward(args[0])),)  # the norm's own forward: no hook of it runs here


def _entry_hook(module: nn.Module, args: tuple) -> None:
    module.adapter_exit[0].held = args[0]


def _from_entry(site: Site, target: Tensor) -> Tensor:
    x, site.held = site.held, None
    return site.add(target, x)


def _into_norm_hook(module: nn.Module, args: tuple) -> tuple:
    return (_from_entry(module.parallel, args[0]),)


def _entry_input_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return _from_entry(module.parallel, output)


def _head_hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    site = module.heads
    for name in site.acting():
        rows = site.active.rows_of(name, args[0])
        output = site[name](*args) if rows is None else output.index_copy(0, rows, site[name](args[0][rows]).to(output.dtype))
    return output


def check_place(place: Place, role: str) -> Site | None:
    """The site of a role at a place, if it is there.

    Raises:
        ValueError: the module has something else under the role's name.
    """
    found = getattr(place.module, role, None)
    if found is not None and not isinstance(found, Site):
        raise ValueError(f"no adapter can be attached to {type(place.module).__name__}: it has a {role!r} of its own")
    return found


def open_site(place: Place, role: str, active: Active) -> Site:
    """The site of a role at a place: the one that is there, or a new one with its hooks."""
    if (found := check_place(place, role)) is not None:
        return found
    module = place.module
    site = Site(active, place.how)
    match place.how:
        case "output":
            site.handles.append(module.register_forward_hook(_output_hook))
        case "input" if role == "lora":
            site.handles.append(module.register_forward_hook(_lora_hook))
        case "input":
            site.handles.append(module.register_forward_hook(_parallel_hook, with_kwargs=True))
        case "second_input":
            site.handles.append(module.register_forward_pre_hook(_second_input_hook))
        case "before_norm":
            site.handles.append(module.register_forward_pre_hook(_before_norm_hook))
        case "into_norm" | "entry_input":
            place.entry.adapter_exit = (site,)
            site.handles.append(place.entry.register_forward_pre_hook(_entry_hook))
            site.handles.append(module.register_forward_pre_hook(_into_norm_hook) if place.how == "into_norm" else
                                module.register_forward_hook(_entry_input_hook))
        case "replace":
            site.handles.append(module.register_forward_hook(_head_hook))
    setattr(module, role, site)
    return site


def sites(model: nn.Module) -> dict[str, Site]:
    """All sites of a model by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Site)}


def own_parameters(part: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a part of the host's head by name, without the adapters' copies of it."""
    return {key: p for key, p in part.named_parameters() if not key.startswith("heads.")}


def modules_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """What adapter `name` consists of, by path: adapter modules and its copy of the head."""
    return {f"{path}.{name}": site[name] for path, site in sites(model).items() if name in site}


def adapter_modules(model: nn.Module) -> dict[str, AdapterModule]:
    """All adapter modules of a model by path: what pruning works on."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdapterModule)}


def choose(active: Active, names: str | Sequence[str | None] | None) -> None:
    """Let one adapter act on every sample, one each on the samples of a batch (None: the host alone), or none."""
    if names is None or isinstance(names, str):
        active.names, active.rows, active.batch = (() if names is None else (names,)), None, 0
        return
    found = dict.fromkeys(name for name in names if name is not None)
    active.rows = {name: torch.tensor([i for i, n in enumerate(names) if n == name]) for name in found}
    active.names, active.batch = tuple(found), len(names)
