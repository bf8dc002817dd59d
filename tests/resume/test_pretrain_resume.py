"""A whole run of llama_moe_cpt, killed and resumed: the same losses, weights and metrics as the uninterrupted run."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = ["llama_moe_cpt", "profile=smoke", "model.gate_noise=true", "model.attention_dropout=0.1", "data.dynamic=a"]


def start(runs: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dyn.run", *WORDS, f"runs={runs}", *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def folder(runs: Path) -> Path:
    (found,) = (runs / "llama_moe_cpt").iterdir()
    return found


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines if any(k.startswith(("train/", "val/", "weights/")) for k in line)]


def summary(run: Path) -> tuple:
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "ok", result["error"]
    metrics = {k: v for k, v in result["metrics"].items() if not k.startswith(("speed/", "time "))}
    return rows(run), metrics, hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    done = start(runs)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output[-3000:]
    return folder(runs)


@pytest.mark.parametrize(("stage", "step"), [("moe", 5), ("control", 6)])
def test_sigkill_and_resume(whole, tmp_path, stage, step):
    process = start(tmp_path)
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        found = list(tmp_path.glob("llama_moe_cpt/*/metrics.jsonl"))
        if found and any(f'"step": {step}, "stage": "{stage}"' in line for line in found[0].read_text().splitlines()):
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    run = folder(tmp_path)
    assert not (run / "result.json").exists(), "killed too late to test anything"
    resumed = start(tmp_path, f"resume={run}")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output[-3000:]
    assert summary(run) == summary(whole)


def test_resume_after_the_last_step(whole, tmp_path):
    """Killed between the end of training and the end of its stage: exporting, say."""
    import shutil

    run = shutil.copytree(whole, tmp_path / "llama_moe_cpt" / whole.name)
    before = summary(run)
    state = json.loads((run / "stages.json").read_text())
    for name in ("moe", "control"):
        del state["stages"][name]
    (run / "stages.json").write_text(json.dumps(state))
    (run / "result.json").unlink()
    done = start(tmp_path, f"resume={run}")
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output[-3000:]
    assert summary(run)[1:] == before[1:]
