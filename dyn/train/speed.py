"""What a device does: batches on it, the rate that it could reach, which model FLOPs utilisation is measured against, and the time that a step takes."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Dense bfloat16 matrix products without sparsity, FLOP/s, from the vendor's data sheets; the first name whose words the device's name contains counts.
GPU_BF16 = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H800 PCIe": 756e12, "H800": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A800": 312e12, "A10G": 70e12, "A40": 150e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}


def on_device(batch: Mapping[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """A batch's tensors on a device."""
    return {key: value.to(device) for key, value in batch.items()}


@functools.cache
def measure_matmul_rate(dtype: torch.dtype, device: str = "cpu", *, size: int = 2048, seconds: float = 1.0, trials: int = 3) -> float:
    """Floating-point operations a second of square matrix products, the best of a few trials; measured once a process.

    Args:
        dtype, device: of the factors.
        size: rows and columns.
        seconds, trials: how long a trial takes, and how many there are.
    """
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in range(2))
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best, repeats = 0.0, 1
    with torch.inference_mode():
        for _ in range(trials):
            spent, products = 0.0, 0
            while spent < seconds:
                wait()
                begin = time.perf_counter()
                for _ in range(repeats):
                    torch.mm(a, b)
                wait()
                took = time.perf_counter() - begin
                spent, products = spent + took, products + repeats
                if took < 0.01:  # let a call last long enough for the clock
                    repeats *= 2
            best = max(best, products * 2 * size**3 / spent)
    return best


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The peak of one device in FLOP/s, and where the figure comes from: a data sheet for known GPUs in bfloat16, else the measured rate of matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((rate for key, rate in GPU_BF16.items() if re.search(rf"\b{key}\b(?! (Ti|D|Laptop)\b)", name)), None)
        if known is not None and dtype == torch.bfloat16:
            return known, f"data sheet of {name}, dense bfloat16"
        rate = measure_matmul_rate(dtype, str(device), size=4096)
        return rate, f"measured rate of {str(dtype).removeprefix('torch.')} matrix products on {name}"
    rate = measure_matmul_rate(dtype)
    return rate, f"measured rate of {str(dtype).removeprefix('torch.')} matrix products on this CPU, {torch.get_num_threads()} threads"


def mfu(active_parameters: int, tokens_per_second: float, peak: float, trained: int | None = None) -> float:
    """Model FLOPs utilisation, 6 P R / peak, with P the parameters that a token passes through, not all that are stored (section 4.6, fact 32). Of these 6 a
    frozen parameter takes 4, since its own gradient is not computed; `trained` says how many of the P are not frozen (None: all)."""
    return (4 * active_parameters + 2 * (active_parameters if trained is None else trained)) * tokens_per_second / peak


def seconds_per_micro_batch(net: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype, trials: int = 3) -> float:
    """Least of `trials` measured forward and backward passes of `loss()`, a loss of `net` in training mode, after one to warm up; under autocast to `dtype`
    unless that is float32. Gradients are dropped afterwards and the mode comes back; batch statistics move."""
    device, training, times = next(net.parameters()).device, net.training, []
    net.train()
    for _ in range(trials + 1):
        began = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        net.zero_grad(set_to_none=True)
    net.train(training)
    return min(times[1:])


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every one of `runs` in each of `rounds` rounds, whose order alternates, after a round to warm up: ratios within a round bear what else the
    machine does."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in runs if number % 2 else reversed(runs):
            began = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}
