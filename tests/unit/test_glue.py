"""Labelled sentences from a tiny folder in the hub's layout, and the docstring task. No network; real copies only where DYN_DATA names some."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dyn.data import glue, local_text
from dyn.data.glue import DOCSTRINGS, TASKS, SentenceSource, open_sentences
from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.sources import labelled
from dyn.data.tiny import tiny_glue, tiny_tokenizer

silent = dict(log=lambda _: None)
TOKENIZER = tiny_tokenizer()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """DYN_DATA with a tiny `glue` in it."""
    monkeypatch.setenv("DYN_DATA", str(tmp_path))
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    return Path(tiny_glue(tmp_path / "glue"))


def rows(folder: Path, task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text().splitlines()]


def test_a_pair_task(folder):
    lines = []
    data = open_sentences(SentenceSource(task="mrpc", max_length=64, tuning=0.25), TOKENIZER, log=lines.append)
    assert (len(data.train), len(data.tuning), len(data.validation["validation"])) == (36, 12, 16)
    assert data.num_labels == 2 and not data.regression and data.metrics == ("accuracy", "f1") and data.task == "mrpc"
    assert lines == [f"sentences: {data.what}"]
    assert data.what == "GLUE's mrpc, a local copy: 36 examples to train on, 12 to choose by, 16 to validate, 2 classes"
    index = np.array([3, 0, 7])
    batch, source = data.validation["validation"].batch(index, None), rows(folder, "mrpc", "validation")
    expected = TOKENIZER([source[i]["sentence1"] for i in index], [source[i]["sentence2"] for i in index], truncation=True, max_length=64, padding=True,
                         return_tensors="pt")
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key
    assert batch["labels"].tolist() == [source[i]["label"] for i in index] and batch["labels"].dtype == torch.int64


def test_padding_on_the_left_and_to_a_multiple(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    data = open_sentences(SentenceSource(task="cola"), tokenizer, multiple=8, **silent)
    index = np.array([5, 2, 9, 1])
    batch, source = data.train.batch(index, None), rows(folder, "cola", "train")
    expected = tokenizer([source[i]["sentence"] for i in index], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"]) and torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch["input_ids"].shape[1] % 8 == 0


def test_a_tokenizer_with_token_types(folder, tmp_path):
    from transformers import BertTokenizerFast

    words = sorted({w for r in rows(folder, "mrpc", "train") for w in (r["sentence1"] + " " + r["sentence2"]).split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    data = open_sentences(SentenceSource(task="mrpc", max_length=12), tokenizer, **silent)
    index, source = np.arange(20), rows(folder, "mrpc", "train")
    batch = data.train.batch(index, None)
    expected = tokenizer([r["sentence1"] for r in source[:20]], [r["sentence2"] for r in source[:20]], truncation=True, max_length=12, padding=True,
                         return_tensors="pt")
    assert set(batch) == {*expected, "labels"} and batch["token_type_ids"].any() and (expected["input_ids"] == 0).any()
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


def test_regression(folder):
    data = open_sentences(SentenceSource(task="stsb"), TOKENIZER, **silent)
    assert data.regression and data.num_labels == 1 and data.metrics == ("pearson", "spearman") and data.what.endswith("a score to predict")
    labels = data.train.batch(np.arange(48), None)["labels"]
    assert labels.dtype == torch.float32 and 0 <= labels.min() < labels.max() <= 5


def test_loaders_over_sentences(folder):
    data = open_sentences(SentenceSource(task="mrpc"), TOKENIZER, **silent)
    grouped, plain = (ResumableLoader(data.train, batch_size=4, seed=1, lengths=lengths) for lengths in (data.train.lengths, None))
    padding = [sum(int((b["attention_mask"] == 0).sum()) for b in loader) for loader in (grouped, plain)]
    assert padding[0] < padding[1] / 3
    held = list(EvaluationLoader(data.validation["validation"], 5))
    assert torch.cat([b["index"] for b in held]).tolist() == list(range(16))


def test_limits_and_the_held_out_share_go_by_the_seed(folder):
    def labels(**settings):
        data = open_sentences(SentenceSource(task="stsb", **settings), TOKENIZER, **silent)
        return data.train.labels.tolist(), None if data.tuning is None else data.tuning.labels.tolist()

    train, held = labels(tuning=0.5)
    whole, none = labels()
    assert none is None and sorted(train + held) == sorted(whole) and labels(tuning=0.5, seed=1) != (train, held) == labels(tuning=0.5)
    few, _ = labels(train_limit=10)
    assert len(few) == 10 and set(few) <= set(whole)


def test_a_limit_of_nothing_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(glue, "_rows", lambda _: pytest.fail("the data were opened"))
    with pytest.raises(ValueError, match="train_limit=0 must be at least 1, or null for all"):
        open_sentences(SentenceSource(train_limit=0), TOKENIZER, **silent)


def test_select_keeps_the_tokens(folder):
    train = open_sentences(SentenceSource(task="mrpc"), TOKENIZER, **silent).train
    part = train.select(np.array([7, 3, 11]))
    a, b = part.batch(np.array([2, 0]), None), train.batch(np.array([11, 7]), None)
    assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(task="cola", splits=["test"]), r"GLUE's cola, a local copy, split 'test' has no labels \(all are -1"),
    (dict(task="stsb", splits=["test"]), "split 'test' has no labels"), (dict(task="ax"), "task='ax' has no labels"),
    (dict(task="mrcp"), r"GLUE: no task 'mrcp'.*nearest: mrpc"), (dict(task="mrpc", splits=["dev"]), "no split 'dev'; there are validation, test"),
    (dict(task="rte"), r"no config 'rte'; there are cola, mrpc, stsb"), (dict(max_length=2), "max_length=2 must be at least 4"),
    (dict(task="mrpc", path="someone/else"), "no data set; looked for a folder, a copy below"),
])
def test_refusals(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        open_sentences(SentenceSource(**settings), TOKENIZER, **silent)


@pytest.mark.parametrize(("task", "change", "message"), [
    ("mrpc", {"label": 2}, r"split 'train': label 2 of example 5 lies outside 0 \.\. 1"), ("stsb", {"label": 5.5}, "label 5.5 of example 5 lies outside"),
    ("stsb", {"label": float("nan")}, "label nan of example 5"),
])
def test_labels_out_of_range(folder, task, change, message):
    changed = rows(folder, task, "train")
    changed[5] |= change
    (folder / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(ValueError, match=message):
        open_sentences(SentenceSource(task=task), TOKENIZER, **silent)


def test_a_missing_column_is_named(folder):
    for split in ("train", "validation", "test"):
        halves = [json.dumps({"sentence1": r["sentence1"], "label": 0}) + "\n" for r in rows(folder, "mrpc", split)]
        (folder / "mrpc" / f"{split}.jsonl").write_text("".join(halves))
    with pytest.raises(ValueError, match="split 'train': no column 'sentence2'; found sentence1, label"):
        open_sentences(SentenceSource(task="mrpc"), TOKENIZER, **silent)


def test_a_data_set_without_a_train_split_is_refused():
    with pytest.raises(ValueError, match="here: no split train; found test"):
        labelled({"test": None}, {}, ["test"], "here")


def test_the_docstring_task_stands_in_and_says_so(monkeypatch):
    monkeypatch.delenv("DYN_DATA", raising=False)
    data = open_sentences(SentenceSource(task="mrpc", fallback=True, max_length=64), TOKENIZER, **silent)
    assert data.task == "docstrings" and data.num_labels == 8 and data.classes == list(local_text.PACKAGES) and data.metrics == DOCSTRINGS.metrics
    assert data.what.startswith("the docstring task in place of mrpc, which neither $DYN_DATA nor the hub gives (path='nyu-mll/glue': no data set)")
    with pytest.raises(ValueError, match="no data set; looked for a folder"):
        open_sentences(SentenceSource(task="mrpc"), TOKENIZER, **silent)
    asked = open_sentences(SentenceSource(task="docstrings", max_length=64, tuning=0.1), TOKENIZER, **silent)
    assert asked.what.startswith("the docstring task: which of eight") and len(asked.tuning) == round(0.1 * len(data.train))


def test_docstrings_are_split_by_module_and_nothing_repeats():
    splits = local_text.docstrings()
    assert {d.source for d in splits["train"]}.isdisjoint({d.source for d in splits["validation"]})
    texts = [local_text.content_hash(d.text) for part in splits.values() for d in part]
    assert len(texts) == len(set(texts)) > 1000
    for split in splits.values():
        assert {d.label for d in split} == set(range(8)) and all(d.source.startswith(local_text.PACKAGES[d.label]) for d in split)
    assert 0.15 < len(splits["validation"]) / len(texts) < 0.3 and splits == local_text.docstrings()
    with pytest.raises(ValueError, match="this Python has none of asyncio for the validation split"):
        local_text.docstrings(held_out=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_real_glue(task, monkeypatch, tmp_path):
    monkeypatch.setenv("DYN_CACHE", str(tmp_path))
    root = os.environ.get("DYN_DATA")
    if not root or not (Path(root) / "glue" / task).is_dir():
        pytest.skip(f"needs a copy of GLUE's {task} below DYN_DATA")
    data = open_sentences(SentenceSource(task=task, train_limit=50), TOKENIZER, **silent)
    assert len(data.train) == 50 and list(data.validation) == list(TASKS[task].splits)
