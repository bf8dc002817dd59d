"""A whole run of padnet_resnet50 in this process: what it stores, exports and reports, on the smoke profile."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dyn.data.images import ImageSource, open_images
from dyn.models.resnet import make_network
from dyn.nn.surgery import compact
from dyn.run import main
from dyn.train.padnet import compare_forms, first_batches

NAME = "padnet_resnet50"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert main([NAME, "profile=smoke", f"runs={runs}", "beside=[condconv]", "epochs=1.0", "timing_rounds=1", "model.scales=s"]) == 0
    return next(runs.glob(f"{NAME}/*"))


def test_the_compact_form_is_what_the_formula_says(folder):
    result = json.loads((folder / "result.json").read_text())
    cost, metrics, model = result["cost"], result["metrics"], result["config"]["model"]
    positions = 4_890_624  # of ResNet-10's convolutions without the stem
    static = int((1 - model["keep"]) * positions)
    rest = cost["active_parameters"] - positions + cost["gate_parameters"]
    assert cost["stored_parameters"] == metrics["compact/parameters"] == positions + (model["num_kernels"] - 1) * (positions - static) + rest
    assert metrics["compact/accuracy"] == metrics["compact/trained accuracy"] and metrics["compact/same answers"] == 1
    assert metrics["compact/difference"] < 1e-4
    assert len(metrics["dynamic share by layer"]) == 11 and metrics["dynamic share"] == 0.3
    assert cost["condconv"]["stored_parameters"] == cost["condconv"]["total_parameters"] > cost["stored_parameters"]


def test_the_export_loads_by_what_it_says(folder):
    about = json.loads((folder / "export" / "model.json").read_text())
    assert about["compact"]
    net = compact(make_network(**about["network"]))
    net.load_state_dict(load_file(folder / "export" / "model.safetensors"))
    held = open_images(ImageSource(path=str(folder / "tiny"), size=16), log=lambda _: None).validation
    batch = held.batch(torch.arange(len(held)).numpy(), None)
    with torch.no_grad():
        right = (net.eval()(batch["images"]).argmax(1) == batch["labels"]).double().mean().item()
    assert right == json.loads((folder / "result.json").read_text())["metrics"]["compact/accuracy"]
    with torch.no_grad():
        expanded = compact(make_network(**about["network"]), expand=True)
        expanded.load_state_dict(load_file(folder / "export" / "model.safetensors"))
        torch.testing.assert_close(expanded.eval()(batch["images"]), net(batch["images"]))


def test_a_compact_form_that_is_another_network_fails_the_run(folder):
    held = open_images(ImageSource(path=str(folder / "tiny"), size=16), log=lambda _: None)
    nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 3)) for _ in range(2)]

    def compared(*forms):
        return compare_forms(*forms, lambda form, batch: form(batch["images"]), first_batches(held.validation, 20, 7, torch.device("cpu")))

    assert compared(nets[0], nets[0])["same answers"] == 1
    with pytest.raises(RuntimeError, match="the compact form's logits differ by"):
        compared(*nets)


def test_the_report_says_what_was_done(folder):
    text = (folder / "report.md").read_text()
    assert "images: the image folder tiny: 60 images to train on, 20 to validate" in text and "one seed on 1 CPU thread" in text
    assert "| PAD 0.3, K = 2, snip, 2 rounds, scale s only, temperature_share 0.5, compact |" in text and "### Not tested at this scale" in text
    for plot in ("accuracy", "attention", "dynamic", "entropy"):
        assert (folder / "plots" / f"{plot}.png").stat().st_size > 1000 and f"![{plot}]" in text
    assert not (folder / "start").exists()


def test_attention_over_training_is_in_the_metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by = {key: {line["stage"] for line in lines if key in line} for key in ("attention/entropy", "train/temperature", "val/accuracy")}
    assert by == {"attention/entropy": {"condconv", "pad"}, "train/temperature": {"pad"}, "val/accuracy": {"condconv", "pad"}}
