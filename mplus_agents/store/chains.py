"""Reads along an agent's chain: the walk over parents, snapshots, and the tokens of injections."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
import torch

from mplus_agents.errors import CorruptBlobError, StoreError
from mplus_agents.store.blobs import StoredTensor, decode_arrays, decode_tensor, open_tensor
from mplus_agents.store.records import Chain, CommitRecord, InjectionInfo, Snapshot, StoredInjection
from mplus_agents.store.rows import MAX_IDS_PER_QUERY, batched, to_info
from mplus_agents.store.schema import COMMIT, INJECTION, PAGE, PAGE_TOKENS

__all__ = ["chain_ids", "check_commits", "injection_batches", "read_chain", "read_infos", "read_injections"]

_MAX_BATCH_BYTES = 64 * 2**20  # of pages in host memory at once; a single larger injection is read alone

_NO_BLOBS = (COMMIT.c.id, COMMIT.c.parent_id, COMMIT.c.agent_id, COMMIT.c.step, COMMIT.c.injection_id)
_INFO_COLUMNS = (INJECTION.c.id, INJECTION.c.agent_id, INJECTION.c.num_text_tokens, INJECTION.c.event_seqs)


def _walk() -> sa.CTE:
    columns = (*_NO_BLOBS, COMMIT.c.created_at, COMMIT.c.snapshot.is_not(None).label("has_snapshot"))
    walk = sa.select(*columns).where(COMMIT.c.id == sa.bindparam("commit_id")).cte("walk", recursive=True)
    # Steps count down, so that the walk ends whatever the rows say.
    is_parent = sa.and_(COMMIT.c.id == walk.c.parent_id, COMMIT.c.step == walk.c.step - 1)
    return walk.union_all(sa.select(*columns).join(walk, is_parent))


chain_ids = _walk()
"""The chain that ends at the bound parameter `commit_id`, without its blobs."""

_SELECT_CHAIN = sa.select(chain_ids).order_by(chain_ids.c.step)
_SELECT_SNAPSHOT = sa.select(COMMIT.c.snapshot).where(COMMIT.c.id == sa.bindparam("commit_id"))
_SELECT_DELTAS = sa.select(COMMIT.c.id, COMMIT.c.dropped, COMMIT.c.evicted).where(
    COMMIT.c.id.in_(sa.bindparam("ids", expanding=True))
)
_SELECT_INFOS = sa.select(*_INFO_COLUMNS, INJECTION.c.created_at).where(
    INJECTION.c.id.in_(sa.bindparam("ids", expanding=True))
)
_SELECT_SIZES = sa.select(INJECTION.c.id, INJECTION.c.page_bytes).where(
    INJECTION.c.id.in_(sa.bindparam("ids", expanding=True))
)
_SELECT_RETRIEVAL_KEYS = sa.select(INJECTION.c.id, INJECTION.c.retrieval_keys).where(
    INJECTION.c.id.in_(sa.bindparam("ids", expanding=True))
)
_SELECT_PAGES = sa.select(PAGE).where(PAGE.c.injection_id.in_(sa.bindparam("ids", expanding=True)))


def read_chain(connection: sa.Connection, commit_id: int) -> Chain:
    """Walk from a commit to the first one.

    Args:
        connection: A connection in a transaction.
        commit_id: The last commit.

    Returns:
        The chain.

    Raises:
        StoreError: If there is no such commit, or the chain has a gap.
        CorruptBlobError: If a blob is altered.
    """
    rows = connection.execute(_SELECT_CHAIN, {"commit_id": commit_id}).all()
    if not rows:
        raise StoreError(f"there is no commit {commit_id}")
    if rows[0].step != 0 or rows[0].parent_id is not None:
        found = f"commit {rows[0].id} (step {rows[0].step})"
        raise StoreError(f"the chain of commit {commit_id} breaks off at {found}")
    snapshot = None
    for row in reversed(rows):
        if row.has_snapshot:
            blob = connection.execute(_SELECT_SNAPSHOT, {"commit_id": row.id}).scalar_one()
            what = f"mplus_commit(id {row.id}, step {row.step}).snapshot"
            snapshot = Snapshot(row.id, row.step, decode_arrays(blob, what))
            break
    after = rows if snapshot is None else rows[snapshot.step + 1 :]
    return Chain({row.step: row.injection_id for row in rows}, snapshot, _commits(connection, after))


def _commits(connection: sa.Connection, rows: Sequence[sa.Row[*tuple[Any, ...]]]) -> list[CommitRecord]:
    commits: list[CommitRecord] = []
    for batch in batched(rows, MAX_IDS_PER_QUERY):
        deltas = {row.id: row for row in connection.execute(_SELECT_DELTAS, {"ids": [row.id for row in batch]})}
        for row in batch:
            what = f"mplus_commit(id {row.id}, step {row.step})"
            commits.append(
                CommitRecord(
                    id=row.id,
                    parent_id=row.parent_id,
                    agent_id=row.agent_id,
                    step=row.step,
                    injection_id=row.injection_id,
                    dropped=decode_tensor(deltas[row.id].dropped, f"{what}.dropped"),
                    evicted=decode_tensor(deltas[row.id].evicted, f"{what}.evicted"),
                    created_at=row.created_at,
                )
            )
    return commits


def read_infos(connection: sa.Connection, injection_ids: Iterable[int]) -> dict[int, InjectionInfo]:
    """Read where injections come from.

    Args:
        connection: A connection in a transaction.
        injection_ids: Any number of ids.

    Returns:
        By id, in the order asked for.

    Raises:
        StoreError: If one does not exist.
    """
    infos: dict[int, InjectionInfo] = {}
    for batch in batched(injection_ids, MAX_IDS_PER_QUERY):
        found = {row.id: to_info(row) for row in connection.execute(_SELECT_INFOS, {"ids": batch})}
        _check_found(batch, found)
        infos.update((injection_id, found[injection_id]) for injection_id in batch)
    return infos


def injection_batches(connection: sa.Connection, injection_ids: Sequence[int]) -> list[list[int]]:
    """Split injections so that the pages of each batch fit the host memory set aside for them.

    Args:
        connection: A connection in a transaction.
        injection_ids: At most `MAX_IDS_PER_QUERY` ids.

    Returns:
        The ids, in order, in batches.

    Raises:
        StoreError: If one does not exist.
    """
    sizes = {row.id: row.page_bytes for row in connection.execute(_SELECT_SIZES, {"ids": list(injection_ids)})}
    _check_found(injection_ids, sizes)
    batches: list[list[int]] = []
    room = 0
    for injection_id in injection_ids:
        if not batches or sizes[injection_id] > room:
            batches.append([])
            room = _MAX_BATCH_BYTES
        batches[-1].append(injection_id)
        room -= sizes[injection_id]
    return batches


def read_injections(connection: sa.Connection, injection_ids: Sequence[int]) -> Iterator[StoredInjection]:
    """Read the tokens of a batch of injections.

    Args:
        connection: A connection in a transaction.
        injection_ids: A batch of `injection_batches`.

    Yields:
        The injections, in the order asked for.

    Raises:
        StoreError: If one does not exist.
        CorruptBlobError: If a blob is altered, or a page is missing.
    """
    ids = {"ids": list(injection_ids)}
    blobs = {row.id: row.retrieval_keys for row in connection.execute(_SELECT_RETRIEVAL_KEYS, ids)}
    _check_found(injection_ids, blobs)
    pages: dict[int, dict[tuple[int, int], bytes]] = {injection_id: {} for injection_id in injection_ids}
    for injection_id, layer, page_idx, blob in connection.execute(_SELECT_PAGES, ids):
        pages[injection_id][layer, page_idx] = blob
    for injection_id in injection_ids:
        what = f"mplus_injection(id {injection_id}).retrieval_keys"
        retrieval_keys = decode_tensor(blobs[injection_id], what)
        if retrieval_keys.dim() != 3:
            raise CorruptBlobError(f"{what} has shape {list(retrieval_keys.shape)}, which is no [L, K, p]")
        num_layers, num_slots = retrieval_keys.shape[:2]
        keys, values = _join_pages(injection_id, pages[injection_id], num_layers=num_layers, num_slots=num_slots)
        yield StoredInjection(injection_id, keys, values, retrieval_keys)


def _join_pages(
    injection_id: int, pages: dict[tuple[int, int], bytes], *, num_layers: int, num_slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put pages [2, t, h_kv, d_h] together to keys and values [L, K, h_kv, d_h]."""
    pages_per_layer = math.ceil(num_slots / PAGE_TOKENS)
    expected = [(layer, page_idx) for layer in range(num_layers) for page_idx in range(pages_per_layer)]
    if len(pages) != len(expected) or not expected or not all(place in pages for place in expected):
        raise CorruptBlobError(
            f"mplus_page has {len(pages)} pages of injection {injection_id} where {num_layers} layers of "
            f"{pages_per_layer} pages are expected, or has other ones"
        )
    first: StoredTensor | None = None
    for layer, page_idx in expected:
        what = f"mplus_page(injection {injection_id}, layer {layer}, page {page_idx}).blob"
        page = open_tensor(pages[layer, page_idx], what)
        begin = page_idx * PAGE_TOKENS
        num_tokens = min(PAGE_TOKENS, num_slots - begin)
        if first is None:
            first = page
            if len(page.shape) != 4:
                raise CorruptBlobError(f"{what} has shape {list(page.shape)}, which is no [2, t, h_kv, d_h]")
            keys = torch.empty((num_layers, num_slots, *page.shape[2:]), dtype=page.dtype)
            values = torch.empty_like(keys)
            row_bytes = math.prod(page.shape[2:]) * page.dtype.itemsize
            key_bytes = keys.reshape(-1).view(torch.uint8).numpy().reshape(num_layers, num_slots, row_bytes)
            value_bytes = values.reshape(-1).view(torch.uint8).numpy().reshape(num_layers, num_slots, row_bytes)
        if page.dtype != first.dtype or page.shape != (2, num_tokens, *first.shape[2:]):
            raise CorruptBlobError(f"{what} is {page.dtype} {list(page.shape)}, unlike the injection's other pages")
        stacked = np.frombuffer(page.payload, dtype=np.uint8).reshape(2, num_tokens, row_bytes)
        key_bytes[layer, begin : begin + num_tokens] = stacked[0]
        value_bytes[layer, begin : begin + num_tokens] = stacked[1]
    return keys, values


def _check_found(asked: Iterable[int], found: dict[int, Any]) -> None:
    missing = [injection_id for injection_id in asked if injection_id not in found]
    if missing:
        raise StoreError(f"there is no injection {missing[0]} in the database ({len(missing)} asked for are missing)")


def check_commits(connection: sa.Connection, commit_id: int | None) -> None:
    """Decode what every commit of a chain says, snapshots too.

    Args:
        connection: An open connection.
        commit_id: The last commit; None for no commits.

    Raises:
        CorruptBlobError: If a blob is altered.
    """
    query = sa.select(COMMIT).join(chain_ids, COMMIT.c.id == chain_ids.c.id)
    for row in connection.execution_options(yield_per=100).execute(query, {"commit_id": commit_id}):
        what = f"mplus_commit(id {row.id}, step {row.step})"
        decode_tensor(row.dropped, f"{what}.dropped")
        decode_tensor(row.evicted, f"{what}.evicted")
        if row.snapshot is not None:
            decode_arrays(row.snapshot, f"{what}.snapshot")
