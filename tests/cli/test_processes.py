"""The command line as a process of its own: start-up, exit codes, interrupts, terminals."""

from __future__ import annotations

import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

# Ctrl-C must work even where the tests were started with it ignored, as background jobs are.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from mplus_agents.cli.main import main; main()"
)


def run(folder: Path, *arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys, mplus_agents.cli.main; "
        "print(sorted({'torch', 'transformers', 'sqlalchemy', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_read_then_ask_in_another_process(tmp_path: Path) -> None:
    read = run(tmp_path, "read", "-", "--json", stdin=b"Maya lives in Oslo. " * 60)
    assert read.returncode == 0
    assert json.loads(read.stdout)[0]["num_injections"] > 1
    asked = run(tmp_path, "ask", "Where does Maya live?", "--max-new-tokens", "8", "--json")
    assert asked.returncode == 0
    assert json.loads(asked.stdout)["answer"]
    assert asked.stderr == b""


def test_an_expected_error_has_no_traceback(tmp_path: Path) -> None:
    result = run(tmp_path, "stats", "--agent", "nobody")
    assert result.returncode == 1
    assert result.stdout == b""
    assert result.stderr == b"mplus: error: there is no database 'mplus.db'; `mplus read` and `mplus chat` create one\n"


def test_wrong_usage(tmp_path: Path) -> None:
    result = run(tmp_path, "read")
    assert result.returncode == 2
    assert b"Traceback" not in result.stderr


def test_a_terminal_without_greek_letters(tmp_path: Path) -> None:
    run(tmp_path, "read", "-", stdin=b"Maya lives in Oslo.")
    result = run(tmp_path, "stats", PYTHONIOENCODING="latin-1")
    assert result.returncode == 0
    assert b"short-term memory ?" in result.stdout


def num_commits(database: Path) -> int:
    if not database.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM mplus_commit").fetchone()[0])
    except sqlite3.OperationalError:  # no tables yet
        return 0


def test_an_interrupted_read_goes_on_where_it_stopped(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Ferry {n} leaves for Bergen at {n % 24} o'clock.\n" for n in range(2_500)))
    command = [sys.executable, "-c", PROGRAM, "read", "book.txt"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        while num_commits(tmp_path / "mplus.db") < 2 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == b""
    assert b"interrupted; what was acknowledged is safe" in errors
    assert b"Traceback" not in errors
    safe = num_commits(tmp_path / "mplus.db")
    assert safe >= 2
    again = run(tmp_path, "read", "book.txt", "--json")
    receipt = json.loads(again.stdout)[0]
    assert "went on at character" in receipt["note"]
    assert num_commits(tmp_path / "mplus.db") == safe + receipt["num_injections"]


@pytest.mark.parametrize("ending", [b"/quit\n", b"\x04"])
def test_chat_at_a_terminal(tmp_path: Path, ending: bytes) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, "chat", "--max-new-tokens", "8"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    with process:
        os.write(ours, b"Maya lives in Oslo.\n/help\n" + ending)
        output, errors = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    assert b"/quit ends" in errors
    assert b"unknown command '/help'" in errors
    assert output.strip()
    assert num_events(tmp_path / "mplus.db") == 2


def num_events(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute("SELECT count(*) FROM mplus_event").fetchone()[0])
