"""The report of fixed results: its Markdown word for word, its HTML complete in itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dyn.report import main

HERE = Path(__file__).parent


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The written report, from run folders and one committed result of the same content."""
    monkeypatch.chdir(tmp_path)
    for number, result in enumerate(json.loads((HERE / "report_results.json").read_text())):
        folder = tmp_path / "runs" / result["what"]["experiment"] / f"{number:02d}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        lines = [{"step": step, "tokens": 64 * step, "val/code/loss": 3 - step / 10 - number / 100, "val/docs/loss": 4.0} for step in range(4)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "val/co')
    first = tmp_path / "runs" / "llama_moe_cpt" / "00"
    (first / "samples.json").write_text(json.dumps([{"prompt": "def f(", "dense": "x):\n  <b>", "trained": "a | b"}]))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "copy.json").write_text((first / "result.json").read_text())  # the same result twice counts once
    (tmp_path / "results" / "foreign.json").write_text('{"schema": 2}')
    (tmp_path / "results" / "cut.json").write_text('{"schema": 1, "wh')
    assert main([]) == 0
    return tmp_path / "report"


def test_markdown(page):
    assert (page / "report.md").read_text() == (HERE / "report.md").read_text()


def test_html_holds_everything(page):
    text = (page / "report.html").read_text()
    pictures = re.findall(r'src="([^"]*)"', text)
    assert len(pictures) == len(list(page.glob("report-*.png"))) == 9 and all(p.startswith("data:image/png;base64,iVBOR") for p in pictures)
    assert not re.search(r"https?://|<link|<script", text)
    cells = re.findall(r"<td>([^<]*)</td>", text)
    assert {"2.82 ± 0.012", "failed (ValueError: a | b &lt;c&gt;)", "x):\n  &lt;b&gt;"} <= set(cells)
    assert str(page.parent) not in text
