"""A page out of blocks, as Markdown and as one HTML file with its pictures inside.

A block is (kind, value): "h1".."h4" and "p" with a text, "list" with texts, "table" with rows of texts (the first is the head),
"image" with (caption, path of a PNG).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

Block = tuple[str, Any]


def markdown(blocks: Iterable[Block], folder: Path) -> str:
    """The page as GitHub's Markdown, to be written in `folder`: pictures are relative links."""
    parts = []
    for kind, value in blocks:
        if kind == "table":
            lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in value]
            parts.append("\n".join([lines[0], "|" + " --- |" * len(value[0]), *lines[1:]]))
        elif kind == "list":
            parts.append("\n".join(f"- {_cell(line)}" for line in value))
        elif kind == "image":
            parts.append(f"![{_cell(value[0])}]({Path(os.path.relpath(value[1], folder)).as_posix()})")
        else:
            parts.append(("#" * int(kind[1]) + " " if kind != "p" else "") + _cell(value))
    return "\n\n".join(parts) + "\n"


def html(blocks: Iterable[Block]) -> str:
    """The page as HTML that needs no other file."""
    parts = []
    for kind, value in blocks:
        if kind == "table":
            head, *rows = ["".join(f"<{tag}>{escape(text)}</{tag}>" for text in row) for tag, row in _tagged(value)]
            parts.append(f"<div class=wide><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>")
        elif kind == "list":
            parts.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in value)}</ul>")
        elif kind == "image":
            caption, data = escape(value[0]), base64.b64encode(value[1].read_bytes()).decode()
            parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
        else:
            parts.append(f"<{kind}>{escape(value)}</{kind}>")
    return _PAGE.replace("BODY", "\n".join(parts))


def _tagged(rows: list[list[str]]) -> list[tuple[str, list[str]]]:
    return [("td" if number else "th", row) for number, row in enumerate(rows)]


def _cell(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", "<br>")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>dyn: results</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; background: #fff }
h2 { border-bottom: 1px solid #ccc; margin-top: 2.5rem } .wide { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0 }
th, td { border: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top; white-space: pre-wrap; font-variant-numeric: tabular-nums }
th { background: #f3f3f3 } figure { margin: 1rem 0 } img { max-width: 100% } figcaption { color: #666; font-size: .85rem }
</style></head><body>
BODY
</body></html>
"""
