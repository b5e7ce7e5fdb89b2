"""The model in the package remembers through Θ, and only through Θ, what left θ long ago."""

from __future__ import annotations

import pytest

from mplus_agents.evaluation.retention import run_retention
from mplus_agents.evaluation.settings import RetentionSettings


@pytest.fixture(scope="module")
def accuracy() -> dict[tuple[str, int], float]:
    """Exact match by variant and distance, 32 questions each, on facts and prose that training never saw."""
    settings = RetentionSettings(seed=11, episodes=32, streams=8, distances=(0, 2, 128), device="cpu")
    return {(point.variant, point.distance): point.accuracy for point in run_retention(settings).points}


def test_far_facts_are_answered_through_long_term_memory(accuracy: dict[tuple[str, int], float]) -> None:
    assert accuracy["mplus", 128] >= 0.875
    assert accuracy["theta_only", 128] <= 0.1
    assert accuracy["random", 128] <= 0.2


def test_near_facts_are_answered_from_short_term_memory(accuracy: dict[tuple[str, int], float]) -> None:
    assert min(accuracy["mplus", 0], accuracy["mplus", 2]) >= 0.875
    assert min(accuracy["theta_only", 0], accuracy["theta_only", 2]) >= 0.875


def test_it_says_what_it_was_never_told() -> None:
    settings = RetentionSettings(seed=12, episodes=32, streams=8, distances=(0,), condition="unknown", device="cpu")
    points = {point.variant: point for point in run_retention(settings).points}
    assert points["mplus"].unknown >= 0.75
