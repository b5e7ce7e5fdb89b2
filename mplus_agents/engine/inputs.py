"""What `remember` accepts, brought to turns and documents before anything is changed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from mplus_agents.engine.records import ROLES, Document, Message
from mplus_agents.engine.text import check_text, decode_utf8
from mplus_agents.errors import InvalidInputError

_ALLOWED = "a text, a Document, a Message or {'role', 'content'}, an open file, a path, or an iterable of these"
_MAX_NAME_CHARS = 200
_MAX_SOURCE_ID_BYTES = 1_000


def parse_memories(memories: object, source_id: str | None = None) -> Iterator[Message | Document]:
    """Go through what a caller wants remembered, in order; a single thing is checked whole before the first step.

    Args:
        memories: A text (str or UTF-8 bytes), a `Document`, a `Message` or a mapping with `role` and `content`, an open
            file, a path, or an iterable of these.
        source_id: Source id of a single document.

    Returns:
        The turns and documents.

    Raises:
        InvalidInputError: Something is of another kind, empty, or not valid text.
    """
    if isinstance(memories, (list, tuple)):
        _check_no_source_id(source_id)
        if not memories:
            raise InvalidInputError("memories", memories, "at least one thing to remember")
        return iter([_parse_one(item, None, f"memories[{place}]") for place, item in enumerate(memories)])
    if _is_single(memories):
        return iter([_parse_one(memories, source_id, "memories")])
    if not isinstance(memories, Iterable):
        raise InvalidInputError("memories", memories, _ALLOWED)
    _check_no_source_id(source_id)
    return (_parse_one(item, None, f"memories[{place}]") for place, item in enumerate(memories))


def parse_message(argument: str, message: object, *, may_be_empty: bool = False) -> Message:
    """Check a turn.

    Args:
        argument: The argument's name, for the message.
        message: A `Message`, a mapping with `role` and `content`, or a string, which the user said.
        may_be_empty: Let a turn without text pass.

    Raises:
        InvalidInputError: It is none of these, the role is unknown, or the content is not valid text.
    """
    if isinstance(message, str):
        message = Message("user", message)
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            raise InvalidInputError(argument, sorted(map(str, message)), "exactly the keys 'role' and 'content'")
        message = Message(message["role"], message["content"])
    if not isinstance(message, Message):
        raise InvalidInputError(argument, message, "a Message, {'role', 'content'}, or a string")
    if message.role not in ROLES:
        raise InvalidInputError(f"{argument}.role", message.role, ", ".join(ROLES))
    if not (may_be_empty and message.content == ""):
        check_text(f"{argument}.content", message.content)
    return Message(message.role, message.content)


def parse_conversation(messages: object) -> list[Message]:
    """Check the turns of a conversation; all but the last may be without text, as when a model called a tool.

    Args:
        messages: What `parse_message` accepts, in a list or tuple.

    Raises:
        InvalidInputError: There is none, or one of them is not allowed.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidInputError("messages", messages, "a list of at least one turn")
    last = len(messages) - 1
    return [parse_message(f"messages[{place}]", item, may_be_empty=place < last) for place, item in enumerate(messages)]


def check_name(argument: str, name: object) -> str:
    """Check the name of an agent or of a namespace.

    Args:
        argument: The argument's name, for the message.
        name: What was given.

    Raises:
        InvalidInputError: It is not 1 to 200 printable characters, or holds a slash or white space at its ends.
    """
    allowed = f"1 to {_MAX_NAME_CHARS} printable characters without '/', no white space at the ends"
    if not isinstance(name, str) or not 1 <= len(name) <= _MAX_NAME_CHARS:
        raise InvalidInputError(argument, name, allowed)
    if "/" in name or not name.isprintable() or name != name.strip():
        raise InvalidInputError(argument, name, allowed)
    return name


def check_number(argument: str, value: object, end: int) -> None:
    """Check a whole number from 0.

    Args:
        argument: The argument's name, for the message.
        value: What was given.
        end: One more than the largest allowed.

    Raises:
        InvalidInputError: It is none, or out of range.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
        raise InvalidInputError(argument, value, f"a whole number from 0 to {end - 1}, or None")


def _is_single(memories: object) -> bool:
    kinds = (str, bytes, bytearray, Message, Document, Mapping, PathLike)
    return isinstance(memories, kinds) or hasattr(memories, "read")


def _parse_one(item: Any, source_id: str | None, argument: str) -> Message | Document:
    if isinstance(item, (Message, Mapping)):
        _check_no_source_id(source_id)
        return parse_message(argument, item)
    if isinstance(item, Document):
        source_id = source_id or item.source_id
        item = item.text
    if isinstance(item, PathLike):
        try:
            item = Path(item).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InvalidInputError(argument, str(item), f"a file that can be read ({reason})") from error
    if hasattr(item, "read"):
        item = _read_file(argument, item)
    if isinstance(item, (bytes, bytearray)):
        item = decode_utf8(argument, bytes(item))
    if not isinstance(item, str):
        raise InvalidInputError(argument, item, _ALLOWED)
    if source_id is not None:
        check_text("source_id", source_id)
        if len(source_id.encode()) > _MAX_SOURCE_ID_BYTES:
            raise InvalidInputError("source_id", source_id, f"at most {_MAX_SOURCE_ID_BYTES:,} bytes of UTF-8")
    return Document(check_text(argument, item), source_id)


def _read_file(argument: str, file: io.IOBase) -> str | bytes:
    try:
        return cast(str | bytes, file.read())
    except UnicodeDecodeError as error:
        bad = error.object[error.start : error.start + 8]
        raise InvalidInputError(argument, bad, f"{error.encoding} text (wrong from byte {error.start} on)") from error
    except (OSError, ValueError) as error:  # closed, or open for writing only
        raise InvalidInputError(argument, file, f"a file that can be read ({error})") from error


def _check_no_source_id(source_id: str | None) -> None:
    if source_id is not None:
        raise InvalidInputError("source_id", source_id, "None, unless a single document is given (use Document)")
