"""Agents, the event log, the window, documents, and two writers."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from mplus_agents.errors import AgentNotFoundError, ConflictError, InvalidInputError, StoreError
from mplus_agents.store import AgentRecord, Store, StoreStats
from mplus_agents.store.schema import METADATA
from tests.store.conftest import Place
from tests.store.samples import commit, create, give_up, grow

_ODD_TEXT = "".join(map(chr, range(0x20))) + "\x7f\x80\u2028\ufeff\uffff\U0001f642 '\"%s\\ --"


def _state(store: Store, agent: AgentRecord) -> tuple[object, ...]:
    return store.find_agent(agent.namespace, agent.name), store.events(agent.id), store.window(agent.id)


def test_an_agent_is_found_as_it_was_created(store: Store) -> None:
    before = datetime.now(UTC)
    agent = store.create_agent(
        "tenant\x00", _ODD_TEXT, fingerprint={"weights": "ab\x00c"}, seed=-(2**63), settings={"rule": "paper", "K": 16}
    )
    assert (agent.namespace, agent.name, agent.seed) == ("tenant\x00", _ODD_TEXT, -(2**63))
    assert (agent.fingerprint, agent.settings) == ({"weights": "ab\x00c"}, {"rule": "paper", "K": 16})
    assert (agent.head_commit_id, agent.version, agent.next_event_seq) == (None, 0, 0)
    assert before <= agent.created_at <= before + timedelta(minutes=1)
    assert agent.created_at.tzinfo is UTC
    assert store.find_agent("tenant\x00", _ODD_TEXT) == agent
    assert store.agent_version(agent.id) == 0


def test_names_are_unique_in_their_namespace_only(store: Store) -> None:
    alice = create(store)
    other = store.create_agent("other", "alice", fingerprint={}, seed=2**63 - 1, settings={})
    bob = create(store, "bob")
    with pytest.raises(ConflictError, match="agent 'alice' exists already in namespace 'default'"):
        create(store)
    assert store.list_agents() == [alice, other, bob]
    assert store.list_agents("default") == [alice, bob]
    assert store.find_agent("other", "bob") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"namespace": ""}, "namespace is ''; allowed: a text that is not empty"),
        ({"name": "é" * 501}, "name is .*; allowed: at most 1,000 bytes of UTF-8"),
        ({"name": "\udc80"}, "name is .*; allowed: text that has a UTF-8 form"),
        ({"name": 5}, "name is 5; allowed: a str"),
        ({"seed": 2**63}, "seed is 9223372036854775808; allowed: an int from -9223372036854775808"),
        ({"seed": True}, "seed is True; allowed: an int"),
        ({"fingerprint": {"dtype": 3}}, r"fingerprint\['dtype'\] is 3; allowed: .* str"),
        ({"settings": {"rate": 0.5}}, r"settings\['rate'\] is 0.5; allowed: .* str or int"),
        ({"settings": {"x": "\ud800"}}, r"settings\['x'\] is .*; allowed: text that has a UTF-8 form"),
    ],
)
def test_agents_that_cannot_be_stored_are_refused(store: Store, changes: dict[str, object], message: str) -> None:
    arguments = {"namespace": "n", "name": "a", "fingerprint": {}, "seed": 0, "settings": {}, **changes}
    with pytest.raises(InvalidInputError, match=message):
        store.create_agent(arguments.pop("namespace"), arguments.pop("name"), **arguments)  # type: ignore[arg-type]  # wrong on purpose
    assert store.list_agents() == []


def test_deleting_an_agent_leaves_nothing_of_it_and_all_of_the_others(store: Store) -> None:
    agents = [create(store), create(store, "bob")]
    for agent in agents:
        with store.write(agent) as tx:
            tx.add_to_window([tx.add_event("message", text="hello").seq])
            tx.set_source("book", next_offset=3, prefix_digest="00", is_done=True)
        grow(store, tx.agent, range(3), snapshots=frozenset({1}))
    before = store.stats(agents[1].id)
    store.delete_agent(agents[0].id)
    assert store.agent_version(agents[0].id) is None
    assert store.agent_version(agents[1].id) == 4
    assert store.stats(agents[1].id) == before
    store.delete_agent(agents[1].id)
    with store._database.read() as connection:
        for table in METADATA.tables.values():
            assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 0, table.name
    with pytest.raises(AgentNotFoundError, match="there is no agent with id 1"):
        store.delete_agent(1)


def test_a_record_of_a_deleted_agent_writes_into_no_other(store: Store) -> None:
    gone = create(store)
    store.delete_agent(gone.id)
    new = create(store)
    assert new.id != gone.id
    with pytest.raises(AgentNotFoundError, match="agent 'alice' was deleted"), store.write(gone) as tx:
        tx.add_event("flush")
    assert store.events(new.id) == []


def test_events_come_back_in_order_with_every_character(store: Store) -> None:
    agent = create(store)
    with store.write(agent) as tx:
        added = [
            tx.add_event("message", role="user\x00", text=_ODD_TEXT, num_tokens=12, policy_version=3),
            tx.add_event("piece", source_id="a/b\x00", offset=2**40, text=""),
            tx.add_event("flush"),
        ]
    with store.write(tx.agent) as tx:
        added.append(tx.add_event("message", role="assistant", text="Oslo"))
    assert [event.seq for event in added] == [0, 1, 2, 3]
    assert (added[0].role, added[0].text) == ("user\x00", _ODD_TEXT)
    assert (added[0].num_tokens, added[0].policy_version) == (12, 3)
    assert (added[1].source_id, added[1].offset, added[1].text) == ("a/b\x00", 2**40, "")
    assert store.events(agent.id) == added
    assert store.events(agent.id, after=1) == added[2:]
    assert store.events(agent.id, after=0, limit=2) == added[1:3]
    assert store.events(agent.id, limit=0) == []
    assert tx.agent.next_event_seq == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "thought", "text": "x"}, "kind is 'thought'; allowed: message, piece, flush"),
        ({"kind": "message"}, "text is None; allowed: a text, since kind is 'message'"),
        ({"kind": "piece", "text": "x", "source_id": "a"}, r"source_id, offset is \('a', None\)"),
        ({"kind": "message", "text": "\ud83d"}, "text is .*; allowed: text that has a UTF-8 form"),
        ({"kind": "message", "text": "x", "num_tokens": -1}, "num_tokens is -1; allowed: an int from 0"),
        ({"kind": "piece", "text": "x", "source_id": "a", "offset": 2**63}, "offset is 9223372036854775808"),
        ({"kind": "piece", "text": "x", "source_id": "", "offset": 0}, "source_id is ''"),
    ],
)
def test_events_that_cannot_be_stored_are_refused(store: Store, arguments: dict[str, object], message: str) -> None:
    agent = create(store)
    with store.write(agent) as tx:
        with pytest.raises(InvalidInputError, match=message):
            tx.add_event(**arguments)  # type: ignore[arg-type]  # wrong on purpose
        tx.add_event("message", text="fine")
    assert [(event.seq, event.text) for event in store.events(agent.id)] == [(0, "fine")]


def test_the_window_holds_exactly_what_was_added_and_not_removed(store: Store) -> None:
    agent = create(store)
    with store.write(agent) as tx:
        events = [tx.add_event("message", text=f"turn {i}") for i in range(1_200)]
        tx.add_to_window([event.seq for event in events])
    assert store.window(agent.id) == events
    with store.write(tx.agent) as tx:
        tx.remove_from_window(range(1_100))
        late = tx.add_event("message", text="late")
        tx.add_to_window([late.seq])
        tx.remove_from_window([1_150])
    assert store.window(agent.id) == [*events[1_100:1_150], *events[1_151:], late]
    assert len(store.events(agent.id)) == 1_201


@pytest.mark.parametrize(
    ("seqs", "error", "message"),
    [
        ([0, 2], StoreError, "event 2 of agent 'alice' is not in the window"),
        ([5], InvalidInputError, "seqs is 5; allowed: an int from 0 to 2"),
        ([0, 0], InvalidInputError, r"seqs is \[0, 0\]; allowed: each event once"),
    ],
)
def test_only_what_is_in_the_window_leaves_it(
    store: Store, seqs: list[int], error: type[Exception], message: str
) -> None:
    agent = create(store)
    with store.write(agent) as tx:
        for text in ("a", "b", "c"):
            tx.add_event("message", text=text)
        tx.add_to_window([0, 1])
    with store.write(tx.agent) as tx, pytest.raises(error, match=message):
        tx.remove_from_window(seqs)
    assert [event.seq for event in store.window(agent.id)] == [0, 1]


def test_nothing_enters_the_window_twice_or_before_it_is_logged(store: Store) -> None:
    agent = create(store)
    with store.write(agent) as tx:
        tx.add_event("message", text="a")
        tx.add_to_window([0])
        with pytest.raises(StoreError, match="event 0 of agent 'alice' is in the window already"):
            tx.add_to_window([0])
        with pytest.raises(InvalidInputError, match="seqs is 1; allowed: an int from 0 to 0"):
            tx.add_to_window([1])
    assert [event.seq for event in store.window(agent.id)] == [0]


def test_a_document_is_taken_further(store: Store) -> None:
    agent = create(store)
    with store.write(agent) as tx:
        tx.set_source("a\x00b", next_offset=10, prefix_digest="0a", is_done=False)
        tx.set_source("other", next_offset=1, prefix_digest="ff", is_done=True)
        tx.set_source("a\x00b", next_offset=25, prefix_digest="0b", is_done=True)
    source = store.source(agent.id, "a\x00b")
    assert source is not None
    assert (source.source_id, source.next_offset, source.prefix_digest, source.is_done) == ("a\x00b", 25, "0b", True)
    other = store.source(agent.id, "other")
    assert other is not None
    assert (other.next_offset, other.is_done) == (1, True)
    assert store.source(agent.id, "new") is None
    with store.write(tx.agent) as tx, pytest.raises(InvalidInputError, match="prefix_digest is 'XYZ'; allowed: 1 to"):
        tx.set_source("other", next_offset=2, prefix_digest="XYZ", is_done=True)


def test_an_exception_undoes_the_whole_transaction(store: Store) -> None:
    agent = create(store)
    with store.write(agent) as tx:
        tx.add_to_window([tx.add_event("message", text="kept").seq])
    agent = tx.agent
    before = _state(store, agent)
    with pytest.raises(KeyboardInterrupt):
        give_up(store, agent)
    assert _state(store, agent) == before
    assert store.source(agent.id, "lost") is None
    assert store.stats(agent.id).num_commits == 0
    with store.write(agent) as tx:
        assert tx.add_event("message", text="next").seq == 1


def test_a_failure_of_the_database_cannot_be_swallowed(store: Store) -> None:
    agent = create(store)

    def swallow() -> None:
        with store.write(agent) as tx:
            tx.add_to_window([tx.add_event("message", text="lost").seq])
            with suppress(sa.exc.DBAPIError):
                tx._execute(sa.insert(sa.table("missing", sa.column("x"))), {"x": 1})

    with pytest.raises(StoreError, match="the database failed earlier in this transaction"):
        swallow()
    assert _state(store, agent) == (agent, [], [])


def test_a_transaction_cannot_be_used_after_its_end(store: Store) -> None:
    with store.write(create(store)) as tx:
        pass
    assert tx.agent.version == 1
    with pytest.raises(StoreError, match="the transaction is over"):
        tx.add_event("flush")
    with pytest.raises(StoreError, match="the transaction is over"):
        tx.add_to_window([])


def test_the_second_of_two_stores_gets_a_conflict_and_changes_nothing(place: Place) -> None:
    with place.open() as first, place.open() as second:
        agent = create(first)
        assert second.find_agent("default", "alice") == agent
        with first.write(agent) as tx:
            commit(tx, 0)
            tx.add_event("message", text="first")
        winner = tx.agent
        message = "agent 'alice' is at version 1, this write is based on version 0: another writer was first"
        with pytest.raises(ConflictError, match=message):
            second.write(agent).__enter__()
        assert second.agent_version(agent.id) == 1
        assert second.find_agent("default", "alice") == winner
        assert [event.text for event in second.events(agent.id)] == ["first"]
        with second.write(winner) as tx:
            tx.add_event("message", text="second")
        assert [event.text for event in first.events(agent.id)] == ["first", "second"]


def test_a_write_is_seen_by_others_only_once_it_is_whole(place: Place) -> None:
    with place.open() as first, place.open() as second:
        agent = create(first)
        with first.write(agent) as tx:
            tx.add_to_window([tx.add_event("message", text="a").seq])
            commit(tx, 0)
            for reader in (first, second):
                assert _state(reader, agent) == (agent, [], [])
        assert _state(second, agent)[0] == tx.agent
        assert [event.text for event in second.window(agent.id)] == ["a"]


def test_many_threads_write_their_agents_through_one_store(store: Store) -> None:
    agents = [create(store, f"agent {i}") for i in range(6)]
    errors: list[BaseException] = []

    def work(agent: AgentRecord) -> None:
        try:
            for step in range(8):
                with store.write(agent) as tx:
                    tx.add_to_window([tx.add_event("message", text=f"{agent.name} {step}").seq])
                    commit(tx, step)
                agent = tx.agent
                assert len(store.window(agent.id)) == step + 1
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for agent in agents:
        assert [event.text for event in store.events(agent.id)] == [f"{agent.name} {step}" for step in range(8)]
        assert store.agent_version(agent.id) == 8


def test_one_thread_writes_one_transaction_at_a_time(store: Store) -> None:
    alice, bob = create(store), create(store, "bob")
    with store.write(alice):
        with pytest.raises(StoreError, match="this thread already has a write transaction open"), store.write(bob):
            pass
        with pytest.raises(StoreError, match="this thread already has a write transaction open"):
            create(store, "carol")
    assert store.agent_version(alice.id) == 1
    assert store.agent_version(bob.id) == 0


def test_stats_count_the_bytes_of_every_blob(store: Store) -> None:
    agent = create(store)
    assert store.stats(agent.id) == StoreStats(0, 0, 0, 0, 0, 0, 0, 0, 0)
    with store.write(agent) as tx:
        tx.add_to_window([tx.add_event("message", text="héllo").seq])
        tx.add_event("message", text="x")
        results = [commit(tx, step, has_snapshot=step == 1) for step in range(3)]
    stats = store.stats(agent.id)
    with store._database.read() as connection:
        for column, found in (
            ("mplus_page.blob", stats.page_bytes),
            ("mplus_injection.retrieval_keys", stats.retrieval_key_bytes),
            ("mplus_commit.snapshot", stats.snapshot_bytes),
            ("mplus_head_hidden.blob", stats.hidden_bytes),
            ("mplus_event.text", stats.text_bytes),
        ):
            table, name = column.split(".")
            rows = connection.exec_driver_sql(f"SELECT {name} FROM {table} WHERE {name} IS NOT NULL").scalars()
            assert sum(map(len, rows)) == found > 0
    assert stats.text_bytes == 2 * 40 + len("héllo".encode()) + 1
    # int32 [2, 0], then [2, 2] twice; int64 [2, 1] three times; 48 bytes of header each.
    assert stats.commit_bytes == 6 * 48 + 2 * 2 * 2 * 4 + 3 * 2 * 8
    assert (stats.num_commits, stats.num_events, stats.num_window_events) == (3, 2, 1)
    without_hidden_and_text = stats.total_bytes - stats.hidden_bytes - stats.text_bytes
    assert sum(result.num_bytes for result in results) == without_hidden_and_text
    with pytest.raises(AgentNotFoundError, match="there is no agent with id 99"):
        store.stats(99)
