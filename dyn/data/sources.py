"""Where text comes from: this machine, a folder in the hub's layout, or the hub; as streams of (domain, split, text).

One field addresses all three (`TextSource.path`). The environment variable DYN_DATA names a folder of local copies, looked at before the hub.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dyn.data import local_text
from dyn.data.store import user_cache

if TYPE_CHECKING:
    from datasets import Dataset

SLIMPAJAMA = {"RedPajamaCommonCrawl": "en_cc", "RedPajamaC4": "en_c4", "RedPajamaGithub": "github", "RedPajamaWikipedia": "en_wikipedia",
              "RedPajamaBook": "en_book", "RedPajamaArXiv": "en_arxiv", "RedPajamaStackExchange": "en_stack"}
"""SlimPajama's names (`meta.redpajama_set_name`) -> the names of the LLaMA-MoE paper's domains."""

SPLITS = ("train", "validation")


@dataclass(kw_only=True, slots=True)
class TextSource:
    """A corpus in domains.

    path: "local" (`local_text`: what every machine holds), a folder in the hub's layout, or a hub id. Copies below $DYN_DATA (by the whole id,
        or its last part) come before the hub.
    text_field: the column of the text.
    domain_field: the column of a document's domain, dots lead inwards ("meta.redpajama_set_name"); None: every config is a domain.
    domain_names: values of `domain_field` -> names of domains; None: SLIMPAJAMA.
    domains: which domains to take; None: all.
    max_tokens, max_validation_tokens: tokens a domain, at most, in each split; None: all.
    held_out: share of the documents held out for validation (by the hash of their content) where the source has no validation split.
    streaming: read from the hub without downloading all of it first (local folders are always read in place).
    revision: of the hub's repository; None: the newest. A cache does not notice when the newest changes: pin it where that matters.
    """

    path: str = "local"
    text_field: str = "text"
    domain_field: str | None = None
    domain_names: dict[str, str] | None = None
    domains: list[str] | None = None
    max_tokens: int | None = None
    max_validation_tokens: int | None = None
    held_out: float = 0.05
    streaming: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        at_least_one(self, "max_tokens", "max_validation_tokens", of=f" of the text {self.path!r}")
        if self.domains == []:
            raise ValueError(f"domains=[] of the text {self.path!r}: name one at least, or null for all")


@dataclass(kw_only=True, slots=True)
class JoinedText:
    """One split of a data set, read as a single text: what published perplexities are measured on (WikiText-2: all test lines joined by blank lines).

    name: of its numbers.
    path, config, split: a hub id or a folder in the hub's layout (as in `TextSource`), the config (None: the only one) and the split.
    text_field: the column of the text.
    joint: what stands between two documents.
    documents: the first so many, at most; None: all.
    max_tokens: whole windows of the first so many tokens; None: all.
    streaming, revision: as in `TextSource`.
    """

    name: str = "text"
    path: str = ""
    config: str | None = None
    split: str = "test"
    text_field: str = "text"
    joint: str = "\n\n"
    documents: int | None = None
    max_tokens: int | None = None
    streaming: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        at_least_one(self, "documents", "max_tokens", of=f" of the text {self.path!r}")


def at_least_one(source: object, *names: str, of: str = "") -> None:
    """ValueError for fields of a source, limits of which None is none, that are below 1. `of`: words behind the value."""
    for name in names:
        if (value := getattr(source, name)) is not None and value < 1:
            raise ValueError(f"{name}={value}{of} must be at least 1, or null for all")


class Stream(NamedTuple):
    """One pass over a part of a source: the (domain, split) pairs that it may feed, and the documents."""

    targets: list[tuple[str, str]]
    rows: Callable[[], Iterator[tuple[str, str, str]]]


def resolve(path: str) -> str:
    """The folder that stands for `path`, if there is one: itself, $DYN_DATA/path or $DYN_DATA/(last part of path); else `path`, a hub id."""
    root = os.environ.get("DYN_DATA")
    places = [Path(path)] + ([Path(root) / path, Path(root) / Path(path).name] if root else [])
    return next((str(place) for place in places if place.is_dir()), path)


def whence(path: str) -> str:
    """Where the data set of that path comes from, in words."""
    return "a local copy" if Path(resolve(path)).is_dir() else "from the hub"


def origin(source: TextSource) -> dict[str, str | int | None]:
    """What a source's text depends on, without reading it and without naming places of this machine."""
    if source.path == "local":
        return {"kind": "local", **local_text.manifest()}
    folder = Path(resolve(source.path))
    if not folder.is_dir():
        return {"kind": "hub", "id": source.path, "revision": source.revision}
    files = _files(folder)
    return {"kind": "folder", "files": len(files), "digest": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}


def streams(source: TextSource) -> list[Stream]:
    """The streams of a source; each (domain, split) pair is fed by exactly one of them, always in the same order.

    Raises:
        ValueError: nothing found at the path, a missing train split or column, an unknown domain.
    """
    if source.path == "local":
        names = choose(source.domains, local_text.DOMAINS, "local text")
        return [Stream([(name, split) for split in SPLITS], lambda name=name: _local_rows(source, name)) for name in names]
    if not 0 < source.held_out < 1:
        raise ValueError(f"held_out={source.held_out} must lie between 0 and 1, both excluded")
    return _by_field(source) if source.domain_field else _by_config(source)


def read_joined(source: JoinedText) -> str:
    """The text of a `JoinedText`. ValueError for a path, config, split or column that there is not, and for a text that is empty."""
    from datasets import get_dataset_config_names, get_dataset_split_names

    asked = TextSource(path=source.path, revision=source.revision)
    where = f"{source.name}: path={source.path!r}"
    configs = _ask_hub(asked, get_dataset_config_names)
    if source.config is None and len(configs) != 1:
        raise ValueError(f"{where}: config must be one of {', '.join(configs)}")
    [config] = choose([source.config or configs[0]], configs, where, "config")
    [split] = choose([source.split], _ask_hub(asked, get_dataset_split_names, config), f"{where}, config {config!r}", "split")
    text = source.joint.join(row[source.text_field] for row in islice(_read(source, config, split, [source.text_field]), source.documents))
    if not text.strip():
        raise ValueError(f"{where}, config {config!r}, split {split!r}: no text")
    return text


def load_splits(path: str, config: str | None = None, *, revision: str | None = None) -> dict[str, Dataset]:
    """Every split of one config of a labelled data set, as Arrow tables: split -> datasets.Dataset. Those of a folder lie in dyn's cache, others in the hub's.

    Args:
        path: a hub id or a folder in the hub's layout, as in `TextSource`.
        config: None: the only one, or the one called "default".
        revision: of the hub's repository.

    Raises:
        ValueError: nothing at the path, or an unknown config.
    """
    from datasets import get_dataset_config_names, load_dataset

    configs = _ask_hub(TextSource(path=path, revision=revision), get_dataset_config_names)
    if config is None and len(configs) > 1 and "default" not in configs:
        raise ValueError(f"path={path!r}: config must be one of {', '.join(configs)}")
    [config] = choose([config or (configs[0] if len(configs) == 1 else "default")], configs, f"path={path!r}", "config")
    folder, cache = Path(resolve(path)), None
    if folder.is_dir():  # datasets knows a folder's tables again by less than its files: after a change it would give the old ones
        cache = str(user_cache() / "tables" / hashlib.sha256(json.dumps([str(folder.resolve()), _files(folder)]).encode()).hexdigest()[:16])
    try:
        return dict(load_dataset(resolve(path), config, revision=revision, cache_dir=cache))
    except Exception as error:
        raise _unreadable(f"path={path!r}, config {config!r}", error) from error


def labelled(found: Mapping[str, Dataset], columns: Mapping[str, str], held: Iterable[str], where: str) -> dict[str, Dataset]:
    """The splits of a labelled data set to train and to validate on, train first.

    Args:
        found: what `load_splits` gives.
        columns: what each split must have, named as the settings name it.
        held: the splits to validate on.
        where: begins each message.

    Raises:
        ValueError: no train split, an unknown one in `held`, or a missing column.
    """
    if "train" not in found:
        raise ValueError(f"{where}: no split train; found {', '.join(found)}")
    splits = {split: found[split] for split in ["train", *choose(held, [s for s in found if s != "train"], where, "split")]}
    for split, rows in splits.items():
        if missing := [name for name, column in columns.items() if column not in rows.column_names]:
            raise ValueError(f"{where}, split {split!r}: no column {missing[0]}; found {', '.join(rows.column_names)}")
    return splits


def choose(wanted: Iterable[str] | None, known: Iterable[str], where: str, what: str = "domain") -> list[str]:
    """`wanted`, or all of `known` for None. ValueError naming the nearest for a name that is not known."""
    known = list(known)
    for name in wanted or ():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.0)
            raise ValueError(f"{where}: no {what} {name!r}; there are {', '.join(known)}" + (f" (nearest: {near[0]})" if near else ""))
    return known if wanted is None else list(dict.fromkeys(wanted))


def _local_rows(source: TextSource, name: str) -> Iterator[tuple[str, str, str]]:
    # English has 4 to 5 bytes a token, code fewer: this is enough, and bounds what is read.
    limit, limit_validation = (None if n is None else 6 * n for n in (source.max_tokens, source.max_validation_tokens))
    documents = local_text.domains([name], limit_bytes=limit, limit_validation_bytes=limit_validation, held_out=source.held_out)[name]
    for split in SPLITS:
        for document in documents[split]:
            yield name, split, document.text


def _ask_hub(source: TextSource, question: Callable, *args: str) -> list[str]:
    try:
        return list(question(resolve(source.path), *args, revision=source.revision))
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        if (place := Path(resolve(source.path))).is_dir():
            files = _files(place)
            empty = [name for name, size, _ in files if not size]
            more = f"; without a byte: {', '.join(empty[:5])}" if empty else f"; its files: {', '.join(name for name, *_ in files[:5])}" if files else ""
            what = "/".join(map(str, args)) or "the folder"
            raise ValueError(f"{place}: {what} cannot be read as a data set ({_reason(error)}){more}") from error
        looked = "a folder" + (", a copy below $DYN_DATA" if os.environ.get("DYN_DATA") else " (DYN_DATA, a folder of local copies, is not set)")
        raise ValueError(f"path={source.path!r}: no data set; looked for {looked} and on the hub ({type(error).__name__}: {error})") from error


def _splits(source: TextSource, config: str) -> list[str]:
    from datasets import get_dataset_split_names

    found = _ask_hub(source, get_dataset_split_names, config)
    if "train" not in found:
        raise ValueError(f"path={source.path!r}, config {config!r}: no train split; found {', '.join(found)}")
    return [split for split in SPLITS if split in found]


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """What a folder's data are known again by without reading them: names, sizes and times of change."""
    files = (f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    return sorted((f.relative_to(folder).as_posix(), f.stat().st_size, f.stat().st_mtime_ns) for f in files)


def _reason(error: BaseException) -> str:
    """`datasets` raises of every kind, often with the reason in the cause."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}"


def _unreadable(where: str, error: Exception) -> ValueError:
    return ValueError(f"{where}: cannot be read ({_reason(error)}); allowed are the files that the library datasets reads, whole")


def _read(source: TextSource | JoinedText, config: str, split: str, columns: list[str]) -> Iterator[dict]:
    """The rows of a split, those columns of them. ValueError, with the place, for a missing column, what cannot be read, and a text that is none."""
    from datasets import load_dataset

    where, wrong = f"path={source.path!r}, config {config!r}", None
    path = resolve(source.path)  # a folder is read in place: anything else would first copy it all into a cache of Arrow files
    try:
        data = load_dataset(path, config, split=split, streaming=source.streaming or Path(path).is_dir(), revision=source.revision)
        missing = [column for column in columns if data.column_names is not None and column not in data.column_names]
        if missing:
            wrong = f"{where}: no column {missing[0]!r}; found {', '.join(data.column_names)}"
        for number, row in enumerate(() if missing else data.select_columns(columns)):
            if not isinstance(text := row[source.text_field], str):
                wrong = f"{where}, split {split!r}, row {number} (from 0): {source.text_field!r} holds a {type(text).__name__}; allowed are texts alone"
                break
            yield row
    except Exception as error:
        raise _unreadable(f"{where}, split {split!r}", error) from error
    if wrong:
        raise ValueError(wrong)


def _rows(source: TextSource, config: str, split: str, held: bool, domain_of: Callable[[dict], str | None]) -> Iterator[tuple[str, str, str]]:
    for row in _read(source, config, split, [c for c in (source.text_field, (source.domain_field or "").partition(".")[0]) if c]):
        if (domain := domain_of(row)) is not None:
            text = row[source.text_field]
            yield domain, "validation" if held and local_text.is_held_out(text, source.held_out) else split, text


def _by_config(source: TextSource) -> list[Stream]:
    from datasets import get_dataset_config_names

    result = []
    for config in choose(source.domains, _ask_hub(source, get_dataset_config_names), f"path={source.path!r}"):
        found = _splits(source, config)
        held = "validation" not in found
        for split in found:
            targets = [(config, s) for s in (SPLITS if held else [split])]
            result.append(Stream(targets, lambda c=config, s=split, h=held: _rows(source, c, s, h, lambda row: c)))
    return result


def _by_field(source: TextSource) -> list[Stream]:
    from datasets import get_dataset_config_names

    names = source.domain_names or SLIMPAJAMA
    domains = choose(source.domains, dict.fromkeys(names.values()), f"path={source.path!r}, domain_names")
    configs = _ask_hub(source, get_dataset_config_names)
    if len(configs) != 1:
        raise ValueError(f"path={source.path!r}: domain_field={source.domain_field!r} needs a data set of one config; found {', '.join(configs)}")

    def domain_of(row: dict) -> str | None:
        value = row
        for key in source.domain_field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value not in names and source.domains is None:
            raise ValueError(f"{source.domain_field}={value!r} has no name in domain_names ({', '.join(names)}); add it, or name the domains to take")
        return name if (name := names.get(value)) in domains else None

    found = _splits(source, configs[0])
    held = "validation" not in found
    return [Stream([(d, s) for d in domains for s in (SPLITS if held else [split])], lambda split=split: _rows(source, configs[0], split, held, domain_of))
            for split in found]
