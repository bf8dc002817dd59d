"""padnet_resnet50: what its settings mean, which rows are compared with which, what it refuses, what it plans."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from dyn import config, run, verdicts
from dyn.data.tiny import tiny_image_folder
from dyn.train import convnet
from dyn.train.convnet import SAME, local_model, open_data
from dyn.train.padnet import by_method
from dyn.train.plan_convnet import plan_convnets

ROOT = Path(__file__).parents[2]
NAME = "padnet_resnet50"
spec = importlib.util.spec_from_file_location("tests_padnet_resnet50", ROOT / "experiments" / f"{NAME}.py")
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


class Run:
    def __init__(self, folder) -> None:
        self.folder, self.lines = folder, []
        self.log = self.lines.append


def load(profile="smoke", *words, row=None):
    return config.load(module.Config, NAME, profile, words, row=row, root=ROOT)


@pytest.mark.parametrize("sweep", module.SWEEPS)
def test_every_row_stands_beside_its_controls(sweep):
    """Same name, same settings; the controls differ from the row in nothing that must be the same."""
    def told(cfg):
        return {"config": config.to_dict(cfg), "notes": {"same": SAME}}

    cfgs = {}
    for entry in module.SWEEPS[sweep]:
        cfg = load("small", row={key: value for key, value in entry.items() if key != "row"})
        assert entry["row"].startswith(cfg.model.what()) and cfgs.setdefault((entry["row"], cfg.seed), cfg) is cfg
    for (name, seed), cfg in cfgs.items():
        suffix = name.removeprefix(cfg.model.what())
        for control in cfg.model.controls():
            other = cfgs[control + suffix, seed]
            assert other.model != cfg.model and verdicts.alike(told(other)) == verdicts.alike(told(cfg)), (name, control)
    assert {seed for _, seed in cfgs} == {0, 1, 2}


def test_names_and_budgets():
    model = module.ModelConfig
    assert [model(**changes).what() for changes in (dict(method="static"), dict(method="dyconv", num_kernels=2), {}, dict(rounds=1, shuffle=True),
                                                    dict(scales="prune"), dict(criterion="magnitude"))] == [
        "static", "DY-Conv, K = 2", "PAD 0.3, K = 4", "PAD 0.3, K = 4, snip, one shot, shuffled", "PAD 0.3, K = 4, pruned", "PAD 0.3, K = 4, magnitude"]
    for change in module.SAME_STORAGE:
        assert 1 + (change["num_kernels"] - 1) * change["keep"] == pytest.approx(1.9)
    paper = load("paper")
    assert paper.images_per_step() == 256 and paper.steps(1_281_167) == 90 * (1_281_167 // 256)
    assert load("demo").steps(1_437) == load("demo").steps(60_000) == 20_000 // 64  # as many, whatever the data
    assert round(paper.model.temperature_share * 90) == 15
    assert paper.optim.decay_all and [round(share * 90) for share in paper.optim.milestones] == [30, 60, 80]


def test_what_auto_stands_for():
    demo = load("demo")
    assert [(m.backbone, m.stem) for m in (local_model(demo.model, 32, gpu) for gpu in (False, True))] == [("resnet10", "stride2"), ("resnet50", "stride1")]
    assert local_model(demo.model, 224, True).stem == "imagenet"


@pytest.mark.parametrize(("words", "message"), [
    (["keep=1.5"], r"keep=1.5 must lie in \[0, 1\]"),
    (["model.keep=-0.1"], r"keep=-0.1 must lie in \[0, 1\]"),
    (["batch_size=1"], "batch_size=1: batch norm needs at least 2 images"),
    (["num_kernels=0"], "num_kernels=0 must be at least 1"),
    (["method=dynamic"], "expected 'static' or 'dyconv' or"),
    (["beside=[pad]"], "must be methods other than model.method=pad"),
    (["trainer.max_steps=10"], "trainer.max_steps=10 would be ignored by this experiment; set epochs"),
    (["minutes=2", "trainer.devices=2"], "minutes=2.0 is for one device"),
    (["data.size=0"], "data: images: size=0 must be at least 8"), (["trainer.strategy=fsdp2", "trainer.devices=2"], "set trainer.strategy=ddp"),
    (["pretrained=true"], "stem=stride2 must be imagenet"),
    (["compact_images=0"], "compact_images=0 must be at least 1"), (["model.partition_temperature=0"], "partition_temperature=0.0 must be above 0"),
    (["temperature_share=2"], "temperature_share=2.0 must lie in"),
    (["epochs=0"], "epochs=0.0 and minutes=None must be above 0")])
def test_settings_that_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        load("smoke", *words)


@pytest.mark.parametrize(("words", "message"), [
    (["model.backbone=mixer_s32_224", "model.stem=imagenet", "beside=[]", "data.size=224"], "has no convolution left to make dyconv"),
    (["epochs=0.1"], "epochs=0.1 of 60 images are 0 steps of 10; at least 2 are needed"),
    (["data.path=nowhere/to/be/found"], "nowhere/to/be/found")])
def test_what_cannot_work_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.main([NAME, "profile=smoke", *words]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert len(said) == 1 and message in said[0]


@pytest.mark.parametrize("damage", ["corrupt", "label"])
def test_bad_images_are_named(damage, tmp_path):
    folder = Path(tiny_image_folder(tmp_path / "images", count=12))
    if damage == "corrupt":
        bad = next((folder / "train" / "stripes1").iterdir())
        bad.write_bytes(bad.read_bytes()[:50])
        message = f"stripes1/{bad.name}: not a readable image"
    else:
        (folder / "val" / "stripes2").rename(folder / "val" / "stripes9")
        message = "stripes9 is no class of train"
    with pytest.raises(ValueError, match=message):
        open_data(load("smoke", f"data.path={folder}"), Run(tmp_path))


def test_minutes_decide_steps_and_precision_from_measured_steps(tmp_path, monkeypatch):
    cfg = load("smoke", "minutes=0.011", "trainer.precision=bf16-mixed", "epochs=50", "method=dyconv")
    images = open_data(cfg, Run(tmp_path))
    monkeypatch.setattr(convnet, "interleaved", lambda runs, rounds: {"step": [0.3, 0.01, 0.2]})
    models = by_method(cfg.model, ["static"])
    monkeypatch.setattr(convnet, "build", lambda *_: torch.nn.Linear(1, 1))
    for bf16, precision, total in ((0.08, "32-true", 2 * (0.05 + 0.01)), (0.01, "bf16-mixed", 2 * (0.01 + 0.01))):
        monkeypatch.setattr(convnet, "seconds_per_micro_batch", lambda net, loss, dtype, bf16=bf16: bf16 if dtype == torch.bfloat16 else 0.05)
        run = Run(tmp_path)
        assert convnet._length(cfg, run, images, models) == {"steps": int(0.8 * 0.66 / total), "precision": precision}
        assert f"hold {int(0.8 * 0.66 / total)} of 300 steps" in run.lines[-1] and (len(run.lines) == 2) is (precision == "32-true")
    assert convnet._length(load("smoke", "epochs=50"), run, images, models) == {"steps": 300, "precision": "32-true"}


@pytest.mark.parametrize(("words", "parameters", "stored", "macs"), [  # sections 1.6 and 3.6
    ([], 120_583_980, 47_902_868, 4.1186), (["model.method=dyconv"], 97_138_424, 97_138_424, 4.1842), (["model.method=static"], 25_557_032, 25_557_032, 4.0892),
    (["model.method=odconv"], 90_670_888, 90_670_888, None), (["model.backbone=resnet18", "model.keep=0.1"], 56_396_871, 15_114_089, None)])
def test_the_plan(words, parameters, stored, macs):
    planned = plan_convnets(load("paper", *words))
    assert planned["parameters"]["total"] == parameters and planned["parameters"]["stored (compact)"] == stored
    assert macs is None or planned["MACs an image"] / 1e9 == pytest.approx(macs, abs=1e-4)
    assert planned["training"]["steps"] == 450_360


def test_the_plan_of_several_networks_and_of_unknown_data():
    demo = plan_convnets(load("demo"))
    assert {"static", "dyconv", "pad"} <= demo.keys() and demo["training"]["steps"] == 312
    assert "known once" in plan_convnets(load("small", "data.path=some/folder"))["training"]["steps"]
