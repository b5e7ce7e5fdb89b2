"""Rows of the database to records, and the checks of arguments that reads and writes share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa

from mplus_agents.errors import CorruptBlobError, InvalidInputError
from mplus_agents.store.blobs import decode_text, to_utf8
from mplus_agents.store.records import AgentRecord, EventRecord, InjectionInfo, SourceRecord

__all__ = [
    "MAX_IDS_PER_QUERY",
    "batched",
    "check_int",
    "from_key",
    "inserted_id",
    "to_agent",
    "to_event",
    "to_info",
    "to_json",
    "to_key",
    "to_source",
]

MAX_IDS_PER_QUERY = 500
"""SQLite takes at least 999 variables in one statement."""

_MAX_KEY_BYTES = 1_000  # PostgreSQL's indexes take rows of at most about 2,700 bytes
_INT64 = 2**63

_T = TypeVar("_T")


def to_key(argument: str, text: str) -> bytes:
    """Check and encode a text that identifies a row: a namespace, a name, a source id.

    Args:
        argument: Name of the argument, for the error.
        text: The text; not empty, at most 1,000 bytes of UTF-8.

    Returns:
        The UTF-8.

    Raises:
        InvalidInputError: If it is empty, too long, or has no UTF-8 form.
    """
    if text == "":
        raise InvalidInputError(argument, text, "a text that is not empty")
    return to_utf8(argument, text, max_bytes=_MAX_KEY_BYTES)


def check_int(argument: str, value: object, *, min_value: int = 0, max_value: int = _INT64 - 1) -> int:
    """Check that an integer fits its column.

    Args:
        argument: Name of the argument, for the error.
        value: The integer; no bool.
        min_value: Smallest allowed.
        max_value: Largest allowed.

    Returns:
        The integer.

    Raises:
        InvalidInputError: If it is no int, or out of range.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not min_value <= value <= max_value:
        raise InvalidInputError(argument, value, f"an int from {min_value} to {max_value}")
    return value


def batched(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Split into lists of at most `size`.

    Args:
        items: Any iterable.
        size: Longest list.

    Yields:
        The lists, in order.
    """
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def to_json(argument: str, values: Mapping[str, Any], types: tuple[type, ...]) -> str:
    """Check and encode a flat mapping.

    Args:
        argument: Name of the argument, for the error.
        values: Names and values.
        types: What the values may be; a bool is no int here.

    Returns:
        The JSON, all ASCII.

    Raises:
        InvalidInputError: If a value is of another type, or a text has no UTF-8 form.
    """
    allowed = f"names with values that are {' or '.join(t.__name__ for t in types)}"
    for name, value in values.items():
        if not isinstance(value, types) or isinstance(value, bool):
            raise InvalidInputError(f"{argument}[{name!r}]", value, allowed)
        to_utf8(f"{argument}[{name!r}]", name)
        if isinstance(value, str):
            to_utf8(f"{argument}[{name!r}]", value)
    # Escaped to ASCII: PostgreSQL's text has no NUL.
    return json.dumps(dict(values), ensure_ascii=True)


def inserted_id(result: sa.CursorResult[Any]) -> int:
    """Take the id a row was given.

    Args:
        result: Of the insert of one row.

    Returns:
        The id.
    """
    key = result.inserted_primary_key
    assert key is not None  # only statements that insert no row have none
    return int(key[0])


def to_agent(row: sa.Row[*tuple[Any, ...]]) -> AgentRecord:
    """Build a record from a row of `mplus_agent`.

    Args:
        row: All columns.

    Returns:
        The record.

    Raises:
        CorruptBlobError: If a column does not decode.
    """
    what = f"mplus_agent(id {row.id})"
    return AgentRecord(
        id=row.id,
        namespace=from_key(row.namespace, f"{what}.namespace"),
        name=from_key(row.name, f"{what}.name"),
        fingerprint=_from_json(row.fingerprint, dict, f"{what}.fingerprint"),
        seed=row.seed,
        settings=_from_json(row.settings, dict, f"{what}.settings"),
        head_commit_id=row.head_commit_id,
        version=row.version,
        next_event_seq=row.next_event_seq,
        created_at=row.created_at,
    )


def to_event(row: sa.Row[*tuple[Any, ...]]) -> EventRecord:
    """Build a record from a row of `mplus_event`.

    Args:
        row: All columns.

    Returns:
        The record.

    Raises:
        CorruptBlobError: If the text is altered or a column does not decode.
    """
    what = f"mplus_event(agent {row.agent_id}, seq {row.seq})"
    return EventRecord(
        agent_id=row.agent_id,
        seq=row.seq,
        kind=row.kind,
        role=None if row.role is None else from_key(row.role, f"{what}.role"),
        source_id=None if row.source_id is None else from_key(row.source_id, f"{what}.source_id"),
        offset=row.offset,
        text=None if row.text is None else decode_text(row.text, f"{what}.text"),
        num_tokens=row.num_tokens,
        policy_version=row.policy_version,
        created_at=row.created_at,
    )


def to_source(row: sa.Row[*tuple[Any, ...]]) -> SourceRecord:
    """Build a record from a row of `mplus_source`.

    Args:
        row: All columns.

    Returns:
        The record.

    Raises:
        CorruptBlobError: If the source id does not decode.
    """
    source_id = from_key(row.source_id, f"mplus_source(agent {row.agent_id}).source_id")
    return SourceRecord(row.agent_id, source_id, row.next_offset, row.prefix_digest, row.is_done)


def to_info(row: sa.Row[*tuple[Any, ...]]) -> InjectionInfo:
    """Build a record from a row of `mplus_injection`.

    Args:
        row: The columns id, agent_id, num_text_tokens, event_seqs and created_at.

    Returns:
        The record.

    Raises:
        CorruptBlobError: If a column does not decode.
    """
    event_seqs = _from_json(row.event_seqs, list, f"mplus_injection(id {row.id}).event_seqs")
    return InjectionInfo(row.id, row.agent_id, row.num_text_tokens, tuple(event_seqs), row.created_at)


def from_key(value: bytes, what: str) -> str:
    """Decode what `to_key` encoded.

    Args:
        value: The bytes.
        what: Names the row and column, for the error.

    Raises:
        CorruptBlobError: If it is no UTF-8.
    """
    try:
        return value.decode("utf-8")
    except (UnicodeDecodeError, AttributeError) as error:
        raise CorruptBlobError(f"{what} is no UTF-8: {error}") from error


def _from_json(value: str, expected: type[_T], what: str) -> _T:
    try:
        decoded = json.loads(value)
    except ValueError as error:
        raise CorruptBlobError(f"{what} is no JSON: {error}") from error
    if not isinstance(decoded, expected):
        raise CorruptBlobError(f"{what} is no {expected.__name__}")
    return decoded
