from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.runnables import ConfigurableField, RunnableLambda
from pydantic import ValidationError

from langchain_mplus import ChatMPlus, MPlusMemory
from mplus_agents import Agent, InvalidInputError, Message, MPlus, PromptTooLongError
from mplus_agents.engine.registry import shared_engine
from mplus_agents.model import MPlusModel

_FACTS = {
    "alice": "Maya lives in Oslo, in the yellow house beside the harbour, with a dog called Ferry.",
    "bob": "The pump in the cellar is to be oiled every autumn, and its red valve must stay shut.",
}
_QUESTION = "Where does Maya live?"


class _Tokens(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)


@pytest.fixture
def two(mplus: MPlus) -> dict[str, Agent]:
    """Two agents that know different things, in their latent memories."""
    agents = {name: mplus.agent(name) for name in _FACTS}
    for name, agent in agents.items():
        agent.remember(_FACTS[name])
        assert agent.flush().num_injections == 1
    return agents


@pytest.fixture
def answers(two: dict[str, Agent]) -> dict[str, str]:
    """What each of them says to the question."""
    texts = {name: agent.generate([Message("user", _QUESTION)]).text for name, agent in two.items()}
    assert texts["alice"] != texts["bob"]
    return texts


@pytest.fixture
def llm_cache() -> Iterator[InMemoryCache]:
    """A cache of answers for the whole process."""
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)


def test_answer_is_the_agents_own(two: dict[str, Agent], answers: dict[str, str]) -> None:
    result = ChatMPlus(agent=two["alice"]).invoke(_QUESTION)
    expected = two["alice"].generate([Message("user", _QUESTION)])
    assert isinstance(result, AIMessage)
    assert result.text == expected.text == answers["alice"]
    assert result.usage_metadata == {
        "input_tokens": expected.num_prompt_tokens,
        "output_tokens": expected.num_new_tokens,
        "total_tokens": expected.num_prompt_tokens + expected.num_new_tokens,
    }
    assert {key: result.response_metadata[key] for key in ("model_name", "model_provider", "finish_reason")} == {
        "model_name": "random",
        "model_provider": "mplus",
        "finish_reason": expected.finish_reason,
    }


def test_nothing_is_written(two: dict[str, Agent]) -> None:
    llm = ChatMPlus(agent=two["alice"])
    before = two["alice"].mplus.store.find_agent("default", "alice")
    llm.invoke(_QUESTION)
    list(llm.stream(_QUESTION))
    llm.batch([_QUESTION, "And the dog?"])
    assert two["alice"].mplus.store.find_agent("default", "alice") == before


def test_streamed_pieces_join_to_the_answer(two: dict[str, Agent], answers: dict[str, str]) -> None:
    chunks = list(ChatMPlus(agent=two["alice"]).stream(_QUESTION))
    assert len(chunks) > 3
    assert "".join(chunk.text for chunk in chunks) == answers["alice"]
    assert [chunk.chunk_position for chunk in chunks] == [*[None] * (len(chunks) - 1), "last"]
    assert [bool(chunk.usage_metadata) for chunk in chunks] == [*[False] * (len(chunks) - 1), True]
    assert chunks[-1].response_metadata["model_name"] == "random"
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.response_metadata["finish_reason"] in ("stop", "length")


async def test_async_calls_give_the_same(two: dict[str, Agent], answers: dict[str, str]) -> None:
    llm = ChatMPlus(agent=two["alice"])
    assert (await llm.ainvoke(_QUESTION)).text == answers["alice"]
    assert "".join([chunk.text async for chunk in llm.astream(_QUESTION)]) == answers["alice"]
    assert [result.text for result in await llm.abatch([_QUESTION] * 3)] == [answers["alice"]] * 3


async def test_event_loop_makes_no_model_call(two: dict[str, Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    forward = MPlusModel.forward_cached

    def note_thread(self: MPlusModel, *args: Any, **kwargs: Any) -> Any:
        threads.add(threading.get_ident())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MPlusModel, "forward_cached", note_thread)
    llm = ChatMPlus(agent=two["alice"], max_tokens=4)
    await llm.ainvoke(_QUESTION)
    _ = [chunk async for chunk in llm.astream(_QUESTION)]
    assert threads
    assert threading.get_ident() not in threads


async def test_cancelled_call_stops_decoding(two: dict[str, Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    num_steps, is_decoding, loop = [0], asyncio.Event(), asyncio.get_running_loop()
    forward = MPlusModel.forward_cached

    def count(self: MPlusModel, *args: Any, **kwargs: Any) -> Any:
        num_steps[0] += 1
        if num_steps[0] == 5:
            loop.call_soon_threadsafe(is_decoding.set)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MPlusModel, "forward_cached", count)
    call = asyncio.create_task(ChatMPlus(agent=two["alice"], max_tokens=800).ainvoke(_QUESTION))
    await is_decoding.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0.05)
    num_steps_then = num_steps[0]
    await asyncio.sleep(0.1)
    assert num_steps[0] == num_steps_then < 800


@pytest.mark.parametrize("streaming", [True, None])
def test_callbacks_get_the_tokens_once(two: dict[str, Agent], answers: dict[str, str], streaming: bool | None) -> None:
    handler = _Tokens()
    llm = ChatMPlus(agent=two["alice"], streaming=streaming)
    llm.invoke(_QUESTION, config={"callbacks": [handler]})
    assert "".join(handler.tokens) == (answers["alice"] if streaming else "")
    handler.tokens.clear()
    list(llm.stream(_QUESTION, config={"callbacks": [handler]}))
    assert "".join(handler.tokens) == answers["alice"]


def test_stop_of_constructor_and_call(two: dict[str, Agent], answers: dict[str, str]) -> None:
    answer = answers["alice"]
    late, early = answer[60:64], answer[30:34]
    ends = {text: answer.index(text) for text in (late, early)}
    assert ends[early] < ends[late]

    def said(llm: ChatMPlus, stop: list[str] | None = None) -> str:
        result = llm.invoke(_QUESTION, stop=stop)
        assert result.response_metadata["finish_reason"] == "stop"
        return result.text

    agent = two["alice"]
    assert said(ChatMPlus(agent=agent), [early]) == answer[: ends[early]].rstrip()
    assert said(ChatMPlus(agent=agent, stop=[late])) == answer[: ends[late]].rstrip()
    assert said(ChatMPlus(agent=agent, stop=[late]), [early]) == answer[: ends[early]].rstrip()
    assert said(ChatMPlus(agent=agent, stop=[early]), [late]) == answer[: ends[early]].rstrip()


def test_options_of_constructor_and_call(two: dict[str, Agent], answers: dict[str, str]) -> None:
    agent, turns = two["alice"], [Message("user", _QUESTION)]
    assert ChatMPlus(agent=agent, temperature=0).invoke(_QUESTION).text == answers["alice"]
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 7}
    sampled = agent.generate(turns, do_sample=True, **options).text
    assert sampled != answers["alice"]
    assert ChatMPlus(agent=agent, **options).invoke(_QUESTION).text == sampled
    assert ChatMPlus(agent=agent).invoke(_QUESTION, **options).text == sampled
    assert ChatMPlus(agent=agent, **options).invoke(_QUESTION, seed=8).text != sampled
    short = ChatMPlus(agent=agent, max_tokens=9)
    for result, num_tokens in ((short.invoke(_QUESTION), 9), (short.invoke(_QUESTION, max_tokens=5), 5)):
        assert result.usage_metadata is not None
        assert result.usage_metadata["output_tokens"] == num_tokens
        assert result.response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "kwargs", "match"),
    [
        ({}, {"nonsense": 1}, "keyword argument is 'nonsense'"),
        ({}, {"tools": []}, "keyword argument is 'tools'"),
        ({}, {"model": "mplus-8b"}, "model is 'mplus-8b'; allowed: 'random'"),
        ({"top_p": 0.5}, {}, "temperature is None; allowed: above 0 with top_p"),
        ({"top_k": 5}, {"temperature": 0}, "temperature is 0; allowed: above 0 with top_k"),
        ({}, {"temperature": -1}, "temperature is -1"),
        ({}, {"max_tokens": 0}, "max_new_tokens is 0"),
        ({}, {"agent_id": 7}, "agent_id is 7"),
        ({}, {"agent_id": "a/b"}, "name is 'a/b'"),
    ],
)
def test_calls_are_checked(alice: Agent, fields: dict[str, Any], kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        ChatMPlus(agent=alice, **fields).invoke("Hello", **kwargs)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"nonsense": 1}, "Extra inputs are not permitted"),
        ({"agent": "alice"}, "agent is 'alice'; allowed: an Agent"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"top_p": 0}, "greater than 0"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        ChatMPlus(**fields)


def test_agent_excludes_another_place(alice: Agent) -> None:
    with pytest.raises(ValidationError, match="store is 'sqlite://'"):
        ChatMPlus(agent=alice, store="sqlite://")
    with pytest.raises(ValidationError, match="model is 'mplus-8b'"):
        ChatMPlus(agent=alice, model="mplus-8b")
    assert ChatMPlus(agent=alice, model="random", namespace="default").open_agent() is alice


def test_prompts_that_cannot_be_answered(alice: Agent) -> None:
    llm = ChatMPlus(agent=alice)
    with pytest.raises(InvalidInputError, match=r"messages\[0\]\.content is ''"):
        llm.invoke("")
    with pytest.raises(InvalidInputError, match="'image_url'"):
        llm.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}])])
    with pytest.raises(PromptTooLongError, match="remember"):
        llm.invoke("far too long " * 600)
    with pytest.raises(NotImplementedError):
        llm.bind_tools([])


def test_no_agent_is_an_error_of_the_call(url: str) -> None:
    llm = ChatMPlus(store=url)
    with pytest.raises(InvalidInputError, match=r"agent_id is None; allowed: a name, given by ChatMPlus\(agent="):
        llm.invoke("Hello")


def test_agent_of_a_call(two: dict[str, Agent], answers: dict[str, str]) -> None:
    llm = ChatMPlus(agent=two["alice"])
    assert llm.invoke(_QUESTION, agent_id="bob").text == answers["bob"]
    assert llm.bind(agent_id="bob").invoke(_QUESTION).text == answers["bob"]
    assert "".join(chunk.text for chunk in llm.stream(_QUESTION, agent_id="bob")) == answers["bob"]
    assert ChatMPlus(agent=two["alice"], agent_id="bob").invoke(_QUESTION).text == answers["bob"]
    assert llm.invoke(_QUESTION).text == answers["alice"]


# `stream_events(version="v3")` says at every call that it is in beta.
@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
async def test_agent_of_the_config(two: dict[str, Agent], answers: dict[str, str]) -> None:
    llm = ChatMPlus(agent=two["alice"])
    config: Any = {"configurable": {"agent_id": "bob"}}
    bob = answers["bob"]
    assert llm.invoke(_QUESTION, config).text == bob
    assert (await llm.ainvoke(_QUESTION, config)).text == bob
    assert "".join(chunk.text for chunk in llm.stream(_QUESTION, config)) == bob
    assert "".join([chunk.text async for chunk in llm.astream(_QUESTION, config)]) == bob
    assert llm.batch([_QUESTION], config)[0].text == bob
    assert llm.stream_events(_QUESTION, config, version="v3").output.text == bob
    events = await llm.astream_events(_QUESTION, config, version="v3")
    assert (await events.output).text == bob
    assert llm.invoke(_QUESTION, config, agent_id="alice").text == answers["alice"]
    chain: Any = RunnableLambda(lambda question: question) | llm
    assert chain.invoke(_QUESTION, config).text == bob
    inside: Any = RunnableLambda(lambda question: llm.generate([[HumanMessage(question)]]).generations[0][0].text)
    assert inside.invoke(_QUESTION, config) == bob


def test_configurable_field(two: dict[str, Agent], answers: dict[str, str]) -> None:
    llm = ChatMPlus(agent=two["alice"]).configurable_fields(agent_id=ConfigurableField(id="agent_id"))
    assert llm.invoke(_QUESTION).text == answers["alice"]
    assert llm.with_config(configurable={"agent_id": "bob"}).invoke(_QUESTION).text == answers["bob"]
    assert len(list(llm.stream(_QUESTION, config={"configurable": {"agent_id": "bob"}}))) > 3


def test_names_give_the_memorys_agent(url: str) -> None:
    place = {"store": url, "device": "cpu"}
    llm, memory = ChatMPlus(agent_id="alice", **place), MPlusMemory(agent_id="alice", **place)
    assert llm.open_agent() is memory.open_agent()


def test_cache_is_off(two: dict[str, Agent], llm_cache: InMemoryCache) -> None:
    agent = two["alice"]
    llm, memory = ChatMPlus(agent=agent), MPlusMemory(agent=agent)
    first = llm.invoke(_QUESTION).text
    _grow(memory, agent)
    assert llm.invoke(_QUESTION).text == agent.generate([Message("user", _QUESTION)]).text != first
    assert not llm_cache._cache


def test_cache_that_was_asked_for_knows_agents_and_versions(two: dict[str, Agent], llm_cache: InMemoryCache) -> None:
    llm, turns = ChatMPlus(agent=two["alice"], cache=True), [Message("user", _QUESTION)]
    for name in ("alice", "bob", "bob", "alice"):
        said = [llm.invoke(_QUESTION, agent_id=name).text for _ in range(2)]
        assert said == [two[name].generate(turns).text] * 2
        _grow(MPlusMemory(agent=two[name]), two[name])
    assert len(llm_cache._cache) == 4


def _grow(memory: MPlusMemory, agent: Agent) -> None:
    memory.save_context({"input": "Maya has moved to Bergen, up the hill, last week."}, {"response": "I see."})
    assert agent.flush().num_injections == 1


def test_identity_needs_no_weights(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_engine("mplus-tiny", url, "cpu").agent("alice").remember("Maya lives in Oslo.")
    monkeypatch.setattr("langchain_mplus._agents.engine_at", None)
    monkeypatch.setattr("langchain_mplus.chat_models.engine_at", None)
    params = ChatMPlus(agent_id="alice", store=url)._identifying_params
    assert params["agent_id"] == "alice"
    assert params["memory_version"] == 1
    assert ChatMPlus(agent_id="nobody", store=url)._identifying_params["memory_version"] is None
    assert ChatMPlus()._identifying_params["agent_id"] is None


def test_tokens_are_counted_by_the_models_tokenizer(alice: Agent) -> None:
    llm = ChatMPlus(agent=alice, max_tokens=1)
    assert llm.get_token_ids(_QUESTION) == alice.mplus.codec.encode(_QUESTION)
    assert llm.get_num_tokens(_QUESTION) == len(alice.mplus.codec.encode(_QUESTION))
    messages = [SystemMessage("Be brief."), HumanMessage(_QUESTION, name="maya")]
    usage = llm.invoke(messages).usage_metadata
    assert usage is not None
    assert llm.get_num_tokens_from_messages(messages) == usage["input_tokens"]
    assert llm.get_num_tokens_from_messages([]) == 0
    with pytest.warns(UserWarning, match="tools are not counted"):
        llm.get_num_tokens_from_messages(messages, tools=[])
    assert ChatMPlus(custom_get_token_ids=lambda text: [1, 2]).get_num_tokens("x") == 2


def test_profile_tells_the_limits(alice: Agent, tmp_path: Path) -> None:
    limit = alice.mplus.model.config.max_prompt_tokens
    for llm in (ChatMPlus(agent=alice), ChatMPlus(agent_id="alice")):
        assert llm.profile is not None
        assert llm.profile["max_input_tokens"] == limit - 128
        assert llm.profile["max_output_tokens"] == 128
        assert llm.profile["tool_calling"] is False
    shorter = ChatMPlus(agent_id="alice", max_tokens=24).profile
    assert shorter is not None
    assert shorter["max_input_tokens"] == limit - 24
    unknown = ChatMPlus(agent_id="alice", model=str(tmp_path)).profile
    assert unknown is not None
    assert "max_input_tokens" not in unknown


def test_model_name_is_an_alias() -> None:
    by_name: Any = {"model_name": "somewhere/mplus-8b"}
    assert ChatMPlus(**by_name).model == ChatMPlus(model="somewhere/mplus-8b").model == "somewhere/mplus-8b"


def test_secrets_are_not_shown(alice: Agent) -> None:
    key: Any = "sk-0123"
    llm = ChatMPlus(agent=alice, api_key=key)
    assert "sk-0123" not in f"{llm!r} {llm.asdict()}"
    assert "Agent(" not in repr(llm)
    assert "agent" not in llm.model_dump()
    assert llm.metadata is not None
    assert "mplus-agents" in llm.metadata["lc_versions"]
