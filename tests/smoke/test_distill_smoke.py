"""Whole runs of llama_moe_cpt with the dense parent as its teacher."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from dyn import report


def smoke(processes, tmp_path, *words):
    """(result.json's path, its content, what the run said)."""
    said = processes.run(tmp_path, "llama_moe_cpt", "profile=smoke", "distill.weight=0.5", "distill.top_k=16", *words)
    [path] = (tmp_path / "llama_moe_cpt").glob("*/result.json")
    result = report.read(path)
    assert result["status"] == "ok"
    return path, result, said


def test_distilled_run(processes, tmp_path):
    path, _, said = smoke(processes, tmp_path)
    assert "teacher: top 16 of 64 blocks" in said
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    kl = {stage: [r["train/distill_loss"] for r in rows if r["stage"] == stage and "train/distill_loss" in r] for stage in ("moe", "control")}
    assert len(kl["moe"]) == 8 and all(value >= 0 for value in kl["moe"]) and kl["control"] == []
    [index] = path.parent.glob("teacher/*/index.json")
    assert sum(s["blocks"] for s in json.loads(index.read_text())["shards"]) == 64


def test_gates_are_trained_alone_from_a_calibrated_start(processes, tmp_path):
    path, result, _ = smoke(processes, tmp_path, "model.construction=calibrated", "model.gate=linear", "model.calibration_sequences=22", "model.train=gates",
                            "dense_control=false")
    assert result["cost"]["calibration_tokens"] == result["metrics"]["calibration tokens"] == 22 * 32
    assert result["cost"]["conversion_seconds"] == result["metrics"]["calibration seconds"] > 0
    before, after = (load_file(path.parent / folder / "model.safetensors") for folder in ("converted", "export"))
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp.gate." in name}
    assert result["cost"]["trainable_parameters"] == result["cost"]["gate_parameters"] == sum(before[name].numel() for name in changed)
