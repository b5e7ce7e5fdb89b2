"""How turns and questions are written: by the tokenizer's chat template, or in a plain form for base models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mplus_agents.engine.records import Message
from mplus_agents.engine.text import TextCodec

# Changes to how turns are written or gathered get a new number; every event keeps the one it was logged under.
POLICY_VERSION = 1

_LABELS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
# A base model goes on with the next turn by itself if nobody stops it.
PLAIN_STOPS = ("\nUser:", "\nQuestion:", "\nHuman:")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to answer to.

    Attributes:
        ids: The tokens.
        is_query: For each, whether it belongs to the turn to be answered, which may alone query Θ.
        stop: Strings that end the answer.
    """

    ids: list[int]
    is_query: list[bool]
    stop: tuple[str, ...]


def write_turn(role: str | None, content: str) -> str:
    """Write one turn, or a piece of a document, as it is remembered and shown.

    Args:
        role: Who said it; None for a piece of a document.
        content: The text.
    """
    return content if role is None else f"{_LABELS[role]}: {content}\n"


def question_prompt(codec: TextCodec, window: str, question: str) -> Prompt:
    """Write a single question, after the turns that wait in the window.

    Args:
        codec: The tokenizer.
        window: The window's text; may be empty.
        question: The question.
    """
    if codec.chat_template is not None:
        messages = [Message("system", window)] if window else []
        return chat_prompt(codec, [*messages, Message("user", question)])
    lead = f"{window.rstrip()}\n\n" if window else ""
    return _join(codec, [(lead, False), (f"Question: {question}\nAnswer:", True)])


def chat_prompt(codec: TextCodec, messages: Sequence[Message], lead: str = "") -> Prompt:
    """Write a conversation that the assistant goes on with.

    Args:
        codec: The tokenizer.
        messages: The turns; the last one is answered.
        lead: Text in front, such as the window's; with a chat template it becomes a system turn.
    """
    if codec.chat_template is None:
        parts = [(f"{lead.rstrip()}\n", False)] if lead else []
        parts += [(write_turn(message.role, message.content), False) for message in messages[:-1]]
        parts.append((write_turn(messages[-1].role, messages[-1].content), True))
        return _join(codec, [*parts, ("Assistant:", False)])
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if lead:
        turns.insert(0, {"role": "system", "content": lead})
    text = str(codec.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    # Every layer has a beginning-of-sequence row of its own.
    bos = codec.tokenizer.bos_token
    text = text.removeprefix(str(bos)) if bos else text
    ids, offsets = codec.encode_prompt(text)
    content = messages[-1].content.strip()
    first = text.rfind(content)
    is_query = [start < first + len(content) and end > first for start, end in offsets]
    return Prompt(ids, is_query if first >= 0 and any(is_query) else [True] * len(ids), ())


def _join(codec: TextCodec, parts: Sequence[tuple[str, bool]]) -> Prompt:
    ids: list[int] = []
    is_query: list[bool] = []
    for text, queries in parts:
        part_ids = codec.encode(text)
        ids += part_ids
        is_query += [queries] * len(part_ids)
    return Prompt(ids, is_query, PLAIN_STOPS)
