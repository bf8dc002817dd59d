"""Tile sizes of the Triton products: a table by product, dtype, width and rows an expert, and autotuning on request.

With DYN_AUTOTUNE=1 the first call of a shape on a device times the table's choice against its neighbours and remembers the
fastest in a JSON file (DYN_CACHE, else the user's cache folder). Off by default: it costs seconds a shape, and results then
differ in the last bits between machines. Nothing is timed while a CUDA graph is captured; what is tuned already is used there too.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dyn.ops.triton_launch import blocks, power_of_two, shared_memory

_log = logging.getLogger(__name__)
_tuned: dict[str, Config] = {}
_HOPPER = 220 << 10  # bytes of shared memory; multiprocessors of other generations have less
_GRADIENTS = ("down_gradient", "gate_up_gradient")
_FILLED = 128  # tiles that keep a large device busy


@dataclass(frozen=True)
class Config:
    """Tiles of block_m x block_n, block_k deep; how many row tiles share weights in L2; programs on each multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    each: int = 1

    @property
    def blocks(self) -> dict[str, int]:
        """The kernels' arguments of these names."""
        return dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_K=self.block_k, GROUP_M=self.group_m)


def _padding(size: int, block: int) -> float:
    return -(-size // block) * block / max(size, 1)


def _narrow(width: int) -> bool:
    """Whether tiles of 128 columns would compute so much more than tiles of 64 that these, at a lower rate, are faster: 192, not 688."""
    return _padding(width, 128) > 1.2 * _padding(width, 64)


def row_tile(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile of the order, which products may cut finer: what an expert has on average, within 16 and 128.

    64 at most for float32.
    """
    each = num_rows // max(num_experts, 1)
    if dtype == torch.float32:
        return max(16, min(64, power_of_two(each)))
    return max(16, min(128, power_of_two(each)))


def table(name: str, dtype: torch.dtype, inner: int, outer: int, tile: int, num_experts: int) -> Config:
    """The configuration of a product of `inner` deep and `outer` wide (rows x columns for a weight gradient), for row tiles of `tile`.

    The fastest of about 20 each on an H100 with Triton 3.6, at the widths of LLaMA-MoE, Mixtral, OLMoE, Qwen3 and SmolLM2. A weight gradient
    reads one side by descriptor, and that side takes the 256; loads of the other wait for a load of indices, which takes two stages of the
    pipeline. Where such tiles are fewer than multiprocessors, smaller ones are faster (sums of parts of an expert's rows were not).
    """
    gradient = name in _GRADIENTS
    if dtype == torch.float32:  # on the ordinary units, unless tf32 is allowed: small tiles, or the sums leave the registers
        columns = 32 if name == "gate_up" else 64
        return Config(64 if gradient else tile, columns, 32, warps=8, stages=3, each=2)
    if gradient:
        m, n = (128, 256) if name == "down_gradient" else (256, 128)
        if num_experts * blocks(inner, m) * blocks(outer, n) < _FILLED:
            m = n = 128
        return Config(m, n, 64, warps=8, stages=5)
    if tile < 128:  # few rows: reading the weights is what takes time
        return Config(tile, 64 if name == "gate_up" else 128, 64, warps=4, stages=4, each=1 if tile == 64 else 2)
    if name == "gate_up":
        return Config(128, 64, 64, warps=4, stages=3, each=2) if _narrow(outer) else Config(128, 128, 64, warps=8, stages=3)
    if inner < 512 or outer <= 256:  # short tiles, or two wide ones for what one and a half would hold
        return Config(128, 128, 64, warps=8, stages=4) if name == "down_backward" else Config(128, 128, 64, warps=8, stages=3, each=2)
    return Config(128, 256, 64, warps=8, stages=3)


def fitting(config: Config, name: str, element_size: int, limit: int, by_pointer: bool) -> Config:
    """The configuration for a device whose multiprocessors have `limit` bytes of shared memory for tiles.

    Tiles are cut to 128 x 128 before Hopper, whose matrix instructions alone take both operands from shared memory, and where
    pointers to rows that start anywhere fill the registers. Then stages, then depth are cut until the tiles fit.
    """
    wide = _wide(name)
    while (limit < _HOPPER or by_pointer) and config.block_m * config.block_n * wide > 128 * 128:
        taller = config.block_m > config.block_n * wide
        config = replace(config, block_m=config.block_m // 2) if taller else replace(config, block_n=config.block_n // 2)
    while _tile_bytes(config, name, element_size) > limit and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    while _tile_bytes(config, name, element_size) > limit and config.block_k > 16:
        config = replace(config, block_k=config.block_k // 2)
    return config


def _wide(name: str) -> int:
    return 2 if name == "gate_up" else 1  # a tile of the gate and one of the up projection


def _tile_bytes(c: Config, name: str, element_size: int) -> int:
    """Shared memory that the tiles in flight take."""
    held = (c.stages + 1) // 2 if name in _GRADIENTS else c.stages  # behind the load of indices, a tile is held every other stage
    return held * (c.block_m + _wide(name) * c.block_n) * c.block_k * element_size


def choose(name: str, like: Tensor, sizes: tuple[int, int, int, int], tile: int, by_pointer: bool, run: Callable[[Config], None]) -> None:
    """Runs a product with the configuration for its sizes (experts, inner, outer, rows): the table's, or the tuned one.

    `by_pointer`: a weight is read through pointers, or rows do not start at multiples of 16 bytes.
    """
    experts, inner, outer, rows = sizes
    size, limit = like.element_size(), shared_memory(like.device)
    config = fitting(table(name, like.dtype, inner, outer, tile, experts), name, size, limit, by_pointer)
    if os.environ.get("DYN_AUTOTUNE") == "1" and like.is_cuda:
        device = torch.cuda.get_device_name(like.device)
        key = f"{device} {name} {like.dtype} E{experts} {inner}x{outer} tile {tile} rows {power_of_two(rows)}{' by pointer' if by_pointer else ''}"
        if not _tuned:
            _tuned.update(_read())
        if key in _tuned:
            config = _tuned[key]
        elif not torch.cuda.is_current_stream_capturing():
            config = _tune(key, [c for c in candidates(config, tile) if _tile_bytes(c, name, size) <= limit], run)
    run(config)


def _tune(key: str, configs: list[Config], run: Callable[[Config], None]) -> Config:
    """The fastest of the configurations, which is remembered; the first, the table's choice, where none could be timed."""
    start, times = configs[0], {config: _time(functools.partial(run, config)) for config in configs}
    best = min(times, key=times.__getitem__)
    if times[best] < float("inf"):
        _tuned[key] = best
        _log.info("tuned %s: %s in %.3f ms, the table's choice takes %.3f", key, best, times[best], times[start])
        _write()
    return best


def candidates(start: Config, tile: int) -> list[Config]:
    """The table's choice and its neighbours; `tile` is what block_m must divide, 0 for a product that cuts its own rows."""
    found = [start]
    for block_m in (start.block_m // 2, start.block_m, start.block_m * 2):
        for block_n in (start.block_n // 2, start.block_n, start.block_n * 2):
            for warps in (4, 8):
                found += [replace(start, block_m=block_m, block_n=block_n, warps=warps, each=each) for each in (1, 2)]
    found += [replace(start, stages=start.stages + step) for step in (-1, 1)] + [replace(start, group_m=group_m) for group_m in (4, 16)]
    most = start.block_m * start.block_n * 2
    fits = [c for c in found if min(c.block_m, c.block_n) >= 16 and c.block_m * c.block_n <= most and not tile % c.block_m]
    return list(dict.fromkeys(fits))


def _time(run: Callable[[], None]) -> float:
    """Milliseconds, or infinity for tiles that do not compile or that the device has no room for. What broke the device is raised."""
    from triton.testing import do_bench

    try:
        return do_bench(run, warmup=5, rep=20)
    except Exception as error:  # Triton's passes, its assembler and its launcher all have errors of their own
        _log.debug("tiles are left out: %s", error)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float("inf")


def _path() -> Path:
    folder = os.environ.get("DYN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyn"
    return Path(folder) / "triton_tiles.json"


def _read() -> dict[str, Config]:
    try:
        return {key: Config(**fields) for key, fields in json.loads(_path().read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        _log.warning("%s is not a file of tuned tiles and is written anew: %s", _path(), error)
        return {}


def _write() -> None:
    _tuned.update(_read() | _tuned)  # other ranks write what they have tuned to the same file
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({key: asdict(config) for key, config in sorted(_tuned.items())}, indent=1), encoding="utf-8")
    temporary.replace(path)
