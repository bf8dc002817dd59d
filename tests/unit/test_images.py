"""Images: where they come from, what is done to them, what is refused. No network, no real data; real copies only where DYN_DATA names some."""

import gzip
import os
import subprocess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from dyn.data import small_images
from dyn.data.images import ArrayImages, FileImages, ImageSource, Part, check_labels, mixing, open_images
from dyn.data.loader import Draw, EvaluationLoader, ResumableLoader
from dyn.data.tiny import tiny_image_folder, tiny_pictures

silent = dict(log=lambda _: None)


@pytest.fixture(autouse=True)
def _no_fetching(monkeypatch, tmp_path):
    """No apt-get, no copies of this machine."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a test started a process"))
    monkeypatch.setattr(small_images.shutil, "which", lambda _: None)
    monkeypatch.setattr(small_images, "_INSIDE", (Path("nowhere"),))
    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    if "real" not in os.environ.get("PYTEST_CURRENT_TEST", ""):
        monkeypatch.delenv("DYN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def write_idx(path: Path, array: np.ndarray, packed: bool = False) -> None:
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if packed else data)


def fake_fashion(folder: Path, packed: bool = False) -> np.ndarray:
    rng = np.random.default_rng(0)
    ending = ".gz" if packed else ""
    train = rng.integers(0, 256, (40, 28, 28))
    for name, pixels in (("train", train), ("t10k", rng.integers(0, 256, (20, 28, 28)))):
        write_idx(folder / f"{name}-images-idx3-ubyte{ending}", pixels, packed)
        write_idx(folder / f"{name}-labels-idx1-ubyte{ending}", np.arange(len(pixels)) % 10, packed)
    return train


def test_fashion_mnist_from_each_of_its_places(tmp_path, monkeypatch):
    train = fake_fashion(tmp_path / "data" / "FashionMNIST" / "raw")
    found = small_images.find("fashion-mnist")
    assert found.what == "Fashion-MNIST, as torchvision fetched it" and np.array_equal(found.train[:, 0], train)
    assert found.train_labels.tolist()[:3] == [0, 1, 2]
    monkeypatch.setattr(small_images, "_INSIDE", (Path("usr/share/x"),))
    fake_fashion(tmp_path / "cache" / "dataset-fashion-mnist" / "usr" / "share" / "x", packed=True)
    assert "torchvision" in small_images.find("local").what
    (tmp_path / "data" / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    assert small_images.find("local").what == "Fashion-MNIST, from Debian's package dataset-fashion-mnist"
    fake_fashion(tmp_path / "mine" / "fashion-mnist")
    monkeypatch.setenv("DYN_DATA", str(tmp_path / "mine"))
    assert small_images.find("fashion-mnist").what == "Fashion-MNIST, a local copy"


def test_debians_package_is_fetched_and_unpacked_without_rights(tmp_path, monkeypatch):
    commands = []

    def run(words, cwd, **_):
        commands.append(words[:2])
        if words[0] == "apt-get":
            (cwd / "x.deb").write_bytes(b"")
        else:
            fake_fashion(cwd / "nowhere", packed=True)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(small_images.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):  # the second time it is there
        assert small_images.find("local").what == "Fashion-MNIST, from Debian's package dataset-fashion-mnist"
    assert commands == [["apt-get", "download"], ["dpkg", "-x"]]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["dataset-fashion-mnist"] and not list((tmp_path / "cache").rglob("*.deb"))


def test_digits_are_the_last_resort_and_the_reason_is_said(monkeypatch):
    assert small_images.find("local").what == ("scikit-learn's digits, since Fashion-MNIST cannot be had (no copy is on this machine, and there is no apt-get "
                                               "to fetch Debian's dataset-fashion-mnist with)")
    with pytest.raises(ValueError, match=r"path='fashion-mnist': no copy is on this machine.*path=local or path=digits"):
        small_images.find("fashion-mnist")
    monkeypatch.setattr(small_images.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 100, "", "E: Unable to locate package\n"))
    assert "`apt-get download dataset-fashion-mnist` failed: E: Unable to locate package" in small_images.find("local").what


def test_digits_are_opened():
    lines = []
    data = open_images(ImageSource(path="digits", size=32, tuning=0.1), log=lines.append)
    assert (len(data.train), len(data.tuning), len(data.validation), len(data.classes)) == (1294, 144, 359, 10)
    assert lines == [f"images: {data.what}"] and data.what.startswith("scikit-learn's digits: 1,294 images to train on, 144 to choose by, 359 to validate")
    batch = data.validation.batch(np.arange(64), None)
    assert batch["images"].shape == (64, 3, 32, 32) and batch["images"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    whole = data.train.whole
    assert not whole.flip and whole.pad == 4  # a mirrored digit is none
    normal = whole.batch(np.arange(len(whole)), None)["images"]
    assert normal.mean().abs() < 1e-3 and normal.std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_with_fashion_mnists_files(tmp_path, packed):
    train = fake_fashion(tmp_path / "f", packed)
    data = open_images(ImageSource(path=str(tmp_path / "f"), size=32, augment="none", train_limit=30, validation_limit=5), **silent)
    assert (len(data.train), len(data.validation)) == (30, 5) and data.train.whole.pixels.shape == (40, 1, 32, 32)
    assert np.array_equal(data.train.whole.pixels[:, 0, 2:-2, 2:-2], train) and not data.train.whole.pixels[:, :, :2].any()  # framed, not stretched
    assert list(data.train.places) == sorted(data.train.places) != list(range(30))


def test_crop_and_mirror_are_what_they_are_one_by_one():
    pixels, labels = tiny_pictures(30)
    images = ArrayImages(pixels, labels, [0.0] * 3, [1.0] * 3, pad=3, flip=True)
    index, draw = np.arange(30), Draw(5, 2)
    batch = images.batch(index, draw)["images"] * 255
    padded = torch.nn.functional.pad(pixels, [3] * 4)
    places = set()
    for got in range(30):
        fits = [(top, left, mirrored) for top in range(7) for left in range(7) for mirrored in (False, True)
                if torch.equal((padded[got, :, top:top + 16, left:left + 16].flip(-1) if mirrored else padded[got, :, top:top + 16, left:left + 16]).float(),
                               batch[got].round())]
        assert len(fits) == 1
        places.add(fits[0])
    assert len(places) > 20 and {m for _, _, m in places} == {True, False}
    alone = torch.cat([images.batch(np.array([i]), draw)["images"] for i in range(30)])
    assert torch.equal(alone * 255, batch)
    assert not torch.equal(images.batch(index, Draw(5, 3))["images"] * 255, batch)
    assert torch.equal(images.batch(index, None)["images"], pixels.float() / 255)


def test_an_image_folder_in_memory(tmp_path):
    data = open_images(ImageSource(path=tiny_image_folder(tmp_path / "stripes"), size=16, tuning=0.2), **silent)
    assert data.classes == ["stripes0", "stripes1", "stripes2"] and (len(data.train), len(data.tuning), len(data.validation)) == (48, 12, 20)
    assert isinstance(data.train, Part) and isinstance(data.train.whole, ArrayImages) and data.what.startswith("the image folder stripes")
    assert set(data.train.places).isdisjoint(data.tuning.places)


@pytest.mark.parametrize("settings", [dict(), dict(auto_augment="rand-m9-mstd0.5-inc1", erase=0.5), dict(augment="padded")])
def test_large_images_are_read_one_by_one_and_workers_do_not_matter(tmp_path, settings):
    data = open_images(ImageSource(path=tiny_image_folder(tmp_path / "large", count=12, size=80), size=48, **settings), **silent)
    assert isinstance(data.train, FileImages)
    runs = [list(ResumableLoader(data.train, batch_size=4, seed=1, num_batches=4, workers=w)) for w in (0, 1)]
    assert all(torch.equal(a["images"], b["images"]) and torch.equal(a["index"], b["index"]) for a, b in zip(*runs, strict=True))
    assert runs[0][0]["images"].shape == (4, 3, 48, 48) and runs[0][0]["images"].abs().max() < 5
    first, again = (data.train.batch(np.array([3]), Draw(1, epoch))["images"] for epoch in (0, 1))
    assert not torch.equal(first, again)
    assert ForkingPickler.dumps(data.train), "to workers that are not forked"
    held = [list(EvaluationLoader(data.validation, 3)) for _ in range(2)]
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(*held, strict=True))


def test_a_corrupt_image_is_named(tmp_path):
    folder = Path(tiny_image_folder(tmp_path / "large", count=6, size=80))
    bad = folder / "train" / "stripes1" / "0999.png"
    whole = next((folder / "train" / "stripes1").glob("*.png")).read_bytes()
    bad.write_bytes(whole)
    data = open_images(ImageSource(path=str(folder), size=32), **silent)
    bad.write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"stripes1.0999\.png: not a readable image"):
        open_images(ImageSource(path=str(folder), size=32), **silent)  # where it is one of those that are looked at
    with pytest.raises(ValueError, match=r"stripes1.0999\.png: not a readable image"):
        data.train.batch(np.arange(len(data.train)), None)
    bad.write_text("not an image")
    with pytest.raises(ValueError, match=r"stripes1.0999\.png: not a readable image"):
        list(ResumableLoader(data.train, batch_size=len(data.train), seed=0))
    with pytest.raises(ValueError, match=r"^\S*stripes1.0999\.png: not a readable image"):  # no traceback of the worker's before it
        list(ResumableLoader(data.train, batch_size=len(data.train), seed=0, workers=1))


def test_an_image_that_claims_to_be_huge_is_named(tmp_path, monkeypatch):
    data = open_images(ImageSource(path=tiny_image_folder(tmp_path / "large", count=6, size=80), size=32), **silent)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"png: not a readable image \(Image size .* exceeds limit"):
        data.train.decoded(0)


def test_a_folder_in_the_hubs_layout(tmp_path, monkeypatch):
    """Parquet with encoded images, as data sets of the hub have it, found below DYN_DATA by the last part of the id."""
    datasets = pytest.importorskip("datasets")
    pixels, labels = tiny_pictures(24)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for split, part in (("train", slice(0, 18)), ("test", slice(18, 24))):
        rows = {"img": list(pixels[part].permute(0, 2, 3, 1).numpy()), "label": labels[part].tolist()}
        path = tmp_path / "mine" / "stripes" / "plain_text" / f"{split}-0.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    (tmp_path / "mine" / "stripes" / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain_text\n  data_files:\n  - split: train\n    path: plain_text/train-*\n"
        "  - split: test\n    path: plain_text/test-*\n---\n")
    monkeypatch.setenv("DYN_DATA", str(tmp_path / "mine"))
    data = open_images(ImageSource(path="someone/stripes", size=16, augment="none", train_limit=9), **silent)
    assert data.what.startswith("a local copy of someone/stripes: 9 images to train on") and data.classes == ["a", "b", "c"]
    kept = data.train.batch(np.arange(9), None)
    assert len(data.train) == 9 and set(kept["labels"].tolist()) <= {0, 1, 2}
    assert torch.equal(data.validation.pixels, pixels[18:]) and data.validation.labels.tolist() == labels[18:].tolist()
    with pytest.raises(ValueError, match="no data set; looked for a folder"):
        open_images(ImageSource(path="someone/else"), **silent)
    rows = {"img": [None, *pixels[19:].permute(0, 2, 3, 1).numpy()], "label": labels[18:].tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"path='someone/stripes', test, row 0: not a readable image \(no image\)"):
        open_images(ImageSource(path="someone/stripes", size=16), **silent)
    rows = {"img": list(pixels[18:].permute(0, 2, 3, 1).numpy()), "label": [0, 1, None, 0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    with pytest.raises(ValueError, match="path='someone/stripes', test, row 2: no label in 'label'"):
        open_images(ImageSource(path="someone/stripes", size=16), **silent)


def test_labels_out_of_range():
    check_labels(torch.tensor([0, 1, 2]), 3, "x")
    with pytest.raises(ValueError, match=r"x: label 3 of example 1 lies outside 0 \.\. 2$"):
        check_labels(torch.tensor([0, 3, 2]), 3, "x")
    with pytest.raises(ValueError, match=r"label -1 of example 0 .*this split has no labels"):
        check_labels(torch.tensor([-1, -1]), 3, "x")


def test_a_label_out_of_range_in_a_file(tmp_path):
    fake_fashion(tmp_path / "f")
    write_idx(tmp_path / "f" / "t10k-labels-idx1-ubyte", np.array([10] * 20))
    with pytest.raises(ValueError, match="validation: label 10 of example 0 lies outside"):
        open_images(ImageSource(path=str(tmp_path / "f"), size=28), **silent)


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: b"\0\0\x09" + data[3:], lambda data: b"", lambda data: data + b"x"])
def test_damaged_idx(tmp_path, damage):
    path = tmp_path / "images"
    write_idx(path, np.zeros((3, 4, 4)))
    assert small_images.read_idx(path).shape == (3, 4, 4)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"images: not an array of bytes in the IDX format, or cut short"):
        small_images.read_idx(path)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(size=4), "size=4 must be at least 8"), (dict(erase=2.0), r"erase=2.0 in \[0, 1\]"), (dict(auto_augment="rand-m9", size=32), "is kept in memory"),
    (dict(augment="resized", size=32), "allowed are augment=auto, padded, none"), (dict(train_limit=0, size=32), "train_limit=0 must be at least 1"),
    (dict(tuning=1.0, size=32), "cannot be held out"),
])
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        open_images(ImageSource(path="digits", **settings), **silent)


def test_an_augmentation_that_timm_does_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"auto_augment='nonsense' is no policy of timm \(.*allowed are words such as rand-m9"):
        open_images(ImageSource(path=tiny_image_folder(tmp_path / "f", count=6, size=80), auto_augment="nonsense"), **silent)


def test_folders_that_do_not_fit(tmp_path):
    folder = Path(tiny_image_folder(tmp_path / "f", count=6))
    (folder / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: a class without images"):
        open_images(ImageSource(path=str(folder)), **silent)
    (folder / "train" / "empty").rmdir()
    (folder / "val" / "other").mkdir()
    with pytest.raises(ValueError, match="other is no class of train"):
        open_images(ImageSource(path=str(folder)), **silent)
    (folder / "val").rename(folder / "held")
    with pytest.raises(ValueError, match="train has no val, validation or test beside it"):
        open_images(ImageSource(path=str(folder)), **silent)


def test_mixing_makes_targets_that_sum_to_one():
    np.random.seed(0)
    mix = mixing(3, mixup=0.2, label_smoothing=0.1)
    _, targets = mix(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert targets.shape == (4, 3) and torch.allclose(targets.sum(1), torch.ones(4))


def real_cifar():
    root = os.environ.get("DYN_DATA")
    return root and (Path(root) / "cifar10").is_dir()


@pytest.mark.slow
@pytest.mark.skipif(not real_cifar(), reason="needs a copy of CIFAR-10 below DYN_DATA")
def test_real_cifar10():
    data = open_images(ImageSource(path="uoft-cs/cifar10", size=32, train_limit=200, validation_limit=100), **silent)
    assert data.what.startswith("a local copy of uoft-cs/cifar10: 200 images") and data.classes[0] == "airplane"
    assert data.train.batch(np.arange(200), Draw(0, 0))["images"].shape == (200, 3, 32, 32)
