"""Which documents to keep. Both filters are our own: the LLaMA-MoE paper (section 4.1 of its specification) filtered CommonCrawl and C4 for
advertisements (about 50 % removed; worse downstream, so not used) and for fluency (about 15 % removed; used), but its classifiers and
thresholds are not public. These have their place, not their decisions: shares and effects need not agree.

A filter is a dataclass with `domains` (those that it looks at) and `__call__(texts, domain) -> list of bool, True = keep`. Its repr goes into
the key of the token cache, so it names all its settings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

WEB = ("en_cc", "en_c4")
"""The domains that the paper filtered."""

_PHRASES = (
    r"\d{1,2}\s?% off|free (?:shipping|delivery|trial|quote|consultation)|discounts?|coupons?|promo(?:tion(?:al)?)?(?: code)?s?",
    r"best (?:price|deal)s?|lowest prices?|special offers?|limited time|on sale|sale ends|in stock|money[- ]back|satisfaction guaranteed",
    r"add to (?:cart|basket|bag)|check ?out now|buy (?:now|online|one)|shop (?:now|our|online)|order (?:now|today|online)|book (?:now|online)",
    r"call (?:us|now|today)|contact us (?:now|today)|click here|sign up|subscribe|learn more|apply now|act now|get started",
    r"our (?:products|services|customers)",
)
_SELL = re.compile(rf"[$€£]\s?\d|\d\s?(?:usd|eur|gbp)\b|\b(?:{'|'.join(_PHRASES)})\b", re.IGNORECASE)
_CONTACT = re.compile(r"https?://|www\.|\b[\w.+-]+@[\w-]+\.\w{2,}\b|(?<!\d)(?:\+?\d{1,2}[ .-]?)?\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?!\d)", re.IGNORECASE)
_SHOUT = re.compile(r"\b[A-Z]{4,}\b|!")


class Filter(Protocol):
    """See the module."""

    domains: Sequence[str] | None

    def __call__(self, texts: list[str], domain: str) -> list[bool]: ...


def advert_score(text: str) -> float:
    """How much a text reads like an advertisement, from 0 up; nothing learned, heuristics of ours. The sum, per 100 words, of

    prices, discounts and calls to action (1 each); addresses, mails and phone numbers (1/2 each); words in capitals and exclamation
    marks (1/4 each); plus 4 x the share of its lines that repeat an earlier one (menus and product lists repeat).
    Meant for web text: licences, say, shout as well.
    """
    words = max(len(text.split()), 20)  # a lone phone number in ten words is no evidence
    lines = [line.strip().lower() for line in text.splitlines() if line.strip()]
    repeated = 1 - len(Counter(lines)) / len(lines) if lines else 0.0
    found = len(_SELL.findall(text)) + 0.5 * len(_CONTACT.findall(text)) + 0.25 * len(_SHOUT.findall(text))
    return 100 * found / words + 4 * repeated


@dataclass(frozen=True)
class Advert:
    """Remove texts whose `advert_score` is not below the threshold from the named domains (None: all)."""

    threshold: float = 3.0
    domains: tuple[str, ...] | None = WEB

    def __call__(self, texts: list[str], domain: str) -> list[bool]:
        """True for the texts to keep; `domain` does not matter here."""
        return [advert_score(text) < self.threshold for text in texts]


@dataclass(frozen=True)
class Fluency:
    """Keep the documents whose perplexity under a dense model lies in [low, high]: below is boilerplate, above is noise.

    Args:
        perplexity: texts -> perplexities [len(texts)]; not in the repr, so `model` must name the model.
        low, high: absolute bounds.
        model: name of the model.
        domains: the domains to filter; None: all.

    Raises:
        ValueError: bounds that leave nothing. On use: perplexities of another number than the texts.
    """

    perplexity: Callable[[list[str]], Tensor] = field(repr=False, compare=False)
    low: float = 0.0
    high: float = float("inf")
    model: str = "dense"
    domains: tuple[str, ...] | None = WEB

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"fluency: low={self.low}, high={self.high}; needed: 0 <= low < high")

    def __call__(self, texts: list[str], domain: str) -> list[bool]:
        """True for the texts to keep. A perplexity that is not a number is outside every band."""
        values = torch.as_tensor(self.perplexity(texts)).detach().double().cpu().flatten()
        if len(values) != len(texts):
            raise ValueError(f"fluency: the model gave {len(values)} perplexities for {len(texts)} texts")
        return ((values >= self.low) & (values <= self.high)).tolist()


FILTERS: dict[str, Callable[..., Filter]] = {"advert": Advert, "fluency": Fluency}
