"""config.py: layers, refusals with place, value and nearest valid key, digests, round trips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from dyn import config


@dataclass(kw_only=True, slots=True)
class Domain:
    name: str = "code"
    weight: float = 1.0


@dataclass(kw_only=True, slots=True)
class Optim:
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["adamw", "sgd"] = "adamw"
    warmup: int | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")


@dataclass(kw_only=True, slots=True)
class Schema:
    seed: int = 0
    flag: bool = False
    optim: Optim = field(default_factory=Optim)
    dense: Optim | None = None
    domains: list[Domain] = field(default_factory=lambda: [Domain()])
    scale: Literal["n_over_k", "n"] | float | list[float] | None = None
    experts: int | list[int] = 8
    tags: dict[str, float] = field(default_factory=dict)
    path: str | None = None
    gate: Literal["on", "off"] = "on"

    def check(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative; 0 or more")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "x.demo.yaml").write_text("seed: 3\noptim:\n  lr: 1e-3\n")
    return tmp_path


def load(*words, profile="paper", root=".", row=None):
    return config.load(Schema, "x", profile, words, row=row, root=root)


def test_layers_in_order(root):
    assert load(root=root) == Schema()
    cfg = load(profile="demo", root=root)
    assert (cfg.seed, cfg.optim.lr, cfg.optim.kind) == (3, 1e-3, "adamw")
    cfg = load("optim.lr=0.5", profile="demo", root=root, row={"seed": 7, "optim.kind": "sgd"})
    assert (cfg.seed, cfg.optim.lr, cfg.optim.kind) == (7, 0.5, "sgd")


def test_a_mapping_replaces_the_one_that_was_there():
    assert load("tags={b: 2}", row={"tags.a": 1.0}).tags == {"b": 2.0} and load("tags={}", row={"tags.a": 1.0}).tags == {}
    assert load("tags.b=2", row={"tags.a": 1.0}).tags == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("seed=5", "seed", 5),
        ("flag=true", "flag", True),
        ("optim.warmup=null", "optim", Optim()),
        ("optim.betas=[0.8,1]", "optim", Optim(betas=(0.8, 1.0))),
        ("dense.lr=3", "dense", Optim(lr=3.0)),
        ("domains=[{name: docs}]", "domains", [Domain(name="docs")]),
        ("domains.0.weight=2", "domains", [Domain(weight=2.0)]),
        ("scale=n", "scale", "n"),
        ("scale=2", "scale", 2.0),
        ("scale=[1,2.5]", "scale", [1.0, 2.5]),
        ("experts=[4,8]", "experts", [4, 8]),
        ("tags.a=1", "tags", {"a": 1.0}),
        ("path=1e-4", "path", "1e-4"),
        ("path='a b'", "path", "a b"),
        ("path=a=b:c#d", "path", "a=b:c#d"),
        ("path=null", "path", None),
        ("gate=off", "gate", "off"),  # not YAML's false
    ],
)
def test_words(word, key, value):
    got = getattr(load(word), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("optim.lrr=1", ["command line", "'optim.lrr'", "value 1", "nearest: 'optim.lr'"]),
        ("warmup=1", ["'warmup=1' could mean optim.warmup, dense.warmup", "whole key"]),
        ("warmpu=1", ["'warmpu'", "nearest: 'optim.warmup'"]),
        ("sed=1", ["nearest: 'seed'"]),
        ("seed.x=1", ["'seed.x'", "nearest: 'seed'"]),
        ("optim={lr: 1, kid: sgd}", ["'optim.kid'", "nearest: 'optim.kind'"]),
        ("optim.lr=fast", ["command line, optim.lr", "float", "'fast'"]),
        ("seed=1.5", ["seed", "int", "1.5"]),
        ("flag=perhaps", ["flag", "bool"]),
        ("optim=3", ["optim", "Optim", "3"]),
        ("optim.kind=adam", ["'adamw' or 'sgd'", "'adam'", "nearest: 'adamw'"]),
        ("optim.betas=[1,2,3]", ["optim.betas", "tuple[float, float]"]),
        ("experts=many", ["int or list[int]", "'many'"]),
        ("domains=[{nam: a}]", ["domains", "nam", "name"]),
        ("domains.4.name=a", ["domains.4.name", "out of range"]),
        ("seed=", ["seed", "int"]),
        ("experts=[1,", ["experts=[1,", "not valid YAML"]),
        ("seed", ["key=value", "'seed'"]),
        ("path=${seed}", ["path", "interpolations"]),
        ("optim.lr=-1", ["lr=-1.0 must be positive"]),
        ("seed=-1", ["seed=-1 is negative"]),
        ("optim.lr=.nan", ["optim.lr=nan must be finite"]),
        ("optim.betas=[0.9,inf]", ["optim.betas=", "must be finite"]),
        ("scale=[1,.inf]", ["scale=", "must be finite"]),
        ("tags={a: -.inf}", ["tags.a=-inf must be finite"]),
        (f"seed={2**70}", ["seed=1180591620717411303424 must be finite, and less than 2**63"]),
    ],
)
def test_refusals_of_words(word, parts):
    with pytest.raises(ValueError) as caught:
        load(word)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim:\n  lrr: 1\n", ["x.bad.yaml", "'optim.lrr'", "nearest: 'optim.lr'"]),
        ("optim:\n  lr: fast\n", ["x.bad.yaml, optim.lr", "'fast'"]),
        ("dense:\n  kind: no\n", ["x.bad.yaml, dense.kind", "'adamw' or 'sgd'"]),
        ("seed: 1\nseed: 2\n", ["x.bad.yaml", "duplicate"]),
        ("- seed\n", ["x.bad.yaml", "list"]),
        ("5\n", ["x.bad.yaml", "number"]),
        ("seed: [1\n", ["x.bad.yaml", "not valid YAML"]),
    ],
)
def test_refusals_of_files(root, text, parts):
    (root / "configs" / "x.bad.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        load(profile="bad", root=root)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_missing_profile_lists_the_others(root):
    with pytest.raises(ValueError, match=r"no profile 'dem' for x; there are: demo, paper"):
        load(profile="dem", root=root)


def test_empty_file_changes_nothing(root):
    (root / "configs" / "x.none.yaml").write_text("# nothing\n")
    assert load(profile="none", root=root) == Schema()


def test_round_trip_and_digest(tmp_path):
    cfg = load("path=1e-4", "dense.lr=3", "scale=[1,2]", "gate=off", "tags.a=2")
    config.save(cfg, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config.to_dict(cfg) == config.read_dict(tmp_path / "config.yaml")
    again = config.read(Schema, tmp_path / "config.yaml")
    assert again == cfg and config.digest(again) == config.digest(cfg)
    assert config.digest(cfg) != config.digest(load())
    assert config.read(Schema, tmp_path / "config.yaml", ["seed=4"]).seed == 4


def test_digest_does_not_depend_on_the_order_of_keys():
    @dataclass
    class AB:
        a: int = 1
        b: float = 2.0

    @dataclass
    class BA:
        b: float = 2.0
        a: int = 1

    assert config.digest(AB()) == config.digest(BA()) != config.digest(AB(a=2))


def test_differences():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}, "same": [1]}, {"a": 1, "b": {"c": 5}, "same": [1], "e": None}
    assert config.differences(old, new) == ["b.c: 2 -> 5", "b.d: 3 -> (absent)", "e: (absent) -> None"]
    assert config.differences(old, old) == []
