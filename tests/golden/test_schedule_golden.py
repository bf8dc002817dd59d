"""LLaMA-MoE's schedule and its arithmetic (golden facts 25, 26, 27, 32)."""

import pytest

from dyn.train.optim import OptimConfig, cosine_clipped
from dyn.train.speed import mfu
from dyn.train.trainer import TrainerConfig

TOTAL, WARMUP = 13_623, 100


def lr(step: int) -> float:
    cfg = OptimConfig()
    return cfg.lr * cosine_clipped(step, TOTAL, cfg.warmup_steps, cfg.floor)


@pytest.mark.parametrize(("step", "rate"), [(0, 0.0), (50, 1e-4), (100, 2e-4), (3480, 1.7072e-4), (6861, 1.00012e-4), (10_854, 2e-5), (13_622, 2e-5)])
def test_learning_rates(step, rate):
    assert lr(step) == pytest.approx(rate, rel=3e-5)


def test_where_the_floor_begins():
    first = next(step for step in range(WARMUP, TOTAL) if lr(step) == 2e-5)
    assert first == 10_854
    p = [(step - WARMUP) / (TOTAL - WARMUP) for step in (first - 1, first)]
    assert p[0] < 0.795167 < p[1]


def test_tokens_a_step_and_steps():
    trainer = TrainerConfig(accumulate=4, devices=8, num_nodes=14)
    tokens = 8 * trainer.accumulate * trainer.world_size * 4096
    assert trainer.world_size == 112 and tokens == 14_680_064 and tokens // 112 == 131_072
    assert [int(billions * 1e9) // tokens for billions in (200, 30, 15, 5, 2.5)] == [13_623, 2_043, 1_021, 340, 170]


def test_utilisation_counts_what_is_activated():
    total, activated = (mfu(count, 1000.0, 312e12) for count in (6_742_618_112, 3_494_129_664))
    assert total / activated == pytest.approx(1.93, abs=0.001)
    assert activated == pytest.approx(6 * 3_494_129_664 * 1000 / 312e12)
    assert mfu(1000, 10.0, 1.0, trained=100) == 10 * (6 * 100 + 4 * 900)  # frozen weights pass gradients on and have none
