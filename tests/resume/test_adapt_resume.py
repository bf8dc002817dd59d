"""A pruned adapter that is killed in training and resumed is, bit by bit, the one that was left alone: mask, weights, moments, answers and summaries."""

import json
from pathlib import Path

import pytest
import torch


def last(folder: Path) -> dict:
    return torch.load(max((folder / "checkpoints").glob("*/*.ckpt")), weights_only=True)


@pytest.mark.parametrize(("experiment", "more", "early", "late"), [
    ("sparse_adapter_squad", {"sparse.rounds": 3, "sparse.by_epoch": "true"}, 2, 6), ("sparse_adapter_xsum", {"sparse.form": "flat"}, 1, 5)])
def test_sigkill(server, experiment, more, early, late):
    server.experiment = experiment
    settings = {"beside": "[]"} | more
    names = {f"{experiment}-{when}": step for when, step in (("whole", None), ("early", early), ("late", late))}
    pids = {name: server.start(name, **settings, **({} if step is None else {"HOLD": step})) for name, step in names.items()}
    for name, step in names.items():
        if step is not None:
            server.until(name, step)
            assert not (server.kill(pids[name], name) / "result.json").exists()
    whole = server.end(pids.pop(f"{experiment}-whole"), f"{experiment}-whole")
    state = last(whole)
    masked = [value for key, value in state["state_dict"].items() if key.endswith((".mask", ".bits"))]
    assert masked and any(value.any() for value in masked)
    for name in pids:
        folder = server.run(name, **settings)
        assert server.rows(folder) == server.rows(whole)
        other = last(folder)
        assert other["state_dict"].keys() == state["state_dict"].keys()
        assert [key for key, value in state["state_dict"].items() if not torch.equal(value, other["state_dict"][key])] == []
        [ours], [theirs] = ((f / "answers").iterdir() for f in (folder, whole))
        assert ours.read_text() == theirs.read_text()
        [ours], [theirs] = ((f / "adapters").glob("*/adapter.safetensors") for f in (folder, whole))
        assert ours.read_bytes() == theirs.read_bytes()
        first, second = (json.loads((f / "result.json").read_text()) for f in (whole, folder))
        assert first["metrics"] == second["metrics"] and first["cost"]["mask"] == second["cost"]["mask"] and second["starts"] == 2
