"""The smoke profiles of sparse_adapter_squad and sparse_adapter_xsum for the tests beside this file, served as tiny_training.py's; a run that is in the folder
is resumed."""

import os
from pathlib import Path

import torch
from tiny_training import serve

from dyn.run import main
from dyn.train import adapt_jobs  # noqa: F401  imports what takes long before a process is forked


def start(runs: Path, words: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())  # nothing may depend on what happened before
    name = next(word.partition("=")[2] for word in words if word.startswith("experiment="))
    resume = ["resume=last"] if any(runs.glob(f"{name}/*")) else []
    if code := main([name, "profile=smoke", f"runs={runs}", *resume, *(word for word in words if not word.startswith("experiment="))]):
        raise RuntimeError(f"exit code {code}")


if __name__ == "__main__":
    serve(start)
