"""What a command says to its process, and what it makes once."""

import os
import platform
import subprocess
import sys

import pytest

from dyn import env

FAULTS = """
import ctypes, resource
from dyn.env import keep_freed_memory
print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    room = libc.malloc(48_000_000)  # more than glibc ever keeps of its own
    ctypes.memset(room, 1, 48_000_000)
    libc.free(room)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("theirs", [{}, {"MALLOC_PERTURB_": "0"}])
def test_freed_memory_is_kept_unless_the_user_has_settings(theirs):
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))} | theirs
    done, first, again = subprocess.run([sys.executable, "-c", FAULTS], env=environ, capture_output=True, text=True, check=True).stdout.split()
    assert done == str(not theirs) and (int(again) < int(first) / 4) == (not theirs)  # pages that are there already are not faulted in again


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "made"

    def full(part):
        part.mkdir()
        (part / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        env.once(folder, full, rank=0)
    assert [path.name for path in tmp_path.iterdir()] == ["made.failed"], "nothing half-made stays"
    with pytest.raises(RuntimeError, match="rank 0 could not make made"):
        env.once(folder, full, rank=1)
    env.once(folder, lambda part: part.mkdir(), rank=0)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    env.once(folder, full, rank=0)  # it is there
    env.once(folder, full, rank=1)
