"""A whole run of llama_moe_cpt with the dense parent as its teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from dyn import report

ROOT = Path(__file__).resolve().parents[2]


def test_distilled_run(tmp_path):
    command = [sys.executable, "-m", "dyn.run", "llama_moe_cpt", "profile=smoke", f"runs={tmp_path}", "distill.weight=0.5", "distill.top_k=16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [path] = (tmp_path / "llama_moe_cpt").glob("*/result.json")
    assert report.read(path)["status"] == "ok"
    assert "teacher: top 16 of 64 blocks" in done.stdout
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    kl = {stage: [r["train/distill_loss"] for r in rows if r["stage"] == stage and "train/distill_loss" in r] for stage in ("moe", "control")}
    assert len(kl["moe"]) == 8 and all(value >= 0 for value in kl["moe"]) and kl["control"] == []
    [index] = path.parent.glob("teacher/*/index.json")
    assert sum(s["blocks"] for s in json.loads(index.read_text())["shards"]) == 64
