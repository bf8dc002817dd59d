"""Figures of a run, from plain numbers; matplotlib only. Every function writes one PNG and returns its path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Rows = Sequence[Mapping[str, float]]


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; an empty list where there is none. ValueError naming the file when a line of it is broken."""
    path = Path(path)
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    except ValueError as error:
        raise ValueError(f"{path}: a line is damaged or cut short: {error}") from error


def loss_curves(path: str | Path, runs: Mapping[str, Rows], domains: Sequence[str], *, level: Mapping[str, float] | None = None) -> Path:
    """Held-out loss over tokens, one panel a domain and one for the mean; `runs`: name -> rows with "tokens" and "val/<domain>/loss".

    `level`: a horizontal line (the untrained dense model's loss) by domain.
    """
    panels = [*domains, "mean"]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.8 * lines), squeeze=False, layout="constrained")
    for ax, domain in zip(axes.flat, panels, strict=False):
        keys = [f"val/{d}/loss" for d in (domains if domain == "mean" else [domain])]
        for name, rows in runs.items():
            points = [(row.get("tokens", row["step"]), np.mean([row[k] for k in keys])) for row in rows if all(k in row for k in keys)]
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name) if points else None
        if level:
            ax.axhline(np.mean([level[d] for d in (domains if domain == "mean" else [domain])]), color="grey", linestyle=":", label="dense, untrained")
        ax.set(title=domain, xlabel="training tokens", ylabel="held-out loss (nats a token)")
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    axes[0, 0].legend(fontsize=7)
    return _save(fig, path)


def expert_load(path: str | Path, load: Mapping[str, Sequence[Sequence[float]]]) -> Path:
    """Heat maps of each domain's share of assignments, layers by experts (LLaMA-MoE section 5.6); `load`: domain -> counts [layers, E]. 1 is an equal share."""
    shares = {d: (a := np.asarray(c, dtype=float)) / a.sum(1, keepdims=True) * a.shape[1] for d, c in load.items()}
    top = max(2.0, max(float(s.max()) for s in shares.values()))
    fig, axes = plt.subplots(1, len(shares), figsize=(2.8 * len(shares) + 1, 4.2), squeeze=False, sharey=True, layout="constrained")
    for ax, (domain, share) in zip(axes[0], shares.items(), strict=True):
        image = ax.imshow(share, aspect="auto", cmap="magma", vmin=0, vmax=top)
        ax.set(title=domain, xlabel="expert")
    axes[0, 0].set_ylabel("layer")
    fig.colorbar(image, ax=list(axes[0]), label="load (1 = equal share)")
    return _save(fig, path)


def domain_distances(path: str | Path, names: Sequence[str], matrix: Sequence[Sequence[float]], title: str = "distance of expert loads, last layer") -> Path:
    """A labelled symmetric matrix (section 5.6, item 3)."""
    return _matrix(path, names, np.asarray(matrix), title)


def neuron_overlap(path: str | Path, overlap: Sequence[Sequence[Sequence[float]]], layers: Sequence[int]) -> Path:
    """Pairwise overlap |S_i and S_j| / F of the experts of some layers (section 1.7); `overlap`: a matrix [E, E] a layer."""
    fig, axes = plt.subplots(1, len(layers), figsize=(3 * len(layers) + 1, 3), squeeze=False, layout="constrained")
    for ax, layer, matrix in zip(axes[0], layers, overlap, strict=True):
        image = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
        ax.set(title=f"layer {layer}", xlabel="expert", ylabel="expert")
    fig.colorbar(image, ax=list(axes[0]), label="share of common neurons")
    return _save(fig, path)


def domain_weights(path: str | Path, rows: Rows, domains: Sequence[str], static: Mapping[str, float]) -> Path:
    """Sampling weight of every domain over training; static weights are flat lines."""
    fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
    for domain in domains:
        points = [(row.get("tokens", row["step"]), row[f"weights/{domain}"]) for row in rows if f"weights/{domain}" in row]
        end = max((row.get("tokens", row["step"]) for row in rows), default=1)
        points = points if len(points) > 1 else [(0, static[domain]), (end, static[domain])]
        ax.step(*zip(*points, strict=True), where="post", label=domain)
    ax.set(xlabel="training tokens", ylabel="sampling weight", ylim=(0, None))
    ax.legend(fontsize=7)
    return _save(fig, path)


def by_layer(path: str | Path, lines: Mapping[str, Sequence[float]], ylabel: str, *, level: Mapping[str, float] | None = None) -> Path:
    """Lines over the layers, one value a layer each; `level`: name -> a horizontal line."""
    fig, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    for name, values in lines.items():
        ax.plot(range(len(values)), values, marker="o", markersize=3, label=name)
    for name, value in (level or {}).items():
        ax.axhline(value, color="grey", linestyle=":", label=name)
    ax.set(xlabel="layer", ylabel=ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=7)
    return _save(fig, path)


def points(path: str | Path, found: Mapping[str, tuple[float, float]], xlabel: str, ylabel: str, *, log: bool = False) -> Path:
    """Named points (x, y), with a line through them in the order of x; `log`: a logarithmic axis of x."""
    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    ordered = sorted(found.items(), key=lambda item: item[1])
    ax.plot(*zip(*(place for _, place in ordered), strict=True), color="lightgrey", zorder=1)
    for name, (x, y) in ordered:
        ax.scatter([x], [y], label=name, zorder=2)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    ax.legend(fontsize=7)
    return _save(fig, path)


def attention_curves(path: str | Path, runs: Mapping[str, Rows]) -> Path | None:
    """Entropy of the attention over kernels ("attention/entropy") and its temperature ("train/temperature") over the steps of training; `runs`: name -> rows.
    Nothing is drawn, and None returned, where no run has them."""
    panels = {"attention/entropy": "entropy of the attention / log K", "train/temperature": "temperature"}
    found = {key: {name: points for name, rows in runs.items() if (points := [(row["step"], row[key]) for row in rows if key in row])} for key in panels}
    if not any(found.values()):
        return None
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for ax, (key, label) in zip(axes, panels.items(), strict=True):
        for name, line in found[key].items():
            ax.plot(*zip(*line, strict=True), marker="o" if len(line) < 20 else None, markersize=3, label=name)
        ax.set(xlabel="step", ylabel=label)
        if found[key]:
            ax.legend(fontsize=7)
    return _save(fig, path)


def loss_bars(path: str | Path, losses: Mapping[str, Mapping[str, float]]) -> Path:
    """Held-out loss in nats a token, a group of bars a domain and one for the mean; `losses`: network -> domain -> loss, the dense one first. Over each
    other bar stands what it lies above the first."""
    domains = [*next(iter(losses.values())), "mean"]
    fig, ax = plt.subplots(figsize=(2 + 0.32 * len(domains) * len(losses), 3.6), layout="constrained")
    width, first = 0.8 / len(losses), None
    for number, (name, values) in enumerate(losses.items()):
        heights = np.array([*values.values(), np.mean(list(values.values()))])
        bars = ax.bar(np.arange(len(domains)) + (number - (len(losses) - 1) / 2) * width, heights, width, label=name)
        first = heights if first is None else first
        if number:
            ax.bar_label(bars, [f"{h:+.2f}" for h in heights - first], fontsize=5, rotation=90, padding=2)
    ax.set_xticks(range(len(domains)), domains)
    ax.set_ylabel("held-out loss (nats a token)")
    ax.margins(y=0.15)
    fig.legend(loc="outside upper center", ncols=len(losses), fontsize=7)
    return _save(fig, path)


def _matrix(path: str | Path, names: Sequence[str], matrix: np.ndarray, title: str) -> Path:
    fig, ax = plt.subplots(figsize=(1 + 0.6 * len(names), 0.8 + 0.6 * len(names)), layout="constrained")
    ax.imshow(matrix, cmap="viridis")
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right")
    ax.set_yticks(range(len(names)), names)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < matrix.max() / 2 else "black", fontsize=7)
    ax.set_title(title, fontsize=9)
    return _save(fig, path)


def _save(fig, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path
