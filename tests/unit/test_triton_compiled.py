"""Triton's kernels compiled for devices that are not here: what the products launch at the widths of known models is what is compiled.

The launches run on tensors without data and are caught before the device. From the machine code come registers and spills,
from Triton the shared memory, from the PTX the matrix instructions.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dyn.ops import triton_backward, triton_config, triton_launch, triton_order, triton_products, triton_route

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(triton_launch.interpreted(), reason="TRITON_INTERPRET=1: nothing is compiled")

# T, D, F, E, of which every token takes 4 (2 and 8 in the models; the kernels differ by a division).
MODELS = {"llama_moe_4_16": (32768, 4096, 688, 16), "mixtral": (32768, 4096, 14336, 8), "qwen3": (16384, 2048, 768, 128)}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
PRODUCTS = ("gate_up_kernel", "row_product_kernel", "weight_gradient_kernel")
LAUNCHED = ["gate_up_kernel", "row_product_kernel", "row_product_kernel", "weight_gradient_kernel", "weight_gradient_kernel", "row_product_kernel"]


@dataclass
class Catcher:
    """Stands in a module for a kernel and keeps what it would be launched with."""

    kernel: Any
    name: str
    launches: list[tuple[str, Any, tuple, dict]] = field(default_factory=list)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.name, getattr(self.kernel, "jitted", self.kernel), args, kwargs))


def launches_of(monkeypatch, run) -> list[tuple[str, Any, tuple, dict]]:
    caught: list = []
    with monkeypatch.context() as patch:
        for module in (triton_products, triton_backward, triton_order, triton_route):
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, Catcher(kernel, name, caught))
        run()
    return caught


def layer(T, D, F, E, dtype) -> None:
    """All products of one layer's forward and backward."""
    meta = dict(device="meta", dtype=dtype)
    x, dy, gate_up, down = torch.empty(T, D, **meta), torch.empty(T, D, **meta), torch.empty(E, 2 * F, D, **meta), torch.empty(E, D, F, **meta)
    idx, weight = torch.empty(T, 4, dtype=torch.int64, device="meta"), torch.empty(T, 4, device="meta")
    tile = triton_config.row_tile(idx.numel(), E, dtype)
    order = triton_order.read_order(triton_order.order_rows(idx, E, tile), idx.numel(), E)
    act, pre = triton_products.gate_up(x, gate_up, order, 4, tile, keep=True, activate=True)
    triton_products.token_sums(triton_products.row_products(act, down, order, tile, "down"), order.place_S, weight, weighted=True)
    dpre, act, _ = triton_backward.down_backward(dy, down, pre, weight, order, tile, need_pre=True, need_act=True)
    triton_backward.weight_gradient(dy, act, "left", down, order, 4, "down_gradient")
    triton_backward.weight_gradient(dpre, x, "right", gate_up, order, 4, "gate_up_gradient")
    triton_products.row_products(dpre, gate_up.transpose(1, 2), order, tile, "gate_up_backward")


def type_of(value: Any) -> str:
    """Triton's name of an argument's type; an integer that is 1 is a constant to Triton, as in a launch."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "constexpr" if value == 1 else "i32" if abs(value) < 2**31 else "i64"
    return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"


_compiled: dict[tuple, dict] = {}


def compiled(launch, capability: int) -> dict:
    """Registers, spilled bytes, KiB of shared memory and PTX of a launch; the same kernel is compiled once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, kernel, args, kwargs = launch
    options = {key: kwargs[key] for key in ("num_warps", "num_stages") if key in kwargs}
    constants = {key: value for key, value in kwargs.items() if key not in options}
    signature, attributes = {}, {}
    for place, (key, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        signature[key] = type_of(value)
        if signature[key] == "constexpr":
            constants[key] = 1
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(kernel.arg_names[len(args) :], "constexpr")
    key = (name, capability, str(sorted(signature.items())), str(sorted(constants.items())), str(attributes), str(options))
    if key not in _compiled:
        code = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", capability, 32), options=options)
        cubin = Path(os.environ["HF_HOME"]) / "kernel.cubin"  # a folder of the tests' own
        cubin.write_bytes(code.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))
        _compiled[key] = dict(registers=registers, spilled=stack, shared=code.metadata.shared / 1024, ptx=code.asm["ptx"])
    return _compiled[key]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.parametrize("model", MODELS)
def test_hopper(model, monkeypatch):
    """wgmma on tiles by TMA, nothing spilled, within a multiprocessor's shared memory."""
    caught = [launch for launch in launches_of(monkeypatch, lambda: layer(*MODELS[model], torch.bfloat16)) if launch[0] in PRODUCTS]
    assert [name for name, *_ in caught] == LAUNCHED
    for launch in caught:
        found = compiled(launch, 90)
        tile = "x".join(str(launch[3][key]) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        assert "wgmma.mma_async" in found["ptx"] and "mma.sync" not in found["ptx"], launch[0]
        assert "cp.async.bulk.tensor" in found["ptx"], launch[0]
        assert found["spilled"] == 0 and found["shared"] <= 227, (launch[0], tile, found["registers"], found["spilled"], found["shared"])


def test_ampere(monkeypatch):
    """Compute capability 8.0: weights through pointers, less shared memory."""
    monkeypatch.setattr(triton_launch, "has_descriptors", lambda device: False)
    monkeypatch.setattr(triton_config, "shared_memory", lambda device: 161 << 10)
    for launch in launches_of(monkeypatch, lambda: layer(*MODELS["llama_moe_4_16"], torch.bfloat16)):
        found = compiled(launch, 80)
        assert ("mma.sync" in found["ptx"]) == (launch[0] in PRODUCTS) and "cp.async.bulk" not in found["ptx"], launch[0]
        assert found["spilled"] == 0 and found["shared"] <= 163, (launch[0], found["registers"], found["spilled"], found["shared"])


def test_hopper_in_float32_exactly(monkeypatch):
    """Small tiles on the ordinary units: no matrix instruction, which would round to tf32."""
    for launch in launches_of(monkeypatch, lambda: layer(*MODELS["llama_moe_4_16"], torch.float32)):
        found = compiled(launch, 90)
        assert "mma" not in found["ptx"] and found["spilled"] == 0, (launch[0], found["registers"], found["spilled"])


@pytest.mark.parametrize("num_experts, k", [(16, 4), (512, 10)])
def test_router(num_experts, k, monkeypatch):
    logits = torch.empty(1000, num_experts, device="meta", dtype=torch.bfloat16)
    bias = torch.empty(num_experts, device="meta")
    (launch,) = launches_of(monkeypatch, lambda: triton_route.launch_router(logits, bias, k, False, 1.5, False))
    assert compiled(launch, 90)["spilled"] == 0


@pytest.mark.parametrize("limit", [227, 163, 99])
@pytest.mark.parametrize("name", ["gate_up", "down", "down_backward", "gate_up_backward", "down_gradient", "gate_up_gradient"])
@pytest.mark.parametrize("width", [86, 688])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_fit_every_device(name, width, dtype, limit):
    """In the shared memory that there is, cutting the order's tiles evenly, in powers of two as Triton wants them."""
    for rows in (1, 8, 100, 1000, 100000):
        tile = triton_config.row_tile(rows * 8, 8, dtype)
        config = triton_config.fitting(triton_config.table(name, dtype, 4096, width, tile, 8), name, dtype.itemsize, limit << 10, by_pointer=False)
        sizes = config.block_m, config.block_n, config.block_k
        assert all(size & (size - 1) == 0 and size >= 16 for size in sizes)
        assert "gradient" in name or tile % config.block_m == 0
        columns = config.block_n * (2 if name == "gate_up" else 1)
        assert 2 * (config.block_m + columns) * config.block_k * dtype.itemsize <= limit << 10
