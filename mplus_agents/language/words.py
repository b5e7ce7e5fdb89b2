"""Names and values: made-up words that nothing can be known about in advance, and common English ones."""

from __future__ import annotations

import zlib
from random import Random
from typing import Literal

Split = Literal["training", "evaluation"]
USER = "I"  # the person of facts in the first person


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Every eighth made-up word is never seen in training, so that an evaluation has names and values of its own.
_HELD_OUT_ONE_IN = 8
_ONSETS = _words("b d f g k l m n p r s t v z")
_VOWELS = _words("a e i o u")

NAMES = _words(
    "Adam Agnes Ahmed Alice Amara Amy Ana Anders Andrew Anna Arthur Asha Astrid Ben Bella Bob Boris Carla Carlos "
    "Chen Chloe Clara Claire Daniel David Diana Diego Dora Edith Edward Elena Eli Elif Ella Emil Emily Emma Erik "
    "Esther Eva Fatima Felix Fiona Frank Freya George Grace Greta Hana Hannah Harold Harry Helen Henry Hugo Ida "
    "Igor Ines Ingrid Irene Isaac Ivan Ivy Jack Jacob James Jane Jasmin Jens Joan John Jonas Jose Joseph Julia "
    "Kai Karen Karl Kate Kenji Lara Lars Laura Lena Leo Liam Lily Lina Linda Lisa Louis Lucas Lucy Luis Luna "
    "Magnus Maria Marie Mark Marta Martin Mary Max Maya Mei Mia Michael Miguel Mila Mina Mohammed Nadia Nina Noah "
    "Nora Olga Oliver Olivia Omar Oscar Otto Paul Peter Petra Priya Rachel Ravi Rosa Rose Ruth Sam Samir Sara "
    "Sarah Sofia Sophie Stella Sven Tara Theo Thomas Tim Tina Tom Uma Vera Victor Walter Wendy Will Yara Yuki "
    "Yusuf Zara Zoe"
)
PLACES = _words(
    "Amsterdam Ankara Athens Baku Berlin Bern Bogota Boston Bristol Brussels Budapest Cairo Chicago Copenhagen "
    "Cork Dakar Dallas Delhi Denver Dublin Florence Geneva Glasgow Hamburg Havana Helsinki Istanbul Kyoto Lagos "
    "Leeds Lima Lisbon Liverpool London Lyon Madrid Malmo Manila Milan Minsk Moscow Munich Nairobi Naples Nice "
    "Osaka Oslo Paris Porto Prague Quito Riga Rome Seattle Seoul Seville Sofia Split Sydney Tallinn Tokyo Toronto "
    "Tunis Turin Utrecht Venice Vienna Vilnius Warsaw York Zagreb Zurich"
)
COLOURS = _words(
    "amber beige black blue bronze brown crimson gold green grey indigo ivory lilac maroon mint navy olive orange "
    "pink purple red ruby silver teal turquoise violet white yellow"
)
FOODS = _words(
    "apples bananas beans bread cake carrots cheese cherries chocolate curry dates dumplings eggs figs fish "
    "grapes honey lemons lentils mangoes melons mushrooms noodles nuts olives onions pancakes pasta peaches pears "
    "peas pizza plums potatoes rice salad soup spinach tofu tomatoes"
)
DRINKS = _words("beer cider cocoa coffee juice lemonade milk rum tea water wine")
INSTRUMENTS = _words(
    "accordion banjo bassoon cello clarinet cornet drums fiddle flute guitar harp horn lute mandolin oboe organ "
    "piano recorder saxophone trombone trumpet tuba viola violin"
)
SPORTS = _words(
    "archery badminton baseball boxing chess climbing cricket cycling dancing diving fencing football golf hockey "
    "judo polo riding rowing rugby running sailing skating skiing squash surfing swimming tennis wrestling yoga"
)
JOBS = _words(
    "baker barber builder butcher carpenter chemist clerk cook dancer dentist doctor driver farmer fisher florist "
    "gardener guard hunter judge lawyer librarian mason miner nurse painter pilot plumber poet porter potter "
    "printer sailor singer smith soldier surgeon tailor teacher vet waiter weaver writer"
)


_LISTS = (NAMES, PLACES, COLOURS, FOODS, DRINKS, INSTRUMENTS, SPORTS, JOBS)
# Some look made up, such as Mila: an evaluation does not use them.
_COMMON_WORDS = frozenset(word.lower() for words in _LISTS for word in words)


def draw_word(rng: Random, split: Split) -> str:
    """Make up a word of two or three syllables, in lower case.

    Args:
        rng: Where randomness comes from.
        split: Words of the two splits are never the same.
    """
    while True:
        num_syllables = rng.choice((2, 2, 2, 3))
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(num_syllables))
        is_held_out = zlib.crc32(word.encode()) % _HELD_OUT_ONE_IN == 0
        if is_held_out == (split == "evaluation") and not (is_held_out and word in _COMMON_WORDS):
            return word


def draw_name(rng: Random, split: Split, common: float = 0.25) -> str:
    """Draw a person's name.

    Args:
        rng: Where randomness comes from.
        split: Where made-up names are drawn from.
        common: Share of common English names; an evaluation has none.
    """
    if split == "training" and rng.random() < common:
        return rng.choice(NAMES)
    return draw_word(rng, split).capitalize()
