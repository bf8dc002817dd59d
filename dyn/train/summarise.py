"""Text to text: an encoder-decoder, or a decoder, learns to write summaries, and is measured by what it writes.

B pairs a batch, L tokens of the longest document, M of the longest summary, V entries of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.text import rouge_score

from dyn.data.loader import AWAY, counts
from dyn.data.summaries import SummarySet
from dyn.train.optim import RecipeConfig
from dyn.train.settings import GenerateConfig, TrainerConfig
from dyn.train.supervised import Supervised, gathered

ROUGE = ("rouge1", "rouge2", "rougeL")


class Summary(NamedTuple):
    """What was written for a pair, and its ROUGE-1, -2 and -L (F-measure, Porter stems) against the reference, in [0, 1]."""

    index: int
    text: str
    rouge: tuple[float, float, float]


def summary_loss(net: nn.Module, batch: Mapping[str, Tensor], smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Cross-entropy over the summaries' tokens, smoothed over the vocabulary: its mean over tokens, or "sum" by pair, [B]."""
    labels_BM, read = batch["labels"], {key: batch[key] for key in ("input_ids", "attention_mask")}
    if net.config.is_encoder_decoder:
        logits_BMV = net(**read, decoder_input_ids=net.prepare_decoder_input_ids_from_labels(labels_BM), use_cache=False).logits
    else:
        whole = {"input_ids": torch.cat([read["input_ids"], labels_BM.clamp(min=0)], 1),
                 "attention_mask": torch.cat([read["attention_mask"], (labels_BM != AWAY).long()], 1)}
        logits_BMV = net(**whole, use_cache=False, logits_to_keep=labels_BM.shape[1] + 1).logits[:, :-1]  # each place speaks of the next
    loss_BM = F.cross_entropy(logits_BMV.float().transpose(1, 2), labels_BM, ignore_index=AWAY, label_smoothing=smoothing, reduction="none")
    return loss_BM.sum(1) if reduction == "sum" else loss_BM.sum() / (labels_BM != AWAY).sum()


def rouge_of(text: str, reference: str) -> tuple[float, float, float]:
    """ROUGE-1, -2 and -L of a text in [0, 1], by torchmetrics; stems as published numbers have them."""
    found = rouge_score(text, reference, use_stemmer=True, rouge_keys=ROUGE)
    return tuple(found[f"{key}_fmeasure"].item() for key in ROUGE)


class Summarisation(Supervised):
    """Cross-entropy on summaries; at validation they are written with beams and compared with the references.

    Batches are those of `dyn.data.summaries`. The net is an encoder-decoder or a decoder of transformers.

    Logged: as in `Supervised`, train/loss (with smoothing; the mean over a micro-batch's tokens); at validation val/loss (nats a token, without smoothing),
    rouge1, rouge2, rougeL (means over pairs, each once) and length (tokens written). `answers`: set -> `Summary` by pair.

    Args:
        net, optim, sets, cfg: as in `Supervised`.
        tokenizer: turns what is written into text.
        pairs: set -> the pairs that its batches are of.
        generate: smoothing, and how the net writes.

    Raises:
        ValueError: FSDP2, or a length that the net does not have places for.
    """

    unit = "pairs"

    def __init__(self, net: nn.Module | Callable[[], nn.Module], optim: RecipeConfig, sets: Sequence[str], cfg: TrainerConfig, *, tokenizer: Any,
                 pairs: Mapping[str, SummarySet], generate: GenerateConfig | None = None) -> None:
        super().__init__(net, optim, sets, cfg)
        self.tokenizer, self.pairs = tokenizer, dict(pairs)
        self.generate = GenerateConfig() if generate is None else generate

    def configure_model(self) -> None:
        """As every task."""
        if self.device_mesh is not None:
            raise ValueError("writing needs whole weights on every process: it goes with trainer.strategy single and ddp, not fsdp2")
        super().configure_model()
        places = getattr(self.net.config, "max_position_embeddings", None)
        if places is not None and self.generate.max_length > places:
            raise ValueError(f"generate.max_length={self.generate.max_length}: {type(self.net).__name__} has places for {places} tokens")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        self.examples += self.amount(batch) * self.trainer.world_size
        loss = summary_loss(self.net, batch, self.generate.label_smoothing)
        self.record(**{"train/loss": loss})
        return loss

    def on_validation_epoch_start(self) -> None:
        """Rows and texts of this rank, by set."""
        super().on_validation_epoch_start()
        self._texts: list[list[tuple[int, str]]] = [[] for _ in self.domains]

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Keeps (pair, summed loss, tokens, tokens written, three ROUGE) and what was written."""
        loss = summary_loss(self.net, batch, reduction="sum")
        wanted = counts(batch["labels"][:, 0])
        written_BM = self._write(batch)
        index = batch["index"][wanted]
        written = (written_BM != self.tokenizer.pad_token_id).sum(1)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written_BM[wanted].tolist()]
        references = self.pairs[self.domains[dataloader_idx]].references
        rouge = torch.tensor([rouge_of(text, references[i]) for i, text in zip(index.tolist(), texts, strict=True)], dtype=torch.float64)
        tokens = (batch["labels"] != AWAY).sum(1)
        facts = torch.stack([v.double() for v in (index, loss[wanted], tokens[wanted], written[wanted])], 1).cpu()
        self._rows[dataloader_idx].append(torch.cat([facts, rouge.reshape(-1, len(ROUGE))], 1))
        self._texts[dataloader_idx] += list(zip(index.tolist(), texts, strict=True))
        return {}

    def _write(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the net writes, int64 [B, M], without what it began with."""
        cfg = self.generate
        ways = dict(do_sample=False, num_beams=cfg.num_beams, no_repeat_ngram_size=cfg.no_repeat_ngram, early_stopping=cfg.num_beams > 1)
        ways |= dict(length_penalty=cfg.length_penalty) if cfg.num_beams > 1 else {}
        read = {key: batch[key] for key in ("input_ids", "attention_mask")}
        if self.net.config.is_encoder_decoder:
            return self.net.generate(**read, **ways, max_length=cfg.max_length, min_length=cfg.min_length)[:, 1:]
        written = self.net.generate(**read, **ways, max_new_tokens=cfg.max_length, min_new_tokens=cfg.min_length, eos_token_id=self.tokenizer.eos_token_id,
                                    pad_token_id=self.tokenizer.pad_token_id)
        return written[:, batch["input_ids"].shape[1] :]

    def on_validation_epoch_end(self) -> None:
        """Exact scores over all pairs, each once, whichever rank saw it."""
        losses, scores = {}, {}
        for place, name in enumerate(self.domains):
            table, texts = self.table(place), dict(gathered(self._texts[place]))
            losses[name] = (table[:, 1].sum() / table[:, 2].sum()).item()
            scores[name] = {key: math.fsum(table[:, 4 + i].tolist()) / len(table) for i, key in enumerate(ROUGE)} | {"length": table[:, 3].mean().item()}
            self.answers[name] = [Summary(int(row[0]), texts[int(row[0])], tuple(row[4:])) for row in table.tolist()]
        self.report(losses, scores)

    def about(self) -> dict[str, Any]:
        """How summaries are trained on and written too."""
        return super().about() | {"generate": dataclasses.asdict(self.generate)}
