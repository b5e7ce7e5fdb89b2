"""LangChain messages as turns. Text only: other content is refused by name, never dropped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from mplus_agents import InvalidInputError

if TYPE_CHECKING:
    from mplus_agents import Message
    from mplus_agents.engine.records import Role

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
}
# Parts of an AI message that say again what its `tool_calls` say.
_CALL_PARTS = ("tool_call", "tool_use", "function_call")


def to_turns(messages: Sequence[BaseMessage]) -> list[Message]:
    """Turn a prompt into the turns that an agent answers to.

    A `name` of a person or a tool is put in front of the text, tool calls are written out as JSON, and messages of the
    system or the AI that say nothing are left out.

    Args:
        messages: The prompt.

    Raises:
        InvalidInputError: A message is of an unknown kind, is a person's and says nothing, has a part that is not text,
            or none of the messages says anything.
    """
    from mplus_agents import Message
    from mplus_agents.engine.inputs import parse_message

    turns = []
    for place, message in enumerate(messages):
        argument = f"messages[{place}]"
        role, content = _role(argument, message), _content(argument, message)
        if not content.strip() and role in ("assistant", "system"):
            continue
        turns.append(parse_message(argument, Message(role, content)))
    if not turns:
        raise InvalidInputError("messages", list(messages), "at least one message that says something")
    return turns


def text_of(argument: str, content: object) -> str:
    """Return a content's text.

    Args:
        argument: The content's name, for the message.
        content: A string, a message, or a list of strings and of parts with the type `text`.

    Raises:
        InvalidInputError: There is something else than text in it.
    """
    if isinstance(content, BaseMessage):
        content = content.content
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidInputError(argument, content, "a string, a message, or a list of text parts")
    return "".join(_text_of_part(f"{argument}[{place}]", part) for place, part in enumerate(content))


def _text_of_part(argument: str, part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind != "text":
        raise InvalidInputError(f"{argument}.type", kind, "'text': M+ reads text only")
    return str(part.get("text", ""))


def _role(argument: str, message: BaseMessage) -> Role:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, (ToolMessage, FunctionMessage)):
        return "tool"
    if isinstance(message, ChatMessage):
        if message.role.lower() not in _ROLES:
            raise InvalidInputError(f"{argument}.role", message.role, ", ".join(_ROLES))
        return _ROLES[message.role.lower()]
    allowed = "a System, Human, AI, Tool, Function or ChatMessage"
    raise InvalidInputError(argument, type(message).__name__, allowed)


def _content(argument: str, message: BaseMessage) -> str:
    content: object = message.content
    if isinstance(message, AIMessage):
        calls = [json.dumps({"name": call["name"], "args": call["args"]}) for call in message.tool_calls]
        if isinstance(content, list):
            content = [part for part in content if not (isinstance(part, dict) and part.get("type") in _CALL_PARTS)]
        return "\n".join(filter(None, [text_of(f"{argument}.content", content), *calls]))
    text = text_of(f"{argument}.content", content)
    if isinstance(message, ToolMessage):
        text = text or "(no output)"
        text = f"Error: {text}" if message.status == "error" else text
    return f"{message.name}: {text}" if message.name and text.strip() else text
