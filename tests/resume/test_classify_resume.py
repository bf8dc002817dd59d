"""A classification that is killed and resumed is, bit by bit, the one that was left alone.

Order, augmentation, mixing, dropout, weight average, masks and temperature included; of partially dynamic experts modes, scale factors and the gates' noise."""

from pathlib import Path

import pytest

SCRIPT = "tiny_classify.py"


@pytest.fixture(scope="module")
def whole(server) -> dict[str, Path]:
    """The uninterrupted runs."""
    pids = {kind: server.start(f"{kind}-whole", kind=kind) for kind in ("images", "sentences", "moe")}
    return {kind: server.end(pid, f"{kind}-whole") for kind, pid in pids.items()}


def test_the_runs_are_what_they_should_be(server, whole):
    losses = [row["train/loss"] for row in server.rows(whole["images"]) if "train/loss" in row]
    assert len(losses) == len(set(losses)) == 14
    assert [row["train/temperature"] for row in server.rows(whole["images"]) if "train/temperature" in row][:3] == [30.0, 27.0, 24.0]
    assert all("val/pearson" in row for row in server.rows(whole["sentences"]) if "val/loss" in row)
    assert all(row["train/aux_loss"] > 0 for row in server.rows(whole["moe"]) if "train/loss" in row)


@pytest.mark.parametrize("kind", ["images", "sentences", "moe"])
def test_sigkill(server, whole, kind):
    """At steps before and after the first checkpoint (every 3), within an epoch of the data (6 or 7 batches, two a step)."""
    started = {f"{kind}-{step}": (step, server.start(f"{kind}-{step}", kind=kind, HOLD=step)) for step in (2, 5, 10)}
    for name, (step, pid) in started.items():
        server.until(name, step)
        folder = server.kill(pid, name)
        assert not (folder / "final.txt").exists()
    for name, pid in {name: server.start(name, kind=kind) for name in started}.items():
        server.same(server.end(pid, name), whole[kind])


def test_sigkill_with_workers(server, whole):
    """Workers prepare batches ahead, and change nothing: the same run as without."""
    pid = server.start("workers", workers=1, HOLD=7)
    server.until("workers", 7)
    server.kill(pid, "workers")
    server.same(server.run("workers", workers=1), whole["images"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(server, strategy):
    """Sentences, without chance: half the batch each; the validation's ten examples in four batches are each counted once."""
    settings = dict(kind="sentences", plain="true", max_steps=4, val_every=2)
    alone = server.start(f"one-{strategy}", batch_size=8, **settings)
    pids = server.pair(strategy, strategy=strategy, batch_size=4, **settings)
    one, (two, _) = server.rows(server.end(alone, f"one-{strategy}")), [server.rows(server.end(pid, strategy)) for pid in pids]
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for row, expected in zip(two, one, strict=True):
        assert row == pytest.approx(expected, rel=2e-3), row["step"]


def test_experts_train_alike_under_ddp_and_fsdp2(server):
    """Sharded blocks hand up their gates' statistics, and the balance loss has its gradient: the same training as with whole copies."""
    settings = dict(kind="moe", plain="true", max_steps=4, val_every=2, batch_size=4)
    found = {}
    for strategy in ("ddp", "fsdp2"):
        pids = server.pair(f"moe-{strategy}", strategy=strategy, **settings)
        found[strategy], _ = [server.rows(server.end(pid, f"moe-{strategy}")) for pid in pids]
    assert [row["step"] for row in found["fsdp2"]] == [row["step"] for row in found["ddp"]]
    for row, expected in zip(found["fsdp2"], found["ddp"], strict=True):
        assert row == pytest.approx(expected, rel=2e-3), row["step"]
