from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mplus_agents.cli.main import app

Run = Callable[..., Result]


@pytest.fixture
def mplus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, in an empty folder: mplus("ask", "Where?", stdin=b"")."""
    monkeypatch.chdir(tmp_path)
    for name in ("AGENT", "MODEL", "STORE"):
        monkeypatch.delenv(f"MPLUS_{name}", raising=False)

    def run(*arguments: str, stdin: bytes | str | None = None) -> Result:
        return CliRunner().invoke(app, [*arguments], input=stdin)

    return run


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text of several chunks."""
    path = tmp_path / "book.txt"
    lines = (f"Chapter {n}: the ferry number {n * 7} left for Bergen at {n % 24} o'clock.\n" for n in range(60))
    path.write_text("".join(lines), encoding="utf-8")
    return path
