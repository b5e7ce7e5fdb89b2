"""What is acknowledged survives SIGKILL, and nothing half-done is seen."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

from mplus_agents.store import AgentRecord, Store
from mplus_agents.store.schema import COMMIT, INJECTION, PAGE
from tests.store.conftest import Place
from tests.store.kill_harness import Acknowledge, Body, InTransaction, run_until_killed
from tests.store.samples import assert_stored, bits, commit, create, dropped_of, evicted_of, hidden_of, snapshot_of

_SNAPSHOT_EVERY = 7


def _texts(step: int) -> list[str]:
    return [f"question {step}", f"answer {step}\x00"]


def _write_step(store: Store, agent: AgentRecord, in_transaction: InTransaction) -> AgentRecord:
    """Log and window two events, and inject the two of the step before."""
    step = agent.version
    with ExitStack() as until_committed, store.write(agent) as tx:
        until_committed.enter_context(in_transaction())
        added = [tx.add_event("message", role="user", text=text).seq for text in _texts(step)]
        tx.add_to_window(added)
        injected = tuple(event.seq for event in store.window(agent.id))
        tx.remove_from_window(injected)
        commit(tx, step, event_seqs=injected, has_snapshot=step % _SNAPSHOT_EVERY == 0)
        tx.set_source("book", next_offset=step, prefix_digest=f"{step:032x}", is_done=False)
    return tx.agent


def _writer(place: Place) -> Body:
    def body(ack: Acknowledge, in_transaction: InTransaction) -> None:
        with place.open() as store:
            agent = store.find_agent("default", "alice")
            assert agent is not None
            while True:
                agent = _write_step(store, agent, in_transaction)
                ack(agent.version)

    return body


def _check(place: Place) -> int:
    """Assert that the database holds exactly some number of whole steps, and return that number."""
    with place.open() as store:
        agent = store.find_agent("default", "alice")
        assert agent is not None
        num_steps = agent.version
        events = store.events(agent.id)
        assert [event.text for event in events] == [text for step in range(num_steps) for text in _texts(step)]
        assert [event.seq for event in events] == list(range(2 * num_steps))
        assert agent.next_event_seq == 2 * num_steps
        assert [event.seq for event in store.window(agent.id)] == [2 * num_steps - 2, 2 * num_steps - 1]
        source = store.source(agent.id, "book")
        assert source is not None
        assert (source.next_offset, source.prefix_digest) == (num_steps - 1, f"{num_steps - 1:032x}")
        _check_memory(store, agent)
        with store._database.read() as connection:
            for table, num_rows in ((COMMIT, num_steps), (INJECTION, num_steps), (PAGE, 2 * num_steps)):
                assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == num_rows
            if place.is_sqlite:
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
                assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
        return num_steps


def _check_memory(store: Store, agent: AgentRecord) -> None:
    chain = store.chain(agent.head_commit_id)
    assert list(chain.injection_ids) == list(range(agent.version))
    for step, injection in enumerate(store.injections(chain.injection_ids.values())):
        assert_stored(injection, step)
    infos = store.injection_infos(chain.injection_ids.values())
    injected = [seq for info in infos.values() for seq in info.event_seqs]
    assert injected == list(range(2 * agent.version - 2))
    snapshot_step = (agent.version - 1) // _SNAPSHOT_EVERY * _SNAPSHOT_EVERY
    assert chain.snapshot is not None
    assert chain.snapshot.step == snapshot_step
    assert chain.snapshot.arrays["theta"].tolist() == snapshot_of(snapshot_step)["theta"].tolist()
    assert [record.step for record in chain.commits] == list(range(snapshot_step + 1, agent.version))
    for record in chain.commits:
        assert record.dropped.tolist() == dropped_of(record.step).tolist()
        assert record.evicted.tolist() == evicted_of(record.step).tolist()
    hidden = store.head_hidden(agent)
    assert hidden is not None
    assert bits(hidden) == bits(hidden_of(agent.version - 1))


def _kills(folder: Path, num_kills: int, kills_per_database: int) -> Iterator[bool]:
    """For each kill, whether a transaction was open."""
    moments = random.Random(20_250_208)
    for index in range(num_kills):
        place = Place(f"sqlite:///{folder}/{index // kills_per_database}.db")
        if index % kills_per_database == 0:
            with place.open() as store:
                create(store)
        yield _kill(place, moments)


def _kill(place: Place, moments: random.Random) -> bool:
    """Kill a writer, check the database, and return whether a transaction was open."""
    killed = run_until_killed(_writer(place), delay_s=moments.uniform(0.0, 0.06))
    # One more than acknowledged: it was killed between the commit and the acknowledgement.
    assert _check(place) - killed.acknowledged in (0, 1)
    return killed.was_in_transaction


@pytest.mark.parametrize("num_kills", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_nothing_acknowledged_is_lost_and_nothing_is_half_stored(tmp_path: Path, num_kills: int) -> None:
    hits = list(_kills(tmp_path, num_kills, kills_per_database=10))
    assert len(hits) == num_kills
    assert sum(hits) >= num_kills / 3


def test_nothing_is_lost_in_postgresql_when_its_clients_are_killed(postgres_place: Place) -> None:
    with postgres_place.open() as store:
        create(store)
    moments = random.Random(20_250_208)
    hits = [_kill(postgres_place, moments) for _ in range(12)]
    assert sum(hits) >= 4


def test_a_process_that_ends_by_itself_is_reported() -> None:
    def body(ack: Acknowledge, in_transaction: InTransaction) -> None:
        raise RuntimeError("broken body")

    with pytest.raises(AssertionError, match="broken body"):
        run_until_killed(body, delay_s=0.0)
