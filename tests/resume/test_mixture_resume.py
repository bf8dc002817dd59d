"""A loader that is stopped anywhere and restored gives the very batches of one that was not; in Lightning's loop too."""

import lightning
import pytest
import torch

from dyn.data.mixture import MixtureLoader
from dyn.data.tiny import tiny_tokens
from dyn.data.tokens import Tokens


def _loader(num_batches=30, **settings):
    domains = {name: splits["train"] for name, splits in tiny_tokens(documents=8).items()}  # small: epochs end within the run
    return MixtureLoader(domains, **{"block_size": 16, "batch_size": 3, "num_batches": num_batches, "seed": 5, "mask_documents": True, **settings})


def _reweigh(loader):
    if loader.step % 7 == 0:
        loader.set_weights({d: 1 + (loader.step + i) % 3 for i, d in enumerate(loader.domains)})


def _run(loader, steps=None):
    batches = []
    for batch in loader:
        batches.append(batch)
        _reweigh(loader)
        if len(batches) == steps:
            break
    return batches


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stop", [1, 7, 13, 29])
def test_resume_is_exact(stop, tmp_path):
    whole = _run(_loader())
    first = _loader()
    _run(first, stop)
    torch.save(first.state_dict(), tmp_path / "state")
    second = _loader()
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    rest = _run(second)
    assert len(rest) == 30 - stop
    assert all(_same(a, b) for a, b in zip(whole[stop:], rest, strict=True))
    assert max(n * second.block_size / second.tokens[d].num_tokens for d, n in second.used.items()) > 1


def test_other_world_size_of_the_same_global_batch():
    whole = _run(_loader(batch_size=4))
    first = _loader(batch_size=4)
    _run(first, 11)
    rank = _loader(batch_size=2, rank=1, world_size=2)
    rank.load_state_dict(first.state_dict())
    assert all(torch.equal(a["input_ids"][2:], b["input_ids"]) for a, b in zip(whole[11:], _run(rank), strict=True))


@pytest.mark.parametrize(("settings", "key"), [({"seed": 6}, "seed"), ({"block_size": 8}, "block_size"), ({"batch_size": 6}, "global_batch"),
                                               ({"mask_documents": False}, "mask_documents")])
def test_state_of_another_stream_is_refused(settings, key):
    with pytest.raises(ValueError, match=f"another data stream: {key}"):
        _loader(**settings).load_state_dict(_loader().state_dict())


def test_state_of_other_texts_or_another_order_is_refused():
    loader, sizes = _loader(), dict(block_size=16, batch_size=3, num_batches=30, seed=5, mask_documents=True)
    names = list(loader.tokens)
    with pytest.raises(ValueError, match="another data stream: domains"):
        MixtureLoader(dict(reversed(loader.tokens.items())), **sizes).load_state_dict(loader.state_dict())
    there = loader.tokens[names[0]]
    other = Tokens([shard[::-1] for shard in there.shards], there.offsets, there.vocab_size)
    with pytest.raises(ValueError, match="another data stream: samples"):
        MixtureLoader({**loader.tokens, names[0]: other}, **sizes).load_state_dict(loader.state_dict())


class _Record(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].clone())
        return self.weight * batch["input_ids"].float().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        _reweigh(self.trainer.train_dataloader)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def _fit(loader, steps, accumulate, save=None, resume=None):
    module = _Record()
    trainer = lightning.Trainer(max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu", logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, loader, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_resumes_mid_epoch(tmp_path, accumulate):
    steps, stop = 10, 4
    whole = _fit(_loader(steps * accumulate), steps, accumulate)
    first = _fit(_loader(steps * accumulate), stop, accumulate, save=tmp_path / "stop.ckpt")
    second = _fit(_loader(steps * accumulate), steps, accumulate, resume=tmp_path / "stop.ckpt")
    seen = first.seen + second.seen
    assert len(seen) == len(whole.seen) == steps * accumulate
    assert all(torch.equal(a, b) for a, b in zip(whole.seen, seen, strict=True))
    assert torch.equal(whole.weight, second.weight)
