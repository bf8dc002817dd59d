"""Results as one page: python -m dyn.report [folders or json files ...] [--out report]; looks in results/ and runs/ unless told.

A pure function of files: result.json (schema 1; in a folder of results also NAME.json) and, beside each, metrics.jsonl or curves.json, plots/*.png
and samples.json (NAME.metrics.jsonl and so on beside NAME.json). Broken and foreign files are named and skipped.
Runs whose configs differ only in `seed` are one row: mean ± standard error. Of several runs of one config the newest good one counts.
`notes` in a result: `main` (metrics to show first), `controls` (rows to compare with), `same` (keys of the config that a control must share), `compare`
(metrics to compare), `claims` (a paper's; `dyn.verdicts.claims`), `points` (metrics x and y of a plot over rows), `tables` (title -> rows, the head first),
`about` and `not_tested` (sentences).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyn import page
from dyn.verdicts import Group, alike, claims, compare, groups, main_keys, number_of, scalars, show, union

SCHEMA = 1
DEFAULT = ("results", "runs")
_BESIDE = ("metrics.jsonl", "curves.json", "samples.json")
_COORDINATES = {"step", "epoch", "time", "tokens", "seconds"}
_PANELS = 9
_CLAIM = ("text", "metric", "against", "wants")


def _is_list(value: Any, inner: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(inner, value))


def _has_texts(value: Any, keys: Iterable[str]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys)


def _is_said(value: Any) -> bool:
    """The answers to one task's examples, or the limit above which they are not kept."""
    if not isinstance(value, dict) or "limit" in value:
        return isinstance(value, dict) and isinstance(value["limit"], int)
    numbers = [_is_list(value.get(key), lambda number: isinstance(number, (int, float))) for key in ("predictions", "labels")]
    return isinstance(value.get("metric"), str) and all(numbers) and len(value["predictions"]) == len(value["labels"]) > 0


_NOTES: dict[str, Callable[[Any], bool]] = {  # what the notes that this page uses must be; others may be anything
    **dict.fromkeys(("main", "controls", "same", "compare", "about", "not_tested"), lambda value: _is_list(value, lambda text: isinstance(text, str))),
    "claims": lambda value: _is_list(value, lambda claim: _has_texts(claim, _CLAIM)),
    "points": lambda value: _has_texts(value, "xy"),
    "tables": lambda value: isinstance(value, dict) and all(table and _is_list(table, lambda row: isinstance(row, list)) for table in value.values()),
    "answers": lambda value: isinstance(value, dict) and all(map(_is_said, value.values())),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dyn.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", default=[name for name in DEFAULT if Path(name).is_dir()])
    parser.add_argument("--out", default="report")
    given = parser.parse_args(argv)
    try:
        print(f"report: {write_report(given.inputs, given.out)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_report(inputs: Iterable[str | Path], out: str | Path) -> Path:
    """Write out/report.html (nothing outside it is needed), out/report.md and the curves as out/report-*.png; returns the HTML's path.

    Raises ValueError when `inputs` hold no result at all.
    """
    inputs, out = [Path(path) for path in inputs], Path(out)
    results, skipped = find(inputs)
    if not results:
        raise ValueError(f"no result.json (schema {SCHEMA}) in {', '.join(map(str, inputs)) or ' or '.join(DEFAULT)}{_because(skipped)}")
    out.mkdir(parents=True, exist_ok=True)
    blocks: list[page.Block] = [("h1", "Results")]
    for name in sorted({result["what"]["experiment"] for _, result in results}):
        blocks += _experiment(name, [item for item in results if item[1]["what"]["experiment"] == name], out)
    if skipped:
        blocks += [("h2", "Skipped files"), ("list", [f"{_name(path)}: {reason}" for path, reason in skipped])]
    (out / "report.md").write_text(page.markdown(blocks, out), encoding="utf-8")
    whole = out / "report.html"
    whole.write_text(page.html(blocks), encoding="utf-8")
    return whole


# Reading


def find(inputs: Iterable[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[tuple[Path, str]]]:
    """(results with their paths, skipped files with the reason). A folder is searched for result.json at any depth and for *.json at its top."""
    paths: dict[Path, None] = {}
    for path in inputs:
        top = [] if (path / "result.json").is_file() else [p for p in path.glob("*.json") if not p.name.endswith(_BESIDE)]
        paths |= dict.fromkeys(sorted([*path.rglob("result.json"), *top]) if path.is_dir() else [path])
    results: dict[str, tuple[Path, dict[str, Any]]] = {}
    skipped = []
    for path in paths:
        try:
            result = read(path)
        except (ValueError, OSError) as error:
            skipped.append((path, str(error)))
            continue
        copy = json.dumps([result["what"], result["started"], result["finished"]], sort_keys=True)
        if copy not in results or not _beside(results[copy][0], "metrics.jsonl").is_file():  # a committed copy of a run is the same result
            results[copy] = (path, result)
    return list(results.values()), skipped


def read(path: Path) -> dict[str, Any]:
    """A result of schema 1; ValueError when the file is broken or something else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError("not valid JSON") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"not a result of schema {SCHEMA}")
    wanted = {"what": dict, "status": str, "metrics": dict, "cost": dict, "config": dict, "env": dict, "started": str, "finished": str}
    wrong = [key for key, kind in wanted.items() if not isinstance(result.get(key), kind)]
    wrong += [f"what.{key}" for key in ("experiment", "row", "profile", "digest") if not wrong and not isinstance(result["what"].get(key), str)]
    notes, error = result.get("notes") or {}, result.get("error")
    wrong += ["notes"] * (not isinstance(notes, dict)) + ["error"] * bool(error and not _has_texts(error, ("type", "message")))
    wrong += ["config.seed"] * (not wrong and not isinstance(result["config"].get("seed", 0), int))
    notes = {key: value for key, value in notes.items() if value is not None} if isinstance(notes, dict) else {}
    wrong += [f"notes.{key}" for key, fits in _NOTES.items() if key in notes and not fits(notes[key])]
    if wrong:
        raise ValueError(f"missing or of the wrong type: {', '.join(wrong)}")
    return result | {"notes": notes}


def _name(path: Path) -> str:
    """With its folder: every run's file is called result.json."""
    return "/".join(path.parts[-2:])


def _beside(path: Path, name: str) -> Path:
    return path.parent / name if path.name == "result.json" else path.with_name(f"{path.stem}.{name}")


def _images(path: Path) -> list[Path]:
    if path.name != "result.json":
        return sorted(path.parent.glob(f"{path.stem}.*.png"))
    return [image for folder in (path.parent / "plots", path.parent) for image in sorted(folder.glob("*.png")) if not image.name.startswith("report-")]


def _because(skipped: list[tuple[Path, str]]) -> str:
    return "; skipped: " + "; ".join(f"{_name(path)} ({reason})" for path, reason in skipped) if skipped else ""


# Tables


def _experiment(name: str, results: list[tuple[Path, dict[str, Any]]], out: Path) -> list[page.Block]:
    rows = groups(results)
    main = union(main_keys(result) for group in rows for _, result in group.results)
    every = union(scalars(result["metrics"]) for group in rows for result in group.good)
    costs = union(scalars(result["cost"]) for group in rows for result in group.good)
    head = ["row", "profile", "status", "seeds", *main, "digest", "commit", "device"]
    table = [[g.row, g.profile, _status(g), _seeds(g), *(_spread(g.values("metrics", key)) for key in main), *_origin(g)] for g in rows]
    blocks: list[page.Block] = [("h2", name), ("table", [head, *table])]
    if about := union(result["notes"].get("about", []) for group in rows for result in group.good):
        blocks.append(("list", about))
    if costs:
        blocks += [("h3", "Costs"), ("table", [["row", *costs], *([g.row, *(_spread(g.values("cost", key)) for key in costs)] for g in rows if g.good)])]
    if set(every) - set(main):
        measured = [group for group in rows if group.good]
        lines = [[key, *(_spread(group.values("metrics", key)) for group in measured)] for key in every]
        blocks += [("h3", "All metrics"), ("table", [["metric", *(group.row for group in measured)], *lines])]
    if verdicts := [line for group in rows for line in compare(group, rows)]:
        blocks += [("h3", "Comparisons"), ("list", verdicts)]
    if claimed := [line for group in rows for line in claims(group, rows)]:
        blocks += [("h3", "What the paper claims"), ("list", claimed)]
    if untested := union(result["notes"].get("not_tested", []) for group in rows for _, result in group.results):
        blocks += [("h3", "Not tested at this scale"), ("list", untested)]
    return blocks + _pictures(name, rows, out)


def _spread(values: list[float]) -> str:
    """mean ± standard error, or the one value that all have."""
    if len(set(values)) < 2:
        return show(values[0] if values else None)
    error = statistics.stdev(values) / math.sqrt(len(values)) if all(map(math.isfinite, values)) else math.nan
    return f"{show(statistics.fmean(values))} ± {error:.2g}"


def _status(group: Group) -> str:
    texts = []
    for _, result in group.results:
        error = result.get("error")
        texts.append(f"{result['status']} ({error['type']}: {error['message']})" if error else result["status"])
    return "; ".join(text if texts.count(text) == 1 else f"{text} ×{texts.count(text)}" for text in dict.fromkeys(texts))


def _seeds(group: Group) -> str:
    seeds = [str(result["config"]["seed"]) for result in group.good if "seed" in result["config"]]
    return f"{len(group.good)} ({', '.join(seeds)})" if seeds else str(len(group.good))


def _origin(group: Group) -> list[str]:
    """Digests, commits (with + where files were changed) and devices of a row."""
    results = [result for _, result in group.results]
    commits = [str(r["env"].get("commit") or "?")[:8] + ("+" if r["env"].get("dirty") else "") for r in results]
    devices = [f"{r['env'].get('device', '?')}, {r['env'].get('threads', '?')} threads" for r in results]
    return [", ".join(dict.fromkeys(texts)) for texts in ([r["what"]["digest"] for r in results], commits, devices)]


# Curves, pictures, samples


def curves(path: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The curves beside a result: panel -> line -> (step, value). "val/<domain>/loss" are lines of the panel "val loss"; where the file names
    several stages (trainings), each has its own lines. Cut and foreign lines are skipped; of a step said twice the later counts.

    Raises:
        ValueError: a curves.json that is broken or something else.
    """
    series: dict[tuple[str, str], dict[float, float]] = {}
    if (file := _beside(path, "metrics.jsonl")).is_file():
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if not isinstance(line, dict) or (step := number_of(line.get("step"))) is None or not isinstance(stage := line.get("stage", ""), str):
                continue
            for key, value in line.items():
                if key not in _COORDINATES and (number := number_of(value)) is not None:
                    series.setdefault((key, stage), {})[step] = number
    elif (file := _beside(path, "curves.json")).is_file():
        try:
            series = {(key, ""): dict(points) for key, points in json.loads(file.read_text(encoding="utf-8")).items()}
            series = {key: {number_of(step) + 0: number_of(value) + 0 for step, value in points.items()} for key, points in series.items()}
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{_name(file)} is broken and was skipped.") from None
    several = len({stage for _, stage in series}) > 1
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (key, stage), points in series.items():
        panel, label = _panel(key)
        label = " ".join(filter(None, (stage, label))) if several else label or panel
        panels.setdefault(panel, {})[label] = sorted(points.items())
    order = {"val/loss": 0, "val loss": 1, "train/loss": 2}
    return dict(sorted(panels.items(), key=lambda item: order.get(item[0], 3)))


def _panel(key: str) -> tuple[str, str]:
    """ "val/code/loss" -> ("val loss", "code"); "weights/code" -> ("weights", "code"); "train/loss" and "loss" -> (themselves, "")."""
    first, *rest = key.split("/")
    if len(rest) > 1:
        return f"{first} {rest[-1]}", "/".join(rest[:-1])
    return (first, rest[0]) if rest and first not in ("train", "val", "test", "speed") else (key, "")


def _draw(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> Path:
    from matplotlib.figure import Figure  # without pyplot there is no global state and no window

    shown = list(panels.items())[:_PANELS]
    rows = -(-len(shown) // (columns := min(3, len(shown))))
    figure = Figure(figsize=(4.4 * columns, 3.0 * rows), layout="constrained")
    for number, (panel, lines) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, number)
        for label, points in list(lines.items())[:12]:
            axes.plot([step for step, _ in points], [value for _, value in points], label=label, linewidth=1.2)
        axes.set_title(panel, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=6)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _draw_points(found: Sequence[tuple[str, list[float], list[float]]], labels: tuple[str, str], path: Path) -> Path:
    """Rows as points, mean and standard error of y, and a line through them in the order of x."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = sorted((statistics.fmean(x), statistics.fmean(y), statistics.stdev(y) / math.sqrt(len(y)) if len(y) > 1 else 0.0, row) for row, x, y in found)
    axes.plot([x for x, *_ in places], [y for _, y, *_ in places], color="lightgrey", zorder=1)
    for number, (x, y, error, row) in enumerate(places[:30]):
        axes.errorbar([x], [y], [error], fmt="os^"[number // 10], capsize=3, label=row)  # colours come again after ten
    axes.set_xlabel(labels[0], fontsize=8)
    axes.set_ylabel(labels[1], fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6 if len(places) <= 8 else 4.5)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _points(name: str, rows: Sequence[Group], out: Path) -> list[page.Block]:
    """A plot of the metrics that results name, for every set of at least two rows that differ in nothing else than what their notes allow."""
    sets: dict[str, list[Group]] = {}
    for group in rows:
        if group.good and (axes := group.good[0]["notes"].get("points")):
            sets.setdefault(json.dumps([axes, group.profile, alike(group.good[0])], sort_keys=True), []).append(group)
    blocks: list[page.Block] = []
    for number, members in enumerate(sets.values(), 1):
        axes = members[0].good[0]["notes"]["points"]
        found = [(g.row, xs, ys) for g in members if (xs := g.values("metrics", axes["x"])) and (ys := g.values("metrics", axes["y"]))]
        if len(found) > 1:
            path = _draw_points(found, (axes["x"], axes["y"]), out / _slug(f"report-{name}-points-{number}.png"))
            blocks.append(("image", (f"{axes['y']} against {axes['x']}", path)))
    return blocks


def _pictures(name: str, rows: Sequence[Group], out: Path) -> list[page.Block]:
    """Per row the curves, plots, tables and samples of its first run; with several rows also their mean held-out loss in one panel, and `_points`."""
    blocks: list[page.Block] = []
    together: dict[str, list[tuple[float, float]]] = {}
    for group in rows:
        path, result = next((item for item in group.results if item[1]["status"] == "ok"), group.results[0])
        inner: list[page.Block] = []
        panels = {}
        try:
            panels = curves(path)
        except ValueError as error:
            inner.append(("p", str(error)))
        if panels:
            inner.append(("image", ("curves", _draw(panels, out / _slug(f"report-{name}-{group.row}-{result['what']['digest']}.png")))))
            label = group.row if len(rows) == len({g.row for g in rows}) else f"{group.row} {result['what']['digest']}"
            together |= {label: points} if (points := _mean(panels)) else {}
        inner += [("image", (image.stem, image)) for image in _images(path)]
        for title, table in result["notes"].get("tables", {}).items():
            inner += [("h4", title), ("table", [[show(cell) for cell in line] for line in table])]
        inner += _samples(_beside(path, "samples.json"))
        blocks += [("h3", f"{group.row} · {result['what']['digest']}"), *inner] if inner else []
    if len(together) > 1:
        blocks.insert(0, ("image", ("held-out loss of the rows", _draw({"held-out loss": together}, out / _slug(f"report-{name}.png")))))
    return _points(name, rows, out) + blocks


def _mean(panels: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> list[tuple[float, float]]:
    """val/loss of the run's first training, or the mean of its domains where that is not written."""
    if "val/loss" in panels:
        return next(iter(panels["val/loss"].values()))
    lines = [dict(points) for points in panels.get("val loss", {}).values()]
    steps = set.intersection(*map(set, lines)) if lines else set()
    return [(step, statistics.fmean(points[step] for points in lines)) for step in sorted(steps)]


def _samples(path: Path) -> list[page.Block]:
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
        head = union(samples)
        return [("h4", "Samples"), ("table", [head, *([str(sample.get(key, "-")) for key in head] for sample in samples)])]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, AttributeError):
        return [("p", f"{_name(path)} is broken and was skipped.")]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


if __name__ == "__main__":
    sys.exit(main())
