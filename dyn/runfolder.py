"""One run's folder: who may write in it, what has been done, when to stop, and the result that it leaves.

stages.json holds what the run is, where it first started (env) and the values of the stages that are done, so that a killed run can go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

from dyn import config, env, report

T = TypeVar("T")


class Cancelled(Exception):
    """The experiment stopped on request; what it wants to keep is written."""


class Interrupted(KeyboardInterrupt):
    """A signal to stop, at a place that is not prepared for it or for the second time."""


class Run:
    """What an experiment sees of its run.

    folder, name, profile, row, digest, resumed; `cost` and `notes` go into result.json; `stop` is set while `graceful()` is on and
    a signal to stop came (SIGINT, SIGTERM, SIGHUP). On ranks other than 0 nothing is written or printed.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        what = state["what"]
        self.folder = folder
        self.name: str = what["experiment"]
        self.profile: str = what["profile"]
        self.row: str = what["row"]
        self.digest: str = what["digest"]
        self.resumed: bool = state["starts"] > 0
        self.cost: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self.stop = threading.Event()
        self._state = state
        self._writes = env.rank() == 0
        self._began = time.monotonic()
        self._gentle = False
        self._signum: int | None = None
        self._lock: Any = None

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Take a folder over, on rank 0. Raises ValueError while another live process has it; warns where bitwise equality ends."""
        lock = (folder / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # per process: gone with it, even after SIGKILL, and not inherited by workers
        except OSError:
            lock.seek(0)
            raise ValueError(f"{folder} is in use by process {lock.read().strip() or '?'}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        run = cls(folder, read_json(folder / "stages.json"))
        run._lock = lock
        for stale in folder.rglob("*.failed"):  # of `env.once` in an earlier start
            stale.unlink()
        env.announce(folder, run._state)
        facts = run._facts()
        if run.resumed:
            run.log(f"resuming {folder}")
            for change in config.differences(run._state["env"], facts):
                run.log(f"warning: this run began elsewhere, so it will not be bitwise the same: {change}")
        write_json(folder / "stages.json", run._state | {"starts": run._state["starts"] + 1, "env": run._state["env"] or facts}, finite=False)
        run._state = read_json(folder / "stages.json")
        return run

    @classmethod
    def join(cls, folder: Path, state: dict[str, Any]) -> Run:
        """The same run on another rank."""
        return cls(folder, state)

    def _facts(self) -> dict[str, Any]:
        trainer = config.read_dict(self.folder / "config.yaml").get("trainer") or {}
        return env.facts(cpu=trainer.get("accelerator") == "cpu", processes=trainer.get("devices", 1) * trainer.get("num_nodes", 1))

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go: folder/checkpoints, made at the first use."""
        path = self.folder / "checkpoints"
        path.mkdir(exist_ok=True)
        return path

    def log(self, text: str) -> None:
        """Print a line with the elapsed time, and append it to log.txt."""
        if self._writes:
            _say(self._note(text), sys.stdout)

    def _note(self, text: str) -> str:
        line = f"[{time.monotonic() - self._began:8.1f} s] {text}"
        with contextlib.suppress(OSError), (self.folder / "log.txt").open("a", encoding="utf-8") as file:  # a full disk must not hide the error
            file.write(line + "\n")
        return line

    def stage(self, name: str, fn: Callable[[], T]) -> T:
        """fn's value; remembered, so that a resumed run takes it from stages.json and does not call fn.

        The value must survive JSON (numbers, strings, lists, dicts with string keys), else TypeError. Every rank calls fn.
        """
        done = self._state["stages"]
        if name not in done:
            done[name] = plain(fn(), finite=False)
            if self._writes:
                write_json(self.folder / "stages.json", self._state, finite=False)
        return done[name]

    @contextlib.contextmanager
    def graceful(self) -> Iterator[threading.Event]:
        """Inside, the first signal only sets `stop`; the work inside should then write a checkpoint and end.

        Raises Cancelled at the end when `stop` is set. A second signal raises KeyboardInterrupt at once.
        """
        self._gentle = True
        try:
            yield self.stop
        except SystemExit:  # how a trainer ends that noticed SIGTERM by itself
            if not self.stop.is_set():
                raise
        finally:
            self._gentle = False
        if self.stop.is_set():
            raise Cancelled("stopped on request")

    def listen(self) -> None:
        """Put our signal handlers back, after a library (Lightning's fit) has put its own over them."""
        for signum in stop_signals():
            signal.signal(signum, self._on_signal)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Our signal handlers inside, the earlier ones after."""
        kept = {signum: signal.getsignal(signum) for signum in stop_signals()}
        self.listen()
        try:
            yield
        finally:
            for signum, handler in kept.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, _frame: Any) -> None:
        self._signum = signum
        if not self._gentle or self.stop.is_set():
            raise Interrupted(signal.Signals(signum).name)
        self.stop.set()
        if self._writes:
            with contextlib.suppress(OSError):  # of a terminal that is gone; os.write: print is not safe inside a handler
                os.write(2, b"\nstopping at the next step, with a checkpoint; once more stops at once\n")

    def finish(self, metrics: Mapping[str, Any], error: BaseException | None) -> int:
        """Write result.json (atomically) and the report, say where they are and how to go on; returns the exit code."""
        for signum in stop_signals():
            signal.signal(signum, signal.SIG_IGN)
        status, code = self._verdict(error)
        if not self._writes:
            if status == "failed":
                traceback.print_exception(error)
            return code
        parts: dict[str, Any] = {}
        for name, value in {"metrics": metrics, "cost": self.cost, "notes": self.notes}.items():
            try:
                parts[name] = plain(value)
            except TypeError as caught:
                parts[name] = {}
                if error is None:
                    status, code, error = "failed", 1, TypeError(f"{name}: {caught}")
        if status == "failed":
            self._note("".join(traceback.format_exception(error)))
            if not isinstance(error, (ValueError, OSError)):
                _say("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
        try:
            write_json(self.folder / "result.json", self._result(parts, status, error))
        except OSError as caught:
            _say(self._note(f"error: result.json is not written: {caught}"), sys.stderr)
            code = code or 1
        if status != "ok":
            why = signal.Signals(self._signum).name if status == "cancelled" and self._signum else _message(error)
            _say(self._note(f"{status}: {why}"), sys.stderr)
            if status == "cancelled" or self._state["stages"] or any((self.folder / "checkpoints").glob("*")):
                run = f"python -m dyn.run {self.name} resume={self.folder}"
                make = f"make exp NAME={self.name} PROFILE={self.profile} RESUME={self.folder}" if Path("Makefile").is_file() else run
                _say(self._note(f"to resume: {make if env.world_size() == 1 else f'start as many processes again, each by: {run}'}"), sys.stderr)
        try:
            self.log(f"report: {report.write_report([self.folder], self.folder)}")
        except Exception as caught:  # a report that cannot be drawn must not change what the run was
            self.log(f"no report: {type(caught).__name__}: {caught}")
        os.environ.pop("DYN_RUN_FOLDER", None)
        self._lock.close()
        return code

    def _verdict(self, error: BaseException | None) -> tuple[str, int]:
        if error is None:
            return "ok", 0
        if isinstance(error, (Cancelled, KeyboardInterrupt)) or (isinstance(error, SystemExit) and self._signum is not None):
            return "cancelled", 128 + (self._signum or signal.SIGINT)
        return "failed", 1

    def _result(self, parts: Mapping[str, Any], status: str, error: BaseException | None) -> dict[str, Any]:
        seconds = self._state["seconds"] + time.monotonic() - self._began
        self._state["seconds"] = seconds
        write_json(self.folder / "stages.json", self._state, finite=False)
        return {
            "schema": report.SCHEMA,
            "what": self._state["what"],
            "status": status,
            "error": None if error is None else {"type": type(error).__name__, "message": _message(error)},
            "metrics": parts["metrics"],
            "cost": parts["cost"] | {"wall_seconds": seconds} | env.peak_memory(),
            "notes": parts["notes"],
            "config": plain(config.read_dict(self.folder / "config.yaml")),
            "env": self._facts(),
            "started": self._state["started"],
            "finished": _now(),
            "starts": self._state["starts"],
        }


def stop_signals() -> list[signal.Signals]:
    """What a run answers by a checkpoint and an end: SIGINT, SIGTERM, SIGUSR1 (a queue's warning) and, unless it is ignored (nohup), the SIGHUP of a terminal
    that closes."""
    return [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *([] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP])]


def create(runs: Path, name: str, cfg: Any, *, profile: str, row: str = "") -> Path:
    """A new folder runs/NAME/DATE-DIGEST with config.yaml and stages.json; a number is added where the name is taken."""
    what = {"experiment": name, "row": row, "profile": profile, "digest": config.digest(cfg)}
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{what['digest']}"
    (runs / name).mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = runs / name / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    config.save(cfg, folder / "config.yaml")
    write_json(folder / "stages.json", {"what": what, "started": _now(), "starts": 0, "seconds": 0.0, "env": {}, "stages": {}})
    return folder


def unfinished(parent: Path) -> list[Path]:
    """The run folders in runs/NAME that have not ended well, oldest first."""
    return sorted(path.parent for path in parent.glob("*/stages.json") if not ended_well(path.parent))


def refused(folder: Path) -> bool:
    """Whether a run ended by an error before anything was done that a resume could go on from: settings that were refused, mostly."""
    try:
        failed = read_json(folder / "result.json")["status"] == "failed"
        return failed and not read_json(folder / "stages.json")["stages"] and not any(folder.glob("checkpoints/**/*.ckpt"))
    except (OSError, ValueError, TypeError, KeyError):
        return False


def ended_well(folder: Path) -> bool:
    """Whether a run has a good result; a file that cannot be read as one (empty, foreign) is none."""
    try:
        return read_json(folder / "result.json")["status"] == "ok"
    except (OSError, ValueError, TypeError, KeyError):
        return False


# Files


def read_json(path: Path) -> Any:
    """A JSON file; ValueError naming it when it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def write_json(path: Path, value: Any, *, finite: bool = True) -> None:
    """Write a file whole or not at all. Not `finite`: with NaN and Infinity, which Python alone reads."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=not finite) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any, *, finite: bool = True) -> Any:
    """Numbers, strings, lists and dicts of what main returned; `finite`: nan and infinities as strings, which JSON lacks. TypeError for the rest."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner, finite=finite) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, finite=finite) for inner in value]
    if hasattr(value, "tolist"):  # tensors and arrays
        return plain(value.tolist(), finite=finite)
    if finite and isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def _message(error: BaseException | None) -> str:
    """The error's text without the folders of this machine."""
    text, home = str(error) or type(error).__name__, str(Path.home())
    text = text.replace(str(Path.cwd()) + os.sep, "")
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text


def _say(line: str, stream: TextIO) -> None:
    """Print a line. A reader that is gone (`| head`, a closed terminal) stops nothing: log.txt has the line."""
    try:
        print(line, file=stream, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # nor what is flushed at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
