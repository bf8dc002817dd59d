"""Small images that every machine can have: Fashion-MNIST (as torchvision or Debian's package dataset-fashion-mnist leave it), scikit-learn's digits."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dyn.data.loader import carve
from dyn.data.store import user_cache

PACKAGE = "dataset-fashion-mnist"
CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), "validation": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
_INSIDE = (Path("usr/share/datasets/fashion-mnist"), Path("usr/share", PACKAGE))
_PATIENCE = 120  # seconds for fetching the package of 31 MB


class Arrays(NamedTuple):
    """Images in memory: pixels uint8 [N, C, H, W], labels int64 [N]. mirror: a mirrored image means the same."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    classes: list[str]
    what: str
    mirror: bool = True


def find(path: str, seed: int = 0, cache: str | Path | None = None) -> Arrays | None:
    """The arrays that `path` names: "fashion-mnist", "digits", "local" (the first where it can be had, else the second), or a folder with Fashion-MNIST's four
    files; None for any other path.

    Raises:
        ValueError: Fashion-MNIST is asked for and cannot be had, or one of its files is damaged.
    """
    if path == "digits":
        return digits(seed)
    if path not in ("fashion-mnist", "local"):
        return read_fashion(Path(path), f"Fashion-MNIST in {Path(path).name}") if _complete(Path(path)) else None
    folder, what = fashion_folder(Path(cache) if cache else user_cache())
    if folder is not None:
        return read_fashion(folder, what)
    if path == "local":
        found = digits(seed)
        return found._replace(what=f"{found.what}, since Fashion-MNIST cannot be had ({what})")
    raise ValueError(f"path='fashion-mnist': {what}; put its four files into $DYN_DATA/fashion-mnist, or take path=local or path=digits")


def fashion_folder(cache: Path) -> tuple[Path | None, str]:
    """(folder with Fashion-MNIST's files, where it is from in words), or (None, why there is none).

    Looked for, in this order: $DYN_DATA/fashion-mnist, torchvision's download in ./data or the cache, Debian's package, installed or unpacked into the cache.
    """
    root = os.environ.get("DYN_DATA")
    for place in [Path(root) / "fashion-mnist"] if root else []:
        if _complete(place):
            return place, "Fashion-MNIST, a local copy"
    for place in (Path("data"), cache):
        if _complete(place / "FashionMNIST" / "raw"):
            return place / "FashionMNIST" / "raw", "Fashion-MNIST, as torchvision fetched it"
    if (place := _of_debian(Path("/")) or _of_debian(cache / PACKAGE)) is None:
        if problem := _unpack(cache / PACKAGE):
            return None, problem
        place = _of_debian(cache / PACKAGE)
    return place, f"Fashion-MNIST, from Debian's package {PACKAGE}"


def read_fashion(folder: Path, what: str) -> Arrays:
    """Fashion-MNIST's four files, plain or gzipped: 28 x 28 pixels, ten classes. ValueError naming a file that is damaged."""
    parts = []
    for images, labels in _FILES.values():
        pixels, classes = read_idx(_file(folder, images)), read_idx(_file(folder, labels))
        if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
            raise ValueError(f"{_file(folder, images)}: images of shape {tuple(pixels.shape)} for labels of shape {tuple(classes.shape)}")
        parts += [pixels[:, None], classes.long()]
    return Arrays(*parts, CLOTHES, what)


def read_idx(path: Path) -> Tensor:
    """An array of bytes in the IDX format (two zero bytes, type 8, number of dimensions, big-endian sizes, data): uint8. ValueError for anything else."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    dims = data[3] if len(data) > 3 else 0
    shape = np.frombuffer(data[4 : 4 + 4 * dims], ">u4").tolist() if len(data) >= 4 + 4 * dims else []
    if data[:3] != b"\0\0\x08" or len(shape) != dims or not dims or len(data) != 4 + 4 * dims + int(np.prod(shape)):
        raise ValueError(f"{path}: not an array of bytes in the IDX format, or cut short ({len(data)} bytes)")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


def digits(seed: int = 0) -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels; a fifth, by seed, to validate on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(np.round(found.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target.astype(np.int64))
    train, held = (torch.from_numpy(part) for part in carve(len(labels), 0.2, seed))
    return Arrays(pixels[train], labels[train], pixels[held], labels[held], [str(i) for i in range(10)], "scikit-learn's digits", mirror=False)


def _file(folder: Path, name: str) -> Path:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), folder / name)


def _complete(folder: Path) -> bool:
    return all(_file(folder, name).is_file() for names in _FILES.values() for name in names)


def _of_debian(root: Path) -> Path | None:
    """Where the package's files lie below `root`, if they do."""
    return next((root / inside for inside in _INSIDE if _complete(root / inside)), None)


def _unpack(home: Path) -> str | None:
    """Fetch Debian's package and unpack it into `home`, which needs no rights; gives the reason when that fails."""
    if missing := [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]:
        return f"no copy is on this machine, and there is no {missing[0]} to fetch Debian's {PACKAGE} with"
    home.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=home.parent))
    try:
        for command in (["apt-get", "download", PACKAGE], ["dpkg", "-x", "*.deb", "."]):
            words = [str(next(part.glob(word))) if word == "*.deb" else word for word in command]
            done = subprocess.run(words, cwd=part, capture_output=True, text=True, timeout=_PATIENCE)
            if done.returncode:
                return f"no copy is on this machine, and `{' '.join(command)}` failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        for archive in part.glob("*.deb"):
            archive.unlink()
        if _of_debian(part) is None:
            return f"no copy is on this machine, and Debian's {PACKAGE} holds other files than it did"
        part.replace(home)
    except (OSError, subprocess.TimeoutExpired) as error:
        if _of_debian(home) is None:  # another process may have been faster
            return f"no copy is on this machine, and Debian's {PACKAGE} could not be fetched ({error})"
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return None
