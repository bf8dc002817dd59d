"""Labelled images: an ImageNet folder, hub data sets, Fashion-MNIST, scikit-learn's digits; small sets in memory, large ones read file by file.

B images a batch, N in all, C channels, H x W pixels.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dyn.data import small_images
from dyn.data.loader import Draw, Examples, carve, chosen, seeded, uniform
from dyn.data.sources import at_least_one, load_splits, resolve

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of its channels, as published; small sets are normalised by their own."""

_LIMITED = 0x6C696D  # salt of the choice of images under a limit
_SMALL = 64  # pixels: data sets of images up to this edge are kept in memory
_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(kw_only=True, slots=True)
class ImageSource:
    """Which images, at which size, augmented how.

    path: a hub id, a folder in the hub's layout or with train/<class>/<image> in it (copies below $DYN_DATA, by the whole id or its last part, come before the
        hub); "fashion-mnist"; "digits" (scikit-learn's); or "local": Fashion-MNIST where this machine has it or can have it, else digits.
    config, revision: of a hub data set.
    size: edge of the square that the network sees.
    train_limit, validation_limit: at most so many images, chosen by `seed`; None: all.
    tuning: share of the training images that is held out for choosing learning rates, by `seed`, and never reported; 0: none.
    augment: "resized" (random resized crop), "padded" (pad by an eighth of the size, crop), "none"; "auto": padded for sets in memory, else resized.
    flip: mirror every second image; None: where that keeps the meaning (not for scikit-learn's digits; set false for others).
    auto_augment, erase: timm's policy ("rand-m9-mstd0.5-inc1", say) and chance of random erasing, for images that are read file by file.
    seed: of the choices above.
    """

    path: str = "ILSVRC/imagenet-1k"
    config: str | None = None
    revision: str | None = None
    size: int = 224
    train_limit: int | None = None
    validation_limit: int | None = None
    tuning: float = 0.0
    augment: Literal["auto", "resized", "padded", "none"] = "auto"
    flip: bool | None = None
    auto_augment: str | None = None
    erase: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """ValueError for what cannot be."""
        if self.size < 8 or not 0 <= self.erase <= 1 or (self.auto_augment and self.augment == "padded"):
            raise ValueError(f"images: size={self.size} must be at least 8, erase={self.erase} in [0, 1], and auto_augment needs augment=resized, "
                             f"not {self.augment}")
        at_least_one(self, "train_limit", "validation_limit")


@dataclass
class ImageData:
    """Opened images. `what` says in words which data were taken; `tuning` is None without a held-out share."""

    train: Examples
    validation: Examples
    tuning: Examples | None
    classes: list[str]
    what: str


@dataclass
class ArrayImages:
    """Images in memory, augmented a batch at a time.

    pixels: uint8 [N, C, H, W]; one channel is shown as three. labels: int64 [N]. mean, std: by channel, of pixels in [0, 1].
    pad: pixels of black that a random crop may take in at each side. flip: mirror at random.
    """

    pixels: Tensor
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    pad: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: np.ndarray, draw: Draw | None) -> dict[str, Tensor]:
        """`images` float32 [B, 3, H, W], `labels` int64 [B]."""
        rows = torch.from_numpy(index)
        images = self.pixels[rows]
        if draw is not None and (self.pad or self.flip):
            images = self._augmented(images, torch.from_numpy(uniform(draw, index, 3)))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        images = (images.float() / 255 - mean) / std
        return {"images": images.expand(-1, 3, -1, -1).contiguous(), "labels": self.labels[rows]}

    def _augmented(self, images: Tensor, draws_B3: Tensor) -> Tensor:
        """Crop and mirror all images in one look-up."""
        height, width = images.shape[-2:]
        top_B, left_B = (draws_B3[:, :2] * (2 * self.pad + 1)).long().unbind(1)
        y_BH = top_B[:, None] + torch.arange(height)
        x_BW = left_B[:, None] + torch.arange(width)
        if self.flip:
            x_BW = torch.where(draws_B3[:, 2:] < 0.5, x_BW, x_BW.flip(1))
        b, c = torch.arange(len(images)).view(-1, 1, 1, 1), torch.arange(images.shape[1]).view(1, -1, 1, 1)
        return F.pad(images, [self.pad] * 4)[b, c, y_BH[:, None, :, None], x_BW[:, None, None, :]]


@dataclass
class FileImages:
    """Images that are decoded one by one.

    read: place -> the encoded bytes. names: place -> what to call the image in an error. labels: int64 [N].
    training, evaluation: PIL image -> float32 [3, H, W]; `training` may draw from the global generators.
    """

    read: Callable[[int], bytes]
    names: Callable[[int], str]
    labels: Tensor
    training: Callable[[Any], Tensor]
    evaluation: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: np.ndarray, draw: Draw | None) -> dict[str, Tensor]:
        """`images` float32 [B, 3, H, W], `labels` int64 [B]. ValueError that names an image which cannot be decoded."""
        images = [self._transformed(i, draw) for i in index.tolist()]
        return {"images": torch.stack(images), "labels": self.labels[torch.from_numpy(index)]}

    def _transformed(self, place: int, draw: Draw | None) -> Tensor:
        image = self.decoded(place)
        if draw is None:
            return self.evaluation(image)
        with seeded(draw, place):
            return self.training(image)

    def decoded(self, place: int) -> Any:
        """One image, as PIL has it, in RGB. ValueError that names it when it is damaged or no image."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.read(place))) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises each of them for one kind of damage or another
            raise ValueError(f"{self.names(place)}: not a readable image ({error}); remove or replace it") from error


@dataclass
class Part:
    """Some of the examples of another data set; augmentation goes by the places in the whole one."""

    whole: Examples
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, index: np.ndarray, draw: Draw | None) -> dict[str, Tensor]:
        """As the whole's."""
        return self.whole.batch(self.places[index], draw)


def open_images(source: ImageSource, *, log: Callable[[str], None] = print, cache: str | Path | None = None) -> ImageData:
    """The images of a source, ready for `ResumableLoader` (train) and `EvaluationLoader` (validation, tuning).

    Args:
        source: which images.
        log: gets a line that says which data were taken.
        cache: where what is fetched is kept; None: the user's cache folder.

    Raises:
        ValueError: nothing found, an unreadable small image, a split without labels, a label out of range, settings that do not fit.
    """
    source.check()
    if (arrays := small_images.find(source.path, source.seed, cache)) is not None:
        data = _of_arrays(arrays, source)
    else:
        folder = Path(resolve(source.path))
        splits, classes, what = _class_folders(folder, source) if (folder / "train").is_dir() and _has_classes(folder / "train") else _hub(source)
        data = _of_files(splits, classes, what, source)
    train, validation = (_limited(part, limit, source.seed) for part, limit in ((data.train, source.train_limit), (data.validation, source.validation_limit)))
    kept, held = carve(len(train), source.tuning, source.seed)
    tuning = Part(train, held) if len(held) else None
    what = (f"{data.what}: {len(kept):,} images to train on{f', {len(held):,} to choose by' if len(held) else ''}, {len(validation):,} to validate, "
            f"{len(data.classes)} classes, {source.size} x {source.size}")
    data = replace(data, train=Part(train, kept) if len(held) else train, tuning=tuning, validation=validation, what=what)
    log(f"images: {data.what}")
    return data


def mixing(num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """timm's mixup and CutMix: (images, labels [B]) -> (images, targets [B, num_classes]); draws from numpy's generator. B must be even.

    Args:
        mixup, cutmix: alpha of each one's beta distribution; 0: off, one must be on.
        label_smoothing: in the targets.
    """
    from timm.data import Mixup

    return Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=label_smoothing, num_classes=num_classes)


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    """ValueError for labels outside 0 .. num_classes - 1; test splits carry -1."""
    if bad := [i for i in (int(labels.min()), int(labels.max())) if not 0 <= i < num_classes]:
        place = int((labels == bad[0]).nonzero()[0])
        why = "; this split has no labels" if bool((labels == -1).all()) else ""
        raise ValueError(f"{where}: label {bad[0]} of example {place} lies outside 0 .. {num_classes - 1}{why}")


def _limited(data: Examples, limit: int | None, seed: int) -> Examples:
    return data if limit is None or limit >= len(data) else Part(data, chosen(len(data), limit, seed, _LIMITED))


def _of_arrays(arrays: small_images.Arrays, source: ImageSource) -> ImageData:
    """Small images in memory, normalised by the training pixels' own mean and deviation."""
    if source.auto_augment or source.erase or source.augment == "resized":
        raise ValueError(f"images: {arrays.what} is kept in memory: allowed are augment=auto, padded, none, without auto_augment and erase")
    train, validation = (_fitted(pixels, source.size) for pixels in (arrays.train, arrays.validation))
    mean, std = _moments(train)
    for split, labels in (("train", arrays.train_labels), ("validation", arrays.validation_labels)):
        check_labels(labels, len(arrays.classes), f"{arrays.what}, {split}")
    padded = source.augment != "none"
    flip = (arrays.mirror if source.flip is None else source.flip) and padded
    return ImageData(ArrayImages(train, arrays.train_labels, mean, std, pad=source.size // 8 if padded else 0, flip=flip),
                     ArrayImages(validation, arrays.validation_labels, mean, std), None, arrays.classes, arrays.what)


def _moments(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation by channel of pixels in [0, 1], from counts of the 256 values, since a float copy may not fit."""
    values = torch.arange(256, dtype=torch.float64) / 255
    share = torch.stack([torch.bincount(channel.flatten(), minlength=256).double() / channel.numel() for channel in pixels.unbind(1)])
    mean = share @ values
    deviation = (share @ values.square() - mean.square()).clamp(min=1e-6).sqrt()
    return mean.tolist(), deviation.tolist()


def _fitted(pixels: Tensor, size: int) -> Tensor:
    """uint8 [N, C, size, size]: framed in black where that takes at most a quarter more, else resampled."""
    height, width = pixels.shape[-2:]
    if height == width == size:
        return pixels
    if height == width < size <= 1.25 * height:
        before = (size - height) // 2
        return F.pad(pixels, [before, size - height - before] * 2)
    return _resampled(pixels, (size, size))


def _resampled(pixels: Tensor, size: Sequence[int]) -> Tensor:
    parts = [F.interpolate(part.float(), tuple(size), mode="bilinear", antialias=True) for part in pixels.split(4096)]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def _of_files(splits: dict[str, FileImages], classes: list[str], what: str, source: ImageSource) -> ImageData:
    for split, part in splits.items():
        check_labels(part.labels, len(classes), f"{what}, {split}")
    some = {*np.linspace(0, len(splits["train"]) - 1, 16).astype(int).tolist()}  # one picture says little
    if max(side for i in some for side in splits["train"].decoded(i).size) <= _SMALL:
        arrays = []
        for split, limit in (("train", source.train_limit), ("validation", source.validation_limit)):
            places = chosen(len(splits[split]), limit, source.seed, _LIMITED)  # what nobody will look at is not decoded
            arrays += [_pixels(splits[split], places), splits[split].labels[places]]
        return _of_arrays(small_images.Arrays(*arrays, classes, what), source)
    return ImageData(splits["train"], splits["validation"], None, classes, what)


def _pixels(part: FileImages, places: np.ndarray) -> Tensor:
    """These images, uint8 [N, 3, H, W]; those of another size than the first are resampled to its."""
    images = [torch.from_numpy(np.asarray(part.decoded(i)).copy()).permute(2, 0, 1) for i in places.tolist()]
    shape = images[0].shape
    return torch.stack([i if i.shape == shape else _resampled(i[None], shape[-2:])[0] for i in images])


def _transforms(source: ImageSource) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """(training, evaluation) for PIL images."""
    from torchvision.transforms import v2

    mean, std = IMAGENET
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    shorter = round(source.size * 256 / 224)
    evaluation = v2.Compose([v2.Resize(shorter), v2.CenterCrop(source.size), *finish])
    flip = [v2.RandomHorizontalFlip()] if source.flip is not False else []
    if source.auto_augment or source.erase:
        from timm.data import create_transform

        try:
            training = create_transform(source.size, is_training=True, hflip=0.5 if flip else 0.0, auto_augment=source.auto_augment, re_prob=source.erase,
                                        re_mode="pixel", color_jitter=None, interpolation="random", mean=mean, std=std)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"images: auto_augment={source.auto_augment!r} is no policy of timm ({error}); allowed are words such as rand-m9-mstd0.5, "
                             "augmix-m5-w4-d2, original, v0") from error
    elif source.augment in ("auto", "resized"):
        training = v2.Compose([v2.RandomResizedCrop(source.size), *flip, *finish])
    elif source.augment == "padded":
        training = v2.Compose([v2.Resize(source.size), v2.CenterCrop(source.size), v2.RandomCrop(source.size, padding=source.size // 8), *flip, *finish])
    else:
        training = evaluation
    return training, evaluation


def _has_classes(folder: Path) -> bool:
    return any(inner.is_dir() for inner in folder.iterdir())


def _class_folders(folder: Path, source: ImageSource) -> tuple[dict[str, FileImages], list[str], str]:
    """train/<class>/<image> beside val, validation or test of the same form."""
    held = next((name for name in ("val", "validation", "test") if (folder / name).is_dir()), None)
    if held is None:
        raise ValueError(f"{folder}: train has no val, validation or test beside it")
    classes = sorted(inner.name for inner in (folder / "train").iterdir() if inner.is_dir())
    if strange := sorted({inner.name for inner in (folder / held).iterdir() if inner.is_dir()} - set(classes)):
        raise ValueError(f"{folder / held}: {strange[0]} is no class of train ({len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})")
    transforms, splits = _transforms(source), {}
    for split, name in (("train", "train"), ("validation", held)):
        files = [(file, i) for i, c in enumerate(classes) for file in sorted((folder / name / c).glob("**/*")) if file.suffix.lower() in _PICTURES]
        if split == "train" and (empty := set(range(len(classes))) - {i for _, i in files}) and files:
            raise ValueError(f"{folder / name / classes[min(empty)]}: a class without images ({', '.join(sorted(_PICTURES))}); fill the folder or remove it")
        if not files:
            raise ValueError(f"{folder / name}: no images ({', '.join(sorted(_PICTURES))}) in its class folders")
        paths = [file for file, _ in files]
        splits[split] = FileImages(functools.partial(_bytes_of, paths), functools.partial(_name_of, paths), torch.tensor([i for _, i in files]), *transforms)
    return splits, classes, f"the image folder {folder.name}"


def _hub(source: ImageSource) -> tuple[dict[str, FileImages], list[str], str]:
    """A data set of the hub, or a folder in its layout: one column of images, one of class labels."""
    from datasets import ClassLabel, Image

    found = load_splits(source.path, source.config, revision=source.revision)
    held = next((name for name in ("validation", "valid", "val", "test") if name in found), None)
    if "train" not in found or held is None:
        raise ValueError(f"path={source.path!r}: needs a train split and one of validation, test; found {', '.join(found)}")
    features = found["train"].features
    pictures, named = ([c for c, f in features.items() if isinstance(f, kind)] for kind in (Image, ClassLabel))
    column = next((c for c in ("label", "fine_label", *named) if c in named), None)
    if len(pictures) != 1 or column is None:
        have = ", ".join(f"{name}: {feature}" for name, feature in features.items())
        raise ValueError(f"path={source.path!r}: needs one column of images and one of class labels; found {have}")
    transforms, splits = _transforms(source), {}
    for split, name in (("train", "train"), ("validation", held)):
        rows, labels = found[name].select_columns(pictures).cast_column(pictures[0], Image(decode=False)), found[name][column][:]
        if None in labels:
            raise ValueError(f"path={source.path!r}, {name}, row {labels.index(None)}: no label in {column!r}; remove the row, or give it one")
        splits[split] = FileImages(_Encoded(rows, pictures[0]), functools.partial(_row_name, f"path={source.path!r}, {name}"),
                                   torch.tensor(labels, dtype=torch.int64), *transforms)
    kind = "a local copy of " if Path(resolve(source.path)).is_dir() and not Path(source.path).is_dir() else ""
    name = Path(source.path).name if Path(source.path).is_dir() else source.path
    return splits, list(features[column].names), f"{kind}{name}"


# Not lambdas: where loader workers are not forked they get their data set pickled.


def _bytes_of(paths: list[Path], i: int) -> bytes:
    return paths[i].read_bytes()


def _name_of(paths: list[Path], i: int) -> str:
    return str(paths[i])


def _row_name(where: str, i: int) -> str:
    return f"{where}, row {i}"


@dataclass
class _Encoded:
    """Bytes of a column of undecoded images."""

    rows: Any
    column: str

    def __call__(self, place: int) -> bytes:
        cell = self.rows[place][self.column]
        if cell is None:
            raise ValueError("no image")
        return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
