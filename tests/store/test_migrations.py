from __future__ import annotations

import os
import sqlite3
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from mplus_agents import store as store_package
from mplus_agents.errors import SchemaVersionError
from mplus_agents.store import Store
from mplus_agents.store.schema import HEAD_REVISION, METADATA, VERSION_TABLE
from tests.store.conftest import Place
from tests.store.samples import create, grow


def _dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return list(database.iterdump())


def test_migrations_make_what_the_metadata_says(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/mplus.db") as store, store._database.read() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), METADATA) == []


def test_migrations_make_the_same_sql_as_the_metadata(tmp_path: Path) -> None:
    """Alembic does not compare primary keys, cascades, NOT NULL of keys and autoincrement: SQLite's own text does."""
    Store(f"sqlite:///{tmp_path}/migrated.db").close()
    with Store("sqlite://") as store, store._database.write() as connection:
        for table in reversed(METADATA.tables.values()):  # without the foreign keys' order: SQLite does not ask for it
            connection.exec_driver_sql(f"DROP TABLE {table.name}")
        METADATA.create_all(connection)
        query = "SELECT name, sql FROM sqlite_master WHERE name LIKE 'mplus%' OR name LIKE 'ix%'"
        fresh = {name: _normalised(sql) for name, sql in connection.exec_driver_sql(query)}
    with closing(sqlite3.connect(tmp_path / "migrated.db")) as database:
        migrated = {name: _normalised(sql) for name, sql in database.execute(query)}
    del migrated[VERSION_TABLE], fresh[VERSION_TABLE]
    assert migrated == fresh
    assert len(migrated) == 9 + 7  # tables and indexes


def _normalised(sql: str) -> list[str]:
    lines = (line.strip().rstrip(",").strip() for line in sql.splitlines())
    return sorted(line for line in lines if line)


def test_the_newest_revision_is_the_one_the_code_expects() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(store_package.__file__).parent / "migrations"))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [HEAD_REVISION]


def test_a_newer_schema_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "mplus.db"
    with Store(f"sqlite:///{path}") as store:
        grow(store, create(store), range(1))
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE mplus_alembic_version SET version_num = '9999'")
        database.commit()
    before, bytes_before = _dump(path), path.read_bytes()
    with pytest.raises(SchemaVersionError, match=rf"schema '9999'; this version .* up to '{HEAD_REVISION}'"):
        Store(f"sqlite:///{path}")
    assert _dump(path) == before
    assert path.read_bytes() == bytes_before


def test_a_database_of_the_first_schema_is_upgraded_with_all_that_is_in_it(place: Place) -> None:
    with place.open() as store:
        agent = grow(store, create(store), range(3))
        with store._database.write() as connection:  # all that the first schema did not have
            connection.exec_driver_sql("DROP TABLE mplus_tag")
            connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '0001'")
    with place.open() as store:
        assert store.find_agent("default", "alice") == agent
        assert store.chain(agent.head_commit_id).num_commits == 3
        store.history.set_tag(agent, "early", 1)
        assert store.history.tags(agent.id) == {"early": 1}
        with store._database.read() as connection:
            version = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar_one()
        assert version == HEAD_REVISION


def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mplus.db"
    with Store(f"sqlite:///{path}") as store:
        agent = grow(store, create(store), range(1))
    before = _dump(path)
    with Store(f"sqlite:///{path}") as store:
        assert store.find_agent("default", "alice") == agent
    assert _dump(path) == before


def test_an_applications_own_version_table_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO alembic_version VALUES ('f00d')")
        database.execute("CREATE TABLE note (body TEXT)")
        database.commit()
    before = _dump(path)
    with Store(f"sqlite:///{path}") as store:
        create(store)
    after = _dump(path)
    assert [line for line in after if "mplus" not in line and "sqlite_sequence" not in line] == before
    assert f"INSERT INTO \"{VERSION_TABLE}\" VALUES('{HEAD_REVISION}');" in after


def test_odd_characters_in_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "100% här"
    folder.mkdir()
    with Store(f"sqlite:///{folder}/mplus.db") as store:
        assert create(store).version == 0
    assert (folder / "mplus.db").exists()


def test_many_processes_may_create_the_database_at_the_same_time(place: Place) -> None:
    if not place.is_sqlite:
        place = replace(place, schema=f"mplus created by many {os.getpid()}")
    reader, writer = os.pipe()

    def open_and_create(index: int) -> None:
        os.read(reader, 1)  # all wait for the starting shot
        with place.open() as store:
            create(store, f"agent {index}")

    children = [_fork(partial(open_and_create, index)) for index in range(6)]
    os.write(writer, b"." * 6)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    os.close(reader)
    os.close(writer)
    with place.open() as store:
        assert sorted(agent.name for agent in store.list_agents()) == [f"agent {index}" for index in range(6)]
        if not place.is_sqlite:
            with store._database.write() as connection:
                connection.exec_driver_sql(f'DROP SCHEMA "{place.schema}" CASCADE')


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - nothing may leave this process but its exit status
            traceback.print_exc()
            os._exit(1)
    return child


def test_the_documented_query_walks_a_chain(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "schema.md").read_text(encoding="utf-8")
    query = page.split("```sql\n")[1].split("```")[0]
    with Store(f"sqlite:///{tmp_path}/mplus.db") as store:
        agent = grow(store, create(store), range(2))
        grow(store, create(store, "bob"), range(1))
        grow(store, agent, range(2, 4))
    with closing(sqlite3.connect(tmp_path / "mplus.db")) as database:
        assert [row[:2] for row in database.execute(query)] == [(0, 1), (1, 2), (2, 4), (3, 5)]


def test_every_column_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "schema.md").read_text(encoding="utf-8")
    for table in METADATA.tables.values():
        section = page.split(f"`{table.name}`", maxsplit=1)[1]
        assert [column.name for column in table.columns if f"`{column.name}`" not in section] == []
