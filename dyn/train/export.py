"""Out of a run: a checkpoint as a folder of safetensors that transformers loads, and such a folder through lm-evaluation-harness (the extra `eval`).

python -m dyn.train.export RUN_FOLDER_OR_CHECKPOINT OUT [--name TRAINING] [--tokenizer FOLDER]
python -m dyn.train.export eval FOLDER --tasks sciq,piqa | --tasks paper [--shots N] [--limit N] [--include-path FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dyn.models.llama_moe import Construction, LlamaMoeForCausalLM
from dyn.models.llama_moe_dense import check_weights
from dyn.models.packaged import load_tokenizer
from dyn.train.checkpoint import find_checkpoint, verify_checkpoint

PAPER_TASKS: dict[str, int] = {
    "sciq": 0, "piqa": 0, "winogrande": 0, "arc_easy": 0, "logiqa": 0, "lambada_openai": 0, "arc_challenge": 25, "hellaswag": 10, "boolq": 32,
    "nq_open": 32, "mmlu": 5,
}
"""Task -> shots of LLaMA-MoE's table (section 5.2). The paper does not say which accuracy it prints: the harness records both."""


def load_net(checkpoint: str | Path) -> transformers.PreTrainedModel:
    """The network of a checkpoint of `CausalLM`, in the precision in which it was trained.

    Raises:
        ValueError: a damaged file, or one without a transformers network.
    """
    path = verify_checkpoint(checkpoint)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint of plain tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; allowed are checkpoints of dyn's trainings")
    about = data.get("dyn", {}).get("about", {})
    kind, config = about.get("net", ""), dict(about.get("config", {}))
    net_class = LlamaMoeForCausalLM if kind == LlamaMoeForCausalLM.__name__ else getattr(transformers, kind, None) if kind.endswith("ForCausalLM") else None
    if net_class is None:
        raise ValueError(f"{path} holds no causal language model of transformers that could be exported (its network is {kind or 'unknown'})")
    state = {name.removeprefix("net."): tensor for name, tensor in data["state_dict"].items()}
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    config.pop("model_type", None)
    net = net_class._from_config(net_class.config_class(**config), dtype=dtype)
    net.load_state_dict(state)
    if data["dyn"]["construction"] is not None:
        net.construction = Construction(**data["dyn"]["construction"])
        net.construction.details.setdefault("data", f"Trained for {data['global_step']:,} optimiser steps since; on what stands in the run's report.")
    return net.eval()


def export(source: str | Path, out: str | Path, *, name: str = "", tokenizer: str | Path | None = None) -> Path:
    """Write the newest checkpoint of a run folder, or the checkpoint `source`, as a folder that transformers loads; whole or not at all.

    Args:
        source: run folder or checkpoint.
        out: a folder that does not exist yet, or is empty.
        name: which training of the run, where there are several.
        tokenizer: folder or hub id of a tokenizer that goes along; None: the one beside the model that the run itself has exported, if it has.

    Raises:
        ValueError: no checkpoint, several trainings and no name, an `out` in use.
    """
    source, out = Path(source), Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} is in use; give a folder that does not exist or is empty")
    net = load_net(source if source.is_file() else _of_run(source, name))
    if tokenizer is None and (beside := source / "export" / "tokenizer_config.json").is_file():
        tokenizer = beside.parent
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        net.save_pretrained(part)
        if tokenizer is not None:
            transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(part)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _of_run(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither a run folder nor a checkpoint")
    trainings = sorted(p.parent.relative_to(folder / "checkpoints") for p in (folder / "checkpoints").rglob("*.ckpt"))
    names = list(dict.fromkeys("" if str(t) == "." else str(t) for t in trainings))
    if not names:
        raise ValueError(f"{folder} has no checkpoint in {folder / 'checkpoints'}")
    if name not in names and (name or len(names) > 1):
        raise ValueError(f"{folder} has checkpoints of the trainings {', '.join(map(repr, names))}; choose one of them by --name, got {name!r}")
    return find_checkpoint(folder, name if name in names else names[0])


def run_harness(model: Any, tasks: Sequence[str] | Mapping[str, int | None], *, tokenizer: Any = None, include_path: str | Path | None = None,
                limit: int | None = None, batch_size: int | str = 8, device: str | None = None) -> dict[str, dict[str, Any]]:
    """lm-evaluation-harness on a model: task -> its metrics and their standard errors, with "shots".

    Args:
        model: a folder or hub id, or a causal language model in memory with its `tokenizer`.
        tasks: names, or name -> number of shots (None: the task's own).
        include_path: a folder of task files (YAML) beside the harness's.
        limit: at most so many examples a task.
        batch_size, device: as the harness takes them.

    Raises:
        ValueError: the extra is not installed, or a task that the harness does not know.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"evaluation needs lm-evaluation-harness ({error}): install the extra with `pip install dyn[eval]`") from None
    shots = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks)
    manager = TaskManager(include_path=str(include_path), include_defaults=False) if include_path is not None else None
    if manager is None or not set(shots) <= set(manager.all_tasks):  # the harness's own thousands take a while to list
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in shots if task not in manager.all_tasks]:
        raise ValueError(f"lm-evaluation-harness knows no task {', '.join(unknown)}{'' if include_path is None else f', nor does {include_path}'}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    harness = HFLM(pretrained=str(model) if isinstance(model, (str, Path)) else model, tokenizer=tokenizer, batch_size=batch_size, device=device)
    results: dict[str, dict[str, Any]] = {}
    for count in dict.fromkeys(shots.values()):
        names = [task for task, wanted in shots.items() if wanted == count]
        done = lm_eval.simple_evaluate(harness, tasks=names, num_fewshot=count, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False)
        for task in names:  # a group such as mmlu has its mean under its own name
            values = {key.removesuffix(",none"): value for key, value in done["results"][task].items() if isinstance(value, (int, float))}
            results[task] = {**values, "shots": done["n-shot"].get(task, count)}
    return results


def main(words: Sequence[str] | None = None) -> int:
    """The command line; see the file's head."""
    words = list(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(prog="python -m dyn.train.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if words[:1] == ["eval"]:
        parser.add_argument("folder", metavar="FOLDER")
        parser.add_argument("--tasks", required=True, help="names with commas, or paper")
        parser.add_argument("--shots", type=int)
        parser.add_argument("--limit", type=int)
        parser.add_argument("--include-path")
        parser.add_argument("--batch-size", default="8")
        parser.add_argument("--device")
        parser.add_argument("--out")
        given = parser.parse_args(words[1:])
        tasks = PAPER_TASKS if given.tasks == "paper" else dict.fromkeys(given.tasks.split(","), given.shots)
        batch = int(given.batch_size) if given.batch_size.isdigit() else given.batch_size
        try:
            if given.out and not Path(given.out).resolve().parent.is_dir():
                raise ValueError(f"--out {given.out}: its folder does not exist")
            check_weights(given.folder)
            load_tokenizer(given.folder, "FOLDER")
            results = run_harness(given.folder, tasks, include_path=given.include_path, limit=given.limit, batch_size=batch, device=given.device)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        text = json.dumps({"model": given.folder, "limit": given.limit, "results": results}, indent=1)
        print(text)
        if given.out:
            Path(given.out).write_text(text + "\n", encoding="utf-8")
        return 0
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--name", default="")
    parser.add_argument("--tokenizer")
    given = parser.parse_args(words)
    try:
        print(export(given.source, given.out, name=given.name, tokenizer=given.tokenizer))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
