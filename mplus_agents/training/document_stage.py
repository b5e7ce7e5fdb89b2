"""The numbers of the paper's three stages, and which sub-task a step gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from random import Random
from typing import Any, Literal, Self, get_args

from mplus_agents.config import reject_unknown_keys
from mplus_agents.errors import ConfigError
from mplus_agents.training.objectives import RetrieverObjective

TaskKind = Literal["plain", "revisit", "two_chunk", "multi_chunk"]
ReadAdapter = Literal["read", "write"]
_SHARES = ("plain_share", "multi_share", "revisit_share", "replace_share", "repeat_share")


@dataclass(frozen=True, slots=True)
class DocumentStage:
    """One stage of the paper's recipe; the defaults are stage 1's, numbers are of the published configuration.

    A step is drawn so: with `plain_share` the document is learnt as plain text over the memory. Else, if there is an
    earlier target to come back to, with `revisit_share` it is read again. Else with `multi_share` several chunks are
    injected without gradient, and with what is left one chunk with gradient.

    Attributes:
        max_short_term: N; None for the network's own.
        has_long_term: Whether what leaves θ goes to Θ and is retrieved.
        retriever_weight: Weight of the retriever's loss; 0 for none.
        plain_share: See above.
        multi_share: See above.
        revisit_share: See above.
        replace_share: How probably the first document after a revisit becomes the one to come back to.
        repeat_share: How probably the target is the injected text itself, after an instruction, and not what follows.
        max_chunks: Pairs of a step and the most chunks of a document that are injected from that step on.
        long_min_chunk_tokens: Least tokens of a chunk of a long document, or as many as a full chunk has.
        two_chunk_read_adapter: Which adapter reads after a write with gradient: `read` (paper), `write` (published
            code).
        random_query_prefix: Whether a random beginning of the target queries Θ, and another one is what the retriever
            is trained with (published code), in place of all of it (paper).
        retriever_objective: `bce` (paper), or `contrastive`.
        refresh_keys_every: Steps between two times at which the keys of Θ are made anew; 0 for never (published code).
    """

    max_short_term: int | None = 12_800
    has_long_term: bool = False
    retriever_weight: float = 0.0
    plain_share: float = 0.1
    multi_share: float = 0.8
    revisit_share: float = 0.2
    replace_share: float = 1.0
    repeat_share: float = 0.1
    max_chunks: tuple[tuple[int, int], ...] = ((0, 50), (100_000, 100), (200_000, 200))
    long_min_chunk_tokens: int = 384
    two_chunk_read_adapter: ReadAdapter = "read"
    random_query_prefix: bool = False
    retriever_objective: RetrieverObjective = "bce"
    refresh_keys_every: int = 0

    def __post_init__(self) -> None:
        for name in _SHARES:
            value = getattr(self, name)
            self._check(name, type(value) in (int, float) and 0 <= value <= 1, "0 to 1")
        is_number = type(self.retriever_weight) in (int, float)
        is_weight = is_number and 0 <= self.retriever_weight < math.inf
        self._check("retriever_weight", is_weight, "a number from 0")
        size = self.max_short_term
        self._check("max_short_term", size is None or (type(size) is int and size >= 1), "a positive number, or None")
        for name, least in (("long_min_chunk_tokens", 2), ("refresh_keys_every", 0)):
            value = getattr(self, name)
            self._check(name, type(value) is int and value >= least, f"a whole number from {least}")
        for name in ("has_long_term", "random_query_prefix"):
            self._check(name, type(getattr(self, name)) is bool, "true or false")
        self._check("two_chunk_read_adapter", self.two_chunk_read_adapter in get_args(ReadAdapter), "read or write")
        objectives = get_args(RetrieverObjective)
        self._check("retriever_objective", self.retriever_objective in objectives, " or ".join(objectives))
        is_schedule = all(type(number) is int for pair in self.max_chunks for number in pair)
        steps = [step for step, _ in self.max_chunks] if is_schedule else []
        is_schedule = bool(steps) and steps[0] == 0 and steps == sorted(set(steps))
        is_schedule = is_schedule and all(most >= 1 for _, most in self.max_chunks)
        self._check("max_chunks", is_schedule, "pairs of a step, ascending from 0, and a number of chunks")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a stage from plain values.

        Args:
            values: Field names and values; `paper_stage` (1, 2 or 3) says where those that are not given come from.

        Raises:
            ConfigError: A key is unknown, or a value is not allowed.
        """
        reject_unknown_keys(values, {"paper_stage", *(field.name for field in fields(cls))}, "document recipe")
        given = dict(values)
        number = given.pop("paper_stage", 1)
        if type(number) is not int or number not in PAPER_STAGES:
            raise ConfigError(f"paper_stage is {number!r}; allowed: 1, 2 or 3")
        if "max_chunks" in given:
            try:
                given["max_chunks"] = tuple((step, most) for step, most in given["max_chunks"])
            except (TypeError, ValueError) as error:
                raise ConfigError(f"max_chunks is {given['max_chunks']!r}; allowed: pairs of numbers") from error
        return cls(**{**asdict(PAPER_STAGES[number]), **given})

    def most_chunks(self, step: int) -> int:
        """Return the most chunks of a document that a step injects.

        Args:
            step: Its number within the stage.
        """
        return [most for start, most in self.max_chunks if start <= step][-1]

    def draw_task(self, rng: Random, can_revisit: bool) -> TaskKind:
        """Draw a step's sub-task; always takes the same number of draws.

        Args:
            rng: Where it comes from.
            can_revisit: Whether there is an earlier target to come back to.
        """
        plain, revisit, multi = (rng.random() for _ in range(3))
        if plain < self.plain_share:
            return "plain"
        if can_revisit and revisit < self.revisit_share:
            return "revisit"
        return "multi_chunk" if multi < self.multi_share else "two_chunk"

    def _check(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")


PAPER_STAGES: dict[int, DocumentStage] = {
    1: DocumentStage(),
    2: DocumentStage(retriever_weight=1.0, plain_share=0.05, multi_share=0.9),
    3: DocumentStage(
        max_short_term=10_240,
        has_long_term=True,
        retriever_weight=1.0,
        plain_share=0.05,
        replace_share=0.2,
        max_chunks=((0, 100), (20_000, 200)),
    ),
}
