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


def test_arguments(capsys):
    for words, message in ((["--rounds", "1"], "must be 2 or more"), (["--only", "vgg"], "is none of the networks")):
        with pytest.raises(SystemExit):
            dynamic_conv.main(words)
        assert message in capsys.readouterr().err
