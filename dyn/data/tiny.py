"""Generated corpora, pictures and labelled sentences for tests and smoke runs: quick, deterministic, and with something to learn in each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyn.data.tokens import Tokens

DOMAINS = ("red", "green", "blue")


def tiny_documents(domains: Sequence[str] = DOMAINS, documents: int = 40, words: int = 60, seed: int = 0) -> dict[str, list[str]]:
    """Domain -> documents of about `words` words. Each domain has words of its own, and a word nearly tells the next."""
    result = {}
    for d, domain in enumerate(domains):
        rng = np.random.default_rng([seed, d])
        follows = rng.permutation(30)
        lexicon = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 7))) for _ in range(30)]
        result[domain] = [" ".join(lexicon[i] for i in _walk(rng, follows, n)) + ".\n"
                          for n in rng.integers(words // 2, words * 3 // 2 + 1, documents)]
    return result


def tiny_corpus(folder: str | Path, domains: Sequence[str] = DOMAINS, documents: int = 40, words: int = 60, seed: int = 0, validation: bool = True) -> str:
    """Write `tiny_documents` as a folder in the hub's layout (a config a domain; a fifth is the validation split, or there is none); gives the folder."""
    held = max(documents // 5, 1) if validation else 0
    return _write(folder, {domain: {split: [{"text": text} for text in part] for split, part in (("train", texts[held:]), ("validation", texts[:held])) if part}
                           for domain, texts in tiny_documents(domains, documents, words, seed).items()})


def tiny_tokens(domains: Sequence[str] = DOMAINS, vocab_size: int = 64, documents: int = 40, length: int = 50,
                seed: int = 0) -> dict[str, dict[str, Tokens]]:
    """Domain -> split -> Tokens, without text. Documents are BOS = 1 and about `length` ids in 3 .. vocab_size - 1; validation is a quarter as large."""
    result: dict[str, dict[str, Tokens]] = {}
    for d, domain in enumerate(domains):
        rng = np.random.default_rng([seed, d, 1])
        follows = rng.permutation(vocab_size - 3)
        for split, count in {"train": documents, "validation": max(documents // 4, 1)}.items():
            lengths = rng.integers(length // 2, length * 3 // 2 + 1, count)
            texts = [[1, *(3 + _walk(rng, follows, n))] for n in lengths]
            result.setdefault(domain, {})[split] = Tokens.from_documents(texts, vocab_size)
    return result


def tiny_tokenizer(framed: bool = False):
    """A byte-level tokenizer (256 bytes, <unk> 0, <s> 1, </s> 2, no merges: 259 ids) that behaves like any fast tokenizer of transformers.

    framed: it puts texts between <s> and </s>, two of them as RoBERTa and BART do, and has a padding token of its own (<pad> 259).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters, *(["<pad>"] if framed else [])])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    own = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if framed:
        frame = dict(single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        tokenizer.post_processor = processors.TemplateProcessing(**frame)
        own |= dict(cls_token="<s>", sep_token="</s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own)


def tiny_pictures(count: int = 60, classes: int = 3, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy stripes, uint8 [count, 3, size, size], and labels int64 [count]: a class is a direction and a colour."""
    rng = np.random.default_rng([seed, 2])
    labels = rng.permutation(np.arange(count) % classes)
    y, x = np.mgrid[:size, :size] / size
    angle = (np.pi * labels / classes)[:, None, None]
    stripes = np.sin(4 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi, (count, 1, 1)))
    colour = np.where(np.arange(3) == labels[:, None] % 3, 1.0, 0.5)[:, :, None, None]
    pixels = 128 + 90 * stripes[:, None] * colour + rng.normal(0, 20, (count, 3, size, size))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def tiny_image_folder(folder: str | Path, count: int = 60, classes: int = 3, size: int = 16, seed: int = 0) -> str:
    """Write `tiny_pictures` as an ImageNet folder, train/<class>/<image>.png and a third as many in val; gives the folder."""
    from PIL import Image

    folder = Path(folder)
    for split, n, s in (("train", count, seed), ("val", max(count // 3, classes), seed + 1)):
        pixels, labels = tiny_pictures(n, classes, size, s)
        for i, (picture, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            path = folder / split / f"stripes{label}" / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return str(folder)


def tiny_glue(folder: str | Path, tasks: Sequence[str] = ("cola", "mrpc", "stsb"), examples: int = 48, seed: int = 0) -> str:
    """Write GLUE tasks in the hub's layout (a third as many examples to validate, as many without labels to test); gives the folder.

    cola: does a sentence hold the word "red". mrpc: do two sentences share most of their words. stsb: the share, from 0 to 5.
    """
    words, configs = ["red", *(f"{a}{b}{c}" for a in "bdk" for b in "aou" for c in "lmnt")], {}
    for t, task in enumerate(tasks):
        configs[task] = {}
        for split, count in (("train", examples), ("validation", max(examples // 3, 4)), ("test", max(examples // 3, 4))):
            rng, rows = np.random.default_rng([seed, t, count, len(split)]), []
            for i in range(count):
                first = [str(w) for w in rng.choice(words[1:], rng.integers(3, 12))]
                kept = [w if i % 2 or rng.random() < 0.3 else str(rng.choice(words[1:])) for w in first]
                share = float(np.mean([a == b for a, b in zip(first, kept, strict=True)]))
                pair = {"sentence1": " ".join(first), "sentence2": " ".join(kept)}
                row = {"sentence": " ".join([*first, "red"] if i % 2 else first)} if task == "cola" else pair
                label = 5 * share if task == "stsb" else i % 2 if task == "cola" else int(share > 0.7)
                rows.append({**row, "label": (-1.0 if task == "stsb" else -1) if split == "test" else label, "idx": i})
            configs[task][split] = rows
    return _write(folder, configs)


def tiny_questions(count: int = 60, unanswerable: bool = False, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Split (a third as many to validate) -> SQuAD's rows: which of some things has which colour. unanswerable: every third question is of a thing that the
    text does not name."""
    things, colours = ["cup", "hat", "van", "pen", "jug", "map", "bus", "rug"], ["red", "green", "blue", "black", "white"]
    result = {}
    for s, (split, n) in enumerate((("train", count), ("validation", max(count // 3, 4)))):
        rng, rows = np.random.default_rng([seed, 4, s]), []
        for i in range(n):
            named = rng.permutation(things)[: rng.integers(2, 6)]
            facts = [f"The {thing} is {rng.choice(colours)}." for thing in named]
            asked, text = int(rng.integers(len(named))), " ".join(facts)
            start = len(" ".join(facts[:asked])) + bool(asked) + len(f"The {named[asked]} is ")
            answer, missing = facts[asked].split()[-1][:-1], bool(unanswerable and i % 3 == 0)
            thing = next(t for t in things if t not in named) if missing else named[asked]
            rows.append({"id": f"{split}-{i}", "title": "things", "context": text, "question": f"Which colour has the {thing}?",
                         "answers": {"text": [] if missing else [answer], "answer_start": [] if missing else [start]}})
        result[split] = rows
    return result


def tiny_squad(folder: str | Path, count: int = 60, unanswerable: bool = False, seed: int = 0) -> str:
    """Write `tiny_questions` as Parquet files in the hub's layout, below a config as rajpurkar/squad has it; gives the folder."""
    return _write(folder, {"plain_text": tiny_questions(count, unanswerable, seed)}, parquet=True)


def tiny_pairs(count: int = 48, seed: int = 0) -> dict[str, tuple[list[str], list[str]]]:
    """Split (a third as many to validate) -> (documents, summaries): a summary is the first three words of its document."""
    words, result = [f"{a}{b}{c}" for a in "bdk" for b in "aou" for c in "lmnt"], {}
    for s, (split, n) in enumerate((("train", count), ("validation", max(count // 3, 4)))):
        rng = np.random.default_rng([seed, 5, s])
        documents = [" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(n)]
        result[split] = documents, [" ".join(document.split()[:3]) for document in documents]
    return result


def tiny_xsum(folder: str | Path, count: int = 48, seed: int = 0) -> str:
    """Write `tiny_pairs` as Parquet files in the layout of EdinburghNLP/xsum; gives the folder."""
    rows = {split: [{"document": d, "summary": s, "id": str(i)} for i, (d, s) in enumerate(zip(*pairs, strict=True))]
            for split, pairs in tiny_pairs(count, seed).items()}
    return _write(folder, {"default": rows}, parquet=True)


def _write(folder: str | Path, configs: dict[str, dict[str, list[dict[str, Any]]]], parquet: bool = False) -> str:
    """Config -> split -> rows as a folder in the hub's layout, of JSON lines or Parquet files."""
    folder, lines = Path(folder), []
    for config, parts in configs.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        lines.append(f"- config_name: {config}\n  data_files:")
        for split, rows in parts.items():
            name = f"{split}-00000-of-00001.parquet" if parquet else f"{split}.jsonl"
            lines.append(f"  - split: {split}\n    path: {config}/{name}")
            if parquet:
                from datasets import Dataset

                Dataset.from_list(rows).to_parquet(str(folder / config / name))
            else:
                (folder / config / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    return str(folder)


def _walk(rng: np.random.Generator, follows: np.ndarray, length: int) -> np.ndarray:
    """Ids of which each follows the one before by a fixed rule, four times in five."""
    jump, random = rng.random(length) < 0.2, rng.integers(0, len(follows), length)
    ids = random.copy()
    for i in range(1, length):
        ids[i] = random[i] if jump[i] else follows[ids[i - 1]]
    return ids
