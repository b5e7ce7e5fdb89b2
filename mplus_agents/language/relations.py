"""What can be said about a person, and how: the whole grammar of the language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mplus_agents.language import words
from mplus_agents.language.words import Split


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact. In every form `{p}` stands for the person and `{v}` for the value.

    Attributes:
        name: What the relation is called.
        statements: Ways to tell it, some with the value first.
        questions: Ways to ask for it.
        answer: The one way it is answered.
        own_statements: Ways to tell it of oneself.
        own_questions: Ways to ask for it of oneself.
        own_answer: The answer to the person it is about.
        values: Common values; empty if every value is a number.
        is_open: Whether made-up words are values too.
        is_name: Whether made-up values are written with a capital.
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    own_statements: tuple[str, ...]
    own_questions: tuple[str, ...]
    own_answer: str
    values: Sequence[str] = ()
    is_open: bool = True
    is_name: bool = True

    def draw_value(self, rng: Random, split: Split, common: float = 0.3) -> str:
        """Draw a value; an evaluation has made-up words and numbers only, where the relation takes them.

        Args:
            rng: Where randomness comes from.
            split: Where made-up words are drawn from.
            common: Share of common values in training.
        """
        if not self.values:
            return str(rng.randrange(100, 10_000))
        if self.is_open and (split == "evaluation" or rng.random() >= common):
            word = words.draw_word(rng, split)
            return word.capitalize() if self.is_name else word
        return rng.choice(self.values)


def _kind(
    name: str,
    thing: str,
    values: Sequence[str],
    ways: tuple[str, ...],
    own_ways: tuple[str, ...],
    questions: tuple[str, ...],
    own_questions: tuple[str, ...],
    *,
    is_open: bool = True,
    is_name: bool = True,
) -> Relation:
    """Build a relation: besides its own ways, each can be told, asked for and answered as a thing of a person."""
    first = "{v}" if is_name else "It is {v} that"  # a value keeps its small letter
    return Relation(
        name,
        (
            f"The {thing} of {{p}} is {{v}}.",
            f"The {thing} of {{p}} is {{v}}.",
            f"{first} is the {thing} of {{p}}.",
            *ways,
        ),
        (f"What is the {thing} of {{p}}?", *questions),
        f"The {thing} of {{p}} is {{v}}.",
        (f"My {thing} is {{v}}.", f"My {thing} is {{v}}.", f"{first} is my {thing}.", *own_ways),
        (f"What is my {thing}?", *own_questions),
        f"Your {thing} is {{v}}.",
        values,
        is_open,
        is_name,
    )


def _called(name: str, thing: str, word: str = "What") -> Relation:
    """Build the relation of a person to somebody or something that has a name."""
    return _kind(
        name,
        thing,
        words.NAMES,
        (f"{{p}} has a {thing} called {{v}}.", f"The {thing} of {{p}} is called {{v}}."),
        (f"I have a {thing} called {{v}}.", f"My {thing} is called {{v}}."),
        (f"What is the name of the {thing} of {{p}}?", f"{word} is the {thing} of {{p}}?"),
        (f"What is the name of my {thing}?", f"{word} is my {thing}?"),
    )


RELATIONS: tuple[Relation, ...] = (
    _kind(
        "home",
        "home",
        words.PLACES,
        ("{p} lives in {v}.", "{v} is where {p} lives."),
        ("I live in {v}.", "{v} is where I live."),
        ("Where does {p} live?", "Where is the home of {p}?"),
        ("Where do I live?", "Where is my home?"),
    ),
    _kind(
        "birthplace",
        "birthplace",
        words.PLACES,
        ("{p} was born in {v}.", "{v} is where {p} was born."),
        ("I was born in {v}.", "{v} is where I was born."),
        ("Where was {p} born?", "Where does {p} come from?"),
        ("Where was I born?", "Where do I come from?"),
    ),
    _kind(
        "journey",
        "next journey",
        words.PLACES,
        ("{p} will travel to {v}.", "{v} is where {p} will travel."),
        ("I will travel to {v}.", "{v} is where I will travel."),
        ("Where will {p} travel?", "Where does {p} plan to go?"),
        ("Where will I travel?", "Where do I plan to go?"),
    ),
    _kind(
        "guest",
        "next guest",
        words.NAMES,
        ("{p} will meet {v}.", "{v} is who {p} will meet."),
        ("I will meet {v}.", "{v} is who I will meet."),
        ("Who will {p} meet?", "Who does {p} plan to meet?"),
        ("Who will I meet?", "Who do I plan to meet?"),
    ),
    _called("sister", "sister", "Who"),
    _called("brother", "brother", "Who"),
    _called("dog", "dog"),
    _called("cat", "cat"),
    _called("friend", "best friend", "Who"),
    _called("boat", "boat"),
    _kind(
        "job",
        "job",
        words.JOBS,
        ("{p} works as a {v}.",),
        ("I work as a {v}.",),
        ("What does {p} work as?",),
        ("What do I work as?",),
        is_open=False,
        is_name=False,
    ),
    _kind(
        "colour",
        "favourite colour",
        words.COLOURS,
        ("{p} likes the colour {v}.",),
        ("I like the colour {v}.",),
        ("Which colour does {p} like?",),
        ("Which colour do I like?",),
        is_open=False,
        is_name=False,
    ),
    _kind(
        "food",
        "favourite food",
        words.FOODS,
        ("{p} likes to eat {v}.",),
        ("I like to eat {v}.",),
        ("What does {p} like to eat?",),
        ("What do I like to eat?",),
        is_name=False,
    ),
    _kind(
        "drink",
        "favourite drink",
        words.DRINKS,
        ("{p} likes to drink {v}.",),
        ("I like to drink {v}.",),
        ("What does {p} like to drink?",),
        ("What do I like to drink?",),
        is_name=False,
    ),
    _kind(
        "instrument",
        "instrument",
        words.INSTRUMENTS,
        ("{p} plays the {v}.",),
        ("I play the {v}.",),
        ("Which instrument does {p} play?",),
        ("Which instrument do I play?",),
        is_name=False,
    ),
    _kind(
        "sport",
        "favourite sport",
        words.SPORTS,
        ("{p} is good at {v}.",),
        ("I am good at {v}.",),
        ("What is {p} good at?",),
        ("What am I good at?",),
        is_name=False,
    ),
    _kind(
        "number",
        "number",
        (),
        ("{p} has the number {v}.",),
        ("I have the number {v}.",),
        ("Which number does {p} have?",),
        ("Which number do I have?",),
        is_open=False,
    ),
)
_BY_NAME = {item.name: item for item in RELATIONS}


def relation(name: str) -> Relation:
    """Return a relation by its name."""
    return _BY_NAME[name]
