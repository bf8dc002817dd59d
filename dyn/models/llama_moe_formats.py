"""Folders for plain Mixtral and Qwen2-MoE: what transformers, vLLM and (Mixtral) llama.cpp load without this package.

D hidden size, E routed experts, K experts per token, F expert width.
"""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, MixtralConfig, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2MoeConfig

from dyn.models.llama_moe import LlamaMoeForCausalLM
from dyn.models.llama_moe_card import push_to_hub as push_to_hub
from dyn.models.llama_moe_card import write_card as write_card
from dyn.models.llama_moe_config import SHARED_FIELDS, LlamaMoeConfig
from dyn.models.llama_moe_dense import INDEX, check_parameters
from dyn.models.llama_moe_official import from_official as from_official
from dyn.nn.experts import MoeFeedForward

COPIED = (*SHARED_FIELDS, "head_dim", "attention_dropout")
SHARD_BYTES = 4 << 30
Tokenizer = PreTrainedTokenizerBase | str | Path
Named = Iterator[tuple[str, Tensor]]


def to_mixtral(moe: LlamaMoeForCausalLM, d: str | Path, tokenizer: Tokenizer | None = None, fold_shared: bool = False) -> Path:
    """Write a folder that plain `MixtralForCausalLM` loads with equal logits; tensor names on disk are those of the Mixtral checkpoints.

    Every scale is folded into the down projections; noise is dropped, since evaluation has none; a uniform gate becomes zeros with K = E. Equal in
    float32; in 16 bits the folded product is rounded, and Mixtral's router computes in 16 bits where ours does in float32.

    Args:
        moe: the model; it stays as it is.
        d: the new folder, written under another name and renamed when whole.
        tokenizer: saved with it, chat template included: an object, or a folder or hub id of one.
        fold_shared: copy the shared neurons into every routed expert. Exact, since a token's scores sum to 1; costs E copies.

    Returns:
        The folder.

    Raises:
        ValueError: a setting without an exact form, naming the field; a tokenizer that does not fit; a folder that is not empty.
        OSError: the disk is full; nothing stays behind.
    """
    moe = _plain(moe)
    config = moe.config
    _check_exact(config, "Mixtral", "attention_bias", "attention_output_bias", "qk_norm")
    width, shared = config.of_layer("moe_intermediate_size", 0), config.shared_width(0)
    if shared and not fold_shared:
        raise ValueError(f"num_shared_experts={config.num_shared_experts} has no exact form in Mixtral but with fold_shared=True, which copies them into "
                         f"every expert ({width + shared} instead of {width} wide); to_qwen2_moe keeps them apart")
    if len(set(config.layer_types)) > 1:
        raise ValueError(f"layer_types={config.layer_types} has no exact form in Mixtral: it has one kind of attention in all layers")
    target = MixtralConfig(**_copied(config), intermediate_size=width + shared, num_local_experts=config.num_experts,
                           num_experts_per_tok=config.of_layer("num_experts_per_tok", 0),
                           sliding_window=config.sliding_window if config.layer_types[0] == "sliding_attention" else None)
    return _write(moe, d, tokenizer, target, "MixtralForCausalLM", _mixtral_block)


def to_qwen2_moe(moe: LlamaMoeForCausalLM, d: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """`to_mixtral` for models with shared experts: a folder that plain `Qwen2MoeForCausalLM` loads.

    Qwen2-MoE multiplies its shared expert by the sigmoid of a gate: a zero gate gives 1/2, and the shared down projection is stored doubled. Biases of
    q, k and v and mixed sliding windows are kept. Not for llama.cpp, whose Qwen2-MoE divides by that gate's logit and does not renormalise scores.

    Raises:
        ValueError, OSError: as in `to_mixtral`; ValueError also for a model without shared experts.
    """
    moe = _plain(moe)
    config = moe.config
    _check_exact(config, "Qwen2-MoE", "attention_output_bias", "qk_norm")
    if not config.shared_width(0):
        raise ValueError(f"num_shared_experts={config.num_shared_experts} has no exact form in Qwen2-MoE, which always has a shared expert; use to_mixtral")
    sliding = "sliding_attention" in config.layer_types
    target = Qwen2MoeConfig(**_copied(config), intermediate_size=config.intermediate_size, moe_intermediate_size=config.of_layer("moe_intermediate_size", 0),
                            shared_expert_intermediate_size=config.shared_width(0), num_experts=config.num_experts,
                            num_experts_per_tok=config.of_layer("num_experts_per_tok", 0), norm_topk_prob=True, qkv_bias=config.attention_bias,
                            use_sliding_window=sliding, sliding_window=config.sliding_window if sliding else None, layer_types=list(config.layer_types),
                            max_window_layers=config.num_hidden_layers)
    return _write(moe, d, tokenizer, target, "Qwen2MoeForCausalLM", _qwen2_moe_block)


def _plain(moe: LlamaMoeForCausalLM) -> LlamaMoeForCausalLM:
    """The model without torch.compile's wrapper. ValueError for another model, and for one whose weights are not by name and shape those of its kind."""
    moe = getattr(moe, "_orig_mod", moe)
    if not isinstance(moe, LlamaMoeForCausalLM):
        raise ValueError(f"moe is a {type(moe).__name__}; allowed: a LlamaMoeForCausalLM, as from_dense makes it")
    check_parameters(moe)
    return moe


def _check_exact(config: LlamaMoeConfig, target: str, *absent: str) -> None:
    """ValueError naming the first field that `target` has no exact form of; `absent` must be off."""
    if config.gate not in ("linear", "uniform"):
        raise ValueError(f"gate={config.gate!r} has no exact form in {target}; allowed: 'linear', 'uniform'")
    if config.balance == "bias":
        raise ValueError(f"balance='bias' has no exact form in {target}: its router has no selection bias")
    for name in absent:
        if getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)} has no exact form in {target}")
    for name in ("num_experts_per_tok", "moe_intermediate_size", "num_shared_experts"):
        if len({config.of_layer(name, i) for i in range(config.num_hidden_layers)}) > 1:
            raise ValueError(f"{name}={getattr(config, name)} has no exact form in {target}: it has one value for all layers")


def _copied(config: LlamaMoeConfig) -> dict:
    return {name: getattr(config, name) for name in COPIED} | {"rope_parameters": dict(config.rope_parameters)}


def _routed(mlp: MoeFeedForward, fold: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(gate [F, D], up [F, D], down [D, F]) of every expert, the scale in down; with `fold` the shared neurons follow, outside the scale."""
    scale, shared = float(mlp.score_scale), mlp.shared_experts if fold else None
    for gate_up_2FD, down_DF in zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True):
        gate_FD, up_FD = gate_up_2FD.chunk(2)
        if scale != 1.0:
            down_DF = down_DF * scale  # in 16 bits too one rounding: a Python number is not rounded first
        if shared is not None:
            gate_FD = torch.cat([gate_FD, shared.gate_proj.weight])
            up_FD = torch.cat([up_FD, shared.up_proj.weight])
            down_DF = torch.cat([down_DF, shared.down_proj.weight], dim=1)
        yield gate_FD, up_FD, down_DF


def _router(mlp: MoeFeedForward) -> Tensor:
    """[E, D]; zeros make equal scores, which with K = E is the uniform gate."""
    down_EDF = mlp.experts.down_proj
    return mlp.gate.weight if mlp.gate.kind == "linear" else down_EDF.new_zeros(down_EDF.shape[:2])


def _mixtral_block(mlp: MoeFeedForward) -> Named:
    yield "block_sparse_moe.gate.weight", _router(mlp)
    for e, (gate, up, down) in enumerate(_routed(mlp, fold=True)):
        yield f"block_sparse_moe.experts.{e}.w1.weight", gate
        yield f"block_sparse_moe.experts.{e}.w2.weight", down
        yield f"block_sparse_moe.experts.{e}.w3.weight", up


def _qwen2_moe_block(mlp: MoeFeedForward) -> Named:
    yield "mlp.gate.weight", _router(mlp)
    for e, (gate, up, down) in enumerate(_routed(mlp, fold=False)):
        yield f"mlp.experts.{e}.gate_proj.weight", gate
        yield f"mlp.experts.{e}.up_proj.weight", up
        yield f"mlp.experts.{e}.down_proj.weight", down
    shared = mlp.shared_experts
    yield "mlp.shared_expert.gate_proj.weight", shared.gate_proj.weight
    yield "mlp.shared_expert.up_proj.weight", shared.up_proj.weight
    yield "mlp.shared_expert.down_proj.weight", 2 * shared.down_proj.weight
    yield "mlp.shared_expert_gate.weight", shared.gate_proj.weight.new_zeros(1, shared.gate_proj.in_features)


def _tensors(moe: LlamaMoeForCausalLM, block: Callable[[MoeFeedForward], Named]) -> Named:
    """Every tensor of the new folder, made when asked for. (transformers' own `save_pretrained` would copy all expert weights at once.)"""
    for name, tensor in moe.state_dict().items():
        if ".mlp." not in name and not (moe.config.tie_word_embeddings and name == "lm_head.weight"):
            yield name, tensor
    for i, layer in enumerate(moe.model.layers):
        for name, tensor in block(layer.mlp):
            yield f"model.layers.{i}.{name}", tensor


def _write(moe: LlamaMoeForCausalLM, d: str | Path, tokenizer: Tokenizer | None, config: PreTrainedConfig, architecture: str,
           block: Callable[[MoeFeedForward], Named]) -> Path:
    """The whole folder, under a neighbouring name until it is complete."""
    folder = Path(d)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no empty folder; give a new one")
    tokenizer = _tokenizer(tokenizer, config.vocab_size)
    given = folder.is_dir()  # it may be a mount, a link or somebody's working directory: it is filled, not replaced
    part = (folder if given else folder.parent) / f".{folder.name}.{secrets.token_hex(4)}"
    part.mkdir(parents=True)
    try:
        config.architectures, config.dtype = [architecture], moe.dtype
        config.save_pretrained(part)
        _add_old_names(part / "config.json")
        moe.generation_config.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        with torch.no_grad():
            _save_shards(part, _tensors(moe, block))
        write_card(moe, part)
        if given:
            for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):  # last: without it the folder is no model
                file.rename(folder / file.name)
            part.rmdir()
        else:
            part.rename(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(errno.ENOSPC, f"the disk of {folder.parent} is full; nothing of {folder.name} stays behind") from error
        raise
    return folder


def _tokenizer(tokenizer: Tokenizer | None, vocab_size: int) -> PreTrainedTokenizerBase | None:
    if isinstance(tokenizer, (str, Path)):
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer={str(tokenizer)!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer is not None:
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
        if size > vocab_size:
            raise ValueError(f"the tokenizer has {size} tokens, the model vocab_size={vocab_size}: they do not belong together")
    return tokenizer


def _add_old_names(path: Path) -> None:
    """Readers older than transformers 5 look for rope_theta, rope_scaling and torch_dtype, and take other values, silently, where they are absent."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    config |= {"rope_theta": rope["rope_theta"], "torch_dtype": config["dtype"]} | ({"rope_scaling": rope} if rope["rope_type"] != "default" else {})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_shards(folder: Path, tensors: Named) -> None:
    """model.safetensors, or numbered files of at most SHARD_BYTES (larger single tensors apart) and their index; one file's worth is held at a time."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = tensor.detach().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for i, name in enumerate(names):
        (folder / f"part-{i}").rename(folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
