"""The databases that the store's tests run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mplus_agents.store import Store
from mplus_agents.store.schema import METADATA


@dataclass(frozen=True)
class Place:
    """Where a database is, for tests that open it more than once."""

    url: str
    schema: str | None = None

    @property
    def is_sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    def open(self, **options: Any) -> Store:
        return Store(self.url, schema=self.schema, **options)


@pytest.fixture(scope="session")
def postgres_tables(postgres_url: str) -> Iterator[Place]:
    """One schema for all tests of a run: emptying tables is faster than making them."""
    place = Place(postgres_url, f"mplus store tests {os.getpid()}")
    place.open().close()
    yield place
    with place.open() as store, store._database.write() as connection:
        connection.exec_driver_sql(f'DROP SCHEMA "{place.schema}" CASCADE')


@pytest.fixture
def postgres_place(postgres_tables: Place) -> Place:
    """An empty database on PostgreSQL."""
    with postgres_tables.open() as store, store._database.write() as connection:
        names = ", ".join(METADATA.tables)
        connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY CASCADE")
    return postgres_tables


@pytest.fixture(params=["file", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty database that processes and threads can share."""
    if request.param == "postgresql":
        found: Place = request.getfixturevalue("postgres_place")
        return found
    return Place(f"sqlite:///{tmp_path}/mplus.db")


@pytest.fixture(params=["file", "memory", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store on an empty database."""
    if request.param == "postgresql":
        place = request.getfixturevalue("postgres_place")
    else:
        place = Place("sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/mplus.db")
    with place.open() as opened:
        yield opened


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """The URL of a database of its own, for tests of the default schema; dropped after the test."""
    url = sa.make_url(postgres_url).set(drivername="postgresql+psycopg")
    server, name = sa.create_engine(url, isolation_level="AUTOCOMMIT"), f"mplus_test_{os.getpid()}"
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name}")
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield url.set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")
    server.dispose()
