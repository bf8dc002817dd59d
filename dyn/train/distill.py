"""The dense parent as a teacher of continual pre-training: what it says of the blocks that a training will draw, computed once and kept.

B sequences, L tokens, V entries of the vocabulary, K of them kept.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyn.core.distill import CHUNK_VALUES, top_logp
from dyn.data.mixture import MixtureLoader
from dyn.data.teacher import TaughtLoader, TeacherCache, describe, digest
from dyn.data.tokens import tokenizer_hash
from dyn.models.llama_moe_dense import load_dense, read_config
from dyn.models.packaged import cache_folder
from dyn.train.trainer import own_device, world

PATIENCE_SECONDS = 3600.0  # of the other ranks, without a new shard


def taught(cfg: Any, run: Any, source: Any, tokenizer: Any, loader: MixtureLoader) -> TaughtLoader:
    """`loader` with the parent's rows beside its batches, as `cfg.distill` says; rank 0 computes what the cache lacks, the others wait.

    Args:
        cfg: the experiment's settings: distill, trainer, model.source.
        run: the run (`log`, `folder`).
        source: folder or hub id of the parent.
        tokenizer: the text's.
        loader: the training mixture, at its beginning; its weights must stay as they are.

    Raises:
        ValueError: a cache of another parent, tokenizer, text or sizes, top_k larger than the vocabulary, no room on the disk.
        TimeoutError: rank 0 has not finished a shard for an hour.
    """
    settings = cfg.distill
    dtype = None if cfg.trainer.precision == "32-true" else torch.bfloat16
    about = describe(loader.tokens, parent=parent_hash(source), tokenizer=tokenizer_hash(tokenizer), vocab_size=read_config(source).vocab_size,
                     top_k=settings.top_k, block_size=loader.block_size, mask_documents=loader.mask_documents,
                     dtype="float32" if dtype is None else "bfloat16")
    home = run.folder if cfg.model.source == "tiny" else cache_folder()
    cache = TeacherCache(settings.cache or str(home / "teacher" / digest(about)), about)
    if world(cfg.trainer)[0] == 0:
        device = own_device(cfg.trainer)
        cache_teacher(cache, loader, lambda: load_dense(source).float().to(device), batch_size=settings.batch_size, dtype=dtype, log=run.log)
    else:
        _wait(cache, loader)
    return TaughtLoader(loader, cache)


def cache_teacher(cache: TeacherCache, loader: MixtureLoader, load: Callable[[], nn.Module], *, batch_size: int = 8, dtype: torch.dtype | None = torch.bfloat16,
                  log: Callable[[str], None] = print, every_seconds: float = 15.0) -> int:
    """Compute and keep what `cache` lacks of the blocks that `loader` will draw on all ranks; gives their number.

    An interrupted call keeps its finished shards; the next one goes on there and gives the same bytes, since shards and batches are cut alike. Processes of one
    machine may call this at once: one computes, the others wait.

    Args:
        cache: filled in place.
        loader: the mixture from where the training will begin.
        load: the teacher on its device, a causal language model of transformers; called only when something is missing.
        batch_size: blocks a forward pass.
        dtype: of autocast for its layers; None: without. The head and the softmax are float32: bfloat16 logits are 0.1 apart.
        log: gets a line every `every_seconds`.

    Raises:
        ValueError: no room for what is missing, or a teacher whose vocabulary is not the cache's.
        OSError: a shard that cannot be written; finished ones stay.
    """
    if not (missing := cache.missing(loader.planned())):
        log(f"teacher: all blocks are in {cache.store.address}")
        return 0
    with cache.lock():
        cache.reload()
        missing = cache.missing(missing)  # another process may have been here
        if missing:
            _check_room(cache, len(missing))
            log(f"teacher: top {cache.about['top_k']} of {len(missing):,} blocks, {len(missing) * cache.block_bytes / 1e9:.2f} GB, into {cache.store.address}")
            net, precision = load().eval(), torch.get_float32_matmul_precision()
            width = net.get_output_embeddings().weight.shape[0]
            if width != cache.about["vocab_size"]:
                raise ValueError(f"the teacher has {width} logits, its cache {cache.store.address} is for vocab_size={cache.about['vocab_size']}")
            torch.set_float32_matmul_precision("highest")  # a cache serves runs of every precision
            try:
                _fill(cache, loader, net, missing, batch_size, dtype, log, every_seconds)
            finally:
                torch.set_float32_matmul_precision(precision)
            del net
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return len(missing)


def parent_hash(source: str | Path) -> str:
    """Names a dense model by the bytes of its config.json and weights; about a second a gigabyte.

    Args:
        source: a folder with safetensors, or a hub id that has been loaded on this machine before.

    Raises:
        ValueError: no safetensors there.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(source), local_files_only=True))
    if not (weights := sorted(folder.glob("*.safetensors"))):
        raise ValueError(f"{folder} has no *.safetensors to know the teacher by")
    hasher = hashlib.sha256()
    for path in (folder / "config.json", *weights):
        with path.open("rb") as file:
            hasher.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return hasher.hexdigest()[:16]


@torch.no_grad()
def top_of(net: nn.Module, batch: dict[str, Tensor], k: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The K likeliest next tokens at every place and their log-probabilities: ids [B, L, K] int32, logp [B, L, K] float16, on the net's device."""
    inputs = {key: batch[key].to(net.device) for key in ("input_ids", "position_ids") if key in batch}
    with torch.autocast(net.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        hidden_BLD = net.base_model(**inputs, use_cache=False).last_hidden_state
    head = net.get_output_embeddings()
    rows = max(1, CHUNK_VALUES // head.weight.shape[0])
    parts = [top_logp(head(part.to(head.weight.dtype)), k) for part in hidden_BLD.flatten(0, 1).split(rows)]
    shape = (*hidden_BLD.shape[:2], k)
    return torch.cat([ids for ids, _ in parts]).view(shape).int(), torch.cat([logp for _, logp in parts]).view(shape).half()


def _fill(cache: TeacherCache, loader: MixtureLoader, net: nn.Module, missing: list[tuple[int, int]], batch_size: int, dtype: torch.dtype | None,
          log: Callable[[str], None], every_seconds: float) -> None:
    began = said = time.monotonic()
    for first in range(0, len(missing), cache.shard_blocks):
        shard = missing[first : first + cache.shard_blocks]
        found = []
        for at in range(0, len(shard), batch_size):
            found.append([each.cpu() for each in top_of(net, loader.assemble(shard[at : at + batch_size]), cache.about["top_k"], dtype)])
            done, now = first + min(at + batch_size, len(shard)), time.monotonic()
            if now - said >= every_seconds:
                said = now
                log(f"teacher: {done:,} of {len(missing):,} blocks, {done * loader.block_size / (now - began):,.0f} tokens/s, "
                    f"{(len(missing) - done) * (now - began) / done:,.0f} s to go")
        ids, logp = (torch.cat(each).numpy() for each in zip(*found, strict=True))
        cache.append(shard, ids, logp)
    log(f"teacher: {len(missing):,} blocks in {time.monotonic() - began:.0f} s")


def _check_room(cache: TeacherCache, blocks: int) -> None:
    if not cache.store.is_local:
        return
    place = next(p for p in (Path(cache.store.root), *Path(cache.store.root).parents) if p.is_dir())
    needed, free = blocks * cache.block_bytes, shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(f"{cache.store.address} needs {needed / 1e9:.1f} GB for the logits of {blocks:,} blocks, {free / 1e9:.1f} GB are free; make room, "
                         "set distill.cache to another place, or lower distill.top_k or tokens")


def _wait(cache: TeacherCache, loader: MixtureLoader) -> None:
    missing, last = list(loader.planned()), time.monotonic()
    while missing := cache.missing(missing):
        if time.monotonic() - last > PATIENCE_SECONDS:
            raise TimeoutError(f"waited {PATIENCE_SECONDS:.0f} s for rank 0 to write another shard of {cache.store.address}; its own message says why")
        time.sleep(1.0)
        had = len(cache)
        cache.reload()
        last = time.monotonic() if len(cache) > had else last
