"""The files of a cache folder at any fsspec address: written whole or not at all, and read from local disk."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


def user_cache() -> Path:
    """Where this user's copies are kept: $DYN_CACHE, else dyn in the user's cache folder."""
    return Path(os.environ.get("DYN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyn")


class Store:
    """A folder at an fsspec address. Names are relative, with slashes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.fs, self.root = url_to_fs(address)
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def index(self) -> dict | None:
        """What index.json holds; None: there is none. ValueError when it cannot be read."""
        try:
            with self.fs.open(f"{self.root}/index.json", "rb") as file:
                index = json.loads(file.read())
            if not isinstance(index, dict):
                raise ValueError(f"a {type(index).__name__} and no object")
            return index
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{self.address}/index.json is no index ({error}); delete {self.address} to make its shards again") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that it is there whole or not at all, also after a kill. OSError (a full disk, say) leaves no part of it."""
        target = f"{self.root}/{name}"
        try:
            if not self.is_local:  # object stores show an object when it is whole
                self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.fs.pipe_file(target, data)
                return
            part = Path(target + ".part")
            part.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(target)
            except OSError:
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            message = f"cannot write {name} ({len(data):,} bytes) in {self.address}: {why}; finished shards are kept, run again to go on"
            raise OSError(error.errno, message) from error

    def lock(self) -> AbstractContextManager:
        """Held by one process at a time, and let go when it dies. Remote folders have none: let one process build there."""
        if not self.is_local:
            return nullcontext()
        from filelock import FileLock

        Path(self.root).mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.root}/.lock")

    def arrays(self, files: Mapping[str, tuple[np.dtype, tuple[int, ...], int]], cache: str | None, verify: bool = True) -> dict[str, np.memmap]:
        """Memory maps of files (name -> dtype, shape, CRC-32), of copies in `cache` where the folder is remote.

        Raises:
            ValueError: one is missing, empty, cut short, or (with `verify`, about a second a gigabyte) changed.
        """
        sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape, _) in files.items()}
        folder, maps = self._local_copy(sizes, cache), {}
        for name, (dtype, shape, crc32) in files.items():
            path, problem = folder / name, None
            if not path.is_file():
                problem = "missing"
            elif not sizes[name] or path.stat().st_size != sizes[name]:
                problem = f"empty or cut short: {path.stat().st_size} bytes, the index says {sizes[name]}"
            elif verify and not self._intact(folder, name, crc32):
                problem = "corrupt: its checksum differs from the index's"
            if problem:
                raise ValueError(f"{name} in {self.address} is {problem}; delete {self.address} to make its shards again")
            maps[name] = np.memmap(path, dtype, "r", shape=shape)
        return maps

    def _local_copy(self, files: dict[str, int], cache: str | None) -> Path:
        """A local folder with these files (name -> bytes): this one, or a copy in `cache` for a remote one. Copies of the right size stay."""
        if self.is_local:
            return Path(self.root)
        address = self.fs.unstrip_protocol(self.root)  # whole: another remote may have a folder of the same name
        folder = Path(cache or user_cache() / "tokens") / f"{self.root.rpartition('/')[2]}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"
        for name, size in files.items():
            target = folder / name
            if self.fs.exists(f"{self.root}/{name}") and not (target.is_file() and target.stat().st_size == size):
                self._fetch(name, target)
        return folder

    def _intact(self, folder: Path, name: str, crc32: int) -> bool:
        """Whether a file of `_local_copy` has this checksum; a copy that has not may be of an earlier state of the remote: it is fetched once more."""
        if _crc32(folder / name) == crc32:
            return True
        if self.is_local or not self.fs.exists(f"{self.root}/{name}"):
            return False
        self._fetch(name, folder / name)
        return _crc32(folder / name) == crc32

    def _fetch(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            self.fs.get_file(f"{self.root}/{name}", str(part))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def _crc32(path: Path) -> int:
    if not path.stat().st_size:  # which cannot be mapped
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return zlib.crc32(view)
