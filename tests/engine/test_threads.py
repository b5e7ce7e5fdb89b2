"""Many threads on one agent, and on many agents of one engine: nothing is lost, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mplus_agents import Agent
from mplus_agents.engine import Message
from mplus_agents.errors import AgentNotFoundError
from tests.engine.engines import (
    check_accounts,
    check_documents,
    engine,
    log_of,
    logits_bytes,
    prose,
    reopened,
    small,
    state_of,
    with_version,
)

pytestmark = pytest.mark.timeout(60)


def run_all(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Start all jobs at one moment, each in its thread."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


@pytest.mark.parametrize("url", ["sqlite:///{}/a.db", "sqlite://"])
def test_threads_on_one_agent_lose_nothing(tmp_path: Path, url: str) -> None:
    with engine(url.format(tmp_path), small()) as mplus:
        agent = mplus.agent("a")

        def tell(tag: int) -> None:
            for number in range(6):
                agent.remember(Message("user", f"{tag}-{number} {prose(25, number)}"))
            agent.remember(prose(120, tag), source_id=f"{tag}")

        def read(tag: int) -> None:
            for _ in range(5):
                agent.ask("Where?", max_new_tokens=2)
                agent.stats()
                agent.tokens(0)
                assert agent.window is not None

        run_all([partial(tell if tag % 2 else read, tag) for tag in range(8)])
        check_accounts(agent)
        check_documents(agent, {f"{tag}": prose(120, tag) for tag in (1, 3, 5, 7)})
        told = [(event.text or "").split()[0] for event in log_of(agent) if event.kind == "message"]
        for tag in (1, 3, 5, 7):
            assert [word for word in told if word.startswith(f"{tag}-")] == [f"{tag}-{number}" for number in range(6)]
        if tmp_path.joinpath("a.db").exists():
            assert with_version(agent) == reopened(agent)


def live(agent: Agent, seed: int) -> list[str]:
    answers = []
    for number in range(3):
        agent.remember(prose(180, seed * 100 + number), source_id=f"{number}")
        answers.append(agent.chat(f"Where is {number}?", max_new_tokens=6))
        answers.append(agent.ask("Who?", max_new_tokens=4))
    return answers


def test_agents_in_threads_end_as_agents_one_by_one(tmp_path: Path) -> None:
    names = [f"agent {number}" for number in range(6)]
    results = []
    for is_at_once in (False, True):
        with engine(tmp_path / f"{is_at_once}.db", small()) as mplus:
            agents = [mplus.agent(name) for name in names]
            jobs = [partial(live, agent, seed) for seed, agent in enumerate(agents)]
            answers = run_all(jobs) if is_at_once else [job() for job in jobs]
            for agent in agents:
                check_accounts(agent)
            results.append((answers, [state_of(agent, is_alone=False) for agent in agents]))
    assert results[0] == results[1]


def test_one_name_in_many_threads_is_one_agent(tmp_path: Path) -> None:
    with engine(tmp_path / "a.db", small()) as mplus:
        found = run_all([lambda: mplus.agent("a")] * 12)
        assert all(agent is found[0] for agent in found)
        assert len(mplus.agents()) == 1


def test_one_name_in_many_engines_is_created_once(tmp_path: Path) -> None:
    def open_and_tell() -> int:
        with engine(tmp_path / "a.db", small()) as mplus:
            agent = mplus.agent("a")
            return agent.stats().num_events

    with engine(tmp_path / "a.db", small()) as mplus:
        assert run_all([open_and_tell] * 6) == [0] * 6
        assert len(mplus.agents()) == 1


def test_streams_at_once_on_one_agent_equal_streams_one_by_one(tmp_path: Path) -> None:
    with engine(tmp_path / "a.db", small()) as mplus:
        agent = mplus.agent("a")
        agent.remember(prose(400), source_id="book")
        questions = [Message("user", f"What about {word}?") for word in prose(8, 3).split()]

        def answer(question: Message) -> str:
            return agent.generate([question], max_new_tokens=15).text

        expected = [answer(question) for question in questions]
        assert run_all([partial(answer, question) for question in questions]) == expected


def test_an_agent_deleted_under_its_readers_fails_cleanly(tmp_path: Path) -> None:
    with engine(tmp_path / "a.db", small()) as mplus:
        agent = mplus.agent("a")
        agent.remember(prose(300))

        def use(number: int) -> str:
            try:
                for step in range(20):
                    if number == 0 and step == 3:
                        agent.delete()
                    elif number % 2:
                        agent.remember(f"{number} {step} {prose(30)}")
                    else:
                        logits_bytes(agent)
            except AgentNotFoundError as error:
                return str(error)
            return "no error"

        errors = run_all([partial(use, number) for number in range(6)])
        assert set(errors) == {"agent 'a' was deleted"}
        assert mplus.agents() == []
