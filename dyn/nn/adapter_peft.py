"""LoRA in peft's folders: adapter_config.json and adapter_model.safetensors, dense matrices with zeros where they were pruned (SparseAdapter section 7.11)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dyn.nn.adapter_attach import adapters, attach, head_parameters, hosts, loras, refuse_merged
from dyn.nn.adapter_build import PROJECTIONS
from dyn.nn.adapter_files import replace_folder, short_names
from dyn.nn.adapter_modules import LoRA
from dyn.nn.adapter_sites import own_parameters
from dyn.nn.masked import dense_weight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOP = "base_model.model."
TASKS = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForSequenceClassification": "SEQ_CLS", "ForQuestionAnswering": "QUESTION_ANS",
         "ForTokenClassification": "TOKEN_CLS"}
# Fields of peft's configuration that change what a LoRA computes, and the value at which ours computes the same.
PLAIN = {"bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "layer_replication": None, "megatron_config": None,
         "trainable_token_indices": None, "target_parameters": None, "use_qalora": False, "alora_invocation_tokens": None, "arrow_config": None}


def export_peft(model: nn.Module, d: str | Path, name: str = "default") -> Path:
    """Write a LoRA as a folder that peft loads onto the same host; returns the folder. The head goes along as `modules_to_save`.

    Raises:
        ValueError: no such adapter, one that is no LoRA, one that is merged, a `d` with other files.
    """
    folder, host = Path(d), hosts().find_host(model).model
    head = head_parameters(model, name)
    refuse_merged(model)
    config = adapters(model)[name]
    if config.kind != "lora":
        raise ValueError(f"adapter {name!r} is of kind {config.kind}; peft has only lora of these (no bottleneck adapters)")
    path_of = {id(m): path for path, m in host.named_modules()}
    found = {path_of[id(owner)]: lora for owner, _, lora in loras(model, name)}
    rank = config.flags["r"]
    state, narrow = {}, {}
    for path, lora in found.items():
        pair = [dense_weight(part).detach().cpu() for part in (lora.A, lora.B)]
        if not len(pair[0]):  # all units pruned: peft knows no rank 0
            pair = [pair[0].new_zeros(1, lora.A.in_features), pair[1].new_zeros(lora.B.out_features, 1)]
        state |= {f"{TOP}{path}.lora_{part}.weight": t.contiguous() for part, t in zip("AB", pair, strict=True)}
        if len(pair[0]) != rank:
            narrow[path] = len(pair[0])
    short = short_names(model, name)
    state |= {f"{TOP}{short[key]}": p.detach().cpu().contiguous() for key, p in head.items()}
    parts = sorted({short[key].split(".")[0] for key in head})
    task = next((task for suffix, task in TASKS.items() if type(host).__name__.endswith(suffix)), None)
    about = {
        "peft_type": "LORA", "task_type": task if head or task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else None,  # others make peft look for a head
        "base_model_name_or_path": host.config._name_or_path or None, "inference_mode": True, "r": rank, "lora_alpha": _plain(config.flags["alpha"]),
        "lora_dropout": config.flags["dropout"], "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "target_modules": _targets(host, found), "modules_to_save": parts or None, "rank_pattern": narrow,
        "alpha_pattern": {path: _plain(found[path].scaling * r) for path, r in narrow.items()},
    }
    replace_folder(folder, {CONFIG: (json.dumps(about, indent=2) + "\n").encode(), WEIGHTS: save(state, {"format": "pt"})}, (CONFIG, WEIGHTS))
    return folder


def import_peft(model: nn.Module, d: str | Path, name: str = "default", *, head: bool = True) -> nn.Module:
    """Attach the LoRA of a peft folder, with its own rank and scaling in every place, and let it act; in place, returns the model.

    Args:
        model: the host that it was trained on.
        d: a folder of peft's: adapter_config.json and adapter_model.safetensors.
        name: to give it.
        head: read `modules_to_save` too.

    Raises:
        ValueError: another kind of adapter or a variant that computes something else (DoRA, biases, ...), places without an nn.Linear of a known layer, other
            shapes, damaged files, a name in use; the model is then as before.
    """
    folder = Path(d)
    about, state = _read(folder)
    host = hosts().find_host(model)
    pairs: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for key, value in state.items():
        if (match := re.fullmatch(re.escape(TOP) + r"(.+)\.lora_([AB])\.weight", key)) is not None:
            pairs.setdefault(match[1], {})[match[2]] = value
        elif "lora_" in key or not key.startswith(TOP):
            raise ValueError(f"{folder}: {key} is no LoRA of an nn.Linear")
        else:
            heads[re.sub(r"\.modules_to_save(\.default)?\.", ".", key.removeprefix(TOP))] = value
    where, layers = _places(host, set(pairs), folder)
    targets = {path: host.model.get_submodule(path) for path in pairs}
    for path, pair in pairs.items():
        r = len(pair["A"]) if "A" in pair else 0
        wanted = {"A": [r, targets[path].in_features], "B": [targets[path].out_features, r]}
        if (shapes := {part: list(t.shape) for part, t in pair.items()}) != wanted:
            raise ValueError(f"{folder}: {path} has shapes {shapes}; {type(host.model).__name__} needs {wanted}")
    heads = heads if head else {}
    own = {f"{path}.{key}": p for path, m in host.model.named_modules() if any(m is part for part in host.heads) for key, p in own_parameters(m).items()}
    if wrong := [key for key, p in heads.items() if key not in own or own[key].shape != p.shape]:
        raise ValueError(f"{folder}: {wrong[0]} {list(heads[wrong[0]].shape)} is saved too, which {type(host.model).__name__} has not in its head; "
                         "import_peft(..., head=False) leaves such modules out")
    attach(model, "lora", about["r"], name, head=bool(heads), layers=layers, seed=0, dtype=next(iter(pairs.values()))["A"].dtype, where=where,
           alpha=float(about["lora_alpha"]) * (math.sqrt(about["r"]) if about.get("use_rslora") else 1.0), dropout=float(about.get("lora_dropout", 0.0)))
    path_of = {id(m): path for path, m in host.model.named_modules()}
    with torch.no_grad():
        for owner, _, lora in loras(model, name):
            pair, path = pairs[path_of[id(owner)]], path_of[id(owner)]
            lora.resize({"A.weight": pair["A"].shape})
            lora.A.weight.copy_(pair["A"])
            lora.B.weight.copy_(pair["B"])
            # One scaling an adapter: what is another in this place goes into B.
            ratio = _scaling(about, path, len(pair["A"])) / lora.scaling
            if abs(ratio - 1) > 1e-12:
                lora.B.weight.mul_(ratio)
        short = short_names(model, name)
        for key, p in head_parameters(model, name).items():
            if short[key] in heads:
                p.copy_(heads[short[key]])
    return model


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else float(number)


def _targets(host: nn.Module, found: Mapping[str, LoRA]) -> list[str]:
    """The last parts of the names where they say which modules are meant, else whole names."""
    last = {path.rpartition(".")[2] for path in found}
    meant = {path for path, m in host.named_modules() if path.rpartition(".")[2] in last and isinstance(m, nn.Linear)}
    return sorted(last) if meant == set(found) else sorted(found)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no folder of peft's: there is no {CONFIG}")
    if not (folder / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is pickled, which can run code; save it as safetensors)" if (folder / "adapter_model.bin").is_file() else ""
        raise ValueError(f"{folder} has no {WEIGHTS}{pickled}")
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load((folder / WEIGHTS).read_bytes())
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{folder / CONFIG} is damaged: it holds no object")
    if about.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds a {about.get('peft_type')} of peft's; only LORA can be imported")
    for field, plain in PLAIN.items():
        if about.get(field, plain) not in (plain, None):
            raise ValueError(f"{folder}: {field}={about[field]!r} computes what a plain LoRA does not; only {plain!r} can be imported")
    if not isinstance(about.get("r"), int) or not isinstance(about.get("lora_alpha"), (int, float)):
        raise ValueError(f"{folder / CONFIG} has no r or no lora_alpha")
    return about, state


def _pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the end of a module's name."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def _scaling(about: Mapping[str, Any], path: str, r: int) -> float:
    alpha = float(_pattern(about.get("alpha_pattern"), path, about["lora_alpha"]))
    return alpha / (math.sqrt(r) if about.get("use_rslora") else r)


def _places(host: Any, paths: set[str], folder: Path) -> tuple[tuple[str, ...], list[int]]:
    """Which projections of which layers these modules are; all of those projections in all of those layers."""
    path_of = {id(m): path for path, m in host.model.named_modules()}
    place: dict[str, tuple[int, str]] = {}
    for i, layer in enumerate(host.layers):
        for part in PROJECTIONS:
            linears = layer.linears if part == "ffn" else [getattr(a, part) for a in layer.attentions]
            place |= {path_of[id(linear)]: (i, part) for linear in linears}
    if not paths or (unknown := sorted(paths - place.keys())):
        raise ValueError(f"{folder}: LoRA on {unknown[0] if paths else 'nothing'}, where {type(host.model).__name__} takes none; places: "
                         f"{', '.join(PROJECTIONS)}")
    where, layers = {part for _, part in map(place.get, paths)}, {i for i, _ in map(place.get, paths)}
    if left := sorted(path for path, (i, part) in place.items() if i in layers and part in where and path not in paths):
        raise ValueError(f"{folder}: LoRA is not on {left[0]} though on its like elsewhere; that mixture has no counterpart here")
    return tuple(part for part in PROJECTIONS if part in where), sorted(layers)
