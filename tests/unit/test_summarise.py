"""Writing summaries: the loss, ROUGE, beams, a tiny encoder-decoder that learns to copy the beginning of a text."""

import contextlib
import json
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.summaries import PROMPT, SummarySource, open_summaries
from dyn.data.tiny import tiny_tokenizer, tiny_xsum
from dyn.train import summarise, supervised
from dyn.train.optim import RecipeConfig
from dyn.train.settings import GenerateConfig
from dyn.train.summarise import Summarisation, rouge_of, summary_loss
from dyn.train.trainer import TrainerConfig, fit, make_trainer, validate

TOKENIZER = tiny_tokenizer(framed=True)
SHORT = GenerateConfig(num_beams=2, max_length=12, min_length=2, no_repeat_ngram=0, label_smoothing=0.0)


class FakeRun:
    def __init__(self, folder) -> None:
        self.folder, self.stop, self.lines = folder, threading.Event(), []
        self.listen, self.graceful, self.log = lambda: None, contextlib.nullcontext, self.lines.append


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    return open_summaries(SummarySource(path=tiny_xsum(tmp_path / "xsum", 24), max_document=20, max_summary=12), TOKENIZER, log=lambda _: None)


def writer(**changes):
    """A tiny BART."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    given = dict(vocab_size=len(TOKENIZER), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                 encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, pad_token_id=TOKENIZER.pad_token_id, bos_token_id=1, eos_token_id=2,
                 decoder_start_token_id=2, forced_eos_token_id=2, dropout=0.0)
    return BartForConditionalGeneration(BartConfig(**given | changes))


def config(**changes) -> TrainerConfig:
    given = dict(max_steps=4, precision="32-true", accelerator="cpu", log_every=1, val_every=0, checkpoint_every=0, progress_seconds=0.0)
    return TrainerConfig(**given | changes)


def task_of(net, data, cfg, generate=SHORT) -> Summarisation:
    return Summarisation(net, RecipeConfig(lr=5e-3), list(data.validation), cfg, tokenizer=TOKENIZER, pairs=data.validation, generate=generate)


def test_the_loss_is_that_of_transformers_and_by_token(data):
    net, batch = writer().eval(), data.train.batch(np.arange(6), None)
    with torch.no_grad():
        theirs = net(**batch).loss
        assert summary_loss(net, batch).item() == pytest.approx(theirs.item(), rel=1e-5)
        by_pair = [summary_loss(net, data.train.batch(np.array([i]), None), reduction="sum").item() for i in range(6)]
        assert summary_loss(net, batch, reduction="sum").tolist() == pytest.approx(by_pair, rel=1e-4)  # whatever stands beside a pair
        logits, labels = net(**batch).logits, batch["labels"]
        wanted = labels != -100
        log_p = F.log_softmax(logits[wanted], -1)
        smoothed = -(0.9 * log_p.gather(1, labels[wanted][:, None]).squeeze(1) + 0.1 * log_p.mean(1)).mean()
        assert summary_loss(net, batch, 0.1).item() == pytest.approx(smoothed.item(), rel=1e-5)


def test_a_decoder_learns_to_write_too(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    data = open_summaries(SummarySource(path=tiny_xsum(tmp_path / "xsum", 24), max_document=24, max_summary=12), tokenizer, decoder=True, log=lambda _: None)
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
                                       max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    batch = data.train.batch(np.arange(6), None)
    whole = torch.cat([batch["input_ids"], batch["labels"].clamp(min=0)], 1)
    mask = torch.cat([batch["attention_mask"], (batch["labels"] != -100).long()], 1)
    with torch.no_grad():
        theirs = net(input_ids=whole, attention_mask=mask, labels=torch.cat([torch.full_like(batch["input_ids"], -100), batch["labels"]], 1)).loss
        assert summary_loss(net, batch).item() == pytest.approx(theirs.item(), rel=1e-5)
    cfg, held = config(max_steps=40, log_every=40), EvaluationLoader(data.validation["validation"], 5)
    task = Summarisation(net, RecipeConfig(lr=5e-3), ["validation"], cfg, tokenizer=tokenizer, pairs=data.validation, generate=SHORT)
    fit(make_trainer(cfg, FakeRun(tmp_path)), task, ResumableLoader(data.train, batch_size=12, num_batches=40, seed=0), {"validation": held})
    first, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "val/rouge1" in line)
    assert last["val/loss"] < first["val/loss"] / 2 and 1 <= last["val/length"] <= 12
    assert all(not a.text.startswith(PROMPT.strip()) for a in task.answers["validation"])  # what it was given is not counted as written


@pytest.mark.parametrize(("text", "reference"), [
    ("The cats were running home.", "A cat ran to its homes, running."), ("", "some words"), ("one two three", "one two three"), ("a b c d e", "e d c b a"),
])
def test_rouge_is_that_of_googles_package(text, reference):
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(list(summarise.ROUGE), use_stemmer=True).score(reference, text)
    assert rouge_of(text, reference) == pytest.approx([theirs[key].fmeasure for key in summarise.ROUGE])


def test_a_network_learns_to_write(tmp_path, data):
    cfg, run = config(max_steps=60, log_every=30), FakeRun(tmp_path)
    task = task_of(writer(), data, cfg)
    held = {"validation": EvaluationLoader(data.validation["validation"], 5)}
    losses = fit(make_trainer(cfg, run), task, ResumableLoader(data.train, batch_size=12, num_batches=60, seed=0, lengths=data.train.lengths), held)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (r for r in rows if "val/rouge1" in r)
    assert last["val/loss"] < first["val/loss"] / 2 and set(task.val_metrics) == {"val/loss", "val/rouge1", "val/rouge2", "val/rougeL", "val/length"}
    whole = data.validation["validation"].batch(np.arange(8), None)
    net = task.net.eval()
    with torch.no_grad():
        assert summary_loss(net, whole).item() == pytest.approx(losses["validation"], rel=1e-4)
        written = net.generate(input_ids=whole["input_ids"][:1], attention_mask=whole["attention_mask"][:1], num_beams=2, max_length=12, min_length=2,
                               do_sample=False, early_stopping=True)
    answers = task.answers["validation"]
    assert [a.index for a in answers] == list(range(8)) and answers[0].text == TOKENIZER.decode(written[0], skip_special_tokens=True).strip()
    assert task.val_metrics["val/rouge1"] == pytest.approx(np.mean([a.rouge[0] for a in answers]))
    for answer, reference in zip(answers, data.validation["validation"].references, strict=True):
        assert answer.rouge == rouge_of(answer.text, reference)


def test_scores_do_not_depend_on_who_saw_what(data, monkeypatch):
    cfg = config()
    task, held = task_of(writer(), data, cfg), EvaluationLoader(data.validation["validation"], 3)
    validate(task, {"validation": held}, cfg)
    expected, texts = task.val_metrics, [a.text for a in task.answers["validation"]]
    parts, kept = [list(held.shard(rank, 2)) for rank in range(2)], []
    assert (parts[1][-1]["labels"] == -100).all()  # three batches for two
    with monkeypatch.context() as other:  # as two processes would: the first gathers what the second has kept
        other.setattr(task, "on_validation_epoch_end", lambda: kept.append((torch.cat(task._rows[0]).cpu(), task._texts[0])))
        validate(task, {"validation": parts[1]}, cfg)
    monkeypatch.setattr(supervised, "gathered", lambda rows: torch.cat([rows, kept[0][0]]))
    monkeypatch.setattr(summarise, "gathered", lambda rows: rows + kept[0][1])
    validate(task, {"validation": parts[0]}, cfg)
    assert task.val_metrics == pytest.approx(expected) and [a.text for a in task.answers["validation"]] == texts


def test_written_lengths_keep_their_bounds(data):
    cfg = config()
    task = task_of(writer(), data, cfg, GenerateConfig(num_beams=1, max_length=9, min_length=6, no_repeat_ngram=1))
    validate(task, {"validation": EvaluationLoader(data.validation["validation"], 5)}, cfg)
    assert 5 <= task.val_metrics["val/length"] <= 8


def test_refusals(data):
    for setting, message in ((dict(label_smoothing=1.0), r"label_smoothing=1.0 must lie in \[0, 1\)"), (dict(num_beams=0), "num_beams=0 must be at least 1"),
                             (dict(min_length=60), "min_length=60 between 0 and max_length=60")):
        with pytest.raises(ValueError, match=message):
            GenerateConfig(**setting)
    task = task_of(writer(), data, config(), GenerateConfig())
    with pytest.raises(ValueError, match=r"generate.max_length=60: BartForConditionalGeneration has places for 32 tokens"):
        task.configure_model()
