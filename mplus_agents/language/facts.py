"""Facts about people, and how they are told, asked for and answered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from mplus_agents.language.relations import RELATIONS, Relation
from mplus_agents.language.words import USER, Split, draw_name

# It stands where the value would: only when the value is looked for does it show that there is none.
NOT_KNOWN = "not known to me"
_PERSON = re.compile(r"\{p\}|\b(?:I|[Mm]y)\b")  # in a form of a relation


@dataclass(frozen=True, slots=True)
class Fact:
    """One value of one relation of one person.

    Attributes:
        person: A name, or `USER` for the one who speaks.
        relation: The relation.
        value: The value.
    """

    person: str
    relation: Relation
    value: str

    @property
    def key(self) -> tuple[str, str]:
        """What the fact is about: two facts with one key contradict each other, and the later one holds."""
        return self.person, self.relation.name

    @property
    def is_own(self) -> bool:
        """Whether it is about the one who speaks."""
        return self.person == USER

    def state(self, rng: Random, value_first: bool = False) -> str:
        """Tell the fact in one of its ways.

        Args:
            rng: Where randomness comes from.
            value_first: Whether only those count in which the value stands before the person.
        """
        forms = self.relation.own_statements if self.is_own else self.relation.statements
        if value_first:
            forms = tuple(form for form in forms if _has_value_first(form))
        text = rng.choice(forms).format(p=self.person, v=self.value)
        return text[0].upper() + text[1:]

    def ask(self, rng: Random) -> str:
        """Ask for the value in one of its ways."""
        forms = self.relation.own_questions if self.is_own else self.relation.questions
        return rng.choice(forms).format(p=self.person)

    def answer(self) -> str:
        """Answer with the value."""
        form = self.relation.own_answer if self.is_own else self.relation.answer
        return form.format(p=self.person, v=self.value)

    def unknown_answer(self) -> str:
        """Answer that the value was never told."""
        return replace(self, value=NOT_KNOWN).answer()


def _has_value_first(form: str) -> bool:
    person = _PERSON.search(form)
    return person is not None and form.index("{v}") < person.start()


def draw_facts(
    rng: Random,
    num_facts: int,
    split: Split,
    relations: Sequence[Relation] = RELATIONS,
    own: bool = False,
    common: float = 0.25,
) -> list[Fact]:
    """Draw facts about one to three people, who often share a relation so that the name has to be read.

    Args:
        rng: Where randomness comes from.
        num_facts: How many.
        split: Where made-up words are drawn from.
        relations: What may be told.
        own: Whether one of the people is the one who speaks.
        common: Share of common names and values in training.
    """
    people = [draw_name(rng, split, common) for _ in range(rng.randint(1, min(3, num_facts)))]
    if own:
        people[0] = USER
    kinds = rng.sample(list(relations), max(1, -(-num_facts // len(people))))
    pairs = list(dict.fromkeys((person, kind) for kind in kinds for person in people))
    facts = [Fact(person, kind, kind.draw_value(rng, split, common)) for person, kind in pairs[:num_facts]]
    rng.shuffle(facts)
    return facts
