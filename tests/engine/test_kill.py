"""What an agent acknowledged survives SIGKILL bit for bit, and a long read goes on after it."""

from __future__ import annotations

import hashlib
import mmap
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mplus_agents import Agent, MPlus
from mplus_agents.engine import Document, Message, writer
from mplus_agents.store import AgentRecord, WriteTransaction
from tests.engine.engines import (
    check_accounts,
    check_documents,
    engine,
    log_of,
    logits_bytes,
    prose,
    small,
    state_of,
    turn_of,
)
from tests.store.kill_harness import Acknowledge, Body, InTransaction, run_until_killed

_DIGEST_BYTES = 16
_MAX_STEPS = 4096


def digest(agent: Agent) -> bytes:
    """What a reader could tell at once: logits and window."""
    content = repr(agent.window).encode()
    return hashlib.blake2b(logits_bytes(agent) + content, digest_size=_DIGEST_BYTES).digest()


def step_of(number: int) -> Message | Document:
    """Every step is one transaction: turns of many lengths, and documents of a few chunks."""
    if number % 5 == 3:
        return Document(f"{number}: {prose(40 + number % 7 * 30, number)}", f"doc {number}")
    return turn_of(20 + number * 37 % 100, "assistant" if number % 2 else "user")


@contextmanager
def marked_transactions(mplus: MPlus, in_transaction: InTransaction) -> Iterator[None]:
    """Let the harness know when a write transaction is open, and dwell in it, so that kills find it open."""
    real = mplus.store.write

    @contextmanager
    def write(agent: AgentRecord) -> Iterator[WriteTransaction]:
        with ExitStack() as until_committed, real(agent) as tx:
            until_committed.enter_context(in_transaction())
            yield tx
            time.sleep(0.008)  # written, not committed

    mplus.store.write = write  # type: ignore[method-assign]
    yield


def remembering(path: Path, slots: mmap.mmap) -> Body:
    def body(ack: Acknowledge, in_transaction: InTransaction) -> None:
        with engine(path, small()) as mplus, marked_transactions(mplus, in_transaction):
            agent = mplus.agent("a")
            while True:
                version = mplus.agents()[0].version
                if version:
                    slots[version * _DIGEST_BYTES : (version + 1) * _DIGEST_BYTES] = digest(agent)
                    ack(version)
                agent.remember(step_of(version))

    return body


def check(path: Path, slots: mmap.mmap, acknowledged: int) -> int:
    with engine(path, small()) as mplus:
        agent = mplus.agent("a")
        version = mplus.agents()[0].version
        assert version - acknowledged in (0, 1)  # 1: killed between the commit and the acknowledgement
        check_accounts(agent)
        steps = [step_of(number) for number in range(version)]
        turns = [event.text for event in log_of(agent) if event.kind == "message"]
        assert turns == [step.content for step in steps if isinstance(step, Message)]
        check_documents(agent, {step.source_id or "": step.text for step in steps if isinstance(step, Document)})
        if version == acknowledged:
            assert digest(agent) == slots[version * _DIGEST_BYTES : (version + 1) * _DIGEST_BYTES]
        else:  # the child could not tell any more
            check_history(path, version)
        return version


@pytest.mark.parametrize("num_kills", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_an_acknowledged_turn_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kills: int) -> None:
    monkeypatch.setattr(writer, "_MAX_GROUP_S", 1e9)
    small()  # loaded before the forks
    moments = random.Random(20_250_208)
    hits = []
    with mmap.mmap(-1, _MAX_STEPS * _DIGEST_BYTES) as slots:
        for number in range(num_kills):
            path = tmp_path / f"{number // 10}.db"
            killed = run_until_killed(remembering(path, slots), delay_s=moments.uniform(0.0, 0.08))
            hits.append(killed.was_in_transaction)
            version = check(path, slots, killed.acknowledged)
            if number % 10 == 9:
                check_history(path, version)
    assert sum(hits) >= num_kills / 6  # about half on an idle machine


def check_history(path: Path, version: int) -> None:
    """All the kills together have changed nothing: an agent that was never killed is the same."""
    with engine("sqlite://", small()) as straight, engine(path, small()) as mplus:
        agent = straight.agent("a")
        for number in range(version):
            agent.remember(step_of(number))
        assert state_of(mplus.agent("a")) == state_of(agent)


def reading(path: Path, text: str) -> Body:
    def body(ack: Acknowledge, in_transaction: InTransaction) -> None:
        with engine(path, small()) as mplus, marked_transactions(mplus, in_transaction):
            agent = mplus.agent("a")
            ack(0)
            agent.remember(text, source_id="book")
            while True:
                ack(1)

    return body


def test_a_long_read_goes_on_after_every_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_MAX_GROUP", 2)
    small()
    text, moments, offsets = prose(2500), random.Random(7), []
    while True:
        killed = run_until_killed(reading(tmp_path / "a.db", text), delay_s=moments.uniform(0.02, 0.12))
        with engine(tmp_path / "a.db", small()) as mplus:
            agent = mplus.agent("a")
            check_accounts(agent)
            source: Any = mplus.store.source(mplus.agents()[0].id, "book")
            offset = source.next_offset if source else 0
            assert "".join(event.text or "" for event in log_of(agent)) == text[:offset]
        offsets.append(offset)
        if killed.acknowledged == 1:
            break
    assert offsets == sorted(offsets)
    assert len(offsets) > 3
    with engine(tmp_path / "a.db", small()) as mplus, engine("sqlite://", small()) as straight:
        straight.agent("a").remember(text, source_id="book")
        assert state_of(mplus.agent("a")) == state_of(straight.agent("a"))
