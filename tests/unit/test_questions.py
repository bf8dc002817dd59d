"""Extractive questions: spans against a plain search, SQuAD's scores, windows that compete, a tiny network that learns to answer."""

import contextlib
import json
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.squad import Question, QuestionSource, open_questions
from dyn.data.tiny import tiny_squad, tiny_tokenizer
from dyn.train import supervised
from dyn.train.optim import RecipeConfig
from dyn.train.questions import QuestionAnswering, best_spans, question_loss, read_answers, scores_of, span_loss
from dyn.train.settings import AnswerConfig
from dyn.train.trainer import TrainerConfig, fit, make_trainer, validate

TOKENIZER = tiny_tokenizer(framed=True)


class FakeRun:
    def __init__(self, folder) -> None:
        self.folder, self.stop, self.lines = folder, threading.Event(), []
        self.listen, self.graceful, self.log = lambda: None, contextlib.nullcontext, self.lines.append


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A function that opens tiny questions."""
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))

    def make(unanswerable: bool = False, count: int = 60):
        path = tiny_squad(tmp_path / f"squad{unanswerable}{count}", count, unanswerable)
        return open_questions(QuestionSource(path=path, max_length=96, stride=16, max_question=40), TOKENIZER, log=lambda _: None)

    return make


def reader():
    """A tiny BERT that points."""
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    return BertForQuestionAnswering(BertConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                               max_position_embeddings=96, pad_token_id=TOKENIZER.pad_token_id))


def config(**changes) -> TrainerConfig:
    given = dict(max_steps=4, precision="32-true", accelerator="cpu", log_every=1, val_every=0, checkpoint_every=0, progress_seconds=0.0)
    return TrainerConfig(**given | changes)


def task_of(net, data, cfg, **more) -> QuestionAnswering:
    return QuestionAnswering(net, RecipeConfig(lr=3e-3), list(data.validation), cfg, questions=data.validation, unanswerable=data.unanswerable, **more)


@pytest.mark.parametrize(("length", "longest", "n"), [(9, 3, 5), (4, 30, 20), (12, 1, 4)])
def test_the_best_spans_are_those_of_a_plain_search(length, longest, n):
    generator = torch.Generator().manual_seed(length)
    start, end = torch.randn(3, length, generator=generator), torch.randn(3, length, generator=generator)
    inside = torch.zeros(3, length, dtype=torch.int64)
    inside[0, 2 : length - 1], inside[1, 1:3], inside[2, length - 1] = 1, 1, 1
    first, last, score = best_spans(start, end, inside, longest, n)
    for b in range(3):
        places = inside[b].nonzero().flatten().tolist()
        expected = sorted(((float(start[b, i] + end[b, j]), i, j) for i in places for j in places if 0 <= j - i < longest), reverse=True)[:n]
        found = [(s, i, j) for s, i, j in zip(score[b].tolist(), first[b].tolist(), last[b].tolist(), strict=True) if s > -1e8]
        assert [(i, j) for _, i, j in found] == [(i, j) for _, i, j in expected]
        assert [s for s, _, _ in found] == pytest.approx([s for s, _, _ in expected])
        assert score.shape == (3, n)


def test_the_loss_does_not_see_padding():
    start, end, labels = torch.randn(2, 6), torch.randn(2, 6), torch.tensor([[1, 2], [0, 0]])
    mask = torch.tensor([[1] * 4 + [0] * 2, [1] * 6])
    expected = [(F.cross_entropy(s[:n], a) + F.cross_entropy(e[:n], b)) / 2 for s, e, (a, b), n in zip(start, end, labels, (4, 6), strict=True)]
    assert span_loss(start, end, mask, labels).tolist() == pytest.approx([x.item() for x in expected])


@pytest.mark.parametrize(("said", "right", "em", "f1"), [
    ("the Cat!", ("a cat", "dog"), 1, 1), ("black cat", ("cat", "a big black cat sits"), 0, 2 / 3), ("", (), 1, 1), ("cat", (), 0, 0), ("", ("cat",), 0, 0),
    ("cat", ("dog",), 0, 0), ("cat cat", ("cat dog",), 0, 0.5),
])
def test_scores_are_those_of_squad(said, right, em, f1):
    assert scores_of(said, Question("a", "What?", "", right, (0,) * len(right))) == (em, pytest.approx(f1))


def test_windows_of_a_question_compete(opened):
    data = opened().validation["validation"]
    owner = next(o for o in range(len(data.questions)) if (data.question == o).sum() > 1)
    windows = np.flatnonzero(data.question == owner)
    first = [int(data.batch(np.array([w]), None)["in_context"][0].nonzero()[0]) for w in windows]
    table = torch.zeros(len(data), 3 + 3 * 2, dtype=torch.float64)
    table[:, 0] = torch.arange(len(data))
    table[:, 3:5] = table[:, 5:7] = torch.tensor([int(data.batch(np.array([w]), None)["in_context"][0].nonzero()[0]) for w in range(len(data))])[:, None]
    table[:, 8] = -2e9  # no second span
    table[windows[0], 7], table[windows[1], 7] = 1.0, 2.0
    cfg = AnswerConfig(n_best=2)
    answer = read_answers(data, table, cfg, unanswerable=False)[owner]
    context = data.questions[owner].context
    place = data.offsets[data.windows.places[windows[1]] + first[1], 0]
    assert answer.text == context[place] and [span.score for span in answer.spans] == [2.0, 1.0] and answer.id == data.questions[owner].id
    assert [span.probability for span in answer.spans] == pytest.approx(torch.tensor([2.0, 1.0]).softmax(0).tolist())
    # With unanswerable questions the lowest null score of the windows decides.
    table[windows, 2] = torch.tensor([9.0, *[3.0] * (len(windows) - 1)], dtype=torch.float64)
    said = [read_answers(data, table, AnswerConfig(n_best=2, null_threshold=t), unanswerable=True)[owner] for t in (0.0, 1.5)]
    assert [a.text for a in said] == ["", context[place]] and said[0].null == 1.0
    assert sum(s.probability for s in said[0].spans) == pytest.approx(1 - torch.tensor([2.0, 1.0, 3.0]).softmax(0)[2].item())


def test_a_network_learns_to_answer(tmp_path, opened):
    data = opened()
    cfg, run = config(max_steps=40, val_every=20, log_every=20), FakeRun(tmp_path)
    net = reader()
    task = task_of(net, data, cfg)
    losses = fit(make_trainer(cfg, run), task, ResumableLoader(data.train, batch_size=12, num_batches=40, seed=0, lengths=data.train.lengths),
                 {"validation": EvaluationLoader(data.validation["validation"], 32)})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [r for r in rows if "val/f1" in r]
    assert [r["step"] for r in scores] == [0, 20, 40] and scores[-1]["val/f1"] > scores[0]["val/f1"] + 0.1
    answers = task.answers["validation"]
    assert task.val_metrics["val/f1"] == pytest.approx(np.mean([a.f1 for a in answers])) and set(task.val_metrics) == {"val/loss", "val/exact_match", "val/f1"}
    assert len(answers) == len(data.validation["validation"].questions) and all(a.text in q.context for a, q in
                                                                               zip(answers, data.validation["validation"].questions, strict=True))
    whole = data.validation["validation"].batch(np.arange(len(data.validation["validation"])), None)
    with torch.no_grad():
        assert question_loss(net.eval(), whole).item() == pytest.approx(losses["validation"], rel=1e-4)
    assert any("f1 0." in line or "f1 1." in line for line in run.lines)


def test_questions_without_an_answer_are_measured(opened):
    data, cfg = opened(unanswerable=True), config()
    task = task_of(reader(), data, cfg)
    validate(task, {"validation": EvaluationLoader(data.validation["validation"], 8)}, cfg)
    found, questions = task.val_metrics, data.validation["validation"].questions
    none = np.mean([not q.answers for q in questions])
    assert found["val/f1"] == pytest.approx((1 - none) * found["val/f1_answerable"] + none * found["val/f1_unanswerable"])
    assert found["val/best_f1"] >= max(found["val/f1"], none) - 1e-9
    for threshold, expected in ((-1e6, 1.0), (1e6, 0.0)):  # never and always an answer
        task = task_of(reader(), data, cfg, answer=AnswerConfig(null_threshold=threshold))
        validate(task, {"validation": EvaluationLoader(data.validation["validation"], 8)}, cfg)
        assert task.val_metrics["val/f1_unanswerable"] == expected


def test_scores_do_not_depend_on_who_saw_what(opened, monkeypatch):
    data, cfg = opened(), config()
    net, held = reader(), EvaluationLoader(data.validation["validation"], 8)
    task = task_of(net, data, cfg)
    validate(task, {"validation": held}, cfg)
    expected = task.val_metrics
    parts, kept = [list(held.shard(rank, 2)) for rank in range(2)], []
    assert len(parts[0]) == len(parts[1]) and all((b["labels"] == -100).all() for b in parts[1][-1:]) is (len(list(held)) % 2 == 1)
    with monkeypatch.context() as other:  # as two processes would: the first gathers what the second has kept
        other.setattr(task, "on_validation_epoch_end", lambda: kept.append(torch.cat(task._rows[0]).cpu()))
        validate(task, {"validation": parts[1]}, cfg)
    monkeypatch.setattr(supervised, "gathered", lambda rows: torch.cat([rows, *kept]))
    validate(task, {"validation": parts[0]}, cfg)
    assert task.val_metrics == pytest.approx(expected)


@pytest.mark.parametrize("setting", [dict(max_answer=0), dict(n_best=0)])
def test_refusals(setting):
    with pytest.raises(ValueError, match=f"answer.{next(iter(setting))}=0 must be at least 1"):
        AnswerConfig(**setting)
