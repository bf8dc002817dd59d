"""The configs that profiles stand for, as digests: a changed default changes what a result was measured with, so it must show in a diff."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dyn import config

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass
class Inner:
    betas: tuple[float, float] = (0.9, 0.95)
    kind: str = "1e-4"


@dataclass
class Outer:
    seed: int = 1227
    rate: float = 1e-5
    path: str | None = None
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


def test_the_digest_of_a_fixed_config():
    """Run folders and committed results carry digests: the function may not change."""
    assert config.digest(Outer()) == "b79ec34f"


def test_profiles():
    lines = []
    for path in sorted((ROOT / "experiments").glob("[!_]*.py")):
        spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for profile in config.profiles(path.stem, root=ROOT):
            lines.append(f"{path.stem}.{profile} {config.digest(config.load(module.Config, path.stem, profile, root=ROOT))}")
    assert "\n".join(lines) + "\n" == (HERE / "digests.txt").read_text(), "where the change is meant, tests/golden/digests.txt takes these lines"
