"""An agent on PostgreSQL is the agent on SQLite, and a killed process leaves it whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mplus_agents.store import Store, copy_agent
from tests.engine.engines import (
    State,
    check_accounts,
    check_documents,
    engine,
    prose,
    small,
    state_of,
    turn_of,
    with_version,
)
from tests.store.kill_harness import Acknowledge, InTransaction, run_until_killed

BOOK = prose(2500)


@pytest.fixture
def schema(postgres_url: str) -> Iterator[str]:
    name = f"mplus engine tests {os.getpid()}"
    yield name
    with Store(postgres_url, schema=name) as store, store._database.write() as connection:
        connection.exec_driver_sql(f'DROP SCHEMA "{name}" CASCADE')


def live(url: str, schema: str | None) -> State:
    """Remember, flush, end and come back; return the state, which has to be the same opened anew."""
    with engine(url, small(), schema=schema) as mplus:
        agent = mplus.agent("a")
        agent.remember(turn_of(40))
        agent.remember(BOOK[:4000], source_id="book")
        agent.flush()
    with engine(url, small(), schema=schema) as mplus:
        agent = mplus.agent("a", create=False)
        assert agent.remember(BOOK, source_id="book").note == "book went on at character 4,000"
        agent.clear_window()
        assert agent.stats().num_injections > 30
        assert max(agent.stats().long_term_tokens) == 70  # full, so that tokens were evicted
        state, with_its_version = state_of(agent), with_version(agent)
    with engine(url, small(), schema=schema) as mplus:
        assert with_version(mplus.agent("a", create=False)) == with_its_version
    return state


def test_an_agent_is_the_same_on_both(tmp_path: Path, postgres_url: str, schema: str) -> None:
    assert live(postgres_url, schema) == live(f"sqlite:///{tmp_path}/a.db", None)


def test_an_agent_of_a_killed_process_goes_on(postgres_url: str, schema: str) -> None:
    with engine(postgres_url, small(), schema=schema) as mplus:
        mplus.agent("a")

    def body(ack: Acknowledge, in_transaction: InTransaction) -> None:
        with engine(postgres_url, small(), schema=schema) as mplus:
            agent = mplus.agent("a", create=False)
            number = agent.stats().num_events
            while True:
                agent.remember(turn_of(60))
                number += 1
                ack(number)

    for delay_s in (0.0, 0.05, 0.2):
        killed = run_until_killed(body, delay_s=delay_s)
        with engine(postgres_url, small(), schema=schema) as mplus:
            agent = mplus.agent("a", create=False)
            check_accounts(agent)
            assert agent.stats().num_events - killed.acknowledged in (0, 1)
    with engine(postgres_url, small(), schema=schema) as mplus:
        agent = mplus.agent("a", create=False)
        agent.remember(BOOK, source_id="book")
        check_documents(agent, {"book": BOOK})


def test_an_agent_moves_from_one_to_the_other(tmp_path: Path, postgres_url: str, schema: str) -> None:
    with (
        engine(tmp_path / "a.db", small()) as here,
        engine(postgres_url, small(), schema=schema) as there,
        engine(tmp_path / "b.db", small()) as back,
    ):
        agent = here.agent("a")
        agent.remember(turn_of(40))
        agent.remember(BOOK, source_id="book")
        agent.fork("fork").remember(turn_of(100))
        for source, target in ((here, there), (there, back)):
            record = source.store.find_agent("default", "fork")
            assert record is not None
            copy_agent(source.store, record, target.store)
        expected = state_of(here.agent("fork"), is_alone=False)
        for mplus in (there, back):
            moved = mplus.agent("fork", create=False)
            assert state_of(moved, is_alone=False) == expected
            assert "was read before" in moved.remember(BOOK, source_id="book").note
