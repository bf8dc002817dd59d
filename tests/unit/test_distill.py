"""The loss against a teacher, its place in CausalLM, what the settings refuse, and the computing of a teacher's rows."""

import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyn import config
from dyn.core import distill
from dyn.core.distill import distillation_loss, top_logp
from dyn.data.mixture import MixtureLoader
from dyn.data.teacher import TaughtLoader, TeacherCache, describe
from dyn.data.tiny import tiny_tokens
from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM
from dyn.train import distill as train_distill
from dyn.train.distill import cache_teacher, parent_hash, top_of
from dyn.train.optim import OptimConfig
from dyn.train.settings import DistillConfig
from dyn.train.tasks import CausalLM
from dyn.train.trainer import TrainerConfig

ROOT = Path(__file__).parents[2]
SHAPE = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
DOMAINS = {name: splits["train"] for name, splits in tiny_tokens(["code", "docs"]).items()}


def dense(seed=0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.3))


def moe() -> LlamaMoeForCausalLM:
    torch.manual_seed(1)
    return LlamaMoeForCausalLM(LlamaMoeConfig(**SHAPE, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, score_scale=2.0))


def mixture(**changes) -> MixtureLoader:
    return MixtureLoader(DOMAINS, **dict(block_size=16, batch_size=4, num_batches=6, seed=1) | changes)


def about(**changes):
    return describe(DOMAINS, **dict(parent="p", tokenizer="t", vocab_size=64, top_k=8, block_size=16) | changes)


# The loss


def test_by_hand():
    student = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()
    ids, logp = torch.tensor([[[2, 0]]]), torch.tensor([[[0.5, 0.3]]]).log()
    expected = 0.5 * math.log(0.5 / 0.125) + 0.3 * math.log(0.3 / 0.5) + 0.2 * math.log(0.2 / 0.375)
    assert distillation_loss(student, ids, logp).item() == pytest.approx(expected, rel=1e-6)


def test_only_masked_in_positions_count_and_none_gives_zero():
    student, (ids, logp) = torch.randn(2, 5, 16), top_logp(torch.randn(2, 5, 16), 4)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    student.requires_grad_()
    zero = distillation_loss(student, ids, logp, mask)
    zero.backward()
    assert zero.item() == 0 and not student.grad.any()
    mask[0, 1] = mask[1, 3] = True
    expected = (distillation_loss(student[0, 1:2], ids[0, 1:2], logp[0, 1:2]) + distillation_loss(student[1, 3:4], ids[1, 3:4], logp[1, 3:4])) / 2
    torch.testing.assert_close(distillation_loss(student, ids, logp, mask), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_student_that_is_certain_has_a_finite_loss_and_gradient(dtype):
    """The student's probabilities of the kept entries sum to 1 in floating point, so 1 - sum would be 0; the teacher's float16 rows sum to more than 1."""
    student = torch.zeros(1, 2, 100, dtype=dtype)
    student[..., :3] = 80.0
    student.requires_grad_()
    logp = torch.tensor([0.5, 0.3, 0.2]).log().half() + 0.001
    loss = distillation_loss(student, torch.arange(3, dtype=torch.int32).expand(1, 2, 3), logp.expand(1, 2, 3))
    loss.backward()
    assert loss.dtype == torch.float32 and 0 < loss.item() < 1 and torch.isfinite(student.grad).all()


def test_entries_without_probability_are_no_trouble():
    logp = torch.tensor([[0.0, -math.inf]])
    assert distillation_loss(torch.zeros(1, 4), torch.tensor([[1, 0]]), logp).item() == pytest.approx(math.log(4))


def test_chunks_do_not_change_it(monkeypatch):
    student, (ids, logp) = torch.randn(3, 7, 16, requires_grad=True), top_logp(torch.randn(3, 7, 16), 4)
    whole = distillation_loss(student, ids, logp)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(distill, "CHUNK_VALUES", 40)
    cut = distillation_loss(student, ids, logp)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(torch.autograd.grad(cut, student)[0], expected)


@pytest.mark.parametrize(("ids", "logp", "mask", "words"), [
    ((2, 5, 3), (2, 5, 4), None, r"ids \[2, 5, 3\] and log-probabilities \[2, 5, 4\]"),
    ((2, 4, 3), (2, 4, 3), None, r"fits the logits \[2, 5, 8\]"),
    ((2, 5, 9), (2, 5, 9), None, r"K in 1 \.\. 8"),
    ((2, 5, 3), (2, 5, 3), (2, 4), r"the mask \[2, 4\]"),
])
def test_shapes_are_refused(ids, logp, mask, words):
    with pytest.raises(ValueError, match=words):
        distillation_loss(torch.zeros(2, 5, 8), torch.zeros(ids, dtype=torch.long), torch.zeros(logp), None if mask is None else torch.ones(mask).bool())


def test_top_of_too_many():
    with pytest.raises(ValueError, match=r"k=9 must lie in 1 \.\. vocabulary=8"):
        top_logp(torch.zeros(2, 8), 9)


# In the task


def step(net, batch, weight):
    task = CausalLM(net, OptimConfig(warmup_steps=0), ["code"], TrainerConfig(max_steps=2, precision="32-true"), distill_weight=weight)
    task._trainer = types.SimpleNamespace(world_size=1)
    task.configure_model()
    return task.training_step(batch, 0), {k: v.item() for k, v in task._sums.items() if k.startswith("train/")}


@pytest.fixture
def batch():
    batch = next(iter(mixture(mask_documents=True)))
    ids, logp = top_of(dense(), batch, 8, None)
    return batch | {"teacher_ids": ids, "teacher_logp": logp}


@pytest.mark.parametrize("make", [dense, moe])
def test_the_mixed_loss(batch, make):
    plain, before = step(make(), batch, 0.0)
    mixed, sums = step(make(), batch, 0.25)
    assert "train/distill_loss" not in before
    lm = before.get("train/lm_loss", before["train/loss"])
    assert sums["train/lm_loss"] == lm and sums["train/distill_loss"] >= 0
    balance = plain.item() - lm
    assert mixed.item() == pytest.approx(0.75 * lm + 0.25 * sums["train/distill_loss"] + balance, rel=1e-5) == pytest.approx(sums["train/loss"])
    if make is moe:
        assert balance > 0


def test_the_teacher_itself_learns_nothing_from_its_rows(batch):
    net = dense()
    loss, sums = step(net, batch, 1.0)
    loss.backward()
    assert 0 <= sums["train/distill_loss"] < 1e-4  # float16
    assert max(p.grad.abs().max() for p in net.parameters()) < 1e-2
    ce, _ = step(other := dense(), batch, 0.0)
    ce.backward()
    assert max(p.grad.abs().max() for p in other.parameters()) > 0.1


def test_rows_of_ignored_labels_do_not_count(batch):
    _, sums = step(moe(), batch, 0.5)
    ignored = torch.nn.functional.pad(batch["labels"][:, 1:] == -100, (0, 1), value=True)
    assert ignored[:, :-1].any()
    spoilt = batch["teacher_logp"].clone()
    spoilt[ignored] = -9.0
    assert step(moe(), batch | {"teacher_logp": spoilt}, 0.5)[1] == sums


def test_a_loader_without_a_teacher(batch):
    with pytest.raises(ValueError, match=r"wrap their loader in dyn\.data\.teacher\.TaughtLoader"):
        step(dense(), {k: v for k, v in batch.items() if not k.startswith("teacher")}, 0.5)
    with pytest.raises(ValueError, match=r"distill_weight=1\.5 must lie in \[0, 1\]"):
        step(dense(), batch, 1.5)


# Settings


@pytest.mark.parametrize(("given", "words"), [(dict(weight=-0.1), r"distill\.weight=-0\.1 must lie in \[0, 1\]"), (dict(weight=1.1), r"distill\.weight=1\.1"),
                                              (dict(top_k=0), r"distill\.top_k=0 must be at least 1"), (dict(batch_size=0), r"distill\.batch_size=0")])
def test_settings_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        DistillConfig(**given)


def test_moving_weights_are_refused_before_anything_is_loaded():
    spec = importlib.util.spec_from_file_location("distill_llama_moe_cpt", ROOT / "experiments" / "llama_moe_cpt.py")
    experiment = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    with pytest.raises(ValueError, match=r"distill\.weight=0\.5 needs draws that are known in advance, data\.dynamic=a changes them"):
        config.load(experiment.Config, "llama_moe_cpt", "smoke", ["distill.weight=0.5", "data.dynamic=a"], root=ROOT)
    config.load(experiment.Config, "llama_moe_cpt", "smoke", ["distill.weight=0.5", "model.start=scratch"], root=ROOT)


# The teacher


@pytest.mark.parametrize("mask_documents", [False, True])
def test_rows_are_those_of_the_whole_network(mask_documents, monkeypatch):
    monkeypatch.setattr(train_distill, "CHUNK_VALUES", 64 * 5)
    net, batch = dense().eval(), next(iter(mixture(mask_documents=mask_documents)))
    ids, logp = top_of(net, batch, 8, None)
    with torch.no_grad():
        expected = net(**{k: batch[k] for k in ("input_ids", "position_ids") if k in batch}, use_cache=False).logits.log_softmax(-1).topk(8)
    assert ids.dtype == torch.int32 and logp.dtype == torch.float16 and torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(logp.float(), expected.values, rtol=1e-3, atol=1e-4)


def test_bfloat16_layers_keep_a_float32_head():
    net, batch = dense().eval(), next(iter(mixture()))
    exact, rounded = top_of(net, batch, 8, None)[1].float(), top_of(net, batch, 8, torch.bfloat16)[1].float()
    assert 0 < (exact - rounded).abs().mean() < 0.05


def test_planned_is_what_is_drawn_on_all_ranks():
    loader = mixture(num_batches=40)  # several passes over the text
    next(batches := iter(loader))
    state, planned = loader.state_dict(), list(loader.planned(39))
    assert loader.state_dict() == state
    drawn = [block for _ in batches for block in loader.drawn]
    assert drawn == planned and len(set(planned)) == len(planned)
    ranks = [mixture(num_batches=3, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [list(r.planned()) for r in ranks] == [list(mixture(num_batches=3).planned())] * 2


def test_only_what_is_missing_is_computed(tmp_path):
    loads, lines = [], []

    def load():
        loads.append(1)
        return dense()

    cache = TeacherCache(str(tmp_path / "c"), about())
    made = [cache_teacher(cache, mixture(num_batches=n), load, dtype=None, log=lines.append, every_seconds=0) for n in (3, 3, 5)]
    assert made == [12, 0, 8] and len(loads) == 2 and len(cache) == 20
    assert any("12 of 12 blocks" in line and "tokens/s" in line for line in lines) and any("all blocks are in" in line for line in lines)
    for batch in TaughtLoader(mixture(num_batches=5), cache):
        ids, logp = top_of(dense().eval(), batch, 8, None)
        assert torch.equal(batch["teacher_ids"], ids)
        torch.testing.assert_close(batch["teacher_logp"], logp, rtol=1e-3, atol=1e-4)


def test_a_teacher_of_another_width_and_a_full_disk(tmp_path, monkeypatch):
    cache = TeacherCache(str(tmp_path / "c"), about(vocab_size=65))
    with pytest.raises(ValueError, match=r"the teacher has 64 logits, its cache .* is for vocab_size=65"):
        cache_teacher(cache, mixture(), dense, dtype=None, log=lambda _: None)
    monkeypatch.setattr(train_distill.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match=r"GB are free; make room, set distill\.cache"):
        cache_teacher(TeacherCache(str(tmp_path / "d"), about()), mixture(), dense, dtype=None, log=lambda _: None)


def test_the_parent_is_known_by_weights_and_config(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        dense(seed).save_pretrained(tmp_path / name)
    first = parent_hash(tmp_path / "a")
    assert first == parent_hash(str(tmp_path / "b")) != parent_hash(tmp_path / "c")
    (tmp_path / "b" / "config.json").write_text((tmp_path / "b" / "config.json").read_text().replace("1e-06", "1e-05"))
    assert parent_hash(tmp_path / "b") != first
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        parent_hash(tmp_path / "d")


def test_other_ranks_wait_for_the_first(tmp_path, monkeypatch):
    folder = str(tmp_path / "c")
    waiting = TeacherCache(folder, about())
    monkeypatch.setattr(train_distill.time, "sleep", lambda _: cache_teacher(TeacherCache(folder, about()), mixture(), dense, dtype=None, log=lambda _: None))
    train_distill._wait(waiting, mixture())
    assert len(waiting) == 24
    monkeypatch.setattr(train_distill, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(TimeoutError, match="rank 0"):
        train_distill._wait(TeacherCache(str(tmp_path / "d"), about()), mixture())
