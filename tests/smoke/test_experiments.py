"""Every experiment runs its smoke profile to a valid result, and every config and sweep row loads; a new file in experiments/ tests itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from dyn import config, report

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py"))
YAMLS = sorted((ROOT / "configs").glob("*.yaml"))


def experiment(name: str):
    spec = importlib.util.spec_from_file_location(f"experiments.{name}", ROOT / "experiments" / f"{name}.py")
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "SWEEPS"):
        spec.loader.exec_module(module)
    return module


def test_there_are_experiments():
    assert NAMES


def test_every_config_belongs_to_an_experiment():
    assert {path.name.split(".")[0] for path in YAMLS} <= set(NAMES)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_config_loads(path):
    name, profile, _ = path.name.split(".")
    config.load(experiment(name).Config, name, profile, root=ROOT)


@pytest.mark.parametrize("name", NAMES)
def test_profiles_and_sweep_rows_load(name):
    module = experiment(name)
    assert {"smoke", "demo", "small", "paper"} <= set(config.profiles(name, root=ROOT))
    config.load(module.Config, name, root=ROOT)
    for sweep, rows in module.SWEEPS.items():
        assert rows and len({(row["row"], row.get("seed")) for row in rows}) == len(rows), f"{sweep}: two rows have one name"
        for row in {row["row"]: row for row in rows}.values():  # one seed of each
            assert config.digest(config.load(module.Config, name, "small", row={k: v for k, v in row.items() if k != "row"}, root=ROOT))


@pytest.mark.parametrize("name", NAMES)
def test_smoke_run(name, processes, tmp_path):
    said = processes.run(tmp_path, name, "profile=smoke")
    [path] = (tmp_path / name).glob("*/result.json")
    result = report.read(path)
    assert result["status"] == "ok" and result["what"] == {"experiment": name, "row": "", "profile": "smoke", "digest": result["what"]["digest"]}
    assert result["metrics"] and all(isinstance(key, str) for key in result["metrics"])
    assert {"total_parameters", "active_parameters", "wall_seconds", "peak_memory_bytes"} <= result["cost"].keys()
    for line in (path.parent / "metrics.jsonl").read_text().splitlines():
        assert "step" in json.loads(line)
    assert (path.parent / "report.html").stat().st_size > 1000
    assert "report.html" in said
