"""A training that is killed and resumed is, bit by bit, the one that was left alone: metrics (times apart) and final weights."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

STEPS = 14


class Server:
    """Trainings in processes of their own; see tiny_training.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script, root = Path(__file__).with_name("tiny_training.py"), Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)

    def ask(self, *words: object) -> int:
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, name: str, **settings: object) -> int:
        return self.ask("start", self.folder / name, self.folder / f"{name}.out", *(f"{k}={v}" for k, v in settings.items()))

    def run(self, name: str, *, code: int = 0, **settings: object) -> Path:
        """Train or resume to the end of the process, which must be `code`; the run's folder."""
        return self.end(self.start(name, **settings), name, code)

    def end(self, pid: int, name: str, code: int = 0) -> Path:
        ended = self.ask("wait", pid)
        assert ended == code, (ended, (self.folder / f"{name}.out").read_text())
        return next((self.folder / name).glob("tiny/*"))

    def until(self, name: str, step: int) -> None:
        """Wait until a step is in the metrics."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if any(f'"step": {step},' in path.read_text() for path in (self.folder / name).glob("tiny/*/metrics.jsonl")):
                return
            time.sleep(0.002)
        pytest.fail(f"step {step} did not come: {(self.folder / f'{name}.out').read_text()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("runs"))
    yield server
    server.process.stdin.close()
    server.process.wait(60)


@pytest.fixture(scope="module")
def whole(server) -> Path:
    """The uninterrupted run."""
    return server.run("whole")


def rows(folder: Path) -> list[dict]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in read if not any(key.startswith("speed/") for key in row)]


def same(resumed: Path, whole: Path) -> None:
    assert rows(resumed) == rows(whole)
    assert (resumed / "final.txt").read_text() == (whole / "final.txt").read_text()
    assert (resumed / "expert_load.json").read_text() == (whole / "expert_load.json").read_text()


def test_the_run_is_what_it_should_be(whole):
    losses = [row["train/loss"] for row in rows(whole) if "train/loss" in row]
    assert len(losses) == len(set(losses)) == STEPS
    weights = [row["weights/a"] for row in rows(whole) if "weights/a" in row]
    assert len(weights) == len(set(weights)) == 3
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-00000012.ckpt", "step-00000014.ckpt"]


def test_sigkill_at_three_random_steps(server, whole):
    seed = 20
    steps = sorted(random.Random(seed).sample(range(1, STEPS), 3))
    print(f"seed {seed}: killed at steps {steps}")
    names = {step: f"killed-{step}" for step in steps}
    started = {step: server.start(name) for step, name in names.items()}
    for step, pid in started.items():
        server.until(names[step], step)
        os.kill(pid, signal.SIGKILL)
        folder = server.end(pid, names[step], -signal.SIGKILL)
        assert not (folder / "final.txt").exists()
    for step, pid in {step: server.start(name) for step, name in names.items()}.items():
        same(server.end(pid, names[step]), whole)


@pytest.mark.parametrize("settings", [
    dict(precision="bf16-mixed", gradient_checkpointing="true", val_every=0),
    dict(balance="bias", accumulate=1, val_every=3),
], ids=["bf16, gradient checkpointing, no validation", "selection bias, validation at every checkpoint"])
def test_sigkill_with_other_settings(server, settings):
    pid, name = server.start("other-whole", **settings), "other-killed"
    if settings.get("balance"):
        name = "bias-killed"
    whole = server.end(pid, "other-whole") if name == "other-killed" else server.run("bias-whole", **settings)
    pid = server.start(name, **settings)
    server.until(name, 7)
    os.kill(pid, signal.SIGKILL)
    server.end(pid, name, -signal.SIGKILL)
    same_without_load(server.run(name, **settings), whole)


def same_without_load(resumed: Path, whole: Path) -> None:
    assert rows(resumed) == rows(whole)
    assert (resumed / "final.txt").read_text() == (whole / "final.txt").read_text()
