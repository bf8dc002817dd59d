"""The benchmark of dynamic convolutions runs, in its tiny mode."""

import json

import pytest

from benchmarks import dynamic_conv


def test_tiny(tmp_path, capsys):
    result = dynamic_conv.main(["--tiny", "--layers", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "dynamic_conv.json").read_text())["env"]["device"]
    (table,) = result["networks"]
    assert set(table["training"]) == {"static", "partial, auto", *(f"dynamic, {form}" for form in ("auto", *dynamic_conv.FAST))}
    assert set(table["inference"]) == {"static", "dynamic", "partial", "compact", "compact, expanded"} == set(table["stored"])
    assert table["stored"]["compact"] == table["stored"]["partial"] < table["stored"]["dynamic"]
    assert sum(row["count"] for row in table["layers"]) == 12 and table["training"]["static"]["ratio"]["median"] == 1
    text = (tmp_path / "dynamic_conv.md").read_text()
    assert text.count("| dynamic, auto |") == 1 and text in capsys.readouterr().out


def test_compiled(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(dynamic_conv.torch, "compile", lambda net, mode: modes.append(mode) or net)  # inductor takes minutes for a network on a CPU
    (table,) = dynamic_conv.main(["--tiny", "--compile", "--out", str(tmp_path)])["networks"]
    assert modes == ["default"] * 5 and set(table["training"]) == {"static", "dynamic, auto", "partial, auto"} and table["compiled"]
    assert "2 rounds, compiled" in (tmp_path / "dynamic_conv.md").read_text()


def test_arguments(capsys):
    for words, message in ((["--rounds", "1"], "must be 2 or more"), (["--only", "vgg"], "is none of the networks")):
        with pytest.raises(SystemExit):
            dynamic_conv.main(words)
        assert message in capsys.readouterr().err
