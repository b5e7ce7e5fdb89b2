"""Chains, engines and the accounts of an agent's log, for the tests of the LangChain classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from langchain_classic.chains import ConversationChain
from langchain_core._api import LangChainDeprecationWarning

from mplus_agents import Agent, Message, MPlus
from mplus_agents.engine.text import TextCodec
from mplus_agents.model import MPlusModel
from mplus_agents.store import EventRecord, Store

# Random weights talk until they are stopped, and never say the same of two memories: what tests of plumbing want.
_RANDOM = Path(__file__).parents[3] / "tests" / "fixtures" / "random"
_PREFIXES = {"user": "Human: ", "assistant": "AI: "}


@cache
def _random() -> tuple[MPlusModel, TextCodec]:
    return MPlusModel.from_pretrained(_RANDOM, "cpu"), TextCodec.from_pretrained(_RANDOM)


@contextmanager
def engine(path: Path) -> Iterator[MPlus]:
    """Open an engine on a database file, as another process would; the weights are loaded once."""
    with Store(f"sqlite:///{path}") as store:
        yield MPlus(*_random(), store, "random")


def conversation(llm: Any, memory: Any, **fields: Any) -> ConversationChain:
    """Make a ConversationChain. It is deprecated since 0.2.7, and works until LangChain 2.0; what is tested is ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The class `ConversationChain`", LangChainDeprecationWarning)
        return ConversationChain(llm=llm, memory=memory, **fields)


@dataclass(frozen=True)
class Log:
    """Where every turn and piece that an agent was given is now, by the store's own tables."""

    events: dict[int, EventRecord]
    injected: list[int]
    waiting: list[int]

    @classmethod
    def of(cls, agent: Agent) -> Log:
        store = agent.mplus.store
        record = store.find_agent(agent.namespace, agent.name)
        assert record is not None
        infos = store.injection_infos(store.chain(record.head_commit_id).injection_ids.values())
        return cls(
            events={event.seq: event for event in store.events(record.id) if event.kind != "flush"},
            injected=[seq for info in infos.values() for seq in info.event_seqs],
            waiting=[event.seq for event in store.window(record.id)],
        )

    @property
    def turns(self) -> list[Message]:
        """All turns ever said, in order."""
        return [Message(event.role, event.text) for event in self.events.values() if event.role]  # type: ignore[arg-type]

    @property
    def history(self) -> str:
        """What a chain has to show: the waiting ones, in its own format."""
        waiting = [self.events[seq] for seq in self.waiting]
        return "\n".join(f"{_PREFIXES.get(event.role or '', '')}{event.text}" for event in waiting)

    def check(self) -> None:
        """Every turn and piece is either injected, once, or waits."""
        assert sorted([*self.injected, *self.waiting]) == sorted(self.events)

    def check_shown(self, history: str) -> None:
        """What a chain showed is exactly what waited, and nothing that was injected."""
        self.check()
        assert history == self.history
        injected = [self.events[seq] for seq in self.injected]
        for event in injected:
            assert event.role != "user" or (event.text or "") not in history
        shown = [line for line in history.split("\n") if line.startswith("Human: ")]
        assert not {f"Human: {event.text}" for event in injected} & set(shown)


def turn_and_check(chain: ConversationChain, agent: Agent, text: str) -> str:
    """Say something, and check what the prompt showed and where every turn is afterwards."""
    before = Log.of(agent)
    result = chain.invoke({"input": text})
    before.check_shown(result["history"])
    after = Log.of(agent)
    after.check()
    said = [Message("user", text)]
    if result["response"].strip():
        said.append(Message("assistant", result["response"]))
    new_turns = after.turns[len(before.turns) :]
    assert "".join(turn.content for turn in new_turns) == "".join(turn.content for turn in said)
    return str(result["response"])
