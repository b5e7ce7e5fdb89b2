"""A long read that was broken off goes on where it stopped, and ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from unittest import mock

import pytest

from mplus_agents import Agent, MPlus
from mplus_agents.engine import Document, Message, writer
from mplus_agents.engine.progress import ProgressBar
from mplus_agents.errors import InvalidInputError
from tests.engine.engines import (
    State,
    check_accounts,
    check_documents,
    engine,
    failing_write,
    groups_of,
    log_of,
    pieces_of,
    prose,
    reopened,
    run_forked,
    small,
    state_of,
    turn_of,
    with_version,
)

BOOK = prose(2500)
LEAD = turn_of(40)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, list[int | None]]:
    with engine(tmp_path_factory.mktemp("straight") / "a.db", small()) as mplus:
        agent = mplus.agent("a")
        agent.remember(LEAD)
        agent.remember(BOOK, source_id="book")
        assert agent.stats().num_injections > 33  # more than two full groups
        return state_of(agent), [piece.offset for piece in pieces_of(agent, "book")]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Agent]:
    with engine(tmp_path / "a.db", small()) as mplus:
        agent = mplus.agent("a")
        agent.remember(LEAD)
        yield agent


def check_equal(agent: Agent, uninterrupted: tuple[State, list[int | None]]) -> None:
    check_accounts(agent)
    check_documents(agent, {"book": BOOK})
    assert (state_of(agent), [piece.offset for piece in pieces_of(agent, "book")]) == uninterrupted


@pytest.mark.parametrize("calls", [[1], [2], [16], [17], [18], [33], [40], [3, 1, 1, 17, 2, 16]])
def test_a_read_broken_off_by_the_model_goes_on(
    reader: Agent, uninterrupted: tuple[State, list[int | None]], calls: list[int]
) -> None:
    for at_call in calls:
        with (
            failing_write(small(), at_call, RuntimeError("out of memory")),
            pytest.raises(RuntimeError, match="out of"),
        ):
            reader.remember(BOOK, source_id="book")
        check_accounts(reader)
        assert with_version(reader) == reopened(reader)
    num_read = len("".join(piece.text or "" for piece in pieces_of(reader, "book")))
    receipt = reader.remember(BOOK, source_id="book")
    assert (f"went on at character {num_read:,}" in receipt.note) == (num_read > 0)
    check_equal(reader, uninterrupted)


@pytest.mark.parametrize("at_step", [1, 2, 16, 17, 20, 36])
def test_a_read_broken_off_from_the_progress_bar_goes_on(
    reader: Agent, uninterrupted: tuple[State, list[int | None]], at_step: int
) -> None:
    steps = [None] * (at_step - 1) + [KeyboardInterrupt()]
    with mock.patch.object(ProgressBar, "advance", side_effect=steps), pytest.raises(KeyboardInterrupt):
        reader.remember(BOOK, source_id="book")
    check_accounts(reader)
    reader.remember(BOOK, source_id="book")
    check_equal(reader, uninterrupted)


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def read_with_interrupts(path: Path, seed: int) -> None:
    """Read the book under signals that come after random amounts of computing."""
    moments = random.Random(seed)
    signal.signal(signal.SIGVTALRM, interrupt)
    with engine(path, small(), busy_timeout_s=5.0) as mplus:
        agent = mplus.agent("a")
        num_interrupts = 0
        while True:
            try:
                # Again and again: an interrupt that falls into a destructor is swallowed by Python.
                signal.setitimer(signal.ITIMER_VIRTUAL, moments.uniform(0.001, 0.06), 0.05)
                agent.remember(BOOK, source_id="book")
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                break
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                num_interrupts += 1
                check_accounts(agent)
        assert num_interrupts > 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_signals_at_any_moment_do_no_harm(
    reader: Agent,
    uninterrupted: tuple[State, list[int | None]],
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, "_MAX_GROUP", 2)
    reader.mplus.store.close()
    run_forked(lambda: read_with_interrupts(tmp_path / "a.db", seed))
    with engine(tmp_path / "a.db", small()) as mplus:
        check_equal(mplus.agent("a"), uninterrupted)


def test_the_same_text_again_stores_nothing_and_says_so(reader: Agent) -> None:
    for source_id in (None, "book"):
        first = reader.remember(BOOK, source_id=source_id)
        assert first.num_injections > 0
        before = with_version(reader)
        receipt = reader.remember(BOOK, source_id=source_id)
        assert "was read before; nothing of it is stored twice" in receipt.note
        assert receipt.num_injections == receipt.num_text_tokens == 0
        assert with_version(reader) == before


def test_a_changed_prefix_is_an_error_and_nothing_changes(reader: Agent) -> None:
    reader.remember(BOOK, source_id="book")
    before = with_version(reader)
    for changed in (BOOK.replace("Maya", "Mia", 1), BOOK[:-1], BOOK[:1], "x" + BOOK, BOOK[:-1] + "\u00e9 and on"):
        with pytest.raises(InvalidInputError, match=r"memories is .*as book"):
            reader.remember(changed, source_id="book")
        assert with_version(reader) == before
    assert with_version(reader) == reopened(reader)


@pytest.mark.parametrize("num_chars", [1, 300, 4000])
def test_of_a_document_that_grew_only_the_rest_is_read(reader: Agent, num_chars: int) -> None:
    start = BOOK[:num_chars]
    first = reader.remember(start, source_id="book")
    num_before = first.num_text_tokens + first.num_waiting_tokens
    receipt = reader.remember(BOOK, source_id="book")
    assert f"book went on at character {num_chars:,}" in receipt.note
    check_documents(reader, {"book": BOOK})
    check_accounts(reader)
    total = sum(event.num_tokens for event in log_of(reader))
    assert num_before + receipt.num_text_tokens + receipt.num_waiting_tokens - first.num_waiting_tokens == total
    assert with_version(reader) == reopened(reader)


def test_documents_of_an_iterator_are_each_taken_once(mplus: MPlus) -> None:
    agent = mplus.agent("a")
    texts = [prose(90, seed) for seed in range(6)]

    def documents(last: int) -> Iterator[str]:
        yield from texts[:last]
        if last < len(texts):
            raise OSError("network is down")

    for last in (2, 4, 6):
        if last < len(texts):
            with pytest.raises(OSError, match="network is down"):
                agent.remember(documents(last))
        else:
            assert "was read before" in agent.remember(documents(last)).note
        check_accounts(agent)
    pieces: dict[str, str] = {}
    for event in log_of(agent):
        pieces[event.source_id or ""] = pieces.get(event.source_id or "", "") + (event.text or "")
    assert list(pieces.values()) == texts
    assert with_version(agent) == reopened(agent)


def test_turns_before_an_error_in_an_iterator_are_stored(mplus: MPlus) -> None:
    agent = mplus.agent("a")

    def turns() -> Iterator[object]:
        yield {"role": "user", "content": "one"}
        yield Message("assistant", "two")
        yield {"role": "nobody", "content": "three"}

    with pytest.raises(InvalidInputError, match=r"memories\[2\]\.role is 'nobody'"):
        agent.remember(turns())
    assert agent.window == [Message("user", "one"), Message("assistant", "two")]
    assert with_version(agent) == reopened(agent)


def test_a_list_is_checked_whole_before_anything_is_stored(mplus: MPlus) -> None:
    agent = mplus.agent("a")
    before = with_version(agent)
    with pytest.raises(InvalidInputError, match=r"memories\[2\] is 5"):
        agent.remember([Document(prose(300), "book"), "text", 5])
    assert with_version(agent) == before


def test_a_long_list_of_turns_broken_off_leaves_whole_turns(reader: Agent) -> None:
    turns = [turn_of(60, role) for role in ("user", "assistant") * 40]
    with failing_write(small(), 37, MemoryError("no memory")), pytest.raises(MemoryError, match="no memory"):
        reader.remember(turns)
    check_accounts(reader)
    stored = [Message("user", event.text or "") for event in log_of(reader)]
    assert [turn.content for turn in stored] == [turn.content for turn in [LEAD, *turns]][: len(stored)]
    assert len(groups_of(reader)) == 32
    assert with_version(reader) == reopened(reader)


def test_an_iterator_that_writes_to_the_agent_itself_loses_nothing(mplus: MPlus) -> None:
    agent = mplus.agent("a")

    def turns() -> Iterator[Message]:
        yield Message("user", "outer one")
        agent.remember(Message("user", "inner"))
        yield Message("user", "outer two")

    try:
        agent.remember(turns())
    except InvalidInputError as error:
        assert "memories" in str(error)  # noqa: PT017 - either way is fine, losing a turn is not
    check_accounts(agent)
    assert with_version(agent) == reopened(agent)
