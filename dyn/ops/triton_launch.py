"""What the Triton files of this room stand on: kernels that compile at their first launch, and what a device offers them."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dyn.ops.arguments import given

HAS_TRITON = importlib.util.find_spec("triton") is not None  # looks for it without importing it

# In the interpreter programs run one after another: enough of them that each walks over several tiles, few enough to be quick.
_INTERPRETED_PROGRAMS = 3


class Kernel:
    """A function in Triton's language, compiled at its first launch, so that its file can be imported where triton is missing.

    Triton resolves a kernel's names in the module that defines it. The first launch therefore binds `tl` there and puts
    compiled functions in the place of all of the module's `Kernel`s, which may call each other.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @functools.cached_property
    def jitted(self) -> Any:
        """Triton's own object for this function."""
        import triton
        import triton.language

        names = self.function.__globals__
        names["tl"] = triton.language
        make = triton.jit if interpreted() or torch.version.hip else _kept_type()
        jitted = self.__dict__["jitted"] = make(self.function)  # kept before the others are: they may need this one
        for name, value in list(names.items()):
            if isinstance(value, Kernel):
                names[name] = value.jitted
        return jitted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.jitted[grid]


@functools.cache
def _kept_type() -> type:
    """Triton's compiled function that finds what it has compiled for arguments of the same kinds by itself: to work them out anew at each launch, as Triton
    does, takes the host longer than small kernels take the device."""
    from triton.runtime import JITFunction

    class Kept(JITFunction):
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return functools.partial(_launch, self, grid)

    return Kept


def _launch(jitted: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on `grid` programs: `args`, then its constexprs and options of the launch by name. Triton compiles it where `args` are of other kinds than
    before (`_kind`) or constants differ."""
    key = torch.cuda.current_device(), *map(_kind, args), *constants.values()
    known = jitted.__dict__.setdefault("known", {})
    if key not in known:
        names = [param.name for param in jitted.params[len(args) :]]
        compiled = jitted.run(*args, grid=grid, warmup=False, **constants)
        if hasattr(compiled, "packed_metadata") and constants.keys() >= set(names):  # not while it is compiled elsewhere, nor with defaults
            known[key] = compiled, [constants[name] for name in names]
        return
    compiled, values = known[key]
    compiled[*grid, *(1,) * (3 - len(grid))](*args, *values)


def _kind(value: Any) -> Any:
    """What Triton compiles for: a tensor's dtype and alignment, whether a number is 1, a multiple of 16 or needs 64 bits, a descriptor's tile."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    if hasattr(value, "block_shape"):
        return value.base.dtype, tuple(value.block_shape), value.padding
    return type(value)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which works on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, saying what is needed, where `backend="triton"` of `op` cannot run on the tensors."""
    if not HAS_TRITON:
        raise ValueError(f"backend='triton' of {op} needs the package triton, which is not installed; allowed without it: auto, eager; {given(tensors)}")
    device = next(iter(tensors.values())).device
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        raise ValueError(
            f"backend='triton' of {op} needs tensors on a CUDA device, or TRITON_INTERPRET=1 set before the first use of triton; {given(tensors)}"
        )


@functools.cache
def _properties(index: int | None) -> Any:
    """torch.cuda.get_device_properties, which costs as much as a launch when asked before each."""
    return torch.cuda.get_device_properties(index)


def programs(device: torch.device, each: int = 1) -> int:
    """Programs of a persistent grid: `each` on every multiprocessor."""
    return each * (_properties(device.index).multi_processor_count if device.type == "cuda" else _INTERPRETED_PROGRAMS)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that tiles may take on a multiprocessor; a little is left for what kernels keep beside them."""
    return (_properties(device.index).shared_memory_per_block_optin if device.type == "cuda" else 227 << 10) - (2 << 10)


def has_descriptors(device: torch.device) -> bool:
    """Whether the device copies tiles by tensor descriptor (TMA, compute capability 9 and later)."""
    return device.type != "cuda" or _properties(device.index).major >= 9


def describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can stand for it: last axis contiguous, address and other strides in multiples of 16 bytes."""
    *steps, last = tensor.stride()
    return (
        has_descriptors(tensor.device)
        and last == 1
        and tensor.data_ptr() % 16 == 0
        and all(step > 0 and step * tensor.element_size() % 16 == 0 for step in steps)
    )


def descriptor(tensor: Tensor, *block: int) -> Any:
    """Triton's descriptor of a tensor, read in tiles of `block`; elements outside the tensor read as 0."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def precision(dtype: torch.dtype) -> str:
    """How a product of float32 tiles is computed: exactly, unless torch's own setting allows less. 16-bit tiles ignore it."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, as the sizes of Triton's blocks must be."""
    return 1 << max(n - 1, 0).bit_length()


def blocks(n: int, size: int) -> int:
    """Blocks of `size` that cover n."""
    return -(-n // size)
