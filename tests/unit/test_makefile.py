"""The Makefile's set-up, with scripts in place of python and uv."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_venv_without_pip_is_made_again(tmp_path):
    for name in ("Makefile", "requirements.lock", "models.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    whole = script(tmp_path / "whole", "exit 0")
    python = script(tmp_path / "python", f"[ \"$2\" = venv ] && mkdir -p .venv/bin && for i in python uv; do cp {whole} .venv/bin/$i; done; exit 0")
    script(tmp_path / ".venv" / "bin" / "python", "exit 1")  # what a kill within `python -m venv` leaves
    for _ in range(2):
        done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (tmp_path / ".venv" / "kept").touch(exist_ok=True)
        (tmp_path / ".venv" / ".ready").unlink()
    assert (tmp_path / ".venv" / "kept").exists() and (tmp_path / ".venv" / "bin" / "python").read_text() == whole.read_text()
