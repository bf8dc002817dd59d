import math
import os

import pytest
import torch

from dyn.data.filters import FILTERS, WEB, Advert, Fluency, advert_score

ADVERTS = [
    "BUY NOW and save 30% off! Free shipping on all our products. Call us today at 555-123-4567 or click here: https://shop.example.com",
    "Best price guaranteed. Add to cart. $19.99 $29.99. Subscribe to our newsletter for special offers, coupons and discounts!",
    "Home\nShop now\nContact us today\nHome\nShop now\nContact us today\nHome\nShop now\nSign up\nOur services\nSign up\nOur services",
]
PROSE = [
    "The river rises in the hills to the north of the town and flows for some forty miles before it meets the sea. In spring, when the snow melts, "
    "it floods the meadows on both banks, and the farmers have long built their houses on the ridge above them.",
    "We study the convergence of gradient descent on a class of functions that are convex but not smooth. Our main result is that the rate depends on "
    "the dimension only through a logarithm; the proof is given in section 3. See https://example.org for the code.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. However little known the "
    "feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding families.",
]


def stays(text: str) -> bool:
    return Advert()([text], "en_cc")[0]


@pytest.mark.parametrize("text", ADVERTS)
def test_adverts_go(text):
    assert not stays(text)


@pytest.mark.parametrize("text", PROSE)
def test_prose_stays(text):
    assert stays(text)


def test_edges():
    assert advert_score("") == 0 and stays("")
    assert advert_score("Call us: 555-123-4567") <= 100 * 1.5 / 20  # few words are little evidence


def test_filters_by_name():
    assert {"advert": Advert, "fluency": Fluency} == FILTERS
    keep = FILTERS["advert"](threshold=2.0)
    assert keep(ADVERTS + PROSE, "en_cc") == [False] * 3 + [True] * 3
    assert keep.domains == WEB == ("en_cc", "en_c4")
    assert repr(keep) != repr(Advert())


def _perplexity(texts):
    return torch.tensor([float(len(t)) for t in texts])


def test_fluency_keeps_a_band():
    keep = Fluency(_perplexity, low=2, high=4)
    assert keep(["a", "aa", "aaa", "aaaa", "aaaaa"], "en_c4") == [False, True, True, True, False]
    assert Fluency(lambda texts: torch.tensor([math.nan]))(["x"], "en_cc") == [False]
    assert repr(Fluency(_perplexity, 2.5, 4.5, model="toy", domains=None)) == "Fluency(low=2.5, high=4.5, model='toy', domains=None)"


def test_fluency_refused():
    with pytest.raises(ValueError, match="low=4, high=2"):
        Fluency(_perplexity, low=4, high=2)
    with pytest.raises(ValueError, match="gave 1 perplexities for 2 texts"):
        Fluency(lambda texts: torch.ones(1))(["a", "b"], "en_cc")


@pytest.mark.slow
@pytest.mark.skipif("DYN_DATA" not in os.environ, reason="DYN_DATA (a folder with text-domains) is not set")
def test_adverts_in_real_text():
    from datasets import load_dataset

    from dyn.data.sources import resolve

    for domain in ("books", "wiki", "news"):  # no advertisements there
        rows = load_dataset(resolve("text-domains"), domain, split="validation", streaming=True)
        kept = [stays(row["text"]) for row in rows]
        assert sum(kept) / len(kept) > 0.9
