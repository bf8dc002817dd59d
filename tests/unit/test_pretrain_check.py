"""What a run of llama_moe_cpt refuses before it shards text or reads weights, and what it takes."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config

from dyn import config
from dyn.data import tokens
from dyn.data.tiny import tiny_corpus, tiny_documents, tiny_tokenizer
from dyn.models.llama_moe_construct import METHODS
from dyn.models.llama_moe_dense import load_dense
from dyn.models.packaged import load_tokenizer
from dyn.train import convert, pretrain
from dyn.train.calibration import gate_lr
from dyn.train.plan import plan_pretraining

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("check_llama_moe_cpt", ROOT / "experiments" / "llama_moe_cpt.py")
EXPERIMENT = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(EXPERIMENT)
SPEC = importlib.util.spec_from_file_location("check_conversion", ROOT / "experiments" / "llama_moe_convert.py")
CONVERSION = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(CONVERSION)
SIZES = dict(hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def settings(**model):
    cfg = config.load(EXPERIMENT.Config, "llama_moe_cpt", "smoke", root=ROOT)
    for key, value in model.items():
        setattr(cfg.model, key, value)
    return cfg


def check(cfg, tmp_path, vocab_size=259, made=LlamaConfig):
    made(**SIZES, vocab_size=vocab_size).save_pretrained(tmp_path / "model")
    pretrain.check(cfg, types.SimpleNamespace(folder=tmp_path, resumed=False), tmp_path / "model", tiny_tokenizer())


def test_what_fits_passes(tmp_path):
    check(settings(), tmp_path)
    check(settings(kind="dense"), tmp_path, made=Qwen2Config)


@pytest.mark.parametrize(("model", "words"), [
    (dict(num_experts=7), "7 does not divide intermediate_size=48; nearest: 6, 8"),
    (dict(num_experts_per_tok=5), "num_experts_per_tok=5"),
    (dict(construction="kmean"), "did you mean 'kmeans'"),
    (dict(construction="gradient", num_shared_experts=2), "num_shared_experts=2"),
    (dict(construction="gradient", calibration_sequences=3), "model.calibration_sequences=3"),
    (dict(construction="calibrated", gate="linear", calibration_sequences=0, num_experts_per_tok=3),
     r"calibration_sequences=0 of 32 tokens are too few: the regression of 36 active neurons a layer needs 36 tokens.*use 2 or more"),
    (dict(kind="prune", calibration_sequences=1, num_experts_per_tok=3), "calibration_sequences=1 of 32 tokens.*36 active neurons.*use 2 or more"),
    (dict(construction="coactivation", calibration_sequences=0), "calibration_sequences=0 of 32 tokens are too few.*use 1 or more"),
    (dict(kind="prune", repair_ridge=-1.0), r"model\.repair_ridge=-1\.0 must be above 0 and finite, or null"),
    (dict(score_scale="half"), "score_scale='half'"),
    (dict(score_scale=0.0), "score_scale=0.0 must be a finite number above 0"),
    (dict(score_scale=-1.0), "score_scale=-1.0 must be a finite number above 0"),
    (dict(gate="uniform"), "uniform"),
])
def test_sizes_and_names_are_refused_first(tmp_path, model, words):
    with pytest.raises(ValueError, match=words):
        check(settings(**model), tmp_path)


def test_a_tokenizer_that_does_not_match(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 259 entries and the model vocab_size=100"):
        check(settings(), tmp_path, vocab_size=100)


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="GB are free"):
        check(settings(), tmp_path)


@pytest.mark.parametrize(("word", "message"), [
    ("data.text.max_tokens=-3", "max_tokens=-3 of the text .* must be at least 1, or null for all"),
    ("data.text.max_validation_tokens=0", "max_validation_tokens=0 of the text"),
    ("trainer.peak_flops=0", "trainer.peak_flops=0.0 must be above 0"),
    ("model.balance_weight=.nan", "model.balance_weight=nan must be finite"),
])
def test_settings_out_of_range(word, message):
    with pytest.raises(ValueError, match=message):
        config.load(EXPERIMENT.Config, "llama_moe_cpt", "smoke", [word], root=ROOT)


def test_processes_that_do_not_match(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started"):
        check(settings(), tmp_path)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        pretrain.check(settings(), types.SimpleNamespace(folder=tmp_path, resumed=False), tmp_path, tiny_tokenizer())
    with pytest.raises(ValueError, match=r"^source=.* is no model folder: it has no config\.json$"):
        load_tokenizer(tmp_path, "source")
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.source=.* has no tokenizer that transformers can load: .*$"):  # in one line
        load_tokenizer(tmp_path)


def corpus(cfg, tmp_path, documents=40, validation=True):
    cfg.data.text.path, cfg.data.cache = tiny_corpus(tmp_path / "text", documents=documents, validation=validation), str(tmp_path / "tokens")
    return pretrain.load_corpus(cfg, types.SimpleNamespace(log=lambda _: None), tmp_path / "model", tiny_tokenizer())


def test_weights_that_are_cut_short_are_named_before_text_is_read(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=259)).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    for size in (1000, 20000, 0):
        with file.open("r+b") as cut:
            cut.truncate(size)
        for read in (lambda: pretrain.find_source(settings(source=str(tmp_path / "model")), None), lambda: load_dense(tmp_path / "model")):
            with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short .*; fetch or save it anew"):
                read()


def test_weights_that_are_no_numbers_are_named_before_training(tmp_path):
    net = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=259))
    net.lm_head.weight.data.fill_(torch.nan)
    net.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    cfg = settings(source=str(tmp_path / "dense"))
    cfg.data.text.path, cfg.data.cache = tiny_corpus(tmp_path / "text", documents=40), str(tmp_path / "tokens")
    run = types.SimpleNamespace(folder=tmp_path, resumed=False, log=lambda _: None, stage=lambda _, fn: fn())
    with pytest.raises(ValueError, match=r"the dense model's held-out loss is not finite \(red, green, blue\); are its weights whole\?"):
        pretrain.pretrain(cfg, run)


def test_blocks_longer_than_the_model_was_made_for_are_said(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=259, max_position_embeddings=64)).save_pretrained(tmp_path)
    cfg, lines = settings(source=str(tmp_path)), []
    for cfg.data.block_size in (64, 65):
        assert pretrain.find_source(cfg, types.SimpleNamespace(log=lines.append)) == str(tmp_path)
    assert len(lines) == 1 and lines[0].startswith("warning: data.block_size=65 is more than the 64 positions that ")


def test_corpus_domains_weights_and_filters(tmp_path):
    cfg = settings()
    cfg.data.stand_for = {"red": "en_cc", "green": "en_c4", "blue": "github"}
    made = corpus(cfg, tmp_path)
    assert list(made.train) == ["red", "green", "blue"] and sum(made.weights.values()) == pytest.approx(1)
    for wrong, message in (({"rad": "en_cc"}, r"data.stand_for: no domain 'rad'; there are red, green, blue \(nearest: red\)"),
                           ({"red": "en_ccc"}, r"data.stand_for: no domain of the paper 'en_ccc'; .* \(nearest: en_cc\)")):
        cfg.data.stand_for = wrong
        with pytest.raises(ValueError, match=message):
            corpus(cfg, tmp_path)
    cfg.data.stand_for, cfg.data.text.domains = {"red": "en_cc", "green": "en_c4"}, ["red"]  # of all domains, not of those that are taken
    assert list(corpus(cfg, tmp_path).train) == ["red"]
    cfg.data.text.domains = None
    cfg.data.block_size = 100_000
    with pytest.raises(ValueError, match=r"red has \d+.*data\.block_size=100000"):
        corpus(cfg, tmp_path)
    cfg.data.filters = ["adverts"]
    with pytest.raises(ValueError, match=r"data\.filters=adverts"):
        corpus(cfg, tmp_path)


def test_weights_of_other_domains_are_refused_before_text_is_read(tmp_path, monkeypatch):
    cfg = settings()
    cfg.data.weights = {"red": 1.0, "green": 1.0, "purple": 1.0}
    monkeypatch.setattr(tokens, "_encode", lambda *_: pytest.fail("text was tokenised"))
    with pytest.raises(ValueError, match="domain weights: no domain 'purple'; there are red, green, blue"):
        corpus(cfg, tmp_path)


def test_the_fluency_filter_scores_with_the_dense_model(tmp_path):
    cfg = settings()
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, vocab_size=259)).save_pretrained(tmp_path / "model")
    scores = pretrain.perplexity(pretrain.load_dense(tmp_path / "model"), tiny_tokenizer(), tiny_documents(documents=40)["red"])
    assert (scores > 1).all() and scores.isfinite().all()
    counts = []
    cfg.data.stand_for = {"red": "en_cc"}  # the filter is for web text: the other domains keep all
    for low in (1.0, float(scores.median())):
        cfg.data.filters, cfg.data.fluency_band = ["fluency"], (low, 1e6)
        counts.append(corpus(cfg, tmp_path).train["red"].num_documents)
    assert counts[0] == 32 and 8 < counts[1] < 24
    assert corpus(cfg, tmp_path).train["green"].num_documents == 32


def test_shards_alone_need_no_accelerator_and_the_job_finds_them(tmp_path, monkeypatch):
    cfg, lines = settings(), []
    cfg.trainer.accelerator, cfg.trainer.devices, cfg.data.prepare_only = "gpu", 8, True
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=259)).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    cfg.model.source, cfg.data.text.path, cfg.data.cache = str(tmp_path / "dense"), tiny_corpus(tmp_path / "text", documents=40), str(tmp_path / "tokens")
    run = types.SimpleNamespace(folder=tmp_path, resumed=False, log=lines.append, stage=lambda *_: pytest.fail("measured"))
    counted = pretrain.pretrain(cfg, run)
    monkeypatch.setattr(tokens, "_encode", lambda *_: pytest.fail("text was tokenised again"))
    cfg.trainer, cfg.data.prepare_only = settings().trainer, False
    made = pretrain.load_corpus(cfg, run, cfg.model.source, tiny_tokenizer())
    assert counted == {f"tokens/{d}": t.num_tokens for d, t in made.train.items()}


@pytest.mark.parametrize("model", [dict(kind="prune"), dict(construction="coactivation"), dict(score_scale="measured")])
def test_too_little_text_is_refused_before_anything_is_measured(tmp_path, monkeypatch, model):
    cfg, lines = settings(calibration_sequences=2000, **model), []
    corpus(cfg, tmp_path)  # shards the text
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=259)).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    cfg.model.source = str(tmp_path / "dense")
    run = types.SimpleNamespace(folder=tmp_path, resumed=False, log=lines.append, stage=lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"model\.calibration_sequences=2000 would repeat text: red has [\d,]+ training tokens and should give [\d,]+; green"):
        pretrain.pretrain(cfg, run)
    assert len(lines) == 1 and "training tokens" in lines[0]


@pytest.mark.parametrize(("model", "sequences"), [(dict(construction="kmeans"), 0), (dict(kind="prune", calibration_sequences=6), 6),
                                                  (dict(start="scratch", construction="coactivation"), 0), (dict(kind="dense"), 0)])
def test_calibration_text_is_exactly_what_was_asked_for(tmp_path, model, sequences):
    cfg = settings(**model)
    batches = pretrain.calibration_batches(cfg, corpus(cfg, tmp_path))
    assert [list(b.shape) for b in batches or []] == ([[4, 32], [2, 32]] if sequences else [])


def test_rows_that_start_alike_convert_once(tmp_path, monkeypatch):
    cfg, lines = settings(num_experts=4, num_experts_per_tok=2), []
    text = corpus(cfg, tmp_path)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=259)).save_pretrained(tmp_path / "dense")

    def build(name):
        (tmp_path / "runs" / name).mkdir(parents=True)
        run = types.SimpleNamespace(folder=tmp_path / "runs" / name, log=lines.append)
        return pretrain._build(cfg, run, "moe", tmp_path / "dense", text).state_dict()

    first = build("first")
    cfg.distill.weight, cfg.model.train = 0.5, "gates"
    second = build("second")
    assert lines[0].startswith("converted by random") and lines[1].startswith("converted as in first")
    assert all(torch.equal(first[key], second[key]) for key in first)
    cfg.seed += 1
    build("third")
    assert lines[2].startswith("converted by random")
    with monkeypatch.context() as patch:  # what the code of today would make may be something else
        patch.setattr(pretrain.env, "code", lambda *rooms: "changed")
        build("fourth")
    assert lines[3].startswith("converted by random")
    with monkeypatch.context() as patch:  # text is read (all of it) only where it decides something
        patch.setattr(pretrain, "fingerprint", lambda tokens: pytest.fail("read"))
        build("fifth")
        cfg.model.construction = "kmeans"
        build("sixth")
    made = {name: json.loads((tmp_path / "runs" / name / "converted" / pretrain.MADE).read_text()) for name in ("first", "second", "sixth")}
    assert made["first"] == made["second"] and made["first"]["tokens"] == 0 < made["first"]["seconds"]
    assert lines[4].startswith("converted as in third") and lines[5].startswith("converted by kmeans")


@pytest.mark.parametrize(("name", "harm"), [("model.safetensors", lambda b: b[:1000]), (pretrain.MADE, lambda b: b[:-3]), (pretrain.MADE, lambda b: b"{}")])
def test_a_damaged_conversion_of_another_run_is_not_taken(tmp_path, name, harm):
    cfg, lines = settings(num_experts=4, num_experts_per_tok=2), []
    text = corpus(cfg, tmp_path)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=259)).save_pretrained(tmp_path / "dense")
    for run in ("first", "second"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        pretrain._build(cfg, types.SimpleNamespace(folder=tmp_path / "runs" / run, log=lines.append), "moe", tmp_path / "dense", text)
        file = tmp_path / "runs" / run / "converted" / name
        file.write_bytes(harm(file.read_bytes()))
    assert [line.startswith("converted by random") for line in lines] == [True, True]


def test_dynamic_weights_change_twice_as_often_as_static_ones_are_validated():
    """Section 4.3: 170 steps (2.5 B tokens); section 4.4: 340."""
    assert [config.load(EXPERIMENT.Config, "llama_moe_cpt", "paper", [f"data.dynamic={rule}"], root=ROOT).val_every()
            for rule in ("none", "a", "b")] == [340, 170, 170]


def test_whole_numbers_are_weights():
    cfg = config.load(EXPERIMENT.Config, "llama_moe_cpt", "smoke", ["data.weights={red: 1, green: 0, blue: 0.5}"], root=ROOT)
    assert cfg.data.weights == {"red": 1.0, "green": 0.0, "blue": 0.5}


@pytest.mark.parametrize("words", [[], ["data.mask_documents=true", "data.block_size=32"]])
def test_settings_reach_what_they_are_for(tmp_path, words):
    cfg = config.load(EXPERIMENT.Config, "llama_moe_cpt", "smoke", ["model.balance_weight=0.5", "model.z_loss_weight=0.25", *words], root=ROOT)
    text = corpus(cfg, tmp_path)
    assert pretrain._loader(cfg, text, 2, 0, 1).mask_documents == bool(words)
    net = pretrain._convert(cfg, LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=259)), pretrain.calibration_batches(cfg, text))
    assert (net.config.balance_weight, net.config.z_loss_weight) == (0.5, 0.25)


@pytest.mark.parametrize("sweep", EXPERIMENT.SWEEPS)
@pytest.mark.parametrize("profile", ["demo", "small"])
def test_every_sweep_row_is_the_network_that_its_name_says(sweep, profile, monkeypatch):
    monkeypatch.setattr("dyn.train.plan.dense_config", lambda _: LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2))
    for entry in EXPERIMENT.SWEEPS[sweep]:
        cfg = config.load(EXPERIMENT.Config, "llama_moe_cpt", profile, row={k: v for k, v in entry.items() if k != "row"}, root=ROOT)
        plan = plan_pretraining(cfg)
        assert plan["parameters"]["total"] >= plan["parameters"]["activated (without gates)"] > 0
        if sweep != "after" and entry["row"] in ("4 of 16", "random", "mlp, noisy", "n_over_k"):  # the paper's network; `after` compares starts at half
            made = cfg.model
            assert (made.num_experts, made.num_experts_per_tok, made.construction, made.gate, made.gate_noise) == (16, 4, "random", "mlp", True)


@pytest.mark.parametrize(("word", "instead"), [("trainer.max_steps=5", "set tokens"), ("trainer.seed=5", "set seed"), ("tokens=3", "less than one step"),
                                               ("data.batch_size=0", "data.batch_size=0 must be at least 1"),
                                               ("data.block_size=1", "must be at least 2"), ("sample_tokens=-1", "must be at least 0"),
                                               ("model.balance_weight=-1", "must be at least 0"), ("seed=-1", "seed=-1 must be at least 0"),
                                               ("model.reinit=0.5", "is 0 unless model.construction=copy"),
                                               ("model.features=gate", "is for model.construction=kmeans, got random"),
                                               ("model.repair_ridge=1", "is for model.kind=prune, got moe"),
                                               ("minutes=0", "minutes=0.0 must be above 0"),
                                               ("model.attention_dropout=2", r"attention_dropout=2.0 must lie in \[0, 1\)"),
                                               ("model.kind=dense", "twice")])
def test_settings_that_would_be_ignored_or_cannot_be(word, instead):
    with pytest.raises(ValueError, match=instead):
        config.load(EXPERIMENT.Config, "llama_moe_cpt", "smoke", [word], root=ROOT)


def test_gates_alone_at_a_rate_of_zero_and_empty_prompts():
    for words, message in ((["model.train=gates", "optim.gate_lr=0"], "nothing to train at optim.gate_lr=0"), (['prompts=[""]'], "have a character at least")):
        with pytest.raises(ValueError, match=message):
            config.load(EXPERIMENT.Config, "llama_moe_cpt", "smoke", words, root=ROOT)


@pytest.mark.parametrize(("words", "what"), [(["model.kind=prune"], "kind=prune"), (["model.kind=dense", "dense_control=false"], "kind=dense"),
                                             (["model.gate=random", "model.gate_noise=false"], "gate=random"),
                                             (["model.gate=uniform", "model.gate_noise=false", "model.num_experts_per_tok=4"], "gate=uniform")])
def test_gates_that_cannot_be_trained_alone(words, what):
    config.load(EXPERIMENT.Config, "llama_moe_cpt", "smoke", words, root=ROOT)
    with pytest.raises(ValueError, match=f"model.train=gates has nothing to train: model.{what} has no gate with parameters"):
        config.load(EXPERIMENT.Config, "llama_moe_cpt", "smoke", [*words, "model.train=gates"], root=ROOT)


@pytest.mark.parametrize(("words", "kind", "rate"), [
    (["model.construction=calibrated"], "moe", 3e-6), (["model.construction=cmoe"], "moe", 3e-6),
    (["model.construction=calibrated", "optim.gate_lr=0"], "moe", 0.0),
    (["model.construction=calibrated", "optim.gate_lr=1e-4"], "moe", 1e-4), (["model.construction=calibrated", "model.train=gates"], "moe", None),
    (["model.construction=calibrated", "model.start=scratch"], "moe", None), (["model.construction=calibrated"], "dense", None),
    (["model.construction=random"], "moe", None), (["model.construction=mine"], "moe", 3e-6)])
def test_fitted_gates_train_slowly_beside_everything_else(words, kind, rate, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", METHODS["calibrated"])  # added as docs/extend.md says
    cfg = config.load(EXPERIMENT.Config, "llama_moe_cpt", "smoke", ["optim.lr=3e-4", *words], root=ROOT)
    assert gate_lr(cfg, kind) == pytest.approx(rate)


def test_a_plan_counts_what_is_trained():
    plans = [plan_pretraining(config.load(EXPERIMENT.Config, "llama_moe_cpt", "paper", [f"model.train={what}"], root=ROOT)) for what in ("all", "gates")]
    memory = [plan["memory, GiB a device (estimate)"] for plan in plans]
    assert plans[0]["parameters"] == plans[1]["parameters"]
    assert memory[1]["weights, gradients, moments"] == pytest.approx(memory[0]["weights, gradients, moments"] / 4, rel=0.05)


def test_rows_after_training_name_their_controls():
    def named(sweep, name):
        entry = next(entry for entry in EXPERIMENT.SWEEPS[sweep] if entry["row"] == name)
        cfg = config.load(EXPERIMENT.Config, "llama_moe_cpt", "small", row={k: v for k, v in entry.items() if k != "row"}, root=ROOT)
        return EXPERIMENT.controls(name, cfg)

    assert named("after", "kmeans, distilled") == ["kmeans", "prune, distilled", "dense, same tokens"]
    assert named("after", "kmeans") == ["prune", "dense, same tokens"] and named("construction", "kmeans") is None
    assert named("after", "prune, distilled") == ["prune", "dense, same tokens"] and named("after", "prune") == ["dense, same tokens"]
    assert named("after", "dense, same tokens") is None
    rows = {entry["row"] for entry in EXPERIMENT.SWEEPS["after"]}
    assert all(set(named("after", name) or []) <= rows for name in rows)


@pytest.mark.parametrize("make", [pretrain, convert])
def test_what_controls_share_are_keys_of_the_config(make):
    cfg = config.to_dict(settings() if make is pretrain else CONVERSION.Config())
    for key in make.SAME:
        found = cfg
        for part in key.split("."):
            assert part in found, key
            found = found[part]
