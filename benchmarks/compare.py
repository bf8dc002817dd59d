"""Compare new results with the committed ones of the same device, and say what became slower.

    python -m benchmarks.compare FOLDER [--save]

What is compared are the ratios to a table's reference row (dense network, plain torch), which other load on the machine moves little. A ratio of
ours that is a quarter worse is said; one twice as bad is an error, where three quarters of the rounds agree (a disturbed machine moves medians); peers' and
improvements are only said. A row of ours that a table has lost is an error too. Another device has nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

COMMITTED = Path(__file__).resolve().parents[1] / "results" / "benchmarks"
WORSE, BAD = 1.25, 2.0


@dataclass(frozen=True)
class Change:
    """One ratio then and now."""

    table: str
    row: str
    metric: str
    before: float
    now: float
    low: float  # lower quartile now
    ours: bool

    @property
    def factor(self) -> float:
        return self.now / self.before

    @property
    def bad(self) -> bool:
        return self.ours and self.low >= BAD * self.before

    def __str__(self) -> str:
        word = "worse" if self.factor > 1 else "better"
        return f"{self.table}: {self.row}, {self.metric}: {self.before:.2f} -> {self.now:.2f}, {max(self.factor, 1 / self.factor):.2f} times {word}"


def device_kind(env: dict) -> str:
    """What must be equal for times to be comparable: the GPU, or the CPU model, the number of threads, and whose freed memory is."""
    if env["kind"] == "cuda":
        return env["device"]
    return f"{env['device']}, {env['threads']} threads" + (", plain malloc" if env.get("freed memory") == "returned" else "")


def ratios(result: dict) -> Iterator[tuple[tuple[str, str, str], dict[str, float], bool]]:
    """((table, row, metric), median and quartiles, is it ours) of every ratio but the reference's own, which is 1."""
    for table in result["tables"]:
        for name, row in table["rows"].items():
            for metric, value in row.items():
                if metric.endswith("_ratio") and name != table["reference"]:
                    yield (table["name"], name, metric), value, name in table["ours"]


def compare(new: dict, old: dict) -> list[Change]:
    """Ratios that both results have and that moved by a quarter or more, the worst first. ValueError for results of two devices or of two kinds."""
    if new["what"] != old["what"] or device_kind(new["env"]) != device_kind(old["env"]):
        raise ValueError(f"{new['what']} on {device_kind(new['env'])} does not compare with {old['what']} on {device_kind(old['env'])}")
    before = {key: value["median"] for key, value, _ in ratios(old)}
    changes = [Change(*key, before[key], value["median"], value["low"], ours) for key, value, ours in ratios(new) if key in before]
    return sorted((c for c in changes if c.factor >= WORSE or c.factor <= 1 / WORSE), key=lambda c: -c.factor)


def lost(new: dict, old: dict) -> list[str]:
    """Rows of ours that the committed result has, and the new one's table of that name has not."""
    rows = {table["name"]: table["rows"] for table in new["tables"]}
    return [f"{table['name']}: {name}" for table in old["tables"] for name in table["ours"]
            if name in table["rows"] and table["name"] in rows and name not in rows[table["name"]]]


def references(what: str, folder: Path) -> dict[str, Path]:
    """The committed results of a kind, by device."""
    found = {path: json.loads(path.read_text()) for path in sorted(folder.glob(f"{what}*.json"))}
    return {device_kind(result["env"]): path for path, result in found.items() if result["what"] == what}


def guard(out: Path, committed: Path, store: bool = False, parts: Iterable[str] | None = None) -> int:
    """Compare the results in `out` (of `parts` alone, if given), print and write compare.md; how many ratios of ours are twice as bad and rows lost.

    `store` commits them instead.
    """
    lines, bad = ["# Against the committed results", ""], 0
    for path in sorted(out.glob("*.json")) if parts is None else [path for part in sorted(parts) if (path := out / f"{part}.json").is_file()]:
        new = json.loads(path.read_text())
        if "what" not in new:  # another command's
            continue
        device, known = device_kind(new["env"]), references(new["what"], committed)
        if store:
            committed.mkdir(parents=True, exist_ok=True)
            reference = known.get(device, committed / f"{new['what']}-{re.sub('[^a-z0-9]+', '-', device.lower())}.json")
            for suffix in (".json", ".md"):
                reference.with_suffix(suffix).write_text(path.with_suffix(suffix).read_text())
            lines.append(f"- {new['what']}: saved as {reference.name}")
            continue
        if device not in known:
            lines.append(f"- {new['what']}: nothing to compare with on {device} (committed: {'; '.join(known) or 'nothing'})")
            continue
        old = json.loads(known[device].read_text())
        changes = compare(new, old)
        shared = len({key for key, *_ in ratios(new)} & {key for key, *_ in ratios(old)})
        lines.append(f"- {new['what']}: {shared} ratios compared with commit {old['env']['commit']}, {len(changes)} moved by a quarter or more")
        lines += [f"  - {'**twice as bad** ' if c.bad else '' if c.ours else '(not ours) '}{c}" for c in changes]
        lines += [f"  - **lost** {row}" for row in lost(new, old)]
        bad += sum(c.bad for c in changes) + len(lost(new, old))
    text = "\n".join(lines) + "\n"
    (out / "compare.md").write_text(text)
    print(text, end="")
    return bad


def main(argv: list[str] | None = None) -> None:
    """See the module. Exit status 1 where a row of ours is lost or a ratio twice as bad."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder with new results")
    parser.add_argument("--save", action="store_true", help="make them the committed results instead")
    args = parser.parse_args(argv)
    if guard(args.out, COMMITTED, store=args.save):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
