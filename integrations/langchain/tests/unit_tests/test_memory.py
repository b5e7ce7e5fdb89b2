from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain_classic.base_memory import BaseMemory
from langchain_classic.memory import CombinedMemory, ConversationBufferMemory, ReadOnlySharedMemory, SimpleMemory
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage
from pydantic import ValidationError

from integrations.langchain.tests.chains import Log
from langchain_mplus import MPlusMemory
from mplus_agents import Agent, Document, InvalidInputError, Message, MPlus
from mplus_agents.engine.registry import shared_engine

_LONG = "The tide table hangs beside the door and nobody has looked at it since the autumn. " * 8


def test_is_a_base_memory_with_one_variable(alice: Agent) -> None:
    memory = MPlusMemory(agent=alice)
    assert isinstance(memory, BaseMemory)
    assert memory.memory_variables == ["history"]
    assert MPlusMemory(agent=alice, memory_key="past").memory_variables == ["past"]
    assert memory.open_agent() is alice


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "agent, agent_id is 'neither'"),
        ({"agent_id": "alice", "nonsense": 1}, "Extra inputs are not permitted"),
        ({"agent": "alice"}, "agent is 'alice'; allowed: an Agent"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        MPlusMemory(**fields)


def test_agent_excludes_what_it_has_itself(alice: Agent) -> None:
    with pytest.raises(ValidationError, match="agent, agent_id is 'both'"):
        MPlusMemory(agent=alice, agent_id="alice")
    with pytest.raises(ValidationError, match="store is 'sqlite://'; allowed: nothing"):
        MPlusMemory(agent=alice, store="sqlite://")


def test_agent_by_name_is_the_shared_one(url: str) -> None:
    memory = MPlusMemory(agent_id="alice", store=url, device="cpu", namespace="shop")
    memory.save_context({"input": "Hello"}, {"response": "Hi"})
    agent = shared_engine("mplus-tiny", url, "cpu").agent("alice", namespace="shop", create=False)
    assert memory.open_agent() is agent
    assert agent.window == [Message("user", "Hello"), Message("assistant", "Hi")]


def test_waiting_turns_are_shown_as_the_chain_writes_them(alice: Agent) -> None:
    memory = MPlusMemory(agent=alice)
    assert memory.load_memory_variables({}) == {"history": ""}
    memory.save_context({"input": "Hello"}, {"response": "Hi"})
    alice.remember([Document("A piece of a book.", "book"), Message("tool", "sunny")])
    assert memory.load_memory_variables({})["history"] == "Human: Hello\nAI: Hi\nA piece of a book.\nTool: sunny"
    renamed = MPlusMemory(agent=alice, human_prefix="Maya", ai_prefix="Clerk", memory_key="past")
    assert renamed.load_memory_variables({})["past"].startswith("Maya: Hello\nClerk: Hi\n")
    messages = MPlusMemory(agent=alice, return_messages=True).load_memory_variables({})["history"]
    assert messages == [
        HumanMessage("Hello"),
        AIMessage("Hi"),
        SystemMessage("A piece of a book."),
        ChatMessage(role="tool", content="sunny"),
    ]


def test_loading_writes_nothing(alice: Agent) -> None:
    memory = MPlusMemory(agent=alice)
    memory.save_context({"input": "Hello"}, {"response": "Hi"})
    before = alice.mplus.store.find_agent("default", "alice")
    memory.load_memory_variables({"input": "x"})
    assert alice.mplus.store.find_agent("default", "alice") == before


def test_injected_turns_are_not_shown(alice: Agent) -> None:
    memory = MPlusMemory(agent=alice)
    memory.save_context({"input": _LONG}, {"response": "Indeed."})
    log = Log.of(alice)
    assert log.injected
    log.check_shown(memory.load_memory_variables({})["history"])
    alice.flush()
    assert memory.load_memory_variables({}) == {"history": ""}


@pytest.mark.parametrize(
    ("inputs", "outputs", "turns"),
    [
        ({"input": "Hello", "history": "old"}, {"response": "Hi"}, ["Hello", "Hi"]),
        ({"question": "Hello", "stop": ["x"], "history": "old"}, {"text": "Hi"}, ["Hello", "Hi"]),
        ({"input": "Hello", "buffer": "other"}, {"response": "Hi"}, ["Hello", "Hi"]),
        ({"input": "Hello"}, {"output": "Hi", "sources": "none"}, ["Hello", "Hi"]),
        ({"input": HumanMessage("Hello")}, {"output": AIMessage("Hi")}, ["Hello", "Hi"]),
        ({"input": [{"type": "text", "text": "Hello"}]}, {"output": "Hi"}, ["Hello", "Hi"]),
        ({"input": "Hello"}, {"response": ""}, ["Hello"]),
        ({"input": " "}, {"response": "Hi"}, ["Hi"]),
        ({"input": ""}, {"response": "\n"}, []),
    ],
)
def test_both_turns_are_remembered(
    alice: Agent, inputs: dict[str, Any], outputs: dict[str, Any], turns: list[str]
) -> None:
    MPlusMemory(agent=alice).save_context(inputs, outputs)
    assert [turn.content for turn in alice.window] == turns


def test_keys_can_be_chosen(alice: Agent) -> None:
    memory = MPlusMemory(agent=alice, input_key="question", output_key="answer")
    memory.save_context({"input": "x", "question": "Hello"}, {"output": "y", "answer": "Hi"})
    assert [turn.content for turn in alice.window] == ["Hello", "Hi"]


@pytest.mark.parametrize(
    ("fields", "inputs", "outputs", "match"),
    [
        ({}, {"a": "x", "b": "y"}, {"response": "z"}, r"input_key is 'input'; .* \(a, b\)"),
        ({}, {"history": "x"}, {"response": "z"}, r"\(none\)"),
        ({}, {"input": "x"}, {"a": "y", "b": "z"}, "output_key is 'output'"),
        ({"input_key": "question"}, {"input": "x"}, {"response": "z"}, "input_key is 'question'"),
        ({}, {"input": 7}, {"response": "z"}, "input is 7"),
        ({}, {"input": "x"}, {"response": [{"type": "image"}]}, r"response\[0\].type is 'image'"),
    ],
)
def test_what_is_not_clear_is_refused_and_nothing_is_stored(
    alice: Agent, fields: dict[str, str], inputs: dict[str, Any], outputs: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidInputError, match=match):
        MPlusMemory(agent=alice, **fields).save_context(inputs, outputs)
    assert alice.window == []


def test_clear_drops_what_waits_and_keeps_the_memory(alice: Agent) -> None:
    memory = MPlusMemory(agent=alice)
    memory.save_context({"input": _LONG}, {"response": "Indeed."})
    num_injections = alice.stats().num_injections
    memory.clear()
    assert memory.load_memory_variables({}) == {"history": ""}
    assert alice.stats().num_injections == num_injections > 0


async def test_async_methods_do_the_same_off_the_event_loop(alice: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    remember = Agent.remember

    def note_thread(self: Agent, *args: Any, **kwargs: Any) -> Any:
        threads.add(threading.get_ident())
        return remember(self, *args, **kwargs)

    monkeypatch.setattr(Agent, "remember", note_thread)
    memory = MPlusMemory(agent=alice)
    await asyncio.gather(*(memory.asave_context({"input": f"turn {i}"}, {"response": "ok"}) for i in range(6)))
    assert threads
    assert threading.get_ident() not in threads
    history = (await memory.aload_memory_variables({}))["history"]
    Log.of(alice).check_shown(history)
    assert sorted(turn.content for turn in Log.of(alice).turns if turn.role == "user") == [
        f"turn {i}" for i in range(6)
    ]
    await memory.aclear()
    assert await memory.aload_memory_variables({}) == {"history": ""}


# LangChain's own memories are deprecated, and work until 2.0.
@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")
def test_combined_with_other_memories(alice: Agent) -> None:
    memory = MPlusMemory(agent=alice)
    other = ConversationBufferMemory(memory_key="buffer", input_key="input")
    combined = CombinedMemory(memories=[memory, other, SimpleMemory(memories={"topic": "tides"})])
    assert set(combined.memory_variables) == {"history", "buffer", "topic"}
    inputs = {"input": "Hello", **combined.load_memory_variables({"input": "Hello"})}
    combined.save_context(inputs, {"response": "Hi"})
    assert combined.load_memory_variables({})["history"] == "Human: Hello\nAI: Hi"
    assert combined.load_memory_variables({})["buffer"] == "Human: Hello\nAI: Hi"


def test_read_only_sharing(alice: Agent) -> None:
    memory = MPlusMemory(agent=alice)
    shared = ReadOnlySharedMemory(memory=memory)
    memory.save_context({"input": "Hello"}, {"response": "Hi"})
    shared.save_context({"input": "not to be kept"}, {"response": "x"})
    shared.clear()
    assert shared.load_memory_variables({}) == {"history": "Human: Hello\nAI: Hi"}


def test_dump_and_repr_hide_the_agent(alice: Agent) -> None:
    memory = MPlusMemory(agent=alice)
    assert "agent" not in memory.model_dump()
    assert "Agent(" not in repr(memory)
    assert memory.model_copy().open_agent() is alice


def test_agents_do_not_see_each_other(mplus: MPlus) -> None:
    alice, bob = MPlusMemory(agent=mplus.agent("alice")), MPlusMemory(agent=mplus.agent("bob"))
    alice.save_context({"input": "My cat is called Ferry."}, {"response": "Nice."})
    assert bob.load_memory_variables({}) == {"history": ""}
