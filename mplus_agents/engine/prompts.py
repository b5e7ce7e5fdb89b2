"""How turns and questions are written: by the tokenizer's chat template, or in a plain form for base models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError

from mplus_agents.engine.records import Message
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import InvalidInputError

# Changes to how turns are written or gathered get a new number; every event keeps the one it was logged under.
POLICY_VERSION = 2

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


@dataclass(frozen=True, slots=True)
class _Part:
    text: str
    is_query: bool = False
    is_template: bool = False


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
        return chat_prompt(codec, [Message("user", question)], lead=window)
    lead = f"{window.rstrip()}\n\n" if window else ""
    return _join(codec, [_Part(lead), _Part(f"Question: {question}\nAnswer:", is_query=True)])


def chat_prompt(codec: TextCodec, messages: Sequence[Message], lead: str = "") -> Prompt:
    """Write a conversation that the assistant goes on with.

    Args:
        codec: The tokenizer.
        messages: The turns; the last one is answered.
        lead: Text in front, such as the window's; with a chat template it stands at the head of the last turn. It is
            never a system turn: whoever writes a document must not speak with that voice.
    """
    if codec.chat_template is None:
        parts = [_Part(f"{lead.rstrip()}\n")] if lead else []
        parts += [_Part(write_turn(message.role, message.content)) for message in messages[:-1]]
        parts.append(_Part(write_turn(messages[-1].role, messages[-1].content), is_query=True))
        return _join(codec, [*parts, _Part("Assistant:")])
    return _join(codec, _split_template(codec, messages, lead))


def _split_template(codec: TextCodec, turns: Sequence[Message], lead: str) -> list[_Part]:
    """Render the chat template, its own text apart from the turns'.

    The template is rendered with marks in place of what was said. So special tokens count in the template alone, and
    the turn to be answered is known whatever its text is.
    """
    marks = [f"\ue000{place}\ue001" for place in range(len(turns))]
    contents = [_Part(turn.content.strip(), place == len(turns) - 1) for place, turn in enumerate(turns)]
    if lead:
        marks[-1] = f"\ue000{len(turns)}\ue001\n\n{marks[-1]}"
        contents.append(_Part(lead.strip()))
    marked = [{"role": turn.role, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
    try:
        text = str(codec.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(turn.role for turn in turns)
        raise InvalidInputError(
            "messages", roles, f"roles in an order that the chat template takes ({error})"
        ) from error
    # Every layer has a beginning-of-sequence row of its own.
    bos = codec.tokenizer.bos_token
    text = text.removeprefix(str(bos)) if bos else text
    parts: list[_Part] = []
    for place, piece in enumerate(re.split("\ue000(\\d+)\ue001", text)):
        parts.append(contents[int(piece)] if place % 2 else _Part(piece, is_template=True))
    return parts


def _join(codec: TextCodec, parts: Sequence[_Part]) -> Prompt:
    ids: list[int] = []
    is_query: list[bool] = []
    for part in parts:
        part_ids = codec.encode_template(part.text) if part.is_template else codec.encode(part.text)
        ids += part_ids
        is_query += [part.is_query] * len(part_ids)
    is_plain = not any(part.is_template for part in parts)
    return Prompt(ids, is_query if any(is_query) else [True] * len(ids), PLAIN_STOPS if is_plain else ())
