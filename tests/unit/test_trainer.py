"""Trainings of tiny networks in this process: what is learnt, logged, saved, refused. Kills and resumes are in tests/resume."""

import contextlib
import json
import math
import shutil
import sys
import threading
import types
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from dyn.data.mixture import MixtureLoader, validation_batches
from dyn.data.tiny import tiny_tokens
from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM
from dyn.nn.experts import Gate
from dyn.nn.surgery import freeze
from dyn.train import trainer as trainer_module
from dyn.train.callbacks import ExpertLoad, Throughput
from dyn.train.checkpoint import AtomicCheckpointIO, find_checkpoint, newest_checkpoint, verify_checkpoint
from dyn.train.optim import OptimConfig
from dyn.train.tasks import CausalLM
from dyn.train.trainer import TrainerConfig, check_world, evaluate, fit, make_trainer, world

SHAPE = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
DOMAINS = ["code", "docs"]
CORPUS = tiny_tokens(DOMAINS)


class FakeRun:
    """What a trainer needs of dyn.run's Run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stop, self.lines = folder, threading.Event(), []

    def log(self, text: str) -> None:
        self.lines.append(text)

    def listen(self) -> None:
        self.lines.append("listening")

    def graceful(self):
        return contextlib.nullcontext()


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def moe(**changes) -> LlamaMoeForCausalLM:
    torch.manual_seed(0)
    given = dict(moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, score_scale=2.0, attention_dropout=0.1)
    return LlamaMoeForCausalLM(LlamaMoeConfig(**SHAPE | given | changes))


def config(**changes) -> TrainerConfig:
    given = dict(max_steps=4, precision="32-true", accelerator="cpu", log_every=1, val_every=2, checkpoint_every=0, peak_flops=1e9, progress_seconds=0.0)
    return TrainerConfig(**given | changes)


def loader(cfg: TrainerConfig, batch_size: int = 4, **changes) -> MixtureLoader:
    train = {d: splits["train"] for d, splits in CORPUS.items()}
    return MixtureLoader(train, **dict(block_size=16, batch_size=batch_size, num_batches=cfg.max_steps * cfg.accumulate, seed=1) | changes)


def validation() -> dict[str, list]:
    return {d: validation_batches(splits["validation"], 16, 4, domain=i) for i, (d, splits) in enumerate(CORPUS.items())}


def train(folder: Path, net, cfg: TrainerConfig, data=None, callbacks=(), optim: OptimConfig | None = None, **more):
    run = FakeRun(folder)
    task = CausalLM(net, optim or OptimConfig(lr=1e-2, warmup_steps=0), DOMAINS, cfg)
    losses = fit(make_trainer(cfg, run, callbacks), task, data or loader(cfg), validation(), **more)
    return task, losses, run


def rows(folder: Path, key: str) -> list[dict]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in row]


def true_losses(net) -> dict[str, float]:
    """Over all targets of a domain at once, in float64."""
    losses = {}
    with torch.no_grad():
        for d, batches in validation().items():
            logits = torch.cat([net.eval()(input_ids=b["input_ids"]).logits[:, :-1].flatten(0, 1) for b in batches])
            losses[d] = F.cross_entropy(logits.double(), torch.cat([b["input_ids"][:, 1:].flatten() for b in batches])).item()
    return losses


def test_a_mixture_learns_and_says_what_it_does(tmp_path):
    load, cfg = ExpertLoad(tmp_path / "load.json"), config(max_steps=12, val_every=6)
    task, losses, run = train(tmp_path, moe(), cfg, callbacks=[load])
    found = rows(tmp_path, "train/loss")
    assert [row["step"] for row in found] == list(range(1, 13)) and [row["tokens"] for row in found] == [64 * s for s in range(1, 13)]
    assert found[-1]["train/lm_loss"] < found[0]["train/lm_loss"] - 0.2
    assert all(row["train/loss"] == pytest.approx(row["train/lm_loss"] + row["train/balance_loss"], abs=1e-5) for row in found)
    assert all(1 <= row["train/load_max"] <= row["train/load_max_layer"] <= 2 for row in found)
    assert all(row["train/load_cv2"] >= 0 and 0 < row["train/dropped_mass"] < 1 for row in found)
    held_out = rows(tmp_path, "val/loss")
    assert [row["step"] for row in held_out] == [0, 6, 12]
    assert {d: held_out[-1][f"val/{d}/loss"] for d in DOMAINS} == losses == task.val_losses == pytest.approx(true_losses(task.net), abs=1e-6)
    assert held_out[-1]["val/code/ppl"] == pytest.approx(math.exp(losses["code"]))
    tokens = {d: sum(b["input_ids"].numel() for b in batches) for d, batches in validation().items()}
    assert {d: counts.sum(1).tolist() for d, counts in load.loads.items()} == {d: [2 * n] * 2 for d, n in tokens.items()}
    assert json.loads((tmp_path / "load.json").read_text()) == {"step": 12, "load": {d: counts.tolist() for d, counts in load.loads.items()}}
    for row in rows(tmp_path, "speed/mfu"):
        assert row["speed/mfu"] == pytest.approx(6 * task.active_parameters * row["speed/tokens_per_second"] / 1e9)
    summary = next(c for c in task.trainer.callbacks if isinstance(c, Throughput)).summary()
    assert summary["peak_flops_from"] == "rate given as trainer.peak_flops"
    assert summary["mfu"] == pytest.approx(6 * task.active_parameters * summary["tokens_per_second"] / 1e9)
    assert any("step 12/12: loss " in line and "tokens/s" in line and "mfu" in line for line in run.lines)


def test_the_dense_control_runs_on_the_same_task(tmp_path):
    task, losses, _ = train(tmp_path, dense(), config(max_steps=3, val_every=0))
    assert losses == pytest.approx(true_losses(task.net), abs=1e-6)  # validated at the end, though 3 is no multiple
    assert "train/lm_loss" not in rows(tmp_path, "train/loss")[0] and [row["step"] for row in rows(tmp_path, "val/loss")] == [0, 3]


def test_gradients_are_clipped_to_a_norm_over_all_of_them(tmp_path):
    """One step of SGD-like size: Adam's first moments are the clipped gradients times 1 - beta."""
    task, _, _ = train(tmp_path, dense(), config(max_steps=1), optim=OptimConfig(warmup_steps=0, clip=1e-3))
    moments = [state["exp_avg"].double() for state in task.trainer.optimizers[0].state.values()]
    norm = math.sqrt(sum(m.square().sum().item() for m in moments)) / (1 - task.trainer.optimizers[0].param_groups[0]["betas"][0])
    assert rows(tmp_path, "train/grad_norm")[0]["train/grad_norm"] > 1e-3 and norm == pytest.approx(1e-3, rel=1e-3)


def test_accumulation_is_one_larger_batch(tmp_path):
    class Whole:
        """The same sequences, two micro-batches at a time."""

        def __init__(self, halves) -> None:
            self.halves, self.state_dict, self.load_state_dict = halves, halves.state_dict, halves.load_state_dict

        def __len__(self) -> int:
            return len(self.halves) // 2

        def __iter__(self):
            micro = iter(self.halves)
            for first in micro:
                second = next(micro)
                yield {key: torch.cat([first[key], second[key]]) for key in first}

    halved = config(max_steps=3, accumulate=2)
    whole, _, _ = train(tmp_path / "whole", dense(), config(max_steps=3), Whole(loader(halved, batch_size=2)))
    halves, _, _ = train(tmp_path / "halves", dense(), halved, loader(halved, batch_size=2))
    for a, b in zip(whole.net.parameters(), halves.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    for key in ("train/loss", "train/grad_norm", "lr", "tokens"):
        assert [r[key] for r in rows(tmp_path / "whole", key)] == pytest.approx([r[key] for r in rows(tmp_path / "halves", key)], rel=1e-4)


def test_frozen_modules_stay(tmp_path):
    net = moe()
    freeze(net, net.model.embed_tokens, net.model.layers[0].mlp.gate)
    before = {name: p.clone() for name, p in net.named_parameters()}
    train(tmp_path, net, config())
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name in before if name.startswith("model.embed_tokens") or name.startswith("model.layers.0.mlp.gate")}
    assert changed and not changed & frozen and {"model.layers.1.mlp.experts.down_proj", "lm_head.weight"} <= changed


def test_selection_bias_follows_the_load_of_all_micro_batches(tmp_path):
    class Loads(ExpertLoad):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            assert not pl_module._sums or (batch_idx + 1) % 2  # emptied after every step

    net = moe(balance="bias", gate_noise=False, attention_dropout=0.0)
    cfg = config(max_steps=1, accumulate=2)
    data = loader(cfg)
    net.train()
    with torch.no_grad():
        load = sum(net(input_ids=b["input_ids"], labels=b["labels"]).expert_load for b in loader(cfg))
    train(tmp_path, net, cfg, data, callbacks=[Loads()])
    bias = torch.stack([layer.mlp.gate.selection_bias for layer in net.model.layers])
    torch.testing.assert_close(bias, 1e-3 * torch.sign(load.mean(-1, keepdim=True) - load).float())
    assert bias.any()


def test_validation_does_not_move_training(tmp_path):
    often, _, _ = train(tmp_path / "often", moe(), config(val_every=1), callbacks=[Drawing()])
    never, _, _ = train(tmp_path / "never", moe(), config(val_every=0, val_first=False))
    assert [r["train/loss"] for r in rows(tmp_path / "often", "train/loss")] == [r["train/loss"] for r in rows(tmp_path / "never", "train/loss")]
    assert all(torch.equal(a, b) for a, b in zip(often.net.parameters(), never.net.parameters(), strict=True))


class Drawing(ExpertLoad):
    """Uses up random numbers between the steps."""

    def on_validation_end(self, *args) -> None:
        torch.rand(5)
        super().on_validation_end(*args)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    for name, flag in (("plain", False), ("checkpointed", True)):
        train(tmp_path / name, moe(), config(gradient_checkpointing=flag))
    assert [r["train/loss"] for r in rows(tmp_path / "plain", "train/loss")] == pytest.approx(
        [r["train/loss"] for r in rows(tmp_path / "checkpointed", "train/loss")], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions(tmp_path, precision):
    task, losses, _ = train(tmp_path, moe(balance="bias"), config(precision=precision))
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in task.net.parameters()} == {expected} and math.isfinite(losses["docs"])
    assert task.net.model.rotary_emb.inv_freq.dtype == task.net.model.layers[0].mlp.gate.selection_bias.dtype == torch.float32


def test_evaluate_leaves_the_network_alone():
    net = moe().train()
    load = ExpertLoad()
    assert evaluate(net, validation(), config(), [load]) == pytest.approx(true_losses(net), abs=1e-6)
    net.train()
    assert evaluate(net, validation(), config()) and net.training and set(load.loads) == set(DOMAINS)


def test_checkpoints_are_plain_whole_and_few(tmp_path):
    (tmp_path / "checkpoints" / "moe").mkdir(parents=True)
    (tmp_path / "checkpoints" / "moe" / "step-00000099.ckpt.part").write_bytes(b"left by a kill")
    cfg, run = config(checkpoint_every=1), FakeRun(tmp_path)
    task = CausalLM(moe(), OptimConfig(lr=1e-2, warmup_steps=0), DOMAINS, cfg)
    fit(make_trainer(cfg, run, name="moe"), task, loader(cfg), validation())
    folder = tmp_path / "checkpoints" / "moe"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003.ckpt", "step-00000004.ckpt"]
    assert find_checkpoint(tmp_path, "moe") == newest_checkpoint(folder) == folder / "step-00000004.ckpt" and find_checkpoint(tmp_path) is None
    state = torch.load(folder / "step-00000004.ckpt", weights_only=True)
    assert state["global_step"] == 4 and state["dyn"]["about"]["config"]["num_experts"] == 4
    assert all(row["stage"] == "moe" for row in rows(tmp_path, "step"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, moe(), config(checkpoint_every=2))
    return folder


@pytest.mark.parametrize("harm", ["cut short", "one byte", "empty", "other file"])
def test_damaged_checkpoints_are_named_with_the_older_one(trained, tmp_path, harm):
    shutil.copytree(trained, tmp_path / "run")
    bad = tmp_path / "run" / "checkpoints" / "step-00000004.ckpt"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes({"cut short": content[: len(content) // 2], "one byte": content, "empty": b"", "other file": b"words " * 100}[harm])
    with pytest.raises(ValueError, match=r"step-00000004.ckpt is unusable: .*to resume from .*step-00000002.ckpt, which is whole, remove the damaged file"):
        find_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="unusable"):
        train(tmp_path / "run", moe(), config())
    bad.unlink()
    assert find_checkpoint(tmp_path / "run") == verify_checkpoint(bad.with_name("step-00000002.ckpt"))


@pytest.mark.parametrize(("place", "value", "error"), [(6, 1, RuntimeError), (8, 99, NotImplementedError), (8, 8, zlib.error)])
def test_a_zip_whose_flags_are_damaged_is_unusable(tmp_path, place, value, error):
    path = tmp_path / "step-00000002.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", b"\xff" * 1000)
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    for start in (place, directory + place + 2):  # of the file and of the directory: bit 0 asks for a password; methods 8 (deflate) and 99
        content[start] = value
    path.write_bytes(content)
    with pytest.raises(error), zipfile.ZipFile(path) as archive:
        archive.testzip()
    with pytest.raises(ValueError, match="unusable"):
        verify_checkpoint(path)


def test_a_finished_training_is_not_done_again(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    _, losses, _ = train(tmp_path / "run", moe(), config(checkpoint_every=2))
    assert losses == pytest.approx({d: rows(trained, "val/loss")[-1][f"val/{d}/loss"] for d in DOMAINS}, abs=0)
    after = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [r for r in before.splitlines() if "speed/" not in r] == [r for r in after.splitlines() if "speed/" not in r]
    train(tmp_path / "run", moe(), config(checkpoint_every=2), ckpt=None)  # from the beginning, asked for
    assert len(rows(tmp_path / "run", "train/loss")) == 4


@pytest.mark.parametrize(("changes", "named"), [
    (dict(optim=OptimConfig(lr=3e-3, warmup_steps=0)), "optim.lr=0.01, here 0.003"), (dict(net=moe(score_scale=3.0)), "config.score_scale=2.0, here 3.0"),
    (dict(net=dense()), "net='LlamaMoeForCausalLM', here 'LlamaForCausalLM'"), (dict(cfg=config(max_steps=5)), "max_steps=4, here 5")])
def test_checkpoints_of_another_training_are_refused(trained, tmp_path, changes, named):
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(ValueError, match=f"belongs to another training: .*{named}"):
        train(tmp_path / "run", **dict(net=moe(), cfg=config()) | changes)


def test_a_full_disk_keeps_the_older_checkpoint(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "checkpoints", tmp_path / "full")
    (tmp_path / "full" / "step-00000006.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not write the checkpoint .*step-00000006.ckpt: .*No space left.*step-00000004.ckpt is whole and can be resumed"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1000)}, tmp_path / "full" / "step-00000006.ckpt")
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["step-00000002.ckpt", "step-00000004.ckpt"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"checkpoints need .* GB are free; make room"):
        train(tmp_path / "small", moe(), config())


def test_refusals_come_before_any_work(tmp_path, monkeypatch):
    cfg = config()
    with pytest.raises(ValueError, match="warmup_steps=4 must be smaller than max_steps=4"):
        CausalLM(dense(), OptimConfig(warmup_steps=4), DOMAINS, cfg)
    with pytest.raises(ValueError, match="have 3 micro-batches; 4 steps of 1 need 4"):
        train(tmp_path, dense(), cfg, loader(cfg, num_batches=3))
    with pytest.raises(ValueError, match="list cannot be resumed exactly: it has no state_dict, load_state_dict"):
        train(tmp_path, dense(), cfg, list(loader(cfg)))
    task = CausalLM(dense(), OptimConfig(warmup_steps=0), ["docs", "code"], cfg)
    with pytest.raises(ValueError, match=r"validation domains \['code', 'docs'\] differ"):
        fit(make_trainer(cfg, FakeRun(tmp_path)), task, loader(cfg), validation())
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install dyn\[wandb\]"):
        make_trainer(config(wandb=True), FakeRun(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no GPU"):
        make_trainer(config(accelerator="gpu"), FakeRun(tmp_path))
    with pytest.raises(ValueError, match="the training data are those of rank 1, and this process has rank 0"):
        train(tmp_path, dense(), cfg, loader(cfg, rank=1, world_size=2))
    for field in ("max_steps", "accumulate", "devices"):
        with pytest.raises(ValueError, match=f"trainer.{field}=0 must be at least 1"):
            config(**{field: 0})
    with pytest.raises(ValueError, match="strategy=single fits one process"):
        config(strategy="single", devices=2)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_divergence_stops_with_advice(tmp_path):
    net = dense()
    net.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"train/loss=nan at step 1: training diverged; lower optim.lr=0.01"):
        train(tmp_path, net, config(val_first=False))


def test_strategies_follow_the_number_of_processes(monkeypatch):
    assert trainer_module._machine(config())["strategy"] == "auto"
    alone = trainer_module._machine(config(strategy="fsdp2", precision="bf16-mixed"))  # nothing to shard: what is saved is one process's
    assert alone["strategy"] == "auto" and alone["precision"] == "bf16-mixed"
    assert isinstance(trainer_module._machine(config(devices=2))["strategy"], DDPStrategy)
    several = trainer_module._machine(config(devices=8, num_nodes=2, precision="bf16-mixed"))
    assert isinstance(several["strategy"], ModelParallelStrategy) and several["precision"] == "32-true"  # FSDP2 has its own policy
    assert isinstance(trainer_module._machine(config(devices=2, strategy="fsdp2"))["strategy"], ModelParallelStrategy)
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_ID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"1 process was started, trainer.devices x trainer.num_nodes = 4: .* by torchrun or srun"):
        check_world(config(devices=2, num_nodes=2))
    check_world(config(devices=2))
    check_world(config())
    assert world(config(devices=2)) == (0, 2)
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world(config(devices=2, num_nodes=2)) == (3, 4) and world(config()) == (0, 1)
    check_world(config(devices=2, num_nodes=2))  # one command on each machine, whose number it is told
    monkeypatch.setenv("SLURM_PROCID", "0")  # a shell inside a job, whose variables are inherited
    assert world(config(devices=2, num_nodes=2)) == (3, 4)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert world(config(devices=2, num_nodes=2)) == (0, 4)
    with pytest.raises(ValueError, match="4 processes were started"):
        check_world(config(devices=2))
    monkeypatch.setenv("RANK", "2")
    assert world(config(devices=2, num_nodes=2)) == (2, 4)


def test_gates_stay_in_float32_where_weights_are_cut():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        task = CausalLM(moe(gate="mlp"), OptimConfig(warmup_steps=0), DOMAINS, config(precision="bf16-mixed"))
        task._device_mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
        task.configure_model()
        seen: dict[str, set] = {}
        for name, m in task.net.named_modules():
            if isinstance(m, (torch.nn.Linear, Gate)):
                m.register_forward_pre_hook(lambda m, _, name=name: seen.setdefault(name.rpartition(".")[2], set()).update(p.dtype for p in m.parameters()))
        task.net(input_ids=torch.ones(1, 4, dtype=torch.int64))
    finally:
        dist.destroy_process_group()
    assert seen["q_proj"] == {torch.bfloat16} and seen["gate"] == {torch.float32}


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_every_validation_batch_once(ranks):
    shares = [trainer_module._share(validation(), types.SimpleNamespace(world_size=ranks, global_rank=rank)) for rank in range(ranks)]
    for d, batches in enumerate(validation().values()):
        parts = [list(share[d]) for share in shares]
        assert len({len(part) for part in parts}) == 1
        real = [b["input_ids"] for part in parts for b in part if (b["labels"] != -100).any()]
        assert len(real) == len(batches) and all(any(torch.equal(a, b["input_ids"]) for a in real) for b in batches)
