"""docs/kernels.md: its Python runs, and the peer that it adds agrees with float64."""

import re
from pathlib import Path

from benchmarks.layer import Case, Layer
from benchmarks.ops import check
from benchmarks.peers import PEERS

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()


def test_what_the_page_does():
    names, known = {}, set(PEERS)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    try:
        for block in blocks:
            exec(block, names)
        assert len(blocks) == 3 and names["x"].grad.shape == names["x"].shape
        errors, _ = check(Layer(Case("tiny", T=24, D=16, F=12, E=4, K=2), "fp32", "uniform", "cpu"))
        assert "all experts" in errors
    finally:
        for name in set(PEERS) - known:
            del PEERS[name]
