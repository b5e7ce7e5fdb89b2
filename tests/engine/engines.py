"""Engines over shared weights, the state of an agent in comparable form, and the accounts of its log."""

from __future__ import annotations

import os
import random
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mplus_agents import Agent, MemoryView, MPlus
from mplus_agents.engine import AgentStats, Message, TokenInfo
from mplus_agents.engine.prompts import write_turn
from mplus_agents.engine.text import TextCodec
from mplus_agents.model import MPlusModel
from mplus_agents.store import EventRecord, Store

TINY = Path(__file__).parents[1] / "fixtures" / "random"
CHUNK, MINIMUM, NUM_NEW = 128, 16, 16
PROBE = "Where does Maya live, and what is her dog called?"
_VOCABULARY = "Maya Oslo dog Ferry lives was called the a blue table on under river and of index memory agent; 17 so é"
_WORDS = _VOCABULARY.split(" ")


@cache
def tiny() -> MPlusModel:
    return MPlusModel.from_pretrained(TINY, "cpu")


@cache
def small() -> MPlusModel:
    """The same weights with a θ and a Θ so small that tokens are dropped, retrieved and evicted after a few chunks."""
    model = MPlusModel.from_pretrained(TINY, "cpu")
    memory = replace(model.config.memory, max_short_term=40, num_retrieved=24, max_long_term=70)
    model.config = replace(model.config, memory=memory)
    model.fingerprint["memory"] = "small"
    return model


@cache
def tiny_codec() -> TextCodec:
    return TextCodec.from_pretrained(TINY)


@contextmanager
def engine(
    path: Path | str, model: MPlusModel | None = None, codec: TextCodec | None = None, **options: Any
) -> Iterator[MPlus]:
    """Open an engine on a database file, as another process would."""
    url = path if isinstance(path, str) else f"sqlite:///{path}"
    with Store(url, **options) as store:
        yield MPlus(model or tiny(), codec or tiny_codec(), store, "random")


def prose(num_words: int, seed: int = 0) -> str:
    words = random.Random(seed)
    return " ".join(words.choice(_WORDS) for _ in range(num_words))


def count_tokens(text: str, role: str | None = None) -> int:
    return len(tiny_codec().encode(write_turn(role, text)))


def turn_of(num_tokens: int, role: Any = "user") -> Message:
    """A turn of exactly so many tokens, its label included."""
    text = "a"
    while (missing := num_tokens - count_tokens(text, role)) > 0:
        text += "a" * missing
    assert missing == 0
    return Message(role, text)


@dataclass(frozen=True)
class State:
    """All that tells one memory from another."""

    logits: bytes
    window: list[Message]
    window_text: str
    stats: AgentStats
    tokens: list[TokenInfo]
    version: int


def logits_bytes(agent: Agent | MemoryView, text: str = PROBE) -> bytes:
    return agent.logits(text).contiguous().numpy().tobytes()


def state_of(agent: Agent, *, is_alone: bool = True) -> State:
    """Take an agent's state; in a store that others use too, the ids of injections tell nothing.

    The number of transactions is no part of it where a test compares different ways to the same state.
    """
    tokens = agent.tokens()
    if not is_alone:
        tokens = [replace(token, injection_id=None) for token in tokens]
    stats = replace(agent.stats(), resident_bytes=0)
    return State(logits_bytes(agent), agent.window, agent.window_text, stats, tokens, 0)


def with_version(agent: Agent) -> State:
    """Take an agent's state with the number of its transactions: for "nothing at all has changed"."""
    version = agent.mplus.store.agent_version(agent._agent_id)
    assert version is not None
    return replace(state_of(agent), version=version)


def reopened(agent: Agent) -> State:
    """Take the state that another engine on the same database finds."""
    with engine(agent.mplus.store.url, agent.mplus.model, agent.mplus.codec) as other:
        return with_version(other.agent(agent.name, namespace=agent.namespace, create=False))


def log_of(agent: Agent) -> list[EventRecord]:
    return agent.mplus.store.events(agent._agent_id)


def pieces_of(agent: Agent, source_id: str) -> list[EventRecord]:
    return [event for event in log_of(agent) if event.source_id == source_id]


def groups_of(agent: Agent) -> list[tuple[int, ...]]:
    """The events of every injection, in order."""
    store = agent.mplus.store
    record = store.find_agent(agent.namespace, agent.name)
    assert record is not None
    chain = store.chain(record.head_commit_id)
    infos = store.injection_infos(chain.injection_ids.values())
    return [info.event_seqs for info in infos.values()]


def waiting_of(agent: Agent) -> list[int]:
    return [event.seq for event in agent.mplus.store.window(agent._agent_id)]


def check_accounts(agent: Agent, cleared: Sequence[int] = ()) -> None:
    """Every turn and piece is in one injection or in the window, oldest first, and the sizes are as promised."""
    store, config = agent.mplus.store, agent.mplus.model.config
    events = log_of(agent)
    assert [event.seq for event in events] == list(range(len(events)))
    texts = {event.seq: event for event in events if event.kind != "flush" and event.seq not in cleared}
    groups, waiting = groups_of(agent), waiting_of(agent)
    assert [seq for group in groups for seq in group] + waiting == list(texts)
    for event in texts.values():
        assert event.text is not None
        assert event.num_tokens == len(agent.mplus.codec.encode(write_turn(event.role, event.text)))
    sizes = [sum(texts[seq].num_tokens for seq in group) for group in groups]
    assert all(config.min_chunk_tokens <= size < config.chunk_tokens + config.min_chunk_tokens for size in sizes)
    num_waiting = sum(texts[seq].num_tokens for seq in waiting)
    assert num_waiting < config.chunk_tokens + (config.min_chunk_tokens if cleared else 0)
    stats, stored = agent.stats(), store.stats(agent._agent_id)
    assert (stats.num_waiting_tokens, stats.num_waiting_messages) == (num_waiting, len(waiting))
    assert (stats.num_injections, stats.num_events) == (len(groups), len(events))
    assert (stored.num_commits, stored.num_window_events) == (len(groups), len(waiting))


def check_documents(agent: Agent, documents: dict[str, str]) -> None:
    """The pieces in the log are the documents: text for text, offset for offset."""
    for source_id, text in documents.items():
        pieces = pieces_of(agent, source_id)
        assert "".join(piece.text or "" for piece in pieces) == text
        offset = 0
        for piece in pieces:
            assert piece.offset == offset
            offset += len(piece.text or "")


@contextmanager
def written_ids(model: MPlusModel) -> Iterator[list[list[int]]]:
    """Collect the token ids of every injection."""
    seen: list[list[int]] = []
    write = model.write

    def spy(input_ids: torch.Tensor, memory: Any) -> Any:
        seen.append(input_ids[0].tolist())
        return write(input_ids, memory)

    with mock.patch.object(model, "write", spy):
        yield seen


@contextmanager
def failing_write(model: MPlusModel, at_call: int, error: BaseException) -> Iterator[None]:
    """Let the model's write fail at a call, counted from 1."""
    write, num_calls = model.write, 0

    def failing(input_ids: torch.Tensor, memory: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == at_call:
            raise error
        return write(input_ids, memory)

    with mock.patch.object(model, "write", failing):
        yield


def run_forked(body: Callable[[], None]) -> None:
    """Run a body in a process of its own, a copy of this one; an error there is one here. Close databases before."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks in processes with threads
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            body()
            os.write(writer, b"done")
        except BaseException:  # noqa: BLE001 - reported through the pipe
            os.write(writer, traceback.format_exc().encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        report = pipe.read().decode()
    os.waitpid(child, 0)
    assert report == "done", report
