"""The benchmark of conversions runs, on widths for tests."""

import json

import pytest

from benchmarks import conversion


def test_a_small_decoder(tmp_path, capsys):
    sizes = {"tokens": 256, "length": 64, "hidden": 16, "width": 64, "heads": 2, "device": "cpu", "out": tmp_path}
    result = conversion.main([f"--{name}={value}" for name, value in sizes.items()])
    assert json.loads((tmp_path / "conversion.json").read_text()) == result
    ours, control = result["rows"]["calibrated"], result["rows"]["prune"]
    assert 0 < ours["assignment_seconds_a_layer"] < ours["seconds_a_layer"]
    assert ours["minutes_of_32_layers"] * 60 == pytest.approx(ours["seconds_a_layer"] * 32)
    assert control["assignment_seconds_a_layer"] == 0 < control["seconds_a_layer"]
    assert capsys.readouterr().out.count("\n| ") == 3
