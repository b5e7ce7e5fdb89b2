"""Counts of scored answers, and the points they make."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mplus_agents.evaluation.report import VARIANTS, Point
from mplus_agents.evaluation.scoring import Score


@dataclass(slots=True)
class Tally:
    """Answers counted by variant and distance.

    Attributes:
        counts: By variant, distance and what is counted.
    """

    counts: Counter[tuple[str, int, str]] = field(default_factory=Counter)

    def add(self, variant: str, distance: int, score: Score) -> None:
        """Count one answer.

        Args:
            variant: How it was given.
            distance: At which distance.
            score: What it is worth.
        """
        marks = {
            "episodes": True,
            "correct": score.is_correct,
            "contains": score.has_value,
            "unknown": score.is_unknown,
            "superseded": score.is_superseded,
        }
        for name, counts in marks.items():
            self.counts[variant, distance, name] += counts

    def points(self, has_superseded: bool = False) -> tuple[Point, ...]:
        """Return the shares, by variant and distance.

        Args:
            has_superseded: Whether facts were told twice.
        """
        keys = {(variant, distance) for variant, distance, _ in self.counts}
        return tuple(
            self._point(variant, distance, has_superseded)
            for variant in VARIANTS
            for distance in sorted(distance for name, distance in keys if name == variant)
        )

    def _point(self, variant: str, distance: int, has_superseded: bool) -> Point:
        episodes = self.counts[variant, distance, "episodes"]

        def share(name: str) -> float:
            return self.counts[variant, distance, name] / episodes

        return Point(
            variant=variant,
            distance=distance,
            accuracy=share("correct"),
            episodes=episodes,
            contains=share("contains"),
            unknown=share("unknown"),
            superseded=share("superseded") if has_superseded else None,
        )
