"""The cache of a teacher's rows: what goes in comes out, shards, interrupted builds, what is refused; and the loader over it."""

import copy
import json

import numpy as np
import pytest
import torch

from dyn.data.mixture import MixtureLoader
from dyn.data.teacher import TaughtLoader, TeacherCache, describe, digest, fingerprint
from dyn.data.tiny import tiny_tokens
from dyn.data.tokens import Tokens
from dyn.train.distill import cache_teacher

DOMAINS = {name: splits["train"] for name, splits in tiny_tokens(["code", "docs"]).items()}
BYTES = 16 * 8 * 4  # a block of 16 positions, 8 entries, 2 + 2 bytes


def about(domains=DOMAINS, **changes):
    return describe(domains, **dict(parent="aaaa", tokenizer="tttt", vocab_size=64, top_k=8, block_size=16) | changes)


def rows(count, vocab_size=64, seed=0, k=8):
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(vocab_size), (count, 16, 1)), axis=-1)[..., :k]
    return ids, np.log(rng.dirichlet(np.ones(k + 1), (count, 16))[..., :k])


def mixture(**changes):
    return MixtureLoader(DOMAINS, **dict(block_size=16, batch_size=4, num_batches=6, seed=1) | changes)


class FakeTeacher(torch.nn.Module):
    """Computes rows from the ids alone, and counts the sequences that it reads; fails at the `fail`-th."""

    def __init__(self, fail=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(64, 4), torch.nn.Linear(4, 64, bias=False)
        self.read, self.fail, self.device = 0, fail, torch.device("cpu")
        self.base_model = self.body

    def body(self, input_ids, use_cache):
        self.read += len(input_ids)
        if self.fail is not None and self.read >= self.fail:
            raise KeyboardInterrupt
        return type("Output", (), {"last_hidden_state": self.embed(input_ids)})

    def get_output_embeddings(self):
        return self.head


def fill(cache, teacher, **changes):
    return cache_teacher(cache, mixture(**changes), lambda: teacher, batch_size=2, dtype=None, log=lambda _: None)


@pytest.mark.parametrize(("vocab_size", "stored"), [(64, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<i4")])
def test_what_goes_in_comes_out(tmp_path, vocab_size, stored):
    blocks = [(0, 3), (1, 3), (0, 1 << 40)]
    ids, logp = rows(3, 1000)
    ids = ids * (vocab_size - 1) // 999
    cache = TeacherCache(str(tmp_path / "c"), about(vocab_size=vocab_size))
    cache.append(blocks, ids, logp)
    assert (tmp_path / "c" / "00000.ids").stat().st_size == ids.size * np.dtype(stored).itemsize
    for opened in (cache, TeacherCache(str(tmp_path / "c"), about(vocab_size=vocab_size))):
        read = opened.read([blocks[2], blocks[0], blocks[2]])
        assert {k: (tuple(v.shape), v.dtype) for k, v in read.items()} == {
            "teacher_ids": ((3, 16, 8), torch.int32), "teacher_logp": ((3, 16, 8), torch.float16)}
        assert np.array_equal(read["teacher_ids"].numpy(), ids[[2, 0, 2]])
        np.testing.assert_allclose(read["teacher_logp"].numpy(), logp[[2, 0, 2]], rtol=2**-11)
        assert len(opened) == 3 and opened.missing([(0, 4), (1, 3), (0, 4), (1, 4)]) == [(0, 4), (1, 4)]


@pytest.mark.parametrize(("changes", "words"), [
    (dict(parent="bbbb"), "parent=aaaa, here bbbb"),
    (dict(tokenizer="uuuu"), "tokenizer=tttt, here uuuu"),
    (dict(vocab_size=65), "vocab_size=64, here 65"),
    (dict(top_k=9), "top_k=8, here 9"),
    (dict(block_size=32), "block_size=16, here 32"),
    (dict(mask_documents=True), "mask_documents=False, here True"),
    (dict(dtype="bfloat16"), "dtype=float32, here bfloat16"),
    (dict(domains={"docs": DOMAINS["docs"], "code": DOMAINS["code"]}), "domains=code, docs, here docs, code"),
    (dict(domains={"code": DOMAINS["code"], "docs": DOMAINS["code"]}), "the tokens of docs differ"),
    (dict(parent="bbbb", top_k=9), "parent=aaaa, here bbbb; top_k=8, here 9"),
])
def test_another_teacher_or_text_is_refused(tmp_path, changes, words):
    TeacherCache(str(tmp_path / "c"), about()).append([(0, 0)], *rows(1))
    other = about(**changes)
    with pytest.raises(ValueError) as caught:
        TeacherCache(str(tmp_path / "c"), other)
    assert f"c holds the logits of another teacher or text: {words}" in str(caught.value)
    assert str(caught.value).endswith("; set distill.cache to another folder (null: one for each), or delete this one")
    assert digest(other) != digest(about()) == digest(json.loads(json.dumps(about())))


def test_another_format_and_too_many_entries(tmp_path):
    TeacherCache(str(tmp_path / "c"), about()).append([(0, 0)], *rows(1))
    path = tmp_path / "c" / "index.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="a cache of format 2; this version reads format 1"):
        TeacherCache(str(tmp_path / "c"), about())
    with pytest.raises(ValueError, match=r"distill\.top_k=65 must lie in 1 \.\. 64"):
        about(top_k=65)


def test_fingerprints_see_tokens_and_documents():
    same = [[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5]], [[1, 2], [3, 4, 5]], [[1, 2, 3], [4, 6]]
    prints = [fingerprint(Tokens.from_documents(documents, 10)) for documents in same]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize(("blocks", "expected"), [(1, [1] * 24), (5, [5, 5, 5, 5, 4]), (100, [24])])
def test_shards_hold_a_bounded_number_of_blocks(tmp_path, blocks, expected):
    cache = TeacherCache(str(tmp_path / "c"), about(), shard_bytes=blocks * BYTES + 3)
    assert fill(cache, FakeTeacher()) == 24
    assert [s["blocks"] for s in json.loads((tmp_path / "c" / "index.json").read_text())["shards"]] == expected
    whole = TeacherCache(str(tmp_path / "w"), about())
    fill(whole, FakeTeacher())
    planned = list(mixture().planned())
    assert all(torch.equal(a, b) for a, b in zip(cache.read(planned).values(), whole.read(planned).values(), strict=True))


def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(tmp_path):
    fill(TeacherCache(str(tmp_path / "whole"), about(), shard_bytes=5 * BYTES), FakeTeacher())
    with pytest.raises(KeyboardInterrupt):
        fill(TeacherCache(str(tmp_path / "c"), about(), shard_bytes=5 * BYTES), FakeTeacher(fail=13))
    (tmp_path / "c" / "00002.ids").write_bytes(b"a shard that was written, but not into the index")
    cache, teacher = TeacherCache(str(tmp_path / "c"), about(), shard_bytes=5 * BYTES), FakeTeacher()
    assert len(cache) == 10
    assert fill(cache, teacher) == teacher.read == 14
    files = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir() if f.name != ".lock"}
    assert len(files) == 5 * 3 + 1
    assert {name: (tmp_path / "c" / name).read_bytes() for name in files} == files


@pytest.mark.parametrize(("harm", "words"), [
    (lambda path: path.unlink(), "00000.logp in .* is missing; delete"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), "00000.logp in .* is empty or cut short: 254 bytes, the index says 256"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2] + b"ab"), "00000.logp in .* is corrupt: its checksum differs"),
])
def test_a_damaged_shard_is_refused(tmp_path, harm, words):
    TeacherCache(str(tmp_path / "c"), about()).append([(0, 0)], *rows(1))
    harm(tmp_path / "c" / "00000.logp")
    with pytest.raises(ValueError, match=words):
        TeacherCache(str(tmp_path / "c"), about())


def test_a_remote_cache(tmp_path):
    """Written to any fsspec address, read from a local copy."""
    cache = TeacherCache("memory://teacher", about(), shard_bytes=10 * BYTES, cache=str(tmp_path))
    assert fill(cache, FakeTeacher()) == 24
    again = TeacherCache("memory://teacher", about(), cache=str(tmp_path))
    assert len(again) == 24
    [copy] = tmp_path.glob("teacher-*/00002.ids")
    whole = copy.read_bytes()
    copy.write_bytes(bytes(len(whole)))
    assert len(TeacherCache("memory://teacher", about(), cache=str(tmp_path))) == 24 and copy.read_bytes() == whole


# The loader


@pytest.fixture
def filled(tmp_path):
    cache = TeacherCache(str(tmp_path / "c"), about(), shard_bytes=7 * BYTES)
    fill(cache, FakeTeacher())
    return cache


def test_batches_are_the_mixture_s_with_rows(filled):
    taught, plain = TaughtLoader(mixture(), filled), mixture()
    assert len(taught) == 6 and taught.weights == plain.weights and taught.block_size == 16
    for batch, expected in zip(taught, plain, strict=True):
        assert batch.keys() == expected.keys() | {"teacher_ids", "teacher_logp"}
        assert all(torch.equal(batch[k], v) for k, v in expected.items())
        rows = filled.read(plain.drawn)
        assert all(torch.equal(batch[k], v) for k, v in rows.items())
    assert taught.used == plain.used and copy.copy(taught).loader is taught.loader
    with pytest.raises(AttributeError):
        _ = taught.nothing_of_the_kind


def test_every_rank_reads_its_own(filled):
    whole = [b["teacher_logp"] for b in TaughtLoader(mixture(), filled)]
    ranks = [[b["teacher_logp"] for b in TaughtLoader(mixture(batch_size=2, rank=r, world_size=2), filled)] for r in range(2)]
    assert all(torch.equal(w, torch.cat(parts)) for w, *parts in zip(whole, *ranks, strict=True))


def test_a_mixture_in_the_middle_needs_the_rest_alone(filled):
    """`filled` holds what the whole run draws and nothing behind it."""
    loader, batches = mixture(), iter(mixture())
    for _ in range(4):
        next(batches)
    whole = list(TaughtLoader(mixture(), filled))
    first = iter(loader)
    for _ in range(4):
        next(first)
    assert len(list(loader.planned())) == 2 * loader.batch_size
    for batch, expected in zip(TaughtLoader(loader, filled), whole[4:], strict=True):
        assert torch.equal(batch["teacher_ids"], expected["teacher_ids"])


@pytest.mark.parametrize("stop", [1, 4])
def test_resume_is_exact(filled, stop, tmp_path):
    whole, first = list(TaughtLoader(mixture(), filled)), TaughtLoader(mixture(), filled)
    batches = iter(first)
    for _ in range(stop):
        next(batches)
    torch.save(first.state_dict(), tmp_path / "state")
    second = TaughtLoader(mixture(), filled)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    rest = list(second)
    assert len(rest) == 6 - stop
    assert all(torch.equal(a[k], b[k]) for a, b in zip(whole[stop:], rest, strict=True) for k in a)


def test_another_teacher_s_state_is_refused(filled, tmp_path):
    other = TeacherCache(str(tmp_path / "d"), about(parent="bbbb"))
    fill(other, FakeTeacher())
    state = TaughtLoader(mixture(), other).state_dict()
    for wrong, name in ((state, digest(other.about)), (mixture().state_dict(), "None")):
        with pytest.raises(ValueError, match=f"this checkpoint was taught by another cache: {name}, here {digest(filled.about)}"):
            TaughtLoader(mixture(), filled).load_state_dict(wrong)
    with pytest.raises(ValueError, match="another data stream: seed=2"):
        TaughtLoader(mixture(), filled).load_state_dict(mixture(seed=2).state_dict() | {"teacher": digest(filled.about)})


def test_what_the_cache_lacks(filled):
    with pytest.raises(ValueError, match="lacks 8 of the blocks that this training will draw"):
        TaughtLoader(mixture(num_batches=8), filled)
    loader = TaughtLoader(mixture(), filled)
    loader.set_weights({"code": 1.0, "docs": 0.0})
    with pytest.raises(ValueError, match=r"has no block .* of code .* domain weights may not change"):
        list(loader)
