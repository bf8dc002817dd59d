"""lm-evaluation-harness, offline, on a local task: an exported checkpoint, and a model in memory; its numbers against our own."""

import json
import shutil
import sys

import pytest
import torch

from dyn.data.tiny import tiny_tokenizer
from dyn.models.llama_moe import Construction, LlamaMoeConfig, LlamaMoeForCausalLM
from dyn.models.packaged import load_tokenizer
from dyn.train.checkpoint import AtomicCheckpointIO
from dyn.train.export import export, load_net, main, run_harness
from dyn.train.optim import OptimConfig
from dyn.train.tasks import CausalLM
from dyn.train.trainer import TrainerConfig

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
PAIRS = [(1, 2), (3, 4), (2, 2), (5, 1)]
QUESTIONS = [{"question": f"{a} and {b} make", "choices": [str(a + b), "many things", "none"], "answer": i % 3} for i, (a, b) in enumerate(PAIRS)]


def tiny_net() -> LlamaMoeForCausalLM:
    torch.manual_seed(1)
    net = LlamaMoeForCausalLM(LlamaMoeConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, num_experts=4, num_experts_per_tok=2, balance="bias", initializer_range=0.5, tie_word_embeddings=True))
    groups = [torch.arange(32).view(4, 8) for _ in range(2)]
    net.construction = Construction(method="random", seed=3, source="tiny", source_hash="0" * 64, groups=groups, shared=[torch.empty(0, dtype=torch.long)] * 2)
    return net.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """run/checkpoints/moe/step-00000001.ckpt of `tiny_net`, tasks/, tokenizer/."""
    folder = tmp_path_factory.mktemp("place")
    task = CausalLM(tiny_net(), OptimConfig(warmup_steps=0), ["a"], TrainerConfig(max_steps=1, accelerator="cpu"))
    checkpoint = {"state_dict": task.state_dict(), "global_step": 1}
    task.on_save_checkpoint(checkpoint)
    AtomicCheckpointIO().save_checkpoint(checkpoint, folder / "run" / "checkpoints" / "moe" / "step-00000001.ckpt")
    (folder / "tasks").mkdir()
    data = folder / "tasks" / "data.json"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "tasks" / "tiny.yaml").write_text(TASK.format(data=data))
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def our_accuracy(net, tokenizer) -> float:
    right = 0
    for q in QUESTIONS:
        scores = []
        for choice in q["choices"]:
            context, whole = tokenizer(q["question"])["input_ids"], tokenizer(f"{q['question']} {choice}")["input_ids"]
            with torch.no_grad():
                log_p = net(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            scores.append(sum(log_p[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        right += scores.index(max(scores)) == q["answer"]
    return right / len(QUESTIONS)


def test_export_gives_the_same_network(place, tmp_path):
    import transformers

    out = export(place / "run", tmp_path / "out", tokenizer=place / "tokenizer")
    net, ids = tiny_net(), torch.randint(0, 259, (2, 9))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(loaded) is LlamaMoeForCausalLM and torch.equal(loaded(input_ids=ids).logits, net(input_ids=ids).logits)
    assert loaded.construction.method == "random" and torch.equal(loaded.construction.groups[1], net.construction.groups[1])
    assert transformers.AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]
    with pytest.raises(ValueError, match="out is in use"):
        export(place / "run", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_export_refusals(place, tmp_path):
    with pytest.raises(ValueError, match=r"trainings 'moe'; choose one of them by --name, got 'dense'"):
        export(place / "run", tmp_path / "x", name="dense")
    with pytest.raises(ValueError, match="neither a run folder nor a checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint"):
        export(tmp_path / "empty", tmp_path / "x")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="holds no causal language model"):
        load_net(tmp_path / "foreign.ckpt")
    torch.save(torch.zeros(2), tmp_path / "tensor.ckpt")
    with pytest.raises(ValueError, match="holds a Tensor; allowed are checkpoints"):
        load_net(tmp_path / "tensor.ckpt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickled.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
        load_net(tmp_path / "pickled.ckpt")
    assert not (tmp_path / "x").exists()


def test_the_harness_agrees_with_us_in_memory_and_from_the_folder(place, tmp_path, capsys):
    net, tokenizer = tiny_net(), tiny_tokenizer()
    in_memory = run_harness(net, ["tiny_choice"], tokenizer=tokenizer, include_path=place / "tasks", device="cpu")
    found = in_memory["tiny_choice"]
    assert found["acc"] == our_accuracy(net, tokenizer) and "acc_norm" in found and found["shots"] == 0
    folder = export(place / "run" / "checkpoints" / "moe" / "step-00000001.ckpt", tmp_path / "out", tokenizer=place / "tokenizer")
    words = ["eval", str(folder), "--tasks", "tiny_choice", "--include-path", str(place / "tasks"), "--device", "cpu", "--out", str(tmp_path / "eval.json")]
    assert main(words) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "eval.json").read_text())["results"] == in_memory
    with pytest.raises(SystemExit):
        main([*words[:3], "no_such_task", *words[4:]])
    assert "knows no task no_such_task" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words[:-1], str(tmp_path / "nowhere" / "eval.json")])
    assert "its folder does not exist" in capsys.readouterr().err


def test_without_the_extra_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install dyn\[eval\]"):
        run_harness("anywhere", ["sciq"])


def test_the_command_line_exports(place, tmp_path, capsys):
    assert main([str(place / "run"), str(tmp_path / "out"), "--name", "moe"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out") and (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "out"), "--tasks", "tiny_choice"])
    assert f"FOLDER={tmp_path / 'out'} has no tokenizer that transformers can load" in capsys.readouterr().err
    shutil.copytree(place / "run", tmp_path / "run")
    tiny_tokenizer().save_pretrained(tmp_path / "run" / "export")
    assert main([str(tmp_path / "run"), str(tmp_path / "other"), "--name", "moe"]) == 0  # the run's own tokenizer goes along
    assert load_tokenizer(tmp_path / "other")("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(place / "run"), str(tmp_path / "out")])
    assert "is in use" in capsys.readouterr().err
