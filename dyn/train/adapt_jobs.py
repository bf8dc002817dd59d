"""The tasks that adapters are trained on, opened: sentences, extractive questions and summaries, as `dyn.train.adapt` wants them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from dyn.data.glue import TASKS
from dyn.data.squad import open_questions
from dyn.data.summaries import open_summaries
from dyn.data.tiny import tiny_tokenizer
from dyn.models.packaged import dense_config, load_tokenizer, question_answerer, summariser, with_places
from dyn.train import sentences
from dyn.train.adapt import Job
from dyn.train.classify import Classifier
from dyn.train.questions import QuestionAnswering, question_loss
from dyn.train.summarise import Summarisation, summary_loss
from dyn.train.trainer import on_gpu


def glue(cfg: Any, run: Any) -> dict[str, Job]:
    """Labelled sentences, a job a task of `cfg.tasks`: `cfg.data` is a SentenceSource, `cfg.classify` a ClassifyConfig."""
    jobs = {}
    for task in cfg.tasks:
        data = sentences.open_task(cfg, run, cfg.source, task)
        caveats = _caveats(cfg, run, data.task)
        build = functools.partial(sentences.build, cfg, run, cfg.source, data)
        jobs[data.task] = Job(data, build, sentences.sentence_loss, _classifier(cfg, data), data.metrics,  # by the name of what was taken
                         lambda said: [column.tolist() for column in said],  # places, predictions, labels
                         {"large": {"dense": "Large-Sparse is better than the dense adapter of its budget on GLUE (the paper: +1.3 points on average)",
                                    "full": "Large-Sparse is better than full fine-tuning on GLUE (abstract)"},
                          "pruned": {"dense": "SNIP at 40 % pruned is comparable to the dense adapter on GLUE, or better (the paper: up to +0.6 points)"},
                          "80 %": {"dense": "SNIP at 80 % pruned is comparable to the dense adapter, or better (abstract)"}},
                         {"source": "google-bert/bert-base-uncased", "path": "nyu-mll/glue", "tasks": list(TASKS)},
                         functools.partial(_numbers, data.metrics[0]), mean=True, caveats=caveats)
    return jobs


def _caveats(cfg: Any, run: Any, task: str) -> tuple[str, ...]:
    found = tuple(sentences.caveats(cfg.source, [task]))
    for caveat in found:
        run.log(f"warning: {caveat}")
    return found


def _classifier(cfg: Any, data: Any) -> Any:
    def task(net: nn.Module, parts: Any, optim: Any, trainer: Any) -> Classifier:
        return Classifier(net, optim, list(parts), trainer, num_labels=data.num_labels, metrics=data.metrics, classify=cfg.classify)

    return task


def _numbers(metric: str, answers: Any) -> dict[str, Any]:
    return {"metric": metric, "predictions": [v for said in answers.values() for v in said.predictions.tolist()],
            "labels": [v for said in answers.values() for v in said.labels.tolist()]}


def _means(answers: Any, value: Any) -> dict[str, Any]:
    """A score that is a mean over examples."""
    values = [value(said) for found in answers.values() for said in found]
    return {"metric": "mean", "predictions": values, "labels": [0] * len(values)}


def questions(cfg: Any, run: Any) -> Job:
    """Extractive questions: `cfg.data` is a QuestionSource, `cfg.answer` an AnswerConfig."""
    tokenizer = _tokenizer(cfg.source)
    data = open_questions(cfg.data, tokenizer, multiple=8 if on_gpu(cfg.trainer) else 1, log=run.log)

    def task(net: nn.Module, parts: Any, optim: Any, trainer: Any) -> QuestionAnswering:
        return QuestionAnswering(net, optim, list(parts), trainer, questions=parts, unanswerable=data.unanswerable, answer=cfg.answer)

    def answer(said: Any) -> dict[str, Any]:
        return {"id": said.id, "text": said.text, "null": said.null, "exact_match": said.em, "f1": said.f1, "spans": [list(span) for span in said.spans[:3]]}

    return Job(data, _seeded(cfg, lambda: with_places(question_answerer(cfg.source, len(tokenizer)), cfg.data.max_length)), question_loss, task,
               ("f1", "exact_match", "f1_answerable", "f1_unanswerable", "best_f1"), lambda said: [answer(one) for one in said],
               {"pruned": {"dense": "SNIP at 40 % pruned is better than the dense adapter on SQuAD (the paper's table 2)"}},
               {"source": "google-bert/bert-base-uncased", "path": "rajpurkar/squad"}, lambda answers: _means(answers, lambda said: said.f1),
               caveats=_caveats(cfg, run, cfg.data.path.rpartition("/")[2]))


def summaries(cfg: Any, run: Any) -> Job:
    """Summaries: `cfg.data` is a SummarySource, `cfg.generate` a GenerateConfig."""
    tokenizer = _tokenizer(cfg.source)
    decoder = cfg.source != "tiny" and not dense_config(cfg.source).is_encoder_decoder
    data = open_summaries(cfg.data, tokenizer, decoder=decoder, multiple=8 if on_gpu(cfg.trainer) else 1, log=run.log)

    def task(net: nn.Module, parts: Any, optim: Any, trainer: Any) -> Summarisation:
        return Summarisation(net, optim, list(parts), trainer, tokenizer=tokenizer, pairs=parts, generate=cfg.generate)

    def answer(said: Any) -> dict[str, Any]:
        return {"index": said.index, "text": said.text, "rouge": list(said.rouge)}

    loss = functools.partial(summary_loss, smoothing=cfg.generate.label_smoothing)
    longest = cfg.data.max_document + (cfg.data.max_summary if decoder else 0)
    build = _seeded(cfg, lambda: with_places(summariser(cfg.source, len(tokenizer)), longest, f"data.max_document{' + data.max_summary' if decoder else ''}"))
    return Job(data, build, loss, task, ("rouge2", "rouge1", "rougeL", "length"), lambda said: [answer(one) for one in said],
               {"pruned": {"dense": "SNIP at 40 % pruned is better than the dense adapter on XSum (the paper's table 2)"}},
               {"source": "facebook/bart-large", "path": "EdinburghNLP/xsum"}, lambda answers: _means(answers, lambda said: said.rouge[1]))


def _seeded(cfg: Any, build: Any) -> Any:
    """A new head, and what is drawn after it, follow from the seed."""

    def make() -> nn.Module:
        torch.manual_seed(cfg.seed)
        return build()

    return make


def _tokenizer(source: str) -> Any:
    return tiny_tokenizer(framed=True) if source == "tiny" else load_tokenizer(source, "source")
