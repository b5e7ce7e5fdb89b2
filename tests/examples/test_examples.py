"""The examples run as they are, each as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def start(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "integrations/langchain/src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )


def run(folder: Path, name: str, *arguments: str) -> str:
    result = start(folder, name, *arguments)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def test_conversation_chain_goes_on_in_a_second_run(tmp_path: Path) -> None:
    first, second = (int(re.findall(r"(\d+) entries", run(tmp_path, "conversation_chain.py"))[0]) for _ in range(2))
    assert first >= 4
    assert second >= first + 4
    assert (tmp_path / "mplus.db").is_file()


def test_lifelong_agent_grows_over_three_processes(tmp_path: Path) -> None:
    output = run(tmp_path, "lifelong_agent.py")
    found = [int(number) for number in re.findall(r"session \d: (\d+) injections", output)]
    left = [int(number) for number in re.findall(r"now (\d+) injections", output)]
    assert found == [0, *left[:-1]]
    assert left[0] < left[1] < left[2]
    assert list(tmp_path.iterdir()) == []


def check_demo(output: str) -> None:
    pids = re.findall(r"\(pid (\d+)\)", output)
    assert len(set(pids)) == 2
    assert output.count("holds") == 3
    saved, restored = re.search(r"with this memory: (\w+)", output), re.search(r"restored memory: (\w+)", output)
    assert saved is not None
    assert restored is not None
    assert saved[1] == restored[1]
    assert "5 of 5 answers from memory are right, 0 with Θ off" in output


def test_demo_on_a_part_of_the_text(tmp_path: Path) -> None:
    check_demo(run(tmp_path, "demo.py", "--quick"))


@pytest.mark.slow
def test_demo_fails_when_the_memory_is_not_the_same(tmp_path: Path) -> None:
    saved = tmp_path / "logits.npy"
    arguments = ["--store", f"sqlite:///{tmp_path / 'demo.db'}", "--saved", str(saved), "--quick", "--process"]
    run(tmp_path, "demo.py", *arguments, "1")
    data = saved.read_bytes()
    saved.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    result = start(tmp_path, "demo.py", *arguments, "2")
    assert result.returncode == 1
    assert result.stdout.count("FAILS") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_demo_in_under_three_minutes(tmp_path: Path) -> None:
    started = time.monotonic()
    check_demo(run(tmp_path, "demo.py"))
    assert time.monotonic() - started < 180
