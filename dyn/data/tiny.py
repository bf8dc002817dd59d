"""Generated corpora for tests and smoke runs: quick, deterministic, and with something to learn in each domain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
    folder = Path(folder)
    configs = []
    for domain, texts in tiny_documents(domains, documents, words, seed).items():
        (folder / domain).mkdir(parents=True, exist_ok=True)
        held = max(documents // 5, 1) if validation else 0
        configs.append(f"- config_name: {domain}\n  data_files:")
        for split, part in {"train": texts[held:], "validation": texts[:held]}.items():
            if part:
                (folder / domain / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
                configs.append(f"  - split: {split}\n    path: {domain}/{split}.jsonl")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    return str(folder)


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


def tiny_tokenizer():
    """A byte-level tokenizer (256 bytes, <unk> 0, <s> 1, </s> 2, no merges: 259 ids) that behaves like any fast tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _walk(rng: np.random.Generator, follows: np.ndarray, length: int) -> np.ndarray:
    """Ids of which each follows the one before by a fixed rule, four times in five."""
    jump, random = rng.random(length) < 0.2, rng.integers(0, len(follows), length)
    ids = random.copy()
    for i in range(1, length):
        ids[i] = random[i] if jump[i] else follows[ids[i - 1]]
    return ids
