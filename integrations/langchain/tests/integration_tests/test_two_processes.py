"""The main job: an agent is told facts and reads a book in one process, and another process goes on with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).with_name("two_processes.py")
_WHOLE = 10**9


def _process(command: str, folder: Path, num_chars: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(_SCRIPT), command, str(folder), str(num_chars)]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.parametrize(
    ("num_chars", "min_book_injections"),
    [
        pytest.param(300_000, 700, id="300 KB"),
        pytest.param(_WHOLE, 1_000, id="whole", marks=pytest.mark.slow),
    ],
)
def test_second_process_goes_on_with_the_same_memory(tmp_path: Path, num_chars: int, min_book_injections: int) -> None:
    told = _process("tell", tmp_path, num_chars)
    assert told["num_book_injections"] >= min_book_injections
    assert min(told["long_term_tokens"]) > 0

    found = _process("go-on", tmp_path, num_chars)
    assert len({os.getpid(), told["pid"], found["pid"]}) == 3
    assert found["num_writes_before"] == 0
    assert found["is_equal_to_first_process"]
    assert found["differs_from_fresh"] > 0.01
    assert found["differs_without_long_term"] > 0.01
    for name in ("history", "num_events", "num_injections", "long_term_tokens"):
        assert found[name] == told[name], name
    num_new = found["num_injections_after"] - found["num_injections"]
    assert num_new == found["num_writes_after"] > 0
