"""The retention experiment on real agents: what they were given, what they were asked, and what is counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mplus_agents import Agent, MPlus
from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation import retention, scoring
from mplus_agents.evaluation.engines import load
from mplus_agents.evaluation.report import Result
from mplus_agents.evaluation.retention import rounds_of, run_retention, run_stream
from mplus_agents.evaluation.settings import RetentionSettings
from mplus_agents.evaluation.stream import CONDITIONS
from tests.engine.engines import TINY, engine, prose
from tests.evaluation.runs import Injected, injections_of, small_settings


class Spy:
    """Looks at every agent when it is asked, and notes every answer that is scored."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lives: list[list[Injected]] = []
        self.windows: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.answers: list[str] = []
        self.in_theta: dict[int, int] = {}
        ask_all, generate_all, score = Agent.ask_all, Agent.generate_all, scoring.score

        def asking(agent: Agent, questions: Any, **options: Any) -> Any:
            self.look(agent, options)
            return ask_all(agent, questions, **options)

        def generating(agent: Agent, conversations: Any, **options: Any) -> Any:
            self.look(agent, {**options, "conversations": conversations})
            return generate_all(agent, conversations, **options)

        def noting(answer: str, *others: Any) -> Any:
            self.answers.append(answer)
            return score(answer, *others)

        monkeypatch.setattr(Agent, "ask_all", asking)
        monkeypatch.setattr(Agent, "generate_all", generating)
        monkeypatch.setattr(retention, "score", noting)

    def look(self, agent: Agent, options: dict[str, Any]) -> None:
        self.lives.append(injections_of(agent))
        self.windows.append(agent.window)
        self.options.append(options)


def batched(lives: list[list[Injected]]) -> list[list[list[Injected]]]:
    """The memories that were asked, by round: three times each."""
    return [lives[place : place + 3] for place in range(0, len(lives), 3)]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_agents_log_has_every_fact_at_its_distance(condition: Any, spy: Spy, tmp_path: Path) -> None:
    settings = small_settings(tmp_path, condition=condition, max_new_tokens=1, distances=(0, 4, 17, 20))
    run_stream(settings, 1)
    rounds = rounds_of(settings, 1)
    assert len(rounds) == 3  # the far ones; 4; 0
    assert spy.windows == [[]] * 9
    # with Θ, without, at random: each on the same memory
    assert [options["long_term"] for options in spy.options] == ["retrieved", "off", "random"] * 3
    gap = int(condition == "updated")
    for plan, num_prose, lives in zip(rounds, (20 + gap, 24 + 2 * gap, 24 + 3 * gap), batched(spy.lives), strict=True):
        for life in lives:
            assert sum(injected.is_prose for injected in life) == num_prose
            for question in plan.questions:
                if condition == "unknown":
                    continue
                tellers = [at for at, item in enumerate(life) if not item.is_prose and question.value in item.text]
                assert sum(item.is_prose for item in life[max(tellers) :]) == question.distance


def test_streams_take_their_prose_from_different_places(spy: Spy, tmp_path: Path) -> None:
    settings = small_settings(tmp_path, max_new_tokens=1)
    outcomes = [run_stream(settings, number) for number in range(2)]
    first, second = ([item.text for item in life if item.is_prose] for life in (spy.lives[8], spy.lives[-1]))
    assert len(first) == len(second) == 7
    assert not set(first) & set(second)
    whole = Path(settings.prose or "").read_text()
    assert "".join(first) in whole
    assert "".join(second) in whole
    assert [outcome.num_restarts for outcome in outcomes] == [0, 0]


def test_prose_that_is_too_short_is_read_again_and_said_to_be(spy: Spy, tmp_path: Path) -> None:
    settings = small_settings(tmp_path, episodes=1, streams=1, distances=(9,), max_new_tokens=1)
    Path(settings.prose or "").write_text(prose(150))
    result = run_retention(settings)
    num_chunks = len({item.text for item in spy.lives[0] if item.is_prose})
    assert sum(item.is_prose for item in spy.lives[0]) == 9 > num_chunks
    assert "too short" in result.notes[-1]
    assert f"{9 // num_chunks:,} times" in result.notes[0]


def test_shares_in_theta_are_those_of_random_dropping(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, distances=(0, 6, 40), max_new_tokens=1, episodes=2, streams=1)
    outcome = run_stream(settings, 0)
    memory = load(str(TINY), "cpu").model.config.memory
    shares = {distance: outcome.in_theta[distance] / outcome.written[distance] for distance in outcome.written}
    assert shares[0] == 1
    # An injection of facts and 40 of prose; nothing is dropped until θ is full.
    num_dropping = 41 - max(1, memory.max_short_term // memory.tokens_per_injection)
    expected = (1 - memory.tokens_per_injection / memory.max_short_term) ** num_dropping
    assert shares[40] == pytest.approx(expected, abs=0.25)


def test_full_context_is_the_text_in_the_prompt(spy: Spy, tmp_path: Path) -> None:
    """What is told right before the question could as well wait in an agent's window."""
    sizes: dict[str, Any] = {"episodes": 2, "streams": 1, "distances": (0,), "max_new_tokens": 6}
    choices = (small_settings(tmp_path, seed=seed, **sizes) for seed in range(9))
    settings = next(choice for choice in choices if len(rounds_of(choice, 0)[0].steps[0].tellings) == 1)
    run_stream(settings, 0)
    [plan] = rounds_of(settings, 0)
    full_context = spy.answers[6:8]
    loaded = load(str(TINY), "cpu")
    with engine(tmp_path / "other.db", loaded.model, loaded.codec) as mplus:
        agent = mplus.agent("reader")
        agent.remember(plan.steps[0].tellings[0].text)
        assert agent.stats().num_injections == 0
        assert agent.window_text == plan.steps[0].tellings[0].text
        by_hand = [agent.ask(question.text, max_new_tokens=6) for question in plan.questions]
    assert full_context == by_hand
    assert spy.answers[8:10] == by_hand  # all text fits the window
    assert spy.answers[:2] != by_hand


def test_full_context_has_points_only_while_all_of_it_fits(tmp_path: Path) -> None:
    config = load(str(TINY), "cpu").model.config
    far = config.max_prompt_tokens // config.chunk_tokens + 3
    result = run_retention(small_settings(tmp_path, distances=(0, 1, far), episodes=2, max_new_tokens=1))
    found: dict[str, set[int]] = defaultdict(set)
    for point in result.points:
        found[point.variant].add(point.distance)
    assert found.pop("full_context") == {0, 1}
    assert found == {name: {0, 1, far} for name in ("mplus", "theta_only", "random", "window")}


def test_both_counts_are_in_the_result_and_files_can_be_saved_as_it_goes(tmp_path: Path) -> None:
    seen: list[Result] = []
    steps: list[int] = []
    settings = small_settings(tmp_path, episodes=3, max_new_tokens=1)
    result = run_retention(settings, on_result=seen.append, on_progress=steps.append)
    assert [(item.streams, item.is_complete) for item in seen] == [(1, False), (2, True)]
    assert seen[-1] == result
    assert sum(steps) == 2 * settings.num_prose_chunks == 14
    assert {point.episodes for point in result.points} == {3}
    assert {point.episodes for point in seen[0].points} == {2}
    assert result.weights["weights"] == load(str(TINY), "cpu").model.fingerprint["weights"]


def test_equal_settings_give_equal_results(tmp_path: Path, spy: Spy) -> None:
    settings = small_settings(tmp_path, max_new_tokens=3)
    first = run_retention(settings)
    answers, spy.answers = spy.answers, []
    assert run_retention(settings) == first
    assert spy.answers == answers
    spy.answers = []
    run_retention(small_settings(tmp_path, max_new_tokens=3, seed=8))
    assert spy.answers != answers


@pytest.mark.slow
def test_workers_give_the_same_result(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, max_new_tokens=2)
    assert run_retention(settings, workers=2) == run_retention(settings)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_and_leave_nothing(number: int, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "mplus_agents.cli.main", "eval", "retention", "--distances", "4000"]
    options = ["--episodes", "2", "--streams", "2", "--workers", "2"]
    parent = subprocess.Popen([*command, *options], env={**os.environ, "TMPDIR": str(scratch)}, cwd=tmp_path)
    assert becomes_true(lambda: len(list(scratch.glob("mplus-eval-*/stream.db"))) == 2)
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    parent.send_signal(number)
    parent.wait(timeout=30)
    assert len(children) >= 2
    assert becomes_true(lambda: not any(is_alive(pid) for pid in children))
    assert becomes_true(lambda: not list(scratch.glob("mplus-eval-*")))


def becomes_true(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_number_retrieved_can_be_another(tmp_path: Path, spy: Spy) -> None:
    loaded = load(str(TINY), "cpu", 5)
    sizes: list[int] = []
    decode = loaded.model.forward_cached

    def watching(input_ids: Any, cache: Any, **options: Any) -> Any:
        sizes.append(int(cache.layout.retrieved.max()))
        return decode(input_ids, cache, **options)

    with mock.patch.object(loaded.model, "forward_cached", watching):
        result = run_retention(small_settings(tmp_path, num_retrieved=5, distances=(30,), episodes=2, max_new_tokens=1))
    assert set(sizes) == {0, 5}
    assert result.settings["memory"]["num_retrieved"] == 5


def test_a_template_and_a_filled_window_stand_in_front(tmp_path: Path, spy: Spy) -> None:
    template = "Talk.\n\n{history}\nHuman: {question}\nAI:"
    settings = small_settings(tmp_path, template=template, window_tokens=60, max_new_tokens=2, streams=1)
    run_stream(settings, 0)
    rounds = rounds_of(settings, 0)
    assert spy.windows == [list(plan.window) for plan in rounds for _ in range(3)]  # each with its own, no other's
    assert all(plan.window for plan in rounds)
    for place, plan in enumerate(rounds):
        prompts = [conversation[0].content for conversation in spy.options[3 * place]["conversations"]]
        history = "\n".join(f"{'Human' if turn.role == 'user' else 'AI'}: {turn.content}" for turn in plan.window)
        assert prompts == [f"Talk.\n\n{history}\nHuman: {question.text}\nAI:" for question in plan.questions]


def test_the_window_stands_in_front_of_a_bare_question(tmp_path: Path, spy: Spy) -> None:
    settings = small_settings(tmp_path, window_tokens=60, max_new_tokens=5, streams=1, distances=(2,))
    run_stream(settings, 0)
    [plan] = rounds_of(settings, 0)
    assert spy.windows == [list(plan.window)] * 3
    with_window, spy.answers = spy.answers, []
    run_stream(small_settings(tmp_path, max_new_tokens=5, streams=1, distances=(2,)), 0)
    assert with_window != spy.answers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": 5}, "streams is 5; allowed: a whole number from 1 to the episodes \\(4\\)"),
        ({"distances": ()}, "distances is \\(\\); allowed: different whole numbers from 0, at least one"),
        ({"distances": (1, 1)}, "distances is \\(1, 1\\)"),
        ({"distances": (-1,)}, "distances is \\(-1,\\)"),
        ({"condition": "other"}, "condition is 'other'; allowed: plain, own, updated, unknown, value_first"),
        ({"template": "no place"}, "template is 'no place'; allowed: a text with {question} in it"),
        ({"condition": "own", "distances": tuple(range(30))}, "at most 17 for condition own"),
        ({"condition": "own", "episodes": 40, "streams": 2}, "streams is 2; allowed: at least 8, as one person has"),
        ({"gap": 0}, "gap is 0; allowed: a whole number from 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        small_settings(tmp_path, **changes)


def test_settings_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="window_tokens is 5000; allowed: less than a chunk"):
        run_retention(small_settings(tmp_path, window_tokens=5_000))
    with pytest.raises(InvalidInputError, match="num_retrieved is 10000000; allowed: a whole number from 1 to"):
        run_retention(small_settings(tmp_path, num_retrieved=10_000_000))
    with pytest.raises(InvalidInputError, match=r"prose is .*; allowed: a text file that can be read"):
        run_retention(small_settings(tmp_path, prose=str(tmp_path / "none")))
    with pytest.raises(InvalidInputError, match="workers is 0"):
        run_retention(small_settings(tmp_path), workers=0)


def test_defaults_ask_for_what_the_project_promises() -> None:
    settings = RetentionSettings()
    assert (settings.num_streams, settings.episodes) == (50, 200)
    assert {0, 1, 2, 4, 512, 2048, 4096} <= set(settings.distances)
    assert RetentionSettings(condition="own").num_streams == 200
    assert RetentionSettings(episodes=20).num_streams == 20
    assert sum(settings.num_questions(number) for number in range(50)) == 200


def test_the_temporary_database_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    urls = []
    with load(str(TINY), "cpu").open() as mplus:
        assert isinstance(mplus, MPlus)
        urls.append(mplus.store.url)
        assert len(list(tmp_path.iterdir())) == 1
    assert "sqlite:///" in urls[0]
    assert list(tmp_path.iterdir()) == []
