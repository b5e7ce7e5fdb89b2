"""When an answer is right: exact match of the whole answer, and three weaker readings beside it."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

from mplus_agents.language import NOT_KNOWN

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_UNKNOWN_PHRASES = (NOT_KNOWN, "do not know", "don't know")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def collapse(text: str) -> str:
    """Return a text with every run of white space as one space, and none at its ends.

    Args:
        text: Any text.
    """
    return " ".join(text.split())


def is_match(answer: str, expected: str) -> bool:
    """Tell whether an answer is the expected one as a whole, white space apart.

    Args:
        answer: What was answered.
        expected: The right answer.
    """
    return collapse(answer) == collapse(expected)


def does_contain(answer: str, value: str) -> bool:
    """Tell whether a value stands in an answer as whole words.

    Args:
        answer: What was answered.
        value: The value; never empty.
    """
    return re.search(rf"(?<!\w){re.escape(collapse(value))}(?!\w)", collapse(answer)) is not None


def normalize(text: str) -> str:
    """Return a text as the SQuAD evaluation compares it: lower case, without punctuation and articles.

    Args:
        text: Any text.
    """
    return collapse(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)))


def says_unknown(answer: str) -> bool:
    """Tell whether an answer says that the answer is not known, as mplus-tiny or as other models put it.

    Args:
        answer: What was answered.
    """
    return any(does_contain(answer, phrase) for phrase in _UNKNOWN_PHRASES)


@dataclass(frozen=True, slots=True)
class Score:
    """What is counted about one answer.

    Attributes:
        is_correct: It is the right answer as a whole.
        has_value: The right value stands in it.
        is_unknown: It says that the answer is not known.
        is_superseded: It is the answer that was right before the fact was told again with another value.
    """

    is_correct: bool
    has_value: bool
    is_unknown: bool
    is_superseded: bool = False


def score(answer: str, expected: str, value: str, old: str | None = None) -> Score:
    """Score an answer in the simple language.

    Args:
        answer: What was answered.
        expected: The right answer.
        value: The value in it.
        old: The answer that was right before; None if there is none.
    """
    return Score(
        is_match(answer, expected),
        does_contain(answer, value),
        says_unknown(answer),
        old is not None and is_match(answer, old),
    )


def score_short(answer: str, accepted: Iterable[str]) -> Score:
    """Score a short answer from a benchmark of questions, all accepted answers being equally right.

    Args:
        answer: What was answered.
        accepted: The right answers.
    """
    given = normalize(answer)
    wanted = {normalize(text) for text in accepted} - {""}
    return Score(
        given in wanted,
        any(does_contain(given, text) for text in wanted),
        says_unknown(answer),
    )
