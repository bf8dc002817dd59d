"""Typed configs: dataclass defaults (the paper's recipe) <- configs/NAME.PROFILE.yaml <- a sweep row <- key=value words.

A schema is a dataclass (`kw_only`, `slots`, nested as needed); its defaults are the profile `paper`, a YAML file holds only differences.
Whatever does not fit is refused with its place (file or word), the value, and the nearest key or the allowed values.
Ranges are checked by a dataclass's own `__post_init__` or `check()`, which raise ValueError.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
PAPER = "paper"
_SCALARS = (str, int, float, type(None))


def load(
    schema: type[T],
    name: str,
    profile: str = PAPER,
    words: Sequence[str] = (),
    *,
    row: Mapping[str, Any] | None = None,
    root: str | Path = ".",
) -> T:
    """The config of experiment `name`: defaults <- root/configs/NAME.PROFILE.yaml <- row (dotted keys) <- words ("a.b=value").

    Raises ValueError for a profile that does not exist, and for any key or value that does not fit.
    """
    tree = OmegaConf.structured(schema)
    path = Path(root) / "configs" / f"{name}.{profile}.yaml"
    if path.is_file():
        _set_file(tree, schema, path)
    elif profile != PAPER:
        raise ValueError(f"no profile {profile!r} for {name}; there are: {', '.join(profiles(name, root=root))}")
    for key, value in (row or {}).items():
        _set(tree, schema, key, value, place="sweep row")
    _set_words(tree, schema, words)
    return _build(tree, place=f"{name}, profile {profile}")


def profiles(name: str, *, root: str | Path = ".") -> list[str]:
    """The profiles of experiment `name`: those with a file, and `paper`, which needs none."""
    files = (Path(root) / "configs").glob(f"{name}.*.yaml")
    return sorted({path.name[len(name) + 1 : -len(".yaml")] for path in files} | {PAPER})


def read(schema: type[T], path: str | Path, words: Sequence[str] = ()) -> T:
    """The config that `save` wrote at `path`, with `words` on top; refusals as in `load`."""
    tree = OmegaConf.structured(schema)
    _set_file(tree, schema, Path(path))
    _set_words(tree, schema, words)
    return _build(tree, place=Path(path).name)


def read_dict(path: str | Path) -> dict[str, Any]:
    """What `save` wrote at `path`, as `to_dict` gives it, without a schema."""
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def save(cfg: Any, path: str | Path) -> None:
    """Write all values of a config as YAML that `yaml.safe_load` reads."""
    Path(path).write_text(_to_yaml(cfg), encoding="utf-8")


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config as nested dicts, lists, numbers, strings and None."""
    return _plain(dataclasses.asdict(cfg))


def digest(cfg: Any) -> str:
    """Eight hex digits that depend on every value and on no order of keys."""
    return hashlib.sha256(_to_yaml(cfg, sort_keys=True).encode()).hexdigest()[:8]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two configs as dicts: "optim.lr: 0.1 -> 0.2", sorted by key."""
    a, b = dict(_flatten(old)), dict(_flatten(new))
    both = sorted(a.keys() | b.keys())
    return [f"{k}: {a.get(k, '(absent)')} -> {b.get(k, '(absent)')}" for k in both if a.get(k, b) != b.get(k, a)]


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _to_yaml(cfg: Any, sort_keys: bool = False) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)), sort_keys=sort_keys)


def _set_file(tree: Any, schema: type, path: Path) -> None:
    try:
        content = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from None
    except AssertionError:  # OmegaConf's, for a number alone
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected keys with values, got a {'number' if content is None else 'list'}")
    for key, value in content.items():
        _set(tree, schema, str(key), value, place=path.name)


def _set_words(tree: Any, schema: type, words: Sequence[str]) -> None:
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, got {word!r}")
        key = full_key(schema, key, word)
        _set(tree, schema, key, _parse(_hint(schema, key), text, word), place="command line")


def full_key(schema: type, key: str, word: str) -> str:
    """A key as it stands, or, where there is none of that name on top, the one dotted key that ends in it: construction -> model.construction."""
    if "." in key or _hint(schema, key) is not None:
        return key
    fitting = [full for full in _keys(schema) if full.rpartition(".")[2] == key]
    if len(fitting) > 1:
        raise ValueError(f"command line: {word!r} could mean {', '.join(fitting)}; give the whole key")
    return fitting[0] if fitting else key


def _parse(hint: Any, text: str, word: str) -> Any:
    """Text of a word -> value. Fields that hold only strings take the text as it stands, so that 1e-4, off and a:b survive."""
    options = _options(hint)
    if options and all(option in (str, type(None)) or isinstance(option, str) for option in options):
        if text == "null" and type(None) in options:
            return None
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"command line, {word!r}: not valid YAML: {' '.join(str(error).split())}") from None


def _set(tree: Any, schema: type, key: str, value: Any, place: str) -> None:
    """Set one dotted key. A mapping goes key by key down to what is no dataclass, so that a refusal names the full key."""
    hint = _hint(schema, key)
    if hint is None:
        raise ValueError(f"{place}: there is no key {key!r} (value {value!r}); nearest: {_nearest(key, list(_keys(schema)))}")
    if isinstance(value, Mapping) and dataclasses.is_dataclass(_strip(hint)):
        for name, inner in value.items():
            _set(tree, schema, f"{key}.{name}", inner, place)
        return
    if any("${" in text or text == "???" for text in _scalars(value) if isinstance(text, str)):
        raise ValueError(f"{place}, {key}: interpolations are not supported, got {value!r}")
    value = _widen(hint, value)
    try:
        for depth in range(1, key.count(".") + 1):  # a nested dataclass that is None so far starts from its defaults
            parent = ".".join(key.split(".")[:depth])
            if OmegaConf.select(tree, parent) is None:
                OmegaConf.update(tree, parent, OmegaConf.structured(_strip(_hint(schema, parent))))
        OmegaConf.update(tree, key, value, merge=not isinstance(value, dict))  # a mapping replaces the one that was there
    except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        inner = "" if isinstance(value, _SCALARS) and "index" not in reason else f" ({reason})"
        choices = [option for option in _options(hint) if isinstance(option, str)]
        near = f"; nearest: {_nearest(str(value), choices)}" if choices else ""
        raise ValueError(f"{place}, {key}: expected {_describe(hint)}, got {value!r}{inner}{near}") from None


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _scalars(inner)
    else:
        yield value


def _build(tree: Any, place: str) -> Any:
    try:
        cfg = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ValueError(f"{place}: {str(error).splitlines()[0]}") from None
    except ValueError as error:  # from a __post_init__
        raise ValueError(f"{place}: {error}") from None
    for key, value in _flatten(dataclasses.asdict(cfg)):  # nan passes every check of a range
        if any(isinstance(number, (int, float)) and not abs(number) < 1 << 63 for number in _scalars(value)):
            raise ValueError(f"{place}: {key}={value} must be finite, and less than 2**63")
    for prefix, part in _parts(cfg):
        try:
            getattr(part, "check", lambda: None)()
        except ValueError as error:
            raise ValueError(f"{place}: {prefix + ': ' if prefix else ''}{error}") from None
    return cfg


def _parts(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dataclass inside a config, inner ones first, with its dotted key."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name)
        yield prefix, value
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _parts(inner, f"{prefix}.{index}")


# Type hints. An "option" is one member of a union, or one allowed value of a Literal.


def _options(hint: Any) -> list[Any]:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return [option for member in typing.get_args(hint) for option in _options(member)]
    return list(typing.get_args(hint)) if origin is Literal else [hint]


def _strip(hint: Any) -> Any:
    """X | None -> X."""
    options = [option for option in _options(hint) if option is not type(None)]
    return options[0] if len(options) == 1 else hint


def _hint(schema: Any, key: str) -> Any:
    """The type hint at a dotted key (list indices and dict keys are walked too); None where there is no such key."""
    hint: Any = schema
    for part in key.split("."):
        hint = _strip(hint)
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            hint = _hints(hint).get(part)
        elif origin is dict:
            hint = args[1]
        elif origin in (list, tuple) and part.isdigit():
            hint = args[0]
        else:
            return None
    return hint


@functools.cache  # a schema's annotations are text, evaluated anew by every get_type_hints
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(schema).items():
        yield prefix + name
        if dataclasses.is_dataclass(_strip(hint)):
            yield from _keys(_strip(hint), f"{prefix}{name}.")


def _nearest(given: str, valid: list[str]) -> str:
    """The valid word nearest to the given one; a dotted key that ends as the given one does is nearer than any spelling."""
    last = given.rsplit(".", 1)[-1]
    tails = [key for key in valid if "." in key and key.rsplit(".", 1)[-1] == last]
    return repr(difflib.get_close_matches(given, tails or valid, n=1, cutoff=0.0)[0])


def _widen(hint: Any, value: Any) -> Any:
    """An integer where a union takes floats but no integers becomes a float; OmegaConf widens only outside unions."""
    options = _options(hint)
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value)
    if isinstance(value, list) and list[float] in options and list[int] not in options:
        return [_widen(float, inner) for inner in value]
    if isinstance(value, dict) and dict[str, float] in options and dict[str, int] not in options:
        return {key: _widen(float, inner) for key, inner in value.items()}
    return value


def _describe(hint: Any) -> str:
    """"'a' or 'b' or null", "int or list[int]", "list[Domain]"."""
    return " or ".join("null" if option is type(None) else _name(option) for option in _options(hint))


def _name(option: Any) -> str:
    if isinstance(option, type) and not typing.get_args(option):
        return option.__name__
    return repr(option) if isinstance(option, str) else re.sub(r"\w+\.", "", str(option))
