"""Processes of their own for tests, forked after the imports, which take longest. Serves lines from standard input:

  start SCRIPT RUNS_FOLDER OUTPUT word ...   forks a process that calls SCRIPT's start(RUNS_FOLDER, words) and exits with the code that it gives; answers with
                                             its id. KEY=value sets the environment; HOLD=5, or HOLD=5@control for a stage, stops it for good where the
                                             metrics of step 5 are written, so that it can be killed there on however fast a machine
  wait ID                                    answers with its exit code, negative for a signal; what takes longer than ten minutes is killed
"""

import importlib.util
import os
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from dyn.run import main
from dyn.runfolder import Cancelled
from dyn.train import adapt_jobs, convert, convnet, encoders, pretrain  # noqa: F401  imports what takes long before a process is forked
from dyn.train.callbacks import JsonlLogger


def start(runs: Path, words: list[str]) -> int:
    """`python -m dyn.run` with these words; a run that is in the folder is resumed."""
    resume = ["resume=last"] if any(runs.glob(f"{words[0]}/*")) else []
    return main([words[0], f"runs={runs}", *resume, *words[1:]])


def hold(step: str, _: str, stage: str) -> None:
    log = JsonlLogger.log_metrics

    def log_and_hold(logger: JsonlLogger, metrics: dict[str, float], at: int | None = None) -> None:
        log(logger, metrics, at)
        if at == int(step) and stage in ("", logger.stage):
            time.sleep(120)
            raise RuntimeError(f"nobody killed this process at step {step}")

    JsonlLogger.log_metrics = log_and_hold


def ended(pid: int, seconds: float = 600.0) -> int:
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.01)


def process(script: str, runs: str, output: str, words: list[str]) -> int:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    environment = dict(word.split("=", 1) for word in words if word.partition("=")[0].isupper())
    if "HOLD" in environment:
        hold(*environment.pop("HOLD").partition("@"))
    os.environ |= environment
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())  # nothing may depend on what happened before
    sys.path.insert(0, str(Path(script).parent))
    spec = importlib.util.spec_from_file_location(Path(script).stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.start(Path(runs), [word for word in words if not word.partition("=")[0].isupper()]) or 0


if __name__ == "__main__":
    for line in sys.stdin:
        command, *words = shlex.split(line)
        if command == "wait":
            print(ended(int(words[0])), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            try:
                code = process(*words[:3], words[3:])
            except BaseException as error:
                traceback.print_exc()
                code = 130 if isinstance(error, Cancelled) else 1
            sys.stdout.flush()
            os._exit(code)
