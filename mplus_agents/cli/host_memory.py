"""How a process allocates that makes and frees the same large tensors over and over, as training on a CPU does."""

from __future__ import annotations

import ctypes
import os
import platform

# Options of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_TOP_PAD = 256 * 1024**2  # bytes that the heap grows by, at least
_CHOSEN_BY = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for the next tensors, and ask for huge pages; call it before PyTorch loads.

    glibc gives every block of 32 MiB or more back to the kernel as soon as it is freed, so that each step of training
    gets all of its large tensors in fresh pages of 4 KiB: a fifth of a step of the small recipe
    (benchmarks/training_step.py). It is a choice for a whole process, so it is the command's and not the library's.

    Returns:
        Whether it was done: with glibc, unless the environment says how to allocate.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(_CHOSEN_BY) for name in os.environ):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch: huge pages for what has 2 MiB or more
    options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: _TOP_PAD, _M_ARENA_MAX: 1}
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) == 1 for option, value in options.items())
