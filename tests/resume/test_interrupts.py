"""Real signals to real processes: Ctrl-C, SIGTERM, SIGKILL, sweeps, two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dyn.run import main


def start(*words, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "dyn.run", "fake", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env
    )


def wait_for(pattern: str, process) -> Path:
    """The first file that matches, as soon as it is there."""
    while not (found := sorted(Path("runs/fake").glob(pattern))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found[0]


def result(folder):
    return json.loads((folder / "result.json").read_text())


NOHUP = pytest.mark.skipif(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="under nohup a run is to go on")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, pytest.param(signal.SIGHUP, marks=NOHUP)])
def test_graceful_stop_writes_a_checkpoint_and_says_how_to_resume(fake, signum):
    (fake / "Makefile").touch()
    process = start("mode=wait", "profile=smoke")
    folder = wait_for("*/ready", process).parent
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    made = result(folder)
    assert made["status"] == "cancelled" and made["error"]["type"] == "Cancelled"
    assert (folder / "checkpoints" / "last.ckpt").read_text() == "weights"
    assert f"to resume: make exp NAME=fake PROFILE=smoke RESUME={folder}" in errors and "Traceback" not in errors
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(("mode", "times"), [("deaf", 2), ("bare", 1)])
def test_stop_at_once_by_a_second_signal_or_outside_graceful(fake, mode, times):
    process = start(f"mode={mode}")
    folder = wait_for("*/ready", process).parent
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "cancelled: SIGTERM" in errors
    assert ("once more stops at once" in errors) is (mode == "deaf")
    assert result(folder)["status"] == "cancelled" and not (folder / "checkpoints").exists()


def test_killed_run_is_in_use_until_it_dies_and_then_resumes(fake, capsys):
    process = start("mode=wait")
    folder = wait_for("*/ready", process).parent
    assert main(["fake", "resume=last"]) == 1
    assert f"in use by process {process.pid}" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "result.json").exists()
    (folder / "go").touch()
    assert main(["fake", "resume=last"]) == 0
    made = result(folder)
    assert made["starts"] == 2 and made["metrics"]["calls"] == 1
    assert "resumed=True" in (folder / "log.txt").read_text()


def test_sweep_goes_on_after_a_row_that_dies(fake):
    process = start("sweep=table", "profile=smoke")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    made = [result(path.parent) for path in sorted(Path("runs/fake").glob("*/stages.json"))]
    assert {r["what"]["row"]: r["status"] for r in made} == {"first": "ok", "second": "failed", "third": "ok"}
    [dead] = [r for r in made if r["status"] == "failed"]
    assert "ended with code -9" in dead["error"]["message"]
    table = out[out.index("row     status") :].splitlines()
    assert [line.split()[:2] for line in table[1:4]] == [["first", "ok"], ["second", "failed"], ["third", "ok"]]
    assert len(list(Path("runs/fake").glob("*-table/report.html"))) == 1


def test_signal_to_a_sweep_stops_its_row_gracefully_and_starts_no_other(fake):
    process = start("sweep=waits")
    folder = wait_for("*/ready", process).parent
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert result(folder)["status"] == "cancelled" and (folder / "checkpoints" / "last.ckpt").exists()
    assert "never" in out and "not run" in out and len(list(Path("runs/fake").glob("*/stages.json"))) == 1


def in_rows(code: str) -> None:
    """Let the processes of a sweep's rows run `code` when they import the experiment."""
    path = Path("experiments/fake.py")
    inner = "".join(f"    {line}\n" for line in code.splitlines())
    path.write_text(f"{path.read_text()}\nimport sys\nif any(word.startswith('resume=') for word in sys.argv):\n{inner}")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=NOHUP)])
def test_signal_while_a_row_imports_cancels_it_and_starts_no_other(fake, signum):
    in_rows("Path('runs/fake/importing').touch()\ntime.sleep(60)")
    process = start("sweep=table")
    wait_for("importing", process)
    process.send_signal(signum)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum and f"cancelled: {signum.name}" in errors
    [stages] = Path("runs/fake").glob("*/stages.json")
    assert result(stages.parent)["status"] == "cancelled" and out.count("not run") == 2


def test_signal_while_a_row_writes_its_result_keeps_it_and_starts_no_other(fake):
    in_rows("""import dyn.report
def write_report(*_):
    Path('runs/fake/writing').touch()
    while not Path('go').exists():
        time.sleep(0.01)
dyn.report.write_report = write_report""")
    process = start("sweep=table", "profile=smoke")
    wait_for("writing", process)
    process.send_signal(signal.SIGINT)
    Path("go").touch()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and out.count("not run") == 2
    [stages] = Path("runs/fake").glob("*/stages.json")
    assert result(stages.parent)["status"] == "ok"


def test_torchrun_makes_one_folder(fake):
    (fake / "torch.py").unlink()  # the real one starts the processes
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dyn.run", "fake", "profile=smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [stages] = Path("runs/fake").glob("*/stages.json")
    made = result(stages.parent)
    assert made["env"]["world_size"] == 2 and made["metrics"]["rank"] == 0
    assert (stages.parent / "log.txt").read_text().count("converted") == done.stdout.count("converted") == 1
    assert len((stages.parent / "calls.txt").read_text()) == 2  # every rank did the stage itself


def test_srun_makes_one_folder(fake):
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    ranks = [start("profile=smoke", SLURM_PROCID=str(rank), **job) for rank in (1, 0)]
    texts = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    [stages] = Path("runs/fake").glob("*/stages.json")
    assert result(stages.parent)["env"]["world_size"] == 2 and "converted" in texts[1][0] and texts[0][0] == ""
