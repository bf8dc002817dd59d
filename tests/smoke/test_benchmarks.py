"""The whole path of the benchmarks on tiny shapes, in a process of its own with Triton's interpreter, as without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from dyn.ops import experts, route

ROOT = Path(__file__).parents[2]


def test_every_part_runs_and_reports(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "benchmarks", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {}
    for part in ("ops", "routing", "steps", "adapters"):
        results[part] = json.loads((tmp_path / f"{part}.json").read_text())
        assert (tmp_path / f"{part}.md").read_text().startswith("# ") and (tmp_path / f"{part}.png").stat().st_size
        assert results[part]["tables"] and results[part]["env"]["kind"] == "cpu"
    for table in results["ops"]["tables"]:
        assert {f"dyn {name}" for name in experts._BACKENDS} <= table["rows"].keys()
        assert {"loop over experts", "LLaMA-MoE's own", "transformers eager", "dense N"} <= table["rows"].keys()
        assert {"Liger-Kernel", "moe-ops", "ScatterMoE", "SonicMoE"} <= table["missing"].keys()
    assert {f"dyn {name}" for name in route._BACKENDS} <= results["routing"]["tables"][0]["rows"].keys()
    assert [table["name"].split(",")[0] for table in results["steps"]["tables"]] == [
        "training", "prefill", "decode", "prefill", "decode", "training by a loop"]
    trained = {name: row["trained"] for name, row in results["adapters"]["tables"][1]["rows"].items()}
    assert trained["masked, r=64, keep 0.2"] == trained["flat, r=64, keep 0.2"] < trained["2:4 mask, r=64"] < trained["dense, r=64"]
    assert trained["units, 13 of r=64"] == trained["dense, r=13"]
    assert "nothing to compare with" in (tmp_path / "compare.md").read_text()
