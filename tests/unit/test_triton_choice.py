"""When Triton is picked, what is said where it cannot run, and how tuned tiles are kept."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dyn.ops import triton_config, triton_launch
from dyn.ops.experts import experts
from dyn.ops.route import route
from dyn.ops.triton_config import Config
from dyn.ops.triton_order import order_size, read_order

ROOT = Path(__file__).resolve().parents[2]
ARGS = (torch.ones(3, 4), torch.ones(2, 6, 4), torch.ones(2, 4, 3), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))


@pytest.mark.skipif(triton_launch.interpreted(), reason="the interpreter takes CPU tensors")
def test_on_a_cpu_it_says_what_is_needed():
    for op in (lambda: experts(*ARGS, backend="triton"), lambda: route(torch.zeros(2, 4), 1, backend="triton")):
        with pytest.raises(ValueError, match=r"a CUDA device, or TRITON_INTERPRET=1 set before the first use of triton; got (x|logits) .* on cpu"):
            op()


def test_without_triton():
    """A forced backend says what is missing; auto works."""
    code = (
        "import sys\nsys.modules['triton'] = None\nimport torch\nfrom dyn.ops.experts import experts\nfrom dyn.ops.route import route\n"
        "args = torch.ones(3, 4), torch.ones(2, 6, 4), torch.ones(2, 4, 3), *route(torch.zeros(3, 2), 1)\nexperts(*args)\n"
        "for op in (lambda: experts(*args, backend='triton'), lambda: route(torch.zeros(2, 4), 1, backend='triton')):\n"
        "    try:\n        op()\n    except ValueError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [f"backend='triton' of {op} needs the package triton, which is not installed" in done.stdout for op in ("experts", "route")] == [True, True]


def test_debug_looks_for_negative_ids():
    bad = (*ARGS[:3], ARGS[3] - 2, ARGS[4])
    with pytest.raises(ValueError, match="idx holds -2"):
        experts(*bad, debug=True)
    assert torch.equal(experts(*ARGS, debug=True), experts(*ARGS))


def test_row_tiles():
    assert triton_config.row_tile(0, 8, torch.bfloat16) == 16
    assert triton_config.row_tile(8 * 40, 8, torch.bfloat16) == 64
    assert triton_config.row_tile(16 * 8192, 16, torch.bfloat16) == 128
    assert triton_config.row_tile(16 * 8192, 16, torch.float32) == 64


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """The tuner with a clock of its own: times by block_n, 64 the fastest."""
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_config, "_tuned", {})
    timed = []

    def clock(run):
        run()
        return abs(timed[-1].block_n - 64) + 1 + timed[-1].block_k / 1000

    monkeypatch.setattr(triton_config, "_time", clock)
    return timed


START = Config(64, 32, 32, warps=4, stages=3)


@pytest.fixture
def tune(tuner, monkeypatch):
    """`choose` of a down projection as on a CUDA device: the configuration that runs last."""
    monkeypatch.setenv("DYN_AUTOTUNE", "1")
    monkeypatch.setattr(triton_config, "table", lambda *a: START)
    monkeypatch.setattr(triton_config, "shared_memory", lambda device: 100 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: tune.capturing)

    def tune(name="down"):
        like = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, device="cuda", element_size=lambda: 2)
        triton_config.choose(name, like, (4, 32, 32, 100), 64, False, tuner.append)
        return tuner[-1]

    tune.capturing = False
    return tune


def test_tuning_times_the_neighbours_once_and_remembers(tune, tuner, tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="dyn.ops.triton_config"):
        best = tune()
    assert best.block_n == 64 and len(tuner) - 1 == len(triton_config.candidates(START, 64)) == len(set(tuner)) and START in tuner
    assert len(caplog.records) == 1 and "tuned a GPU down torch.bfloat16" in caplog.text
    monkeypatch.setattr(triton_config, "_tuned", {})
    tuner.clear()
    assert tune() == best and tuner == [best]  # from the file: nothing is timed
    (path,) = (tmp_path / "cache").iterdir()
    assert len(json.loads(path.read_text())) == 1


def test_capture_uses_what_is_tuned_and_times_nothing(tune, tuner):
    tune.capturing = True
    assert tune() == START and tuner == [START]
    tune.capturing = False
    best = tune()
    tune.capturing = True
    tuner.clear()
    assert tune() == best != START and tuner == [best]


def test_tiles_without_room_are_not_timed(tune, tuner, monkeypatch):
    monkeypatch.setattr(triton_config, "shared_memory", lambda device: 20 << 10)
    tune()
    assert START in tuner and all(c.stages * (c.block_m + c.block_n) * c.block_k * 2 <= 20 << 10 for c in tuner)
    assert len(set(tuner)) < len(triton_config.candidates(START, 64))


def test_tiles_that_do_not_compile_are_left_out(tuner, monkeypatch, tmp_path):
    testing = pytest.importorskip("triton.testing")
    monkeypatch.undo()
    monkeypatch.setenv("DYN_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_config, "_tuned", {})
    monkeypatch.setattr(testing, "do_bench", lambda run, **_: run())

    def run(config):
        if config != best:
            raise RuntimeError("PassManager::run failed")
        return 1.0

    best = Config(64, 64, 32, warps=4, stages=3)
    assert triton_config._tune("key", [START, best], run) == best
    best = None
    assert triton_config._tune("other", [START], run) == START and list(json.loads((tmp_path / "triton_tiles.json").read_text())) == ["key"]


def test_what_others_have_tuned_meanwhile_stays_in_the_file(tuner, tmp_path, monkeypatch):
    for key in ("mine", "theirs"):  # two processes: neither has the other's
        monkeypatch.setattr(triton_config, "_tuned", {})
        triton_config._tune(key, [START], tuner.append)
    assert list(json.loads((tmp_path / "cache" / "triton_tiles.json").read_text())) == ["mine", "theirs"]


def test_a_broken_file_of_tuned_tiles_is_written_anew(tuner, tmp_path, caplog):
    path = tmp_path / "cache" / "triton_tiles.json"
    path.parent.mkdir()
    path.write_text('{"key": {"block": 3}}')
    triton_config._tune("key", [START], tuner.append)
    assert "is not a file of tuned tiles" in caplog.text and "block_n" in path.read_text()


@pytest.mark.parametrize("tile", [0, 64, 256])
def test_candidates_cut_the_tile(tile):
    found = triton_config.candidates(START, tile)
    assert START in found and all(min(c.block_m, c.block_n) >= 16 and tile % c.block_m == 0 for c in found)


@pytest.mark.parametrize("num_slots, E", [(0, 3), (1, 1), (7, 5), (66, 6), (1000, 128)])
def test_parts_of_the_order_start_at_multiples_of_16_bytes(num_slots, E):
    buffer = torch.empty(order_size(num_slots, E), dtype=torch.int32)
    order = read_order(buffer, num_slots, E)
    parts = (order.place_S, *order.tensors)
    assert all(part.storage_offset() % 4 == 0 for part in parts) and len(order.slot_S) == len(order.place_S) == num_slots and len(order.start_E) == E + 1
    assert len(buffer) < sum(len(part) for part in parts) + 4 * len(parts)
