"""Injections, chains, snapshots and the newest hidden rows."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from mplus_agents.errors import InvalidInputError, StoreError
from mplus_agents.store import PAGE_TOKENS, InjectionTensors, Store, chains
from mplus_agents.store.schema import COMMIT, PAGE
from tests.store.samples import (
    Sizes,
    assert_stored,
    bits,
    commit,
    create,
    dropped_of,
    evicted_of,
    grow,
    hidden_of,
    snapshot_of,
    tensors_of,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("retrieval_dim", [0, 4])
@pytest.mark.parametrize("num_slots", [1, PAGE_TOKENS, 2 * PAGE_TOKENS + 3])
def test_injections_come_back_bit_for_bit(store: Store, dtype: torch.dtype, retrieval_dim: int, num_slots: int) -> None:
    sizes = Sizes(num_slots=num_slots, retrieval_dim=retrieval_dim, dtype=dtype)
    agent = grow(store, create(store), range(2), sizes=sizes)
    for step, injection in enumerate(store.injections([1, 2])):
        assert injection.id == step + 1
        assert_stored(injection, step, sizes)
    hidden = store.head_hidden(agent)
    assert hidden is not None
    assert bits(hidden) == bits(hidden_of(1, sizes))
    pages_per_layer = {1: 1, PAGE_TOKENS: 1, 2 * PAGE_TOKENS + 3: 3}[num_slots]
    with store._database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(PAGE)) == 2 * 2 * pages_per_layer


def test_tensors_may_be_views_and_carry_gradients(store: Store) -> None:
    given = tensors_of(0)
    strange = InjectionTensors(
        given.keys.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_(),
        given.values.repeat(1, 2, 1, 1)[:, :5],
        given.retrieval_keys.expand(2, 5, 4),
    )
    with store.write(create(store)) as tx:
        tx.add_commit(
            step=0,
            tensors=strange,
            dropped=torch.zeros(2, 0, dtype=torch.uint8),
            evicted=torch.zeros(2, 0, dtype=torch.int16),
            tail_hidden=hidden_of(0).requires_grad_(),
            event_seqs=[],
            num_text_tokens=0,
        )
    assert_stored(next(store.injections([1])), 0)
    record = store.chain(1).commits[0]
    assert (record.dropped.dtype, tuple(record.dropped.shape)) == (torch.int32, (2, 0))
    assert (record.evicted.dtype, tuple(record.evicted.shape)) == (torch.int64, (2, 0))


def test_injections_come_in_the_order_asked_for_and_in_any_number(tmp_path: Path) -> None:
    sizes = Sizes(num_layers=1, num_slots=1, num_kv_heads=1, head_dim=1, retrieval_dim=1)
    engine = sa.create_engine(f"sqlite:///{tmp_path}/mplus.db")

    @sa.event.listens_for(engine, "connect")
    def allow_as_few_variables_as_sqlite_may(driver: sqlite3.Connection, record: object) -> None:
        driver.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)

    store = Store(engine)
    with store.write(create(store)) as tx:
        for step in range(1_100):
            commit(tx, step, sizes=sizes)
    chain = store.chain(tx.agent.head_commit_id)
    assert chain.num_commits == 1_100
    assert [record.step for record in chain.commits] == list(range(1_100))
    order = [(index * 701) % 1_100 for index in range(1_100)]
    read = list(store.injections(chain.injection_ids[step] for step in order))
    assert [injection.id for injection in read] == [chain.injection_ids[step] for step in order]
    for step, injection in zip(order[::97], read[::97], strict=True):
        assert_stored(injection, step, sizes)
    infos = store.injection_infos(reversed(chain.injection_ids.values()))
    assert [info.num_text_tokens for info in infos.values()] == [100 + step for step in reversed(range(1_100))]
    assert list(store.injections([])) == []
    assert [injection.id for injection in store.injections([3, 3, 1])] == [3, 3, 1]
    engine.dispose()


def test_injections_are_read_in_batches_of_bounded_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = grow(store, create(store), range(5))
    one = store.stats(agent.id).page_bytes // 5
    monkeypatch.setattr(chains, "_MAX_BATCH_BYTES", 2 * one)
    with store._database.read() as connection:
        assert chains.injection_batches(connection, [1, 2, 3, 4, 5]) == [[1, 2], [3, 4], [5]]
        monkeypatch.setattr(chains, "_MAX_BATCH_BYTES", one - 1)
        assert chains.injection_batches(connection, [5, 4]) == [[5], [4]]
    for step, injection in enumerate(store.injections([1, 2, 3, 4, 5])):
        assert_stored(injection, step)


def test_injections_can_be_read_while_others_write(store: Store) -> None:
    agent = grow(store, create(store), range(3))
    reading = store.injections([1, 2, 3])
    assert_stored(next(reading), 0)
    grow(store, agent, range(3, 5))
    assert_stored(next(reading), 1)


def test_a_missing_injection_is_named(store: Store) -> None:
    grow(store, create(store), range(1))
    with pytest.raises(StoreError, match=r"there is no injection 7 in the database \(2 asked for are missing\)"):
        list(store.injections([1, 7, 8]))
    with pytest.raises(StoreError, match="there is no injection 7 in the database"):
        store.injection_infos([1, 7])


def test_infos_say_where_an_injection_comes_from(store: Store) -> None:
    agent = create(store)
    with store.write(agent) as tx:
        for text in ("a", "b", "c"):
            tx.add_event("message", text=text)
        result = commit(tx, 0, event_seqs=(2, 0))
    info = store.injection_infos([result.injection_id])[result.injection_id]
    assert (info.id, info.agent_id, info.event_seqs, info.num_text_tokens) == (1, agent.id, (2, 0), 100)
    assert info.created_at == store.chain(result.commit_id).commits[0].created_at


def test_a_chain_has_every_step_and_the_commits_since_the_newest_snapshot(store: Store) -> None:
    agent = create(store)
    empty = store.chain(agent.head_commit_id)
    assert (empty.injection_ids, empty.snapshot, empty.commits, empty.num_commits) == ({}, None, [], 0)
    agent = grow(store, agent, range(10), snapshots=frozenset({3, 6}))
    # Another agent's commits in between must not matter.
    grow(store, create(store, "bob"), range(2))
    agent = grow(store, agent, range(10, 12))
    chain = store.chain(agent.head_commit_id)
    assert chain.injection_ids == {**{step: step + 1 for step in range(10)}, 10: 13, 11: 14}
    assert chain.snapshot is not None
    assert (chain.snapshot.step, chain.snapshot.commit_id) == (6, 7)
    assert list(chain.snapshot.arrays) == ["theta", "layers"]
    for name, array in snapshot_of(6).items():
        assert chain.snapshot.arrays[name].dtype == array.dtype
        assert chain.snapshot.arrays[name].tolist() == array.tolist()
    assert [record.step for record in chain.commits] == [7, 8, 9, 10, 11]
    assert [record.id for record in chain.commits] == [8, 9, 10, 13, 14]
    assert [record.parent_id for record in chain.commits] == [7, 8, 9, 10, 13]
    for record in chain.commits:
        assert bits(record.dropped) == bits(dropped_of(record.step).to(torch.int32))
        assert bits(record.evicted) == bits(evicted_of(record.step))
        assert (record.agent_id, record.injection_id) == (agent.id, chain.injection_ids[record.step])


def test_an_earlier_commit_has_its_own_chain(store: Store) -> None:
    grow(store, create(store), range(6), snapshots=frozenset({1, 4}))
    chain = store.chain(4)
    assert chain.injection_ids == {0: 1, 1: 2, 2: 3, 3: 4}
    assert chain.snapshot is not None
    assert chain.snapshot.step == 1
    assert [record.step for record in chain.commits] == [2, 3]
    at_snapshot = store.chain(5)
    assert at_snapshot.snapshot is not None
    assert at_snapshot.snapshot.step == 4
    assert at_snapshot.commits == []


def test_a_broken_chain_is_refused(store: Store) -> None:
    agent = grow(store, create(store), range(5))
    with pytest.raises(StoreError, match="there is no commit 99"):
        store.chain(99)
    with store._database.write() as connection:
        connection.execute(sa.update(COMMIT).where(COMMIT.c.id == 3).values(parent_id=5))  # a circle
    with pytest.raises(StoreError, match=re.escape("the chain of commit 5 breaks off at commit 3 (step 2)")):
        store.chain(agent.head_commit_id)


def test_several_commits_in_one_transaction(store: Store) -> None:
    agent = grow(store, create(store), range(2))
    with store.write(agent) as tx:
        results = [commit(tx, step, has_snapshot=step == 3) for step in (2, 3, 4)]
        assert tx.agent == agent
    assert tx.agent == replace(agent, version=3, head_commit_id=results[-1].commit_id)
    assert store.find_agent("default", "alice") == tx.agent
    chain = store.chain(tx.agent.head_commit_id)
    assert [chain.injection_ids[step] for step in (2, 3, 4)] == [result.injection_id for result in results]
    assert [record.id for record in chain.commits] == [results[-1].commit_id]
    hidden = store.head_hidden(tx.agent)
    assert hidden is not None
    assert bits(hidden) == bits(hidden_of(4))


def test_hidden_rows_stay_when_a_transaction_adds_no_commit(store: Store) -> None:
    agent = create(store)
    assert store.head_hidden(agent) is None
    agent = grow(store, agent, range(1))
    with store.write(agent) as tx:
        tx.add_event("flush")
    hidden = store.head_hidden(tx.agent)
    assert hidden is not None
    assert bits(hidden) == bits(hidden_of(0))
    assert tx.agent.head_commit_id == agent.head_commit_id


def test_hidden_rows_of_another_commit_are_refused(store: Store) -> None:
    old = grow(store, create(store), range(1))
    grow(store, old, range(1, 2))
    with pytest.raises(StoreError, match="the hidden rows of agent 'alice' are those of commit 2, not of the head 1"):
        store.head_hidden(old)


def _with(**changes: torch.Tensor) -> InjectionTensors:
    return replace(tensors_of(0), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 1}, "step is 1; allowed: 0, the step after the agent's head"),
        ({"tensors": _with(keys=torch.zeros(2, 5, 2))}, r"tensors.keys is \(2, 5, 2\); allowed: shape \[L, K"),
        ({"tensors": _with(keys=torch.zeros(2, 0, 2, 3))}, r"tensors.keys is \(2, 0, 2, 3\)"),
        ({"tensors": _with(values=torch.zeros(2, 5, 2, 4))}, r"tensors.values is .*; allowed: shape \[2, 5, 2, 3\]"),
        ({"tensors": _with(values=torch.zeros(2, 5, 2, 3).half())}, "tensors.values is .*float16.*torch.float32"),
        ({"tensors": _with(retrieval_keys=torch.zeros(2, 4, 4))}, r"retrieval_keys is \(2, 4, 4\); .* \[2, 5, any\]"),
        (
            {"tensors": _with(keys=torch.zeros(2, 5, 2, 3).double(), values=torch.zeros(2, 5, 2, 3).double())},
            "tensors.keys.dtype is torch.float64",
        ),
        ({"dropped": torch.zeros(3, 1, dtype=torch.int64)}, r"dropped is \(3, 1\); allowed: shape \[2, any\]"),
        ({"dropped": torch.zeros(2, 1)}, "dropped.dtype is torch.float32; allowed: integers"),
        ({"dropped": torch.full((2, 1), -1)}, r"dropped is \(-1, -1\); allowed: slots from 0"),
        ({"dropped": torch.full((2, 1), 2**31)}, "dropped is .*; allowed: slots from 0"),
        ({"evicted": torch.zeros(2, dtype=torch.int64)}, r"evicted is \(2,\); allowed: shape \[2, any\]"),
        ({"tail_hidden": torch.zeros(1, 5, 6)}, r"tail_hidden is \(1, 5, 6\); allowed: shape \[2, 5, any\]"),
        ({"tail_hidden": torch.zeros(2, 5, 6).double()}, "tail_hidden.dtype is torch.float64"),
        ({"event_seqs": [1]}, "event_seqs is 1; allowed: an int from 0 to 0"),
        ({"num_text_tokens": -1}, "num_text_tokens is -1"),
    ],
)
def test_commits_that_cannot_be_stored_are_refused_before_anything_is(
    store: Store, changes: dict[str, object], message: str
) -> None:
    arguments: dict[str, object] = {
        "step": 0,
        "tensors": tensors_of(0),
        "dropped": dropped_of(0),
        "evicted": evicted_of(0),
        "tail_hidden": hidden_of(0),
        "event_seqs": [0],
        "num_text_tokens": 3,
    }
    with store.write(create(store)) as tx:
        tx.add_event("message", text="kept")
        with pytest.raises(InvalidInputError, match=message):
            tx.add_commit(**{**arguments, **changes})  # type: ignore[arg-type]  # wrong on purpose
    assert tx.agent.head_commit_id is None
    assert store.stats(tx.agent.id).page_bytes == 0
    assert [event.text for event in store.events(tx.agent.id)] == ["kept"]
    with store.write(tx.agent) as tx:
        tx.add_commit(**arguments)  # type: ignore[arg-type]  # of mixed types
    assert_stored(next(store.injections([1])), 0)
