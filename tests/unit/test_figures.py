"""Figures: every one is written, from the shapes that a run leaves, and says what it should."""

import json

import matplotlib.image
import torch

from dyn import figures
from dyn.train.evaluate import domain_distances, overlaps

ROWS = [{"step": s, "tokens": 100 * s, "val/a/loss": 3 - s / 10, "val/b/loss": 4 - s / 10, "weights/a": 0.5 + s / 100} for s in range(3)]


def test_all_figures_are_written(tmp_path):
    load = {"a": [[4, 4, 0, 8], [4, 4, 4, 4]], "b": [[1, 1, 1, 1], [4, 0, 0, 0]]}
    made = [
        figures.loss_curves(tmp_path / "plots" / "loss.png", {"moe": ROWS, "dense": ROWS[:1], "none": []}, ["a", "b"], level={"a": 2.0, "b": 3.0}),
        figures.expert_load(tmp_path / "load.png", load),
        figures.domain_distances(tmp_path / "distances.png", *domain_distances(load)),
        figures.neuron_overlap(tmp_path / "overlap.png", overlaps([torch.arange(6).view(2, 3)] * 2), [0, 1]),
        figures.by_layer(tmp_path / "layers.png", {"a": [1.0, 2.0], "b": [0.0]}, "nats", level={"none": 0.0}),
        figures.loss_bars(tmp_path / "bars.png", {"dense": {"a": 2.0, "b": 3.0}, "moe": {"a": 2.5, "b": 3.25}}),
        figures.domain_weights(tmp_path / "weights.png", ROWS, ["a", "b"], {"a": 0.5, "b": 0.5}),
    ]
    for path in made:
        picture = matplotlib.image.imread(path)
        assert picture.std() > 0, f"{path.name} is blank"


def test_distances_are_of_normalised_loads():
    names, matrix = domain_distances({"a": [[0, 1, 2]], "b": [[10, 20, 30]], "c": [[2, 1, 0]]})
    assert names == ["a", "b", "c"]
    torch.testing.assert_close(matrix, torch.tensor([[0, 0, 2**0.5], [0, 0, 2**0.5], [2**0.5, 2**0.5, 0]], dtype=torch.float64))


def test_read_metrics(tmp_path):
    assert figures.read_metrics(tmp_path / "none.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    assert figures.read_metrics(tmp_path / "metrics.jsonl") == ROWS
