"""Every column of bytes in the schema: damage is found and named, or the column is an identifier."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from mplus_agents.errors import CorruptBlobError
from mplus_agents.store import AgentRecord, Store
from mplus_agents.store.schema import METADATA, PAGE_TOKENS
from tests.store.samples import Sizes, commit, create

_SIZES = Sizes(num_slots=PAGE_TOKENS + 2)  # two pages per layer

# What a caller looks a row up by, or (a role) a word of its own: plain UTF-8, without a checksum.
_IDENTIFIERS = {
    "mplus_agent.namespace",
    "mplus_agent.name",
    "mplus_event.role",
    "mplus_event.source_id",
    "mplus_source.source_id",
    "mplus_tag.name",
}


def _read_injections(store: Store, agent: AgentRecord) -> object:
    return list(store.injections(store.chain(agent.head_commit_id).injection_ids.values()))


# For each blob column: a row of it, who reads it, and how the error names it.
_BLOBS: dict[str, tuple[str, Callable[[Store, AgentRecord], object], str]] = {
    "mplus_event.text": (
        "seq = 1",
        lambda store, agent: store.events(agent.id),
        r"mplus_event\(agent 1, seq 1\)\.text",
    ),
    "mplus_injection.retrieval_keys": ("id = 2", _read_injections, r"mplus_injection\(id 2\)\.retrieval_keys"),
    "mplus_page.blob": (
        "injection_id = 2 AND layer = 1 AND page_idx = 1",
        _read_injections,
        r"mplus_page\(injection 2, layer 1, page 1\)\.blob",
    ),
    "mplus_commit.dropped": (
        "id = 3",
        lambda store, agent: store.chain(agent.head_commit_id),
        r"mplus_commit\(id 3, step 2\)\.dropped",
    ),
    "mplus_commit.evicted": (
        "id = 3",
        lambda store, agent: store.chain(agent.head_commit_id),
        r"mplus_commit\(id 3, step 2\)\.evicted",
    ),
    "mplus_commit.snapshot": (
        "id = 2",
        lambda store, agent: store.chain(agent.head_commit_id),
        r"mplus_commit\(id 2, step 1\)\.snapshot",
    ),
    "mplus_head_hidden.blob": (
        "agent_id = 1",
        lambda store, agent: store.head_hidden(agent),
        r"mplus_head_hidden\(agent 1, commit 3\)\.blob",
    ),
}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    with Store(f"sqlite:///{tmp_path}/mplus.db") as store, store.write(create(store)) as tx:
        for text in ("Maya lives in Oslo.", "Since when?", "Since 2019."):
            tx.add_to_window([tx.add_event("message", role="user", text=text).seq])
        for step in range(3):
            commit(tx, step, sizes=_SIZES, has_snapshot=step == 1)
    return tmp_path / "mplus.db"


def test_every_column_of_bytes_is_covered() -> None:
    columns = {
        f"{table.name}.{column.name}"
        for table in METADATA.tables.values()
        for column in table.columns
        if isinstance(column.type, sa.LargeBinary)
    }
    assert columns == _IDENTIFIERS | set(_BLOBS)


@pytest.mark.parametrize("column", _BLOBS)
def test_a_changed_byte_is_found_and_named(database: Path, column: str) -> None:
    where, read, named = _BLOBS[column]
    table, name = column.split(".")
    moments = random.Random(column)
    with Store(f"sqlite:///{database}") as store, closing(sqlite3.connect(database)) as vandal:
        agent = store.find_agent("default", "alice")
        assert agent is not None
        read(store, agent)
        blob = vandal.execute(f"SELECT {name} FROM {table} WHERE {where}").fetchone()[0]
        for _ in range(25):
            altered = bytearray(blob)
            altered[moments.randrange(len(blob))] ^= moments.randrange(1, 256)
            vandal.execute(f"UPDATE {table} SET {name} = ? WHERE {where}", (bytes(altered),))
            vandal.commit()
            with pytest.raises(CorruptBlobError, match=named):
                read(store, agent)
        vandal.execute(f"UPDATE {table} SET {name} = ? WHERE {where}", (blob[: len(blob) // 2],))
        vandal.commit()
        with pytest.raises(CorruptBlobError, match=named):
            read(store, agent)
        vandal.execute(f"UPDATE {table} SET {name} = ? WHERE {where}", (blob,))
        vandal.commit()
        read(store, agent)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM mplus_page WHERE injection_id = 2 AND layer = 1 AND page_idx = 1",
        "DELETE FROM mplus_page WHERE injection_id = 2",
        "UPDATE mplus_page SET page_idx = 2 WHERE injection_id = 2 AND layer = 1 AND page_idx = 1",
        "INSERT INTO mplus_page SELECT 2, 2, page_idx, blob FROM mplus_page WHERE injection_id = 2 AND layer = 1",
    ],
)
def test_missing_and_additional_pages_are_found(database: Path, statement: str) -> None:
    with closing(sqlite3.connect(database)) as vandal:
        vandal.execute(statement)
        vandal.commit()
    with (
        Store(f"sqlite:///{database}") as store,
        pytest.raises(CorruptBlobError, match=r"mplus_page has .* injection 2"),
    ):
        list(store.injections([1, 2]))


def test_pages_in_each_others_place_are_found_when_their_shapes_differ(database: Path) -> None:
    with closing(sqlite3.connect(database)) as vandal:
        vandal.execute(
            "UPDATE mplus_page SET blob = (SELECT blob FROM mplus_page WHERE injection_id = 2 AND layer = 1 AND"
            " page_idx = 0) WHERE injection_id = 2 AND layer = 1 AND page_idx = 1"
        )
        vandal.commit()
    named = r"mplus_page\(injection 2, layer 1, page 1\)\.blob is torch\.float32 \[2, 32, 2, 3\], unlike"
    with Store(f"sqlite:///{database}") as store, pytest.raises(CorruptBlobError, match=named):
        list(store.injections([2]))


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE mplus_agent SET name = x'FF'", r"mplus_agent\(id 1\)\.name is no UTF-8"),
        ("UPDATE mplus_agent SET settings = '{'", r"mplus_agent\(id 1\)\.settings is no JSON"),
        ("UPDATE mplus_agent SET fingerprint = '[]'", r"mplus_agent\(id 1\)\.fingerprint is no dict"),
    ],
)
def test_columns_that_do_not_decode_are_named(database: Path, statement: str, named: str) -> None:
    with closing(sqlite3.connect(database)) as vandal:
        vandal.execute(statement)
        vandal.commit()
    with Store(f"sqlite:///{database}") as store, pytest.raises(CorruptBlobError, match=named):
        store.list_agents()


def test_a_tag_that_does_not_decode_is_named(database: Path) -> None:
    with Store(f"sqlite:///{database}") as store:
        agent = store.find_agent("default", "alice")
        assert agent is not None
        store.history.set_tag(agent, "early", 1)
        with closing(sqlite3.connect(database)) as vandal:
            vandal.execute("UPDATE mplus_tag SET name = x'ff'")
            vandal.commit()
        with pytest.raises(CorruptBlobError, match=r"mplus_tag\(agent 1\)\.name is no UTF-8"):
            store.history.tags(agent.id)
