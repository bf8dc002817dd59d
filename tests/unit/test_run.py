"""run.py and runfolder.py in this process: folders, results, refusals, resume, dry run."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dyn import run, runfolder
from dyn.env import follow
from dyn.run import Run, main


def folders(name="fake"):
    return sorted(path.parent for path in (Path("runs") / name).glob("*/stages.json"))


def result(folder):
    return json.loads((folder / "result.json").read_text())


def error_of(capsys, *words) -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert main(list(words)) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and "Traceback" not in text
    return text


def test_good_run(fake, capsys):
    assert main(["fake", "optim.lr=0.5"]) == 0
    [folder] = folders()
    made = result(folder)
    assert re.fullmatch(r"\d{8}-\d{6}-" + made["what"]["digest"], folder.name)
    assert made["schema"] == 1 and made["status"] == "ok" and made["error"] is None
    assert made["what"] == {"experiment": "fake", "row": "", "profile": "demo", "digest": made["what"]["digest"]}
    assert made["config"]["steps"] == 3 and made["config"]["optim"] == {"lr": 0.5, "kind": "adamw"}
    assert made["metrics"] == {"val/loss": 2.5, "calls": 1, "bad": "nan", "rank": 0}
    assert made["cost"]["total_parameters"] == 1234567 and made["cost"]["wall_seconds"] > 0 and made["cost"]["peak_memory_bytes"] > 1e6
    assert set(made["env"]) == {"python", "versions", "commit", "dirty", "device", "threads", "world_size", "platform"}
    assert str(fake) not in (folder / "result.json").read_text()
    assert "converted, resumed=False" in (folder / "log.txt").read_text()
    assert {"config.yaml", "stages.json", "metrics.jsonl", "report.html", "report.md"} <= {path.name for path in folder.iterdir()}
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out


def test_two_runs_in_one_second_have_two_folders(fake):
    for _ in range(3):
        assert main(["fake", "profile=smoke"]) == 0
    assert len(folders()) == 3 and all(result(folder)["status"] == "ok" for folder in folders())


def test_dry_run_writes_nothing(fake, capsys):
    before = sorted(fake.rglob("*"))
    assert main(["fake", "dry=1"]) == 0
    text = capsys.readouterr().out
    assert "6,742,618,112" in text and "3,492,024,320" in text and "0.5179" in text
    assert main(["fake", "sweep=table", "dry=1"]) == 0
    assert capsys.readouterr().out.count("6,742,618,112") == 3
    assert sorted(fake.rglob("*")) == before


@pytest.mark.parametrize(
    ("mode", "code", "kind", "message", "traceback"),
    [
        ("value", 1, "ValueError", "bad value in here", False),
        ("disk", 1, "OSError", "No space left on device", False),
        ("bug", 1, "KeyError", "surprise", True),
        ("none", 1, "TypeError", "main must return a dict", True),
        ("exit", 1, "SystemExit", "3", True),
    ],
)
def test_failed_runs(fake, capsys, mode, code, kind, message, traceback):
    assert main(["fake", f"mode={mode}"]) == code
    [folder] = folders()
    made, text = result(folder), capsys.readouterr().err
    assert made["status"] == "failed" and made["error"]["type"] == kind and message in made["error"]["message"]
    assert ("Traceback" in text) is traceback and "failed: " in text
    assert "Traceback" in (folder / "log.txt").read_text()
    assert f"python -m dyn.run fake resume={folder}" in text  # a stage is done, so there is something to resume
    (fake / "Makefile").touch()
    assert main(["fake", f"resume={folder}"]) == code
    assert f"make exp NAME=fake PROFILE=demo RESUME={folder}" in capsys.readouterr().err
    assert result(folder)["starts"] == 2 and (folder / "calls.txt").read_text() == "x"


def test_an_experiment_may_cancel_itself(fake, capsys):
    assert main(["fake", "seed=99"]) == 130
    assert result(folders()[0])["status"] == "cancelled" and f"to resume: python -m dyn.run fake resume={folders()[0]}" in capsys.readouterr().err


def test_result_that_cannot_be_written_is_an_error(fake, capsys, monkeypatch):
    write = runfolder.write_json

    def full(path, value, **how):
        if path.name == "result.json":
            raise OSError(28, "No space left on device")
        write(path, value, **how)

    monkeypatch.setattr(runfolder, "write_json", full)
    assert main(["fake"]) == 1
    assert "result.json is not written" in capsys.readouterr().err


def test_a_sweep_on_a_full_disk_ends_with_its_table(fake, capsys, monkeypatch):
    write, create = runfolder.write_json, run.create

    def full(path, value, **how):
        if path.name == "result.json":
            raise OSError(28, "No space left on device")
        write(path, value, **how)

    def at_first(*words, row, **more):
        if row == "third":
            raise OSError(28, "No space left on device")
        return create(*words, row=row, **more)

    monkeypatch.setattr(runfolder, "write_json", full)
    monkeypatch.setattr(run, "create", at_first)
    monkeypatch.setattr(run, "_child", lambda command: (-9, None))
    assert main(["fake", "sweep=table"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["first   failed", "second  failed", "third   not run"]


@pytest.mark.parametrize("place", ["cost", "notes"])
def test_what_is_no_json_in_cost_or_notes_fails_the_run_and_keeps_the_rest(fake, capsys, place):
    path = fake / "experiments" / "fake.py"
    path.write_text(path.read_text().replace("    run.cost[", f"    run.{place}['x'] = object()\n    run.cost[", 1))
    assert main(["fake", "profile=smoke"]) == 1
    made = result(folders()[0])
    assert made["status"] == "failed" and made["error"]["message"].startswith(f"{place}: cannot write a object as JSON")
    assert made["metrics"]["val/loss"] == 2.5 and place in capsys.readouterr().err


def test_broken_report_does_not_spoil_the_run(fake, capsys, monkeypatch):
    monkeypatch.setattr("dyn.report.write_report", lambda *_: 1 / 0)
    assert main(["fake"]) == 0
    assert "no report: ZeroDivisionError" in capsys.readouterr().out


def test_a_reader_that_is_gone_stops_nothing(fake):
    """As in `| head -1`: what nobody reads any more stands in log.txt."""
    broken = "import os, sys; os.close(1); r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
    command = broken + "from dyn.run import main; sys.exit(main(['fake', 'mode=value', 'profile=smoke']))"
    assert subprocess.run([sys.executable, "-c", broken + "print('x', flush=True)"], capture_output=True, check=False).returncode  # so the pipe is broken
    good = subprocess.run([sys.executable, "-c", command.replace("mode=value", "mode=ok")], capture_output=True, text=True, check=False)
    assert good.returncode == 0 and "BrokenPipe" not in good.stderr, good.stderr
    failed = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "BrokenPipe" not in failed.stderr
    assert sorted(result(folder)["status"] for folder in folders()) == ["failed", "ok"]
    assert all("report: " in (folder / "log.txt").read_text() for folder in folders())


def test_refusals(fake, capsys):
    assert "nearest: 'fake'" in error_of(capsys, "fak")
    assert "there are: demo, paper, smoke" in error_of(capsys, "fake", "profile=big")
    assert "nearest: 'optim.lr'" in error_of(capsys, "fake", "optim.lrr=1")
    assert "lr=-1.0 must be positive" in error_of(capsys, "fake", "optim.lr=-1")
    assert "there are: table, waits" in error_of(capsys, "fake", "sweep=tables")
    for only in ("0", "4", "x", "1,9"):
        assert "1 first; 2 second; 3 third" in error_of(capsys, "fake", "sweep=table", f"only={only}")
    assert "sweep=" in error_of(capsys, "fake", "only=2")
    assert "optim.lr" in error_of(capsys, "fake", "sweep=table", "optim.lr=1")
    assert "'steps'" in error_of(capsys, "fake", "steps")
    assert "key=value" in error_of(capsys, "fake", "--profile=demo")
    assert "0 or 1" in error_of(capsys, "fake", "dry=yes")
    assert "no unfinished run" in error_of(capsys, "fake", "resume=last")
    assert "unfinished: none" in error_of(capsys, "fake", "resume=runs/fake/nothing")
    assert not (fake / "runs").exists()


def test_experiment_files_that_lack_something(fake, capsys):
    (fake / "experiments" / "half.py").write_text("from fractions import Fraction as Config\nSWEEPS = {}\n")
    assert "half.py lacks main, plan" in error_of(capsys, "half")
    taken = "import dataclasses\nConfig = dataclasses.make_dataclass('Config', [('profile', str, 'x')])\nSWEEPS = {}\nmain = plan = print\n"
    (fake / "experiments" / "taken.py").write_text(taken)
    assert "options of the command: profile" in error_of(capsys, "taken")


def test_help(fake, capsys):
    assert main([]) == 1 and main(["--help"]) == 0
    assert "resume=" in (text := capsys.readouterr().out) and "fake" in text


def test_one_row_of_a_sweep(fake):
    assert main(["fake", "sweep=table", "only=3", "profile=smoke"]) == 0
    made = result(folders()[0])
    assert made["what"]["row"] == "third" and made["config"]["optim"] == {"lr": 0.3, "kind": "sgd"}


@pytest.mark.parametrize("word", ["lr=0.5", "optim.lr=0.5", "optim={lr: 0.5}"])
def test_a_rows_settings_are_its_own_however_they_are_called(fake, capsys, word):
    assert "optim.lr: set by the sweep's row 'third' and on the command line" in error_of(capsys, "fake", "sweep=table", "only=3", word)


def test_a_command_that_a_queue_may_repeat(fake, capsys):
    for _ in range(2):
        main(["fake", "mode=value", "resume=auto"])
    [begun] = folders()
    assert result(begun)["starts"] == 2
    (begun.with_name("foreign")).mkdir()
    (begun.with_name("foreign") / "stages.json").write_text("{}")
    main(["fake", "mode=value", "seed=1", "resume=auto"])
    assert len(folders()) == 3, "another config is another run"
    assert main(["fake", "resume=auto"]) == main(["fake", "resume=auto"]) == 0 and len(folders()) == 5, "one that has ended is begun anew"
    assert "resume=auto takes one row of 3; choose it by only=" in error_of(capsys, "fake", "sweep=table", "resume=auto")


def test_what_another_start_left_misleads_nobody(fake):
    main(["fake", "mode=value"])
    [folder] = folders()
    (folder / "start").mkdir()
    for marker in (folder / "converted.failed", folder / "start" / "pad.failed"):
        marker.touch()
    main(["fake", "resume=last"])
    assert not list(folder.rglob("*.failed"))


def test_resume_keeps_finished_stages(fake, capsys):
    assert main(["fake", "mode=value", "profile=smoke"]) == 1
    [folder] = folders()
    (fake / "experiments" / "fake.py").write_text((fake / "experiments" / "fake.py").read_text().replace('cfg.mode == "value"', "False"))
    assert main(["fake", "resume=last"]) == 0  # without a profile: the folder's own
    made = result(folder)
    assert made["status"] == "ok" and made["metrics"]["calls"] == 1 and made["starts"] == 2
    assert "converted, resumed=True" in (folder / "log.txt").read_text()
    assert "has finished" in error_of(capsys, "fake", f"resume={folder}")


def test_resume_refuses_another_config(fake, capsys):
    main(["fake", "mode=value", "optim.lr=0.5"])
    [folder] = folders()
    text = error_of(capsys, "fake", "resume=last", "optim.lr=0.25", "seed=3")
    assert "optim.lr: 0.5 -> 0.25" in text and "seed: 0 -> 3" in text and "steps" not in text
    text = error_of(capsys, "fake", f"resume={folder.name}", "profile=smoke", "mode=value")
    assert "steps: 3 -> 1" in text and "optim.kind: adamw -> sgd" in text
    assert main(["fake", "resume=last", "profile=demo", "optim.lr=0.5"]) == 1  # the same config said again: runs, and fails as before
    assert result(folder)["starts"] == 2
    assert "without sweep=" in error_of(capsys, "fake", "resume=last", "sweep=table")


def test_resume_takes_the_newest_unfinished_and_lists_the_others(fake, capsys):
    main(["fake", "mode=value"])
    main(["fake", "mode=bug"])
    main(["fake"])
    by_mode = {result(folder)["config"]["mode"]: folder for folder in folders()}
    text = error_of(capsys, "fake", f"resume={by_mode['ok']}")
    assert str(by_mode["value"]) in text and str(by_mode["bug"]) in text
    newest = max(by_mode["value"], by_mode["bug"])
    assert main(["fake", "resume=last"]) == 1
    assert result(newest)["starts"] == 2


def test_resume_last_passes_over_runs_that_were_refused_at_once(fake, capsys):
    main(["fake", "mode=value"])
    [stopped] = folders()
    source = (fake / "experiments" / "fake.py").read_text()
    (fake / "experiments" / "fake.py").write_text(source.replace("    count = run.stage", "    raise ValueError('no such thing')\n    count = run.stage"))
    main(["fake", "mode=bug"])
    (fake / "experiments" / "fake.py").write_text(source)
    assert main(["fake", "resume=last"]) == 1 and result(stopped)["starts"] == 2


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_result_that_cannot_be_read_has_not_ended_well(fake, capsys, text):
    main(["fake", "mode=value"])
    main(["fake"])
    broken, other = sorted(folders(), key=lambda folder: result(folder)["status"])
    (broken / "result.json").write_text(text)
    assert f"unfinished: {broken}" in error_of(capsys, "fake", "resume=runs/fake/nothing")
    assert "has finished" in error_of(capsys, "fake", f"resume={other}")
    assert main(["fake", "resume=last"]) == 1 and result(broken)["starts"] == 2


def test_resume_refuses_another_experiments_folder_and_a_changed_schema(fake, capsys):
    main(["fake", "mode=value"])
    [folder] = folders()
    source = (fake / "experiments" / "fake.py").read_text()
    (fake / "experiments" / "other.py").write_text(source)
    assert "not a run of other" in error_of(capsys, "other", f"resume={folder}")
    (fake / "experiments" / "fake.py").write_text(source.replace("    seed: int = 0\n", "    seed: int = 0\n    fresh: int = 1\n"))
    assert "fresh: (absent) -> 1" in error_of(capsys, "fake", "resume=last")


def test_resume_elsewhere_warns(fake, capsys):
    main(["fake", "mode=value"])
    [folder] = folders()
    state = json.loads((folder / "stages.json").read_text())
    state["env"]["threads"] = 77
    (folder / "stages.json").write_text(json.dumps(state))
    main(["fake", "resume=last"])
    assert re.search(r"warning: .*bitwise.*threads: 77 -> \d+", capsys.readouterr().out)


def test_a_folder_in_use_is_refused(fake, capsys):
    main(["fake", "mode=value"])
    [folder] = folders()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, folder / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert f"in use by process {os.getpid()}" in error_of(capsys, "fake", "resume=last")
        other.stdin.close()
    assert main(["fake", "resume=last"]) == 1 and result(folder)["starts"] == 2


def test_signal_handlers_are_put_back(fake):
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    kept = [signal.getsignal(signum) for signum in stops]
    main(["fake", "mode=bug"])
    assert [signal.getsignal(signum) for signum in stops] == kept


def test_another_rank_follows_and_writes_nothing(fake, monkeypatch, capsys):
    main(["fake", "mode=value"])
    [folder] = folders()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("DYN_RUN_FOLDER", str(folder))
    assert not Run.join(*follow()).resumed  # as on rank 0, whose start is counted
    assert main(["fake", "mode=value"]) == 1
    assert "bad value" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_plain_and_write_json(tmp_path):
    import torch

    value = runfolder.plain({"a": torch.tensor(1.5), "b": (1, [math.inf, -math.inf]), 3: None, "c": torch.arange(2), "d": True})
    assert value == {"a": 1.5, "b": [1, ["inf", "-inf"]], "3": None, "c": [0, 1], "d": True}
    with pytest.raises(TypeError, match="object"):
        runfolder.plain({"x": object()})
    assert math.isnan(runfolder.plain([torch.tensor(math.nan)], finite=False)[0])
    runfolder.write_json(tmp_path / "x.json", {"a": math.inf}, finite=False)
    assert runfolder.read_json(tmp_path / "x.json") == {"a": math.inf}
    runfolder.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        runfolder.write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1
