"""Golden facts 28-31 of the LLaMA-MoE specification, and the numeric table of its section 4.3."""

import numpy as np
import pytest

from dyn.data.mixture import WEIGHTS, domain_weights, update_weights
from dyn.data.tokens import Tokens

DOMAINS = ["en_cc", "en_c4", "github", "en_wikipedia", "en_book", "en_arxiv", "en_stack"]


def _row(*values: float) -> dict[str, float]:
    return dict(zip(DOMAINS, values, strict=True))


REFERENCES = _row(1.6916865, 2.0748811, 0.6984496, 1.5899001, 1.9252481, 1.2408167, 1.4974865)
LOSSES = _row(1.728, 2.117, 0.705, 1.572, 2.071, 1.287, 1.491)
TABLE = {
    ("a", "llama"): _row(0.668748, 0.150602, 0.043612, 0.042559, 0.050124, 0.025215, 0.019140),
    ("b", "llama"): _row(0.668204, 0.150469, 0.043563, 0.043279, 0.050070, 0.025180, 0.019235),
    ("a", "uniform"): _row(0.142706, 0.143537, 0.138522, 0.135176, 0.159209, 0.144122, 0.136728),
    ("b", "uniform"): _row(0.142232, 0.143061, 0.138062, 0.137160, 0.158682, 0.143643, 0.137160),
    ("a", "sheared_llama"): _row(0.356991, 0.489364, 0.007693, 0.029051, 0.100407, 0.007005, 0.009489),
    ("b", "sheared_llama"): _row(0.356803, 0.489112, 0.007675, 0.029547, 0.100344, 0.006987, 0.009531),
}


@pytest.mark.parametrize("name", [*WEIGHTS, "uniform"])
def test_tables_sum_to_one(name):
    if name in WEIGHTS:
        assert abs(sum(WEIGHTS[name].values()) - 1) < 1e-9
    assert abs(sum(domain_weights(name, DOMAINS).values()) - 1) < 1e-9


@pytest.mark.parametrize(("rule", "start"), TABLE)
def test_update_table(rule, start):
    new = update_weights(domain_weights(start, DOMAINS), LOSSES, REFERENCES, rule=rule)
    assert max(abs(new[d] - w) for d, w in TABLE[rule, start].items()) < 1e-6
    assert abs(sum(new.values()) - 1) < 1e-12


def test_rule_a_floor():
    hopeless = {d: r - (50.0 if d == "en_cc" else 0.0) for d, r in REFERENCES.items()}
    for start in ("llama", "uniform", "sheared_llama"):
        new = update_weights(domain_weights(start, DOMAINS), hopeless, REFERENCES)
        assert min(new.values()) >= 1e-4 / 7 * (1 - 1e-6)
        assert new["en_cc"] == pytest.approx(1.42857e-5, rel=1e-5)


def test_no_gap():
    start = domain_weights("llama", DOMAINS)
    a, b = (update_weights(start, REFERENCES, REFERENCES, rule=rule) for rule in ("a", "b"))
    assert max(abs(a[d] - start[d]) for d in DOMAINS) == pytest.approx(5.27e-5, rel=1e-3)
    assert max(abs(b[d] - start[d]) for d in DOMAINS) < 1e-15


@pytest.mark.parametrize(("start", "updates", "book"), [("llama", 80, 0.996), ("uniform", 12, 0.425)])
def test_gaps_compound_unless_anchored(start, updates, book):
    first = weights = domain_weights(start, DOMAINS)
    anchored = first
    for _ in range(updates):
        weights = update_weights(weights, LOSSES, REFERENCES)
        anchored = update_weights(anchored, LOSSES, REFERENCES, anchor=first)
    assert weights["en_book"] == pytest.approx(book, abs=5e-4)
    assert anchored == update_weights(first, LOSSES, REFERENCES)


def test_packing_example():
    """Fact 31: five documents of 3 tokens in blocks of 4. Cutting off the remainder gives three blocks and loses 3 tokens; ours loses none."""
    documents = [[10 * d, 10 * d + 1, 10 * d + 2] for d in range(5)]
    flat = [i for document in documents for i in document]
    legacy = [flat[i : i + 4] for i in range(0, len(flat) - 3, 4)]
    tokens = Tokens.from_documents(documents)
    blocks = tokens.blocks(range(15), 4)
    assert len(legacy) == 3 and len(flat) - 4 * len(legacy) == 3
    assert blocks[:3].tolist() == legacy
    assert blocks[3].tolist() == [40, 41, 42, 0]
    assert np.array_equal(blocks.ravel(), flat * 4)  # after 15 blocks of 4 every token was there exactly four times
