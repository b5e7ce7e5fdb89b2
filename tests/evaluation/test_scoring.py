"""When an answer counts as right."""

from __future__ import annotations

import pytest

from mplus_agents.evaluation.scoring import Score, collapse, normalize, score, score_short
from mplus_agents.evaluation.tally import Tally

_RIGHT = "Maya lives in Oslo."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (_RIGHT, Score(True, True, False)),
        (" Maya  lives\nin Oslo. ", Score(True, True, False)),
        ("Maya lives in Oslo", Score(False, True, False)),
        ("maya lives in Oslo.", Score(False, True, False)),
        ("Maya lives in Oslo. Question:", Score(False, True, False)),
        ("Maya lives in Oslofjord.", Score(False, False, False)),
        ("Maya lives in Bergen.", Score(False, False, False, True)),
        ("The home of Maya is not known to me.", Score(False, False, True)),
        ("I do not know.", Score(False, False, True)),
        ("Sorry, I don't know that.", Score(False, False, True)),
        ("It is not well known to me.", Score(False, False, False)),
        ("", Score(False, False, False)),
    ],
)
def test_a_whole_answer_is_compared_but_for_white_space(answer: str, expected: Score) -> None:
    assert score(answer, _RIGHT, "Oslo", "Maya lives in Bergen.") == expected


def test_numbers_are_whole_words() -> None:
    assert not score("The number is 31205.", "The number is 312.", "312").has_value


def test_short_answers_are_compared_as_squad_does() -> None:
    assert normalize(" The  Duke of York's, an heir! ") == "duke of yorks heir"
    assert score_short("the Eiffel Tower.", ["Eiffel Tower"]) == Score(True, True, False)
    assert score_short("It is the Eiffel Tower", ["tower", "Eiffel Tower"]) == Score(False, True, False)
    assert score_short("", ["the"]) == Score(False, False, False)  # an article alone is no answer
    assert collapse("\ta  b\n") == "a b"


def test_points_are_shares_of_what_was_counted() -> None:
    tally = Tally()
    for answer in (_RIGHT, "Oslo", "I do not know.", "Maya lives in Bergen."):
        tally.add("mplus", 3, score(answer, _RIGHT, "Oslo", "Maya lives in Bergen."))
    tally.add("random", 0, score(_RIGHT, _RIGHT, "Oslo"))
    first, second = tally.points(has_superseded=True)
    assert (first.variant, first.distance, first.episodes) == ("mplus", 3, 4)
    assert (first.accuracy, first.contains, first.unknown, first.superseded) == (0.25, 0.5, 0.25, 0.25)
    assert (second.variant, second.distance, second.accuracy, second.episodes) == ("random", 0, 1.0, 1)
    assert tally.points()[0].superseded is None
