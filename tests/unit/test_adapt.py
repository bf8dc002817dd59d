"""Adapter experiments: rows and settings, learning rates chosen apart, adapters that are what was measured, plans. Smoke runs are in tests/smoke."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dyn import config
from dyn.data.loader import EvaluationLoader
from dyn.data.squad import open_questions
from dyn.data.tiny import tiny_squad, tiny_tokenizer, tiny_xsum
from dyn.models.packaged import question_answerer
from dyn.nn.adapter import load_adapter
from dyn.run import main
from dyn.train.questions import QuestionAnswering
from dyn.train.sparse import RATES, WHOLE_RATES, SparseConfig, adapter_rows, with_controls
from dyn.train.trainer import validate

ROOT = Path(__file__).resolve().parents[2]


def experiment(task: str):
    spec = importlib.util.spec_from_file_location(f"adapt_{task}", ROOT / "experiments" / f"sparse_adapter_{task}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", ["squad", "xsum"])
@pytest.mark.parametrize(("words", "message"), [
    (["beside=[{kind: none},{kind: none}]"], "beside and sparse must be networks that differ, got full fine-tuning; full fine-tuning"),
    (["rates=[1e-4]"], r"rates=\[0.0001\] must be positive and differ, .*data.tuning=0.0 must be above 0"),
    (["trainer.strategy=fsdp2", "trainer.devices=2"], "strategy=ddp"),
    (["trainer.max_steps=7"], "trainer.max_steps=7 would be ignored by this experiment; set epochs"), (["epochs=0"], "epochs=0.0 and minutes=None"),
    (["sparse.keep=0"], r"sparse: keep=0.0 must lie in \(0, 1\]"), (["minutes=3", "trainer.devices=2"], "minutes=3.0 is for one device"),
    (["sparse.kind=hulsby"], "nearest: 'houlsby'"), (["eval_batch_size=0"], "eval_batch_size=0 must be at least 1"),
])
def test_settings_are_refused_before_anything_is_loaded(task, words, message):
    with pytest.raises(ValueError, match=message):
        config.load(experiment(task).Config, f"sparse_adapter_{task}", "paper", words, root=ROOT)


def test_rows_stand_beside_their_controls():
    rows = adapter_rows(*with_controls(SparseConfig(r=64), SparseConfig(r=64, factor=4, keep=None)), seeds=2, suffix=", v2", data__path="a")
    names = [row["row"] for row in rows if row["seed"] == 42]
    assert len(rows) == 2 * len(names) == 2 * len(set(names)) and all(row["data.path"] == "a" for row in rows)
    for sparse in (SparseConfig(r=64), SparseConfig(r=64, factor=4, keep=None)):
        assert {f"{control}, v2" for control in sparse.controls()} <= {*names, "full fine-tuning, v2"}


def test_rows_choose_among_the_rates_of_their_kind():
    rows = adapter_rows(SparseConfig(kind="none"), SparseConfig(), choose=True)
    found = {row["sparse.kind"]: (row["rates"], row["data.tuning"]) for row in rows}
    assert found == {"none": (WHOLE_RATES, 0.1), "houlsby": (RATES, 0.1)} and not {"rates", "data.tuning"} & adapter_rows(SparseConfig())[0].keys()


@pytest.mark.parametrize("task", ["squad", "xsum"])
def test_every_control_of_a_sweep_is_in_it(task):
    module = experiment(task)
    for sweep, rows in module.SWEEPS.items():
        names = {row["row"] for row in rows}
        for row in rows:
            sparse = SparseConfig(**{key.removeprefix("sparse."): value for key, value in row.items() if key.startswith("sparse.")})
            assert row["row"].startswith(sparse.what())
            missing = {control + row["row"].removeprefix(sparse.what()) for control in sparse.controls()} - names
            assert not missing, f"{sweep}: {row['row']}"


@pytest.mark.parametrize(("task", "total", "trained"), [("squad", 108_893_186 + 9_461_760, 5_662_310 + 24_576 + 1_538),
                                                         ("xsum", 406_291_456 + 63_006_720, 37_748_736 + 63_006_720 - 62_914_560)])
def test_plans_count_as_the_specification(task, total, trained):
    module = experiment(task)
    plan = module.plan(config.load(module.Config, f"sparse_adapter_{task}", "paper", root=ROOT))
    assert plan["parameters"]["network"] == total and plan["parameters"]["trained"] == trained


def test_a_run_chooses_its_rate_apart_and_leaves_what_it_measured(tmp_path):
    words = ["rates=[0.00001, 0.003]", "data.tuning=0.3", "beside=[]", "trainer.val_every=0", "trainer.checkpoint_every=0"]
    assert main(["sparse_adapter_squad", "profile=smoke", f"runs={tmp_path}", *words]) == 0
    [path] = (tmp_path / "sparse_adapter_squad").glob("*/result.json")
    result, folder = json.loads(path.read_text()), path.parent
    metrics = result["metrics"]
    rows = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "val/tuning/f1" in row]
    tried = {row["stage"]: row["val/tuning/f1"] for row in rows}
    assert len(tried) == 2 and tried[f"houlsby-4-snip-0.6-16-samples-lr{metrics['learning rate']:g}"] == max(tried.values())
    [adapter] = [f for f in (folder / "adapters").iterdir() if f.name.endswith(f"lr{metrics['learning rate']:g}")]
    said = json.loads((folder / "answers" / f"{adapter.name}-validation.json").read_text())
    assert len(said) == 20 and np.mean([a["f1"] for a in said]) == pytest.approx(metrics["f1"])
    assert metrics["file bytes"] == (adapter / "adapter.safetensors").stat().st_size and result["cost"]["kept"] == 614
    # The file on a fresh host says what the trained network said.
    cfg = config.read(experiment("squad").Config, folder / "config.yaml")
    torch.manual_seed(cfg.seed)
    net = load_adapter(question_answerer("tiny", 260), adapter)
    data = open_questions(cfg.data, tiny_tokenizer(framed=True), log=lambda _: None)
    task = QuestionAnswering(net, cfg.optim, ["validation"], cfg.trainer, questions=data.validation, unanswerable=False, answer=cfg.answer)
    validate(task, {"validation": EvaluationLoader(data.validation["validation"], 8)}, cfg.trainer)
    assert [a.text for a in task.answers["validation"]] == [a["text"] for a in said]
    assert task.val_metrics["val/loss"] == pytest.approx(metrics["loss"], rel=1e-5)


@pytest.mark.parametrize(("task", "path"), [("squad", "rajpurkar/squad_v2"), ("xsum", "EdinburghNLP/xsum")])
def test_hub_ids_with_copies_and_a_model_in_a_folder(tmp_path, monkeypatch, task, path):
    """As a user has them: $DYN_DATA holds copies in the hub's layout, the model and its tokenizer are a folder of transformers."""
    from transformers import BartConfig, BartForConditionalGeneration, RobertaConfig, RobertaModel

    monkeypatch.setenv("DYN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    tiny_squad(tmp_path / "data" / "squad_v2", 24, unanswerable=True)
    tiny_xsum(tmp_path / "data" / "EdinburghNLP" / "xsum", 24)
    tokenizer, tokens = tiny_tokenizer(framed=True), dict(vocab_size=260, bos_token_id=1, eos_token_id=2, pad_token_id=259)
    if task == "squad":
        net = RobertaModel(RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=400,
                                         **tokens))
    else:
        net = BartForConditionalGeneration(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                                                      encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=2, **tokens))
    for part in (net, tokenizer):
        part.save_pretrained(tmp_path / "host")
    words = [f"source={tmp_path / 'host'}", f"data.path={path}", "beside=[]", "epochs=1", "sparse.form=flat"]
    assert main([f"sparse_adapter_{task}", "profile=smoke", f"runs={tmp_path / 'runs'}", *words]) == 0
    [found] = (tmp_path / "runs" / f"sparse_adapter_{task}").glob("*/result.json")
    result = json.loads(found.read_text())
    expected = {"squad": {"f1", "exact_match", "f1_answerable", "f1_unanswerable", "best_f1"}, "xsum": {"rouge1", "rouge2", "rougeL", "length"}}[task]
    assert expected <= result["metrics"].keys() and result["metrics"]["keep"] == pytest.approx(0.6, abs=0.01)
    assert any(f"{path}, a local copy: 24" in line for line in result["notes"]["about"])


def test_without_a_model_the_refusal_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["sparse_adapter_xsum", "profile=smoke", f"runs={tmp_path}", "source=someone/bart"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "source=someone/bart has no tokenizer that transformers can load" in line and "give a folder with the model" in line
