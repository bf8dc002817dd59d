"""The dense decoders that conversions start from: read, refused where they do not fit, and taken out of what is wrapped around them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
INDEX = "model.safetensors.index.json"


def read_config(path: nn.Module | str | Path) -> PretrainedConfig:
    """Configuration of a dense decoder: an object, in a folder, or on the hub. ValueError for a folder that is none, damaged weights, or a family that does
    not fit."""
    if isinstance(path, nn.Module):
        if not hasattr(path, "config"):
            raise ValueError(f"{type(path).__name__} has no config: give a causal language model of transformers")
        check_family(path.config)
        return path.config
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{str(path) or repr('')} is no model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"{path} is no model that transformers can load: {str(error).splitlines()[0]}") from error
    check_family(config)
    check_weights(path)
    return config


def check_weights(path: str | Path, repair: str = "fetch or save it anew") -> None:
    """Raise ValueError for a safetensors file of a folder that is cut short or damaged at its head, found without reading the weights; `repair`: what to do."""
    if (index := Path(path) / INDEX).is_file():
        shard_names(index, repair)
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged or cut short ({error}); {repair}") from error


def load_dense(path: str | Path, **changes) -> PreTrainedModel:
    """A dense decoder from a folder or hub id, in its own dtype, safetensors only; `changes` go into its configuration. ValueError as in `read_config`."""
    read_config(path)
    try:
        net, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True, output_loading_info=True, **changes)
    except (OSError, RuntimeError) as error:  # RuntimeError: weights of other shapes than the configuration says
        raise ValueError(f"{path} is no model that transformers can load: {str(error).splitlines()[0]}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path} lacks {len(missing)} weights of {type(net).__name__}, {missing[0]} first; they would be random: fetch or save it anew")
    return net


def fresh(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A decoder with random weights from torch's global generator: dense or a mixture, as its configuration says."""
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def check_family(config) -> None:
    """Raise ValueError naming the first field of a configuration that does not fit."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type={config.model_type!r} does not fit; allowed: {', '.join(FAMILIES)}")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r} does not fit: experts are SwiGLU, so only 'silu' is allowed")
    if getattr(config, "mlp_bias", False):
        raise ValueError("mlp_bias=True does not fit: experts have no biases")


def causal(dense: Any) -> Any:
    """A decoder itself, without torch.compile's wrapper, or the folder or hub id of one. ValueError for anything else, for a network without a language-model
    head, and for one with other weights than its configuration says (adapters, quantisation, parametrisations)."""
    dense = getattr(dense, "_orig_mod", dense)
    if torch.is_inference_mode_enabled():
        raise ValueError("leave torch.inference_mode() first: what is made in it cannot be trained")
    if isinstance(dense, (str, Path)):
        return dense
    if not isinstance(dense, nn.Module):
        raise ValueError(f"dense is a {type(dense).__name__}; allowed: a causal language model, or the folder or hub id of one")
    read_config(dense)
    if not (hasattr(dense, "lm_head") and hasattr(getattr(dense, "model", None), "layers")):
        raise ValueError(f"{type(dense).__name__} has no model.layers or no lm_head; give the causal language model, as AutoModelForCausalLM makes it")
    for name, module in dense.model.layers.named_modules():
        if name.endswith("_proj") and not (type(module) is nn.Linear and module.weight.is_floating_point()):
            raise ValueError(f"model.layers.{name} is a {type(module).__name__}, where an nn.Linear of floating numbers was expected: merge adapters into the "
                             "weights, or take the weights from before quantisation")
    check_parameters(dense)
    return dense


def check_parameters(net: PreTrainedModel) -> None:
    """Raise ValueError for a decoder whose weights are not, by name and shape, those that its configuration says."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in fresh(copy.deepcopy(net.config)).state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    if stray := [name for name in (*given, *wanted) if given.get(name) != wanted.get(name)]:
        was, said = (f"of shape {list(shapes[stray[0]])}" if stray[0] in shapes else "absent" for shapes in (given, wanted))
        raise ValueError(f"{stray[0]} is {was}, by the model's configuration {said}: merge adapters and parametrisations into the weights, give layers without "
                         "wrappers (module.compile() needs none), take out what is not the model's, or set the configuration right")
    head, embeddings = net.get_output_embeddings().weight, net.get_input_embeddings().weight
    if net.config.tie_word_embeddings and head is not embeddings and not head.is_meta and not torch.equal(head, embeddings):
        raise ValueError(f"lm_head.weight {list(head.shape)} is not the input embeddings, as config.tie_word_embeddings=True says; set that to False")


def shard_names(index: Path, repair: str = "fetch or save it anew") -> list[str]:
    """The files that an index of shards names. ValueError for an index that cannot be read; `repair`: what to do."""
    try:
        return sorted({"" + name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged or cut short ({error!r}); {repair}") from error


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Within the block, or the decorated function, no autocast, and float32 and the CPU as defaults: a caller's settings change no conversion. The default
    type is the process's: other threads see it too."""
    kinds, default = {"cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")}, torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, default)
        yield
