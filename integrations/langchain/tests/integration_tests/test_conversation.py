"""`ConversationChain` with its default prompt: what it shows, what it stores, and when."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.language_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder

from integrations.langchain.tests.chains import Log, conversation, engine, turn_and_check
from langchain_mplus import MPLUS_PROMPT, ChatMPlus, MPlusMemory
from mplus_agents import Agent, Message, MPlus, PromptTooLongError

_TURN = "This is turn number {}, and turn {} has a word or two about the harbour, the ferry and the yellow house."


def _chain(agent: Agent, **fields: Any) -> Any:
    return conversation(ChatMPlus(agent=agent, max_tokens=24), MPlusMemory(agent=agent), **fields)


def _user_turns(agent: Agent) -> list[str]:
    return [turn.content for turn in Log.of(agent).turns if turn.role == "user"]


@pytest.fixture
def failing_llm(alice: Agent, monkeypatch: pytest.MonkeyPatch) -> ChatMPlus:
    """A model that reads the prompt, and breaks when it should answer."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no answer")

    monkeypatch.setattr(ChatMPlus, "_last_chunk", fail)
    return ChatMPlus(agent=alice, max_tokens=4)


def test_no_turn_is_ever_both_shown_and_injected(alice: Agent) -> None:
    chain = _chain(alice)
    for number in range(45):
        turn_and_check(chain, alice, _TURN.format(number, number))
    log = Log.of(alice)
    assert _user_turns(alice) == [_TURN.format(number, number) for number in range(45)]
    assert len(log.injected) > 60
    stats = alice.stats()
    assert stats.num_injections > 16  # θ is full, and Θ holds what left it
    assert min(stats.long_term_tokens) > 0
    assert len(alice.mplus.codec.encode(log.history)) < 2 * alice.mplus.model.config.chunk_tokens


def test_long_answers_and_questions(alice: Agent) -> None:
    chain = conversation(ChatMPlus(agent=alice), MPlusMemory(agent=alice))
    for number in range(4):
        turn_and_check(chain, alice, _TURN.format(number, number) * (number + 1))


async def test_async_turns(alice: Agent) -> None:
    chain = _chain(alice)
    for number in range(8):
        before = Log.of(alice)
        result = await chain.ainvoke({"input": _TURN.format(number, number)})
        before.check_shown(result["history"])
    Log.of(alice).check()
    assert len(_user_turns(alice)) == 8


def test_batch_loses_and_doubles_nothing(alice: Agent) -> None:
    texts = [_TURN.format(number, number) for number in range(12)]
    results = _chain(alice).batch([{"input": text} for text in texts], config={"max_concurrency": 4})
    Log.of(alice).check()
    assert sorted(_user_turns(alice)) == sorted(texts)
    answers = [turn.content for turn in Log.of(alice).turns if turn.role == "assistant"]
    assert sorted(answers) == sorted(result["response"] for result in results if result["response"].strip())


async def test_async_batch(alice: Agent) -> None:
    texts = [_TURN.format(number, number) for number in range(8)]
    chain = _chain(alice)
    await asyncio.gather(*(chain.ainvoke({"input": text}) for text in texts))
    Log.of(alice).check()
    assert sorted(_user_turns(alice)) == sorted(texts)


def test_stream_and_predict(alice: Agent) -> None:
    chain = _chain(alice)
    assert len(list(chain.stream({"input": "Hello"}))) == 1
    assert chain.predict(input="Hello again")
    assert _user_turns(alice) == ["Hello", "Hello again"]


def test_llm_that_fails_writes_nothing(alice: Agent, failing_llm: ChatMPlus) -> None:
    before = alice.mplus.store.find_agent("default", "alice")
    with pytest.raises(RuntimeError, match="no answer"):
        conversation(failing_llm, MPlusMemory(agent=alice)).invoke({"input": "Hello"})
    assert alice.mplus.store.find_agent("default", "alice") == before


def test_prompt_that_is_too_long_writes_nothing(alice: Agent) -> None:
    with pytest.raises(PromptTooLongError):
        _chain(alice).invoke({"input": _TURN * 40})
    assert alice.window == []


def test_empty_answer_keeps_the_question(alice: Agent) -> None:
    chain = conversation(FakeListChatModel(responses=["", "yes"]), MPlusMemory(agent=alice))
    assert chain.predict(input="Hello") == ""
    assert chain.predict(input="Are you there?") == "yes"
    assert alice.window == [Message("user", "Hello"), Message("user", "Are you there?"), Message("assistant", "yes")]


def test_foreign_chat_model(alice: Agent) -> None:
    responses = [f"answer {number}" for number in range(20)]
    chain = conversation(FakeListChatModel(responses=responses), MPlusMemory(agent=alice))
    for number, response in enumerate(responses):
        assert turn_and_check(chain, alice, _TURN.format(number, number)) == response
    assert Log.of(alice).injected


def test_agents_of_one_engine_are_isolated(mplus: MPlus) -> None:
    alice, bob, alone = mplus.agent("alice"), mplus.agent("bob", seed=1), mplus.agent("alone", seed=1)
    for number in range(8):
        turn_and_check(_chain(alice), alice, f"alice says {_TURN.format(number, number)}")
        turn_and_check(_chain(bob), bob, f"bob says {_TURN.format(number, number)}")
    for number in range(8):
        turn_and_check(_chain(alone), alone, f"bob says {_TURN.format(number, number)}")
    assert all(text.startswith("alice") for text in _user_turns(alice))
    assert Log.of(bob).turns == Log.of(alone).turns
    assert torch.equal(bob.logits("Who said what?"), alone.logits("Who said what?"))
    assert not torch.equal(bob.logits("Who said what?"), alice.logits("Who said what?"))


def test_restart_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "mplus.db"
    question = [Message("user", "Where is the yellow house?")]
    with engine(path) as mplus:
        alice = mplus.agent("alice")
        for number in range(10):
            turn_and_check(_chain(alice), alice, _TURN.format(number, number))
        log, answer = Log.of(alice), alice.generate(question)
    with engine(path) as mplus:
        alice = mplus.agent("alice", create=False)
        assert Log.of(alice) == log
        assert MPlusMemory(agent=alice).load_memory_variables({}) == {"history": log.history}
        assert alice.generate(question) == answer
        turn_and_check(_chain(alice), alice, "And now it goes on.")


def test_names_need_no_engine_in_hand(url: str) -> None:
    place = {"agent_id": "alice", "store": url, "device": "cpu"}
    memory = MPlusMemory(**place)
    chain = conversation(ChatMPlus(**place, max_tokens=8), memory)
    for number in range(5):
        turn_and_check(chain, memory.open_agent(), _TURN.format(number, number))


def test_own_prompt_puts_the_turn_alone(alice: Agent) -> None:
    chain = _chain(alice, prompt=MPLUS_PROMPT)
    for number in range(6):
        turn_and_check(chain, alice, _TURN.format(number, number))
    prompt = MPLUS_PROMPT.format_messages(history="Human: Hello\nAI: Hi", input="How are you?")
    assert [message.content for message in prompt] == ["Human: Hello\nAI: Hi", "How are you?"]


def test_messages_in_a_placeholder(alice: Agent) -> None:
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{input}")])
    memory = MPlusMemory(agent=alice, return_messages=True)
    chain = conversation(ChatMPlus(agent=alice, max_tokens=8), memory, prompt=prompt)
    chain.predict(input="Hello")
    result = chain.invoke({"input": "How are you?"})
    assert [message.type for message in result["history"]] in (["human", "ai"], ["human"])
    assert _user_turns(alice) == ["Hello", "How are you?"]
