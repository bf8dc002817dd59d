"""A training that is killed and resumed is, bit by bit, the one that was left alone: metrics (times apart) and final weights."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch

SCRIPT = "tiny_training.py"
STEPS = 14


@pytest.fixture(scope="module")
def whole(server) -> Path:
    """The uninterrupted run."""
    return server.run("whole")


def test_the_run_is_what_it_should_be(server, whole):
    losses = [row["train/loss"] for row in server.rows(whole) if "train/loss" in row]
    assert len(losses) == len(set(losses)) == STEPS
    weights = [row["weights/a"] for row in server.rows(whole) if "weights/a" in row]
    assert len(weights) == len(set(weights)) == 3
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-00000012.ckpt", "step-00000014.ckpt"]


def test_sigkill_at_three_random_steps(server, whole):
    seed = 20
    steps = sorted(random.Random(seed).sample(range(1, STEPS - 5), 3))
    print(f"seed {seed}: killed at steps {steps}")
    started = {f"killed-{step}": step for step in steps}
    for name, step in started.items():
        pid = server.start(name, HOLD=step)
        server.until(name, step)
        folder = server.kill(pid, name)
        assert not (folder / "final.txt").exists()
    for name, pid in {name: server.start(name) for name in started}.items():
        server.same(server.end(pid, name), whole, "expert_load.json")


@pytest.mark.parametrize("settings", [dict(precision="bf16-mixed", gradient_checkpointing="true"), dict(balance="bias", accumulate=1, val_every=3)],
                         ids=["bf16-checkpointing", "selection-bias"])
def test_sigkill_with_other_settings(server, settings, request):
    name = request.node.callspec.id
    left_alone = server.start(f"{name}-whole", **settings)
    pid = server.start(name, HOLD=7, **settings)
    server.until(name, 7)
    server.kill(pid, name)
    server.same(server.run(name, **settings), server.end(left_alone, f"{name}-whole"), "expert_load.json")


@pytest.mark.parametrize("step", [0, 5, STEPS])
def test_sigkill_within_a_validation(server, whole, step):
    """The checkpoint of that step is there already, the new domain weights are not."""
    name = f"validation-{step}"
    server.run(name, code=-signal.SIGKILL, signal_in_validation=f"SIGKILL@{step}")
    server.same(server.run(name), whole, "expert_load.json")


def test_sigterm_writes_a_checkpoint_at_once(server, whole):
    pid = server.start("asked", checkpoint_every=0)
    server.until("asked", 4)
    os.kill(pid, signal.SIGTERM)
    folder = server.end(pid, "asked", 130)
    (path,) = (folder / "checkpoints").iterdir()
    step = torch.load(path, weights_only=True)["global_step"]
    assert server.rows(folder)[-1]["step"] == step and 4 <= step < STEPS
    server.same(server.run("asked", checkpoint_every=0), whole, "expert_load.json")


def test_sigterm_within_a_validation(server, whole):
    folder = server.run("asked-in-validation", code=130, checkpoint_every=0, signal_in_validation="SIGTERM@5")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000005.ckpt"]
    assert not any("val/loss" in row for row in server.rows(folder) if row["step"] == 5)
    server.same(server.run("asked-in-validation", checkpoint_every=0), whole, "expert_load.json")


@pytest.mark.parametrize(("strategy", "more"), [("ddp", {}), ("fsdp2", dict(precision="bf16-mixed", gradient_checkpointing="true", balance="bias"))],
                         ids=["ddp", "fsdp2-bf16-bias"])
def test_two_processes(server, strategy, more, request):
    settings, strategy = dict(strategy=strategy, max_steps=8, **more), request.node.callspec.id
    left_alone = server.pair(f"{strategy}-whole", **settings)
    both = server.pair(strategy, **settings)
    server.until(strategy, 4)
    os.kill(both[0], signal.SIGTERM)  # one of the two: they agree on the step
    for pid in both:
        server.end(pid, strategy, 130)
    for pid in server.pair(strategy, **settings):
        server.end(pid, strategy)
    for pid in left_alone:
        whole = server.end(pid, f"{strategy}-whole")
    resumed = next((server.folder / strategy).glob("tiny/*"))
    server.same(resumed, whole, "expert_load.json")
    assert server.rows(whole)[-1]["tokens"] == 8 * 2 * 2 * 2 * 8  # steps, processes, micro-batches, sequences, tokens
    assert torch.load(resumed / "checkpoints" / "step-00000008.ckpt", weights_only=True)["global_step"] == 8


def test_two_processes_train_as_one(server):
    settings = dict(plain="true", max_steps=4, val_every=2)
    alone = server.start("one", batch_size=4, **settings)
    pids = {strategy: server.pair(f"plain-{strategy}", strategy=strategy, **settings) for strategy in ("ddp", "fsdp2")}
    one = server.rows(server.end(alone, "one"))
    for strategy, both in pids.items():
        for pid in both:
            folder = server.end(pid, f"plain-{strategy}")
        assert [set(row) for row in server.rows(folder)] == [set(row) for row in one]
        for row, expected in zip(server.rows(folder), one, strict=True):
            assert row == pytest.approx(expected, rel=1e-4), strategy
