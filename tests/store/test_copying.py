"""An agent in another database is the agent, with all it has and nothing of others."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from mplus_agents.errors import AgentNotFoundError, ConflictError, CorruptBlobError, InvalidInputError, StoreError
from mplus_agents.store import AgentRecord, Store, copy_agent
from mplus_agents.store.schema import METADATA
from tests.store.conftest import Place
from tests.store.samples import bits, commit, create, grow

_SNAPSHOTS = frozenset({2, 5})


def contents(store: Store, agent: AgentRecord) -> dict[str, object]:
    """All that an agent has, without the numbers that a database gives."""
    chain = store.chain(agent.head_commit_id)
    hidden = store.head_hidden(agent)
    log = store.history.log(agent)
    steps = {item.commit_id: item.step for item in log}
    injections = store.injections(chain.injection_ids.values())
    return {
        "agent": (agent.fingerprint, agent.seed, agent.settings, agent.created_at, agent.next_event_seq),
        "events": [(*_without_agent(event),) for event in store.events(agent.id)],
        "window": [event.seq for event in store.window(agent.id)],
        "source": _without_agent(source) if (source := store.source(agent.id, "book")) else None,
        "tensors": [(bits(item.keys), bits(item.values), bits(item.retrieval_keys)) for item in injections],
        "commits": [(item.step, bits(item.dropped), bits(item.evicted), item.created_at) for item in chain.commits],
        "snapshot": chain.snapshot and (chain.snapshot.step, {k: v.tolist() for k, v in chain.snapshot.arrays.items()}),
        "hidden": None if hidden is None else bits(hidden),
        "log": [(item.step, item.text, item.source_ids, item.num_text_tokens, item.tags) for item in log],
        "tags": {name: steps.get(commit_id) for name, commit_id in store.history.tags(agent.id).items()},
    }


def _without_agent(record: object) -> list[object]:
    return [getattr(record, name) for name in record.__slots__ if name != "agent_id"]  # type: ignore[attr-defined]


def lived(store: Store, name: str = "alice") -> AgentRecord:
    """An agent that was forked from another one, which wrote on, with something of every kind."""
    first = create(store, f"before {name}")
    with store.write(first) as tx:
        commit(tx, 0, event_seqs=(tx.add_event("message", role="user", text="shared é\x00").seq,))
    first = grow(store, tx.agent, range(1, 4), snapshots=_SNAPSHOTS)
    agent = store.history.fork(first, "default", name)
    grow(store, first, range(4, 5))
    agent = grow(store, agent, range(4, 7), snapshots=_SNAPSHOTS)
    with store.write(agent) as tx:
        piece = tx.add_event("piece", source_id="book", offset=3, text="own")
        tx.add_to_window([tx.add_event("message", role="user", text="waits").seq])
        tx.set_source("book", next_offset=6, prefix_digest="ab", is_done=True)
        commit(tx, 7, event_seqs=(piece.seq,))
    agent = tx.agent
    store.history.set_tag(agent, "early", store.history.log(agent)[-2].commit_id)
    return agent


@pytest.fixture(params=["memory to file", "file to postgresql", "postgresql to file"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Place, Place]:
    """Two databases, the second one empty."""
    kinds = request.param.split(" to ")
    places = {"memory": Place("sqlite://"), "file": Place(f"sqlite:///{tmp_path}/mplus.db")}
    if "postgresql" in kinds:
        places["postgresql"] = request.getfixturevalue("postgres_place")
    return places[kinds[0]], places[kinds[1]]


def test_a_copy_has_all_of_the_agent_and_nothing_of_others(places: tuple[Place, Place]) -> None:
    seen: list[tuple[int, int]] = []
    with places[0].open() as store, places[1].open() as target:
        agent = lived(store)
        create(target, "bystander")
        copy = copy_agent(store, agent, target, name="copy", on_progress=lambda done, total: seen.append((done, total)))
        assert (copy.name, copy.namespace, copy.version) == ("copy", "default", 0)
        assert copy == target.find_agent("default", "copy")
        assert contents(target, copy) == contents(store, agent)
        assert target.history.log(copy)[-1].text == "shared é\x00"  # the text of a commit from before the fork
        assert [item.name for item in target.list_agents()] == ["bystander", "copy"]
        assert seen[-1] == (8, 8)
        grown = grow(target, copy, range(8, 10))
        assert target.chain(grown.head_commit_id).num_commits == 10
        for record in target.list_agents():
            target.delete_agent(record.id)
        with target._database.read() as connection:
            for table in METADATA.tables.values():
                assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 0


def test_a_copy_of_a_copy_comes_back(store: Store) -> None:
    agent = lived(store)
    with Store("sqlite://") as middle:
        there = copy_agent(store, agent, middle, namespace="archive")
        back = copy_agent(middle, there, store, namespace="default", name="back")
    assert contents(store, back) == contents(store, agent)
    with Store("sqlite://") as other:
        empty = copy_agent(store, create(store, "empty"), other)
        assert contents(other, empty)["tensors"] == []


def test_what_only_a_tag_reaches_is_copied_too(store: Store) -> None:
    agent = grow(store, create(store), range(3))
    store.history.set_tag(agent, "far", 3)
    with store._database.write() as connection:
        connection.exec_driver_sql("UPDATE mplus_agent SET head_commit_id = 1")
        connection.exec_driver_sql("DELETE FROM mplus_head_hidden")
    found = store.find_agent("default", "alice")
    assert found is not None
    with Store("sqlite://") as target:
        copy = copy_agent(store, found, target)
        assert target.chain(copy.head_commit_id).num_commits == 1
        assert target.chain(target.history.tags(copy.id)["far"]).num_commits == 3


def test_a_copy_that_cannot_be_made_leaves_nothing(places: tuple[Place, Place]) -> None:
    with places[0].open() as store, places[1].open() as target:
        agent = lived(store)
        create(target)
        before = target.list_agents()
        with pytest.raises(ConflictError, match="agent 'alice' exists already in namespace 'default'"):
            copy_agent(store, agent, target)
        with pytest.raises(InvalidInputError, match="name is ''"):
            copy_agent(store, agent, target, name="")

        def break_off(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            copy_agent(store, agent, target, name="copy", on_progress=break_off)
        store.delete_agent(agent.id)
        with pytest.raises(AgentNotFoundError, match="agent 'alice' was deleted"):
            copy_agent(store, agent, target, name="copy")
        assert target.list_agents() == before
        assert target.stats(before[0].id).num_commits == 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE mplus_page SET blob = zeroblob(length(blob)) WHERE injection_id = 2",
        "UPDATE mplus_event SET text = substr(text, 1, length(text) - 1) WHERE seq = 0",
        "UPDATE mplus_injection SET retrieval_keys = x'00' WHERE id = 1",
        "UPDATE mplus_commit SET dropped = x'00' WHERE id = 4",
        "UPDATE mplus_commit SET snapshot = x'00' WHERE step = 5",
        "UPDATE mplus_head_hidden SET blob = x'00'",
        "DELETE FROM mplus_page WHERE injection_id = 2",
    ],
)
def test_what_is_damaged_is_not_copied(tmp_path: Path, statement: str) -> None:
    with Store(f"sqlite:///{tmp_path}/a.db") as store, Store("sqlite://") as target:
        agent = lived(store)
        with closing(sqlite3.connect(tmp_path / "a.db")) as vandal:
            assert vandal.execute(statement).rowcount > 0
            vandal.commit()
        with pytest.raises(CorruptBlobError, match="mplus_"):
            copy_agent(store, agent, target)
        assert target.list_agents() == []


def test_errors_name_the_database_that_has_them(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/a.db") as store, Store("sqlite://") as target:
        agent = lived(store)
        with closing(sqlite3.connect(tmp_path / "a.db")) as vandal:
            vandal.execute("UPDATE mplus_commit SET parent_id = NULL WHERE step = 3")
            vandal.commit()
        with pytest.raises(StoreError, match=r"the chain of commit .* breaks off"):
            copy_agent(store, agent, target)
        with closing(sqlite3.connect(tmp_path / "a.db")) as vandal:
            vandal.execute("DROP TABLE mplus_tag")
            vandal.commit()
        with pytest.raises(StoreError, match=r"no such table: mplus_tag \(sqlite:///.*a\.db\)"):
            copy_agent(store, agent, target)
        assert target.list_agents() == []


def test_a_copy_in_the_same_database_shares_nothing(store: Store) -> None:
    agent = lived(store)
    copy = copy_agent(store, agent, store, name="copy")
    assert contents(store, copy) == contents(store, agent)
    ids = [set(store.chain(each.head_commit_id).injection_ids.values()) for each in (agent, copy)]
    assert not ids[0] & ids[1]
