"""Masked training, killed and resumed, on one process and on two: the masks are the same everywhere, pruned weights exactly zero, both forms alike."""

import json
from pathlib import Path

import pytest

SCRIPT = "tiny_masking.py"
KEPT = 1024 - round(0.6 * 1024)  # 4 blocks of 2 * 16 * 8


def report(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"masks-{rank}.json").read_text())


@pytest.fixture(scope="module")
def whole(server) -> dict[str, Path]:
    """The uninterrupted runs of both forms."""
    pids = {form: server.start(f"{form}-whole", form=form, ema=0.5) for form in ("mask", "flat")}
    return {form: server.end(pid, f"{form}-whole") for form, pid in pids.items()}


def test_pruned_weights_are_zero_and_both_forms_train_alike(server, whole):
    """With dropout, accumulation, weight decay and a weight average; bit by bit, but for the sums over tensors that are only logged."""
    masked, flat = report(whole["mask"]), report(whole["flat"])
    assert masked["dead"] == 0 and masked["kept"] == masked["alive"] == flat["kept"] == KEPT and masked["masks"] == [masked["after"]]
    assert masked == flat
    losses = [[(row["step"], row[key]) for row in server.rows(whole[form]) for key in ("train/loss", "val/loss") if key in row] for form in ("mask", "flat")]
    assert losses[0] == losses[1] and len({loss for _, loss in losses[0]}) > 14


@pytest.mark.parametrize("form", ["mask", "flat"])
def test_sigkill(server, whole, form):
    started = {f"{form}-{step}": (step, server.start(f"{form}-{step}", form=form, ema=0.5, HOLD=step)) for step in (2, 7)}
    for name, (step, pid) in started.items():
        server.until(name, step)
        assert not (server.kill(pid, name) / "final.txt").exists()
    for name, pid in {name: server.start(name, form=form, ema=0.5) for name in started}.items():
        resumed = server.end(pid, name)
        assert server.rows(resumed) == server.rows(whole[form]) and report(resumed) == report(whole[form])
        assert (resumed / "final.txt").read_text() == (whole[form] / "final.txt").read_text()


def test_an_optimiser_that_mixes_elements(server):
    mixed = report(server.run("mixed", mixing="true", max_steps=4))
    assert mixed["dead"] == 0 and mixed["alive"] == KEPT


@pytest.mark.parametrize(("strategy", "form", "settings"), [
    ("ddp", "mask", {}), ("fsdp2", "mask", dict(clip=0.05)), ("fsdp2", "flat", {}), ("fsdp2", "mask", dict(mixing="true")),
    ("fsdp2", "mask", dict(precision="bf16-mixed"))], ids=["ddp", "fsdp2-clipped", "fsdp2-flat", "fsdp2-mixing", "fsdp2-bf16"])
def test_two_processes(server, strategy, form, settings, request):
    """Both find the masks that one process finds, and train as it does, half the batch each."""
    name = request.node.callspec.id
    settings = dict(form=form, dropout=0.0, max_steps=4, val_every=2) | settings
    alone = server.start(f"one-{name}", batch_size=8, **settings)
    pids = server.pair(name, strategy=strategy, batch_size=4, **settings)
    one = server.end(alone, f"one-{name}")
    folder, _ = (server.end(pid, name) for pid in pids)
    first, second = report(folder), report(folder, 1)
    assert first == second and first["masks"] == report(one)["masks"] == [first["after"]]
    assert first["dead"] == 0 and first["kept"] == first["alive"] == KEPT
    if "bf16" not in name:
        assert first["sum"] == pytest.approx(report(one)["sum"], rel=2e-3)
