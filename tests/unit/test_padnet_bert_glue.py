"""The GLUE experiment of PAD-Net: its rows and their controls, scores, length, what it says of its data, stopping and going on, a dry run."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaModel

from dyn import config
from dyn.data.glue import TASKS, SentenceData, SentenceSet
from dyn.data.tiny import tiny_tokenizer
from dyn.runfolder import Cancelled, Run, create
from dyn.train import encoders, sentences
from dyn.train.classify import Answers

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("experiments.padnet_bert_glue", ROOT / "experiments" / "padnet_bert_glue.py")
experiment = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
if not hasattr(experiment, "SWEEPS"):
    spec.loader.exec_module(experiment)


def smoke(words=()):
    return config.load(experiment.Config, "padnet_bert_glue", "smoke", ["tasks=[mrpc]", "beside=[]", *words], root=ROOT)


def new_run(folder, cfg):
    return Run.open(create(folder, "padnet_bert_glue", cfg, profile="smoke"))


def test_every_row_has_its_controls():
    for sweep, rows in experiment.SWEEPS.items():
        names = {row["row"] for row in rows}
        for row in rows:
            model = experiment.ModelConfig(**{key.removeprefix("model."): value for key, value in row.items() if key.startswith("model.")})
            suffix = row["row"].removeprefix(model.what())
            assert row["row"].startswith(model.what())
            assert not (missing := [c for c in model.controls() if c + suffix not in names]), f"{sweep}: {row['row']} lacks {missing}"


def test_names_and_controls():
    make = experiment.ModelConfig
    assert make().what() == "PAD 0.5, 2 of 8" and make().controls() == ["static", "MoE, 2 of 8", "MoE, 2 of 4"]
    assert make(method="moe", where="out").what() == "MoE, 2 of 8, where out" and make(method="static").controls() == []
    assert make(criterion="magnitude").what() == "PAD 0.5, 2 of 8, magnitude"
    assert "PAD 0.5, 2 of 8, magnitude, shuffled" in make(criterion="magnitude").controls()
    assert make(scales="prune", shuffle=True).controls() == ["PAD 0.5, 2 of 8, pruned"]


@pytest.mark.parametrize(("words", "message"), [
    (["tasks=[ax]"], "tasks=ax is unknown; allowed: cola"), (["tasks=[]"], r"tasks=\[\]: at least one"), (["tasks=[rte,rte]"], "each once"),
    (["data.task=cola"], "data.task=cola would be ignored"), (["model.keep=1.5"], r"keep=1.5 must lie in \[0, 1\]"), (["epochs=0"], "epochs=0.0"),
    (["model.num_experts_per_tok=9"], "num_experts_per_tok=9 must be at most num_experts=4"), (["trainer.max_steps=5"], "max_steps=5 would be ignored"),
    (["compact_examples=-1"], "compact_examples=-1 must be at least 1"), (["data.tuning=0.5"], "data.tuning=0.5 holds examples out"),
    (["classify.mixup=0.2"], "classify.mixup=0.2 and classify.cutmix=0.0 mix images"),
    (["beside=[pad]"], "must be methods other than"), (["trainer.strategy=fsdp2", "trainer.devices=2"], "trainer.strategy=ddp"),
])
def test_settings_that_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        cfg = smoke(words)
        cfg.check()
        cfg.model.check()


def data(count=30, splits=("validation",), metrics=("accuracy", "f1"), task="mrpc"):
    lengths = np.arange(count) % 7 + 2
    places = np.concatenate([[0], np.cumsum(lengths)])
    part = SentenceSet({"input_ids": np.ones(places[-1], np.int32)}, places, torch.arange(count) % 2, {"input_ids": 0})
    return SentenceData(part, dict.fromkeys(splits, part), None, task, 2, False, ["a", "b"], metrics, "made up")


def test_scores_are_glues():
    assert sentences.scores({"val/accuracy": 0.8, "val/f1": 0.6, "val/loss": 1.0}, data()) == {"accuracy": 0.8, "f1": 0.6, "score": pytest.approx(0.7)}
    both = {f"val/{split}/accuracy": value for split, value in {"validation_matched": 0.5, "validation_mismatched": 0.7}.items()}
    assert sentences.scores(both, data(splits=TASKS["mnli"].splits, metrics=("accuracy",))) == pytest.approx({"accuracy": 0.6, "score": 0.6})
    results = {task: {"pad": {"scores": {"score": score}}} for task, score in {"mrpc": 0.8, "cola": 0.4, "wnli": 0.0}.items()}
    assert sentences.mean_score(results, "pad") == pytest.approx(0.6), "WNLI is in no mean"


def test_length(monkeypatch):
    cfg = smoke(["epochs=3.0", "batch_size=8"])
    assert sentences.full_steps(cfg, 3668) == 3 * 458 and sentences.full_steps(cfg, 5) == 3  # an epoch of fewer examples than a batch is one
    wanted = {"mrpc": 300, "cola": 100}
    assert sentences.fitting_steps(cfg, None, wanted, [], data()) == wanted
    timed = dataclasses.replace(cfg, minutes=1.0)
    monkeypatch.setattr(sentences, "seconds_per_micro_batch", lambda *_: 0.4)
    monkeypatch.setattr(sentences, "interleaved", lambda *_: {"step": [0.1, 0.2]})
    lines = []
    run = type("R", (), {"log": staticmethod(lines.append)})
    nets = [lambda: nn.Linear(1, 1)] * 2
    assert sentences.fitting_steps(timed, run, wanted, nets, data()) == {"mrpc": 36, "cola": 12}  # 48 s hold 48 steps of 1 s
    assert lines == ["minutes=1.0 hold 48 of 400 steps for each network on this machine (1.00 s for one of each)"]
    assert set(sentences.typical_batch(data().train, 4)["attention_mask"].sum(1).tolist()) == {5}, "as long as they are on average"


def test_precision_is_the_faster_one_where_minutes_count(monkeypatch):
    cfg, lines = dataclasses.replace(smoke(["trainer.precision=bf16-mixed"]), minutes=1.0), []
    run = type("R", (), {"log": staticmethod(lines.append)})
    for slower, expected in ((torch.bfloat16, "32-true"), (torch.float32, "bf16-mixed")):
        monkeypatch.setattr(sentences, "seconds_per_micro_batch", lambda net, loss, dtype, trials, slower=slower: 2.0 if dtype == slower else 1.0)
        assert sentences.faster_precision(cfg, run, lambda: nn.Linear(1, 1), data()) == expected
    assert lines == ["bfloat16 is slower than float32 on this CPU: training in float32"]
    assert sentences.faster_precision(dataclasses.replace(cfg, minutes=None), run, None, None) == "bf16-mixed"


def test_what_an_encoder_has_seen():
    assert sentences.caveats("all-MiniLM-L6-v2", ["mrpc", "rte"]) == [
        "rte: all-MiniLM-L6-v2 was trained on NLI pairs (SNLI, MultiNLI), so this task is not new to it"]
    assert sentences.caveats("google-bert/bert-base-uncased", TASKS) == []


def test_data_and_encoders_that_cannot_be_had(tmp_path, monkeypatch):
    """The docstring task in place of MRPC where that is asked for, and said; else one clear line."""
    monkeypatch.delenv("DYN_DATA", raising=False)
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    cfg = smoke(["data.path=nyu-mll/glue", "data.fallback=true", "data.train_limit=40"])
    run = new_run(tmp_path, cfg)
    opened = sentences.open_task(cfg, run, "tiny", "mrpc")
    assert opened.task == "docstrings" and opened.num_labels == 8 and len(opened.train) == 40
    assert opened.what.startswith("the docstring task in place of mrpc, which neither $DYN_DATA nor the hub gives")
    assert opened.what in (run.folder / "log.txt").read_text()
    with pytest.raises(ValueError, match=r"^source=no/such has no tokenizer that transformers can load"):
        sentences.open_task(cfg, run, "no/such", "mrpc")
    with pytest.raises(ValueError, match=r"^model\.source=.* is no model folder: it has no config\.json$"):
        sentences.open_task(cfg, run, str(tmp_path), "mrpc", "model.source")
    with pytest.raises(ValueError, match="no/such is no encoder that transformers can load"):
        sentences.build(cfg, run, "no/such", opened)


def test_a_decoder_reads_sentences_of_different_lengths(tmp_path):
    tokenizer = tiny_tokenizer(framed=True)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaModel(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    cfg = smoke([])
    run = new_run(tmp_path, cfg)
    opened = sentences.open_task(cfg, run, str(tmp_path / "llama"), "mrpc")
    assert config.pad_token_id is None and len(set(opened.train.lengths[:4])) > 1
    net = sentences.build(cfg, run, str(tmp_path / "llama"), opened)
    assert sentences.sentence_loss(net, opened.train.batch(np.arange(4), None)).isfinite()
    with pytest.raises(ValueError, match=r"data.max_length=129 is more than the 128 tokens that BertForSequenceClassification has places for"):
        sentences.build(smoke(["data.max_length=129"]), run, "tiny", opened)


def test_a_plan_of_longer_sentences_than_the_encoder_takes():
    with pytest.raises(ValueError, match=r"data\.max_length=600 is more than the 512 tokens that \w+ has places for"):
        experiment.plan(config.load(experiment.Config, "padnet_bert_glue", "paper", ["data.max_length=600"], root=ROOT))


def test_answers(tmp_path):
    sentences.write_answers(tmp_path / "a" / "x.json", {"validation": Answers(torch.arange(2), torch.tensor([1, 0]), torch.tensor([1, 1]))})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"validation": {"index": [0, 1], "predictions": [1, 0], "labels": [1, 1]}}


class StopAt(Callback):
    def __init__(self, run, step) -> None:
        self.run, self.step = run, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.run.stop.set()


def test_a_stopped_run_goes_on_with_the_modes_it_had(tmp_path, monkeypatch):
    """The partition is not done again, and everything is as in the run that was left alone: answers, metrics, the exported folder."""
    cfg = smoke()
    whole, run = new_run(tmp_path / "whole", cfg), new_run(tmp_path / "stopped", cfg)
    expected = encoders.train_encoders(cfg, whole)
    assert "so alike that switching a position's mode changes nothing" in (whole.folder / "log.txt").read_text()
    train = encoders.train_classifier
    monkeypatch.setattr(encoders, "train_classifier", lambda *args, **kwargs: train(*args, **kwargs, callbacks=[StopAt(run, 5)]))
    with pytest.raises(Cancelled):
        encoders.train_encoders(cfg, run)
    monkeypatch.setattr(encoders, "train_classifier", train)
    monkeypatch.setattr(encoders, "_partition", lambda *_: pytest.fail("partitioned again"))
    run.stop.clear()
    found = encoders.train_encoders(cfg, run)
    timeless = [{key: value for key, value in metrics.items() if "time" not in key} for metrics in (found, expected)]
    assert timeless[0] == timeless[1] and found["mrpc/variation of load"] > 0
    for name in ("answers/mrpc-pad.json", "export/mrpc-pad/config.json", "export/mrpc-pad/model.safetensors"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert not (run.folder / "start").exists() and (run.folder / "plots" / "load.png").is_file()
    loaded = AutoModelForSequenceClassification.from_pretrained(run.folder / "export" / "mrpc-pad")
    assert sum(p.numel() for p in loaded.parameters()) == found["mrpc/compact/parameters"] == run.cost["stored_parameters"]
    assert AutoTokenizer.from_pretrained(run.folder / "export" / "mrpc-pad")("a b").input_ids
    assert set(load_file(run.folder / "export" / "mrpc-pad" / "model.safetensors")) == set(loaded.state_dict())
    assert run.notes["about"][0].startswith("sentences: GLUE's mrpc, a local copy") and "not_tested" in run.notes


def test_a_dry_run():
    planned = encoders.plan_encoders(config.load(experiment.Config, "padnet_bert_glue", "paper", root=ROOT))
    assert planned["parameters"] == {"total": 506_903_808 + 56_623_104 + 768 * 3 + 3, "gates": 737_280, "stored (compact)": 308_722_944 + 768 * 3 + 3,
                                     "activated (without gates)": planned["parameters"]["activated (without gates)"]}
    assert planned["training"]["steps, each network"]["mrpc"] == 3 * (3668 // 32) and len(planned["training"]["steps, each network"]) == 9
    beside = encoders.plan_encoders(config.load(experiment.Config, "padnet_bert_glue", "demo", ["model.source=google-bert/bert-base-uncased"], root=ROOT))
    assert set(beside) == {"network", "training", "static", "moe", "pad"}
