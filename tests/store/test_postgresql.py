"""What is PostgreSQL's own: who waits for whom, durability, schemas, and errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from mplus_agents.errors import ConflictError, InvalidInputError, StoreError
from mplus_agents.store import AgentRecord, Store
from mplus_agents.store.schema import HEAD_REVISION, METADATA, VERSION_TABLE
from tests.store.conftest import Place
from tests.store.samples import create, give_up, grow

pytestmark = pytest.mark.timeout(60)


def while_writing(store: Store, agent: AgentRecord, other: Callable[[], object]) -> None:
    """Run something in another thread while this one holds a write transaction on an agent."""
    with ThreadPoolExecutor(1) as pool, store.write(agent) as tx:
        tx.add_event("message", text="first")
        pool.submit(other).result()


def test_writers_of_different_agents_do_not_wait(postgres_place: Place) -> None:
    with postgres_place.open(busy_timeout_s=0.3) as store:
        alice, bob = create(store), create(store, "bob")
        while_writing(store, alice, lambda: grow(store, bob, range(1)))
        assert [store.agent_version(agent.id) for agent in (alice, bob)] == [1, 1]


def test_a_writer_waits_for_another_of_its_agent_no_longer_than_the_timeout(postgres_place: Place) -> None:
    def write_too() -> None:
        with pytest.raises(StoreError, match="the agent is locked: another writer held it longer than the timeout"):
            grow(store, alice, range(1))

    with postgres_place.open(busy_timeout_s=0.3) as store:
        alice = create(store)
        while_writing(store, alice, write_too)
        assert [event.text for event in store.events(alice.id)] == ["first"]


def test_a_writer_that_waited_gets_a_conflict(postgres_place: Place) -> None:
    with postgres_place.open() as first, postgres_place.open() as second:
        alice = create(first)
        has_begun = threading.Event()

        def write_too() -> None:
            has_begun.set()
            with pytest.raises(ConflictError, match="is at version 1, this write is based on version 0"):
                grow(second, alice, range(1))

        with ThreadPoolExecutor(1) as pool:
            with first.write(alice) as tx:
                tx.add_event("message", text="first")
                waiting = pool.submit(write_too)
                has_begun.wait()
                with pytest.raises(TimeoutError):
                    waiting.result(timeout=0.2)  # it waits
            waiting.result()
        assert [event.text for event in first.events(alice.id)] == ["first"]
        assert first.stats(alice.id).num_commits == 0


def test_of_many_that_create_one_agent_one_does(postgres_place: Place) -> None:
    together = threading.Barrier(6)

    def create_one(store: Store) -> str:
        together.wait()
        try:
            create(store)
        except ConflictError as error:
            return str(error)
        return "created"

    with postgres_place.open() as store, ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(create_one, [store] * 6))
        assert sorted(outcomes) == ["agent 'alice' exists already in namespace 'default'"] * 5 + ["created"]
        assert len(store.list_agents()) == 1


def test_a_write_reaches_the_disk_whatever_the_server_is_set_to(postgres_database: str) -> None:
    with Store(postgres_database) as store, store._database.write() as connection:
        name = sa.make_url(postgres_database).database
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
    with Store(postgres_database) as store:
        with store._database.read() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "off"
        with store._database.write() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"


def test_a_read_sees_one_moment_and_cannot_write(postgres_place: Place) -> None:
    with postgres_place.open() as store:
        agent = create(store)
        count = sa.text("SELECT count(*) FROM mplus_commit")
        with store._database.read() as connection:
            assert connection.scalar(count) == 0
            with ThreadPoolExecutor(1) as pool:
                pool.submit(grow, store, agent, range(2)).result()
            assert connection.scalar(count) == 0
        with pytest.raises(StoreError, match="the database is read-only"), store._database.read() as connection:
            connection.exec_driver_sql("DELETE FROM mplus_agent")
        assert store.stats(agent.id).num_commits == 2


@pytest.mark.parametrize("isolation_level", [None, "AUTOCOMMIT", "SERIALIZABLE"])
def test_a_callers_engine_gets_whole_transactions_and_keeps_its_settings(
    postgres_place: Place, isolation_level: str | None
) -> None:
    url = sa.make_url(postgres_place.url).set(drivername="postgresql+psycopg")
    options = {} if isolation_level is None else {"isolation_level": isolation_level}
    engine = sa.create_engine(url, pool_size=1, max_overflow=0, **options)
    expected = {None: "read committed", "AUTOCOMMIT": "read committed", "SERIALIZABLE": "serializable"}
    store = Store(engine, schema=postgres_place.schema)
    agent = create(store)
    with pytest.raises(KeyboardInterrupt):
        give_up(store, agent)
    assert store.events(agent.id) == []
    assert grow(store, agent, range(1)).version == 1
    store.close()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar_one() == expected[isolation_level]
        assert connection.exec_driver_sql("SHOW transaction_read_only").scalar_one() == "off"
        assert str(postgres_place.schema) not in connection.exec_driver_sql("SHOW search_path").scalar_one()
    engine.dispose()


def test_schemas_are_apart_and_the_default_one_is_the_users(postgres_database: str) -> None:
    with (
        Store(postgres_database) as default,
        Store(postgres_database, schema='odd "name') as first,
        Store(postgres_database, schema="other") as second,
    ):
        for name, store in (("default", default), ("first", first), ("second", second)):
            create(store, name)
        for name, store in (("default", default), ("first", first), ("second", second)):
            assert [agent.name for agent in store.list_agents()] == [name]
        with default._database.read() as connection:
            query = (
                "SELECT table_schema, count(*) FROM information_schema.tables "
                "WHERE table_name LIKE 'mplus%%' GROUP BY table_schema"
            )
            found: dict[str, int] = dict(connection.exec_driver_sql(query).all())
        assert found == {"public": 10, 'odd "name': 10, "other": 10}


def test_migrations_make_what_the_metadata_says(postgres_database: str) -> None:
    with Store(postgres_database) as store, store._database.read() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), METADATA) == []
        version = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar_one()
        assert version == HEAD_REVISION


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": 1, "host": "127.0.0.1", "query": {}}, "the server cannot be reached: "),
        ({"database": "nosuch"}, 'the server cannot be reached: .*database "nosuch" does not exist'),
    ],
)
def test_a_server_that_cannot_be_used_is_one_clear_error(
    postgres_url: str, change: dict[str, object], message: str
) -> None:
    url = sa.make_url(postgres_url).set(password="secret", **change)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=message) as caught:
        Store(url.render_as_string(hide_password=False))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_schema_is_postgresqls_and_has_a_name() -> None:
    with pytest.raises(InvalidInputError, match="schema is 'x'; allowed: None: SQLite has no schemas"):
        Store("sqlite://", schema="x")
    for name in ("", "é" * 32, "pg_x", "a\0b", 5):
        with pytest.raises(InvalidInputError, match=r"schema is .*; allowed: a printable name of 1 to 63 bytes"):
            Store("postgresql://me:secret@127.0.0.1:1/d", schema=name)  # type: ignore[arg-type]  # wrong on purpose


def test_a_schema_that_somebody_else_made_is_enough(postgres_database: str) -> None:
    url, role = sa.make_url(postgres_database), f"mplus_guest_{os.getpid()}"
    server = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP ROLE IF EXISTS {role}")
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD 'guest'")
        connection.exec_driver_sql(f'CREATE SCHEMA "made 50%%" AUTHORIZATION {role}')
    guest = url.set(username=role, password="guest").render_as_string(hide_password=False)
    with Store(guest, schema="made 50%") as store:
        assert grow(store, create(store), range(1)).version == 1
    with pytest.raises(StoreError, match=r"no permission; the user needs .* to create it if there is none"):
        Store(guest, schema="not made")
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role} CASCADE")
        connection.exec_driver_sql(f"DROP ROLE {role}")
    server.dispose()


def test_many_that_move_one_tag_all_do(postgres_place: Place) -> None:
    with postgres_place.open() as store, ThreadPoolExecutor(4) as pool:
        alice = grow(store, create(store), range(3))
        list(pool.map(lambda number: store.history.set_tag(alice, "moved", 1 + number % 3), range(40)))
        assert store.history.tags(alice.id)["moved"] in (1, 2, 3)


def test_agents_deleted_together_leave_nothing(postgres_place: Place) -> None:
    with postgres_place.open() as store, ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            alice = grow(store, create(store), range(2))
            agents = [alice, *(store.history.fork(alice, "default", f"fork {number}") for number in range(3))]
            list(pool.map(lambda agent: store.delete_agent(agent.id), agents))
            with store._database.read() as connection:
                for table in METADATA.tables.values():
                    assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 0


def test_a_connection_that_the_server_has_closed_is_replaced(postgres_database: str) -> None:
    with Store(postgres_database) as store:
        agent = create(store)
        server = sa.create_engine(sa.make_url(postgres_database), isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            query = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            assert connection.exec_driver_sql(query).scalars().all() == [True]
        server.dispose()
        assert grow(store, agent, range(1)).version == 1
