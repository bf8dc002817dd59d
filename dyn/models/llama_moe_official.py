"""Reads the released LLaMA-MoE-v1 checkpoints (LLaMA-MoE specification, appendix).

D hidden size, E routed experts, F expert width.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dyn.models.llama_moe import LlamaMoeForCausalLM, filled
from dyn.models.llama_moe_config import SHARED_FIELDS, LlamaMoeConfig
from dyn.models.llama_moe_dense import INDEX, shard_names

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
FIXED = {"gate_type": "TopKBalancedNoisyGate", "gate_use_softmax": True, "calculator_type": "UniversalCalculator", "multiply_gate_scores": True}
COPIED = (*SHARED_FIELDS, "intermediate_size")
RENAMED = {  # inside `mlp.`: ours -> theirs
    "gate.weight": "gate.gate_network.weight",
    "gate.network.0.weight": "gate.gate_network.0.weight",
    "gate.network.2.weight": "gate.gate_network.2.weight",
    "gate.noise.weight": "gate.weight_noise.weight",
    "score_scale": "calculator.mlp_norm.weight",
}


def from_official(d: str | Path, dtype: torch.dtype | None = None) -> LlamaMoeForCausalLM:
    """Read a LLaMA-MoE-v1 checkpoint (model_type "llama_moe"): logits in evaluation are those of the official code.

    Safetensors only, sharded or not, copied tensor by tensor into the stacked weights; no code of the folder is run. Further training differs from
    the official code in one point, its faulty load estimator, which `config.legacy_load` would bring back.

    Args:
        d: a local folder, or a hub id.
        dtype: None: that of the embeddings in the files.

    Raises:
        ValueError: a folder that is no such model, pickled or truncated weights, a setting that our model has no form of, tensors that are missing,
            left over or of another shape. The message names it.
    """
    folder = _fetch(d)
    config = _config(folder)
    files = _open(folder)
    with torch.device("meta"):
        moe = LlamaMoeForCausalLM._from_config(config, dtype=dtype or _dtype(files))
    wanted = {key: meta for key, meta in moe.state_dict().items() if not (config.tie_word_embeddings and key == "lm_head.weight")}
    names = {key: _names(key, config.num_experts) for key in wanted}
    unused = () if config.gate_noise else (RENAMED["gate.noise.weight"],)  # written with noise or without
    _check_names(folder, {name for of_key in names.values() for name in of_key}, {name for name in files if not name.endswith(unused)})
    state = {}
    for key, meta in wanted.items():
        state[key] = torch.empty_like(meta, device="cpu")
        parts = state[key].view(len(names[key]), -1, meta.shape[-1]) if ".mlp.experts." in key else [state[key]]
        for part, name in zip(parts, names[key], strict=True):
            given = files[name].get_slice(name).get_shape()
            if given != list(part.shape):
                raise ValueError(f"{folder}: {name} has shape {given}; the configuration says {list(part.shape)}")
            part.copy_(files[name].get_tensor(name))  # copied, since what safetensors hands out is the mapped file itself
    filled(moe, state, torch.device("cpu"))
    if (folder / "generation_config.json").is_file():
        moe.generation_config = GenerationConfig.from_pretrained(folder)
    return moe.eval()


def _fetch(d: str | Path) -> Path:
    """The folder itself, or the hub's files in the cache."""
    if Path(d).exists():
        if not (Path(d) / "config.json").is_file():
            raise ValueError(f"{d} is no model folder: it has no config.json")
        return Path(d)
    try:
        return Path(snapshot_download(str(d), allow_patterns=HUB_FILES))
    except (HFValidationError, OSError) as error:
        raise ValueError(f"{d} is neither a folder nor a model of the hub within reach: {str(error).splitlines()[0]}") from error


def _config(folder: Path) -> LlamaMoeConfig:
    """Our configuration for a released one; absent fields default as in the official class. drop_tokens and capacity_factor have no effect there either."""
    where = folder / "config.json"
    try:
        given = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{where} holds a {type(given).__name__}; a configuration is an object")
    if given.get("model_type") != "llama_moe":
        raise ValueError(f"{where}: model_type={given.get('model_type')!r}; from_official reads 'llama_moe', AutoModelForCausalLM.from_pretrained the others")
    given = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_experts": 16, **given}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_experts"):
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"{where}: {name}={given[name]!r} must be a whole number above 0")
    for name, allowed in FIXED.items():
        if given.get(name, allowed) != allowed:
            raise ValueError(f"{where}: {name}={given[name]!r} is not supported; allowed: {allowed!r}")
    network = given.get("gate_network", "mlp")
    if network not in ("mlp", "linear"):
        raise ValueError(f"{where}: gate_network={network!r} is not supported; allowed: 'mlp', 'linear'")
    rope = given.get("rope_scaling") or {}
    kind = rope.get("type", rope.get("rope_type", "default")) if isinstance(rope, dict) else None
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(f"{where}: rope_scaling={rope!r} is not supported; allowed: null, or a type of {', '.join(ROPE_INIT_FUNCTIONS)}")
    rope = {name: value for name, value in rope.items() if name != "type"} | {"rope_type": kind}
    try:
        return LlamaMoeConfig(
            **{name: given[name] for name in COPIED if name in given},
            head_dim=given["hidden_size"] // given["num_attention_heads"],
            rope_parameters={"rope_theta": given.get("rope_theta", 10000.0), **rope},
            num_experts=given["num_experts"],
            num_experts_per_tok=given.get("num_selects", 4),
            moe_intermediate_size=_widths(given, where),
            score_scale=given.get("score_scale_factor", 1.0),
            learnable_scale=given.get("add_weight_norm", False),
            gate=network,
            gate_noise=given.get("gate_add_noise", True),
            noise_epsilon=given.get("gate_noise_epsilon", 0.01),
            balance="importance_load" if given.get("gate_use_balance", True) else "none",
            balance_weight=given.get("gate_balance_loss_weight", 0.01),
        )
    except StrictDataclassError as error:
        raise ValueError(f"{where}: {error}") from error


def _widths(given: dict, where: Path) -> int | list[int]:
    """moe_intermediate_size out of size_experts: absent, a width, one a layer, or for each layer the list of its experts' widths."""
    E, layers, sizes = given["num_experts"], given["num_hidden_layers"], given.get("size_experts")
    if sizes is None:
        if given["intermediate_size"] % E:
            raise ValueError(f"{where}: num_experts={E} does not divide intermediate_size={given['intermediate_size']}, and there are no size_experts")
        return given["intermediate_size"] // E
    by_layer = [layer if isinstance(layer, list) else [layer] * E for layer in (sizes if isinstance(sizes, list) else [sizes] * layers)]
    for i, layer in enumerate(by_layer):
        if len(layer) != E or len(set(layer)) > 1:
            raise ValueError(f"{where}: size_experts of layer {i} is {layer}; only {E} experts of one width are supported")
    if len(by_layer) != layers:
        raise ValueError(f"{where}: size_experts has {len(by_layer)} entries for {layers} layers")
    widths = [layer[0] for layer in by_layer]
    return widths[0] if len(set(widths)) == 1 else widths


def _open(folder: Path) -> dict[str, safe_open]:
    """The open file of every tensor in a folder."""
    if (folder / INDEX).is_file():
        paths = [folder / name for name in shard_names(folder / INDEX)]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = sorted(p.name for ending in ("bin", "pt", "pth") for p in folder.glob(f"*.{ending}"))
        why = f": {', '.join(pickled[:3])} is pickled, which can run code, so only safetensors are read" if pickled else ""
        raise ValueError(f"{folder} has no safetensors weights{why}")
    files: dict[str, safe_open] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read, missing or cut short: {error}") from error
        files.update(dict.fromkeys(file.keys(), file))
    return files


def _dtype(files: dict[str, safe_open]) -> torch.dtype | None:
    name = "model.embed_tokens.weight"
    return files[name].get_slice(name)[:1].dtype if name in files else None


def _names(key: str, E: int) -> list[str]:
    """The released tensors that make up one of ours, in stacking order."""
    head, mlp, tail = key.partition(".mlp.")
    bank = f"{head}{mlp}calculator.experts.weight"
    if tail == "experts.gate_up_proj":
        return [f"{bank}_{kind}.{e}" for e in range(E) for kind in ("gate", "up")]
    if tail == "experts.down_proj":
        return [f"{bank}_down.{e}" for e in range(E)]
    return [f"{head}{mlp}{RENAMED[tail]}" if mlp else key]


def _check_names(folder: Path, wanted: set[str], given: set[str]) -> None:
    extra = {name for name in given - wanted if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight"}
    for what, names in (("lacks", wanted - given), ("has too many:", extra)):
        if names:
            shown = ", ".join(sorted(names)[:4])
            raise ValueError(f"{folder} {what} {len(names)} tensors of its configuration's model: {shown}{', ...' if len(names) > 4 else ''}")
