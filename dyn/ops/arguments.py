"""What every op over routed tokens asks of its arguments, does to them under autocast, and how its backend is chosen.

T tokens, K experts a token, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the autocast dtype where autocast is on for the device of the first and that is not float64; else, and where torch's own operations cast
    none (numbers of other kinds, float64), as they are. None stays None."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:  # meta has no autocast state
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) if t is not None and t.dtype in DTYPES[1:] else t for t in tensors)


def unobserved(*tensors: Tensor) -> bool:
    """Whether nobody needs to see a call on CPU as one operation: no autograd, compilation, tracing, mode, transform (vmap) or subclass of
    tensors. Its computation may then run without the custom operation around it, whose dispatch takes as long as the computation of a few tokens."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None
                or peek_interpreter_stack() is not None
                or any(not t.is_cpu or type(t) not in (Tensor, nn.Parameter) or is_legacy_batchedtensor(t) for t in tensors)
                or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)))


def given(tensors: Mapping[str, Tensor]) -> str:
    """What a refusal says that it got: dtype, shape and device of every tensor."""
    return "got " + ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}" for name, t in tensors.items())


def expert_tensors(*tensors: Tensor) -> dict[str, Tensor]:
    """What errors call the arguments of `dyn.ops.experts`."""
    return dict(zip(("x", "gate_up", "down", "idx", "weight"), tensors, strict=True))


def check_devices(op: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless all tensors are on one device: an op that mixes them would read memory that is not there, or fail far from its cause."""
    first, *others = tensors.values()
    if any(t.device != first.device for t in others):
        raise ValueError(f"{op}: all tensors must be on one device; {given(tensors)}")


def check_routed(op: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless x, the experts' parameters, idx and weight (in this order) are dense and on one device, ids are int32 or int64 [T, K] with K >= 1, the
    scores are as many, there is an expert, and parameters have x's dtype, one of `DTYPES`."""
    check_devices(op, tensors)
    x, *parameters, idx_TK, weight_TK = tensors.values()
    if any(t.layout != torch.strided for t in tensors.values()):
        raise ValueError(f"{op} takes dense tensors alone, got {', '.join(f'{n} {t.layout}' for n, t in tensors.items())}; {given(tensors)}")
    if not parameters[0].shape[0]:
        raise ValueError(f"{op} needs an expert at least; {given(tensors)}")
    K = idx_TK.shape[1] if idx_TK.dim() == 2 else 0
    if K < 1 or idx_TK.shape != (x.shape[0], K) or weight_TK.shape != (x.shape[0], K):
        raise ValueError(f"{op} needs idx and weight of one shape [T, K] with T={x.shape[0]} and K >= 1; {given(tensors)}")
    if idx_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: idx must be int32 or int64; {given(tensors)}")
    if x.dtype not in DTYPES or weight_TK.dtype not in DTYPES:
        raise ValueError(f"{op}: x and weight must be float64, float32, bfloat16 or float16; {given(tensors)}")
    if any(p.dtype != x.dtype for p in parameters):
        *others, last = list(tensors)[:-2]
        raise ValueError(f"{op}: {', '.join(others)} and {last} must share a dtype; {given(tensors)}")


def refuse_negative(op: str, smallest: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """ValueError for an id below 0, on CPU: elsewhere the check would wait for the device."""
    if smallest.device.type == "cpu" and smallest < 0:
        raise ValueError(f"{op}: idx holds {int(smallest)}; ids are >= 0, and ids >= E stand for no expert; {given(tensors)}")


def pick(op: str, backend: str, backends: Mapping[str, Callable[..., Any]], best: str, tensors: Mapping[str, Tensor], log: logging.Logger, logged: set[str],
         why: str = "") -> str:
    """The backend to run: `best` for "auto", which the log says once a device, with `why` behind it. ValueError for a name that is not in `backends`."""
    if backend == "auto":
        device = next(iter(tensors.values())).device.type
        if not torch.compiler.is_compiling() and device not in logged:
            logged.add(device)
            log.info("%s: backend=auto picked %s on %s%s", op, best, device, why)
        return best
    if backend not in backends:
        raise ValueError(f"backend={backend!r} of {op} is unknown; allowed: auto, {', '.join(backends)}; {given(tensors)}")
    return backend
