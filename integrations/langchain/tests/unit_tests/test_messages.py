from __future__ import annotations

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
)

from langchain_mplus._messages import to_turns
from mplus_agents import InvalidInputError, Message

_CALL = ToolCall(name="weather", args={"city": "Oslo"}, id="1")
_CALL_TEXT = '{"name": "weather", "args": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        (SystemMessage("Be brief."), Message("system", "Be brief.")),
        (HumanMessage("Hello"), Message("user", "Hello")),
        (HumanMessage("Hello", name="maya"), Message("user", "maya: Hello")),
        (HumanMessage(["Hel", {"type": "text", "text": "lo"}]), Message("user", "Hello")),
        (AIMessage("Hi"), Message("assistant", "Hi")),
        (AIMessage("Hi", name="clerk"), Message("assistant", "Hi")),
        (AIMessage("", tool_calls=[_CALL]), Message("assistant", _CALL_TEXT)),
        (AIMessage("One moment.", tool_calls=[_CALL]), Message("assistant", f"One moment.\n{_CALL_TEXT}")),
        (
            AIMessage([{"type": "tool_use", "id": "1", "name": "weather", "input": {}}], tool_calls=[_CALL]),
            Message("assistant", _CALL_TEXT),
        ),
        (ToolMessage("sunny", tool_call_id="1"), Message("tool", "sunny")),
        (ToolMessage("sunny", tool_call_id="1", name="weather"), Message("tool", "weather: sunny")),
        (ToolMessage("no such city", tool_call_id="1", status="error"), Message("tool", "Error: no such city")),
        (ToolMessage("", tool_call_id="1"), Message("tool", "(no output)")),
        (FunctionMessage(content="sunny", name="weather"), Message("tool", "weather: sunny")),
        (ChatMessage(role="developer", content="Be brief."), Message("system", "Be brief.")),
        (ChatMessage(role="User", content="Hello"), Message("user", "Hello")),
        (ChatMessage(role="assistant", content="Hi"), Message("assistant", "Hi")),
    ],
)
def test_messages_become_turns(message: BaseMessage, turn: Message) -> None:
    assert to_turns([message]) == [turn]


def test_messages_that_say_nothing_are_left_out() -> None:
    messages = [SystemMessage(""), HumanMessage("Hello"), AIMessage(" \n"), HumanMessage("Are you there?")]
    assert to_turns(messages) == [Message("user", "Hello"), Message("user", "Are you there?")]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "at least one message"),
        ([AIMessage("")], "at least one message"),
        ([HumanMessage("Hello"), HumanMessage(" ")], r"messages\[1\]\.content is ' '"),
        ([HumanMessage("", name="maya")], r"messages\[0\]\.content is ''"),
        (
            [HumanMessage([{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}])],
            r"messages\[0\]\.content\[1\]\.type is 'image_url'; allowed: 'text'",
        ),
        ([AIMessage([{"type": "reasoning", "reasoning": "hm"}])], "is 'reasoning'"),
        ([ChatMessage(role="pirate", content="Arr")], r"messages\[0\]\.role is 'pirate'"),
        ([RemoveMessage(id="1")], r"messages\[0\] is 'RemoveMessage'"),
        ([HumanMessage("half a pair: \ud83d")], "surrogate"),
    ],
)
def test_what_cannot_be_read_is_refused(messages: list[BaseMessage], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        to_turns(messages)
