"""Documents and their summaries: XSum and its like from the hub or a folder in its layout, for networks that read one text and write another.

Encoder-decoders get both apart. A decoder reads the document and `PROMPT`, and goes on with the summary.

B pairs a batch, L tokens of its longest document, M of its longest summary, N pairs in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyn.data.glue import SentenceSet
from dyn.data.loader import AWAY, Draw, carve, chosen
from dyn.data.local_tasks import summary_lines
from dyn.data.sources import at_least_one, labelled, load_splits, whence
from dyn.data.tiny import tiny_pairs
from dyn.data.tokens import parallel_tokenizer

Pairs = tuple[list[str], list[str]]  # documents, summaries
PROMPT = "\n\nSummary:"
_CHUNK = 2000  # pairs that are tokenised at a time


@dataclass(kw_only=True, slots=True)
class SummarySource:
    """Which pairs, and how long they may be.

    path, config, revision: a hub id (and its config, where it has several) or a folder in the hub's layout; copies below $DYN_DATA come before the hub.
        "local": the first line of docstrings of Python's standard library, from the rest; "tiny": generated pairs.
    document, summary: the columns.
    splits: to validate on.
    max_document, max_summary: tokens; what is longer is cut.
    prefix: stands before every document, for networks that are told their task (T5's "summarize: ").
    train_limit, validation_limit: at most so many pairs, chosen by `seed`; None: all.
    tuning: share of the training pairs that is held out for choosing learning rates, by `seed`, and never reported; 0: none.
    seed: of the choices above.
    """

    path: str = "EdinburghNLP/xsum"
    config: str | None = None
    revision: str | None = None
    document: str = "document"
    summary: str = "summary"
    splits: list[str] | None = None
    max_document: int = 512
    max_summary: int = 128
    prefix: str = ""
    train_limit: int | None = None
    validation_limit: int | None = None
    tuning: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """ValueError for sizes that cannot be."""
        if self.max_document < 4 or self.max_summary < 4:
            raise ValueError(f"max_document={self.max_document} and max_summary={self.max_summary} must be at least 4")
        at_least_one(self, "train_limit", "validation_limit")


@dataclass
class SummarySet:
    """Tokenised pairs in memory, padded when a batch is made. documents: their tokens (its labels are places). targets, ends: all summaries' tokens one after
    another, and [N + 1] where each begins. references: the summaries as text."""

    documents: SentenceSet
    targets: np.ndarray
    ends: np.ndarray
    references: list[str]

    def __len__(self) -> int:
        return len(self.references)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document and its summary together, [N]: for `ResumableLoader`."""
        return self.documents.lengths + np.diff(self.ends)

    def batch(self, index: np.ndarray, draw: Draw | None) -> dict[str, Tensor]:
        """input_ids, attention_mask int64 [B, L]; labels [B, M], -100 behind a summary's end. `draw` does not matter here."""
        lengths_B = np.diff(self.ends)[index]
        inside_BM = np.arange(lengths_B.max()) < lengths_B[:, None]
        labels_BM = np.full(inside_BM.shape, AWAY, np.int64)
        labels_BM[inside_BM] = np.concatenate([self.targets[self.ends[i] : self.ends[i + 1]] for i in index])
        return {**self.documents.batch(index, draw), "labels": torch.from_numpy(labels_BM)}


@dataclass
class SummaryData:
    """Opened pairs. validation: split -> pairs. `what` says in words which data were taken."""

    train: SummarySet
    validation: dict[str, SummarySet]
    tuning: SummarySet | None
    what: str


def open_summaries(source: SummarySource, tokenizer: Any, *, decoder: bool = False, multiple: int = 1,
                   log: Callable[[str], None] = print) -> SummaryData:
    """Pairs, tokenised once; ready for `ResumableLoader` (train, with its `lengths`) and `EvaluationLoader` (validation, tuning).

    Args:
        source: which pairs.
        tokenizer: with a padding token; that of an encoder-decoder ends texts with a token of its own.
        decoder: pairs are for a decoder: documents are padded on the left and end in `PROMPT`.
        multiple: lengths of batches are rounded up to it (8 suits GPUs).
        log: gets a line that says which data were taken.

    Raises:
        ValueError: nothing at the path, missing splits or columns, an empty summary, settings or a tokenizer that do not fit.
    """
    source.check()
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None or not (decoder or tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id):
        raise ValueError(f"{type(tokenizer).__name__}: summaries need a tokenizer with a padding token (it has {tokenizer.pad_token}) that puts its eos_token "
                         f"({tokenizer.eos_token}) behind a text, so that the network learns to stop")
    parts, what = MADE[source.path]() if source.path in MADE else _read(source)
    sets, held = {}, None
    for split, (documents, summaries) in parts.items():
        _check(documents, summaries, f"{what}, split {split!r}")
        places = chosen(len(documents), source.train_limit if split == "train" else source.validation_limit, source.seed, 0x73756D)
        if split == "train" and source.tuning:
            kept, taken = carve(len(places), source.tuning, source.seed)
            held = _tokenised(documents, summaries, places[taken], tokenizer, source, decoder, multiple)
            places = places[kept]
        sets[split] = _tokenised(documents, summaries, places, tokenizer, source, decoder, multiple)
    train = sets.pop("train")
    what += (f": {len(train):,} pairs to train on{f', {len(held):,} to choose by' if held is not None else ''}, "
             + " and ".join(f"{len(part):,} to validate ({split})" for split, part in sets.items()))
    log(f"summaries: {what}")
    return SummaryData(train, sets, held, what)


MADE: dict[str, Callable[[], tuple[dict[str, Pairs], str]]] = {"local": summary_lines, "tiny": lambda: (tiny_pairs(), "generated pairs")}


def _read(source: SummarySource) -> tuple[dict[str, Pairs], str]:
    columns = {f"document={source.document!r}": source.document, f"summary={source.summary!r}": source.summary}
    found = load_splits(source.path, source.config, revision=source.revision)
    parts = labelled(found, columns, source.splits or ["validation"], f"path={source.path!r}")
    return {split: (part[source.document][:], part[source.summary][:]) for split, part in parts.items()}, f"{source.path}, {whence(source.path)}"


def _check(documents: Sequence[Any], summaries: Sequence[Any], where: str) -> None:
    """ValueError for texts that are none. XSum has an empty document: that is read as it is; an empty summary teaches and measures nothing."""
    if not len(documents):
        raise ValueError(f"{where}: no pairs")
    for i, (document, summary) in enumerate(zip(documents, summaries, strict=True)):
        if not isinstance(document, str) or not isinstance(summary, str) or not summary.strip():
            raise ValueError(f"{where}, pair {i}: a document and a summary must be text, the summary not empty; got {str(document)[:40]!r} and {summary!r}")


def _tokenised(documents: Sequence[str], summaries: Sequence[str], places: np.ndarray, tokenizer: Any, source: SummarySource, decoder: bool,
               multiple: int) -> SummarySet:
    lists: dict[str, list[list[int]]] = {"document": [], "summary": []}
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"] if decoder else []
    end = [tokenizer.eos_token_id] if decoder else []
    room = {"document": source.max_document - len(prompt), "summary": source.max_summary - len(end)}
    if min(room.values()) < 1:
        raise ValueError(f"max_document={source.max_document} leaves no token of a document beside the {len(prompt)} that ask for its summary")
    with parallel_tokenizer():
        for first in range(0, len(places), _CHUNK):
            part = places[first : first + _CHUNK].tolist()
            texts = [source.prefix + documents[i] for i in part]
            lists["document"] += [ids + prompt for ids in tokenizer(texts, truncation=True, max_length=room["document"])["input_ids"]]
            written = tokenizer(text_target=[" " * decoder + summaries[i] for i in part], truncation=True, max_length=room["summary"],
                                add_special_tokens=not decoder)["input_ids"]
            lists["summary"] += [ids + end for ids in written]
    flat = {name: np.fromiter((i for ids in values for i in ids), np.int32) for name, values in lists.items()}
    ends = {name: np.concatenate([[0], np.cumsum([len(ids) for ids in values])]) for name, values in lists.items()}
    tokens = SentenceSet({"input_ids": flat["document"]}, ends["document"], torch.arange(len(places)), {"input_ids": tokenizer.pad_token_id},
                         decoder or tokenizer.padding_side == "left", multiple)
    return SummarySet(tokens, flat["summary"], ends["summary"], [summaries[i] for i in places.tolist()])
