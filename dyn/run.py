"""Run an experiment: python -m dyn.run NAME [profile=demo] [sweep=table] [only=2] [resume=folder|last|auto] [dry=1] [runs=runs] [key=value ...]

Loads experiments/NAME.py by name: `Config` (a dataclass), `SWEEPS` (rows of each table), `main(cfg, run) -> metrics`, `plan(cfg) -> dict`.
resume=last goes on with the newest unfinished run; auto with the newest of this very config, or begins it: a command that a queue may repeat.
A run is a folder RUNS/NAME/DATE-DIGEST: config.yaml, stages.json, log.txt, metrics.jsonl, checkpoints/, result.json (also when it fails), report.html.
Exit codes: 0 ok, 1 failed or refused, 130 cancelled by SIGINT, 143 by SIGTERM, 129 by SIGHUP, 138 by SIGUSR1. Under torchrun or srun only rank 0 writes and
prints.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dyn import config, report
from dyn.env import follow, keep_freed_memory, rank, world_size
from dyn.runfolder import Cancelled, Interrupted, Run, create, ended_well, read_json, refused, stop_signals, unfinished

__all__ = ["Cancelled", "Run", "main"]

OPTIONS = ("profile", "sweep", "only", "resume", "dry", "runs")


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says and return the exit code. Refusals are one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not sys.stderr.isatty():  # libraries' bars are for terminals; our own progress comes as plain lines elsewhere
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(f"{__doc__}\nExperiments: {', '.join(sorted(_experiments())) or 'none here'}")
            return 0 if words else 1
        return _run(words[0], words[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before a run began or after it ended
        return 130


def _run(name: str, words: list[str]) -> int:
    options, words = _split(words)
    path = _find(name)
    experiment = _import(name, path)
    rows = _rows(experiment.SWEEPS, options)
    if len(rows) > 1 and world_size() > 1:
        raise ValueError("several processes run one row of a sweep at a time: choose it by only=")
    if rank() > 0:
        return 0 if "dry" in options else _execute(experiment, Run.join(*follow()))
    runs, profile = Path(options.get("runs", "runs")), options.get("profile", "demo")
    if options.get("resume", "auto") != "auto":
        if "sweep" in options:
            raise ValueError("resume= takes one run; a row of a sweep is resumed by its own folder, without sweep=")
        folder = _resume(experiment, name, path, runs, options, words)
        if "dry" in options:
            return _dry(experiment, name, [("", config.read(experiment.Config, folder / "config.yaml"))])
        return _execute(experiment, Run.open(folder))
    cfgs = [(row.get("row", ""), _load(experiment, name, path, profile, row, words)) for row in rows]
    if "dry" in options:
        return _dry(experiment, name, cfgs)
    if len(cfgs) > 1:
        if "resume" in options:
            raise ValueError(f"resume=auto takes one row of {len(cfgs)}; choose it by only=")
        return _sweep(name, runs, profile, options["sweep"], cfgs)
    [(row, cfg)] = cfgs
    begun = [folder for folder in unfinished(runs / name) if "resume" in options and _began(folder, row, cfg)]
    folder = begun[-1] if begun else create(runs, name, cfg, profile=profile, row=row)
    return _execute(experiment, Run.open(folder))


def _split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Words -> (the options of this command, the config's words). Options that are empty, as make passes them, count as absent."""
    options, rest = {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key.startswith("-"):
            raise ValueError(f"expected key=value, got {word!r}; options: {', '.join(OPTIONS)}")
        if key in OPTIONS:
            options |= {key: value} if value else {}
        else:
            rest.append(word)
    if options.get("dry", "1") not in ("0", "1"):
        raise ValueError(f"dry takes 0 or 1, got {options['dry']!r}")
    if options.get("dry") == "0":
        del options["dry"]
    if "only" in options and "sweep" not in options:
        raise ValueError(f"only={options['only']} chooses rows of a sweep: name it by sweep=")
    return options, rest


# The experiment file


def _experiments() -> dict[str, Path]:
    """Experiments by name: the current directory's come before those of this checkout."""
    roots = [Path(__file__).resolve().parent.parent, Path.cwd()]
    return {path.stem: path for root in roots for path in (root / "experiments").glob("[!_]*.py")}


def _find(name: str) -> Path:
    found = _experiments()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.0)
        hint = f"nearest: {near[0]!r}; all: {', '.join(sorted(found))}" if near else "the folder experiments/ is missing or empty here"
        raise ValueError(f"there is no experiment {name!r}; {hint}")
    return found[name]


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiments.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up here
    spec.loader.exec_module(module)
    missing = [key for key in ("Config", "SWEEPS", "main", "plan") if not hasattr(module, key)]
    if missing:
        raise ValueError(f"experiments/{path.name} lacks {', '.join(missing)}")
    taken = sorted(set(OPTIONS) & set(module.Config.__dataclass_fields__))
    if taken:
        raise ValueError(f"experiments/{path.name}: Config has fields that are options of the command: {', '.join(taken)}")
    return module


def _load(experiment: ModuleType, name: str, path: Path, profile: str, row: Mapping[str, Any], words: list[str]) -> Any:
    keys = {key: value for key, value in row.items() if key != "row"}
    given = {config.full_key(experiment.Config, word.partition("=")[0], word) for word in words}
    clash = sorted(key for key in keys if any(key == full or key.startswith(f"{full}.") or full.startswith(f"{key}.") for full in given))
    if clash:
        raise ValueError(f"{', '.join(clash)}: set by the sweep's row {row['row']!r} and on the command line")
    return config.load(experiment.Config, name, profile, words, row=keys, root=path.parent.parent)


def _rows(sweeps: Mapping[str, list[dict[str, Any]]], options: Mapping[str, str]) -> list[dict[str, Any]]:
    """The sweep's rows that were asked for; without a sweep one row that changes nothing."""
    if "sweep" not in options:
        return [{}]
    if options["sweep"] not in sweeps:
        raise ValueError(f"there is no sweep {options['sweep']!r}; there are: {', '.join(sweeps) or 'none'}")
    rows = sweeps[options["sweep"]]
    if "only" not in options:
        return rows
    picked = options["only"].split(",")
    if not all(text.isdigit() and 1 <= int(text) <= len(rows) for text in picked):
        listing = "; ".join(f"{i} {row['row']}" for i, row in enumerate(rows, 1))
        raise ValueError(f"only={options['only']}: expected row numbers like 2 or 1,3, rows: {listing}")
    return [rows[int(text) - 1] for text in picked]


# What to do with it


def _execute(experiment: ModuleType, run: Run) -> int:
    """main(cfg, run) with signals, result.json and report; returns the exit code."""
    metrics: Any = {}
    error: BaseException | None = None
    with run.listening():
        try:
            metrics = experiment.main(config.read(experiment.Config, run.folder / "config.yaml"), run)
            if not isinstance(metrics, dict):
                raise TypeError(f"main must return a dict of metrics, got {type(metrics).__name__}")
        except BaseException as caught:  # every end of a run is written down
            error, metrics = caught, {}
        return run.finish(metrics, error)


def _dry(experiment: ModuleType, name: str, cfgs: list[tuple[str, Any]]) -> int:
    for row, cfg in cfgs:
        print(f"{name}{' · ' + row if row else ''} · {config.digest(cfg)}")
        print(_table(_lines(experiment.plan(cfg))))
    return 0


def _resume(experiment: ModuleType, name: str, path: Path, runs: Path, options: Mapping[str, str], words: list[str]) -> Path:
    """The folder to go on with. Its config.yaml rules; what the command line says otherwise is refused, key by key."""
    asked = options["resume"]
    choices = [Path(asked), runs / name / asked]
    if asked == "last":
        choices = [folder for folder in unfinished(runs / name) if not refused(folder)][-1:]
        if not choices:
            raise ValueError(f"resume=last: no unfinished run in {runs / name}")
    folder = next((choice for choice in choices if (choice / "stages.json").is_file()), None)
    foreign = folder is not None and _experiment(folder) != name
    if folder is None or foreign or ended_well(folder):
        why = f"resume={asked}: no run folder" if folder is None else f"resume={asked}: not a run of {name}" if foreign else f"{folder} has finished"
        found = unfinished(runs / name)[:-6:-1]
        raise ValueError(f"{why}; unfinished{', newest first' if found[1:] else ''}: {', '.join(map(str, found)) or 'none'}")
    state = read_json(folder / "stages.json")["what"]
    if options.get("profile", state["profile"]) == state["profile"]:
        given = config.read(experiment.Config, folder / "config.yaml", words)
    else:
        given = _load(experiment, name, path, options["profile"], {}, words)
    if changes := config.differences(config.read_dict(folder / "config.yaml"), config.to_dict(given)):
        newer = "; a key that is absent there came later: resume with the version that began the run" * any("(absent) ->" in change for change in changes)
        raise ValueError(f"cannot resume {folder} with another config; start a new run or take these back{newer}:\n  " + "\n  ".join(changes))
    return folder


def _experiment(folder: Path) -> str:
    try:
        return read_json(folder / "stages.json")["what"]["experiment"]
    except (KeyError, TypeError):
        raise ValueError(f"{folder / 'stages.json'} is no run's: it does not say of which experiment") from None


def _began(folder: Path, row: str, cfg: Any) -> bool:
    """Has this row of this config begun there, and can it go on?"""
    try:
        what = read_json(folder / "stages.json")["what"]
        return (what["row"], what["digest"]) == (row, config.digest(cfg)) and not refused(folder)
    except (ValueError, TypeError, KeyError):
        return False


def _sweep(name: str, runs: Path, profile: str, sweep: str, cfgs: list[tuple[str, Any]]) -> int:
    """Each row in its own process (its memory is its own, and its death spares the others); then one table and one report."""
    folders: list[Path] = []
    results: list[dict[str, Any]] = []
    code, signum = 0, None
    for number, (row, cfg) in enumerate(cfgs, 1):
        try:
            folders.append(create(runs, name, cfg, profile=profile, row=row))
        except OSError as error:  # a full disk: the rows before it still have their table
            if not folders:
                raise
            print(f"error: {error}", file=sys.stderr)
            break
        print(f"row {number} of {len(cfgs)}: {row} · {folders[-1]}", flush=True)
        code, signum = _child([sys.executable, "-m", "dyn.run", name, f"resume={folders[-1]}", f"runs={runs}"])
        results.append(_result(folders[-1], row, code, signum))
        if signum is not None or results[-1]["status"] == "cancelled":
            break
    names = list(dict.fromkeys(key for result in results for key, value in result["metrics"].items() if isinstance(value, (int, float))))[:5]
    table = [["row", "status", *names]]
    table += [[r["what"]["row"], r["status"], *(report.show(r["metrics"].get(key)) for key in names)] for r in results]
    table += [[row, "not run", *("-" for _ in names)] for row, _ in cfgs[len(results) :]]
    print(_table(table))
    try:
        print(f"report: {report.write_report(folders, folders[0].parent / f'{folders[0].name}-{sweep}')}")
    except Exception as error:  # the rows' results stand without it
        print(f"no report: {error}", file=sys.stderr)
    if signum is not None or results[-1]["status"] == "cancelled":
        return code if signum is None else 128 + signum
    return 0 if len(results) == len(cfgs) and all(result["status"] == "ok" for result in results) else 1


def _result(folder: Path, row: str, code: int, signum: int | None) -> dict[str, Any]:
    """The row's result.json, written here where its process left none. Where that is not possible (a full disk), what its line of the table needs."""
    if signum is None:
        error: BaseException = ChildProcessError(f"the process of this row ended with code {code} and left no result")
    else:
        error = Interrupted(signal.Signals(signum).name)
    try:
        if not (folder / "result.json").is_file():
            run = Run.open(folder)
            with run.listening():
                run.finish({}, error)
        return read_json(folder / "result.json")
    except (ValueError, OSError) as caught:
        print(f"error: {caught}", file=sys.stderr)
        return {"what": {"row": row}, "status": "failed" if signum is None else "cancelled", "metrics": {}}


def _child(command: list[str]) -> tuple[int, int | None]:
    """Run a command in its own process group and pass signals to stop on to it, once each time they come: its exit code, and the first signal, since a
    process that imports or that writes its result may end by its own code all the same."""
    caught: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(signum: int, _frame: Any) -> None:
        caught.append(signum)
        if child is not None:
            child.send_signal(signum)

    kept = {signum: signal.signal(signum, forward) for signum in stop_signals()}
    try:
        child = subprocess.Popen(command, process_group=0)
        for signum in caught:  # came before there was a child
            child.send_signal(signum)
        code = child.wait()
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)
    return code, caught[0] if caught else None


# Text


def _lines(tree: Mapping[str, Any], depth: int = 0) -> list[list[str]]:
    """A plan as [key, value] lines, nested dicts indented under their key."""
    lines = []
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        lines.append(["  " * (depth + 1) + str(key), "" if nested else report.show(value)])
        lines += _lines(value, depth + 1) if nested else []
    return lines


def _table(lines: list[list[str]]) -> str:
    """Aligned columns; those that hold only numbers are flushed right."""
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(text.strip("-0123456789,.e+na") == "" for text in column[1:]) for column in columns]
    rows = ([t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)] for line in lines)
    return "\n".join("  ".join(row).rstrip() for row in rows)


if __name__ == "__main__":
    from dyn.run import main as entry  # under the module's own name, so that its classes are there once

    keep_freed_memory()
    sys.exit(entry())
