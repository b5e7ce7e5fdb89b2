"""How the retention experiment is run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation.stream import CONDITIONS, Condition, split_rounds
from mplus_agents.language import RELATIONS
from mplus_agents.language.prose import packaged_prose

DEFAULT_DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096)
DEFAULT_EPISODES = 200
DEFAULT_STREAMS = 50
QUESTION, HISTORY = "{question}", "{history}"


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """What is run.

    Attributes:
        model: A folder, a hub id, or `mplus-tiny`.
        seed: Seed of everything random.
        episodes: Questions per distance and variant.
        distances: Chunks of prose between fact and question.
        streams: Streams that carry them; None: 50; fewer for fewer episodes, more if a
            stream cannot hold as many facts.
        condition: `plain`: facts about people. `own`: facts in the first person. `updated`: facts told twice with
            another value. `unknown`: questions that nothing answers. `value_first`: statements with the value in front.
        gap: Chunks of prose between the two tellings of `updated`.
        num_retrieved: K0; as the model was made if None.
        template: The prompt around a question, with `{question}` and perhaps `{history}` in it; None: the question.
        window_tokens: Most tokens of other turns that wait in the window when the questions are asked; 0: none.
        max_new_tokens: Longest answer.
        prose: A text file to take the prose from; None: the novel in the package, which training never saw.
        device: Where to load the model; the first CUDA device if there is one, else the CPU.
        batch_size: Most questions answered together.
    """

    model: str = "mplus-tiny"
    seed: int = 0
    episodes: int = DEFAULT_EPISODES
    distances: tuple[int, ...] = DEFAULT_DISTANCES
    streams: int | None = None
    condition: Condition = "plain"
    gap: int = 1
    num_retrieved: int | None = None
    template: str | None = None
    window_tokens: int = 0
    max_new_tokens: int = 32
    prose: str | None = None
    device: str | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        _require(self.condition in CONDITIONS, "condition", self.condition, ", ".join(CONDITIONS))
        for name, least in (("seed", 0), ("episodes", 1), ("gap", 1), ("window_tokens", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            _require(type(value) is int and value >= least, name, value, f"a whole number from {least}")
        is_list = bool(self.distances) and all(type(item) is int and item >= 0 for item in self.distances)
        is_list = is_list and len(set(self.distances)) == len(self.distances)
        _require(is_list, "distances", self.distances, "different whole numbers from 0, at least one")
        if self.streams is not None:
            is_count = type(self.streams) is int and 1 <= self.streams <= self.episodes
            allowed = f"a whole number from 1 to the episodes ({self.episodes})"
            _require(is_count, "streams", self.streams, allowed)
        if self.template is not None:
            _require(QUESTION in self.template, "template", self.template, f"a text with {QUESTION} in it")
        most = self._most_questions()
        allowed = f"at most {len(RELATIONS)} for condition own, as many facts as one person has"
        _require(most >= 1, "distances", f"{len(self.distances)} distances", allowed)
        allowed = f"at least {-(-self.episodes // most)}, as one person has {len(RELATIONS)} facts"
        _require(-(-self.episodes // self.num_streams) <= most, "streams", self.streams, allowed)

    @property
    def num_streams(self) -> int:
        """Streams that are run."""
        if self.streams is not None:
            return self.streams
        least = min(DEFAULT_STREAMS, self.episodes)
        return max(least, -(-self.episodes // max(1, self._most_questions())))

    @property
    def num_prose_chunks(self) -> int:
        """Chunks of prose in one stream."""
        gap = self.gap if self.condition == "updated" else 0
        return sum(max(distances) + gap for distances in split_rounds(self.distances))

    def num_questions(self, number: int) -> int:
        """Return how many questions per distance a stream asks.

        Args:
            number: The stream, from 0.
        """
        return self.episodes // self.num_streams + (number < self.episodes % self.num_streams)

    def prompt(self, question: str, history: str = "") -> str:
        """Put a question into the template.

        Args:
            question: The question.
            history: The turns that wait in the window.
        """
        assert self.template is not None
        return question.join(part.replace(HISTORY, history) for part in self.template.split(QUESTION))

    def read_prose(self) -> str:
        """Return the text that the prose is taken from.

        Raises:
            InvalidInputError: The file cannot be read, or is not UTF-8.
        """
        if self.prose is None:
            return packaged_prose("novel")
        try:
            return Path(self.prose).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise InvalidInputError("prose", self.prose, f"a text file that can be read ({reason})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return what is worth saving beside the numbers."""
        values = {**asdict(self), "distances": list(self.distances)}
        for name in ("model", "seed", "episodes", "streams", "device"):
            del values[name]
        return values

    def _most_questions(self) -> int:
        """Return how many questions per distance one stream can ask."""
        return len(RELATIONS) // len(self.distances) if self.condition == "own" else self.episodes


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise InvalidInputError(name, value, allowed)
