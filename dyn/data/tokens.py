"""Text -> token shards, made once and cached; and `Tokens`, an endless stream of blocks over them.

A shard is a file of little-endian uint16 (vocabulary up to 65,536) or uint32 ids; beside it lie the int64 places where documents begin, and
one index.json says what should be there (sizes, CRC-32, tokenizer, source). Documents begin with BOS and have no EOS (LLaMA-MoE, section
4.1). The folder is any fsspec address: local shards are memory-mapped, remote ones copied to a local cache first.

B blocks, L tokens a block, N tokens in all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from itertools import chain

import numpy as np

from dyn.data.filters import FILTERS, Filter
from dyn.data.sources import TextSource, origin, streams
from dyn.data.store import Store

FORMAT = 1
_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 1024, 1 << 22  # what is filtered and tokenised at a time
_PROBE = "Hello  world, it's 1234.5 €\n\tdef f(x):\n        return x**2  # naïve Ünïcode — 日本語 🙂\r\n\n<s> A\u00a0B"


class Tokens:
    """The documents of one domain and split in a row, read as an endless cyclic stream.

    Block b of L tokens covers the tokens [b L, (b + 1) L) mod N: what is left over at the end of a pass goes into the next, so none is lost.

    Args:
        shards: token arrays (memory maps), in order.
        offsets: for each shard the places, inside it, where its documents begin.
        vocab_size: of the tokenizer.
    """

    def __init__(self, shards: Sequence[np.ndarray], offsets: Sequence[np.ndarray], vocab_size: int) -> None:
        assert len(shards) == len(offsets)
        self.shards, self.offsets, self.vocab_size = list(shards), list(offsets), vocab_size
        self._ends = np.cumsum([len(s) for s in shards])
        self.num_tokens, self.num_documents = int(self._ends[-1]) if len(shards) else 0, sum(len(o) for o in offsets)
        if not self.num_tokens:
            raise ValueError("token shards without a single token")

    @classmethod
    def from_documents(cls, documents: Sequence[Sequence[int]], vocab_size: int | None = None) -> Tokens:
        """From lists of ids, in memory."""
        flat = np.fromiter(chain.from_iterable(documents), np.int64)
        starts = np.cumsum([0, *map(len, documents)])[:-1]
        return cls([flat], [starts], int(flat.max()) + 1 if vocab_size is None else vocab_size)

    def __repr__(self) -> str:
        return f"Tokens({self.num_tokens:,} tokens, {self.num_documents:,} documents, {len(self.shards)} shards)"

    def blocks(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """The blocks at these places of the stream: int64 [B, L]."""
        out = np.empty((len(indices), size), np.int64)
        for row, index in zip(out, indices, strict=True):
            done, at = 0, int(index) * size % self.num_tokens
            while done < size:
                shard = int(np.searchsorted(self._ends, at, side="right"))
                left = int(self._ends[shard]) - at
                n = min(left, size - done)
                begin = len(self.shards[shard]) - left
                row[done : done + n] = self.shards[shard][begin : begin + n]
                done, at = done + n, (at + n) % self.num_tokens
        return out

    @cached_property
    def starts(self) -> np.ndarray:
        """Where documents begin in the whole stream: int64 [num_documents], ascending."""
        return np.concatenate([o.astype(np.int64) + e - len(s) for s, o, e in zip(self.shards, self.offsets, self._ends, strict=True)])

    def document_ids(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """The document (0 .. num_documents - 1) that each token of the blocks belongs to: int64 [B, L]."""
        return np.searchsorted(self.starts, self._places(indices, size), side="right") - 1

    def positions(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """Positions that start at 0 with each block and again with each document: int64 [B, L]. 0 marks where attention may not look back."""
        inside = self._places(indices, size) - self.starts[self.document_ids(indices, size)]
        return np.minimum(inside, np.arange(size))

    def _places(self, indices: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        return (np.asarray(indices, np.int64)[:, None] * size + np.arange(size)) % self.num_tokens


def blocks_of_epoch(epoch: int, size: int, num_tokens: int) -> range:
    """The blocks of the cyclic stream that begin in its epoch-th pass (from 0). The last one may reach into the next pass."""
    return range(-(-epoch * num_tokens // size), -(-(epoch + 1) * num_tokens // size))


def tokenizer_hash(tokenizer) -> str:
    """Names a tokenizer by its vocabulary, its BOS and EOS and what it makes of a probing text; not by files or classes."""
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id, ids]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def shard(source: TextSource, tokenizer, folder: str, *, keep: Mapping[str, Filter | Callable[[str, str], bool]] | Sequence[str] | None = None,
          bos: bool | str = True, shard_tokens: int = 1 << 26, cache: str | None = None,
          accept: Callable[[list[str]], object] = lambda domains: None,
          log: Callable[[str], None] = print, lead: bool = True) -> dict[str, dict[str, Tokens]]:
    """Domain -> split -> Tokens of a source: opened when they are in the cache, else made.

    An interrupted build goes on at the first missing shard and gives the same bytes. Several processes of one machine may call this at once:
    one builds, the others wait.

    Args:
        source: which text.
        tokenizer: a fast tokenizer of transformers.
        folder: the cache, any fsspec address; the shards lie below it in a folder named by (source, tokenizer, filters, options).
        keep: filters of the train documents: names of FILTERS that need no model ("advert"), or name -> filter, or name -> function of
            (text, domain), True = keep; a function is known to the cache only by its name. What each removed stands in index.json.
        bos: put this token before each document: the tokenizer's own (True), another by its text ("<|endoftext|>"), or none (False).
        shard_tokens: a shard is closed with the document that fills it so far.
        cache: where copies of remote shards are kept; None: dyn/tokens in the user's cache folder.
        accept: called with the names of the source's domains before any of its text is read; raises where they do not fit what is meant to be done with them.
        log: gets plain lines of progress where there is no terminal for a bar.
        lead: False on all processes but one: they leave check sums to it, and the making of shards in a remote folder, which has no lock.

    Raises:
        ValueError: a tokenizer without the wanted BOS, an unknown filter, a domain without documents, whatever `streams` and `load` refuse.
        OSError: the disk is full; shards that were finished stay.
    """
    begin = _bos_ids(tokenizer, bos)
    filters = _filters(keep)
    fields = {k: v for k, v in asdict(source).items() if k != "streaming"}
    # "eos" and its False: caches made when it was a choice keep their names.
    plan = {"format": FORMAT, "source": fields, "origin": origin(source), "tokenizer": tokenizer_hash(tokenizer), "bos": bos, "eos": False,
            "filters": {name: repr(f) if hasattr(f, "domains") else name for name, f in filters.items()}, "shard_tokens": shard_tokens}
    store = Store(f"{folder.rstrip('/')}/{hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]}")
    while not (lead or store.is_local or (store.index() or {}).get("complete")):
        time.sleep(1)
    if not (store.index() or {}).get("complete"):
        with store.lock():
            index = store.index() or {**plan, "complete": False, "vocab_size": len(tokenizer), "domains": {}}
            if not index["complete"]:
                with parallel_tokenizer():
                    _build(store, index, source, lambda texts: _encode(tokenizer, texts, begin, index["vocab_size"]), filters, accept, log)
    return load(store.address, tokenizer, verify=lead, cache=cache)


def load(folder: str, tokenizer=None, *, verify: bool = True, cache: str | None = None) -> dict[str, dict[str, Tokens]]:
    """Open finished shards: domain -> split -> Tokens.

    Args:
        folder: the folder with index.json.
        tokenizer: refuse shards of another one; None: do not look.
        verify: compare checksums, about a second a gigabyte; sizes are always compared.
        cache: see `shard`.

    Raises:
        ValueError: no or an unfinished or unreadable index, another tokenizer, a shard that is missing, empty, cut short or changed.
    """
    store = Store(folder)
    index = store.index()
    if index is None or not index.get("complete"):
        why = "no index.json, so no token shards here" if index is None else "the shards are unfinished; make them again, what is there is kept"
        raise ValueError(f"{folder}: {why}")
    if missing := [field for field in ("format", "tokenizer", "vocab_size", "domains") if field not in index]:
        raise ValueError(f"{folder}/index.json has no {', '.join(missing)}; delete {folder} to make its shards again")
    if index["format"] != FORMAT:
        raise ValueError(f"{folder}: shards of format {index['format']}; this version reads format {FORMAT}: make them again")
    if tokenizer is not None and (found := tokenizer_hash(tokenizer)) != index["tokenizer"]:
        raise ValueError(f"{folder}: made by another tokenizer (hash {index['tokenizer']}, {index['vocab_size']} ids; given: {found}, {len(tokenizer)} ids)")
    dtype = _dtype(index["vocab_size"])
    entries = [entry for splits in index["domains"].values() for part in splits.values() for entry in part["shards"]]
    files = {e["file"]: (dtype, (e["tokens"],), e["tokens_crc32"]) for e in entries}
    files |= {e["file"] + ".starts": (np.dtype("<i8"), (e["documents"],), e["documents_crc32"]) for e in entries}
    maps = store.arrays(files, cache, verify)

    def open_tokens(shards: list[dict]) -> Tokens:
        return Tokens([maps[e["file"]] for e in shards], [maps[e["file"] + ".starts"] for e in shards], index["vocab_size"])

    return {domain: {split: open_tokens(part["shards"]) for split, part in splits.items()} for domain, splits in index["domains"].items()}


def _bos_ids(tokenizer, bos: bool | str) -> list[int]:
    if bos is False:
        return []
    token = tokenizer.get_vocab().get(bos) if isinstance(bos, str) else tokenizer.bos_token_id
    if token is None:
        what = f"no token {bos!r}" if isinstance(bos, str) else "no BOS token"
        raise ValueError(f"the tokenizer has {what}: set bos=False, or bos to the text of a token that it has")
    return [token]


def _filters(keep: Mapping[str, Filter | Callable] | Sequence[str] | None) -> dict[str, Filter | Callable]:
    if isinstance(keep, Mapping):
        return dict(keep)
    for name in keep or ():
        if name not in FILTERS:
            raise ValueError(f"unknown filter {name!r}; there are {', '.join(FILTERS)}")
        if name == "fluency":
            raise ValueError("the filter 'fluency' needs a model: give {'fluency': Fluency(perplexity, ...)}")
    return {name: FILTERS[name]() for name in keep or ()}


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _encode(tokenizer, texts: list[str], begin: list[int], vocab_size: int) -> list[np.ndarray]:
    lists = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    arrays = [np.array([*begin, *ids], dtype=np.int64) for ids in lists]
    assert all(not len(a) or a.max() < vocab_size for a in arrays), "the tokenizer gave an id beyond its own size"
    return [a.astype(_dtype(vocab_size)) for a in arrays]


@contextmanager
def parallel_tokenizer() -> Iterator[None]:
    """Threads inside; afterwards off where nobody asked for them, since a process forked after using them would warn and could hang."""
    given = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        yield
    finally:
        if given is None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"


class _Writer:
    """The shards of one domain and split. `part` is its place in the index: finished shards, documents read for them, what filters removed."""

    def __init__(self, store: Store, index: dict, domain: str, split: str, limit: int | None, log: Callable[[str], None]) -> None:
        self.store, self.index, self.domain, self.split, self.limit, self.log = store, index, domain, split, limit, log
        self.part = index["domains"].setdefault(domain, {}).setdefault(split, {"shards": [], "read": 0, "removed": {}, "done": False})
        self.skip = self.read = self.part["read"]
        self.removed = json.loads(json.dumps(self.part["removed"]))
        self.arrays: list[np.ndarray] = []
        self.size, self.total = 0, sum(s["tokens"] for s in self.part["shards"])

    def add(self, ids: np.ndarray | None, text: str, removed_by: str | None) -> int:
        """Take the next document, or count it as removed; gives the number of tokens taken."""
        if self.part["done"]:
            return 0
        self.read += 1
        if removed_by is not None:
            count = self.removed.setdefault(removed_by, {"documents": 0, "bytes": 0})
            count["documents"], count["bytes"] = count["documents"] + 1, count["bytes"] + len(text.encode("utf-8", "surrogatepass"))
            return 0
        ids = ids if self.limit is None else ids[: self.limit - self.total]
        if len(ids):
            self.arrays.append(ids)
            self.size, self.total = self.size + len(ids), self.total + len(ids)
        full = self.limit is not None and self.total >= self.limit
        if full or self.size >= self.index["shard_tokens"]:
            self.close(done=full)
        return len(ids)

    def close(self, done: bool) -> None:
        """Write the shard, then the index that counts it: a kill between the two only repeats the shard."""
        if self.arrays:
            tokens = np.concatenate(self.arrays)
            starts = np.cumsum([0, *map(len, self.arrays)])[:-1].astype("<i8")
            name = f"{self.domain}/{self.split}/{len(self.part['shards']):05d}"
            self.store.write(name, tokens.tobytes())
            self.store.write(name + ".starts", starts.tobytes())
            self.part["shards"].append({"file": name, "tokens": len(tokens), "documents": len(starts), "tokens_crc32": zlib.crc32(tokens),
                                        "documents_crc32": zlib.crc32(starts)})
            self.log(f"{name}: {len(tokens):,} tokens of {len(starts):,} documents")
        self.arrays, self.size = [], 0
        self.part.update(read=self.read, removed=json.loads(json.dumps(self.removed)), done=done)
        self.store.write("index.json", json.dumps(self.index, indent=1).encode())


def _build(store: Store, index: dict, source: TextSource, encode: Callable[[list[str]], list[np.ndarray]], filters: dict[str, Filter | Callable],
           accept: Callable[[list[str]], object], log: Callable[[str], None]) -> None:
    parts = streams(source)
    accept(list(dict.fromkeys(domain for stream in parts for domain, _ in stream.targets)))
    terminal = sys.stderr.isatty()
    limits = {"train": source.max_tokens, "validation": source.max_validation_tokens}
    for stream in parts:
        writers = {target: _Writer(store, index, *target, limits[target[1]], (lambda line: None) if terminal else log) for target in stream.targets}
        if all(w.part["done"] and w.part["shards"] for w in writers.values()):
            continue
        chunk: list[tuple[_Writer, str]] = []
        characters = 0
        with _bar(terminal, ", ".join(dict.fromkeys(d for d, _ in stream.targets))) as advance:
            for domain, split, text in stream.rows():
                writer = writers[domain, split]
                if writer.skip:
                    writer.skip -= 1
                elif not writer.part["done"]:
                    chunk.append((writer, text))
                    characters += len(text)
                    if len(chunk) >= _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
                        advance(_flush(chunk, encode, filters))
                        chunk, characters = [], 0
                        if all(w.part["done"] for w in writers.values()):
                            break
            advance(_flush(chunk, encode, filters))
        for (domain, split), writer in writers.items():
            if not writer.part["done"]:
                writer.close(done=True)
            if not writer.part["shards"]:
                why = f", of {writer.read} read the filters removed {writer.removed}" if writer.read else ""
                hint = " (raise held_out)" if split == "validation" else ""
                raise ValueError(f"path={source.path!r}: the domain {domain!r} has no {split} documents{hint}{why}")
    index["complete"] = True
    store.write("index.json", json.dumps(index, indent=1).encode())


def _flush(chunk: list[tuple[_Writer, str]], encode: Callable[[list[str]], list[np.ndarray]], filters: dict[str, Filter | Callable]) -> int:
    """Filter, tokenise and store documents in their order; gives the number of tokens."""
    removed = [None if text.strip() else "blank" for _, text in chunk]
    for name, keep in filters.items():
        for domain in dict.fromkeys(w.domain for w, _ in chunk):
            whole = hasattr(keep, "domains")
            rows = [i for i, (w, _) in enumerate(chunk) if w.domain == domain and w.split == "train" and removed[i] is None]
            if rows and (not whole or keep.domains is None or domain in keep.domains):
                texts = [chunk[i][1] for i in rows]
                for i, good in zip(rows, keep(texts, domain) if whole else [keep(text, domain) for text in texts], strict=True):
                    removed[i] = None if good else name
    ids = iter(encode([text for (_, text), by in zip(chunk, removed, strict=True) if by is None]) if None in removed else ())
    return sum(writer.add(next(ids) if by is None else None, text, by) for (writer, text), by in zip(chunk, removed, strict=True))


@contextmanager
def _bar(terminal: bool, name: str) -> Iterator[Callable[[int], object]]:
    if not terminal:
        yield lambda n: None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=f"tokens of {name}"[:60], unit=" tokens", unit_scale=True) as bar:
        yield bar.update
