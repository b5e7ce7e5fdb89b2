"""How turns and questions are written: by the tokenizer's chat template, or in a plain form for base models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jinja2.exceptions import TemplateError

from mplus_agents.engine.records import Message
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import InvalidInputError

# Changes to how turns are written or gathered get a new number; every event keeps the one it was logged under.
POLICY_VERSION = 3

_LABELS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
# A base model goes on with the next turn by itself if nobody stops it.
_ASKING = ("User", "Question", "Human")
PLAIN_STOPS = tuple(f"\n{label}:" for label in _ASKING)

# Lines of a transcript: "Human: Where do I live?", and "AI:", where the answer shall go on.
_SPOKEN = re.compile(r"([^\W\d_][^:\n]{0,30}):[ \t]+\S")
_OPEN = re.compile(r"([^\W\d_][^:\n]{0,30}):")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to answer to.

    Attributes:
        ids: The tokens.
        is_query: For each, whether it belongs to what shall be answered, which may alone query Θ: the last turn, or
            the last one in it if it is a transcript.
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
    query_start: int = 0  # characters


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
        content, turn = messages[-1].content, write_turn(messages[-1].role, messages[-1].content)
        asked_from = _asked_from(content)
        parts.append(_Part(turn, is_query=True, query_start=asked_from and turn.rindex(content) + asked_from))
        return _join(codec, [*parts, _Part("Assistant:")])
    return _join(codec, _split_template(codec, messages, lead))


def _asked_from(turn: str) -> int:
    """Return where the question begins in a turn that is a transcript, in characters; 0 for any other turn.

    A chain's prompt is one turn of instructions, history and question, which ends with "Human: Where do I live?" and
    "AI:". The mean over all of it finds what the instructions resemble, so the question alone shall query Θ. It is the
    last line with a usual label since the open line's speaker said something, or else of who spoke first since then.
    """
    *lines, last = turn.rstrip().splitlines(keepends=True) or [""]
    is_open = _OPEN.fullmatch(last)
    if is_open is None:
        return 0
    spoken = [(place, match[1]) for place, line in enumerate(lines) if (match := _SPOKEN.match(line))]
    answered = max((place for place, who in spoken if who == is_open[1]), default=-1)
    since = [(place, who) for place, who in spoken if place > answered]
    asked = [place for place, who in since if who in _ASKING] or [place for place, who in since if who == since[0][1]]
    return sum(map(len, lines[: asked[-1]])) if asked else 0


def _split_template(codec: TextCodec, turns: Sequence[Message], lead: str) -> list[_Part]:
    """Render the chat template, its own text apart from the turns'.

    The template is rendered with marks in place of what was said. So special tokens count in the template alone, and
    the turn to be answered is known whatever its text is.
    """
    marks = [f"\ue000{place}\ue001" for place in range(len(turns))]
    contents = [_Part(turn.content.strip()) for turn in turns]
    contents[-1] = replace(contents[-1], is_query=True, query_start=_asked_from(contents[-1].text))
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
        num_before = len(codec.encode(part.text[: part.query_start])) if part.is_query else len(part_ids)
        is_query += [place >= num_before for place in range(len(part_ids))]
    is_plain = not any(part.is_template for part in parts)
    return Prompt(ids, is_query if any(is_query) else [True] * len(ids), PLAIN_STOPS if is_plain else ())
