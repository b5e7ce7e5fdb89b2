"""The simple English that mplus-tiny speaks: people, facts about them, questions and answers."""

from mplus_agents.language.facts import NOT_KNOWN, Fact, draw_facts
from mplus_agents.language.relations import RELATIONS, Relation, relation
from mplus_agents.language.words import USER, Split, draw_name, draw_word

__all__ = [
    "NOT_KNOWN",
    "RELATIONS",
    "USER",
    "Fact",
    "Relation",
    "Split",
    "draw_facts",
    "draw_name",
    "draw_word",
    "relation",
]
