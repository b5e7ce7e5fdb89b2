"""Many questions at once, and Θ read in other ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mplus_agents import Agent, Message
from mplus_agents.engine import Document
from mplus_agents.errors import ConfigError, InvalidInputError, PromptTooLongError
from mplus_agents.model import MPlusModel
from tests.engine.engines import TINY, engine, prose, small, with_version

_QUESTIONS = [
    "Where does Maya live?",
    "Where does Mara live?",
    "Who?",
    "What is her dog called?",
    "Where does Lena live?",
]


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Agent]:
    with engine(tmp_path / "filled.db", small()) as mplus:
        agent = mplus.agent("a", seed=5)
        agent.remember([Document(prose(700), "book"), Message("user", "Maya lives in Oslo.")])
        assert agent.window
        assert min(agent.stats().long_term_tokens) == 70
        yield agent


@pytest.mark.parametrize("long_term", ["retrieved", "off"])
def test_many_questions_get_the_answers_of_single_ones(filled: Agent, long_term: str) -> None:
    before = with_version(filled)
    options: dict[str, Any] = {"max_new_tokens": 6, "long_term": long_term}
    single = [filled.ask(question, **options) for question in _QUESTIONS]
    assert len(set(single)) > 1
    for batch_size in (1, 2, 16):
        assert filled.ask_all(_QUESTIONS, batch_size=batch_size, **options) == single
    assert with_version(filled) == before


def test_stop_strings_end_each_answer_for_itself(filled: Agent) -> None:
    whole = filled.ask_all(_QUESTIONS, max_new_tokens=6)
    stop = [whole[0][3:5]]
    expected = [filled.ask(question, max_new_tokens=6, stop=stop) for question in _QUESTIONS]
    assert filled.ask_all(_QUESTIONS, max_new_tokens=6, stop=stop) == expected
    assert expected != whole


def test_many_conversations_get_the_answers_of_single_ones(filled: Agent) -> None:
    conversations = [[Message("user", "Hello."), Message("assistant", "Yes?"), Message("user", q)] for q in _QUESTIONS]
    single = [filled.generate(turns, max_new_tokens=5) for turns in conversations]
    assert filled.generate_all(conversations, max_new_tokens=5) == single


def test_questions_at_random_follow_from_the_seed(filled: Agent) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "long_term": "random"}
    first = filled.ask_all(_QUESTIONS, seed=1, **options)
    assert first == filled.ask_all(_QUESTIONS, seed=1, **options)
    assert first != filled.ask_all(_QUESTIONS, seed=2, **options)
    assert filled.ask("Who?", seed=1, **options) == filled.ask_all(["Who?"], seed=1, **options)[0]


def test_wrong_calls_are_refused(filled: Agent) -> None:
    assert filled.ask_all([]) == []
    with pytest.raises(InvalidInputError, match=r"questions\[1\] is ' '"):
        filled.ask_all(["Who?", " "])
    with pytest.raises(InvalidInputError, match="batch_size is 0; allowed: a whole number from 1"):
        filled.ask_all(["Who?"], batch_size=0)
    with pytest.raises(InvalidInputError, match="long_term is 'none'; allowed: retrieved, random, off"):
        filled.ask("Who?", long_term="none")
    with pytest.raises(ConfigError, match="unknown key 'beams'"):
        filled.ask_all(["Who?"], beams=2)
    with pytest.raises(PromptTooLongError, match="exceed the generation window"):
        filled.ask_all(["Who?", prose(3_000)])
    with pytest.raises(InvalidInputError, match="long_term is True"):
        filled.logits("Who?", long_term=True)  # type: ignore[arg-type]


def test_without_long_term_the_same_weights_are_a_memoryllm(filled: Agent, tmp_path: Path) -> None:
    """An agent that lived the same life on a model that never had a Θ answers alike."""
    model = MPlusModel.from_pretrained(TINY, "cpu")
    memory = replace(model.config.memory, max_short_term=40, num_retrieved=0, max_long_term=0, retrieval_dim=0)
    model.config = replace(model.config, memory=memory)
    model.retrievers = torch.nn.ModuleList()
    with engine(tmp_path / "without.db", model) as mplus:
        other = mplus.agent("a", seed=5)
        other.remember([Document(prose(700), "book"), Message("user", "Maya lives in Oslo.")])
        assert other.stats().long_term_tokens == (0,) * memory.num_layers
        without = filled.logits("Where does Maya live?", long_term="off")
        assert torch.equal(other.logits("Where does Maya live?"), without)
        assert float((filled.logits("Where does Maya live?") - without).abs().max()) > 0.01
        assert float((filled.logits("Where does Maya live?", long_term="random") - without).abs().max()) > 0.01
        answers = filled.ask_all(_QUESTIONS, max_new_tokens=6, long_term="off")
        assert other.ask_all(_QUESTIONS, max_new_tokens=6) == answers
