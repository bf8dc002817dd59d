"""A partially dynamic network that is killed in training and resumed is, bit by bit, the one that was left alone.

Modes, scale factors, temperature, batch statistics, weight average, augmentation and order included; before and after the first checkpoint (every 4 steps)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

EXPERIMENT = "padnet_resnet50"


def last(folder: Path) -> dict:
    return torch.load(max((folder / "checkpoints" / "pad").iterdir()), weights_only=True)


def test_sigkill(server):
    settings = {"beside": "[]", "timing_rounds": 1}
    steps = {"early": 2, "late": 6}
    pids = {"whole": server.start("whole", **settings)} | {name: server.start(name, HOLD=step, **settings) for name, step in steps.items()}
    for name, step in steps.items():
        server.until(name, step)
        folder = server.kill(pids[name], name)
        assert not (folder / "result.json").exists() and any((folder / "checkpoints" / "pad").glob("*.ckpt")) is (name == "late")
    whole = server.end(pids["whole"], "whole")
    resumed = {name: server.start(name, **settings) for name in ("early", "late")}
    state, exported = last(whole), load_file(whole / "export" / "model.safetensors")
    masks = [value for key, value in state["state_dict"].items() if key.endswith("partial.mask")]
    assert 0 < sum(int(mask.sum()) for mask in masks) < sum(mask.numel() for mask in masks)
    temperatures = {row["train/temperature"] for row in server.rows(whole) if "train/temperature" in row}
    assert len(temperatures) > 3 and any(value.any() for key, value in state["state_dict"].items() if key.endswith("partial.phi"))
    for name, pid in resumed.items():
        folder = server.end(pid, name)
        assert server.rows(folder) == server.rows(whole)
        other = last(folder)
        assert other["state_dict"].keys() == state["state_dict"].keys()
        assert [key for key, value in state["state_dict"].items() if not torch.equal(value, other["state_dict"][key])] == []
        assert all(torch.equal(value, exported[key]) for key, value in load_file(folder / "export" / "model.safetensors").items())
        first, second = (json.loads((f / "result.json").read_text()) for f in (whole, folder))
        assert first["metrics"]["accuracy"] == second["metrics"]["accuracy"] and second["starts"] == 2
