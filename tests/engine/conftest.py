from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mplus_agents import Agent, MPlus
from tests.engine.engines import engine, small


@pytest.fixture
def mplus(tmp_path: Path) -> Iterator[MPlus]:
    """An engine on a new database."""
    with engine(tmp_path / "mplus.db") as opened:
        yield opened


@pytest.fixture
def alice(mplus: MPlus) -> Agent:
    """An agent without memory."""
    return mplus.agent("alice")


@pytest.fixture
def ada(tmp_path: Path) -> Iterator[Agent]:
    """An agent whose θ and Θ are small."""
    with engine(tmp_path / "small.db", small()) as opened:
        yield opened.agent("ada")
