"""What is done to a whole network: made dynamic, partially dynamic, compact; frozen by module identity; counted."""

from __future__ import annotations

from torch import nn

from dyn.nn.convert_conv import make_dynamic as make_dynamic
from dyn.nn.count import count_parameters as count_parameters
from dyn.nn.count import dynamic_shares as dynamic_shares
from dyn.nn.count import flops_per_token as flops_per_token
from dyn.nn.count import macs_per_image as macs_per_image
from dyn.nn.count import macs_per_sentence as macs_per_sentence
from dyn.nn.dynamic_conv import attention_entropy as attention_entropy
from dyn.nn.dynamic_conv import set_temperature as set_temperature
from dyn.nn.partial import compact as compact
from dyn.nn.partial import make_partial as make_partial
from dyn.nn.partial import settle as settle


def freeze(model: nn.Module, *modules: nn.Module | type[nn.Module]) -> int:
    """Stop training `modules` of `model`, given as modules or classes; returns how many parameters that froze.

    By identity, never by name: matching "gate" by name would also freeze every expert's SwiGLU gate matrix.

    Raises:
        ValueError: a module that is not part of the model, or a class of which it has none.
    """
    parameters = _parameters("freeze", model, modules)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return sum(p.numel() for p in parameters)


def train_only(model: nn.Module, *modules: nn.Module | type[nn.Module]) -> int:
    """Freeze all of `model` but `modules`, by identity as in `freeze`; returns how many parameters are left to train.

    Raises:
        ValueError: as in `freeze`, or modules without parameters.
    """
    parameters = _parameters("train_only", model, modules)
    if not parameters:
        raise ValueError(f"train_only: what was named of {type(model).__name__} has no parameters, so nothing would be trained")
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return sum(p.numel() for p in parameters)


def _parameters(verb: str, model: nn.Module, modules: tuple[nn.Module | type[nn.Module], ...]) -> list[nn.Parameter]:
    """Of all of `modules`, each once."""
    chosen: list[nn.Module] = []
    for wanted in modules:
        found = [m for m in model.modules() if (isinstance(m, wanted) if isinstance(wanted, type) else m is wanted)]
        if not found:
            name = wanted.__name__ if isinstance(wanted, type) else type(wanted).__name__
            classes = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
            raise ValueError(f"{verb}: {type(model).__name__} has no such {name}; its classes: {classes}")
        chosen += found
    return list({id(p): p for module in chosen for p in module.parameters()}.values())
