"""llama_moe_convert: what its configs say, what it refuses before the work, texts by published conventions, and stages that resume."""

import dataclasses
import importlib.util
import json
import sys
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from dyn import config
from dyn.data.sources import JoinedText, read_joined
from dyn.data.tiny import tiny_tokenizer, tiny_tokens
from dyn.data.tokens import Tokens
from dyn.models import llama_moe
from dyn.models.llama_moe_construct import METHODS
from dyn.models.llama_moe_convert import moe_config
from dyn.models.llama_moe_dense import fresh
from dyn.models.packaged import dense_config
from dyn.nn.surgery import count_parameters, flops_per_token
from dyn.runfolder import Run, create
from dyn.train import calibration, convert
from dyn.train.calibration import draw_calibration
from dyn.train.plan import plan_conversion
from dyn.train.pretrain import Corpus

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("check_llama_moe_convert", ROOT / "experiments" / "llama_moe_convert.py")
EXPERIMENT = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(EXPERIMENT)
NAME = "llama_moe_convert"


def settings(*words, profile="smoke", row=None):
    return config.load(EXPERIMENT.Config, NAME, profile, words, row={k: v for k, v in (row or {}).items() if k != "row"}, root=ROOT)


def run_of(cfg, tmp_path, **changes):
    return Run.open(create(tmp_path, NAME, dataclasses.replace(cfg, **changes), profile="smoke"))


def finish(run):
    with run.listening():
        assert run.finish({}, None) == 0
    return json.loads((run.folder / "result.json").read_text())


# Configs and rows


@pytest.mark.parametrize("sweep", EXPERIMENT.SWEEPS)
@pytest.mark.parametrize("profile", ["demo", "small", "paper"])
def test_every_row_is_what_its_name_says(sweep, profile):
    for entry in EXPERIMENT.SWEEPS[sweep]:
        cfg = settings(profile=profile, row=entry)
        assert entry["row"].startswith(cfg.model.what()) and not cfg.export
        if cfg.model.kind == "moe":
            assert cfg.control_row() in [other["row"] for other in EXPERIMENT.SWEEPS[sweep]], "a control is a row of its sweep"


@pytest.mark.parametrize("width", [1536, 11008])
def test_active_fractions_are_exact_on_real_widths(width):
    dense = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2)
    for entry in EXPERIMENT.SWEEPS["step0"]:
        model = settings(profile="small", row=entry).model
        fraction = model.active()
        assert fraction == Fraction(entry["row"].split(", ")[1]) and (fraction * width).denominator == 1 and model.num_experts <= 32
        if model.kind == "moe" and model.construction in ("random", "kmeans", "gradient", "sharing_inter"):
            made = moe_config(dense, model.construction, num_experts=model.num_experts, num_experts_per_tok=model.num_experts_per_tok,
                              num_shared_experts=model.num_shared_experts, score_scale=model.score_scale)
            assert Fraction(made.moe_intermediate_size * (made.num_experts_per_tok + made.num_shared_experts), width) == fraction


def test_hub_rows_are_the_fields_setting_whatever_the_profile(tmp_path):
    one, two = (settings(profile=profile, row=EXPERIMENT.SWEEPS["hub"][0]) for profile in ("demo", "small"))
    assert one.data.text.path == two.data.text.path == "allenai/c4" and one.data.text.domains == ["en"] and one.data.text.streaming
    assert [text.name for text in one.texts] == ["wikitext2", "c4"] and one.texts == two.texts and one.data.block_size == 2048
    assert len({row["model.source"] for row in EXPERIMENT.SWEEPS["hub"]}) == 6
    config.save(one, tmp_path / "config.yaml")
    assert config.read(EXPERIMENT.Config, tmp_path / "config.yaml") == one


@pytest.mark.parametrize(("word", "message"), [
    ("calibration_tokens=20", "calibration_tokens=20 are less than one sequence, calibration_length=32"),
    ("model.num_experts_per_tok=5", "num_experts_per_tok=5 must be between 1 and num_experts=3"),
    ("model.num_shared_experts=-1", "num_shared_experts=-1"),
    ("model.kind=oracle", "kind=oracle has no experts"),
    ("model.align_passes=-1", "align_passes=-1 must be at least 0"),
    ("model.budgets=true", "budgets=true needs kind=moe or prune and num_shared_experts=null, got moe and 1"),
    ("timing_rounds=0", "timing_rounds=0 must be at least 1"),
    ("data.block_size=1", "data.block_size=1 must be at least 2"), ("data.batch_size=0", "must be at least 1"), ("data.validation_tokens=0", "at least 1"),
    ("model.kind=mixture", "nearest: 'moe'"),
    ("calibration_size=3", "there is no key 'calibration_size'"),
])
def test_settings_that_cannot_be(word, message):
    with pytest.raises(ValueError, match=message):
        settings(word)


def test_distillation_after_the_conversion_needs_float32():
    with pytest.raises(ValueError, match=r"dtype=bfloat16: model\.align_passes=1 needs float32 weights"):
        settings("model.align_passes=1", "dtype=bfloat16")


def test_texts_need_names_of_their_own():
    with pytest.raises(ValueError, match="names of their own, got c4, c4"):
        settings(row={"texts": [EXPERIMENT.C4, EXPERIMENT.C4]})


def test_control_rows():
    assert settings().control_row() == "prune, 1/2" and settings("control=other").control_row() == "other"
    assert settings("model.construction=random", "model.num_shared_experts=null").model.active() == Fraction(1, 3)
    assert settings("model.num_shared_experts=null").model.active() == Fraction(1, 2)  # sharing_inter has one by itself


PLAIN = ("model.num_shared_experts=null", "model.score_scale=null", "model.num_experts=4")


def test_plan_agrees_with_the_network():
    cfg = settings("model.source=meta-llama/Llama-2-7b-hf", "model.construction=random", "model.num_experts=4", "model.num_experts_per_tok=1",
                   "model.num_shared_experts=0")
    plan = EXPERIMENT.plan(cfg)
    with torch.device("meta"):
        net = fresh(moe_config(dense_config(cfg.model.source), "random", num_experts=4, num_experts_per_tok=1))
    counts = count_parameters(net)
    assert plan["parameters"] == {"total": counts["total"], "activated (without gates)": counts["active"], "gates": counts["gate"]}
    assert plan["FLOPs"]["forward, a token"] == flops_per_token(net, cfg.data.block_size)
    fitted = ("model.construction=calibrated", *PLAIN[:2], "model.num_experts=32", "model.num_experts_per_tok=16", "calibration_tokens=60000")
    with torch.device("meta"):  # which chooses how many experts it has
        net = fresh(moe_config(dense_config(cfg.model.source), "calibrated", num_experts=32, num_experts_per_tok=16))
    assert EXPERIMENT.plan(settings("model.source=meta-llama/Llama-2-7b-hf", *fitted))["parameters"]["gates"] == count_parameters(net)["gate"]
    pruned = EXPERIMENT.plan(settings("model.kind=prune", "model.num_shared_experts=null", "model.score_scale=null", "model.num_experts=4",
                                      "model.num_experts_per_tok=1", "model.source=meta-llama/Llama-2-7b-hf", "calibration_tokens=60000"))
    assert pruned["parameters"]["total"] == pruned["parameters"]["activated (without gates)"] == counts["active"] and pruned["parameters"]["gates"] == 0


# Refusals and calibration text


def check(tmp_path, *words, vocab_size=259):
    LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)
    convert.check(settings(*words), tmp_path, tiny_tokenizer())


def test_sizes_are_refused_first(tmp_path):
    check(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 259 entries and the model vocab_size=100"):
        check(tmp_path, vocab_size=100)
    with pytest.raises(ValueError, match="does not divide intermediate_size=48"):
        check(tmp_path, "model.num_experts=6")
    with pytest.raises(ValueError, match="did you mean 'kmeans'"):
        check(tmp_path, "model.construction=kmean", "model.num_shared_experts=null")
    with pytest.raises(ValueError, match=r"calibration_tokens=64 are 2 sequences of calibration_length=32.*model\.num_experts=3"):
        check(tmp_path, "calibration_tokens=64")
    fitted = ("model.num_shared_experts=null", "model.score_scale=null", "model.num_experts=4", "model.num_experts_per_tok=3", "calibration_tokens=35")
    for kind in ("model.kind=prune", "model.construction=calibrated"):
        with pytest.raises(ValueError, match="calibration_tokens=35 are fewer than a layer has active neurons, 36"):
            check(tmp_path, kind, *fitted)
    with pytest.raises(ValueError, match=r"budgets=true .* a sixth of calibration_tokens=100, 32 tokens in whole sequences: .* active neurons, 36"):
        check(tmp_path, "model.construction=calibrated", *fitted[:-1], "calibration_tokens=100", "model.budgets=true")
    with pytest.raises(ValueError, match=r"budgets=true is for model\.construction=calibrated, cmoe, expert_weaver and model\.kind=prune, got random"):
        check(tmp_path, "model.construction=random", *fitted[:-1], "model.budgets=true")
    with pytest.raises(ValueError, match="no whole number"):
        check(tmp_path, "model.kind=prune", *fitted[:2], "model.num_experts=5")
    with pytest.raises(ValueError, match="calibration_tokens=500 are fewer than a layer has active neurons"):  # a dry run says it too
        plan_conversion(settings("model.source=meta-llama/Llama-2-7b-hf", "model.kind=prune", *fitted[:-1], "calibration_tokens=500"))


def corpus(**weights):
    tokens = tiny_tokens(vocab_size=259)
    return Corpus({d: t["train"] for d, t in tokens.items()}, {}, weights or dict.fromkeys(tokens, 1 / 3))


def test_calibration_text_is_what_was_asked_for():
    words, seen = ("calibration_tokens=1000", "calibration_length=30"), corpus()
    batches = convert.calibration_batches(settings(*words), seen)
    assert sum(b.numel() for b in batches) == 990 and [b.shape[0] for b in batches] == [4] * 8 + [1]
    again, other = (convert.calibration_batches(settings(*words, seed), seen) for seed in ("seed=0", "seed=1"))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True)) and not all(torch.equal(a, b) for a, b in zip(batches, other, strict=True))


def test_calibration_text_has_every_domain_and_its_share_whatever_the_batch_size():
    tokens = tiny_tokens(vocab_size=259)
    for place, domain in enumerate(tokens):  # each domain has ids of its own
        tokens[domain]["train"].shards[0][:] = place + 3
    train, weights = {d: t["train"] for d, t in tokens.items()}, dict(zip(tokens, (0.9, 0.095, 0.005), strict=True))

    def draw(sequences, batch_size=4, seed=0):
        batches = draw_calibration(train, weights, sequences=sequences, length=20, batch_size=batch_size, seed=seed, setting="n=1")
        return torch.cat(batches)[:, 0].sub(3).tolist()

    assert [[draw(n).count(d) for d in range(3)] for n in (1, 2, 3, 20, 100)] == [[1, 0, 0], [2, 0, 0], [1, 1, 1], [18, 1, 1], [90, 9, 1]]
    assert draw(20, batch_size=7) == draw(20) != draw(20, seed=1)
    weights = dict(zip(tokens, (2.0, 0.0, 2.0), strict=True))
    assert [draw(6).count(d) for d in range(3)] == [3, 0, 3]


def test_calibration_text_is_no_block_twice():
    train = {"a": Tokens.from_documents([list(range(1000))], vocab_size=1000)}
    for seed in range(3):
        batches = draw_calibration(train, {"a": 1.0}, sequences=50, length=20, batch_size=8, seed=seed, setting="n=1")
        assert torch.cat(batches).flatten().sort().values.tolist() == list(range(1000))


def test_a_domain_left_out_is_never_seen():
    tokens = tiny_tokens(vocab_size=259)
    for place, domain in enumerate(tokens):  # each domain has ids of its own
        tokens[domain]["train"].shards[0][:] = place + 3
    seen = Corpus({d: t["train"] for d, t in tokens.items()}, {}, dict.fromkeys(tokens, 1 / 3))
    found = torch.cat(convert.calibration_batches(settings("leave_out=green"), seen)).unique().tolist()
    assert found == [3, 5]
    assert torch.cat(convert.calibration_batches(settings(), seen)).unique().tolist() == [3, 4, 5]


def test_calibration_refusals():
    with pytest.raises(ValueError, match=r"leave_out: no domain 'gren'.*nearest: green"):
        convert.calibration_batches(settings("leave_out=gren"), corpus())
    with pytest.raises(ValueError, match="leave_out=red leaves no text for calibration; domains with weight: red"):
        convert.calibration_batches(settings("leave_out=red"), corpus(red=1.0, green=0.0, blue=0.0))
    with pytest.raises(ValueError, match=r"calibration_tokens=50000 would repeat text: red has [\d,]+ training tokens and should give"):
        convert.calibration_batches(settings("calibration_tokens=50000"), corpus())


# Texts by convention


@pytest.fixture
def wikitext(tmp_path):
    """A folder in the layout of Salesforce/wikitext: parquet files, a folder a config."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = {"test": ["", " = Title = \n", "", " one two three \n"], "validation": ["other \n"]}
    words = ["---", "configs:"]
    for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        words += [f"- config_name: {name}", "  data_files:"]
        (tmp_path / "data" / name).mkdir(parents=True)
        for split, texts in lines.items():
            pq.write_table(pa.table({"text": texts}), tmp_path / "data" / name / f"{split}-00000-of-00001.parquet")
            words += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (tmp_path / "data" / "README.md").write_text("\n".join([*words, "---", ""]))
    return str(tmp_path / "data")


def test_wikitext_is_all_test_lines_joined_by_blank_lines(wikitext):
    text = JoinedText(**EXPERIMENT.WIKITEXT | {"path": wikitext})
    assert read_joined(text) == "\n\n = Title = \n\n\n\n\n one two three \n"
    assert read_joined(dataclasses.replace(text, joint=" ", documents=2)) == "  = Title = \n"
    assert read_joined(dataclasses.replace(text, split="validation")) == "other \n"


def test_windows_follow_each_other_without_special_tokens_between(wikitext):
    text, tokenizer = JoinedText(**EXPERIMENT.WIKITEXT | {"path": wikitext}), tiny_tokenizer()
    batches = convert.windows(text, tokenizer, 7, 2)
    whole = tokenizer(read_joined(text))["input_ids"]
    assert [b.shape[0] for b in batches] == [2, 2, 1][: len(batches)] and all(b.shape[1] == 7 for b in batches)
    assert torch.cat(batches).flatten().tolist() == whole[: len(whole) // 7 * 7]
    assert torch.cat(convert.windows(dataclasses.replace(text, max_tokens=15), tokenizer, 7, 2)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"wikitext2: \d+ tokens are less than one window, data.block_size=99"):
        convert.windows(text, tokenizer, 99, 2)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(config="wikitext-2"), "no config 'wikitext-2'.*nearest: wikitext-2-raw-v1"),
    (dict(config=None), "config must be one of wikitext-103-raw-v1, wikitext-2-raw-v1"),
    (dict(split="train"), "no split 'train'; there are test, validation"),
    (dict(text_field="page"), "no column 'page'; found text"),
    (dict(documents=1), "no text"),
])
def test_texts_that_are_not_there(wikitext, changes, message):
    with pytest.raises(ValueError, match=message):
        read_joined(JoinedText(**EXPERIMENT.WIKITEXT | {"path": wikitext} | changes))


def test_c4_layout_with_streamed_json(tmp_path):
    import gzip

    for split in ("train", "validation"):
        (tmp_path / "en").mkdir(exist_ok=True)
        with gzip.open(tmp_path / "en" / f"c4-{split}.00000-of-00001.json.gz", "wt") as file:
            file.write("".join(json.dumps({"text": f"{split} page {i}", "url": "u"}) + "\n" for i in range(5)))
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n"
                                        "  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n")
    text = JoinedText(**EXPERIMENT.C4 | {"path": str(tmp_path), "documents": 3})
    assert read_joined(text) == "validation page 0 validation page 1 validation page 2"


# Whole runs


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One whole run, and its folder."""
    run = run_of(settings(), tmp_path_factory.mktemp("smoke"))
    metrics = convert.convert(settings(), run)
    return metrics, finish(run), run.folder


def test_a_run_leaves_numbers_plots_and_a_folder(smoke):
    metrics, result, folder = smoke
    assert {"loss/mean", "gap/mean", "loss/red", "gap/red", "ppl/red", "time a token / dense", "gap/neuron oracle", "gap/ideal routing",
            "routing/accuracy"} <= metrics.keys()
    assert metrics["active fraction"] == 0.5 and metrics["calibration tokens"] == 512
    assert metrics["gap/mean"] == pytest.approx(np.mean([metrics[f"gap/{d}"] for d in ("red", "green", "blue")]))
    assert result["cost"]["active_parameters"] < result["cost"]["total_parameters"] and result["cost"]["flops / dense"] < 1
    assert result["notes"]["controls"] == ["prune, 1/2"] and result["notes"]["compare"] == ["gap/mean"]
    by_layer = result["notes"]["by layer"]
    assert by_layer.keys() >= {"cost alone", "cost restored", "accuracy", "load_entropy"} and len(by_layer["cost alone"]) == len(by_layer["accuracy"])
    assert metrics["routing/load_entropy"] == pytest.approx(np.mean(by_layer["load_entropy"]))
    assert {p.name for p in (folder / "plots").iterdir()} == {"losses.png", "layers.png", "gate.png", "entropy.png", "load.png"}
    assert llama_moe.LlamaMoeForCausalLM.from_pretrained(folder / "export").construction.method == "sharing_inter"
    assert "held-out loss, red" in (folder / "export" / "README.md").read_text()
    assert "control missing: prune, 1/2" in (folder / "report.md").read_text()


@pytest.mark.parametrize("export", [True, False])
def test_a_killed_run_goes_on_to_the_same_numbers(smoke, tmp_path, monkeypatch, export):
    cfg = settings()
    cfg.export = export
    run = run_of(cfg, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "_diagnose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert.convert(settings(f"export={str(export).lower()}"), run)
    run._lock.close()
    again = Run.open(run.folder)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "relative_time", None)  # done
        metrics = convert.convert(settings(f"export={str(export).lower()}"), again)
    again._lock.close()
    timed = ("calibration seconds", "time a token / dense", "speed/tokens_per_second")
    for name in smoke[0].keys() - set(timed):
        assert metrics[name] == pytest.approx(smoke[0][name], rel=1e-6, abs=1e-7), name
    assert (run.folder / "export").is_dir() == export


def test_what_a_conversion_cost_is_not_forgotten(tmp_path, monkeypatch):
    """Stopped after the folder was written and before the stage was."""
    run = run_of(settings(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(convert._Networks, "fraction", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert.convert(settings("export=true"), run)
    run._lock.close()
    again = Run.open(run.folder)
    metrics = convert.convert(settings("export=true"), again)
    again._lock.close()
    assert metrics["calibration tokens"] > 0 and metrics["calibration seconds"] > 0


@pytest.mark.parametrize("kind", ["moe", "prune"])
def test_budgets_and_closed_form_outlive_a_distillation_that_was_stopped(kind, tmp_path, monkeypatch):
    words = (f"model.kind={kind}", "model.construction=calibrated", "model.num_experts_per_tok=2", "model.budgets=true", "model.align_passes=1",
             "diagnose=false", *PLAIN)
    run = run_of(settings(*words), tmp_path / "whole")
    whole = convert.convert(settings(*words), run)
    run._lock.close()
    cut = run_of(settings(*words), tmp_path / "cut")
    for stopped, done in (("align", ()), ("domain_losses", ("layer_budgets", "from_dense", "align"))):
        with monkeypatch.context() as patch:
            patch.setattr(convert, stopped, lambda net, *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            for name in done[:-1]:
                patch.setattr(convert, name, None)
            with pytest.raises(KeyboardInterrupt):
                if stopped == "domain_losses":  # the dense model's are known by now
                    patch.setattr(convert, "_dense_losses", None)
                convert.convert(settings(*words), cut)
        assert (cut.folder / convert.CLOSED).is_dir() == (stopped == "align") and (cut.folder / convert.EXPORT).is_dir() != (stopped == "align")
        cut._lock.close()
        cut = Run.open(cut.folder)
    with monkeypatch.context() as patch:
        for name in ("layer_budgets", "from_dense", "align"):
            patch.setattr(convert, name, None)
        patch.setattr(llama_moe, "prune_dense", None)
        (cut.folder / convert.CLOSED).mkdir()  # as if stopped just before it was removed
        found = convert.convert(settings(*words), cut)
    cut._lock.close()
    assert not (cut.folder / convert.CLOSED).exists()
    for name in whole.keys() - {"calibration seconds", "time a token / dense", "speed/tokens_per_second"}:
        assert found[name] == whole[name], name
    ours, theirs = (load_file(r.folder / "export" / "model.safetensors") for r in (run, cut))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("words", [("model.kind=dense", *PLAIN), ("model.kind=oracle", "model.num_experts_per_tok=2", *PLAIN)])
def test_rows_without_a_network_of_their_own(words, tmp_path):
    run = run_of(settings(*words), tmp_path)
    metrics = convert.convert(settings(*words), run)
    result = finish(run)
    dense = "model.kind=dense" in words
    assert (metrics["gap/mean"] == 0) == dense and metrics["active fraction"] == (1 if dense else 0.5)
    assert result["cost"]["flops / dense"] == 1 and result["notes"]["controls"] == [] and not (run.folder / "export").exists()
    assert metrics["calibration tokens"] == 0 and "time a token / dense" not in metrics


@pytest.mark.parametrize("construction", ["random", "kmeans", "gradient", *[m for m in METHODS if METHODS[m].needs == "activations"]])
def test_other_constructions_run(construction, tmp_path):
    words = (f"model.construction={construction}", "model.num_experts_per_tok=2", "diagnose=false", "export=false", *PLAIN)
    run = run_of(settings(*words), tmp_path)
    metrics = convert.convert(settings(*words), run)
    run._lock.close()
    assert metrics["active fraction"] == 0.5 and "routing/accuracy" not in metrics
    assert (metrics["calibration tokens"] == 0) == (METHODS[construction].needs == "nothing")


def test_the_control_runs(tmp_path):
    words = ("model.kind=prune", "model.num_experts_per_tok=2", "leave_out=red", *PLAIN)
    run = run_of(settings(*words), tmp_path)
    metrics = convert.convert(settings(*words), run)
    result = finish(run)
    assert metrics["active fraction"] == 0.5 and metrics["calibration tokens"] == 512 and "routing/accuracy" not in metrics
    assert result["cost"]["total_parameters"] == result["cost"]["active_parameters"]
    assert result["notes"]["compare"] == ["gap/mean", "gap/red"] and result["notes"]["controls"] == []
    assert convert.load_dense(run.folder / "export").config.intermediate_size == 32


@pytest.mark.parametrize("kind", ["moe", "prune"])
def test_budgets_by_layer_are_measured_on_calibration_text_alone(kind, tmp_path):
    words = (f"model.kind={kind}", "model.construction=calibrated", "model.num_experts_per_tok=2", "model.budgets=true", "diagnose=false", *PLAIN)
    run = run_of(settings(*words), tmp_path)
    metrics = convert.convert(settings(*words), run)
    result = finish(run)
    assert metrics["active fraction"] == 0.5 and metrics["calibration tokens"] == 512
    even = run_of(settings(*words, "model.budgets=false", "seed=0"), tmp_path / "even")
    convert.convert(settings(*words, "model.budgets=false"), even)
    same = finish(even)["cost"]
    assert result["cost"]["active_parameters"] == same["active_parameters"] and result["cost"]["flops_per_token"] <= same["flops_per_token"] * 1.1


def test_text_for_budgets_is_a_part_of_what_calibrates():
    batches = convert.calibration_batches(settings("calibration_tokens=1000", "calibration_length=30"), corpus())
    fitted, measured = calibration.budget_text(batches)
    whole = torch.cat(batches)
    assert len(fitted) == 5 and len(measured) == 1 and torch.equal(torch.cat(measured + fitted), whole[:6])
    with pytest.raises(ValueError, match="budgets need two sequences of calibration text, got one"):
        calibration.budget_text([whole[:1]])


def test_texts_stand_in_for_domains(wikitext, tmp_path):
    cfg = settings("diagnose=false", "export=false", "data.block_size=16", row={"texts": [EXPERIMENT.WIKITEXT | {"path": wikitext}]})
    run = run_of(cfg, tmp_path)
    metrics = convert.convert(cfg, run)
    run._lock.close()
    assert "ppl/wikitext2" in metrics and "loss/red" not in metrics and metrics["loss/mean"] == metrics["loss/wikitext2"]


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started"):
        convert.convert(settings(), types.SimpleNamespace())


def test_dense_losses_are_measured_once_for_the_same_model_and_text(tmp_path, monkeypatch):
    """Another text, another dtype or another model is another measurement."""
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    seen = []
    monkeypatch.setattr(convert, "domain_losses", lambda _, domains: seen.append(1) or {d: float(len(seen)) for d in domains})

    def measured(folder, *words, ids=0):
        cfg = settings(f"model.source={folder}", *words)
        return convert._dense_losses(cfg, types.SimpleNamespace(dense=None, source=folder), {"red": [torch.full((2, 8), ids)]})["red"]

    dense = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    for seed, place in enumerate(("one", "two")):
        torch.manual_seed(seed)
        fresh(dense).save_pretrained(tmp_path / place)
    assert [measured(tmp_path / "one") for _ in range(2)] == [1.0, 1.0]
    assert measured(tmp_path / "one", ids=1) == 2.0 and measured(tmp_path / "one", "dtype=bfloat16") == 3.0 and measured(tmp_path / "two") == 4.0
    assert measured(tmp_path / "one") == 1.0 and len(seen) == 4


@pytest.mark.parametrize(("name", "parameters"), [
    ("meta-llama/Llama-2-7b-hf", 6_738_415_616), ("meta-llama/Meta-Llama-3-8B", 8_030_261_248), ("Qwen/Qwen2.5-7B", 7_615_616_512),
    ("HuggingFaceTB/SmolLM2-135M", 134_515_008), ("HuggingFaceTB/SmolLM2-360M", 361_821_120), ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384)])
def test_hub_rows_are_planned_without_a_hub(name, parameters):
    """Sizes that the models' owners publish."""
    entries = [entry for entry in EXPERIMENT.SWEEPS["hub"] if entry["model.source"] == name]
    with torch.device("meta"):
        assert sum(p.numel() for p in fresh(dense_config(name)).parameters()) == parameters
    moe, pruned = (EXPERIMENT.plan(settings(profile="small", row=entry)) for entry in entries)
    assert pruned["parameters"]["total"] == pruned["parameters"]["activated (without gates)"] == moe["parameters"]["activated (without gates)"]
    assert moe["active fraction of the feed-forward"] == 0.5


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(ValueError, match="nobody/nothing is no model that transformers can load: ") as caught:
        EXPERIMENT.plan(settings("model.source=nobody/nothing"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["moe", "prune"])
def test_a_pass_of_distillation_moves_what_is_kept(kind, tmp_path):
    words = (f"model.kind={kind}", "model.construction=calibrated", "model.num_experts_per_tok=2", "diagnose=false", *PLAIN)
    found = {}
    for passes in (0, 1):
        cfg = settings(*words, f"model.align_passes={passes}")
        run = run_of(cfg, tmp_path / str(passes))
        metrics = convert.convert(cfg, run)
        run._lock.close()
        found[passes] = load_file(run.folder / "export" / "model.safetensors"), metrics
    (plain, before), (moved, after) = found.values()
    assert plain.keys() == moved.keys() and all(before[key] == after[key] for key in ("active fraction", "calibration tokens"))
    assert not torch.equal(plain["model.layers.0.self_attn.q_proj.weight"], moved["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(plain["model.embed_tokens.weight"], moved["model.embed_tokens.weight"])
