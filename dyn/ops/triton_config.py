"""Tile sizes of the Triton products: a table by product, dtype, width and rows an expert, and autotuning on request.

With DYN_AUTOTUNE=1 the first call of a shape on a device times the table's choice against its neighbours and remembers the
fastest in a JSON file (DYN_CACHE, else the user's cache folder). Off by default: it costs seconds a shape, and results then
differ in the last bits between machines. Nothing is timed while a CUDA graph is captured.
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

from dyn.ops.triton_launch import power_of_two

_log = logging.getLogger(__name__)
_tuned: dict[str, Config] = {}


@dataclass(frozen=True)
class Config:
    """A tile of block_n columns, block_k deep; row tiles that share weights in L2; programs on each multiprocessor.

    block_m is the weight gradients' alone: row tiles are cut once for all other products (`row_tile`).
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    each: int = 1
    block_m: int = 128

    def blocks(self, block_m: int) -> dict[str, int]:
        """The kernels' arguments of these names."""
        return dict(BLOCK_M=block_m, BLOCK_N=self.block_n, BLOCK_K=self.block_k, GROUP_M=self.group_m)


def row_tile(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile: what an expert has on average, within 16 and 128 (64 for float32, whose tiles are twice as large)."""
    most = 64 if dtype == torch.float32 else 128
    return max(16, min(most, power_of_two(num_rows // max(num_experts, 1))))


def table(name: str, dtype: torch.dtype, outer: int, block_m: int) -> Config:
    """The configuration of a product with `outer` columns (rows x columns for a weight gradient), for row tiles of block_m."""
    if dtype == torch.float32:  # on the ordinary units, unless tf32 is allowed: small tiles, or the sums leave the registers
        return Config(block_n=64, block_k=32, warps=4, stages=3, each=2, block_m=64)
    return Config(block_n=64, block_k=64, warps=4, stages=3, each=2, block_m=64)


def choose(name: str, like: Tensor, sizes: tuple[int, int, int, int], block_m: int, run: Callable[[Config], None]) -> None:
    """Runs a product with the configuration for its sizes (experts, inner, outer, rows): the table's, or the tuned one."""
    experts, inner, outer, rows = sizes
    config = table(name, like.dtype, outer, block_m)
    if os.environ.get("DYN_AUTOTUNE") == "1" and like.is_cuda and not torch.cuda.is_current_stream_capturing():
        device = torch.cuda.get_device_name(like.device)
        key = f"{device} {name} {like.dtype} E{experts} {inner}x{outer} tile {block_m} rows {power_of_two(rows)}"
        config = _tune(key, config, run)
    run(config)


def _tune(key: str, start: Config, run: Callable[[Config], None]) -> Config:
    if not _tuned:
        _tuned.update(_read())
    if key not in _tuned:
        times = {config: _time(functools.partial(run, config)) for config in candidates(start)}
        _tuned[key] = min(times, key=times.__getitem__)
        _log.info("tuned %s: %s in %.3f ms, the table's choice takes %.3f", key, _tuned[key], times[_tuned[key]], times[start])
        _write()
    return _tuned[key]


def candidates(start: Config) -> list[Config]:
    """The table's choice and its neighbours."""
    found = [start]
    for block_n in (start.block_n // 2, start.block_n, start.block_n * 2):
        for warps in (4, 8):
            for stages in (3, 4):
                for each in (1, 2):
                    found.append(replace(start, block_n=block_n, warps=warps, stages=stages, each=each))
    found += [replace(start, block_k=start.block_k // 2), replace(start, group_m=4), replace(start, group_m=16)]
    return list(dict.fromkeys(c for c in found if c.block_n >= 16))


def _time(run: Callable[[], None]) -> float:
    """Milliseconds, or infinity for tiles that the device has no room for."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(run, warmup=5, rep=20)
    except OutOfResources:
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
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({key: asdict(config) for key, config in sorted(_tuned.items())}, indent=1), encoding="utf-8")
    temporary.replace(path)
