"""report.py: what is read, merged, compared and drawn."""

from __future__ import annotations

import json
import math

import pytest

from dyn import report, verdicts


def result(row="a", seed=0, loss=1.0, status="ok", started="10:00", **more):
    return {
        "schema": 1,
        "what": {"experiment": "x", "row": row, "profile": "small", "digest": f"{row}{seed}"},
        "status": status,
        "error": None if status == "ok" else {"type": "ValueError", "message": "bad"},
        "metrics": {"val/loss": loss} if status == "ok" else {},
        "cost": {},
        "config": {"seed": seed, "row": row},
        "env": {},
        "started": started,
        "finished": "12:00",
        "notes": {},
    } | more


def grouped(*results):
    return report.groups([(None, item) for item in results])


def test_runs_that_differ_only_in_seed_are_one_row():
    one, two = grouped(result(loss=1.0), result("b", loss=9.0), result(seed=1, loss=3.0))
    assert (one.row, one.values("metrics", "val/loss"), two.row) == ("a", [1.0, 3.0], "b")


def test_what_changes_no_result_makes_no_other_row():
    items = [result(seed=seed, loss=seed) for seed in (0, 1, 1)]
    for rounds, item in enumerate(items):
        item["config"] |= {"timing_rounds": rounds, "diagnose": rounds == 2}
    items[2]["started"] = "12:00"
    [group] = grouped(*items)
    assert group.values("metrics", "val/loss") == [0, 1] and len(group.results) == 2


def test_of_one_config_the_newest_good_run_counts():
    [group] = grouped(result(loss=1.0, started="10:01"), result(loss=2.0, started="10:02"), result(status="failed", started="10:03"))
    assert [item["metrics"]["val/loss"] for item in group.good] == [2.0] and len(group.results) == 1
    [group] = grouped(result(status="failed", started="10:03"), result(seed=1, started="10:04"))
    assert len(group.results) == 2 and len(group.good) == 1  # another seed's failure stays in the row


def test_smallest_difference():
    assert verdicts.smallest_difference([1.0], [1.0, 2.0]) is None
    a, b = [1.0, 2.0, 3.0], [5.0, 7.0, 9.0]  # variances 1 and 4, pooled 2.5
    assert verdicts.smallest_difference(a, b) == pytest.approx(1.96 * math.sqrt(2) * math.sqrt(2.5 / 3))
    assert verdicts.smallest_difference([1.0, 2.0], a) == pytest.approx(1.96 * math.sqrt((0.5 + 2 * 1.0) / 3 * (1 / 2 + 1 / 3)))


def test_paired_interval():
    assert verdicts.paired_interval({0: 1.0, 1: 2.0}, {1: 1.0, 2: 5.0}) is None
    n, mean, half = verdicts.paired_interval({0: 1.0, 1: 2.0, 2: 3.0, 7: 9.0}, {0: 1.1, 1: 2.2, 2: 3.3, 8: 0.0})
    assert (n, mean, half) == (3, pytest.approx(-0.2), pytest.approx(4.303 * 0.1 / math.sqrt(3)))
    quantile = pytest.importorskip("scipy.stats").t.ppf
    assert list(verdicts._T) == pytest.approx([quantile(0.975, n) for n in range(1, 10)], abs=5e-4)


def test_pairing_by_seed_shows_what_the_spread_of_seeds_hides():
    """Seeds far apart, and the same small gain at each."""
    control = [result("plain", seed, loss) for seed, loss in enumerate([2.0, 3.0, 4.0])]
    ours = [result("distilled", seed, loss, notes={"controls": ["plain"]}) for seed, loss in enumerate([1.9, 2.89, 3.91])]
    rows = grouped(*control, *ours)
    [line] = report.compare(rows[1], rows)
    assert line.endswith("shown 1.6: no difference shown; paired over 3 seeds -0.1, 95 % interval -0.125 to -0.0752: lower")
    other = [item | {"config": {"seed": item["config"]["seed"] + 5, "row": "plain"}} for item in control]
    rows = grouped(*other, *ours)
    [line] = report.compare(next(group for group in rows if group.row == "distilled"), rows)
    assert line.endswith("no difference shown") and "paired" not in line


def test_seeds_that_one_side_lacks_do_not_count():
    control = [result("plain", seed, loss) for seed, loss in enumerate([2.0, 3.0, 4.0])]
    rows = grouped(*control, result("distilled", 0, 1.9, notes={"controls": ["plain"]}))
    assert report.compare(rows[1], rows) == ["distilled against plain, val/loss: 1.9 against 2, difference -0.1; one seed: no spread known"]


def test_verdicts_need_every_control_and_some_spread():
    control = [result("dense", seed, loss) for seed, loss in enumerate([2.0, 2.1, 2.2])]
    moe = [result("moe", seed, loss, notes={"controls": ["dense"]}) for seed, loss in enumerate([1.0, 1.1, 1.2])]
    rows = grouped(*control, *moe)
    [line] = report.compare(rows[1], rows)
    assert "difference -1; smallest that the seeds could have shown 0.16: lower" in line and "paired over 3 seeds -1, 95 % interval" in line
    assert report.compare(rows[0], rows) == []
    assert report.compare(rows[1], rows[1:]) == ["moe: control missing: dense"]
    other = [item | {"what": item["what"] | {"profile": "demo"}} for item in control]  # another profile is no control
    rows = grouped(*other, *moe)
    assert report.compare(rows[1], rows) == ["moe: control missing: dense"]
    rows = grouped(control[0], moe[0])
    assert report.compare(rows[1], rows)[0].endswith("one seed: no spread known")
    failed = grouped(result("dense", status="failed"), moe[0])
    assert report.compare(failed[1], failed) == ["moe: control missing: dense"]


def test_a_control_shares_what_it_must_and_the_nearest_one_counts():
    def trained(row, tokens, loss, seed=0, width=8, **notes):
        item = result(row, seed, loss, notes=notes)
        return item | {"config": {"seed": seed, "row": row, "tokens": tokens, "data": {"text": {"path": "x"}}, "width": width}}

    moe = dict(controls=["dense"], same=["tokens", "data.text", "data.absent"])
    rows = grouped(trained("dense", 50, 9.0), trained("moe", 1000, 2.0, **moe), trained("moe", 50, 8.0, **moe))
    assert report.compare(rows[1], rows) == ["moe: control missing: dense"]
    assert "moe against dense, val/loss: 8 against 9" in report.compare(rows[2], rows)[0]
    rows = grouped(trained("dense", 50, 9.0, width=4), trained("dense", 50, 7.0, width=8), trained("moe", 50, 8.0, **moe))
    assert "8 against 7" in report.compare(rows[2], rows)[0]
    alone = grouped(trained("dense", 50, 9.0, controls=["dense"]))
    assert report.compare(alone[0], alone) == ["dense: control missing: dense"]


def test_curves_by_panel_skip_what_is_cut_or_not_a_number(tmp_path):
    lines = [
        {"step": 0, "epoch": 0, "train/loss": 4.0, "val/code/loss": 3.0, "val/docs/loss": 2.0, "weights/code": 0.5, "text": "x"},
        {"step": 5, "train/loss": "nan", "val/code/loss": 2.5},
        {"step": 5, "val/code/loss": 2.4},  # said again after a resume: the later one counts
        {"no": "step"},
        {"step": None, "train/loss": 1.0},
        {"step": 5, "stage": ["x"], "train/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 6, "train')
    panels = report.curves(tmp_path / "result.json")
    assert list(panels) == ["val loss", "train/loss", "weights"]
    assert panels["val loss"] == {"code": [(0, 3.0), (5, 2.4)], "docs": [(0, 2.0)]}
    assert panels["train/loss"]["train/loss"][0] == (0, 4.0) and math.isnan(panels["train/loss"]["train/loss"][1][1])


def test_curves_of_several_trainings_are_apart(tmp_path):
    lines = [{"step": 1, "stage": stage, "val/code/loss": loss, "val/loss": loss} for stage, loss in (("moe", 1.0), ("dense", 2.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = {"moe": [(1, 1.0)], "dense": [(1, 2.0)]}
    assert report.curves(tmp_path / "result.json") == {"val/loss": lines, "val loss": {f"{stage} code": points for stage, points in lines.items()}}


def test_committed_results_have_their_files_beside_them(tmp_path):
    (tmp_path / "row.json").write_text(json.dumps(result()))
    (tmp_path / "row.curves.json").write_text(json.dumps({"val/code/loss": [[0, 3.0], [1, 2.0]]}))
    (tmp_path / "row.samples.json").write_text(json.dumps([{"prompt": "p", "dense": "d"}]))
    report.write_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "![curves](report-x-a-a0.png)" in text and "| p | d |" in text and "Skipped" not in text


def test_plots_are_embedded_and_a_second_report_does_not_embed_the_first(tmp_path):
    png = report._draw({"loss": {"a": [(0, 1.0), (1, 2.0)]}}, tmp_path / "picture.png").read_bytes()
    (tmp_path / "run" / "plots").mkdir(parents=True)
    (tmp_path / "run" / "plots" / "load.png").write_bytes(png)
    (tmp_path / "run" / "result.json").write_text(json.dumps(result()))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n')
    sizes = {report.write_report([tmp_path / "run"], tmp_path / "run").stat().st_size for _ in range(2)}
    assert len(sizes) == 1
    assert "![load](plots/load.png)" in (tmp_path / "run" / "report.md").read_text()


def partial(row, accuracies, share=0.3, **notes):
    made = [result(row, seed, metrics={"accuracy": value, "dynamic share": share}, notes=notes | {"same": ["data"]}) for seed, value in enumerate(accuracies)]
    return [item | {"config": item["config"] | {"data": "digits"}} for item in made]


CLAIM = {"text": "PAD is better", "metric": "accuracy", "against": "dynamic", "wants": "higher"}


@pytest.mark.parametrize(("ours", "theirs", "verdict"), [
    ([0.80, 0.81, 0.82], [0.70, 0.71, 0.72], "won (the seeds could have shown 0.016)"),
    ([0.60, 0.61, 0.62], [0.70, 0.71, 0.72], "lost (the seeds could have shown 0.016)"),
    ([0.70, 0.72, 0.74], [0.70, 0.71, 0.72], "undecided (the seeds could have shown 0.025)"),
    ([0.9], [0.7], "undecided (one seed)")])
def test_claims_beside_what_was_measured(ours, theirs, verdict):
    rows = grouped(*partial("PAD", ours, claims=[CLAIM], not_tested=["ImageNet"]), *partial("dynamic", theirs, 1.0))
    [line] = verdicts.claims(rows[0], rows)
    assert line.startswith(f"PAD is better: {verdict}. Measured: accuracy of PAD ") and line.endswith("; the claim itself is not tested at this scale")
    assert verdicts.claims(rows[1], rows) == []


def test_claims_count_the_seeds_that_both_have():
    rows = grouped(*partial("PAD", [0.70, 0.71, 0.9, 0.9], claims=[CLAIM]), *partial("dynamic", [0.70, 0.71], 1.0))
    [line] = verdicts.claims(rows[0], rows)
    assert line.startswith("PAD is better: undecided") and "difference +0" in line


def test_a_claim_without_its_control_has_no_verdict():
    other = [item | {"config": item["config"] | {"data": "other"}} for item in partial("dynamic", [0.7, 0.7, 0.8])]
    rows = grouped(*partial("PAD", [0.8, 0.81, 0.82], claims=[CLAIM]), *other)
    assert verdicts.claims(rows[0], rows) == ["PAD is better: no verdict, control missing: dynamic"]


def test_sentences_tables_and_points_of_a_result(tmp_path):
    notes = dict(about=["images: digits"], tables={"Networks": [["network", "accuracy"], ["PAD", 0.8125]]}, points={"x": "dynamic share", "y": "accuracy"})
    for number, item in enumerate([*partial("PAD", [0.8, 0.9], claims=[CLAIM], **notes), *partial("dynamic", [0.7, 0.8], 1.0, **notes)]):
        (tmp_path / f"{number}.json").write_text(json.dumps(item))
    report.write_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "\n- images: digits\n" in text and "| network | accuracy |\n| --- | --- |\n| PAD | 0.8125 |" in text
    assert "### What the paper claims\n\n- PAD is better: undecided" in text
    assert "![accuracy against dynamic share](report-x-points-1.png)" in text and (tmp_path / "out" / "report-x-points-1.png").stat().st_size > 1000


def test_broken_and_foreign_files_are_named_and_skipped(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "result.json").write_text(json.dumps(result()))
    (tmp_path / "good" / "samples.json").write_text("[1]")
    (tmp_path / "cut.json").write_text('{"schema": 1')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "half.json").write_text(json.dumps(result() | {"metrics": None}))
    (tmp_path / "what.json").write_text(json.dumps(result() | {"what": {"experiment": "x"}}))
    (tmp_path / "error.json").write_text(json.dumps(result(status="failed") | {"error": "bad"}))
    report.write_report([tmp_path, tmp_path / "absent.json"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    for line in ("cut.json: not valid JSON", "list.json: not a result of schema 1", "half.json: missing or of the wrong type: metrics"):
        assert line in text
    assert "what.json: missing or of the wrong type: what.row, what.profile, what.digest" in text and "absent.json: " in text
    assert "good/samples.json is broken" in text and "error.json: missing or of the wrong type: error" in text


@pytest.mark.parametrize("notes", [
    [1], {"controls": 5}, {"main": ["a", 1]}, {"tables": ["row"]}, {"tables": {"a": [1]}}, {"tables": {"a": []}}, {"points": {"x": "accuracy"}},
    {"claims": [{"text": "better"}]}, {"answers": {"task": {"metric": "accuracy", "predictions": [1], "labels": []}}}, {"answers": {"task": {"limit": "x"}}}])
def test_foreign_notes_are_skipped(tmp_path, notes):
    for name, more in {"good": {}, "foreign": {"notes": notes}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result(name, **more)))
    report.write_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "foreign/result.json: missing or of the wrong type: notes" in text and text.count("/result.json") == 1


@pytest.mark.parametrize("points", ["[1]", '{"loss": 1}', '{"loss": [[0, null]]}', "{"])
def test_foreign_curves_are_named(tmp_path, points):
    (tmp_path / "row.json").write_text(json.dumps(result()))
    (tmp_path / "row.curves.json").write_text(points)
    report.write_report([tmp_path], tmp_path / "out")
    assert "row.curves.json is broken and was skipped." in (tmp_path / "out" / "report.md").read_text()


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 1
    assert "no result.json (schema 1) in results or runs" in capsys.readouterr().err
    (tmp_path / "mine.json").write_text(json.dumps(result()))
    assert report.main(["mine.json", "--out", "page"]) == 0
    assert (tmp_path / "page" / "report.html").is_file() and "page/report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [(6742618112, "6,742,618,112"), (0.51790, "0.5179"), (12345.6, "12,346"), (True, "yes"), (None, "-"), ([1, 2.5], "1, 2.5"), ("x", "x"), (math.inf, "inf")],
)
def test_show(value, text):
    assert report.show(value) == text
