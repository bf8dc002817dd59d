"""Who may import whom, read from the source: rooms of dyn, and the heavy libraries."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT) for folder in ("dyn", "experiments", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# Rooms of ours that a room may import, itself apart. env says where a process runs; figures and page draw: the standard library and matplotlib only.
OURS = {
    "core": set(), "ops": set(), "nn": {"core", "ops"}, "models": {"nn", "core"}, "data": set(), "train": {"nn", "core", "data", "models", "figures", "env"},
    "config": set(), "env": set(), "figures": set(), "page": set(), "verdicts": set(), "report": {"page", "verdicts"}, "runfolder": {"config", "env", "report"},
    "run": {"config", "env", "report", "runfolder"}, "__init__": set(),
}
OPS_IN_MODELS = "dyn.ops.experts"  # models register our op with transformers, under its public name
HOSTS_IN_ATTACH = (Path("dyn/nn/adapter_attach.py"), "dyn.models.hosts")  # inside a function: where adapters sit is known to those who know the families
# Libraries that a room may import; None: any that is not said to be somebody else's below.
THEIRS = {
    "core": {"torch"}, "ops": {"torch", "triton"}, "nn": {"torch", "safetensors"}, "config": {"omegaconf", "yaml"}, "env": {"torch"}, "page": set(),
    "verdicts": set(), "report": {"matplotlib"},
    "figures": {"matplotlib", "numpy"}, "runfolder": {"torch"}, "run": set(), "__init__": set(), "models": None, "data": None, "train": None,
}
ONLY_IN = {"lightning": {"train"}, "timm": {"models", "data"}, "triton": {"ops"}, "omegaconf": {"config"}, "matplotlib": {"report", "figures"}}
TIMM_IN_DATA = "timm.data."  # its augmentation policies and mixup: they are data, its networks stay in models
MODEL_CLASS = re.compile(r"ForCausalLM$|For[A-Z]\w+$|Model$|^AutoModel|^modeling_|^PreTrainedModel$")


def room(path: Path) -> str:
    return path.parts[1].removesuffix(".py") if path.parts[0] == "dyn" else path.parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(dotted name with the imported names, at the top level) of every import that runs; those for type checkers do not."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "write imports from the root: from dyn.core import ..."
                yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
            else:
                yield from walk(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return walk(tree, True)


def faults(path: Path, source: str) -> list[str]:
    """Imports of one file that its room may not have."""
    here, found = room(path), []
    for name, top in imports(ast.parse(source)):
        first, *rest = name.split(".")
        if first == "experiments":
            found.append(f"{name}: nobody imports experiments; dyn.run loads one by name")
        elif first == "dyn" and path.parts[0] == "dyn":
            there = rest[0] if rest and rest[0] in OURS else "__init__"
            named = (here == "models" and name.startswith(OPS_IN_MODELS)) or ((path, name) == HOSTS_IN_ATTACH and not top)
            if there not in OURS[here] | {here, "__init__"} and not named:
                found.append(f"{name}: {here} may import of ours: {', '.join(sorted(OURS[here])) or 'nothing'}")
        elif first not in sys.stdlib_module_names and first != "dyn":
            allowed = THEIRS.get(here)
            elsewhere = path.parts[0] == "dyn" and here not in ONLY_IN.get(first, {here})
            if elsewhere or (allowed is not None and first not in allowed):
                found.append(f"{name}: not in {here}")
            elif first == "timm" and here == "data" and not name.startswith(TIMM_IN_DATA):
                found.append(f"{name}: data may import {TIMM_IN_DATA}* of timm only")
            elif first == "triton" and top:
                found.append(f"{name}: only inside functions")
            elif first == "transformers" and here != "models" and path.parts[0] == "dyn" and any(map(MODEL_CLASS.search, rest)):
                found.append(f"{name}: model classes only in dyn/models")
    return found


def test_every_room_has_a_rule():
    assert {room(path) for path in FILES if path.parts[0] == "dyn"} <= OURS.keys() == THEIRS.keys()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_directions(path):
    assert faults(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dyn/core/x.py", "import numpy"),
        ("dyn/core/x.py", "from dyn.nn import probe"),
        ("dyn/core/x.py", "def f():\n    from dyn import nn"),
        ("dyn/ops/x.py", "import triton"),
        ("dyn/nn/x.py", "import transformers"),
        ("dyn/nn/x.py", "def f():\n    from dyn.models import hosts"),
        ("dyn/nn/adapter_attach.py", "from dyn.models import hosts"),
        ("dyn/data/x.py", "from transformers import AutoModelForCausalLM"),
        ("dyn/data/x.py", "from timm.models import resnet50"),
        ("dyn/train/x.py", "from timm.data import Mixup"),
        ("dyn/train/x.py", "from transformers import LlamaForCausalLM"),
        ("dyn/train/x.py", "from dyn.run import Run"),
        ("dyn/models/x.py", "import lightning.pytorch as pl"),
        ("dyn/models/x.py", "from experiments import llama"),
        ("dyn/report.py", "import torch"),
        ("dyn/report.py", "from dyn.nn import probe"),
        ("experiments/x.py", "import experiments.y"),
    ],
)
def test_the_rules_catch(path, source):
    assert len(faults(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dyn/core/x.py", "import torch\nfrom dyn.core import split\nimport math"),
        ("dyn/ops/x.py", "def f():\n    import triton"),
        ("dyn/nn/adapter_attach.py", "def f():\n    from dyn.models import hosts"),
        ("dyn/data/x.py", "from transformers import PreTrainedTokenizerFast, AutoTokenizer"),
        ("dyn/data/x.py", "from timm.data import Mixup"),
        ("dyn/train/x.py", "import lightning\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dyn.run import Run"),
        ("experiments/x.py", "from dyn.run import Run\nfrom dyn.models import llama_moe"),
    ],
)
def test_the_rules_let_through(path, source):
    assert faults(Path(path), source) == []
