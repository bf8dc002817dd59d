"""A whole run of llama_moe_cpt, killed and resumed: the same losses, weights and metrics as the uninterrupted run."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

EXPERIMENT = "llama_moe_cpt"
SETTINGS = {"model.gate_noise": "true", "model.attention_dropout": 0.1, "data.dynamic": "a"}


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines if any(k.startswith(("train/", "val/", "weights/")) for k in line)]


def summary(run: Path) -> tuple:
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "ok", result["error"]
    metrics = {k: v for k, v in result["metrics"].items() if not k.startswith(("speed/", "time "))}
    return rows(run), metrics, hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(server):
    return server.run("whole", **SETTINGS)


@pytest.mark.parametrize(("stage", "step"), [("moe", 5), ("control", 6)])
def test_sigkill_and_resume(server, whole, stage, step):
    pid = server.start(stage, HOLD=f"{step}@{stage}", **SETTINGS)
    server.until(stage, step, stage)
    assert not (server.kill(pid, stage) / "result.json").exists()
    assert summary(server.run(stage, **SETTINGS)) == summary(whole)


def test_resume_after_the_last_step(server, whole):
    """Killed between the end of training and the end of its stage: exporting, say."""
    run = shutil.copytree(whole, server.folder / "late" / EXPERIMENT / whole.name)
    before = summary(run)
    state = json.loads((run / "stages.json").read_text())
    for name in ("moe", "control"):
        del state["stages"][name]
    (run / "stages.json").write_text(json.dumps(state))
    (run / "result.json").unlink()
    assert summary(server.run("late", **SETTINGS))[1:] == before[1:]
