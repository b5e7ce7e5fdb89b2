"""How connections are set up, a caller's Engine, and what becomes of errors."""

from __future__ import annotations

import dis
import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from mplus_agents.errors import InvalidInputError, StoreError
from mplus_agents.store import Store
from tests.store.samples import assert_stored, create, give_up, grow

_PRAGMAS = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")


def _pragmas(connection: sa.Connection) -> dict[str, object]:
    return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in _PRAGMAS}


def _pragmas_of_many_connections(store: Store) -> list[tuple[int, dict[str, object]]]:
    """From six threads that hold a connection at the same time: which connection it is, and its settings."""
    together = threading.Barrier(6)
    found: list[tuple[int, dict[str, object]]] = []

    def look(is_writer: bool) -> None:
        with store._database.write() if is_writer else store._database.read() as connection:
            together.wait(timeout=20)
            found.append((id(connection.connection.dbapi_connection), _pragmas(connection)))
            together.wait(timeout=20)

    threads = [threading.Thread(target=look, args=(index == 0,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("is_callers_engine", [False, True])
def test_every_connection_is_durable(tmp_path: Path, is_callers_engine: bool) -> None:
    url = f"sqlite:///{tmp_path}/mplus.db"
    engine = sa.create_engine(url)
    with Store(engine if is_callers_engine else url, busy_timeout_s=12.5) as store:
        found = _pragmas_of_many_connections(store)
        assert len({identity for identity, _ in found}) == 6
        expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 12_500}
        assert [pragmas for _, pragmas in found] == [expected] * 6
    engine.dispose()


def test_writes_hold_the_write_lock_from_the_start_and_reads_do_not(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/mplus.db") as store:
        agent = create(store)
        with closing(sqlite3.connect(tmp_path / "mplus.db", timeout=0, isolation_level=None)) as other:
            with store._database.read() as connection:
                connection.exec_driver_sql("SELECT count(*) FROM mplus_agent").scalar()
                other.execute("BEGIN IMMEDIATE")
                other.execute("ROLLBACK")
            with store.write(agent), pytest.raises(sqlite3.OperationalError, match="database is locked"):
                other.execute("BEGIN IMMEDIATE")


def test_a_read_sees_one_moment(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/mplus.db") as store:
        count = sa.text("SELECT count(*) FROM mplus_agent")
        with store._database.read() as connection:
            assert connection.scalar(count) == 0
            create(store)
            assert connection.scalar(count) == 0
        with store._database.read() as connection:
            assert connection.scalar(count) == 1


def test_a_database_that_stays_locked_is_an_error(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/mplus.db", busy_timeout_s=0.1) as store:
        agent = create(store)
        with closing(sqlite3.connect(tmp_path / "mplus.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match=r"the database is locked: .* \(sqlite:///"), store.write(agent):
                pass
            other.execute("ROLLBACK")
        with store.write(agent):
            pass
        assert store.agent_version(agent.id) == 1


def test_a_thread_waits_for_another_no_longer_than_the_timeout(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/mplus.db", busy_timeout_s=0.1) as store:
        alice, bob = create(store), create(store, "bob")
        messages: list[str] = []

        def write_bob() -> None:
            with pytest.raises(StoreError, match=r"another writer held it longer than the timeout of 0\.1 s") as caught:
                store.write(bob).__enter__()
            messages.append(str(caught.value))

        thread = threading.Thread(target=write_bob)
        with store.write(alice):
            thread.start()
            thread.join()
        assert len(messages) == 1


def test_a_full_database_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/mplus.db", poolclass=StaticPool)
    with Store(engine) as store:
        agent = grow(store, create(store), range(2))
        with engine.connect() as connection:
            num_pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {num_pages}")
        with pytest.raises(StoreError, match="the disk, or the database at its size limit, is full"):
            grow(store, agent, range(2, 200))
        after = store.find_agent("default", "alice")
        assert after is not None
        chain = store.chain(after.head_commit_id)
        assert chain.num_commits == after.version >= 2
        for step, injection in enumerate(store.injections(chain.injection_ids.values())):
            assert_stored(injection, step)
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        assert grow(store, after, range(after.version, after.version + 1)).version == after.version + 1
    engine.dispose()


def _write_text(path: Path) -> str:
    path.write_text("no database at all, but long enough to be looked at" * 40)
    return f"sqlite:///{path}"


def _write_read_only(path: Path) -> str:
    Store(f"sqlite:///{path}").close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE mplus_alembic_version")
    return f"sqlite:///file:{path}?mode=ro&uri=true"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_write_text, "the file is not an SQLite database"),
        (_write_read_only, "the database is read-only"),
        (lambda path: f"sqlite:///{path.parent}", "the database file cannot be opened"),
        (lambda path: f"sqlite:///{path}/mplus.db", "the folder of the database does not exist"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_error(
    tmp_path: Path, make: Callable[[Path], str], message: str
) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        Store(make(tmp_path / "file"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mplus.db", "target is 'mplus.db'; allowed: an SQLAlchemy Engine, or a URL such as"),
        ("nosuch://host/db", "target is 'nosuch://host/db'; allowed"),
        ("sqlite+aiosqlite:///mplus.db", r"target is 'sqlite\+aiosqlite:///mplus.db'; allowed"),
        (5, "target is 5; allowed"),
    ],
)
def test_a_target_that_cannot_be_used_is_refused(target: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Store(target)


@pytest.mark.parametrize(
    "url", ["nosuch://me:secret@host/db", "mysql://me:secret@host/db", "postgresql+asyncpg://me:secret@h/d"]
)
def test_errors_do_not_show_passwords(url: str) -> None:
    with pytest.raises(InvalidInputError, match=r"me:\*\*\*@|//\*\*\*@") as caught:
        Store(url)
    assert "secret" not in str(caught.value)


def test_a_negative_timeout_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="busy_timeout_s is -1"):
        Store("sqlite://", busy_timeout_s=-1)


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/mplus.db")
    create(store)
    store.close()
    with pytest.raises(StoreError, match="the store is closed"):
        store.list_agents()
    store.close()


def test_memory_databases_are_apart() -> None:
    with Store("sqlite://") as first, Store("sqlite://") as second:
        create(first)
        assert [agent.name for agent in first.list_agents()] == ["alice"]
        assert second.list_agents() == []
        assert first.url == "sqlite://"


def test_a_read_inside_a_write_in_memory_sees_the_write_and_does_not_end_it() -> None:
    with Store("sqlite://") as store:
        agent = create(store)

        def read_and_give_up() -> None:
            with store.write(agent) as tx:
                tx.add_to_window([tx.add_event("message", text="a").seq])
                assert [event.text for event in store.window(agent.id)] == ["a"]
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            read_and_give_up()
        assert store.events(agent.id) == []


def test_a_callers_engine_is_shared_and_not_disposed(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE note (body TEXT)")
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num TEXT)")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('the application''s own')")
    with Store(engine) as store:
        agent = grow(store, create(store), range(2))

    def fail() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO note VALUES ('lost')")
            raise ZeroDivisionError

    # The application's transactions are still its own.
    with pytest.raises(ZeroDivisionError):
        fail()
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO note VALUES ('kept')")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT body FROM note").scalars().all() == ["kept"]
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all() == [
            "the application's own"
        ]
    with Store(engine) as store:
        assert store.find_agent("default", "alice") == agent
        assert store.url.endswith("/app.db")
    engine.dispose()


@pytest.mark.parametrize("begins", ["BEGIN", "BEGIN IMMEDIATE"])
def test_a_callers_engine_may_begin_transactions_by_itself(tmp_path: Path, begins: str) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")

    @sa.event.listens_for(engine, "connect")
    def leave_transactions_to_us(driver: sqlite3.Connection, record: object) -> None:
        driver.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begins)

    with Store(engine) as store:
        agent = create(store)
        with pytest.raises(KeyboardInterrupt):
            give_up(store, agent)
        assert store.agent_version(agent.id) == 0
        assert store.stats(agent.id).num_commits == 0
        assert grow(store, agent, range(2)).version == 2
    engine.dispose()


def test_a_callers_engine_in_autocommit_still_gets_whole_transactions(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db", isolation_level="AUTOCOMMIT")
    with Store(engine) as store:
        agent = create(store)
        with pytest.raises(KeyboardInterrupt):
            give_up(store, agent)
        assert store.events(agent.id) == []
        assert store.stats(agent.id).num_commits == 0
        assert grow(store, agent, range(2)).version == 2
        assert store.agent_version(agent.id) == 2
    engine.dispose()


_SQLALCHEMY = ("sqlalchemy/engine/base.py", "sqlalchemy/engine/util.py")
_OURS = ("store/connection.py", "store/sqlite.py", "store/write_queue.py")


def interrupted_at(number: int, body: Callable[[], None], files: tuple[str, ...]) -> bool:
    """Raise KeyboardInterrupt after a call or jump in some files, counted from 1; False if the body ends before.

    There CPython looks for signals. Between taking a lock by `with` and the block it does not.
    """
    num_left = number
    last_opcodes: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal num_left
        if not frame.f_code.co_filename.endswith(files):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            num_left -= last_opcodes.get(frame, "").startswith(("CALL", "JUMP_BACKWARD", "RESUME"))
            last_opcodes[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if num_left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        body()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def in_another_thread(body: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(body).result()


@pytest.mark.parametrize("files", [_SQLALCHEMY, _OURS])
@pytest.mark.parametrize("url", ["sqlite:///{}/a.db", "sqlite://"])
def test_an_interrupt_anywhere_in_a_transaction_comes_out_as_it_is_and_does_no_harm(
    tmp_path: Path, url: str, files: tuple[str, ...]
) -> None:
    with Store(url.format(tmp_path), busy_timeout_s=0.2) as store:
        agent = create(store)

        def write() -> None:
            with store.write(agent) as tx:
                tx.add_to_window([tx.add_event("message", text=f"{tx.agent.version}").seq])

        def look_and_write() -> None:
            nonlocal agent
            for _ in range(2):
                found = store.find_agent("default", "alice")
                assert found is not None
                assert [event.text for event in store.window(agent.id)] == [f"{at}" for at in range(found.version)]
                agent = found
                write()
            agent = replace(agent, version=agent.version + 1)

        number = 1
        while interrupted_at(number, write, files):
            in_another_thread(look_and_write)
            number += 1
        assert number > 20
        assert store.agent_version(agent.id) == agent.version + 1


def test_an_error_of_the_database_after_an_interrupt_is_still_ours(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/a.db") as store:
        agent = create(store)
        try:
            give_up(store, agent)
        except KeyboardInterrupt:
            with pytest.raises(StoreError, match="syntax error"), store._database.read() as connection:
                connection.exec_driver_sql("SELEC")


def test_a_callers_open_transaction_is_not_rolled_back() -> None:
    engine = sa.create_engine("sqlite://", poolclass=StaticPool)
    with Store(engine) as store:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE note (body TEXT)")
            connection.exec_driver_sql("INSERT INTO note VALUES ('kept')")
            with pytest.raises(StoreError, match="the Engine's only connection is in a transaction that is not"):
                store.list_agents()
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT body FROM note").scalars().all() == ["kept"]
        assert store.list_agents() == []
    engine.dispose()


def test_a_callers_engine_in_memory_needs_one_connection() -> None:
    engine = sa.create_engine("sqlite://")
    with pytest.raises(InvalidInputError, match="poolclass=StaticPool"):
        Store(engine)
    engine.dispose()
