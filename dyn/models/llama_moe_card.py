"""Model card of an exported folder, and the hub upload that keeps it."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCard, ModelCardData

from dyn.nn.surgery import count_parameters

if TYPE_CHECKING:
    from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM

CARD = "README.md"
MARKER = "<!-- written by dyn; delete this line to keep your own text from being replaced -->"
log = logging.getLogger(__name__)

LOAD_OWN = """```python
import dyn.models  # registers the family
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
```"""
LOAD_PLAIN = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")  # {architecture}; nothing else is needed
```

vLLM reads the same files: `vllm serve FOLDER`. {llama_cpp}

The scale of the routed experts is folded into their down projections. In float32 the logits are those of the exported model; in 16 bits
that product is rounded, and the router computes in the model's dtype instead of float32, so that near ties another expert may be chosen."""
LLAMA_CPP = {"mixtral": "For llama.cpp: `python convert_hf_to_gguf.py FOLDER`.",
             "qwen2_moe": "Not for llama.cpp: its Qwen2-MoE does not renormalise the chosen scores, and divides by the shared gate's logit, zero here."}


def write_card(moe: LlamaMoeForCausalLM, folder: str | Path, *, data: str | Mapping[str, object] | None = None,
               results: Mapping[str, object] | None = None) -> Path | None:
    """Write README.md, the model card, into an exported folder: what it is, source and licence, construction, data, results, how to load.

    Args:
        moe: the model that was exported.
        folder: the export; its config.json says which format it has (none: this package's own).
        data: what it was trained on, a sentence or a mapping name -> share; None: `moe.construction.details["data"]`, where there is one.
        results: metric -> value; None: `moe.construction.details["results"]`, where there is one. Kept there, both travel with the model's manifest.

    Returns:
        The card's path; None where the folder holds a card of somebody else, which stays as it is.

    Raises:
        ValueError: `folder` is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: save the model there first")
    path = folder / CARD
    if path.exists() and MARKER not in path.read_text(encoding="utf-8"):
        log.warning("%s was not written by dyn and stays as it is", path)
        return None
    stored = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    details = moe.construction.details if moe.construction is not None else {}
    text = _text(moe, stored, details.get("data") if data is None else data, details.get("results") if results is None else results)
    path.write_text(text, encoding="utf-8")
    return path


def push_to_hub(moe: LlamaMoeForCausalLM, repo_id: str, *, commit_message: str = "Upload model", commit_description: str | None = None,
                private: bool | None = None, token: str | bool | None = None, revision: str | None = None, create_pr: bool = False,
                max_shard_size: int | str = "5GB", tags: list[str] | None = None) -> str:
    """Save the model and upload the folder: weights, configuration, manifest and card. Returns the commit's address.

    transformers' own method puts an empty template in the place of the card. A card in the repository that dyn did not write stays as it is.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        moe.save_pretrained(folder, max_shard_size=max_shard_size)
        path = write_card(moe, folder)
        if tags:
            card = ModelCard.load(path)
            card.data.tags = list(dict.fromkeys([*card.data.tags, *tags]))
            card.save(path)
        theirs = api.hf_hub_download(repo_id, CARD, revision=revision) if api.file_exists(repo_id, CARD, revision=revision) else None
        foreign = theirs is not None and MARKER not in Path(theirs).read_text(encoding="utf-8")
        if foreign:
            log.warning("the card of %s was not written by dyn and stays as it is", repo_id)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, commit_description=commit_description,
                                   revision=revision, create_pr=create_pr, ignore_patterns=[CARD] if foreign else None)
        return str(commit)


def _text(moe: LlamaMoeForCausalLM, stored: dict, data: str | Mapping[str, object] | None, results: Mapping[str, object] | None) -> str:
    config, made = moe.config, moe.construction
    source, license = (made.source, made.source_license) if made is not None else (None, None)
    kind = stored.get("model_type", config.model_type)
    total, active = _parameters(moe, stored)
    shared = f", beside {_each(config.num_shared_experts)} shared" if any(map(config.shared_width, range(config.num_hidden_layers))) else ""
    scale = "a learned scale" if config.learnable_scale else _each(config.score_scale)
    load = LOAD_OWN if kind == config.model_type else LOAD_PLAIN.format(architecture=stored["architectures"][0], llama_cpp=LLAMA_CPP[kind])
    how = "Not recorded."
    if made is not None:
        rows = {"method": made.method, "seed": made.seed, **made.details, "SHA-256 of the dense feed-forward weights": made.source_hash}
        how = _table({name: value for name, value in rows.items() if name not in ("data", "results")})
    return "\n\n".join([
        f"---\n{_front_matter(source, license)}\n---\n{MARKER}",
        f"# {source.rsplit('/', 1)[-1]} as a mixture of experts" if source else "# A mixture of experts",
        f"A decoder in which every feed-forward network is a mixture: {config.num_experts} experts of width {_each(config.moe_intermediate_size)}, of which "
        f"{_each(config.num_experts_per_tok)} act on a token{shared} (gate: {config.gate}; routed outputs times {scale}). {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, {str(moe.dtype).removeprefix('torch.')}.",
        f"Parameters: {total:,} in these files, {active:,} active for a token (gates apart).",
        f"## Source\n\nWeights: {source or 'not recorded'}. Licence of the source: {license or 'not known here'}.",
        f"## Construction\n\n{how}",
        "## Data\n\n" + (data if isinstance(data, str) else _table(data, "share") if data
                         else f"No training{' after the construction' if made else ''} is recorded."),
        "## Results\n\n" + (_table(results) if results else "None recorded."),
        f"## How to load\n\n{load}",
    ]) + "\n"


def _front_matter(source: str | None, license: str | None) -> str:
    known = {"license": license} if license and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license) else {}
    if license and not known:  # the hub takes identifiers only
        known = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-")}
    base = {"base_model": source} if source and re.fullmatch(r"[\w.-]+/[\w.-]+", source) else {}
    tags = ["mixture-of-experts", "moe", "llama-moe", "dyn"]
    return ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **known, **base).to_yaml()


def _parameters(moe: LlamaMoeForCausalLM, stored: dict) -> tuple[int, int]:
    """(all, active for a token without gates) of the format that `stored`, a config.json, describes."""
    config: LlamaMoeConfig = moe.config
    counts = count_parameters(moe)
    if stored.get("model_type", config.model_type) == config.model_type:
        return counts["total"], counts["active"]
    outside = sum(p.numel() for name, p in moe.named_parameters() if ".mlp." not in name)
    width, shared = stored.get("moe_intermediate_size", stored["intermediate_size"]), stored.get("shared_expert_intermediate_size", 0)
    E, D, L = config.num_experts, config.hidden_size, config.num_hidden_layers
    routed, always, gates = 3 * L * E * D * width, 3 * L * D * shared, L * D * (E + bool(shared))
    return outside + routed + always + gates, outside + always + routed * stored["num_experts_per_tok"] // E


def _each(value: object) -> str:
    return ", ".join(f"{v:g}" for v in value) + " (by layer)" if isinstance(value, list) else f"{value:g}"


def _table(rows: Mapping[str, object], head: str = "value") -> str:
    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    return "\n".join([f"| | {head} |", "|---|---|", *(f"| {cell(name)} | {cell(value)} |" for name, value in rows.items())])
