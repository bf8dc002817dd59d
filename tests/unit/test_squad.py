"""Questions as windows: from a tiny folder in the hub's layout, from this machine's documentation, refused where they do not fit. No network."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.local_tasks import GAP, gaps, summary_lines
from dyn.data.squad import QuestionSource, open_questions
from dyn.data.tiny import tiny_questions, tiny_squad, tiny_tokenizer

silent = dict(log=lambda _: None)
TOKENIZER = tiny_tokenizer(framed=True)
SMALL = dict(max_length=96, stride=16, max_question=40)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """DYN_DATA with a tiny `squad` in it."""
    monkeypatch.setenv("DYN_DATA", str(tmp_path))
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    return Path(tiny_squad(tmp_path / "squad"))


def write(folder: Path, rows: list[dict]) -> str:
    """Rows as a data set of JSON files, for both splits."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def row(context: str, answer: str | None, key: str = "a", start: int | None = None, question: str = "What?") -> dict:
    start = context.index(answer) if start is None and answer is not None else start
    return {"id": key, "question": question, "context": context, "answers": {"text": [] if answer is None else [answer],
                                                                            "answer_start": [] if answer is None else [start]}}


def test_a_copy_of_squad(folder):
    lines = []
    data = open_questions(QuestionSource(**SMALL), TOKENIZER, log=lines.append)
    assert lines == [f"questions: {data.what}"] and data.what.startswith("rajpurkar/squad, a local copy: 60 questions to train on in ")
    held, source = data.validation["validation"], tiny_questions()["validation"]
    assert [q.id for q in held.questions] == [r["id"] for r in source] and not data.unanswerable and data.train.offsets is None
    batch = held.batch(np.arange(3), None)
    owners = held.question[:3]
    made = TOKENIZER([source[i]["question"] for i in dict.fromkeys(owners.tolist())], [source[i]["context"] for i in dict.fromkeys(owners.tolist())],
                     truncation="only_second", max_length=96, stride=16, return_overflowing_tokens=True)
    for i in range(3):
        count = len(made["input_ids"][i])
        assert batch["input_ids"][i, :count].tolist() == made["input_ids"][i] and bool((batch["input_ids"][i, count:] == TOKENIZER.pad_token_id).all())
        assert batch["attention_mask"][i].sum() == count
        assert batch["in_context"][i, :count].tolist() == [int(part == 1) for part in made.sequence_ids(i)] and not batch["in_context"][i, count:].any()


def test_labels_say_the_answer_in_every_window_that_holds_it(folder):
    held = open_questions(QuestionSource(**SMALL), TOKENIZER, **silent).validation["validation"]
    assert len(held) > len(held.questions)  # some texts need several windows
    said = {}
    for window in range(len(held)):
        question, (first, last) = held.questions[held.question[window]], held.windows.labels[window].tolist()
        covered = held.offsets[held.windows.places[window] : held.windows.places[window + 1]]
        covered = covered[held.batch(np.array([window]), None)["in_context"][0].bool().numpy()]
        holds = covered[0, 0] <= question.starts[0] and covered[-1, 1] >= question.starts[0] + len(question.answers[0])
        assert (first, last) == (0, 0) if not holds else held.text(window, first, last) == question.answers[0]
        said[question.id] = said.get(question.id, 0) + holds
    assert min(said.values()) >= 1


def test_windows_cover_every_text_and_share_the_stride(folder):
    held = open_questions(QuestionSource(**SMALL), TOKENIZER, **silent).validation["validation"]
    for owner, question in enumerate(held.questions):
        seen: list[set[int]] = []
        for window in np.flatnonzero(held.question == owner):
            inside = held.batch(np.array([window]), None)["in_context"][0].bool().numpy()
            seen.append(set(held.offsets[held.windows.places[window] : held.windows.places[window + 1]][inside, 0].tolist()))
        assert set.union(*seen) == set(range(len(question.context)))
        assert all(len(a & b) == 16 for a, b in zip(seen, seen[1:], strict=False))


def test_questions_without_an_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    folder = tiny_squad(tmp_path / "squad_v2", unanswerable=True)
    data = open_questions(QuestionSource(path=folder, **SMALL), TOKENIZER, **silent)
    assert data.unanswerable and data.what.endswith(", some unanswerable")
    none = [not q.answers for q in data.train.questions]
    assert sum(none) == 20
    for window, owner in enumerate(data.train.question):
        assert not none[owner] or data.train.windows.labels[window].tolist() == [0, 0]


@pytest.mark.parametrize(("context", "answer", "text"), [
    ("Ångström measured ☃ light.", "☃ light", "☃ light"), ("It is red. ", "red. ", "red."), ("  blue it is", "  blue", "blue"), ("x", "x", "x"),
])
def test_characters_of_several_bytes_and_white_space(tmp_path, monkeypatch, context, answer, text):
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    held = open_questions(QuestionSource(path=write(tmp_path / "d", [row(context, answer)]), **SMALL), TOKENIZER, **silent).validation["validation"]
    assert held.text(0, *held.windows.labels[0].tolist()) == text


def test_a_tokenizer_with_token_types(tmp_path, monkeypatch):
    from transformers import BertTokenizerFast

    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "hat", "is", "red", "what", "?", "."]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    data = open_questions(QuestionSource(path=write(tmp_path / "d", [row("The hat is red.", "red")]), **SMALL), tokenizer, **silent)
    batch = data.train.batch(np.array([0]), None)
    assert batch["labels"].tolist() == [[7, 7]] and batch["token_type_ids"].tolist() == [[0] * 4 + [1] * 6] and "offset_mapping" not in batch
    assert data.validation["validation"].text(0, 7, 7) == "red"


def test_long_questions_are_cut(folder, tmp_path):
    path = write(tmp_path / "d", [row("It is red.", "red", question="   Why" + "?" * 80)])
    data = open_questions(QuestionSource(path=path, **SMALL), TOKENIZER, **silent)
    ids = data.train.batch(np.array([0]), None)["input_ids"][0].tolist()
    assert TOKENIZER.decode(ids) == "<s>Why" + "?" * 37 + "</s></s>It is red.</s>"


def test_loaders_over_windows(folder):
    data = open_questions(QuestionSource(**SMALL), TOKENIZER, **silent)
    grouped, plain = (ResumableLoader(data.train, batch_size=4, seed=1, lengths=lengths) for lengths in (data.train.lengths, None))
    padding = [sum(int((b["attention_mask"] == 0).sum()) for b in loader) for loader in (grouped, plain)]
    assert padding[0] < padding[1] / 3
    held = data.validation["validation"]
    assert torch.cat([b["index"] for b in EvaluationLoader(held, 5)]).tolist() == list(range(len(held)))


def test_limits_and_the_held_out_texts_go_by_the_seed(folder):
    def ids(**settings):
        data = open_questions(QuestionSource(**SMALL, **settings), TOKENIZER, **silent)
        return data, [q.id for q in data.train.questions]

    _, every = ids()
    data, kept = ids(tuning=0.3)
    assert sorted(kept + [q.id for q in data.tuning.questions]) == sorted(every) and ids(tuning=0.3)[1] == kept != ids(tuning=0.3, seed=1)[1]
    assert {q.context for q in data.train.questions}.isdisjoint({q.context for q in data.tuning.questions})
    few, some = ids(train_limit=7, validation_limit=5)
    assert len(some) == 7 and set(some) < set(every) and len(few.validation["validation"].questions) == 5


@pytest.mark.parametrize(("settings", "message"), [
    (dict(max_length=60), r"max_length=60 leaves 16 tokens for the text beside max_question=40 and 4 .*stride=16 must be smaller"),
    (dict(splits=["test"]), "no split 'test'; there are validation"), (dict(path="someone/else"), "no data set; looked for a folder, a copy below"),
    (dict(train_limit=0), "train_limit=0 must be at least 1"), (dict(stride=-1), "stride=-1 0"), (dict(tuning=1.0), "cannot be held out"),
])
def test_refusals(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        open_questions(QuestionSource(**SMALL | settings), TOKENIZER, **silent)


@pytest.mark.parametrize(("rows", "message"), [
    ([row("It is red.", "red", start=5)], r"split 'train', id 'a': answer 'red' does not stand at answer_start=5 of its context, where ' re' does"),
    ([row("It is red.", "", start=2)], "answer '' does not stand"), ([row("It is red.", "red"), row("So.", None)], "id 'a' comes twice"),
    ([{"id": "a", "question": "What?", "context": "It."}], "no column 'answers'; found id, question, context"),
    ([{"id": "a", "question": "What?", "context": "It.", "answers": {"text": ["It"], "answer_start": []}}], "id 'a': answers must have text and answer_start"),
])
def test_broken_data_are_named(folder, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        open_questions(QuestionSource(path=write(tmp_path / "d", rows), **SMALL), TOKENIZER, **silent)


def test_tokenizers_that_do_not_fit(folder):
    with pytest.raises(ValueError, match="cls_token None"):
        open_questions(QuestionSource(**SMALL), tiny_tokenizer(), **silent)
    left = tiny_tokenizer(framed=True)
    left.padding_side = "left"
    with pytest.raises(ValueError, match=r"pads on the right.*padding_side 'left'"):
        open_questions(QuestionSource(**SMALL), left, **silent)


def test_gaps_in_documentation():
    parts, what = gaps(limit_bytes=150_000)
    assert "not SQuAD" in what and len(parts["train"]) > 20 and parts["validation"]
    for q in parts["train"] + parts["validation"]:
        answer, start = q["answers"]["text"][0], q["answers"]["answer_start"][0]
        assert q["context"][start : start + len(answer)] == answer and q["context"].count(q["question"].replace(GAP, answer)) == 1
    assert {q["context"] for q in parts["train"]}.isdisjoint({q["context"] for q in parts["validation"]}) and gaps(limit_bytes=150_000)[0] == parts


def test_summary_lines_of_docstrings():
    parts, what = summary_lines()
    assert "not XSum" in what and len(parts["train"][0]) > 500 and len(parts["validation"][0]) > 30
    assert set(parts["train"][0]).isdisjoint(parts["validation"][0]) and all("\n" not in line for pair in parts.values() for line in pair[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_real_squad(name, monkeypatch, tmp_path):
    monkeypatch.setenv("DYN_CACHE", str(tmp_path))
    root = os.environ.get("DYN_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs a copy of {name} below DYN_DATA")
    data = open_questions(QuestionSource(path=f"rajpurkar/{name}", train_limit=50, validation_limit=50), TOKENIZER, **silent)
    assert len(data.train.questions) == 50 and data.unanswerable is (name == "squad_v2")
