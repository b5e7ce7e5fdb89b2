"""An agent's past can be read bit for bit, and forked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mplus_agents import Agent, MPlus
from mplus_agents.engine import Message
from mplus_agents.errors import AgentNotFoundError, ConflictError, InvalidInputError
from tests.engine.engines import (
    check_accounts,
    check_documents,
    engine,
    logits_bytes,
    prose,
    reopened,
    small,
    state_of,
    turn_of,
    with_version,
)

BOOK = prose(2500)


def grown(mplus: MPlus, name: str = "a", num_turns: int = 12) -> Agent:
    agent = mplus.agent(name, seed=3)
    for number in range(num_turns):
        agent.remember(Message("user", prose(60, number)))
    return agent


@pytest.fixture
def mplus(tmp_path: Path) -> Iterator[MPlus]:
    with engine(tmp_path / "a.db", small()) as opened:
        yield opened


def test_every_commit_can_be_read_as_it_was(mplus: MPlus) -> None:
    agent = mplus.agent("a")
    seen = {}
    for number in range(30):
        agent.remember(turn_of(70 + number % 50))
        if (history := agent.history(limit=1)) and history[0].commit_id not in seen:
            logits = (logits_bytes(agent), agent.logits("Maya", long_term="random", seed=5).numpy().tobytes())
            seen[history[0].commit_id] = (logits, agent.tokens())
    assert len(seen) > 15
    assert [item.commit_id for item in agent.history()] == sorted(seen, reverse=True)
    for commit_id, (logits, tokens) in seen.items():
        view = agent.at(commit_id)
        assert (logits_bytes(view), view.logits("Maya", long_term="random", seed=5).numpy().tobytes()) == logits
        assert view.tokens() == tokens
        assert (view.window, view.window_text, view.commit_id) == ([], "", commit_id)
    first = agent.at(min(seen))
    assert first.stats().num_injections == 1
    assert first.stats().stored_bytes["keys_and_values"] < agent.stats().stored_bytes["keys_and_values"]
    assert first.ask("Where?", max_new_tokens=3) == first.ask_all(["Where?"], max_new_tokens=3)[0]
    assert not hasattr(first, "remember")
    assert repr(first) == f"MemoryView('a', namespace='default', commit={min(seen)})"


def test_history_says_what_was_injected(mplus: MPlus) -> None:
    agent = mplus.agent("a")
    assert agent.history() == []
    agent.remember(Message("user", "The dog of Maya is called Ferry, and Maya lives in Oslo on the blue river."))
    receipt = agent.flush()
    agent.remember(BOOK[:800], source_id="book")
    newest, *_, first = agent.history()
    assert (first.injection_id,) == receipt.injection_ids
    assert first.text == "The dog of Maya is called Ferry, and Maya lives in Oslo on the blue river."
    assert first.num_text_tokens == receipt.num_text_tokens
    assert newest.source_ids == ("book",)
    assert newest.text[:30] in BOOK


def test_a_fork_is_equal_and_then_apart(mplus: MPlus) -> None:
    agent = grown(mplus)
    fork = agent.fork("b")
    same, before = state_of(fork, is_alone=False), state_of(agent, is_alone=False)
    assert (same.logits, same.window, same.window_text) == (before.logits, before.window, before.window_text)
    assert fork.tokens() == agent.tokens()
    fork.remember(prose(200, 77))
    assert with_version(fork) == reopened(fork)
    assert state_of(agent, is_alone=False) == before
    agent.remember(prose(300, 78))
    assert with_version(agent) == reopened(agent)
    assert [each.history(limit=1)[0].agent_id for each in (agent, fork)] == [agent._agent_id, fork._agent_id]
    check_accounts(agent)
    diff = agent.diff(fork)
    assert diff.common is not None
    assert {item.agent_id for item in (diff.common,)} == {agent._agent_id}
    assert len(diff.only_here) == agent.stats().num_injections - diff.common.step - 1 > 0
    assert len(diff.only_there) == fork.stats().num_injections - diff.common.step - 1 > 0
    assert {item.agent_id for item in diff.only_there} == {fork._agent_id}


def test_equal_texts_after_a_fork_give_equal_memories(mplus: MPlus) -> None:
    agent = grown(mplus)
    fork = agent.fork("b")
    for each in (agent, fork):
        each.remember(prose(400, 5), source_id="same")
        each.flush()
    assert logits_bytes(agent) == logits_bytes(fork)
    first, second = state_of(agent, is_alone=False), state_of(fork, is_alone=False)
    assert first.tokens == second.tokens
    assert first.window == second.window


def test_a_fork_goes_on_in_a_document_where_the_other_was(mplus: MPlus) -> None:
    agent = mplus.agent("a")
    agent.remember(BOOK[:3000], source_id="book")
    fork = agent.fork("b", namespace="other")
    assert fork.namespace == "other"
    receipt = fork.remember(BOOK, source_id="book")
    assert "book went on at character 3,000" in receipt.note
    assert "went on at character 3,000" in agent.remember(BOOK, source_id="book").note
    check_documents(agent, {"book": BOOK})
    assert logits_bytes(agent) == logits_bytes(fork)


def test_a_fork_outlives_the_agent_that_it_was_made_from(tmp_path: Path) -> None:
    with engine(tmp_path / "a.db", small()) as mplus:
        agent = grown(mplus)
        agent.fork("b").remember(prose(100, 9))
        expected = logits_bytes(mplus.agent("b"))
        agent.delete()
        with pytest.raises(AgentNotFoundError, match="agent 'a' was deleted"):
            agent.history()
        assert logits_bytes(mplus.agent("b")) == expected
    with engine(tmp_path / "a.db", small()) as mplus:
        fork = mplus.agent("b", create=False)
        assert logits_bytes(fork) == expected
        assert [agent.name for agent in mplus.agents()] == ["b"]
        fork.remember(prose(200, 10))
        assert with_version(fork) == reopened(fork)
        fork.delete()
        assert mplus.agents() == []


def test_tags_are_names_of_commits(mplus: MPlus) -> None:
    agent = mplus.agent("a")
    with pytest.raises(InvalidInputError, match="commit is None; allowed: a commit; there is none before"):
        agent.tag("early")
    grown(mplus)
    agent.tag("early")
    expected = logits_bytes(agent)
    agent.remember(prose(300, 4))
    agent.tag("late")
    agent.tag("also early", "early")
    assert agent.tags["early"] == agent.tags["also early"] < agent.tags["late"]
    assert logits_bytes(agent.at("early")) == expected != logits_bytes(agent)
    assert agent.history(limit=1)[0].tags == ("late",)
    behind = agent.diff("early")
    assert behind.only_there == ()
    assert behind.common is not None
    assert behind.common.tags == ("also early", "early")
    agent.untag("late")
    assert set(agent.tags) == {"early", "also early"}
    with pytest.raises(InvalidInputError, match="commit is 'late'"):
        agent.at("late")
    with pytest.raises(InvalidInputError, match="name is 'a/b'"):
        agent.tag("a/b")
    assert agent.fork("b").tags == {}


def test_what_cannot_be_forked_or_compared_is_refused(mplus: MPlus) -> None:
    agent = grown(mplus)
    before = with_version(agent)
    with pytest.raises(ConflictError, match="agent 'a' exists already"):
        agent.fork("a")
    with pytest.raises(InvalidInputError, match="name is 'a/b'"):
        agent.fork("a/b")
    with pytest.raises(InvalidInputError, match="commit is 999"):
        agent.at(999)
    with engine("sqlite://", small()) as other, pytest.raises(InvalidInputError, match="in the same `Store`"):
        agent.diff(other.agent("a"))
    assert with_version(agent) == before
