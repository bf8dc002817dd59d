"""Trainings in processes of their own, for the modules here; one names its script in SCRIPT, and in EXPERIMENT what it runs, unless that is "tiny"."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


class Server:
    """See tiny_training.py."""

    def __init__(self, folder: Path, script: str, experiment: str) -> None:
        self.folder, self.experiment = folder, experiment
        script, root = Path(__file__).with_name(script), Path(__file__).parents[2]
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
        return next((self.folder / name).glob(f"{self.experiment}/*"))

    def until(self, name: str, step: int) -> None:
        """Wait until a step is in the metrics."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if any(f'"step": {step},' in path.read_text() for path in (self.folder / name).glob(f"{self.experiment}/*/metrics.jsonl")):
                return
            time.sleep(0.002)
        pytest.fail(f"step {step} did not come: {(self.folder / f'{name}.out').read_text()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory, request):
    server = Server(tmp_path_factory.mktemp("runs"), request.module.SCRIPT, getattr(request.module, "EXPERIMENT", "tiny"))
    yield server
    server.process.stdin.close()
    server.process.wait(60)
