"""What importing costs and needs, in fresh processes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("lightning", "timm", "transformers", "triton", "datasets", "torchmetrics", "sklearn", "matplotlib", "omegaconf", "scipy", "pandas")

BLOCK = "import sys\nsys.modules |= dict.fromkeys({names!r})\n"  # None there makes an import fail, and find_spec find nothing


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_dyn_is_light():
    new = python("import sys; before = set(sys.modules); import dyn; print(*(set(sys.modules) - before))").split()
    assert "dyn" in new and not {name.split(".")[0] for name in new} & {"torch", *HEAVY}


def test_core_ops_and_nn_need_only_torch():
    """dyn.core.saliency and all its neighbours import with lightning, timm, transformers, triton blocked."""
    rooms = ("core", "ops", "nn")
    modules = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for room in rooms for path in (ROOT / "dyn" / room).glob("[!_]*.py"))
    assert "dyn.core.saliency" in modules
    names = ("lightning", "pytorch_lightning", "timm", "transformers", "triton", "datasets", "matplotlib", "omegaconf")
    out = python(BLOCK.format(names=names) + "import importlib\nfor name in " + repr(modules) + ":\n    importlib.import_module(name)\nprint(len(sys.modules))")
    assert int(out) > len(modules)


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [word for words in [project["dependencies"], *project["optional-dependencies"].values()] for word in words]
    plain = {re.match(r"[\w.-]+", word).group().lower().replace("_", "-") for word in words}
    roots = set()
    for path in (ROOT / "dyn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            roots |= {name.split(".")[0] for name in names}
    of = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
    assert {of.get(name, name).replace("_", "-") for name in roots - sys.stdlib_module_names - {"dyn"}} <= plain
    locked = {line.split("==")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert {re.match(r"[\w.-]+", word).group().lower() for word in project["dependencies"]} <= locked


def test_the_block_blocks():
    out = python(BLOCK.format(names=("timm",)) + "try:\n    import timm\nexcept ImportError as error:\n    print(error)")
    assert "import of timm halted" in out


def test_the_command_line_refuses_before_it_imports_anything_heavy():
    out = python(
        "import sys\nfrom dyn.run import main\nassert main(['no_such_experiment']) == 1\n"
        f"print(*({{name.split('.')[0] for name in sys.modules}} & {{'torch', *{HEAVY!r}}}))"
    )
    assert out.split() == ["omegaconf"]


def test_the_network_is_blocked():
    import socket

    import pytest

    with socket.socket() as outside, pytest.raises(pytest.fail.Exception, match="reached for the network"):
        outside.connect(("192.0.2.1", 80))
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
