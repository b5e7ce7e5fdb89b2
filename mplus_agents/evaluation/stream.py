"""The plan of one stream: which facts are told when, how much prose lies between, and what is asked.

A stream is a sequence of rounds. The first one has all far distances: facts are told during the round so that at its
end every distance is there, and all is asked. Then every near distance has a round of its own, so that nothing lies
between its facts and the questions but the chunks of prose that are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from mplus_agents.engine import Message
from mplus_agents.engine.prompts import write_turn
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import InvalidInputError
from mplus_agents.language import NOT_KNOWN, RELATIONS, USER, Fact, draw_facts, draw_name

Condition = Literal["plain", "own", "updated", "unknown", "value_first"]
CONDITIONS: tuple[str, ...] = get_args(Condition)
# A person is told about in company, so that names have to be read.
_MIN_FACTS = 4
_MAX_DRAWS = 10_000
NEAR_CHUNKS = 16  # chunks; up to here a distance has a round of its own
_REPLIES = ("I see.", "Good to know.", "Thank you for telling me.", "All right.")


@dataclass(frozen=True, slots=True)
class Prose:
    """Real prose, cut into chunks as the engine cuts it.

    Attributes:
        chunks: The texts of the chunks, one after another without a gap.
        num_tokens: Their tokens.
    """

    chunks: tuple[str, ...]
    num_tokens: tuple[int, ...]

    @classmethod
    def cut(cls, codec: TextCodec, text: str, chunk_tokens: int) -> Prose:
        """Cut a text; a rest that fills no chunk is left out.

        Args:
            codec: The tokenizer.
            text: The text.
            chunk_tokens: Tokens of a full injection.

        Raises:
            InvalidInputError: The text fills no chunk.
        """
        chunks, sizes, start = [], [], 0
        while start < len(text):
            piece, ids = codec.next_piece(text, start, chunk_tokens)
            start += len(piece)
            if start < len(text):
                chunks.append(piece)
                sizes.append(len(ids))
        if not chunks:
            raise InvalidInputError("prose", f"a text of {len(text):,} characters", f"more than {chunk_tokens} tokens")
        return cls(tuple(chunks), tuple(sizes))

    def documents(self, first: int, num_chunks: int) -> list[str]:
        """Return so many chunks from a place on, as texts that the engine cuts into exactly these chunks.

        Behind the last chunk comes the first one again, in a text of its own: what is cut depends on what follows.

        Args:
            first: The first chunk, counted on round after round.
            num_chunks: How many chunks.
        """
        texts, place, end = [], first, first + num_chunks
        while place < end:
            start = place % len(self.chunks)
            count = min(end - place, len(self.chunks) - start)
            texts.append("".join(self.chunks[start : start + count]))
            place += count
        return texts


@dataclass(frozen=True, slots=True)
class Telling:
    """Statements that become one injection of their own.

    Attributes:
        statements: One sentence per fact.
        is_dialogue: Whether they are told as the user's turns; otherwise as one text.
    """

    statements: tuple[str, ...]
    is_dialogue: bool = False

    @property
    def text(self) -> str:
        """The text as it is injected."""
        if not self.is_dialogue:
            return " ".join(self.statements)
        return "".join(write_turn("user", statement) for statement in self.statements)

    def memories(self) -> str | list[Message]:
        """Return what an agent is given to remember."""
        return [Message("user", statement) for statement in self.statements] if self.is_dialogue else self.text


@dataclass(frozen=True, slots=True)
class Step:
    """Injections of facts, and how many chunks of prose follow them at once.

    Attributes:
        remaining: Chunks of prose from here to the end of the round.
        tellings: One injection each.
        distances: For each telling, the distance of the questions about it; less than `remaining` if it tells what is
            told again later with other values.
    """

    remaining: int
    tellings: tuple[Telling, ...]
    distances: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """One episode.

    Attributes:
        distance: Chunks of prose since the fact was told.
        text: The question.
        answer: The right answer.
        value: The value in it.
        old_answer: The right answer before the fact was told again; None if it was told once.
    """

    distance: int
    text: str
    answer: str
    value: str
    old_answer: str | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """Facts, prose, and the questions at its end.

    Attributes:
        steps: In order; the first one stands at the beginning.
        questions: Asked when all is told and read.
        window: Turns that wait in the window when the questions are asked; they answer none of them.
    """

    steps: tuple[Step, ...]
    questions: tuple[Question, ...]
    window: tuple[Message, ...] = ()

    @property
    def num_prose_chunks(self) -> int:
        """Chunks of prose in the round."""
        return max(step.remaining for step in self.steps)

    @property
    def history(self) -> str:
        """The waiting turns as LangChain's memory classes write them."""
        return "\n".join(f"{'Human' if turn.role == 'user' else 'AI'}: {turn.content}" for turn in self.window)

    def prose_after(self) -> Iterator[tuple[Step, int]]:
        """Go through the steps, each with the chunks of prose between it and the next one or the end."""
        ends = [step.remaining for step in self.steps[1:]] + [0]
        for step, end in zip(self.steps, ends, strict=True):
            yield step, step.remaining - end


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """How much text an injection takes.

    Attributes:
        codec: The tokenizer.
        chunk_tokens: Most tokens.
        min_tokens: Fewest tokens.
    """

    codec: TextCodec
    chunk_tokens: int
    min_tokens: int

    def count(self, statements: Sequence[str], is_dialogue: bool) -> int:
        """Count the tokens of statements that are injected together."""
        telling = Telling(tuple(statements), is_dialogue)
        if not is_dialogue:
            return len(self.codec.encode(telling.text))
        return sum(len(self.codec.encode(write_turn("user", statement))) for statement in statements)


def plan_stream(
    rng: Random,
    sizes: ChunkSizes,
    asked: dict[int, int],
    condition: Condition = "plain",
    gap: int = 1,
    window_tokens: int = 0,
) -> list[Round]:
    """Plan a stream.

    Args:
        rng: Where randomness comes from.
        sizes: How much text an injection takes.
        asked: Questions by distance.
        condition: What is told and asked.
        gap: Chunks of prose between the two tellings of a fact, if it is told twice.
        window_tokens: Most tokens of the turns that wait in the window when a round's questions are asked.

    Returns:
        The rounds, one after another.
    """
    return _Planner(rng, sizes, condition, gap).plan(asked, window_tokens)


def split_rounds(distances: Iterable[int]) -> list[list[int]]:
    """Return which distances share a round, in the order of the rounds.

    Args:
        distances: All distances.
    """
    ordered = sorted(distances, reverse=True)
    far = [distance for distance in ordered if distance > NEAR_CHUNKS]
    return ([far] if far else []) + [[distance] for distance in ordered if distance <= NEAR_CHUNKS]


def _in_order(steps: Mapping[int, Sequence[tuple[Telling, int]]]) -> tuple[Step, ...]:
    ordered = []
    for remaining in sorted(steps, reverse=True):
        tellings, distances = zip(*steps[remaining], strict=True)
        ordered.append(Step(remaining, tellings, distances))
    return tuple(ordered)


class _Planner:
    def __init__(self, rng: Random, sizes: ChunkSizes, condition: Condition, gap: int) -> None:
        self._rng = rng
        self._sizes = sizes
        self._condition = condition
        self._gap = gap
        self._used: set[tuple[str, str]] = set()

    def plan(self, asked: dict[int, int], window_tokens: int) -> list[Round]:
        """Draw the facts, lay out their tellings, and choose what is asked."""
        groups = {distance: self._draw_group(number) for distance, number in asked.items()}
        rounds = []
        for distances in split_rounds(asked):
            steps: dict[int, list[tuple[Telling, int]]] = {}
            questions: list[Question] = []
            for distance in distances:
                facts, old = groups[distance], dict[tuple[str, str], Fact]()
                if self._condition == "updated":
                    old = {fact.key: self._with_other_value(fact) for fact in facts}
                    told = [(telling, distance) for telling in self._tell(list(old.values()))]
                    steps.setdefault(distance + self._gap, []).extend(told)
                steps.setdefault(distance, []).extend((telling, distance) for telling in self._tell(facts))
                questions += self._ask(distance, facts[: asked[distance]], old)
            rounds.append((_in_order(steps), tuple(questions)))
        return [Round(steps, questions, self._fill_window(window_tokens)) for steps, questions in rounds]

    def _draw_group(self, num_asked: int) -> list[Fact]:
        """Draw the facts told together; the first ones are asked about."""
        if self._condition != "own":
            return self._draw_new(max(num_asked, _MIN_FACTS))
        kinds = [kind for kind in RELATIONS if (USER, kind.name) not in self._used]
        own = [
            Fact(USER, kind, kind.draw_value(self._rng, "evaluation")) for kind in self._rng.sample(kinds, num_asked)
        ]
        self._used.update(fact.key for fact in own)
        return [*own, *self._draw_new(max(0, _MIN_FACTS - num_asked))]

    def _draw_new(self, num_facts: int) -> list[Fact]:
        """Draw facts about what the stream has not told yet."""
        facts: list[Fact] = []
        for _ in range(_MAX_DRAWS):
            if len(facts) >= num_facts:
                return facts
            # A few at a time, as people share relations only within one draw.
            for fact in draw_facts(self._rng, min(num_facts - len(facts), 5), "evaluation"):
                if fact.key not in self._used:
                    self._used.add(fact.key)
                    facts.append(fact)
        raise AssertionError("there are not enough people and relations")

    def _with_other_value(self, fact: Fact) -> Fact:
        while True:
            value = fact.relation.draw_value(self._rng, "evaluation")
            if value != fact.value:
                return Fact(fact.person, fact.relation, value)

    def _state(self, fact: Fact) -> str:
        return fact.state(self._rng, value_first=self._condition == "value_first")

    def _tell(self, facts: Sequence[Fact]) -> list[Telling]:
        """Put statements into as few injections as take them, none of which is under the minimum."""
        is_dialogue = self._condition == "own"
        statements = [self._state(fact) for fact in self._rng.sample(list(facts), len(facts))]
        groups: list[list[str]] = [[]]
        for statement in statements:
            if groups[-1] and self._sizes.count([*groups[-1], statement], is_dialogue) > self._sizes.chunk_tokens:
                groups.append([])
            groups[-1].append(statement)
        while self._sizes.count(groups[-1], is_dialogue) < self._sizes.min_tokens:
            groups[-1].append(self._state(self._draw_new(1)[0]))
        return [Telling(tuple(group), is_dialogue) for group in groups]

    def _ask(self, distance: int, facts: Sequence[Fact], old: dict[tuple[str, str], Fact]) -> Iterator[Question]:
        for place, fact in enumerate(facts):
            if self._condition == "unknown":
                never_told = self._never_told(fact, place)
                yield Question(distance, never_told.ask(self._rng), never_told.unknown_answer(), NOT_KNOWN)
                continue
            before = old[fact.key].answer() if fact.key in old else None
            yield Question(distance, fact.ask(self._rng), fact.answer(), fact.value, before)

    def _never_told(self, fact: Fact, place: int) -> Fact:
        """Every other question is about a person of whom something else was told, the rest about a stranger."""
        known = {person for person, _ in self._used}
        person = fact.person
        while place % 2 and person in known:
            person = draw_name(self._rng, "evaluation")
        kinds = [kind for kind in RELATIONS if (person, kind.name) not in self._used]
        fact = Fact(person, self._rng.choice(kinds), "")
        self._used.add(fact.key)  # nor will it be told later
        return fact

    def _fill_window(self, max_tokens: int) -> tuple[Message, ...]:
        """Draw turns about other people, as many as fit."""
        turns: list[Message] = []
        left = max_tokens
        while max_tokens:
            pair = [
                Message("user", self._draw_new(1)[0].state(self._rng)),
                Message("assistant", self._rng.choice(_REPLIES)),
            ]
            left -= sum(len(self._sizes.codec.encode(write_turn(turn.role, turn.content))) for turn in pair)
            if left < 0:
                break
            turns += pair
        return tuple(turns)
