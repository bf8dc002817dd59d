"""The README: its Python runs, its make targets exist, its overrides and sweeps are ones that the experiment has."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    make ")]


def test_the_readme_is_short_and_has_commands():
    assert len(README.splitlines()) < 200
    assert {"make exp NAME=llama_moe_cpt", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_make_targets(command):
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout or "ruff" in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if "exp NAME" in c and "RESUME" not in c])
def test_experiments_accept_the_words(processes, tmp_path, command):
    """The same line as a dry run, with the smoke profile in place of the demo."""
    words = dict(word.split("=", 1) for word in shlex.split(command)[2:])
    line = [words["NAME"], f"profile={words.get('PROFILE', 'smoke')}", "dry=1"]
    line += [f"sweep={words['SWEEP']}"] if "SWEEP" in words else []
    line += [f"only={words['ONLY']}"] if "ONLY" in words else []
    said = processes.run(tmp_path, *line, *words.get("SET", "").split())
    assert "parameters" in said and "memory, GiB" in said


def test_a_process_of_its_own_imports_what_it_needs():
    line = [sys.executable, "-m", "dyn.run", "padnet_bert_glue", "profile=smoke", "dry=1"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr


def test_the_python_blocks_run_one_after_the_other(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-mixtral" / "model.safetensors").is_file()
