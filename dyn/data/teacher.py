"""A teacher's likeliest next tokens, kept on disk block by block, and the loader that gives them out beside the text.

A cache is a folder at any fsspec address: index.json says of which teacher, tokenizer and text it is, and which shards are whole. A shard is three
little-endian files: NAME.blocks (int64 pairs: place of the domain, block of its training stream), NAME.ids (uint16 for vocabularies up to 65,536, else
int32) and NAME.logp (float16).

B sequences, L tokens a block, K kept entries. Row l of a block is the distribution of token l + 1; the last row is kept too, so that rows stand beside logits.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyn.data.mixture import MixtureLoader
from dyn.data.store import Store
from dyn.data.tokens import Tokens

FORMAT = 1
_FIELDS = ("parent", "tokenizer", "vocab_size", "top_k", "block_size", "mask_documents", "dtype", "domains")


def describe(domains: Mapping[str, Tokens], *, parent: str, tokenizer: str, vocab_size: int, top_k: int, block_size: int, mask_documents: bool = False,
             dtype: str = "float32") -> dict[str, Any]:
    """What a cache must agree with: plain data, the same for the same teacher, text and sizes.

    Args:
        domains: the training streams, in the mixture's order.
        parent, tokenizer: hashes (`dyn.train.distill.parent_hash`, `dyn.data.tokens.tokenizer_hash`).
        vocab_size: width of the teacher's logits.
        top_k, block_size: K and L.
        mask_documents: as in `MixtureLoader`.
        dtype: that the teacher's matrix products run in.

    Raises:
        ValueError: top_k outside 1 .. vocab_size.
    """
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"distill.top_k={top_k} must lie in 1 .. {vocab_size}, the teacher's vocabulary")
    return {"parent": parent, "tokenizer": tokenizer, "vocab_size": vocab_size, "top_k": top_k, "block_size": block_size, "mask_documents": mask_documents,
            "dtype": dtype, "domains": {name: fingerprint(tokens) for name, tokens in domains.items()}}


def digest(about: Mapping[str, Any]) -> str:
    """Eight hex digits that name a description."""
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


def fingerprint(tokens: Tokens) -> str:
    """Names a stream by its bytes and by where its documents begin; about a second a gigabyte."""
    hasher = hashlib.sha256()
    for array in (*tokens.shards, *tokens.offsets):
        hasher.update(np.ascontiguousarray(array).view(np.uint8))
    return hasher.hexdigest()[:16]


class TeacherCache:
    """Top-K log-probabilities of one teacher by (domain, block): what is there, what is missing, reading and appending.

    Args:
        folder: any fsspec address; it need not exist.
        about: what `describe` gives.
        shard_bytes: at most so much a shard, one block at least.
        cache: where copies of remote shards are kept; None: dyn/tokens in the user's cache folder.

    Raises:
        ValueError: the folder holds something else (each difference is named), or a shard that is missing, cut short or changed.
    """

    def __init__(self, folder: str, about: Mapping[str, Any], *, shard_bytes: int = 1 << 26, cache: str | None = None) -> None:
        self.store, self.about, self._copies = Store(folder), dict(about), cache
        self._shape = about["block_size"], about["top_k"]
        self._ids = np.dtype("<u2" if about["vocab_size"] <= 1 << 16 else "<i4")
        self.block_bytes = self._shape[0] * self._shape[1] * (self._ids.itemsize + 2)
        self.shard_blocks = max(1, shard_bytes // self.block_bytes)
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._keys = self._places = np.empty(0, np.int64)
        self.reload()

    def __len__(self) -> int:
        """Blocks that are there."""
        return len(self._keys)

    def reload(self) -> None:
        """Read the index again, for shards that another process has written. ValueError as the class."""
        index = self.store.index()
        if index is None:
            return
        if index.get("format") != FORMAT:
            raise ValueError(f"{self.store.address}: a cache of format {index.get('format')}; this version reads format {FORMAT}: delete it, or set "
                             "distill.cache to another folder")
        if wrong := [text for name in _FIELDS for text in _differences(name, index["about"].get(name), self.about[name])]:
            raise ValueError(f"{self.store.address} holds the logits of another teacher or text: {'; '.join(wrong)}; set distill.cache to another folder "
                             "(null: one for each), or delete this one")
        self._open(index["shards"][len(self._arrays):])

    def lock(self) -> AbstractContextManager:
        """Held by the process that fills the cache."""
        return self.store.lock()

    def missing(self, blocks: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of `blocks` (place of the domain, block) that are not there, in their order, once each."""
        wanted = list(dict.fromkeys(blocks))
        return [block for block, there in zip(wanted, self._find(wanted)[1].tolist(), strict=True) if not there]

    def append(self, blocks: Sequence[tuple[int, int]], ids: np.ndarray, logp: np.ndarray) -> None:
        """Write one shard; then the index that counts it, so that a kill between the two only repeats the shard.

        Args:
            blocks: at most `shard_blocks`, none of them there yet.
            ids, logp: [len(blocks), L, K].

        Raises:
            OSError: it cannot be written; earlier shards stay.
        """
        assert ids.shape == logp.shape == (len(blocks), *self._shape), (ids.shape, logp.shape)
        index = self.store.index() or {"format": FORMAT, "about": self.about, "shards": []}
        name = f"{len(index['shards']):05d}"
        files = {"blocks": np.array(blocks, "<i8"), "ids": ids.astype(self._ids), "logp": logp.astype("<f2")}
        for kind, array in files.items():
            self.store.write(f"{name}.{kind}", array.tobytes())
        index["shards"].append({"file": name, "blocks": len(blocks), **{f"{kind}_crc32": zlib.crc32(array) for kind, array in files.items()}})
        self.store.write("index.json", json.dumps(index, indent=1).encode())
        self._open(index["shards"][len(self._arrays):])

    def read(self, blocks: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """teacher_ids [B, L, K] int32 and teacher_logp [B, L, K] float16 of these blocks. ValueError for one that is not there."""
        at, there = self._find(blocks)
        if not there.all():
            domain, block = blocks[int(there.argmin())]
            name = list(self.about["domains"])[domain]
            raise ValueError(f"{self.store.address} has no block {block} of {name} ({(~there).sum()} of {len(blocks)} in this batch are missing): "
                             "it was made for other draws; domain weights may not change while a teacher's cache is read")
        ids, logp = np.empty((len(blocks), *self._shape), np.int32), np.empty((len(blocks), *self._shape), np.float16)
        for row, place in enumerate(self._places[at].tolist()):
            shard, inside = divmod(place, 1 << 32)
            ids[row], logp[row] = (array[inside] for array in self._arrays[shard])
        return {"teacher_ids": torch.from_numpy(ids), "teacher_logp": torch.from_numpy(logp)}

    def _find(self, blocks: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Where each block would stand among the sorted keys, and whether it is there."""
        keys = _keys(blocks)
        if not len(self):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        at = np.searchsorted(self._keys, keys).clip(max=len(self) - 1)
        return at, self._keys[at] == keys

    def _open(self, entries: list[dict[str, Any]]) -> None:
        """Take in more shards of the index."""
        kinds = {"blocks": (np.dtype("<i8"), (2,)), "ids": (self._ids, self._shape), "logp": (np.dtype("<f2"), self._shape)}
        files = {f"{e['file']}.{kind}": (dtype, (e["blocks"], *shape), e[f"{kind}_crc32"]) for e in entries for kind, (dtype, shape) in kinds.items()}
        maps = self.store.arrays(files, self._copies)
        keys, places = [self._keys], [self._places]
        for entry in entries:
            keys.append(_keys(maps[f"{entry['file']}.blocks"]))
            places.append((len(self._arrays) << 32) + np.arange(entry["blocks"]))
            self._arrays.append((maps[f"{entry['file']}.ids"], maps[f"{entry['file']}.logp"]))
        order = np.argsort(found := np.concatenate(keys), kind="stable")
        self._keys, self._places = found[order], np.concatenate(places)[order]


class TaughtLoader:
    """A `MixtureLoader` whose batches carry the teacher's rows: teacher_ids [B, L, K] int32, teacher_logp [B, L, K] float16.

    Order, state, length and every other attribute are the mixture's; the state also names the cache.

    Raises:
        ValueError: the cache lacks blocks that the rest of the mixture's batches will draw.
    """

    def __init__(self, loader: MixtureLoader, cache: TeacherCache) -> None:
        if gone := cache.missing(loader.planned()):
            raise ValueError(f"{cache.store.address} lacks {len(gone):,} of the blocks that this training will draw: fill it first "
                             "(dyn.train.distill.cache_teacher)")
        self.loader, self.cache = loader, cache

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The mixture's batches."""
        for batch in self.loader:
            yield batch | self.cache.read(self.loader.drawn)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def state_dict(self) -> dict[str, Any]:
        """The mixture's, and which cache."""
        return self.loader.state_dict() | {"teacher": digest(self.cache.about)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. ValueError when that was another stream or another teacher."""
        theirs, ours = state.get("teacher"), digest(self.cache.about)
        if theirs != ours:
            raise ValueError(f"this checkpoint was taught by another cache: {theirs}, here {ours} ({self.cache.store.address})")
        self.loader.load_state_dict(state)


def _keys(blocks: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """One int64 for each (domain, block)."""
    pairs = np.asarray(blocks, np.int64).reshape(-1, 2)
    return (pairs[:, 0] << 48) + pairs[:, 1]


def _differences(name: str, theirs: Any, ours: Any) -> list[str]:
    if name != "domains":
        return [] if theirs == ours else [f"{name}={theirs}, here {ours}"]
    if list(theirs) != list(ours):
        return [f"domains={', '.join(theirs)}, here {', '.join(ours)}"]
    return [f"the tokens of {d} differ ({theirs[d]}, here {ours[d]})" for d in ours if theirs[d] != ours[d]]
