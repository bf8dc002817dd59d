"""Documents and summaries from a tiny folder in the hub's layout. No network; real copies only where DYN_DATA names some."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dyn.data.loader import EvaluationLoader, ResumableLoader, counts
from dyn.data.summaries import PROMPT, SummarySource, open_summaries
from dyn.data.tiny import tiny_pairs, tiny_tokenizer, tiny_xsum

silent = dict(log=lambda _: None)
TOKENIZER = tiny_tokenizer(framed=True)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """DYN_DATA with a tiny `xsum` in it."""
    monkeypatch.setenv("DYN_DATA", str(tmp_path))
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    return Path(tiny_xsum(tmp_path / "xsum"))


def test_a_copy_of_xsum(folder):
    lines = []
    data = open_summaries(SummarySource(max_document=24, max_summary=10, tuning=0.25), TOKENIZER, log=lines.append)
    assert lines == [f"summaries: {data.what}"]
    assert data.what == "EdinburghNLP/xsum, a local copy: 36 pairs to train on, 12 to choose by, 16 to validate (validation)"
    held, (documents, summaries) = data.validation["validation"], tiny_pairs()["validation"]
    assert held.references == summaries
    index = np.array([3, 0, 7])
    batch = held.batch(index, None)
    expected = TOKENIZER([documents[i] for i in index], truncation=True, max_length=24, padding=True, return_tensors="pt")
    labels = TOKENIZER([summaries[i] for i in index], truncation=True, max_length=10, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"]) and torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert torch.equal(batch["labels"], labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)) and set(batch) == {*expected, "labels"} - {
        "token_type_ids"}


def test_what_is_told_before_each_document(folder):
    data = open_summaries(SummarySource(prefix="sum: ", max_document=500, train_limit=5, validation_limit=4), TOKENIZER, **silent)
    assert len(data.train) == 5 and len(data.validation["validation"]) == 4
    batch = data.train.batch(np.arange(5), None)
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True).removesuffix("<pad>") for ids in batch["input_ids"]]
    documents, summaries = tiny_pairs()["train"]
    assert [text.removeprefix("sum: ") for text in texts] == [documents[summaries.index(s)] for s in data.train.references]
    assert all(text.startswith("sum: ") for text in texts)


def test_loaders_over_pairs(folder):
    data = open_summaries(SummarySource(), TOKENIZER, **silent)
    assert data.train.lengths.tolist() == [len(a) + len(b) + 4 for a, b in zip(*tiny_pairs()["train"], strict=True)]
    grouped, plain = (ResumableLoader(data.train, batch_size=4, seed=1, lengths=lengths) for lengths in (data.train.lengths, None))
    padding = [sum(int((b["attention_mask"] == 0).sum()) for b in loader) for loader in (grouped, plain)]
    assert padding[0] < padding[1] / 3
    shard = EvaluationLoader(data.validation["validation"], 16).shard(1, 2)
    [batch] = list(shard)
    assert not counts(batch["labels"][:, 0]).any()  # a batch that only fills up


def test_other_columns_and_limits_by_the_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"article": f"text {i}", "highlights": f"line {i}"}) + "\n" for i in range(20)]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    source = dict(path=str(folder), document="article", summary="highlights", splits=["test"])
    data = open_summaries(SummarySource(**source, train_limit=6), TOKENIZER, **silent)
    assert list(data.validation) == ["test"] and len(data.train) == 6
    assert data.train.references == open_summaries(SummarySource(**source, train_limit=6), TOKENIZER, **silent).train.references
    assert data.train.references != open_summaries(SummarySource(**source, train_limit=6, seed=1), TOKENIZER, **silent).train.references
    with pytest.raises(ValueError, match="no split 'validation'; there are test"):
        open_summaries(SummarySource(**source | dict(splits=None)), TOKENIZER, **silent)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(document="article"), "split 'train': no column document='article'; found document, summary, id"),
    (dict(path="someone/else"), "no data set; looked for"), (dict(max_summary=3), "max_summary=3 must be at least 4"),
    (dict(validation_limit=0), "validation_limit=0 must be at least 1"),
    (dict(config="other"), "no config 'other'; there are default"),
])
def test_refusals(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        open_summaries(SummarySource(**settings), TOKENIZER, **silent)


def test_empty_summaries_and_tokenizers_without_an_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text('{"document": "", "summary": "some"}\n{"document": "text", "summary": " "}\n')
    with pytest.raises(ValueError, match=r"split 'train', pair 1: .*the summary not empty; got 'text' and ' '"):
        open_summaries(SummarySource(path=str(folder)), TOKENIZER, **silent)
    with pytest.raises(ValueError, match="puts its eos_token"):
        open_summaries(SummarySource(path=str(folder)), tiny_tokenizer(), **silent)


def test_pairs_for_a_decoder(folder):
    tokenizer = tiny_tokenizer()
    data = open_summaries(SummarySource(max_document=24, max_summary=6), tokenizer, decoder=True, **silent)
    documents, summaries = tiny_pairs()["validation"]
    batch = data.validation["validation"].batch(np.array([0, 5]), None)
    for row, i in enumerate((0, 5)):
        inside = batch["attention_mask"][row].bool()
        text = documents[i][: 24 - len(PROMPT)] + PROMPT
        assert tokenizer.decode(batch["input_ids"][row][inside]) == text and not inside[: -len(text)].any()  # padded on the left
        labels = batch["labels"][row][batch["labels"][row] != -100].tolist()
        assert labels[-1] == tokenizer.eos_token_id and tokenizer.decode(labels[:-1]) == f" {summaries[i]}"[:5]
    with pytest.raises(ValueError, match="max_document=10 leaves no token of a document beside the 10"):
        open_summaries(SummarySource(max_document=10), tokenizer, decoder=True, **silent)


@pytest.mark.slow
def test_real_xsum(monkeypatch, tmp_path):
    monkeypatch.setenv("DYN_CACHE", str(tmp_path))
    root = os.environ.get("DYN_DATA")
    if not root or not (Path(root) / "xsum").is_dir():
        pytest.skip("needs a copy of xsum below DYN_DATA")
    assert len(open_summaries(SummarySource(train_limit=50, validation_limit=50), TOKENIZER, **silent).train) == 50
