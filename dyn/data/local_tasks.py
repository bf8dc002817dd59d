"""Questions and summaries out of what every Python machine holds, for machines without data sets: real text, made tasks.

Gaps: a sentence of a paragraph of documentation with a word left out asks for that word in the paragraph. Summary lines: the first line of a docstring (what
PEP 257 calls its summary line) from the rest of it. Both are split by document or module, and deterministic on one machine.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dyn.data import local_text

GAP = "____"
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z_][\w.]*\w|\d+")
_DOCSTRING = re.compile(r'(?:\A|:\s*?\n\s+)"""([^"\\]{100,}?)"""')  # parsing every file would take a minute on a busy machine
_SHORTEST, _LONGEST = 200, 900  # characters of a paragraph
_COMMON = 4  # letters: shorter words are mostly grammar


def gaps(limit_bytes: int = 3_000_000, held_out: float = 0.1) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Split ("train", "validation") -> questions as SQuAD's rows, at most one a sentence and three a paragraph; and what they are in words."""
    documents = local_text.domains(["docs"], limit_bytes=limit_bytes, limit_validation_bytes=limit_bytes // 10, held_out=held_out)["docs"]
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for split in ("validation", "train"):
        for document in documents[split]:
            found = [q for q in _gaps_of(document) if q["context"] not in seen]  # documents that differ may share paragraphs
            parts[split] += found
            seen |= {q["context"] for q in found}
    return parts, "gaps in the documentation on this machine (a made task on real text, not SQuAD)"


def _gaps_of(document: local_text.Document) -> Iterator[dict[str, Any]]:
    for place, paragraph in enumerate(re.split(r"\n\s*\n", document.text)):
        text = " ".join(paragraph.split())
        sentences = _SENTENCE.split(text)
        letters = sum(c.isalpha() or c == " " for c in text)
        if not _SHORTEST <= len(text) <= _LONGEST or len(sentences) < 2 or letters < 0.85 * len(text):
            continue  # code, tables, lists
        for sentence in sentences[:3]:
            words = [m for m in _WORD.finditer(sentence) if len(m.group()) > _COMMON and len(re.findall(rf"\b{re.escape(m.group())}\b", text)) == 1]
            if len(words) < 3 or text.count(sentence) != 1:
                continue
            key = f"{document.source}:{place}:{sentence}"
            gap = words[int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % len(words)]
            start = text.index(sentence) + gap.start()
            yield {"id": hashlib.sha256(key.encode()).hexdigest()[:16], "question": f"{sentence[: gap.start()]}{GAP}{sentence[gap.end() :]}",
                   "context": text, "answers": {"text": [gap.group()], "answer_start": [start]}}


def summary_lines(held_out: float = 0.1) -> tuple[dict[str, tuple[list[str], list[str]]], str]:
    """Split -> (the rest of docstrings, their first lines) of the standard library, those with a quote or a backslash left out; and what they are in words."""
    root = Path(sysconfig.get_path("stdlib"))
    pairs: dict[str, dict[str, str]] = {"train": {}, "validation": {}}  # what repeats comes once, in validation if it is there
    skipped = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "pydoc_data"}
    for path in sorted(path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts)):
        inner = path.relative_to(root)
        split = "validation" if local_text.is_held_out(inner.as_posix(), held_out) else "train"
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):  # a file that is broken on purpose
            continue
        for docstring in map(inspect.cleandoc, _DOCSTRING.findall(text)):
            summary, _, rest = docstring.partition("\n\n")
            if "\n" not in summary and len(summary) >= 20 and len(rest) >= 80:
                pairs[split].setdefault(rest, summary)
    pairs["train"] = {rest: summary for rest, summary in pairs["train"].items() if rest not in pairs["validation"]}
    parts = {split: (list(found), list(found.values())) for split, found in pairs.items()}
    return parts, "summary lines of the standard library's docstrings (a made task on real text, not XSum)"
