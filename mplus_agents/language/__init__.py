"""The simple English that mplus-tiny speaks: people, facts about them, questions and answers."""

from mplus_agents.language.facts import UNKNOWN_ANSWER, Fact, draw_facts
from mplus_agents.language.relations import RELATIONS, Relation, relation
from mplus_agents.language.words import USER, Split, draw_name, draw_word

__all__ = [
    "RELATIONS",
    "UNKNOWN_ANSWER",
    "USER",
    "Fact",
    "Relation",
    "Split",
    "draw_facts",
    "draw_name",
    "draw_word",
    "relation",
]
