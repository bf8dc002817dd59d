"""Where this process runs: its rank and the run that it belongs to, and the facts that a result records (versions, commit, device)."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

VERSIONS = ("dyn", "torch", "lightning", "transformers", "datasets", "triton")
_WAIT = timedelta(minutes=5)  # for rank 0 to say which folder the run has


def by_srun() -> bool:
    """Did srun start several processes? A shell inside a job has SLURM's variables too, as one process."""
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def rank(devices: int = 1) -> int:
    """This process's rank, by the variables that torchrun, srun and Lightning's launcher (`devices` on each machine) set."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    if by_srun():
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0))) * devices + local_rank()


def local_rank() -> int:
    """This process's place on its machine, which is its GPU's number."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0) if by_srun() else 0))


def world_size() -> int:
    """How many processes were started together by torchrun or srun."""
    return int(os.environ.get("WORLD_SIZE", os.environ["SLURM_STEP_NUM_TASKS"] if by_srun() else 1))


# Lightning's own launcher copies the environment of rank 0; torchrun has a store; srun has the shared disk.


def announce(folder: Path, state: dict[str, Any]) -> None:
    """On rank 0: tell the other ranks, those that will be launched and those that wait in `follow`."""
    os.environ["DYN_RUN_FOLDER"] = str(folder)
    message = json.dumps([str(folder), state])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _store().set("dyn_run", message)
    elif by_srun():
        whole = _slurm_file().with_suffix(".tmp")
        whole.write_text(message, encoding="utf-8")
        whole.replace(_slurm_file())


def follow() -> tuple[Path, dict[str, Any]]:
    """On another rank: the folder, and its state as rank 0 found it. Raises TimeoutError after five minutes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        folder, state = json.loads(_store().get("dyn_run"))
    elif "DYN_RUN_FOLDER" in os.environ:
        folder = os.environ["DYN_RUN_FOLDER"]
        state = json.loads((Path(folder) / "stages.json").read_text(encoding="utf-8"))
        state["starts"] -= 1  # rank 0 has counted this start already
    else:
        end = time.monotonic() + _WAIT.total_seconds()
        while not _slurm_file().is_file():
            if time.monotonic() > end:
                raise TimeoutError("rank 0 has not begun its run; start several processes by torchrun or srun")
            time.sleep(0.2)
        folder, state = json.loads(_slurm_file().read_text(encoding="utf-8"))
    return Path(folder), state


def _store() -> Any:
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://", timeout=_WAIT)))[0]


def _slurm_file() -> Path:
    keys = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")  # never the same twice, so a file left behind misleads nobody
    return Path(".dyn-" + "-".join(os.environ.get(key, "0") for key in keys))


def once(folder: Path, make: Callable[[Path], None], rank: int) -> None:
    """`make` a folder beside `folder` and rename it, on rank 0; the others wait. TimeoutError after two hours, RuntimeError when rank 0 failed."""
    part, failed = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.failed")
    if folder.is_dir():
        return
    if rank == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        failed.unlink(missing_ok=True)
        try:
            make(part)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # first, as the disk may be full
            failed.touch()
            raise
        part.replace(folder)
        return
    end, parent = time.monotonic() + 7200, os.getppid()
    while not folder.is_dir():
        if failed.exists():
            raise RuntimeError(f"rank 0 could not make {folder.name}; its own message says why")
        if os.getppid() != parent:
            raise RuntimeError(f"who started this process is gone, and {folder.name} is not there")
        if time.monotonic() > end:
            raise TimeoutError(f"waited two hours for rank 0 to make {folder.name}")
        time.sleep(0.5)


def link(old: str, new: str) -> None:
    """The same file by another name (for files that nobody writes into), or a copy where the disk knows no such thing."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def facts(*, cpu: bool = False, processes: int = 1) -> dict[str, Any]:
    """Versions, commit, device (`cpu`: whatever GPU there is), threads, world size (`processes` that are still to be launched) and platform; no path and no
    host name."""
    import torch

    versions = {name: _version(name) for name in VERSIONS}
    name, changed = commit()
    return {
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "commit": name,
        "dirty": changed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and not cpu else f"CPU: {_cpu()}",
        "threads": torch.get_num_threads(),
        "world_size": max(world_size(), processes),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit and whether files differ from it; without git or a checkout DYN_COMMIT, if it is set, and nothing known of changes."""
    top, _, name = (_git("rev-parse", "--show-toplevel", "HEAD") or "").partition("\n")
    if Path(top).resolve() != Path(__file__).resolve().parents[1] or not name:  # installed somewhere below a checkout of the user's own
        return os.environ.get("DYN_COMMIT") or None, None
    status = _git("status", "--porcelain", "--", ":/", ":(top,exclude)results")  # a result that was saved just now changes no other
    return name, None if status is None else bool(status)


def peak_memory() -> dict[str, int]:
    """The most that this process has held at a time, in bytes: peak_memory_bytes, and peak_device_memory_bytes where there is a GPU."""
    import torch

    device = {"peak_device_memory_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)} | device


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensors instead of giving each large one back to the system; True where that was done.

    A fresh page costs a fault when it is first written, which takes longer than what most CPU operations do with it. This is about the whole process, so a
    command's entry calls it, never a library function. Settings of the user's own (MALLOC_*, GLIBC_TUNABLES) stand.
    """
    if platform.libc_ver()[0] != "glibc" or any(key.startswith(("MALLOC_", "GLIBC_TUNABLES")) for key in os.environ):
        return False
    mmap_max, trim_threshold = -4, -1  # malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1))


def code(*rooms: str) -> str:
    """Names the source of dyn/ROOM of every room, so that what it made is not taken for what it would make now."""
    here, hasher = Path(__file__).resolve().parent, hashlib.sha256()
    for path in (path for room in rooms for path in sorted((here / room).glob("*.py"))):
        hasher.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return hasher.hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
