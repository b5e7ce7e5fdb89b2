"""The simple English: what is drawn is fresh, split, and told, asked and answered in the same words."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplus_agents.language import RELATIONS, USER, Fact, draw_facts, draw_name, draw_word, relation
from mplus_agents.language.relations import Relation


def test_the_two_splits_share_no_made_up_word() -> None:
    rng = Random(0)
    training = {draw_word(rng, "training") for _ in range(20_000)}
    evaluation = {draw_word(rng, "evaluation") for _ in range(3_000)}
    assert not evaluation & {"mila", "ravi", "manila", "tofu"}  # held out by their digest, but common words
    assert not training & evaluation
    assert len(training) > 7_500
    assert len(evaluation) > 900


@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_facts_have_different_keys_and_stand_in_what_is_said(seed: int, num_facts: int, own: bool) -> None:
    rng = Random(seed)
    facts = draw_facts(rng, num_facts, "training", own=own)
    assert len({fact.key for fact in facts}) == len(facts) <= num_facts
    for fact in facts:
        statement, question, answer = fact.state(rng), fact.ask(rng), fact.answer()
        assert fact.value in statement or fact.value.capitalize() in statement
        assert fact.value in answer
        assert fact.value not in question.replace(fact.person, "", 1) or fact.value == fact.person
        assert question.endswith("?")
        if fact.is_own:
            assert answer.startswith("Your ")
        else:
            assert all(fact.person in text for text in (statement, question, answer))


@given(st.integers(0, 10**6))
def test_an_evaluation_has_names_and_open_values_of_its_own(seed: int) -> None:
    rng = Random(seed)
    name = draw_name(rng, "evaluation")
    assert name.istitle()
    kind = relation("home")
    value = kind.draw_value(rng, "evaluation")
    assert value not in kind.values


def test_every_relation_is_told_with_the_value_before_and_after_the_name() -> None:
    for kind in RELATIONS:
        orders = {text.index("{p}") < text.index("{v}") for text in kind.statements}
        assert orders == {True, False}, kind.name
        assert all("{v}" in text and "{p}" not in text for text in kind.own_statements)
        assert all("{p}" in text and "{v}" not in text for text in kind.questions)


@pytest.mark.parametrize("kind", RELATIONS, ids=lambda kind: kind.name)
def test_the_value_can_be_asked_to_stand_first(kind: Relation) -> None:
    rng = Random(0)
    for person, names in (("Maya", {"Maya"}), (USER, {"I", "my", "My"})):
        fact = Fact(person, kind, "Xyz")
        told = {fact.state(rng, value_first=True).rstrip(".") for _ in range(60)}
        assert told < {fact.state(rng).rstrip(".") for _ in range(300)}
        for words in map(str.split, told):
            assert words.index("Xyz") < min(place for place, word in enumerate(words) if word in names)


@pytest.mark.parametrize(
    ("fact", "statement", "question", "answer"),
    [
        (
            Fact("Maya", relation("home"), "Oslo"),
            "Maya lives in Oslo.",
            "Where does Maya live?",
            "The home of Maya is Oslo.",
        ),
        (Fact(USER, relation("dog"), "Rex"), "I have a dog called Rex.", "What is my dog?", "Your dog is Rex."),
    ],
)
def test_a_fact_in_words(fact: Fact, statement: str, question: str, answer: str) -> None:
    rng = Random(0)
    assert statement in {fact.state(rng) for _ in range(100)}
    assert question in {fact.ask(rng) for _ in range(100)}
    assert fact.answer() == answer
