"""Extractive questions: a network points at the first and the last token of the answer, or at the token before the text where there is none.

B windows a batch, L tokens, A tokens of an answer at most, n spans kept a window, Q questions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.text import squad

from dyn.data.loader import counts
from dyn.data.squad import Question, QuestionSet
from dyn.train.optim import RecipeConfig
from dyn.train.settings import AnswerConfig, TrainerConfig
from dyn.train.supervised import Supervised

_NOT_INPUTS = ("labels", "index", "in_context")
_NEVER = -1e9  # a score below all others, finite so that differences are numbers


class Span(NamedTuple):
    """A candidate: its text, its score (sum of two logits) and its probability among the candidates of its question."""

    text: str
    score: float
    probability: float


class Answer(NamedTuple):
    """What was said to a question: `text`, empty for "no answer"; `null` is the score of that less the best span's; em and f1 in [0, 1]; the best spans."""

    id: str
    text: str
    null: float
    em: float
    f1: float
    spans: list[Span]


def span_loss(start_BL: Tensor, end_BL: Tensor, mask_BL: Tensor, labels_B2: Tensor) -> Tensor:
    """Mean of the two cross-entropies by window, [B]; padding takes no probability, so that a loss does not depend on the batch it is in."""
    losses = [F.cross_entropy(logits.float().masked_fill(mask_BL == 0, -math.inf), target, reduction="none")
              for logits, target in ((start_BL, labels_B2[:, 0]), (end_BL, labels_B2[:, 1]))]
    return (losses[0] + losses[1]) / 2


def best_spans(start_BL: Tensor, end_BL: Tensor, inside_BL: Tensor, max_answer: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n best spans of each window, all of them looked at: first and last token int64 [B, n], scores float32 [B, n], at most -1e9 where there are fewer.

    A span lies inside the text (`inside_BL`) and has 1 .. max_answer tokens; its score is start[first] + end[last].
    """
    start_BL, end_BL = (logits.float().masked_fill(inside_BL == 0, _NEVER) for logits in (start_BL, end_BL))
    (B, L), A = start_BL.shape, min(max_answer, start_BL.shape[1])
    ends_BLA = F.pad(end_BL, (0, A - 1), value=_NEVER).unfold(1, A, 1)
    score_BN = (start_BL[:, :, None] + ends_BLA).reshape(B, L * A)
    score_Bn, place_Bn = score_BN.topk(min(n, L * A), dim=1)
    if (missing := n - score_Bn.shape[1]) > 0:
        score_Bn, place_Bn = F.pad(score_Bn, (0, missing), value=2 * _NEVER), F.pad(place_Bn, (0, missing))
    first_Bn = place_Bn // A
    return first_Bn, first_Bn + place_Bn % A, score_Bn


def scores_of(text: str, question: Question) -> tuple[float, float]:
    """(exact match, F1) of an answer in [0, 1], the best over the question's right answers; SQuAD's own scores, by torchmetrics."""
    found = squad({"id": question.id, "prediction_text": text}, {"id": question.id, "answers": {"text": list(question.answers) or [""], "answer_start": [0]}})
    return found["exact_match"].item() / 100, found["f1"].item() / 100


class QuestionAnswering(Supervised):
    """Cross-entropy on the first and last token of answers.

    Batches are those of `dyn.data.squad`. The net maps its named inputs to an output with start_logits and end_logits [B, L].

    Logged: as in `Supervised`, train/loss; at validation, over questions, each once: exact_match, f1 and, where questions may have no answer, f1_answerable,
    f1_unanswerable and best_f1 (with the threshold chosen afterwards on the same questions: an upper bound). `answers`: set -> `Answer` by question.

    Args:
        net, optim, sets, cfg: as in `Supervised`.
        questions: set -> the questions that its windows are of.
        unanswerable: may the answer be "none"?
        answer: how spans are read.
    """

    unit = "windows"

    def __init__(self, net: nn.Module | Callable[[], nn.Module], optim: RecipeConfig, sets: Sequence[str], cfg: TrainerConfig, *,
                 questions: Mapping[str, QuestionSet], unanswerable: bool, answer: AnswerConfig | None = None) -> None:
        super().__init__(net, optim, sets, cfg)
        self.questions, self.unanswerable = dict(questions), unanswerable
        self.answer = AnswerConfig() if answer is None else answer

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        self.examples += self.amount(batch) * self.trainer.world_size
        loss = question_loss(self.net, batch)
        self.record(**{"train/loss": loss})
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Keeps (window, loss, null score, then first, last and score of each span)."""
        start_BL, end_BL = _logits(self.net, batch)
        wanted, labels = counts(batch["labels"][:, 0]), batch["labels"].clamp(min=0)
        loss = span_loss(start_BL, end_BL, batch["attention_mask"], labels)
        first, last, score = best_spans(start_BL, end_BL, batch["in_context"], self.answer.max_answer, self.answer.n_best)
        null = start_BL[:, 0].float() + end_BL[:, 0].float()
        row = torch.cat([torch.stack([batch["index"].double(), loss.double(), null.double()], 1), first.double(), last.double(), score.double()], 1)
        self._rows[dataloader_idx].append(row[wanted])
        return {}

    def on_validation_epoch_end(self) -> None:
        """Exact scores over all questions, each once, whichever ranks saw its windows."""
        losses, scores = {}, {}
        for place, name in enumerate(self.domains):
            table = self.table(place)
            losses[name] = table[:, 1].mean().item()
            answers = self.answers[name] = read_answers(self.questions[name], table, self.answer, self.unanswerable)
            scores[name] = _overall(answers, self.questions[name].questions, self.unanswerable)
        self.report(losses, scores)

    def about(self) -> dict[str, Any]:
        """How spans are read too."""
        return super().about() | {"answer": dataclasses.asdict(self.answer), "unanswerable": self.unanswerable}


def question_loss(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of a batch: what is trained on, and what scores of pruning look at."""
    return span_loss(*_logits(net, batch), batch["attention_mask"], batch["labels"]).mean()


def _logits(net: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    out = net(**{key: value for key, value in batch.items() if key not in _NOT_INPUTS})
    return out.start_logits, out.end_logits


def read_answers(data: QuestionSet, table: Tensor, cfg: AnswerConfig, unanswerable: bool) -> list[Answer]:
    """The best span over each question's windows, or none, with its scores; `table` has a row a window, in order, as `QuestionAnswering` keeps them."""
    null_W = table[:, 2]
    first_Wn, last_Wn, score_Wn = table[:, 3:].tensor_split(3, dim=1)
    rows: dict[int, list[int]] = {}
    for row, window in enumerate(table[:, 0].long().tolist()):
        rows.setdefault(int(data.question[window]), []).append(row)
    answers = []
    for owner, question in enumerate(data.questions):
        mine = torch.tensor(rows[owner])
        best, order = score_Wn[mine].flatten().sort(descending=True, stable=True)
        best, order = best[: cfg.n_best], order[: cfg.n_best]
        best = best[best > _NEVER / 2]
        texts = []
        for flat in order[: len(best)].tolist():
            row, place = rows[owner][flat // score_Wn.shape[1]], flat % score_Wn.shape[1]
            texts.append(data.text(int(table[row, 0]), int(first_Wn[row, place]), int(last_Wn[row, place])))
        null = null_W[mine].min().item()
        share = torch.cat([best, torch.tensor([null], dtype=best.dtype)] if unanswerable else [best]).softmax(0).tolist()
        spans = [Span(text, score, probability) for text, score, probability in zip(texts, best.tolist(), share[: len(texts)], strict=True)]
        odds = null - spans[0].score if spans else -_NEVER
        text = "" if not spans or (unanswerable and odds > cfg.null_threshold) else spans[0].text
        answers.append(Answer(question.id, text, odds, *scores_of(text, question), spans))
    return answers


def _overall(answers: Sequence[Answer], questions: Sequence[Question], unanswerable: bool) -> dict[str, float]:
    found = {"exact_match": _mean([a.em for a in answers]), "f1": _mean([a.f1 for a in answers])}
    if unanswerable:
        for name, has in (("answerable", True), ("unanswerable", False)):
            if values := [a.f1 for a, q in zip(answers, questions, strict=True) if bool(q.answers) is has]:
                found[f"f1_{name}"] = _mean(values)
        found["best_f1"] = _best_f1(answers, questions)
    return found


def _best_f1(answers: Sequence[Answer], questions: Sequence[Question]) -> float:
    """F1 with the threshold on the null score that suits these questions best: those with the lowest odds of none are answered."""
    pairs = sorted((a.null, scores_of(a.spans[0].text if a.spans else "", q)[1], float(not q.answers)) for a, q in zip(answers, questions, strict=True))
    total = best = math.fsum(none for _, _, none in pairs)  # nothing is answered
    for _, answered, none in pairs:
        total += answered - none
        best = max(best, total)
    return best / len(pairs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
