from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.langchain.tests.chains import engine
from mplus_agents import Agent, MPlus
from mplus_agents.engine.registry import close_shared_engines


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
def url(tmp_path: Path) -> Iterator[str]:
    """A new database for shared engines, which are closed afterwards."""
    yield f"sqlite:///{tmp_path / 'shared.db'}"
    close_shared_engines()
