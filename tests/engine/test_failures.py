"""The database fails, another writer is first, the agent is gone: it says so, and goes on from what is durable."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa

from mplus_agents import Agent, MPlus
from mplus_agents.engine import Document, Message, writer
from mplus_agents.engine.resident import open_resident
from mplus_agents.errors import AgentNotFoundError, ConflictError, CorruptBlobError, MPlusError, StoreError
from mplus_agents.store import Store
from tests.engine.engines import (
    check_accounts,
    engine,
    log_of,
    prose,
    reopened,
    small,
    state_of,
    tiny_codec,
    turn_of,
    with_version,
)


@pytest.fixture
def sql(tmp_path: Path) -> Iterator[sa.Engine]:
    """A caller's own Engine, whose connections tests can spoil."""
    opened = sa.create_engine(f"sqlite:///{tmp_path}/own.db")
    yield opened
    opened.dispose()


@pytest.fixture
def bob(sql: sa.Engine) -> Iterator[Agent]:
    with Store(sql, busy_timeout_s=0.2) as store:
        agent = MPlus(small(), tiny_codec(), store, "small").agent("bob")
        agent.remember([turn_of(100), turn_of(60)])
        yield agent


@contextmanager
def failing_commit(sql: sa.Engine) -> Iterator[None]:
    def fail(connection: sa.Connection) -> None:
        raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    sa.event.listen(sql, "commit", fail)
    try:
        yield
    finally:
        sa.event.remove(sql, "commit", fail)


@contextmanager
def pragma(sql: sa.Engine, on: str, off: str) -> Iterator[None]:
    """Spoil every connection by a setting, and mend it."""

    def spoil(driver: sqlite3.Connection, record: object, proxy: object) -> None:
        driver.execute(on)

    sa.event.listen(sql, "checkout", spoil)
    try:
        yield
    finally:
        sa.event.remove(sql, "checkout", spoil)
        with sql.connect() as connection:
            connection.exec_driver_sql(off)


def full_disk(sql: sa.Engine) -> object:
    return pragma(sql, "PRAGMA max_page_count = 1", f"PRAGMA max_page_count = {2**32 - 2}")


def read_only(sql: sa.Engine) -> object:
    return pragma(sql, "PRAGMA query_only = ON", "PRAGMA query_only = OFF")


@contextmanager
def locked(sql: sa.Engine) -> Iterator[None]:
    other = sqlite3.connect(str(sql.url.database))
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


WRITES: dict[str, Callable[[Agent], object]] = {
    "turn": lambda agent: agent.remember(Message("user", "a short one")),
    "turns": lambda agent: agent.remember([turn_of(100)] * 3),
    "document": lambda agent: agent.remember(Document(prose(900), "book")),
    "flush": lambda agent: agent.flush(),
    "clear_window": lambda agent: agent.clear_window(),
    "delete": lambda agent: agent.delete(),
}


# The other writes find room in the pages that the file has.
TROUBLES = [(trouble, kind) for trouble in (failing_commit, read_only, locked) for kind in WRITES]


@pytest.mark.parametrize(("trouble", "kind"), [*TROUBLES, (full_disk, "turns"), (full_disk, "document")])
def test_a_failed_write_changes_nothing_and_the_next_one_works(
    bob: Agent, sql: sa.Engine, kind: str, trouble: Callable[[sa.Engine], object]
) -> None:
    before = with_version(bob)
    with trouble(sql), pytest.raises(StoreError, match=r"full|read-only|locked|disk I/O error"):  # type: ignore[attr-defined]
        WRITES[kind](bob)
    assert with_version(bob) == before == reopened(bob)
    WRITES[kind](bob)
    if kind == "delete":
        return
    check_accounts(bob, cleared=[1] if kind == "clear_window" else [])
    assert with_version(bob) == reopened(bob)


def test_a_commit_that_fails_in_the_middle_of_a_read_keeps_the_groups_before(
    bob: Agent, sql: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MAX_GROUP_S", 1e9)  # on a busy machine a group ends by time otherwise
    text = prose(2500)

    def fail_third(connection: sa.Connection) -> None:
        if writes.call_count == 3:
            raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    real = bob.mplus.store.write
    with mock.patch.object(bob.mplus.store, "write", side_effect=real) as writes:
        sa.event.listen(sql, "commit", fail_third)
        with pytest.raises(StoreError, match="disk I/O error"):
            bob.remember(text, source_id="book")
        sa.event.remove(sql, "commit", fail_third)
    check_accounts(bob)
    assert with_version(bob) == reopened(bob)
    assert bob.stats().num_injections == 1 + 2 * writer._MAX_GROUP
    bob.remember(text, source_id="book")
    with engine(tmp_path / "straight.db", small()) as mplus:
        straight = mplus.agent("bob")
        straight.remember([turn_of(100), turn_of(60)])
        straight.remember(text, source_id="book")
        assert state_of(bob) == state_of(straight)


def test_a_commit_that_lasted_although_it_seemed_to_fail_counts(bob: Agent) -> None:
    real = bob.mplus.store.write

    @contextmanager
    def lasting(record: object) -> Iterator[object]:
        with real(record) as tx:  # type: ignore[arg-type]
            yield tx
        raise StoreError("the connection broke")

    with mock.patch.object(bob.mplus.store, "write", lasting), pytest.raises(StoreError, match="broke"):
        bob.remember(turn_of(90))
    assert [event.num_tokens for event in log_of(bob)] == [100, 60, 90]
    check_accounts(bob)
    assert with_version(bob) == reopened(bob)


def test_an_interrupt_in_the_middle_of_a_statement_lets_go_of_the_lock(bob: Agent, sql: sa.Engine) -> None:
    def interrupt(cursor: sqlite3.Cursor, statement: str, rows: Sequence[Any], context: object) -> None:
        def broken_off() -> Iterator[Any]:
            yield rows[0]
            raise KeyboardInterrupt

        cursor.executemany(statement, broken_off())

    before = with_version(bob)
    sa.event.listen(sql, "do_executemany", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        bob.remember(Document(prose(900), "book"))
    sa.event.remove(sql, "do_executemany", interrupt)
    assert with_version(bob) == before
    bob.remember(Document(prose(900), "book"))  # while the traceback is alive, as in a notebook
    assert caught.traceback
    check_accounts(bob)


def test_a_closed_store_is_a_store_error(tmp_path: Path) -> None:
    with engine(tmp_path / "a.db") as mplus:
        agent = mplus.agent("a")
        stream = agent.stream("hello", max_new_tokens=3)
    for call in (
        lambda: agent.remember("text"),
        lambda: agent.ask("what?"),
        lambda: agent.stats(),
        lambda: agent.window,
        lambda: mplus.agent("a"),
        lambda: mplus.agents(),
        lambda: list(stream),
    ):
        with pytest.raises(StoreError, match="the store is closed"):
            call()


def test_two_engines_write_in_turns_and_see_each_other(tmp_path: Path) -> None:
    with engine(tmp_path / "a.db", small()) as one, engine(tmp_path / "a.db", small()) as two:
        mine, theirs = one.agent("a"), two.agent("a")
        for step in range(12):
            writing, other = (mine, theirs) if step % 2 else (theirs, mine)
            writing.remember(turn_of(40 + step))
            writing.remember(prose(80, step), source_id=f"{step}")
            assert with_version(other) == with_version(writing)
        assert "was read before" in mine.remember(prose(80, 4), source_id="4").note
        assert mine.clear_window() > 0
        assert theirs.window == []
        theirs.delete()
        with pytest.raises(AgentNotFoundError, match="'a' was deleted"):
            mine.stats()


def test_who_comes_second_gets_a_conflict_and_nothing_of_theirs_is_stored(tmp_path: Path) -> None:
    with engine(tmp_path / "a.db", small()) as one, engine(tmp_path / "a.db", small()) as two:
        mine, theirs = one.agent("a"), two.agent("a")
        theirs.remember(turn_of(100))

        def turns() -> Iterator[Message]:
            yield turn_of(110)
            theirs.remember(turn_of(90))  # while mine is at it

        with pytest.raises(ConflictError, match="another writer was first"):
            mine.remember(turns())
        assert [event.num_tokens for event in log_of(mine)] == [100, 90]
        assert with_version(mine) == with_version(theirs)
        mine.remember(turn_of(110))
        check_accounts(theirs)
        assert with_version(mine) == with_version(theirs) == reopened(mine)


def write_until_done(agent: Agent, tag: str, errors: list[BaseException]) -> None:
    try:
        for number in range(12):
            while True:
                try:
                    agent.remember(Message("user", f"{tag}{number} {prose(20, number)}"))
                    break
                except ConflictError:
                    continue
    except BaseException as error:  # noqa: BLE001 - handed to the test
        errors.append(error)


def test_two_engines_that_write_at_once_lose_and_mix_nothing(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    with engine(tmp_path / "a.db", small()) as one, engine(tmp_path / "a.db", small()) as two:
        agents = {"x": one.agent("a"), "y": two.agent("a")}
        threads = [threading.Thread(target=write_until_done, args=(agents[tag], tag, errors)) for tag in agents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        check_accounts(agents["x"])
        assert with_version(agents["x"]) == with_version(agents["y"]) == reopened(agents["x"])
        told = [(event.text or "").split()[0] for event in log_of(agents["x"]) if event.kind == "message"]
        for tag in agents:
            assert [word for word in told if word.startswith(tag)] == [f"{tag}{number}" for number in range(12)]


@pytest.mark.parametrize("what", ["chain", "head_hidden", "window"])
@pytest.mark.parametrize("num_tokens", [5, 128])
def test_a_write_by_another_while_an_agent_is_opened_is_not_half_seen(
    tmp_path: Path, what: str, num_tokens: int
) -> None:
    """Opening takes several reads; another process may write between any two of them."""
    with engine(tmp_path / "a.db", small()) as one, engine(tmp_path / "a.db", small()) as two:
        theirs = two.agent("a")
        theirs.remember([turn_of(100), turn_of(100)])
        mine = one.agent("a")
        real = getattr(one.store, what)
        pending = [turn_of(max(num_tokens, 6))]

        def meddle(*arguments: object) -> object:
            if pending:
                theirs.remember(pending.pop())
            return real(*arguments)

        with mock.patch.object(one.store, what, meddle):
            stats = mine.stats()
        assert not pending
        assert stats.num_waiting_messages == len(theirs.window)
        assert stats.num_injections == theirs.stats().num_injections
        assert with_version(mine) == with_version(theirs)


@pytest.mark.parametrize("what", ["chain", "head_hidden", "window"])
def test_an_agent_deleted_while_it_is_opened_is_not_found(tmp_path: Path, what: str) -> None:
    with engine(tmp_path / "a.db", small()) as one, engine(tmp_path / "a.db", small()) as two:
        theirs = two.agent("a")
        theirs.remember([turn_of(100), turn_of(100)])
        mine = one.agent("a")
        real = getattr(one.store, what)
        pending = [theirs]

        def meddle(*arguments: object) -> object:
            if pending:
                pending.pop().delete()
            return real(*arguments)

        with mock.patch.object(one.store, what, meddle), pytest.raises(AgentNotFoundError, match="'a' was deleted"):
            mine.stats()


CALLS: dict[str, Callable[[Agent], object]] = {
    **WRITES,
    "ask": lambda agent: agent.ask("what?", max_new_tokens=1),
    "chat": lambda agent: agent.chat("what?", max_new_tokens=1),
    "generate": lambda agent: agent.generate([Message("user", "what?")], max_new_tokens=1),
    "logits": lambda agent: agent.logits("what?"),
    "window": lambda agent: agent.window,
    "window_text": lambda agent: agent.window_text,
    "stats": lambda agent: agent.stats(),
    "tokens": lambda agent: agent.tokens(),
}


@pytest.mark.parametrize("is_created_anew", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_an_agent_deleted_elsewhere_is_not_found_and_stays_so(tmp_path: Path, call: str, is_created_anew: bool) -> None:
    with engine(tmp_path / "a.db", small()) as one, engine(tmp_path / "a.db", small()) as two:
        old = one.agent("a")
        old.remember([turn_of(100), turn_of(100)])
        two.agent("a").delete()
        if is_created_anew:
            two.agent("a").remember("something new")
        with pytest.raises(AgentNotFoundError, match=r"'a' was deleted|no agent with id"):
            CALLS[call](old)
        fresh = one.agent("a")
        assert fresh is not old
        assert fresh is one.agent("a")
        assert fresh.stats().num_injections == 0
        assert len(fresh.window) == is_created_anew
        fresh.remember("and more")
        with pytest.raises(AgentNotFoundError, match=r"'a' was deleted|no agent with id"):
            CALLS[call](old)
        check_accounts(fresh)


def test_an_agent_deleted_in_the_middle_of_a_write_is_not_found(tmp_path: Path) -> None:
    with engine(tmp_path / "a.db", small()) as one, engine(tmp_path / "a.db", small()) as two:
        mine = one.agent("a")

        def turns() -> Iterator[Message]:
            yield turn_of(110)
            two.agent("a").delete()

        with pytest.raises(AgentNotFoundError, match="'a' was deleted"):
            mine.remember(turns())
        assert one.agents() == []


def test_a_damaged_page_is_our_error_and_other_agents_are_not_harmed(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with engine(path, small()) as mplus:
        mplus.agent("a").remember(prose(300))
        mplus.agent("b").remember(prose(300))
    with sqlite3.connect(path) as raw:
        raw.execute(
            "UPDATE mplus_page SET blob = CAST(substr(blob, 1, length(blob) - 1) || x'00' AS BLOB) "
            "WHERE injection_id = 1"
        )
    raw.close()
    with engine(path, small()) as mplus:
        with pytest.raises(MPlusError, match="mplus_page"):
            mplus.agent("a").stats()
        assert mplus.agent("b").stats().num_injections > 0


def test_opening_makes_no_pass_of_the_model(ada: Agent) -> None:
    ada.remember(prose(300))
    store, record = ada.mplus.store, ada.mplus.agents()[0]
    with (
        mock.patch.object(small(), "write", side_effect=AssertionError),
        mock.patch.object(small(), "read", side_effect=AssertionError),
    ):
        opened = open_resident(small(), tiny_codec(), store, record)
    assert opened.memory.num_injections == ada.stats().num_injections > 0


@pytest.mark.parametrize(
    ("table", "column"),
    [("mplus_event", "text"), ("mplus_commit", "dropped"), ("mplus_commit", "evicted"), ("mplus_commit", "snapshot")],
)
def test_a_flipped_byte_anywhere_in_the_past_is_found_when_the_agent_is_opened(
    tmp_path: Path, table: str, column: str
) -> None:
    path = tmp_path / "a.db"
    with engine(path, small()) as mplus:
        mplus.agent("a").remember(prose(20_000))
        assert mplus.agent("a").stats().num_injections > 130
    with sqlite3.connect(path) as raw:
        where = f"rowid = (SELECT min(rowid) FROM {table} WHERE {column} IS NOT NULL)"
        (blob,) = raw.execute(f"SELECT {column} FROM {table} WHERE {where}").fetchone()
        changed = blob[:-1] + bytes([blob[-1] ^ 1])
        raw.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (changed,))
    raw.close()
    with engine(path, small()) as mplus, pytest.raises(CorruptBlobError, match=rf"{table}.*{column}"):
        mplus.agent("a").stats()
