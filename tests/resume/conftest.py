"""Trainings in processes of their own, for the modules here: one names its script in SCRIPT, or in EXPERIMENT what it runs by the smoke profile."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest


class Server:
    """Starts, kills and compares the runs of a module."""

    def __init__(self, processes, folder: Path, script: str | None, experiment: str | None) -> None:
        self.processes, self.folder, self.experiment = processes, folder, experiment or "tiny"
        self.script = Path(__file__).with_name(script) if script else processes.SCRIPT

    def start(self, name: str, **settings: object) -> int:
        words = [] if self.script != self.processes.SCRIPT else [self.experiment, "profile=smoke"]
        return self.processes.start(self.script, self.folder / name, self.folder / f"{name}.out", *words, *(f"{k}={v}" for k, v in settings.items()))

    def run(self, name: str, *, code: int = 0, **settings: object) -> Path:
        """Train or resume to the end of the process, which must be `code`; the run's folder."""
        return self.end(self.start(name, **settings), name, code)

    def end(self, pid: int, name: str, code: int = 0) -> Path:
        ended = self.processes.wait(pid)
        assert ended == code, (ended, (self.folder / f"{name}.out").read_text())
        return next((self.folder / name).glob(f"{self.experiment}/*"))

    def kill(self, pid: int, name: str) -> Path:
        os.kill(pid, signal.SIGKILL)
        return self.end(pid, name, -signal.SIGKILL)

    def pair(self, name: str, **settings: object) -> list[int]:
        """Two processes, as Lightning's own launcher would start them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, devices=2, **settings)
        first = self.start(name, LOCAL_RANK=0, **both)
        while not (folder := next((self.folder / name).glob(f"{self.experiment}/*/stages.json"), None)):
            time.sleep(0.01)
        return [first, self.start(name, LOCAL_RANK=1, DYN_RUN_FOLDER=folder.parent, **both)]

    @staticmethod
    def rows(folder: Path) -> list[dict]:
        """The metrics without times, which no resumed run repeats."""
        read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [row for row in read if not any(key.startswith("speed/") for key in row)]

    def same(self, resumed: Path, whole: Path, *names: str) -> None:
        """Equal metrics, and equal files."""
        assert self.rows(resumed) == self.rows(whole)
        for name in ("final.txt", *names):
            assert (resumed / name).read_text() == (whole / name).read_text()

    def until(self, name: str, step: int, stage: str = "") -> None:
        """Wait until a step (of a stage) is in the metrics."""
        line = f'"step": {step}, "stage": "{stage}"' if stage else f'"step": {step},'
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if any(line in path.read_text() for path in (self.folder / name).glob(f"{self.experiment}/*/metrics.jsonl")):
                return
            time.sleep(0.002)
        pytest.fail(f"step {step} did not come: {(self.folder / f'{name}.out').read_text()}")


@pytest.fixture(scope="module")
def server(processes, tmp_path_factory, request):
    return Server(processes, tmp_path_factory.mktemp("runs"), getattr(request.module, "SCRIPT", None), getattr(request.module, "EXPERIMENT", None))
