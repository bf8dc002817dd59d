"""All tests are offline, single-threaded, and away from the user's caches."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(prefix="dyn-tests-"), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import pytest
import torch

torch.set_num_threads(1)


def _is_local(address) -> bool:
    return not isinstance(address, tuple) or address[0] in ("localhost", "", "::1") or str(address[0]).startswith("127.")


def _guarded(connect):
    def inner(self, address):
        if not _is_local(address):
            pytest.fail(f"a test reached for the network: {address}")
        return connect(self, address)

    return inner


socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A folder with the experiment `fake`, as the current directory."""
    folder = tmp_path / "fake"
    shutil.copytree(Path(__file__).parent / "fake", folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return folder
