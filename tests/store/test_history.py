"""The log, tags, forks that share their past, and deleting what others build on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from mplus_agents.errors import AgentNotFoundError, ConflictError, InvalidInputError
from mplus_agents.store import AgentRecord, Store
from mplus_agents.store.schema import METADATA
from tests.store.samples import Sizes, assert_stored, bits, commit, create, grow, hidden_of

_SMALL = Sizes(num_layers=1, num_slots=1, num_kv_heads=1, head_dim=1, retrieval_dim=1, hidden_dim=1)


def tell(store: Store, agent: AgentRecord, texts: Sequence[str], source_id: str | None = None) -> AgentRecord:
    """Log texts and inject them, each by itself."""
    for text in texts:
        with store.write(agent) as tx:
            step = 0 if agent.head_commit_id is None else store.chain(agent.head_commit_id).num_commits
            if source_id is None:
                event = tx.add_event("message", role="user", text=text)
            else:
                event = tx.add_event("piece", source_id=source_id, offset=0, text=text)
            commit(tx, step, event_seqs=(event.seq,), sizes=_SMALL)
        agent = tx.agent
    return agent


def texts_of(store: Store, agent: AgentRecord) -> list[str]:
    return [item.text for item in reversed(store.history.log(agent))]


def num_rows(store: Store) -> dict[str, int]:
    with store._database.read() as connection:
        return {
            name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for name, table in METADATA.tables.items()
        }


def test_the_log_says_what_each_commit_injected(store: Store) -> None:
    agent = tell(store, create(store), ["one\n two", "x" * 100])
    agent = tell(store, agent, ["three"], source_id="book")
    store.history.set_tag(agent, "start", 1)
    newest, middle, first = store.history.log(agent)
    assert (first.commit_id, first.parent_id, first.step, first.text, first.tags) == (1, None, 0, "one two", ("start",))
    assert (middle.parent_id, middle.step, middle.text, middle.source_ids) == (1, 1, "x" * 79 + "…", ())
    assert (newest.parent_id, newest.text, newest.source_ids, newest.num_text_tokens) == (2, "three", ("book",), 102)
    assert {item.agent_id for item in (newest, middle, first)} == {agent.id}
    assert store.history.log(agent, limit=2) == [newest, middle]
    assert store.history.log(agent, 2) == [middle, first]
    assert store.history.log(create(store, "bob")) == []
    with pytest.raises(InvalidInputError, match="limit is -1"):
        store.history.log(agent, limit=-1)


def test_tags_name_commits_of_the_agents_own_past(store: Store) -> None:
    alice = tell(store, create(store), ["a", "b"])
    bob = tell(store, create(store, "bob"), ["c"])
    store.history.set_tag(alice, "β\x00", 1)
    store.history.set_tag(alice, "late", 2)
    store.history.set_tag(alice, "late", 1)
    assert store.history.tags(alice.id) == {"late": 1, "β\x00": 1}
    assert store.history.tags(bob.id) == {}
    assert [store.history.resolve(alice, name) for name in ("late", "β\x00", 2)] == [1, 1, 2]
    for commit_id in (3, 99):
        with pytest.raises(InvalidInputError, match=f"commit is {commit_id}; allowed: the id of a commit in the agent"):
            store.history.set_tag(alice, "stranger", commit_id)
    with pytest.raises(InvalidInputError, match=r"commit is 'no'; .* a tag of agent 'alice': 'late', 'β"):
        store.history.resolve(alice, "no")
    store.history.remove_tag(alice, "late")
    for number in ("7", "2024"):
        with pytest.raises(InvalidInputError, match=f"tag is '{number}'; allowed: a name that is not a number"):
            store.history.set_tag(alice, number, 1)
    with pytest.raises(InvalidInputError, match="tag is 'late'; allowed: a tag of agent 'alice'"):
        store.history.remove_tag(alice, "late")
    assert store.history.tags(alice.id) == {"β\x00": 1}


def test_a_fork_begins_where_the_other_is_and_goes_its_own_way(store: Store) -> None:
    alice = grow(store, create(store), range(3))
    with store.write(alice) as tx:
        tx.add_event("message", text="not waiting")
        tx.add_to_window([tx.add_event("message", role="user", text=text).seq for text in ("w1", "w2")])
        tx.set_source("book", next_offset=7, prefix_digest="ab", is_done=False)
    alice = tx.agent
    before = num_rows(store)
    fork = store.history.fork(alice, "other", "alice")
    added = {name: rows - before[name] for name, rows in num_rows(store).items() if rows != before[name]}
    assert added == {"mplus_agent": 1, "mplus_event": 2, "mplus_window": 2, "mplus_source": 1, "mplus_head_hidden": 1}
    assert (fork.head_commit_id, fork.seed, fork.fingerprint) == (alice.head_commit_id, alice.seed, alice.fingerprint)
    assert fork == store.find_agent("other", "alice")
    assert [(event.seq, event.role, event.text) for event in store.window(fork.id)] == [
        (0, "user", "w1"),
        (1, "user", "w2"),
    ]
    source = store.source(fork.id, "book")
    assert source is not None
    assert (source.next_offset, source.prefix_digest) == (7, "ab")
    hidden = store.head_hidden(fork)
    assert hidden is not None
    assert bits(hidden) == bits(hidden_of(2))
    alice_later, fork_later = grow(store, alice, range(3, 5)), grow(store, fork, range(3, 4))
    mine, theirs = store.chain(alice_later.head_commit_id), store.chain(fork_later.head_commit_id)
    assert (mine.num_commits, theirs.num_commits) == (5, 4)
    assert [mine.injection_ids[step] == theirs.injection_ids[step] for step in range(4)] == [True] * 3 + [False]
    with store.write(fork_later) as tx:
        tx.remove_from_window([0, 1])
    assert [event.text for event in store.window(alice.id)] == ["w1", "w2"]


def test_forks_that_cannot_be_made_leave_nothing(store: Store) -> None:
    alice = tell(store, create(store), ["a"])
    create(store, "bob")
    old, alice = alice, tell(store, alice, ["b"])
    before = num_rows(store)
    with pytest.raises(ConflictError, match="agent 'bob' exists already in namespace 'default'"):
        store.history.fork(alice, "default", "bob")
    with pytest.raises(ConflictError, match="another writer wrote to agent 'alice'; nothing was forked"):
        store.history.fork(old, "default", "carol")
    with pytest.raises(InvalidInputError, match="name is ''"):
        store.history.fork(alice, "default", "")
    assert num_rows(store) == before
    store.history.fork(alice, "default", "dora")  # so that some of the deleted agent is kept
    store.delete_agent(alice.id)
    before = num_rows(store)
    for use in (
        lambda: store.history.fork(alice, "default", "carol"),
        lambda: store.history.set_tag(alice, "late", 1),
        lambda: store.history.remove_tag(alice, "late"),
    ):
        with pytest.raises(AgentNotFoundError, match="agent 'alice' was deleted"):
            use()
    with pytest.raises(AgentNotFoundError, match="there is no agent with id"):
        store.stats(alice.id)
    assert num_rows(store) == before


def test_a_fork_outlives_what_it_was_made_from(store: Store) -> None:
    alice = tell(store, create(store), ["a", "b"])
    fork = tell(store, store.history.fork(alice, "default", "fork"), ["c"])
    alice = tell(store, alice, ["later"])
    with store.write(alice) as tx:
        tx.add_to_window([tx.add_event("message", text="waits").seq])
        tx.set_source("book", next_offset=1, prefix_digest="00", is_done=True)
    store.history.set_tag(tx.agent, "mine", 1)
    store.delete_agent(alice.id)
    assert store.find_agent("default", "alice") is None
    assert store.agent_version(alice.id) is None
    assert store.list_agents() == [fork]
    with pytest.raises(AgentNotFoundError, match=f"there is no agent with id {alice.id}"):
        store.delete_agent(alice.id)
    with pytest.raises(AgentNotFoundError, match="agent 'alice' was deleted"):
        store.write(tx.agent).__enter__()
    rows = num_rows(store)
    assert (rows["mplus_commit"], rows["mplus_injection"], rows["mplus_event"]) == (3, 3, 1)
    assert (rows["mplus_window"], rows["mplus_source"], rows["mplus_tag"], rows["mplus_agent"]) == (0, 0, 0, 2)
    assert texts_of(store, fork) == ["", "", "c"]
    for step, injection in enumerate(store.injections(store.chain(fork.head_commit_id).injection_ids.values())):
        assert_stored(injection, step, _SMALL)
    again = tell(store, create(store), ["new"])
    assert texts_of(store, again) == ["new"]
    store.delete_agent(fork.id)
    store.delete_agent(again.id)
    assert set(num_rows(store).values()) == {0}


_NAMES = st.sampled_from(["a", "b", "c", "d"])
_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("tell"), _NAMES, st.just("")),
        st.tuples(st.just("fork"), _NAMES, _NAMES),
        st.tuples(st.just("tag"), _NAMES, st.just("")),
        st.tuples(st.just("delete"), _NAMES, st.just("")),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(_ACTIONS)
def test_forks_never_see_each_others_later_writes(actions: list[tuple[str, str, str]]) -> None:
    """Against lists of texts in Python: whatever is told, forked, tagged and deleted."""
    expected: dict[str, list[int]] = {}
    with Store("sqlite://") as store:
        for number, (action, name, other) in enumerate(actions):
            agent = store.find_agent("default", name)
            if action == "tell":
                tell(store, agent or create(store, name), [str(number)])
                expected[name] = [*expected.get(name, []), number]
            elif action == "fork" and agent is not None and other not in expected:
                store.history.fork(agent, "default", other)
                expected[other] = list(expected[name])
            elif action == "tag" and agent is not None and agent.head_commit_id is not None:
                store.history.set_tag(agent, f"at {number}", agent.head_commit_id)
            elif action == "delete" and agent is not None:
                store.delete_agent(agent.id)
                del expected[name]
            check_agents(store, expected)
        for record in store.list_agents():
            store.delete_agent(record.id)
        assert set(num_rows(store).values()) == {0}


def check_agents(store: Store, expected: dict[str, list[int]]) -> None:
    assert {agent.name for agent in store.list_agents()} == set(expected)
    reached = set()
    for agent in store.list_agents():
        told = store.history.log(agent)[::-1]
        assert [item.step for item in told] == list(range(len(expected[agent.name])))
        known = [(item.text, str(number)) for item, number in zip(told, expected[agent.name], strict=True) if item.text]
        assert all(text == number for text, number in known)
        own = [item for item in told if item.agent_id == agent.id]
        assert all(item.text for item in own)
        reached |= {item.commit_id for item in told}
        reached |= {
            item.commit_id
            for tagged in store.history.tags(agent.id).values()
            for item in store.history.log(agent, tagged)
        }
    assert num_rows(store)["mplus_commit"] == num_rows(store)["mplus_injection"] == len(reached)
