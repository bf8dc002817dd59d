"""LoRA against peft's: outputs and gradients on equal weights, folders in both directions."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dyn.nn.adapter import adapter_parameters, attach, export_peft, head_parameters, import_peft, load_adapter, merge, save_adapter
from dyn.nn.adapter_sites import adapter_modules
from dyn.nn.masking import masks, prune

peft = pytest.importorskip("peft")

TARGETS = {"bert": ["query", "value"], "roberta": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "bart": ["q_proj", "v_proj"],
           "llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"], "llama_moe": ["q_proj", "v_proj"]}


def stir(model, name="default"):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (*adapter_parameters(model, name).values(), *head_parameters(model, name).values()):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def twins(tiny_host, family, task):
    """Our LoRA and peft's, rank 4 and alpha 8, with equal weights."""
    ours = stir(attach(tiny_host(family, task), "lora", 4, alpha=8.0, head=False))
    theirs = peft.get_peft_model(tiny_host(family, task), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[family])).eval()
    pairs = {}
    for key, p in adapter_parameters(ours).items():
        path, _, part = key.partition(".lora.default.")
        pairs[p] = theirs.get_parameter(f"base_model.model.{path}.lora_{part[0]}.default.weight")
        pairs[p].data.copy_(p.data)
    return ours, theirs, pairs


@pytest.mark.parametrize(("family", "task"), [("bert", "classify"), ("roberta", "qa"), ("distilbert", "classify"), ("bart", "lm"), ("llama", "lm"),
                                              ("qwen2", "classify"), ("llama_moe", "lm")])
def test_outputs_and_gradients(tiny_host, tiny_text, family, task):
    ours, theirs, pairs = twins(tiny_host, family, task)
    left, right = (model(**tiny_text())[0] for model in (ours, theirs))
    assert torch.allclose(left, right, atol=1e-6)
    for output in (left, right):
        output.square().mean().backward()
    assert len(pairs) == 2 * len(adapter_modules(ours))
    assert all(torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=1e-7) for mine, other in pairs.items())
    assert any(mine.grad.abs().max() > 1e-4 for mine in pairs)
    merge(ours)
    theirs.merge_adapter()
    with torch.no_grad():
        assert torch.allclose(ours(**tiny_text())[0], theirs(**tiny_text())[0], atol=1e-6)


@pytest.mark.parametrize(("family", "task", "where", "form"), [
    ("bert", "classify", ("query", "value"), "mask"), ("bert", "classify", ("query", "key", "value", "output", "ffn"), "flat"),
    ("bert", "classify", "ffn", "unit"),
    ("roberta", "qa", ("query", "output"), "mask"), ("bart", "lm", ("query", "value", "ffn"), "mask"), ("albert", "classify", ("query", "value"), None),
    ("llama", "lm", ("query", "key", "value", "output", "ffn"), "unit"), ("qwen3", "classify", ("query", "value"), "mask"),
])
def test_peft_loads_what_we_export(tiny_host, tiny_text, tmp_path, family, task, where, form):
    ours = stir(attach(tiny_host(family, task), "lora", 8, alpha=12.0, where=where))
    if form is not None:
        prune(ours, method="random", keep=0.5, form=form)
    theirs = peft.PeftModel.from_pretrained(tiny_host(family, task), export_peft(ours, tmp_path / "a")).eval()
    with torch.no_grad():
        assert (ours(**tiny_text())[0] - theirs(**tiny_text())[0]).abs().max() <= 1e-5
    nonzero = sum(t.count_nonzero().item() for key, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items() if "lora_" in key)
    assert nonzero == (sum(int(m.sum()) for m in masks(ours).values()) or sum(p.numel() for p in adapter_parameters(ours).values()))
    back = load_adapter(tiny_host(family, task), tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(back(**tiny_text())[0], ours(**tiny_text())[0])


@pytest.mark.parametrize(("family", "task", "options"), [
    ("bert", "classify", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    ("bert", "classify", {"target_modules": ["query"], "modules_to_save": ["classifier"], "layers_to_transform": [1]}),
    ("roberta", "classify", {"target_modules": ["query", "key"], "task_type": "SEQ_CLS", "use_rslora": True}),
    ("llama", "lm", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ("llama", "lm", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
])
def test_we_import_what_peft_saves(tiny_host, tiny_text, tmp_path, family, task, options):
    theirs = peft.get_peft_model(tiny_host(family, task), peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "modules_to_save" in key:
                p.add_(0.5)
    theirs.save_pretrained(tmp_path / "a")
    ours = import_peft(tiny_host(family, task), tmp_path / "a", "theirs")
    with torch.no_grad():
        expected = theirs(**tiny_text())[0]
        assert torch.allclose(ours(**tiny_text())[0], expected, atol=1e-6)
        save_adapter(ours, tmp_path / "b", "theirs")
        assert torch.allclose(load_adapter(tiny_host(family, task), tmp_path / "b")(**tiny_text())[0], expected, atol=1e-6)
    export_peft(ours, tmp_path / "c", "theirs")
    again = peft.PeftModel.from_pretrained(tiny_host(family, task), tmp_path / "c").eval()
    with torch.no_grad():
        assert torch.allclose(again(**tiny_text())[0], expected, atol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    ({"use_dora": True}, "use_dora=True computes what a plain LoRA does not"),
    ({"bias": "all"}, "bias='all'"),
    ({"target_modules": ["word_embeddings"]}, "lora_embedding_. is no LoRA of an nn.Linear"),
    ({"target_modules": ["query", "pooler.dense"]}, "LoRA on bert.pooler.dense, where BertForSequenceClassification takes none"),
    ({"target_modules": ["layer.0.attention.self.query", "layer.1.attention.self.value"]}, "that mixture has no counterpart here"),
])
def test_what_has_no_counterpart_is_refused(tiny_host, tmp_path, options, words):
    settings = {"r": 4, "target_modules": ["query"]} | options
    peft.get_peft_model(tiny_host(), peft.LoraConfig(**settings)).save_pretrained(tmp_path / "a")
    refused(tiny_host(), tmp_path / "a", words)


def refused(model, folder, words):
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        load_adapter(model, folder)
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def test_damaged_or_foreign_folders_are_refused(tiny_host, tmp_path):
    export_peft(attach(tiny_host(), "lora", 4), tmp_path / "a")
    about, state = json.loads((tmp_path / "a" / "adapter_config.json").read_text()), load_file(tmp_path / "a" / "adapter_model.safetensors")
    for i, (changes, tensors, words) in enumerate([
        ({"peft_type": "IA3"}, state, "holds a IA3 of peft's; only LORA"),
        ({"r": "four"}, state, "has no r"),
        ({}, {key: t for key, t in state.items() if "lora_B" not in key}, "has shapes"),
        ({}, {key: t[:-1] for key, t in state.items()}, r"has shapes .* needs"),
        ({}, state | {"base_model.model.bert.pooler.dense.bias": torch.zeros(32)}, "has not in its head; .*head=False"),
        ({}, {key.replace("layer.1", "layer.7"): t for key, t in state.items()}, "LoRA on bert.encoder.layer.7.attention.self.query"),
    ]):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(about | changes))
        save_file(tensors, folder / "adapter_model.safetensors")
        refused(tiny_host(), folder, words)
    (folder / "adapter_config.json").write_text("[]")
    refused(tiny_host(), folder, "is damaged")
    (folder / "adapter_config.json").write_text(json.dumps(about))
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    refused(tiny_host(), folder, "is damaged")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(tiny_host(), folder, "pickled, which can run code")


def test_only_lora_goes_to_peft(tiny_host, tmp_path):
    with pytest.raises(ValueError, match="of kind houlsby; peft has only lora"):
        export_peft(attach(tiny_host(), "houlsby", 4), tmp_path / "a")
    with pytest.raises(ValueError, match="unmerge first"):
        export_peft(merge(attach(tiny_host(), "lora", 4)), tmp_path / "a")
    assert not list(tmp_path.iterdir())
