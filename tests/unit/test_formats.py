"""Refusals of the importer and the exporters, whole-or-nothing folders, tokenizers, model cards, the upload."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.hf_api import CommitInfo, RepoUrl
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM, PreTrainedTokenizerFast

import dyn.models  # noqa: F401
from dyn.models import llama_moe_formats
from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM, from_dense, from_official, to_mixtral, to_qwen2_moe, write_card
from dyn.models.llama_moe_card import CARD, MARKER

DENSE = dict(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32)


def tiny(**changes) -> LlamaMoeForCausalLM:
    torch.manual_seed(0)
    settings = DENSE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, gate="linear", gate_noise=False, score_scale=2.0)
    return LlamaMoeForCausalLM(LlamaMoeConfig(**(settings | changes))).eval()


def converted(source: str = "acme/small", license: str | None = "apache-2.0", **settings) -> LlamaMoeForCausalLM:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**DENSE)).eval()
    dense.config.name_or_path = dense.name_or_path = source
    return from_dense(dense, num_experts=4, num_experts_per_tok=2, license=license, seed=11, **settings)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w1", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")


def entries(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# --- exports -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("to", [to_mixtral, to_qwen2_moe])
def test_a_model_with_other_weights_is_refused_and_a_compiled_one_written(to, tmp_path):
    moe = tiny(num_shared_experts=1) if to is to_qwen2_moe else tiny()
    to(torch.compile(moe, backend="eager"), tmp_path / "compiled")
    to(moe, tmp_path / "plain")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("compiled", "plain"))
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    moe.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj.base_layer.weight is of shape .* absent: merge adapters"):
        to(moe, tmp_path / "adapted")
    with pytest.raises(ValueError, match="moe is a Linear; allowed: a LlamaMoeForCausalLM"):
        to(torch.nn.Linear(2, 2), tmp_path / "adapted")
    assert entries(tmp_path) == {"compiled", "plain"}


def test_a_damaged_manifest_costs_no_model(tmp_path):
    moe = converted()
    moe.save_pretrained(tmp_path / "inner")
    assert LlamaMoeForCausalLM.from_pretrained(tmp_path, subfolder="inner").construction.seed == 11
    (tmp_path / "inner" / "construction.json").write_text("{")
    with pytest.warns(UserWarning, match="construction.json or construction.safetensors beside it is damaged"):
        loaded = LlamaMoeForCausalLM.from_pretrained(tmp_path / "inner")
    assert loaded.construction is None and torch.equal(loaded.lm_head.weight, moe.lm_head.weight)


def test_a_damaged_index_is_named(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**DENSE)).save_pretrained(tmp_path, max_shard_size="5KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map"')
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is damaged or cut short .*fetch or save it anew"):
        from_dense(tmp_path, num_experts=4, num_experts_per_tok=2)


NO_EXACT_FORM = [
    ("gate='mlp'", dict(gate="mlp")),
    ("gate='switch'", dict(gate="switch", num_experts_per_tok=1)),
    ("gate='random'", dict(gate="random")),
    ("balance='bias'", dict(balance="bias")),
    ("attention_output_bias=True", dict(attention_output_bias=True)),
    ("qk_norm=True", dict(qk_norm=True)),
    ("num_experts_per_tok=[1, 2]", dict(num_experts_per_tok=[1, 2])),
    ("moe_intermediate_size=[8, 6]", dict(moe_intermediate_size=[8, 6])),
    ("num_shared_experts=[1, 2]", dict(num_shared_experts=[1, 2])),
]


@pytest.mark.parametrize(("field", "changes"), NO_EXACT_FORM, ids=[field for field, _ in NO_EXACT_FORM])
@pytest.mark.parametrize("export", [to_mixtral, to_qwen2_moe])
def test_no_exact_form_is_refused_by_field(tmp_path, export, field, changes):
    with pytest.raises(ValueError) as refusal:
        export(tiny(**({"num_shared_experts": 1} | changes)), tmp_path / "d")
    assert field in str(refusal.value)
    assert not entries(tmp_path)


@pytest.mark.parametrize(("field", "changes"), [
    ("attention_bias=True", dict(attention_bias=True)),
    ("fold_shared=True", dict(num_shared_experts=1)),
    ("layer_types=", dict(sliding_window=4, layer_types=["full_attention", "sliding_attention"])),
], ids=str)
def test_mixtral_refuses_what_qwen2_moe_takes(tmp_path, field, changes):
    with pytest.raises(ValueError, match=field):
        to_mixtral(tiny(**changes), tmp_path / "d")
    assert to_qwen2_moe(tiny(**({"num_shared_experts": 1} | changes)), tmp_path / "d").is_dir()


def test_qwen2_moe_needs_shared_experts(tmp_path):
    with pytest.raises(ValueError, match=r"num_shared_experts=0.*to_mixtral"):
        to_qwen2_moe(tiny(), tmp_path / "d")


def test_equal_lists_are_one_value(tmp_path):
    folder = to_mixtral(tiny(num_experts_per_tok=[2, 2], moe_intermediate_size=[8, 8], num_shared_experts=[1, 1]), tmp_path / "d", fold_shared=True)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_experts_per_tok"], config["intermediate_size"]) == (2, 16)


def test_a_used_folder_is_refused_and_an_empty_one_taken(tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    for target in (used, used / "thesis.txt"):
        with pytest.raises(ValueError, match="no empty folder"):
            to_mixtral(tiny(), target)
    assert entries(tmp_path) == {"used"} and entries(used) == {"thesis.txt"}
    (tmp_path / "empty").mkdir()
    assert to_mixtral(tiny(), str(tmp_path / "empty")) == tmp_path / "empty"
    assert {"config.json", "generation_config.json", "model.safetensors", CARD} == entries(tmp_path / "empty")


def test_an_empty_folder_is_filled_where_it_is(tmp_path, monkeypatch):
    """A link or a mount cannot be replaced, and a process that stands in the folder would lose it."""
    for name in ("real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "here")
    for target in (tmp_path / "link", "."):
        to_mixtral(tiny(), target)
    assert (tmp_path / "link").is_symlink() and Path.cwd() == tmp_path / "here"
    assert entries(tmp_path / "real") == entries(tmp_path / "here") == {"config.json", "generation_config.json", "model.safetensors", CARD}


@pytest.mark.parametrize(("error", "raised"), [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk of .* is full"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk of .* is full"),
    (OSError(errno.EIO, "broken disk"), "broken disk"),
    (KeyboardInterrupt("ctrl-c"), "ctrl-c"),
], ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None)
def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch, error, raised):
    (tmp_path / "given").mkdir()

    def fails(held, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(llama_moe_formats, "save_file", fails)
    with pytest.raises(OSError if isinstance(error, Exception) else KeyboardInterrupt, match=raised):
        to_mixtral(tiny(), tmp_path / "d")
    with pytest.raises(OSError if isinstance(error, Exception) else KeyboardInterrupt, match=raised):
        to_mixtral(tiny(), tmp_path / "given")
    assert entries(tmp_path) == {"given"} and not entries(tmp_path / "given")


def test_the_exported_model_stays_as_it_is(tmp_path):
    moe = tiny(num_shared_experts=1, learnable_scale=True)
    before, config = {k: v.clone() for k, v in moe.state_dict().items()}, moe.config.to_dict()
    to_mixtral(moe, tmp_path / "m", fold_shared=True)
    to_qwen2_moe(moe, tmp_path / "q")
    assert all(torch.equal(v, before[k]) for k, v in moe.state_dict().items()) and moe.config.to_dict() == config
    assert all(p.requires_grad for p in moe.parameters())


def test_tokenizer_with_chat_template(tmp_path):
    tokenizer, moe = word_tokenizer(40), tiny()
    tokenizer.save_pretrained(tmp_path / "t")
    for name, given in (("object", tokenizer), ("path", tmp_path / "t"), ("text", str(tmp_path / "t"))):
        loaded = AutoTokenizer.from_pretrained(to_mixtral(moe, tmp_path / name, given))
        assert loaded("w3 w39 unknown").input_ids == [3, 39, 0] and loaded.eos_token == "w1"
        assert loaded.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False) == "w7"


def test_tokenizer_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"49 tokens.*vocab_size=48"):
        to_mixtral(tiny(), tmp_path / "d", word_tokenizer(49))
    gaps = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"w0": 0, "far": 60}, unk_token="w0")), unk_token="w0")
    with pytest.raises(ValueError, match=r"61 tokens.*vocab_size=48"):
        to_mixtral(tiny(), tmp_path / "d", gaps)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer=.*none"):
        to_mixtral(tiny(), tmp_path / "d", tmp_path / "none")
    assert entries(tmp_path) == {"none"}


def test_readers_of_older_formats_find_their_fields(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.0}
    config = json.loads((to_mixtral(tiny(rope_parameters=dict(rope)), tmp_path / "d") / "config.json").read_text())
    assert config["rope_theta"] == 700.0 and config["rope_scaling"] == config["rope_parameters"] == rope and config["torch_dtype"] == "float32"
    assert config["architectures"] == ["MixtralForCausalLM"] and config["model_type"] == "mixtral"
    assert MixtralForCausalLM.from_pretrained(tmp_path / "d").config.rope_parameters == rope


# --- the released layout -------------------------------------------------------------------------------------------------------------


def released(folder: Path, **changes) -> Path:
    """A tiny folder in the released layout; a change to None takes the field out."""
    config = DENSE | {"model_type": "llama_moe", "num_experts": 2, "num_selects": 1, "size_experts": [[16, 16], [16, 16]], "score_scale_factor": 2.0} | changes
    D, weights = 16, {"model.embed_tokens.weight": torch.randn(48, 16), "model.norm.weight": torch.ones(16), "lm_head.weight": torch.randn(48, 16)}
    for p in ("model.layers.0.", "model.layers.1."):
        weights |= {f"{p}self_attn.{n}_proj.weight": torch.randn(D, D) for n in "qkvo"}
        weights |= {f"{p}{n}_layernorm.weight": torch.ones(D) for n in ("input", "post_attention")}
        weights |= {f"{p}mlp.gate.{n}.weight": torch.randn(2, width) for n, width in (("gate_network.0", D), ("gate_network.2", 2), ("weight_noise", D))}
        for e in range(2):
            bank = f"{p}mlp.calculator.experts.weight"
            weights |= {f"{bank}_gate.{e}": torch.randn(16, D), f"{bank}_up.{e}": torch.randn(16, D), f"{bank}_down.{e}": torch.randn(D, 16)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("message", "changes"), [
    (r"size_experts of layer 1 is \[10, 22\]", {"size_experts": [[16, 16], [10, 22]]}),
    (r"size_experts of layer 0 is \[16, 8, 8\]", {"size_experts": [[16, 8, 8], [16, 16]]}),
    ("num_experts=0 must be a whole number above 0", {"num_experts": 0}),
    ("num_experts='4' must be a whole number above 0", {"num_experts": "4"}),
    (r"rope_scaling=\[1\] is not supported", {"rope_scaling": [1]}),
    (r"rope_scaling=\{'type': 'foo'\} is not supported; allowed: null, or a type of ", {"rope_scaling": {"type": "foo"}}),
    ("config.json: .*moe_intermediate_size", {"size_experts": "big"}),
    ("config.json: .*score_scale", {"score_scale_factor": "x"}),
    (r"size_experts has 1 entries for 2 layers", {"size_experts": [[16, 16]]}),
    (r"num_experts=3 does not divide intermediate_size=32", {"num_experts": 3, "size_experts": None}),
    ("calculator_type='SwitchDropTokenCalculator'", {"calculator_type": "SwitchDropTokenCalculator"}),
    ("gate_type='SwitchBalancedGate'", {"gate_type": "SwitchBalancedGate"}),
    ("gate_network='conv'", {"gate_network": "conv"}),
    ("gate_use_softmax=False", {"gate_use_softmax": False}),
    ("multiply_gate_scores=False", {"multiply_gate_scores": False}),
    (r"lacks 2 tensors.*layers\.0\.mlp\.calculator\.mlp_norm\.weight", {"add_weight_norm": True}),
    ("model_type='llama'", {"model_type": "llama"}),
    ("score_scale", {"score_scale_factor": [1.0, 2.0, 3.0]}),
    ("num_experts_per_tok=3", {"num_selects": 3}),
    (r"lacks 12 tensors.*weight_down\.2, .*, \.\.\.", {"num_experts": 4, "size_experts": [[16] * 4] * 2}),
    (r"has too many: \d+ tensors.*layers\.1\.", {"num_hidden_layers": 1, "size_experts": None}),
    (r"lm_head\.weight has shape \[48, 16\]; the configuration says \[50, 16\]|embed_tokens\.weight has shape \[48, 16\]", {"vocab_size": 50}),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else None)
def test_official_refusals_name_the_field(tmp_path, message, changes):
    with pytest.raises(ValueError, match=message):
        from_official(released(tmp_path / "d", **changes))


def test_an_official_configuration_that_is_none(tmp_path):
    (released(tmp_path / "d") / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json holds a list; a configuration is an object"):
        from_official(tmp_path / "d")


def test_official_defaults_of_absent_fields(tmp_path):
    model = from_official(released(tmp_path / "d", size_experts=None, score_scale_factor=None))
    config = model.config
    assert (config.moe_intermediate_size, config.score_scale, config.rms_norm_eps) == (16, 1.0, 1e-6)
    assert (config.gate, config.gate_noise, config.balance) == ("mlp", True, "importance_load")
    assert from_official(released(tmp_path / "e", gate_use_balance=False, capacity_factor=9.0, drop_tokens=False)).config.balance == "none"
    scaled = from_official(released(tmp_path / "f", rope_scaling={"type": "linear", "factor": 2.0}))
    assert scaled.config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def test_official_noise_weights_are_left_out_where_noise_is_off(tmp_path):
    """The official converter writes them always."""
    model = from_official(released(tmp_path / "d", gate_add_noise=False))
    assert not model.config.gate_noise and not any("noise" in name for name in model.state_dict())


def test_official_generation_config(tmp_path):
    folder = released(tmp_path / "d")
    GenerationConfig(max_new_tokens=7).save_pretrained(folder)
    assert from_official(folder).generation_config.max_new_tokens == 7


def test_official_needs_whole_safetensors(tmp_path):
    folder = released(tmp_path / "d")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*cut short"):
        from_official(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is pickled.*only safetensors"):
        from_official(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no safetensors weights"):
        from_official(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-00001-of-00001\.safetensors cannot be read"):
        from_official(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        from_official(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no model folder: it has no config\.json"):
        from_official(folder)


@pytest.mark.parametrize("name", ["nobody/nothing", "/not/there", "a/b/c"])
def test_official_folder_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"{name} is neither a folder nor a model of the hub"):
        from_official(name)


def test_official_from_the_hub(tmp_path, monkeypatch):
    """By id, through the hub client, and never its pickles or code."""
    folder, asked = released(tmp_path / "d"), {}

    def download(repo_id, *, allow_patterns):
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("dyn.models.llama_moe_official.snapshot_download", download)
    assert from_official("acme/llama-moe").config.num_experts == 2
    assert asked["repo_id"] == "acme/llama-moe" and not any(Path(f).match(p) for f in ("model.bin", "modeling.py", "x.pt") for p in asked["patterns"])
    assert all(any(Path(f).match(p) for p in asked["patterns"]) for f in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.model"))


# --- cards and the hub ---------------------------------------------------------------------------------------------------------------


def test_card_of_a_conversion(tmp_path):
    moe = converted()
    moe.save_pretrained(tmp_path / "d")
    path = write_card(moe, tmp_path / "d", data={"code": 0.25, "docs | more": 0.75}, results={"perplexity": 12.34567, "tokens": 1000})
    card = ModelCard.load(path)
    assert card.data.to_dict() == {"license": "apache-2.0", "base_model": "acme/small", "library_name": "transformers", "pipeline_tag": "text-generation",
                                   "tags": ["mixture-of-experts", "moe", "llama-moe", "dyn"]}
    total = sum(p.numel() for p in moe.parameters())
    gates, idle = 2 * 4 * 16, 3 * 16 * 32 * 2 // 2
    for text in (MARKER, "import dyn.models", f"{total:,} in these files", f"{total - gates - idle:,} active", "| method | random |", "| seed | 11 |",
                 moe.construction.source_hash, "| code | 0.25 |", "| docs \\| more | 0.75 |", "| perplexity | 12.35 |", "| tokens | 1000 |", "apache-2.0"):
        assert text in card.content, text


@pytest.mark.parametrize(("source", "license", "expected"), [
    ("acme/small", None, {"base_model": "acme/small"}),
    ("local-folder", "llama2", {"license": "llama2"}),
    ("acme/small", "My Own Licence, v2", {"license": "other", "license_name": "my-own-licence-v2", "base_model": "acme/small"}),
])
def test_card_metadata_is_valid_for_the_hub(tmp_path, source, license, expected):
    moe = converted()
    moe.construction.source, moe.construction.source_license = source, license
    written = ModelCard.load(write_card(moe, tmp_path)).data.to_dict()
    assert {k: v for k, v in written.items() if k in ("license", "license_name", "base_model")} == expected


def test_card_keeps_what_others_wrote(tmp_path, caplog):
    moe, path = converted(), tmp_path / CARD
    path.write_text("my own words\n")
    assert write_card(moe, tmp_path) is None and path.read_text() == "my own words\n" and "stays as it is" in caplog.text
    path.unlink()
    assert write_card(moe, tmp_path, data="first") == path
    assert write_card(moe, tmp_path, data="second") == path and "second" in path.read_text() and "first" not in path.read_text()
    with pytest.raises(ValueError, match="no folder"):
        write_card(moe, tmp_path / "none")


def test_data_and_results_travel_in_the_manifest(tmp_path):
    moe = converted()
    moe.construction.details |= {"data": "the library's own sources", "results": {"loss": 2.5}}
    moe.save_pretrained(tmp_path / "a")
    again = LlamaMoeForCausalLM.from_pretrained(tmp_path / "a")
    for folder in (to_mixtral(again, tmp_path / "m"), tmp_path / "a"):
        text = (folder / CARD).read_text()
        assert "the library's own sources" in text and "| loss | 2.5 |" in text and "| data |" not in text


def test_cards_of_exports_say_how_to_load_and_count_what_is_stored(tmp_path):
    moe = converted(num_shared_experts=4, gate_noise=True)
    for folder, words in ((to_mixtral(moe, tmp_path / "m", fold_shared=True), ("MixtralForCausalLM", "convert_hf_to_gguf.py", "vllm serve")),
                          (to_qwen2_moe(moe, tmp_path / "q"), ("Qwen2MoeForCausalLM", "Not for llama.cpp", "vllm serve"))):
        card = (folder / CARD).read_text()
        stored = load_file(folder / "model.safetensors")
        assert "import dyn" not in card and all(word in card for word in words)
        assert f"{sum(t.numel() for t in stored.values()):,} in these files" in card
        gates = sum(t.numel() for name, t in stored.items() if ".gate.weight" in name or "shared_expert_gate" in name)
        routed = sum(t.numel() for name, t in stored.items() if ".experts." in name)
        assert f"{sum(t.numel() for t in stored.values()) - gates - routed // 2:,} active" in card


def test_card_without_a_construction(tmp_path):
    card = ModelCard.load(write_card(tiny(), tmp_path))
    assert "base_model" not in card.data.to_dict() and "Not recorded." in card.content


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in memory: what was uploaded, and the card that the repository has."""
    state = {"files": {}, "card": None}

    def create_repo(self, repo_id, **kwargs):
        state["created"] = repo_id
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, **kwargs):
        state["files"] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir() if p.name not in (ignore_patterns or [])}
        return CommitInfo(commit_url=f"https://huggingface.co/{repo_id}/commit/0", commit_message="m", commit_description="", oid="0")

    def download(self, repo_id, filename, **kwargs):
        (tmp_path / "theirs.md").write_text(state["card"])
        return str(tmp_path / "theirs.md")

    def forbidden(self, *args, **kwargs):
        pytest.fail("transformers' own upload ran, which replaces the card")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo_id, filename, **kwargs: state["card"] is not None)
    monkeypatch.setattr(HfApi, "hf_hub_download", download)
    monkeypatch.setattr(HfApi, "create_commit", forbidden)
    return state


@pytest.mark.parametrize("theirs", [None, f"{MARKER} an older card"])
def test_push_to_hub(hub, tmp_path, theirs):
    hub["card"] = theirs
    moe = converted()
    assert "acme/moe" in moe.push_to_hub("acme/moe", private=True, tags=["tiny"])
    assert hub["created"] == "acme/moe"
    assert {"config.json", "generation_config.json", "model.safetensors", "construction.json", "construction.safetensors", CARD} == hub["files"].keys()
    card = hub["files"][CARD].decode()
    assert MARKER in card and "acme/small" in card and "tiny" in ModelCard(card).data.tags
    for name, content in hub["files"].items():
        (tmp_path / name).write_bytes(content)
    again = LlamaMoeForCausalLM.from_pretrained(tmp_path)
    assert again.construction.source_hash == moe.construction.source_hash
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), moe.state_dict().values(), strict=True))


def test_push_leaves_somebody_elses_card(hub):
    hub["card"] = "words of the owner"
    converted().push_to_hub("acme/moe")
    assert CARD not in hub["files"] and "model.safetensors" in hub["files"]


def test_save_pretrained_can_push(hub, tmp_path):
    converted().save_pretrained(tmp_path / "d", push_to_hub=True, repo_id="acme/moe")
    assert MARKER in hub["files"][CARD].decode() and "construction.json" in hub["files"] and MARKER in (tmp_path / "d" / CARD).read_text()
