"""What is freed is kept for the next tensors, in the process that asked for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
from mplus_agents.cli.host_memory import keep_freed_memory
assert "torch" not in sys.modules
print(keep_freed_memory() if sys.argv[1] == "kept" else None)
import torch
def faults():
    for _ in range(20):
        torch.ones(16 * 1024**2)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(faults() - before)
"""


def run(kind: str, **environment: str) -> tuple[str, int]:
    """Return what `keep_freed_memory` said, and how often the kernel had to give pages to twenty large tensors."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    command = [sys.executable, "-c", _PROGRAM, kind]
    done = subprocess.run(command, env={**outside, **environment}, capture_output=True, text=True, check=True)
    answer, num_faults = done.stdout.split()
    return answer, int(num_faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the options are glibc's")
def test_large_tensors_get_the_memory_of_those_before() -> None:
    answer, num_faults = run("kept")
    assert answer == "True"
    assert num_faults < 100
    assert run("default")[1] > 5 * num_faults + 100


def test_the_environment_has_the_say() -> None:
    assert run("kept", MALLOC_TOP_PAD_="131072")[0] == "False"
