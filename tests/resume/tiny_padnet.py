"""The smoke profile of padnet_resnet50 for the tests beside this file, served as tiny_training.py's; a run that is in the folder is resumed."""

import os
from pathlib import Path

import torch
from tiny_training import serve

from dyn.run import main
from dyn.train import convnet  # noqa: F401  imports what takes long before a process is forked

NAME = "padnet_resnet50"


def start(runs: Path, words: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())  # nothing may depend on what happened before
    resume = ["resume=last"] if any(runs.glob(f"{NAME}/*")) else []
    if code := main([NAME, "profile=smoke", f"runs={runs}", *resume, *words]):
        raise RuntimeError(f"exit code {code}")


if __name__ == "__main__":
    serve(start)
