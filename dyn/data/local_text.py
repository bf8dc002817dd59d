"""Real text that every Python machine holds, in three domains: code, docs and licences; and a labelled task made of docstrings.

code      the sources of the standard library (its tests too; generated codec tables left out)
docs      Python's help topics, long descriptions and .md/.rst files of the installed packages
licences  licence texts of the installed packages, Debian's copyright files and common licences where there are any

Which documents there are depends on the machine, and `manifest` says on what. From the same machine everything here is
deterministic: documents come in the order of the hash of their name, the split is decided by the hash of their content, and what
repeats another document (licences mostly do) is left out, so that held-out text does not stand in the training text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

DEBIAN = (("/usr/share/doc", "*/copyright"), ("/usr/share/common-licenses", "*"))
SMALLEST, LARGEST = 200, 60_000  # characters; bytes: larger files are mostly tables and collections of other people's licences
REPEAT = 0.8  # largest share of a document's word 8-grams that earlier documents of its split may hold: above, it is a copy
LEAK = 0.5  # largest share of a held-out document's word 8-grams that the train split may hold
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
_SHORT_DOCSTRING = 30  # characters: below, nobody could tell
_SHINGLE, _SAMPLE = 8, 4  # words in a shingle; one shingle in four is looked at
_LICENCE = re.compile(r"licen[cs]e|copying|notice|copyright", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")


class Labelled(NamedTuple):
    """A docstring, the place of its package in PACKAGES, and the module that it is from."""

    text: str
    label: int
    source: str


class Document(NamedTuple):
    """One document: its text and where it is from (a stable name, not a path of this machine)."""

    text: str
    source: str


Candidate = tuple[str, Callable[[], str]]  # name, how to read it


def domains(names: Iterable[str] | None = None, *, limit_bytes: int | None = None, limit_validation_bytes: int | None = None,
            held_out: float = 0.1) -> dict[str, dict[str, list[Document]]]:
    """Domain -> split ("train", "validation") -> documents.

    Args:
        names: which of DOMAINS; None: all.
        limit_bytes: stop adding to a domain's train split at this size (UTF-8; the last document may pass it); None: all there is.
        limit_validation_bytes: the same for validation; None: a twentieth of `limit_bytes`, or 100,000.
        held_out: chance of a document to be held out; its content alone decides.

    Raises:
        ValueError: an unknown name, a `held_out` outside (0, 1), or a domain without documents on this machine.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1, both excluded")
    names = list(DOMAINS) if names is None else list(names)
    for name in names:
        if name not in DOMAINS:
            raise ValueError(f"local text has no domain {name!r}; it has {', '.join(DOMAINS)}")
    if limit_validation_bytes is None:
        limit_validation_bytes = 100_000 if limit_bytes is None else limit_bytes // 20 + 1
    limits = {"train": limit_bytes, "validation": limit_validation_bytes}
    return {name: _collect(name, limits, held_out) for name in names}


def manifest() -> dict[str, str | int]:
    """What the documents depend on: Python's version, the installed packages and Debian's licence files, and a digest of their names."""
    packages = [f"{name}=={dist.version}" for name, dist in _packages().items()]
    debian = [name for name, _ in _debian()]
    python = platform.python_version()
    digest = hashlib.sha256("\n".join([python, *packages, *debian]).encode()).hexdigest()[:16]
    return {"python": python, "packages": len(packages), "debian_files": len(debian), "digest": digest}


def docstrings(held_out: float = 0.3) -> dict[str, list[Labelled]]:
    """Which of eight packages of the standard library a docstring comes from: split ("train", "validation") -> docstrings, about 1,850 in all.

    Split by module: no module gives to both. From each package those modules are held out, in the order of the hash of their name, that together hold at
    most `held_out` of its docstrings. What repeats word for word is left out where it would blur the labels or the split.

    Raises:
        ValueError: a package that this Python does not have as sources, or of which nothing is left on one side.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, list[list[Labelled]]] = {"train": [], "validation": []}
    for label, package in enumerate(PACKAGES):
        found = [m for path in sorted((root / package).rglob("*.py")) if (m := _docstrings_of(path, path.relative_to(root).as_posix(), label))]
        budget = held_out * sum(map(len, found))
        for module in sorted(found, key=lambda m: hashlib.sha256(m[0].source.encode()).digest()):
            split = "validation" if len(module) <= budget else "train"
            budget -= len(module) if split == "validation" else 0
            modules[split].append(module)
    labels: dict[bytes, set[int]] = {}
    for item in (item for part in modules.values() for module in part for item in module):
        labels.setdefault(content_hash(item.text), set()).add(item.label)
    seen: set[bytes] = set()
    splits: dict[str, list[Labelled]] = {}
    for split in ("validation", "train"):
        splits[split] = []
        for item in (item for module in modules[split] for item in module):
            if len(labels[key := content_hash(item.text)]) == 1 and key not in seen:
                seen.add(key)
                splits[split].append(item)
        if missing := sorted(set(range(len(PACKAGES))) - {item.label for item in splits[split]}):
            raise ValueError(f"docstrings: this Python has none of {PACKAGES[missing[0]]} for the {split} split (held_out={held_out})")
    return splits


def _docstrings_of(path: Path, source: str, label: int) -> list[Labelled]:
    if not {"test", "tests"}.isdisjoint(Path(source).parts):
        return []
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, nodes)]
    return [Labelled(text, label, source) for text in texts if len(text) >= _SHORT_DOCSTRING]


def _collect(name: str, limits: dict[str, int | None], held_out: float) -> dict[str, list[Document]]:
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    candidates = sorted(DOMAINS[name](), key=lambda c: hashlib.sha256(c[0].encode()).digest())
    texts = _distinct(candidates, held_out)
    waiting: list[tuple[Document, set[int]]] = []
    held: list[set[int]] = []  # word 8-grams of each held-out document
    size, seen = 0, set()
    # Held-out documents first: licences repeat each other so much that most would otherwise fall to what train already has.
    for split, document in texts:
        grams = _shingles(document.text)
        if split == "train":
            waiting.append((document, grams))
        elif len(grams & seen) <= REPEAT * len(grams):
            splits[split].append(document)
            held.append(grams)
            seen |= grams
            size += len(document.text.encode())
        if limits["validation"] is not None and size >= limits["validation"]:
            break
    size, seen_held, seen = 0, seen, set()
    for document, grams in chain(waiting, ((d, _shingles(d.text)) for split, d in texts if split == "train")):
        if limits["train"] is not None and size >= limits["train"]:
            break
        if len(grams & seen) > REPEAT * len(grams):
            continue
        common = grams & seen_held
        if common and any(len(own & seen) + len((own & common) - seen) > LEAK * len(own) for own in held if own & common):
            continue  # it, with what train has, would give a held-out document away
        splits["train"].append(document)
        seen |= grams
        size += len(document.text.encode())
    for split, documents in splits.items():
        if not documents:
            raise ValueError(f"local text has no {split} documents for the domain {name!r} on this machine ({len(candidates)} files looked at, "
                             f"held_out={held_out}); leave the domain out, or change held_out")
    return splits


def _distinct(candidates: list[Candidate], held_out: float) -> Iterator[tuple[str, Document]]:
    """(split, document) of the candidates that are long enough and repeat none before them word for word."""
    exact: set[bytes] = set()
    for source, read in candidates:
        text = _clean(read())
        if len(text) >= SMALLEST and (key := content_hash(text)) not in exact:
            exact.add(key)
            yield "validation" if is_held_out(text, held_out) else "train", Document(text, source)


def content_hash(text: str) -> bytes:
    """SHA-256 of the text without regard to white space."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: its content's hash, read as a number in [0, 1), lies below `share`."""
    return int.from_bytes(content_hash(text)[:7], "big") < share * 2**56


def _clean(text: str) -> str:
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\f", "\n"))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip() + "\n"


@cache
def _word(word: str) -> int:
    return zlib.crc32(word.encode())


def _shingles(text: str) -> set[int]:
    """A quarter of the hashes of the text's 8-grams of words; case, digits (years) and punctuation do not count."""
    words = np.fromiter(map(_word, re.findall(r"[^\W\d_]+", text.lower())), dtype=np.uint64)
    n = len(words) - _SHINGLE + 1
    if n < 1:
        return set()
    mixed = np.zeros(n, np.uint64)
    for j in range(_SHINGLE):
        mixed = (mixed ^ words[j : j + n]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return set(mixed[mixed % np.uint64(_SAMPLE) == 0].tolist())


def _file(path: Path) -> Callable[[], str]:
    def read() -> str:
        try:
            return path.read_text("utf-8") if path.stat().st_size <= LARGEST else ""
        except (OSError, UnicodeDecodeError):  # gone, unreadable or not UTF-8: no text
            return ""

    return read


@cache
def _packages() -> dict[str, importlib.metadata.Distribution]:
    """Installed packages by normalised name, the first on the path where there are two; without ourselves, whose README changes."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for dist in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", dist.metadata["Name"] or "").lower()
        if name and name != __name__.partition(".")[0]:
            found.setdefault(name, dist)
    return dict(sorted(found.items()))


def _package_files(wanted: Callable[[importlib.metadata.PackagePath], bool]) -> Iterator[Candidate]:
    for name, dist in _packages().items():
        for file in dist.files or ():
            if ".." not in file.parts and wanted(file):
                yield f"{name}/{file.as_posix()}", _file(Path(file.locate()))


def _code() -> Iterator[Candidate]:
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if skip.isdisjoint(inner.parts):
            yield inner.as_posix(), _file(path)


def _docs() -> Iterator[Candidate]:
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        for topic, text in topics.items():
            yield f"python/{topic}", lambda text=text: text
    for name, dist in _packages().items():
        yield f"{name}/description", lambda dist=dist: dist.metadata.get_payload() or dist.metadata.get("Description") or ""
    yield from _package_files(lambda file: file.suffix.lower() in (".md", ".rst") and not _LICENCE.search(file.name))


def _licences() -> Iterator[Candidate]:
    code = (".py", ".pyc", ".pyi", ".h", ".so", ".json", ".yaml")
    yield from _package_files(lambda file: bool(_LICENCE.search(file.stem)) and file.suffix.lower() not in code)
    for root in (Path(sysconfig.get_path("stdlib")), Path(sys.base_prefix)):
        yield from ((f"python/{path.name}", _file(path)) for path in sorted(root.glob("LICENSE*")))
    yield from _debian()


def _debian() -> Iterator[Candidate]:
    for folder, pattern in DEBIAN:
        for path in sorted(Path(folder).glob(pattern)):
            if path.is_file() and not path.is_symlink():
                yield f"{Path(folder).name}/{path.relative_to(folder).as_posix()}", _file(path)


DOMAINS: dict[str, Callable[[], Iterator[Candidate]]] = {"code": _code, "docs": _docs, "licences": _licences}
