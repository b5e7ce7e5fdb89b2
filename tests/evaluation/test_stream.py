"""The rounds of a stream: distances, what is told and what is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from random import Random

import pytest

from mplus_agents.engine.prompts import write_turn
from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation.stream import CONDITIONS, ChunkSizes, Condition, Prose, Question, Round, plan_stream
from mplus_agents.language import NOT_KNOWN, RELATIONS
from tests.engine.engines import prose, tiny_codec

_ASKED = {0: 2, 1: 2, 2: 1, 20: 2, 29: 2}


@cache
def sizes() -> ChunkSizes:
    return ChunkSizes(tiny_codec(), 128, 16)


def plan(condition: Condition = "plain", seed: int = 0, window_tokens: int = 0) -> list[Round]:
    return plan_stream(Random(seed), sizes(), _ASKED, condition, 3, window_tokens)


def timeline(planned: Round) -> list[str | None]:
    """Everything in order: the text of an injection of facts, or None for a chunk of prose."""
    line: list[str | None] = []
    for step, num_chunks in planned.prose_after():
        line += [telling.text for telling in step.tellings]
        line += [None] * num_chunks
    return line


def keys_of(text: str, forms: str) -> set[tuple[str, str]]:
    """What a text tells or asks, as person and relation, by the grammar's own forms."""
    found = set()
    for relation in RELATIONS:
        ways: Sequence[str] = getattr(relation, forms)
        for way in ways:
            pattern = re.escape(way).replace(r"\{p\}", r"(?P<p>[A-Z]\w+)").replace(r"\{v\}", r"[\w ]+?")
            found |= {(match["p"], relation.name) for match in re.finditer(rf"(?:^|(?<=[.:?] )){pattern}", text)}
    return found


def told_keys(rounds: list[Round]) -> set[tuple[str, str]]:
    """Everything that streams tell outside the window."""
    return {key for planned in rounds for text in timeline(planned) if text for key in keys_of(text, "statements")}


def asked(rounds: list[Round]) -> list[tuple[Round, Question]]:
    return [(planned, question) for planned in rounds for question in planned.questions]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("seed", range(3))
def test_every_question_is_at_its_distance(condition: Condition, seed: int) -> None:
    rounds = plan(condition, seed)
    # the far ones together, each near one alone
    distances = [sorted(question.distance for question in planned.questions) for planned in rounds]
    assert distances == [[20, 20, 29, 29], [2], [1, 1], [0, 0]]
    for planned in rounds:
        line = timeline(planned)
        longest = max(question.distance for question in planned.questions)
        assert line.count(None) == planned.num_prose_chunks == longest + 3 * (condition == "updated")
        for question in planned.questions:
            if condition != "unknown":
                tellers = [place for place, text in enumerate(line) if text and question.value in text]
                assert line[tellers[-1] :].count(None) == question.distance, question


@pytest.mark.parametrize("seed", range(3))
def test_what_is_told_twice_has_another_value_at_first(seed: int) -> None:
    for planned, question in asked(plan("updated", seed)):
        line = timeline(planned)
        assert question.old_answer is not None
        assert question.old_answer != question.answer
        common = set(question.answer.rstrip(".").split()) & set(question.old_answer.rstrip(".").split())
        old_values = set(question.old_answer.rstrip(".").split()) - common
        assert len(old_values) == 1
        old = old_values.pop()
        tellers = [place for place, text in enumerate(line) if text and old.lower() in text.lower()]
        assert any(line[place:].count(None) == question.distance + 3 for place in tellers)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_injection_of_facts_fits(condition: Condition) -> None:
    for planned in plan(condition):
        for telling in (telling for step in planned.steps for telling in step.tellings):
            assert 16 <= len(tiny_codec().encode(telling.text)) <= 128


def test_nothing_is_told_of_two_values() -> None:
    questions = [question for _, question in asked(plan_stream(Random(1), sizes(), dict.fromkeys(range(30), 4)))]
    keys = {question.text: question.answer for question in questions}
    assert len(questions) == 120
    assert len({question.answer for question in questions}) == 120
    assert len(keys) == 120


def test_never_told_is_never_told() -> None:
    for seed in range(5):
        rounds = plan("unknown", seed)
        told = " ".join(text for planned in rounds for text in timeline(planned) if text)
        strangers = 0
        told_of = told_keys(rounds)
        assert len(told_of) == sum(len(each.statements) for p in rounds for step in p.steps for each in step.tellings)
        for _, question in asked(rounds):
            [key] = keys_of(question.text, "questions")
            assert key not in told_of
            assert question.value == NOT_KNOWN
            assert question.answer.endswith(" is not known to me.")
            names = [word.strip("?.") for word in question.text.split()[1:] if word[0].isupper()]
            assert len(names) == 1, question.text
            assert names[0] in question.answer
            strangers += names[0] not in told.replace(".", " ").split()
        assert strangers == 4  # one of every two, where two are asked


def test_the_value_comes_first() -> None:
    for planned, question in asked(plan("value_first")):
        person = next(word.strip("?.") for word in question.text.split()[1:] if word[0].isupper())
        texts = [
            sentence
            for text in timeline(planned)
            if text
            for sentence in text.split(". ")
            if question.value.lower() in sentence.lower() and person in sentence
        ]
        assert any(text.lower().index(question.value.lower()) < text.index(person) for text in texts), question


def test_own_facts_are_told_as_turns_of_the_user() -> None:
    rounds = plan("own")
    for planned in rounds:
        for telling in (telling for step in planned.steps for telling in step.tellings):
            assert telling.text == "".join(write_turn("user", statement) for statement in telling.statements)
    for _, question in asked(rounds):
        assert {"I", "my"} & set(question.text.strip("?").split())
        assert question.answer.startswith(("You", "Your"))


def test_the_window_answers_nothing_and_fits() -> None:
    for planned, without in zip(plan(window_tokens=60), plan(), strict=True):
        texts = [write_turn(turn.role, turn.content) for turn in planned.window]
        assert 0 < sum(len(tiny_codec().encode(text)) for text in texts) <= 60
        assert [turn.role for turn in planned.window][:2] == ["user", "assistant"]
        waiting = {key for turn in planned.window for key in keys_of(turn.content, "statements")}
        assert len(waiting) == len(planned.window) / 2
        questions = {key for question in planned.questions for key in keys_of(question.text, "questions")}
        assert len(questions) == len(planned.questions)
        assert not waiting & (told_keys([planned]) | questions)
        assert (planned.steps, planned.questions) == (without.steps, without.questions)
        assert planned.history.splitlines()[0] == f"Human: {planned.window[0].content}"


def test_a_plan_follows_from_its_seed() -> None:
    assert plan(seed=3) == plan(seed=3)
    assert plan(seed=3) != plan(seed=4)


def test_prose_goes_on_from_its_end_at_its_beginning() -> None:
    text = prose(800)
    cut = Prose.cut(tiny_codec(), text, 32)
    assert text.startswith("".join(cut.chunks))
    assert all(0 < size <= 32 for size in cut.num_tokens)
    last = len(cut.chunks)
    assert cut.documents(2, 3) == ["".join(cut.chunks[2:5])]
    assert cut.documents(last - 1, 2) == [cut.chunks[-1], cut.chunks[0]]
    assert cut.documents(3, 2 * last) == ["".join(cut.chunks[3:]), "".join(cut.chunks), "".join(cut.chunks[:3])]
    assert cut.documents(4, 0) == []
    with pytest.raises(InvalidInputError, match="prose is 'a text of 4 characters'; allowed: more than 32 tokens"):
        Prose.cut(tiny_codec(), "four", 32)
