"""What `mplus eval retention --template` asks is what ConversationChain's default prompt asks."""

from __future__ import annotations

from typing import Any

import pytest

from integrations.langchain.tests.chains import conversation
from langchain_mplus import ChatMPlus, MPlusMemory
from mplus_agents import Agent, Message
from mplus_agents.evaluation.settings import RetentionSettings
from mplus_agents.evaluation.stream import Round


@pytest.mark.parametrize(
    "window", [(), (Message("user", "Zuma lives in Brado."), Message("assistant", "I see."))], ids=["empty", "filled"]
)
def test_the_prompt_is_the_chains(alice: Agent, monkeypatch: pytest.MonkeyPatch, window: tuple[Message, ...]) -> None:
    asked: list[Any] = []
    begin = Agent.begin_generation

    def watching(agent: Agent, messages: Any, **options: Any) -> Any:
        asked.append(list(messages))
        return begin(agent, messages, **options)

    monkeypatch.setattr(Agent, "begin_generation", watching)
    if window:
        alice.remember(list(window))
    assert alice.window == list(window)
    chain = conversation(ChatMPlus(agent=alice, max_tokens=4), MPlusMemory(agent=alice))
    chain.invoke({"input": "Where does Zuma live?"})
    template = chain.prompt.template.replace("{input}", "{question}")
    settings = RetentionSettings(template=template)
    prompt = settings.prompt("Where does Zuma live?", Round((), (), window).history)
    assert asked == [[Message("user", prompt)]]
