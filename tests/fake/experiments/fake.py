"""An experiment without a network: it counts steps, and fails or waits where `mode` says so."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dyn.run import Cancelled, Run


@dataclass(kw_only=True, slots=True)
class Optim:
    lr: float = 0.1
    kind: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")


@dataclass(kw_only=True, slots=True)
class Config:
    seed: int = 0
    steps: int = 1000
    mode: Literal["ok", "value", "disk", "bug", "none", "exit", "die", "wait", "deaf", "bare"] = "ok"
    optim: Optim = field(default_factory=Optim)


SWEEPS = {
    "table": [{"row": "first"}, {"row": "second", "mode": "die"}, {"row": "third", "optim.lr": 0.3}],
    "waits": [{"row": "waiting", "mode": "wait"}, {"row": "never"}],
}


def plan(cfg: Config) -> dict:
    return {"parameters": {"total": 6742618112, "active": 3492024320}, "steps": cfg.steps, "share": 0.5179}


def main(cfg: Config, run: Run) -> dict:
    count = run.stage("convert", lambda: {"calls": _count(run.folder / "calls.txt")})
    run.log(f"converted, resumed={run.resumed}")
    run.cost["total_parameters"] = 1234567
    if cfg.mode == "value":
        raise ValueError(f"bad value in {Path.cwd() / 'here'}")
    if cfg.mode == "disk":
        raise OSError(28, "No space left on device")
    if cfg.mode == "bug":
        raise KeyError("surprise")
    if cfg.mode == "none":
        return None
    if cfg.mode == "exit":
        raise SystemExit(3)
    if cfg.mode == "die":
        os.kill(os.getpid(), 9)
    if cfg.mode == "bare":
        _wait(run, lambda: False)
    if cfg.mode in ("wait", "deaf"):
        with run.graceful() as stop:
            _wait(run, lambda: (cfg.mode == "wait" and stop.is_set()) or (run.folder / "go").exists())
            (run.checkpoints / "last.ckpt").write_text("weights")
    with (run.folder / "metrics.jsonl").open("a") as file:
        for step in range(cfg.steps):
            file.write(json.dumps({"step": step, "val/code/loss": 3.0 - step / 10, "val/docs/loss": 4.0 - step / 10, "train/loss": 4.0}) + "\n")
    if cfg.seed == 99:
        raise Cancelled("by itself")
    return {"val/loss": 2.5, "calls": count["calls"], "bad": float("nan"), "rank": int(os.environ.get("RANK", 0))}


def _wait(run: Run, enough) -> None:
    (run.folder / "ready").touch()
    while not enough():
        time.sleep(0.01)


def _count(path: Path) -> int:
    with path.open("a") as file:
        file.write("x")
    return len(path.read_text())
