"""Questions whose answer is a span of a text: SQuAD v1.1 and v2, from the hub or a folder in its layout, as windows of tokens.

A text that is too long for one window is read in several that overlap; each is an example of its own, and the answers of a question's windows compete.

B windows a batch, L tokens of the longest of them, W windows in all, T tokens in all, Q questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dyn.data.glue import SentenceSet
from dyn.data.loader import Draw, carve, chosen
from dyn.data.local_tasks import gaps
from dyn.data.sources import at_least_one, labelled, load_splits, whence
from dyn.data.tiny import tiny_questions
from dyn.data.tokens import parallel_tokenizer

COLUMNS = ("id", "question", "context", "answers")
_CHUNK = 1000  # questions that are tokenised at a time


@dataclass(kw_only=True, slots=True)
class QuestionSource:
    """Which questions, and how their texts are cut into windows.

    path, revision: a hub id (rajpurkar/squad_v2 has unanswerable questions too) or a folder in the hub's layout; copies below $DYN_DATA come before the hub.
        "local": gaps in the documentation that every Python machine holds; "tiny": generated questions.
    splits: to validate on.
    max_length: tokens of a window, question and all.
    stride: tokens of the text that neighbouring windows share.
    max_question: tokens of a question; what is longer is cut.
    train_limit, validation_limit: at most so many questions, chosen by `seed`; None: all.
    tuning: share of the training texts whose questions are held out for choosing learning rates, by `seed`, and never reported; 0: none.
    seed: of the choices above.
    """

    path: str = "rajpurkar/squad"
    revision: str | None = None
    splits: list[str] | None = None
    max_length: int = 384
    stride: int = 128
    max_question: int = 64
    train_limit: int | None = None
    validation_limit: int | None = None
    tuning: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """ValueError for sizes that cannot be."""
        if self.max_question < 1 or self.stride < 0 or self.max_length < 8:
            raise ValueError(f"max_length={self.max_length} must be at least 8, max_question={self.max_question} 1, stride={self.stride} 0")
        at_least_one(self, "train_limit", "validation_limit")


class Question(NamedTuple):
    """A question with all answers that count as right, none for an unanswerable one; places in characters of the text."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass
class QuestionSet:
    """Windows in memory, padded when a batch is made.

    windows: their tokens; `labels` [W, 2] are the first and last token of the first answer, 0 and 0 (the token before the question) where the window has
    none; the column `in_context` is 1 where a token belongs to the text.
    question: [W], which of `questions` a window is of; windows of a question stand together.
    offsets: int32 [T, 2], the characters of the text that a token stands for; None for training sets.
    """

    windows: SentenceSet
    question: np.ndarray
    questions: list[Question]
    offsets: np.ndarray | None

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window, [W]: for `ResumableLoader`."""
        return self.windows.lengths

    def batch(self, index: np.ndarray, draw: Draw | None) -> dict[str, Tensor]:
        """input_ids, attention_mask, in_context and, where the tokenizer has them, token_type_ids int64 [B, L]; labels [B, 2]. `draw` does not matter."""
        return self.windows.batch(index, draw)

    def text(self, window: int, first: int, last: int) -> str:
        """What tokens first .. last of a window, both of the text, stand for."""
        place = self.windows.places[window]
        return self.questions[self.question[window]].context[self.offsets[place + first, 0] : self.offsets[place + last, 1]]


@dataclass
class QuestionData:
    """An opened data set. validation: split -> questions. unanswerable: are there questions without an answer? `what` says in words which data were taken."""

    train: QuestionSet
    validation: dict[str, QuestionSet]
    tuning: QuestionSet | None
    unanswerable: bool
    what: str


def open_questions(source: QuestionSource, tokenizer: Any, *, multiple: int = 1, log: Callable[[str], None] = print) -> QuestionData:
    """Questions as windows, tokenised once; ready for `ResumableLoader` (train, with its `lengths`) and `EvaluationLoader` (validation, tuning).

    Args:
        source: which questions.
        tokenizer: a fast tokenizer of transformers, with a token before each text (its cls_token) and a padding token.
        multiple: lengths of batches are rounded up to it (8 suits GPUs).
        log: gets a line that says which data were taken.

    Raises:
        ValueError: nothing at the path, missing splits or columns, an answer that does not stand where it should, settings or a tokenizer that do not fit.
    """
    source.check()
    _check_tokenizer(tokenizer, source)
    parts, what = _read(source)
    kept = {}
    for split, found in parts.items():
        limit = source.train_limit if split == "train" else source.validation_limit
        kept[split] = [found[i] for i in chosen(len(found), limit, source.seed, 0x717573)]
        _check_answers(kept[split], f"{what}, split {split!r}")
    sets = {split: _windows(found, tokenizer, source, multiple, offsets=True) for split, found in kept.items() if split != "train"}
    train, held = _held_out(kept["train"], source)
    tuning = _windows(held, tokenizer, source, multiple, offsets=True) if held else None
    unanswerable = any(not q.answers for found in kept.values() for q in found)
    data = QuestionData(_windows(train, tokenizer, source, multiple, offsets=False), sets, tuning, unanswerable, "")
    held_words = f", {len(held):,} to choose by" if held else ""
    data.what = (f"{what}: {len(train):,} questions to train on in {len(data.train):,} windows{held_words}, "
                 + " and ".join(f"{len(part.questions):,} to validate ({split}) in {len(part):,} windows" for split, part in sets.items())
                 + (", some unanswerable" if unanswerable else ""))
    log(f"questions: {data.what}")
    return data


def _check_tokenizer(tokenizer: Any, source: QuestionSource) -> None:
    if not getattr(tokenizer, "is_fast", False) or tokenizer.cls_token_id is None or tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        raise ValueError(f"{type(tokenizer).__name__}: questions need a fast tokenizer that has a padding token, pads on the right, and puts a token of "
                         f"its own (cls_token) first; this one has cls_token {tokenizer.cls_token}, pad_token {tokenizer.pad_token}, "
                         f"padding_side {tokenizer.padding_side!r}")
    if tokenizer("a", "b")["input_ids"][0] != tokenizer.cls_token_id:
        raise ValueError(f"{type(tokenizer).__name__} does not put its cls_token {tokenizer.cls_token} first, where a question without an answer is to point")
    own = tokenizer.num_special_tokens_to_add(pair=True)
    if (room := source.max_length - source.max_question - own) <= source.stride:
        raise ValueError(f"max_length={source.max_length} leaves {room} tokens for the text beside max_question={source.max_question} and {own} of the "
                         f"tokenizer's own: stride={source.stride} must be smaller than that")


def _read(source: QuestionSource) -> tuple[dict[str, list[Question]], str]:
    """Split -> questions, and what was taken."""
    where = f"path={source.path!r}"
    if source.path in MADE:
        found, what = MADE[source.path]()
        rows = {split: [tuple(row[column] for column in COLUMNS) for row in found[split]] for split in ("train", "validation")}
    else:
        what = f"{source.path}, {whence(source.path)}"
        found = labelled(load_splits(source.path, revision=source.revision), {repr(c): c for c in COLUMNS}, source.splits or ["validation"], where)
        rows = {split: zip(*(part[column][:] for column in COLUMNS), strict=True) for split, part in found.items()}
    return {split: [_question(row, f"{where}, split {split!r}") for row in part] for split, part in rows.items()}, what


MADE: dict[str, Callable[[], tuple[dict[str, list[dict[str, Any]]], str]]] = {"local": gaps, "tiny": lambda: (tiny_questions(), "generated questions")}


def _question(values: tuple, where: str) -> Question:
    key, question, context, answers = values
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys() or len(answers["text"]) != len(answers["answer_start"]):
        raise ValueError(f"{where}, id {key!r}: answers must have text and answer_start, two lists of one length; got {str(answers)[:80]}")
    return Question(key, question, context, tuple(answers["text"]), tuple(answers["answer_start"]))


def _check_answers(questions: Sequence[Question], where: str) -> None:
    """ValueError for answers that do not stand in the text where they say, and for ids that are not unique: scores would be of other questions."""
    if not questions:
        raise ValueError(f"{where}: no questions")
    if len({q.id for q in questions}) < len(questions):
        seen: set[str] = set()
        raise ValueError(f"{where}: id {next(q.id for q in questions if q.id in seen or seen.add(q.id))!r} comes twice")
    for q in questions:
        for text, start in zip(q.answers, q.starts, strict=True):
            if not text.strip() or start < 0 or q.context[start : start + len(text)] != text:
                raise ValueError(f"{where}, id {q.id!r}: answer {text!r} does not stand at answer_start={start} of its context, where "
                                 f"{q.context[max(start, 0) : start + len(text)]!r} does")


def _held_out(questions: list[Question], source: QuestionSource) -> tuple[list[Question], list[Question]]:
    """(to train on, to choose by): no text gives to both."""
    if not source.tuning:
        return questions, []
    texts = {text: i for i, text in enumerate(dict.fromkeys(q.context for q in questions))}
    held = set(carve(len(texts), source.tuning, source.seed)[1].tolist())
    return [q for q in questions if texts[q.context] not in held], [q for q in questions if texts[q.context] in held]


def _windows(questions: list[Question], tokenizer: Any, source: QuestionSource, multiple: int, *, offsets: bool) -> QuestionSet:
    names = [name for name in tokenizer.model_input_names if name in ("input_ids", "token_type_ids")]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in [*names, "in_context"]}
    spans, lengths, owners, labels = [], [], [], []
    with parallel_tokenizer():
        for owner, ids, inside_T, span_T2, label in _tokenised(questions, tokenizer, source, names):
            for name in names:
                columns[name].append(ids[name])
            columns["in_context"].append(inside_T.astype(np.int32))
            lengths.append(len(inside_T))
            owners.append(owner)
            labels.append(label)
            if offsets:
                spans.append(span_T2)
    pads = {name: {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}.get(name, 0) for name in columns}
    windows = SentenceSet({name: np.concatenate(values) for name, values in columns.items()}, np.concatenate([[0], np.cumsum(lengths)]), torch.tensor(labels),
                          pads, multiple=multiple)
    return QuestionSet(windows, np.array(owners), questions, np.concatenate(spans) if offsets else None)


def _tokenised(questions: Sequence[Question], tokenizer: Any, source: QuestionSource,
               names: Sequence[str]) -> Iterator[tuple[int, dict[str, np.ndarray], np.ndarray, np.ndarray, tuple[int, int]]]:
    """(place of the question, ids by column, belongs to the text, characters [T, 2], label) of every window."""
    for first in range(0, len(questions), _CHUNK):
        chunk = questions[first : first + _CHUNK]
        # White space at the front of a question says nothing and would be tokens to some tokenizers.
        asked = [q.question.lstrip() for q in chunk]
        cut = tokenizer(asked, add_special_tokens=False, truncation=True, max_length=source.max_question, return_offsets_mapping=True)["offset_mapping"]
        asked = [text[: places[-1][1]] if places else "" for text, places in zip(asked, cut, strict=True)]
        made = tokenizer(asked, [q.context for q in chunk], truncation="only_second", max_length=source.max_length, stride=source.stride,
                         return_overflowing_tokens=True, return_offsets_mapping=True)
        for window, owner in enumerate(made["overflow_to_sample_mapping"]):
            inside = np.array([part == 1 for part in made.sequence_ids(window)])
            span = np.array(made["offset_mapping"][window], np.int32)
            yield (first + owner, {name: np.array(made[name][window], np.int32) for name in names}, inside, span, _label(chunk[owner], inside, span))


def _label(question: Question, inside_T: np.ndarray, span_T2: np.ndarray) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where the window does not hold all of it."""
    places = inside_T.nonzero()[0]
    if not question.answers or not len(places):
        return 0, 0
    text = question.answers[0]  # white space at its ends belongs to no token
    start = question.starts[0] + len(text) - len(text.lstrip())
    end = start + len(text.strip())
    if span_T2[places[0], 0] > start or span_T2[places[-1], 1] < end:
        return 0, 0
    return int(places[np.searchsorted(span_T2[places, 1], start, side="right")]), int(places[np.searchsorted(span_T2[places, 0], end, side="left") - 1])
