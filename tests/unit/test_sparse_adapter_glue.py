"""The experiment on GLUE: what its config refuses, which rows its sweeps have, how jobs are averaged and drawn."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dyn import config
from dyn.nn.adapter import adapter_parameters, head_parameters
from dyn.nn.masked import masks
from dyn.run import main
from dyn.train import adapt, sentences
from dyn.train.fit import train_task
from dyn.train.sparse import SparseConfig

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("experiments.sparse_adapter_glue", ROOT / "experiments" / "sparse_adapter_glue.py")
experiment = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
if not hasattr(experiment, "SWEEPS"):
    spec.loader.exec_module(experiment)


@pytest.mark.parametrize(("words", "message"), [
    (["tasks=[ax]"], "tasks=ax is unknown; allowed: cola, sst2"),
    (["tasks=[]"], "at least one, each once"),
    (["data.task=cola"], "data.task=cola would be ignored"),
    (["rates=[1e-3]", "data.tuning=0"], "data.tuning=0.0 must be above 0"),
    (["sparse.keep=0"], r"keep=0.0 must lie in \(0, 1\]"),
    (["sparse.keep=1.5"], r"keep=1.5 must lie in \(0, 1\]"),
    (["sparse.factor=4"], "Large-Sparse keeps 1 / factor exactly, set keep=null"),
    (["trainer.max_steps=5"], "set epochs"),
    (["sparse.fuse=true", "sparse.kind=lora", "tasks=[mrpc,cola]"], "fuse=true, kind=lora: a fusion is over bottleneck adapters; allowed: houlsby"),
    (["sparse.fuse=true"], "fuse=true is over the adapters of several tasks: set tasks to two or more"),
])
def test_refusals(words, message):
    with pytest.raises(ValueError, match=message):
        config.load(experiment.Config, "sparse_adapter_glue", "smoke", words, root=ROOT)


@pytest.mark.parametrize("sweep", [name for name in experiment.SWEEPS if name != "rates"])  # which compares rates and not networks
def test_every_pruned_row_has_its_controls(sweep):
    """A sweep trains what its rows are compared with, by the same seeds and on the same tasks."""
    rows = experiment.SWEEPS[sweep]
    names = {(row["row"], row["seed"]) for row in rows}
    assert len(names) == len(rows)
    for row in rows:
        net = SparseConfig(**{key.removeprefix("sparse."): value for key, value in row.items() if key.startswith("sparse.")})
        suffix = row["row"].removeprefix(net.what())
        wanted = {name + suffix for name in net.controls()} if not net.shuffle and net.method != "random" else set()
        assert {(name, row["seed"]) for name in wanted} <= names, row["row"]


def test_a_fusion_trains_itself_over_the_adapters_of_all_tasks(tmp_path, monkeypatch):
    """The members are the run's own, pruned and frozen, the penalty is in the loss, and without export no adapter stays."""
    trained, started, name = {}, {}, "pfeiffer-4-snip-0.5-2-rounds-by-epoch-16-samples"

    def watched(task, *args, run, name, **more):
        started[name] = {key: p.detach().clone() for key, p in task.net.named_parameters()}
        trained[name] = train_task(task, *args, run=run, name=name, **more)
        return trained[name]

    monkeypatch.setattr(adapt, "train_task", watched)
    words = ["sparse.kind=pfeiffer", "sparse.fuse=true", "sparse.keep=0.5", "sparse.rounds=2", "sparse.by_epoch=true",
             "tasks=[mrpc,stsb]", "beside=[]", "rates=[]", "epochs=1", "export=false"]
    assert main(["sparse_adapter_glue", "profile=smoke", f"runs={tmp_path}", *words]) == 0
    [path] = (tmp_path / "sparse_adapter_glue").glob("*/result.json")
    result, folder = json.loads(path.read_text()), path.parent
    assert [*trained] == [f"mrpc-{name}", f"stsb-{name}", f"mrpc-{name}-fused", f"stsb-{name}-fused"] and not (folder / "adapters").exists()
    for task in ("mrpc", "stsb"):
        before, net = started[f"{task}-{name}-fused"], trained[f"{task}-{name}-fused"].net
        moved = {key for key, p in net.named_parameters() if not torch.equal(p, before[key])}
        own = set(adapter_parameters(net, "default"))
        assert own & moved and moved <= own | set(head_parameters(net, "default"))
        for member in ("mrpc", "stsb"):
            alone = adapter_parameters(trained[f"{member}-{name}"].net, "default")
            assert alone and all(torch.equal(before[key.replace(".default.", f".{member}.")], p) for key, p in alone.items())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"train/aux_loss" in row for row in rows if row.get("stage", "").endswith("fused") and "train/loss" in row} == {True}
    assert result["cost"]["trained_parameters"] == result["cost"]["adapter_parameters"] + result["cost"]["head_parameters"] > 0
    assert {"score", f"{name}/score"} <= set(result["metrics"])
    assert result["metrics"]["keep"] == result["metrics"][f"{name}/keep"] == 0.5 and result["cost"]["mask"] == ""
    assert [row["train/keep"] for row in rows if "train/keep" in row] == [0.5, 0.5]


def test_what_was_pruned_meanwhile_is_zero_in_an_average_of_weights_too(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(adapt, "train_task", lambda *args, **more: trained.append(train_task(*args, **more)) or trained[-1])
    words = ["sparse.rounds=3", "sparse.by_epoch=true", "beside=[]", "rates=[]", "classify.ema=0.9", "tasks=[mrpc]"]
    assert main(["sparse_adapter_glue", "profile=smoke", f"runs={tmp_path}", *words]) == 0
    [path] = (tmp_path / "sparse_adapter_glue").glob("*/result.json")
    found = masks(trained[0].net)
    assert json.loads(path.read_text())["cost"]["kept"] == sum(int(mask.sum()) for mask in found.values()) == 614
    assert not any(trained[0].net.get_parameter(key)[~mask].any() for key, mask in found.items())


def test_too_many_rounds_are_refused_before_anything_is_trained(tmp_path, capsys):
    assert main(["sparse_adapter_glue", "profile=smoke", f"runs={tmp_path}", "sparse.rounds=500", "sparse.by_epoch=true", "tasks=[mrpc]"]) == 1
    assert "rounds=500 do not fit into a training of" in capsys.readouterr().err and not list(tmp_path.glob("*/*/checkpoints"))


def test_the_mean_leaves_wnli_out():
    results = {task: {"net": {"scores": {"score": score}}} for task, score in (("mrpc", 0.8), ("cola", 0.4), ("wnli", 0.1))}
    assert sentences.mean_score(results, "net") == pytest.approx(0.6)
    assert sentences.mean_score({"wnli": results["wnli"]}, "net") == pytest.approx(0.1)


def test_densities_are_lines_over_layers_by_matrix():
    keys = [f"bert.encoder.layer.{i}.{place}.default.{side}.weight" for i in range(3) for place in ("attention.output.dense", "output.dense")
            for side in ("down", "up")]
    lines = adapt.densities({key: n / 12 for n, key in enumerate(keys)})
    assert list(lines) == ["attention output down", "attention output up", "output down", "output up"]
    assert lines["output up"] == [3 / 12, 7 / 12, 11 / 12]


def test_claims_belong_to_the_papers_rows():
    usual = SparseConfig()
    assert adapt._claimed(usual) == "pruned" and adapt._claimed(SparseConfig(factor=4, keep=None)) == "large"
    assert adapt._claimed(SparseConfig(keep=0.2)) == "80 %"
    for other in (dict(shuffle=True), dict(method="random"), dict(keep=1.0), dict(keep=0.4), dict(kind="none")):
        assert adapt._claimed(dataclasses.replace(usual, **other)) is None


def test_leading_metric():
    job = SimpleNamespace(scores=("f1", "exact_match"))
    assert adapt._lead({"": job}) == "f1" and adapt._lead({"mrpc": job}) == "score"
