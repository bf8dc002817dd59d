"""Labelled sentences: the GLUE tasks from the hub or a folder in its layout, and a task of docstrings for machines that have neither.

B examples a batch, L tokens of the longest of them, N examples in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dyn.data import local_text
from dyn.data.loader import Draw, carve, chosen
from dyn.data.sources import at_least_one, choose, labelled, load_splits, whence
from dyn.data.tokens import parallel_tokenizer

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
_CHUNK = 2000  # examples that are tokenised at a time


class Task(NamedTuple):
    """fields: the columns of the sentences. labels: how many; 0: a real number. metrics: as GLUE reports them, the first one leads. splits: to validate on."""

    fields: tuple[str, ...]
    labels: int
    metrics: tuple[Metric, ...]
    splits: tuple[str, ...] = ("validation",)


TASKS = {
    "cola": Task(("sentence",), 2, ("matthews",)),
    "sst2": Task(("sentence",), 2, ("accuracy",)),
    "mrpc": Task(("sentence1", "sentence2"), 2, ("accuracy", "f1")),
    "qqp": Task(("question1", "question2"), 2, ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), 0, ("pearson", "spearman")),
    "mnli": Task(("premise", "hypothesis"), 3, ("accuracy",), ("validation_matched", "validation_mismatched")),
    "qnli": Task(("question", "sentence"), 2, ("accuracy",)),
    "rte": Task(("sentence1", "sentence2"), 2, ("accuracy",)),
    "wnli": Task(("sentence1", "sentence2"), 2, ("accuracy",)),
}
# Examples to train on
EXAMPLES = {"cola": 8_551, "sst2": 67_349, "mrpc": 3_668, "qqp": 363_846, "stsb": 5_749, "mnli": 392_702, "qnli": 104_743, "rte": 2_490, "wnli": 635}
NOT_IN_MEANS = "wnli"  # its validation set is built against its training set: most models do worse than always giving one answer
DOCSTRINGS = Task(("docstring",), len(local_text.PACKAGES), ("accuracy", "f1"))


@dataclass(kw_only=True, slots=True)
class SentenceSource:
    """Which task, how long its examples may be.

    path, revision: a hub id or a folder in the hub's layout with a config a task; copies below $DYN_DATA come before the hub.
    task: a name of TASKS, or "docstrings".
    fallback: take the docstring task where neither a folder nor the hub has the task; it is said in words. Otherwise that is an error.
    splits: to validate on; None: the task's own.
    max_length: tokens; what is longer is cut.
    train_limit: at most so many training examples, chosen by `seed`; None: all.
    tuning: share of the training examples that is held out for choosing learning rates, by `seed`, and never reported; 0: none.
    seed: of the choices above.
    """

    path: str = "nyu-mll/glue"
    revision: str | None = None
    task: str = "mrpc"
    fallback: bool = False
    splits: list[str] | None = None
    max_length: int = 128
    train_limit: int | None = None
    tuning: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """ValueError for an unknown task, one without labels, and sizes that cannot be."""
        if self.task == "ax":
            raise ValueError("task='ax' has no labels, so it can be neither trained on nor scored")
        choose([self.task], [*TASKS, "docstrings"], "GLUE", "task")
        if self.max_length < 4:
            raise ValueError(f"max_length={self.max_length} must be at least 4")
        at_least_one(self, "train_limit")


@dataclass
class SentenceSet:
    """Tokenised examples in memory, padded when a batch is made.

    columns: name -> ids of all examples one after another, int32; places: [N + 1] where each begins. labels: int64 or float32 [N].
    pads: name -> what fills the column up; left: on that side.
    """

    columns: dict[str, np.ndarray]
    places: np.ndarray
    labels: Tensor
    pads: dict[str, int]
    left: bool = False
    multiple: int = 1  # lengths of batches are rounded up to it

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, [N]: for `ResumableLoader`."""
        return np.diff(self.places)

    def batch(self, index: np.ndarray, draw: Draw | None) -> dict[str, Tensor]:
        """input_ids, attention_mask and, where the tokenizer has them, token_type_ids int64 [B, L]; labels [B]. `draw` does not matter here."""
        lengths_B = self.lengths[index]
        longest = -(-int(lengths_B.max()) // self.multiple) * self.multiple
        inside_BL = np.arange(longest) < lengths_B[:, None]
        if self.left:
            inside_BL = inside_BL[:, ::-1]
        # Row by row, the places of an example are where the mask is set.
        flat = np.repeat(self.places[index] - np.cumsum(lengths_B) + lengths_B, lengths_B) + np.arange(lengths_B.sum())
        result = {}
        for name, values in self.columns.items():
            padded_BL = np.full(inside_BL.shape, self.pads[name], np.int64)
            padded_BL[inside_BL] = values[flat]
            result[name] = torch.from_numpy(padded_BL)
        mask = torch.from_numpy(np.ascontiguousarray(inside_BL, dtype=np.int64))
        return {**result, "attention_mask": mask, "labels": self.labels[torch.from_numpy(index)]}

    def select(self, index: np.ndarray) -> SentenceSet:
        """Some of the examples, in the order given."""
        lengths = self.lengths[index]
        flat = np.repeat(self.places[index] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        return SentenceSet({name: values[flat] for name, values in self.columns.items()}, np.concatenate([[0], np.cumsum(lengths)]),
                           self.labels[torch.from_numpy(index)], self.pads, self.left, self.multiple)


@dataclass
class SentenceData:
    """An opened task. validation: split -> examples. num_labels: 1 for a real number (`regression`). `what` says in words which data were taken."""

    train: SentenceSet
    validation: dict[str, SentenceSet]
    tuning: SentenceSet | None
    task: str
    num_labels: int
    regression: bool
    classes: list[str]
    metrics: tuple[Metric, ...]
    what: str


def open_sentences(source: SentenceSource, tokenizer: Any, *, multiple: int = 1, log: Callable[[str], None] = print) -> SentenceData:
    """A task, tokenised once; ready for `ResumableLoader` (train, with its `lengths`) and `EvaluationLoader` (validation, tuning).

    Args:
        source: which task.
        tokenizer: a fast tokenizer of transformers, with a padding token.
        multiple: lengths of batches are rounded up to it (8 suits GPUs).
        log: gets a line that says which data were taken.

    Raises:
        ValueError: an unknown task, one without labels, nothing at the path, missing columns, a label out of range, settings that do not fit.
    """
    source.check()
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__}: sentences need a tokenizer with a padding token")
    task, found, classes, what = _rows(source)
    validation_splits = [split for split in found if split != "train"]
    regression = not task.labels
    parts = {}
    for split, rows in found.items():
        labels = torch.tensor(rows["label"], dtype=torch.float32 if regression else torch.int64)
        _check(labels, task, f"{what}, split {split!r}")
        parts[split] = _tokenised([rows[field] for field in task.fields], labels, tokenizer, source.max_length, multiple)
    train = parts["train"]
    if source.train_limit is not None:
        train = train.select(chosen(len(train), source.train_limit, source.seed, 0x6C696D))
    kept, held = carve(len(train), source.tuning, source.seed)
    tuning = train.select(held) if len(held) else None
    train = train.select(kept) if len(held) else train
    what += (f": {len(train):,} examples to train on{f', {len(held):,} to choose by' if len(held) else ''}, "
             + " and ".join(f"{len(parts[s]):,} to validate" + (f" ({s})" if len(validation_splits) > 1 else "") for s in validation_splits)
             + (", a score to predict" if regression else f", {task.labels} classes"))
    log(f"sentences: {what}")
    return SentenceData(train, {s: parts[s] for s in validation_splits}, tuning, source.task if task is not DOCSTRINGS else "docstrings",
                        max(task.labels, 1), regression, classes, task.metrics, what)


def _rows(source: SentenceSource) -> tuple[Task, dict[str, dict[str, Sequence]], list[str], str]:
    """(task, split -> column -> values, names of the classes, what was taken)."""
    if source.task == "docstrings":
        return _docstrings("the docstring task")
    task = TASKS[source.task]
    try:
        found = load_splits(source.path, source.task, revision=source.revision)
    except ValueError as error:
        if not source.fallback:
            raise
        return _docstrings(f"the docstring task in place of {source.task}, which neither $DYN_DATA nor the hub gives ({str(error).partition(';')[0]})")
    columns = (*task.fields, "label")
    parts = labelled(found, {repr(c): c for c in columns}, source.splits or task.splits, f"path={source.path!r}, task {source.task!r}")
    rows = {split: {column: part[column][:] for column in columns} for split, part in parts.items()}
    names = getattr(parts["train"].features["label"], "names", None) or map(str, range(task.labels))
    return task, rows, list(names), f"GLUE's {source.task}, {whence(source.path)}"


def _docstrings(what: str) -> tuple[Task, dict[str, dict[str, Sequence]], list[str], str]:
    splits = local_text.docstrings()
    rows = {split: {"docstring": [d.text for d in splits[split]], "label": [d.label for d in splits[split]]} for split in ("train", "validation")}
    return DOCSTRINGS, rows, list(local_text.PACKAGES), f"{what}: which of eight packages of Python's standard library a docstring comes from, split by module"


def _check(labels: Tensor, task: Task, where: str) -> None:
    if not len(labels):
        raise ValueError(f"{where}: no examples")
    if bool((labels == -1).all()):
        raise ValueError(f"{where} has no labels (all are -1, as in GLUE's test splits): it can be neither trained on nor scored")
    top = task.labels - 1 if task.labels else 5
    if bool((wrong := ~((labels >= 0) & (labels <= top))).any()):  # written so that NaN is wrong
        place = int(wrong.nonzero()[0])
        raise ValueError(f"{where}: label {labels[place].item()} of example {place} lies outside 0 .. {top}")


def _tokenised(sentences: list[Sequence[str]], labels: Tensor, tokenizer: Any, max_length: int, multiple: int) -> SentenceSet:
    lists: dict[str, list[list[int]]] = {}
    with parallel_tokenizer():
        for first in range(0, len(labels), _CHUNK):
            chunk = tokenizer(*(list(column[first : first + _CHUNK]) for column in sentences), truncation=True, max_length=max_length,
                              return_attention_mask=False)
            for name, values in chunk.items():
                lists.setdefault(name, []).extend(values)
    places = np.concatenate([[0], np.cumsum([len(ids) for ids in lists["input_ids"]])])
    if not np.diff(places).all():
        raise ValueError(f"example {int(np.diff(places).argmin())} has no tokens: the tokenizer adds none of its own, and the text is empty")
    columns = {name: np.fromiter((i for ids in values for i in ids), np.int32, count=places[-1]) for name, values in lists.items()}
    pads = {name: tokenizer.pad_token_id if name == "input_ids" else getattr(tokenizer, "pad_token_type_id", 0) for name in columns}
    return SentenceSet(columns, places, labels, pads, tokenizer.padding_side == "left", multiple)
