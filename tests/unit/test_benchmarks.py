"""The pieces of the benchmarks: comparison with committed results, routings, the sampled reference, spreads, peers that cannot run."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import compare, measure, ops
from benchmarks.layer import Case, Layer, Reference, choose
from benchmarks.measure import Refused, attempt, spread, summarise
from benchmarks.ops import check, variants
from benchmarks.peers import PEERS
from benchmarks.routing import indexing, same_order
from dyn import env

CASE = Case("tiny", T=24, D=16, F=12, E=4, K=2)


def result(ratio: float, device: str = "a CPU", threads: int = 2) -> dict:
    row = {"both": {"median": 1.0}, "both_ratio": {"median": ratio, "low": ratio, "high": ratio}}
    dense = {"both": {"median": 1.0}, "both_ratio": {"median": 1.0, "low": 1.0, "high": 1.0}}
    table = {"name": "a", "about": "", "reference": "dense", "ours": ["dyn torch"], "rounds": 5, "missing": {}}
    rows = {"dense": dense, "dyn torch": row, "peer": copy.deepcopy(row)}
    env = {"device": device, "kind": "cpu", "threads": threads, "commit": "abc"}
    return {"what": "ops", "env": env, "tables": [table | {"rows": rows}]}


@pytest.mark.parametrize(("now", "said", "bad"), [(1.0, 0, 0), (1.2, 0, 0), (1.3, 2, 0), (1.99, 2, 0), (2.0, 2, 1), (0.5, 2, 0)])
def test_compare(now, said, bad):
    changes = compare.compare(result(now), result(1.0))
    assert (len(changes), sum(c.bad for c in changes)) == (said, bad)
    assert all(c.factor == now for c in changes)


def test_a_median_that_few_rounds_moved_is_said_but_not_bad():
    now = result(8.0)
    now["tables"][0]["rows"]["dyn torch"]["both_ratio"]["low"] = 1.4
    changes = compare.compare(now, result(1.0))
    assert len(changes) == 2 and not any(c.bad for c in changes)


def test_compare_takes_what_both_have_and_refuses_other_devices():
    new, old = result(3.0), result(1.0)
    new["tables"].append(new["tables"][0] | {"name": "new"})
    del old["tables"][0]["rows"]["peer"]
    assert [(c.table, c.row) for c in compare.compare(new, old)] == [("a", "dyn torch")]
    with pytest.raises(ValueError, match=r"another CPU, 2 threads does not compare with ops on a CPU, 2 threads"):
        compare.compare(result(1.0, "another CPU"), old)
    with pytest.raises(ValueError, match=r"4 threads does not compare"):
        compare.compare(result(1.0, threads=4), old)


@pytest.mark.parametrize(
    ("new", "bad", "says"),
    [
        (result(1.0), 0, "2 ratios compared with commit abc, 0 moved"),
        (result(1.5), 0, "dyn torch, both_ratio: 1.00 -> 1.50, 1.50 times worse"),
        (result(2.5), 1, "**twice as bad** a: dyn torch, both_ratio: 1.00 -> 2.50"),
        (result(2.5, "another CPU"), 0, "nothing to compare with on another CPU, 2 threads (committed: a CPU, 2 threads)"),
    ],
)
def test_guard(tmp_path, new, bad, says):
    out, committed = tmp_path / "out", tmp_path / "committed"
    out.mkdir()
    (out / "ops.json").write_text(json.dumps(new))
    (out / "ops.md").write_text("report")
    assert compare.guard(out, committed) == 0
    assert "(committed: nothing)" in (out / "compare.md").read_text()
    committed.mkdir()
    (committed / "ops.json").write_text(json.dumps(result(1.0)))
    assert compare.guard(out, committed) == bad
    assert says in (out / "compare.md").read_text()
    assert compare.guard(out, committed, store=True) == 0
    assert compare.guard(out, committed) == 0
    known = compare.references("ops", committed)
    assert known["a CPU, 2 threads"] == committed / "ops.json"
    assert known.get("another CPU, 2 threads") in (None, committed / "ops-another-cpu-2-threads.json")
    assert json.loads(known[compare.device_kind(new["env"])].read_text()) == new


def test_a_lost_row_of_ours_is_bad(tmp_path):
    new, old = result(1.0), result(1.0)
    del new["tables"][0]["rows"]["dyn torch"], old["tables"][0]["rows"]["peer"]
    old["tables"].append(old["tables"][0] | {"name": "of a full run"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ops.json").write_text(json.dumps(new))
    (tmp_path / "ops.json").write_text(json.dumps(old))
    assert compare.guard(tmp_path / "out", tmp_path) == 1
    assert "**lost** a: dyn torch" in (tmp_path / "out" / "compare.md").read_text()


def test_committed_results_have_the_form():
    for path in compare.COMMITTED.glob("*.json"):
        committed = json.loads(path.read_text())
        assert compare.references(committed["what"], compare.COMMITTED)[compare.device_kind(committed["env"])] == path  # one a device
        assert compare.compare(committed, committed) == [] and list(compare.ratios(committed))


@pytest.mark.parametrize(("E", "K", "load"), [(16, 2, 4.0), (16, 4, 4.0), (8, 4, 2.0), (64, 8, 4.0)])
def test_routings(E, K, load):
    for routing in ("uniform", "skewed"):
        idx = choose(512, E, K, routing, "cpu", torch.Generator().manual_seed(0))
        assert all(len(set(row)) == K for row in idx.tolist())
        counts = torch.bincount(idx.flatten(), minlength=E) / (512 * K / E)
        assert counts.max() == load if routing == "skewed" else counts.max() < 1.5


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_every_variant_agrees_with_float64(mode, routing):
    """Peers that need no other package have to be right on every shape that they accept."""
    errors, missing = check(Layer(CASE, mode, routing, "cpu"))
    assert {"dyn eager", "dyn torch", "loop over experts", "LLaMA-MoE's own", "transformers eager", "transformers batched_mm"} <= errors.keys()
    assert not [why for why in missing.values() if why.startswith("wrong")]


def test_the_reference_sees_a_wrong_gradient():
    layer = Layer(CASE, "fp32", "uniform", "cpu")
    variant = variants(layer)["dyn torch"]()
    reference = Reference(layer)
    assert reference.error(layer, variant) < 1e-5
    for i in range(4):
        variant.gradients = lambda grads, i=i: [g * (1.1 if j == i else 1) for j, g in enumerate(grads)]
        assert reference.error(layer, variant) == pytest.approx(0.1, rel=1e-3)


def test_a_peer_that_cannot_run_is_a_reason(monkeypatch):
    def broken(layer):
        return layer.variant(lambda: layer.x[:, :3])

    def refuses(layer):
        raise Refused("not this width")

    def missing(layer):
        import a_package_that_nobody_has as there

        return there

    def wrong(layer):
        return layer.variant(lambda: layer.x * layer.weight.sum() + 0 * (layer.gate_up.sum() + layer.down.sum()))

    for adapt in (broken, refuses, missing, wrong):
        monkeypatch.setitem(PEERS, adapt.__name__, adapt)
    _, reasons = check(Layer(CASE, "fp32", "uniform", "cpu"))
    assert reasons["refuses"] == "not this width" and reasons["missing"].startswith("not installed")
    assert reasons["broken"].startswith("raises: ") and reasons["wrong"].startswith("wrong: differs from float64 by")


@pytest.mark.parametrize("row", ["dyn torch", ops.REFERENCE])
def test_errors_of_our_rows_and_of_the_reference_are_raised(monkeypatch, row):
    def broken():
        raise ZeroDivisionError("here")

    monkeypatch.setattr(ops, "variants", lambda layer: {row: broken})
    with pytest.raises(ZeroDivisionError, match="here"):
        check(Layer(CASE, "fp32", "uniform", "cpu"))
    with pytest.raises(ZeroDivisionError, match="here"):
        ops.measure(Layer(CASE, "fp32", "uniform", "cpu"), "uniform", 2, measure.make_clock("cpu"), {}, {})


def test_a_peer_that_breaks_the_device_ends_the_run_by_name(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    for make in (lost, lambda: 1):  # at once, or when somebody waits for the device
        with pytest.raises(RuntimeError, match=r"^a peer left the device in error, and nothing after it can run: CUDA error: an illegal memory access"):
            attempt("a peer", make)


def test_an_error_while_timed_says_whose():
    with pytest.raises(ZeroDivisionError) as raised:
        measure.time_rounds({"a peer": lambda: {"time": 1 / 0}}, 2)
    assert raised.value.__notes__ == ["while a peer was timed"]


def test_a_run_that_is_cut_off_leaves_its_tables(tmp_path, monkeypatch):
    made, tables = [], ops.measure

    def measured(*args):
        if made:
            raise KeyboardInterrupt
        made.append(tables(*args))
        return made[0]

    monkeypatch.setattr(ops, "cases", lambda size, device: [replace(CASE, modes=("fp32",))])
    monkeypatch.setattr(ops, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        ops.run(measure.environment("cpu"), "tiny", tmp_path, 2, measure.make_clock("cpu"))
    assert [table["name"] for table in json.loads((tmp_path / "ops.json").read_text())["tables"]] == ["tiny, T=24, fp32, uniform"]


@pytest.mark.parametrize("T", [40, 400])  # few rows, and so many that each expert's are padded
def test_the_order_of_rows_is_checked(T):
    idx = choose(T, 4, 2, "skewed", "cpu", torch.Generator().manual_seed(0))
    calls = indexing(idx, 4)
    ends, slot = calls["dyn torch"]()
    assert same_order((ends, slot), calls["torch"](), 4)
    assert not same_order((ends, slot.flip(0)), calls["torch"](), 4)
    assert not same_order(([0, *ends[1:]], slot), calls["torch"](), 4)


def test_the_commit_without_a_checkout(monkeypatch):
    monkeypatch.setattr(env, "_git", lambda *words: None)
    monkeypatch.delenv("DYN_COMMIT", raising=False)
    assert measure.environment("cpu")["commit"] == "unknown" and env.facts()["commit"] is None
    monkeypatch.setenv("DYN_COMMIT", "abc")
    assert measure.environment("cpu")["commit"] == env.facts()["commit"] == "abc" and env.facts()["dirty"] is None


def test_the_commit_of_a_foreign_checkout_is_not_ours(monkeypatch):
    """An environment that lies in somebody's repository."""
    answers = {"rev-parse": "/somebody/project\ntheir commit", "status": " M file"}
    monkeypatch.setattr(env, "_git", lambda *words: answers[words[0]])
    monkeypatch.setenv("DYN_COMMIT", "ours")
    assert env.commit() == ("ours", None)
    answers["rev-parse"] = f"{Path(env.__file__).parents[1]}\ntheir commit"
    assert env.commit() == ("their commit", True)


def test_shapes_of_no_multiple_of_16_are_checked_on_a_gpu():
    odd = [c for c in ops.cases("full", "cuda") if c.F % 16]
    assert {mode for c in odd for mode in c.modes} == {"bf16", "fp32"} and all(c.train for c in odd)


def test_batched_mm_is_left_out_where_its_copies_are_large():
    layer = Layer(Case("wide", T=512, D=256, F=256, E=4, K=4), "fp32", "uniform", "cpu")
    assert attempt("a peer", lambda: PEERS["transformers batched_mm"](layer)) == (None, "would copy 1.6 GB of weights, a set for each routed row")


def test_spreads_and_ratios_are_of_the_same_round():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
    rounds = [{"a": {"t": 1.0}, "ref": {"t": 2.0}}, {"a": {"t": 10.0}, "ref": {"t": 20.0}}, {"a": {"t": 2.0}, "ref": {"t": 4.0}}]
    assert summarise(rounds, "ref")["a"]["t_ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}


def test_saved_bytes_counts_what_backward_needs():
    x, w = torch.randn(8, 4), torch.randn(4, 4, requires_grad=True)
    assert measure.saved_bytes(lambda: (x @ w).exp(), (x, w)) == 8 * 4 * 4


def test_triton_only_where_it_can_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert measure.runnable(["eager", "triton"], "cpu") == ["eager"]
    assert measure.runnable(["eager", "triton"], "cuda") == ["eager", "triton"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert measure.runnable(["eager", "triton"], "cpu") == ["eager", "triton"]
