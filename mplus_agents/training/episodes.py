"""Batches for the small recipe: chunks that tell facts between prose, and questions about them, fresh at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import torch

from mplus_agents.engine.prompts import Prompt, chat_prompt, question_prompt
from mplus_agents.engine.records import Message
from mplus_agents.engine.text import TextCodec
from mplus_agents.language import RELATIONS, USER, Fact, draw_facts, draw_name, relation
from mplus_agents.language.prose import packaged_prose as packaged_prose

ACKNOWLEDGEMENT = "I see."
_REPLIES = (ACKNOWLEDGEMENT, "Good to know.", "I will remember that.", "Thank you for telling me.", "All right.")
_PREAMBLES = (
    "You are talking with a person. Answer from what you remember.",
    "This is a talk between a human and an assistant who remembers what it was told.",
    "You are a helpful assistant. Be brief. If you do not know, say so.",
)
_LABELS = (("Human", "AI"), ("User", "Assistant"), ("Question", "Answer"), ("Person", "Helper"))

_PROSE_CHUNKS = 0.35  # shares; found by trying, they are not critical
_DIALOGUES = 0.35
_OWN_FACTS = 0.4  # of dialogues
_OWN_IN_TEXT = 0.15  # of other chunks
_SAME_TURN = 0.25  # of the facts in a dialogue that follow another one
_DENSE = 0.3
# What ends a chunk has the fewest memory tokens after it, and a text that is remembered by itself ends its chunk: such
# facts are told and asked for more often (docs/decisions/0002-curriculum.md), once the others are learned.
_PROSE_IN_FRONT, _PROSE_BEHIND = 0.5, 0.2  # else between
_EASY_IN_FRONT, _EASY_BEHIND = 0.2, 0.4
_LAST_ASKED = 0.25  # besides those that are drawn anyway
_REPLIED = 0.7  # of the conversations that wait in the window
_UPDATES = 0.12
_UNKNOWN = 0.05
# What is hardest is told more often: a value before its person, and numbers, which are four random tokens.
_VALUE_FIRST = 0.3  # besides those that are drawn anyway
_TOLD = (*RELATIONS, relation("number"), relation("number"))
_TOLD_IN_WINDOW = 6.0  # times `chat_share`, of the prompts with text in front; memory holds another value then
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk and the facts it tells in full.

    Attributes:
        ids: Its tokens.
        facts: What can be asked of it.
    """

    ids: list[int]
    facts: list[Fact]


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its answer.

    Attributes:
        chunk: The chunk asked about.
        key: What is asked about.
        answers: Answer by the chunk that holds it (several if the fact was told again with another value); empty if
            nobody told it.
        prompt: The prompt.
        unknown: The answer if nobody told it.
        reply: The answer, if the prompt itself holds it, whatever the chunks say; None otherwise.
    """

    chunk: int
    key: Key
    answers: dict[int, str]
    prompt: Prompt
    unknown: str
    reply: str | None = None


@dataclass(slots=True)
class EpisodeSource:
    """Draws chunks and questions; its state is that of its random generator.

    Attributes:
        codec: The tokenizer.
        prose: Tokens of real prose.
        starts: Places in `prose` where a word starts.
        rng: Where randomness comes from.
        common: Share of common names and values; the others are made up.
        chat_share: Share of turns that need no memory: a fact told, which is acknowledged, or a question whose answer
            stands in the text in front of it.
        hard: Share of chunks that are hard to keep.
    """

    codec: TextCodec
    prose: list[int]
    starts: list[int]
    rng: Random = field(default_factory=Random)
    common: float = 0.25
    chat_share: float = 0.0
    hard: float = 1.0

    @classmethod
    def load(cls, codec: TextCodec, texts: Sequence[str], seed: int) -> EpisodeSource:
        """Tokenize the prose.

        Args:
            codec: The tokenizer.
            texts: Real prose.
            seed: Seed of all draws.
        """
        prose = [token for text in texts for token in codec.encode(text)]
        tokens = codec.tokenizer.convert_ids_to_tokens(prose)
        starts = [place for place, token in enumerate(tokens) if token.startswith("Ġ")]
        return cls(codec, prose, starts, Random(seed))

    def draw_prose(self, num_tokens: int) -> list[int]:
        """Cut out so many tokens, from the start of a word."""
        while True:
            start = self.rng.choice(self.starts)
            if start + num_tokens <= len(self.prose):
                return self.prose[start : start + num_tokens]

    def draw_chunks(self, num_chunks: int, num_tokens: int) -> list[Chunk]:
        """Draw chunks of equal length; some repeat a fact of the one before with another value.

        Args:
            num_chunks: How many.
            num_tokens: Length of each.
        """
        chunks: list[Chunk] = []
        for _ in range(num_chunks):
            again = None
            if chunks and chunks[-1].facts and self.rng.random() < _UPDATES:
                old = self.rng.choice(chunks[-1].facts)
                new = Fact(old.person, old.relation, old.relation.draw_value(self.rng, "training", self.common))
                again = new if new.value != old.value else None
            chunks.append(self._draw_chunk(num_tokens, again))
        return chunks

    def _draw_chunk(self, num_tokens: int, again: Fact | None) -> Chunk:
        rng = self.rng
        if again is None and rng.random() < _PROSE_CHUNKS:
            return Chunk(self.draw_prose(num_tokens), [])
        is_hard = rng.random() < self.hard
        is_dialogue = rng.random() < _DIALOGUES or (again is not None and again.is_own)
        own = rng.random() < (_OWN_FACTS if is_dialogue else _OWN_IN_TEXT)
        num_facts = rng.randint(1, 5) if rng.random() > _DENSE else 8
        facts = draw_facts(rng, num_facts, "training", _TOLD if is_hard else RELATIONS, own=own, common=self.common)
        if again is not None:
            facts = [again, *(fact for fact in facts if fact.key != again.key)][:4]
            rng.shuffle(facts)  # that it stands first must not tell a correction
        pieces, told = self._write(facts, num_tokens, is_dialogue, is_hard)
        return Chunk(self._fill_up(pieces, num_tokens, is_hard), told)

    def _write(
        self, facts: Sequence[Fact], num_tokens: int, is_dialogue: bool, is_hard: bool
    ) -> tuple[list[list[int]], list[Fact]]:
        rng = self.rng
        pieces: list[list[int]] = []
        told: list[Fact] = []
        gap = rng.choice(("", "", "\n"))
        first = _VALUE_FIRST if is_hard else 0.0
        for turn in self._turns_of(facts) if is_dialogue else [[fact] for fact in facts]:
            text = " ".join(fact.state(rng, value_first=rng.random() < first) for fact in turn)
            if is_dialogue:
                reply = f"Assistant: {rng.choice(_REPLIES)}\n" if rng.random() < 0.5 else ""
                text = f"User: {text}\n{reply}"
            else:
                text += gap
            ids = self.codec.encode(text)
            if sum(len(piece) for piece in pieces) + len(ids) <= num_tokens:
                pieces.append(ids)
                told += turn
        return pieces, told

    def _turns_of(self, facts: Sequence[Fact]) -> list[list[Fact]]:
        turns: list[list[Fact]] = []
        for fact in facts:
            if turns and self.rng.random() < _SAME_TURN:
                turns[-1].append(fact)
            else:
                turns.append([fact])
        return turns

    def _fill_up(self, pieces: list[list[int]], num_tokens: int, is_hard: bool) -> list[int]:
        """Put prose before, after or between the pieces until the chunk is full."""
        left = num_tokens - sum(len(piece) for piece in pieces)
        cuts = [0] * (len(pieces) + 1)
        in_front, behind = (_PROSE_IN_FRONT, _PROSE_BEHIND) if is_hard else (_EASY_IN_FRONT, _EASY_BEHIND)
        way = self.rng.random()
        if way < in_front:
            cuts[0] = left
        elif way < in_front + behind:
            cuts[-1] = left
        else:
            borders = sorted(self.rng.randint(0, left) for _ in pieces)
            cuts = [end - start for start, end in zip([0, *borders], [*borders, left], strict=True)]
        ids: list[int] = []
        for cut, piece in zip(cuts, [*pieces, []], strict=True):
            ids += self.draw_prose(cut) if cut else []
            ids += piece
        return ids

    def draw_questions(
        self,
        chunks: Sequence[Chunk],
        chunk_idx: int,
        tellers: Mapping[Key, Mapping[int, Fact]],
        num_questions: int,
        long: bool = False,
    ) -> list[Question]:
        """Ask about different facts of a chunk, as many as it tells at most.

        Args:
            chunks: All chunks of the world.
            chunk_idx: The chunk to ask about; it tells at least one fact.
            tellers: For everything told in the world, which chunks tell it.
            num_questions: Most questions.
            long: Whether there is much text in front of each.
        """
        facts = chunks[chunk_idx].facts
        asked = self.rng.sample(facts, min(num_questions, len(facts)))
        if self.rng.random() < _LAST_ASKED * self.hard:
            asked = [facts[-1], *(fact for fact in asked if fact is not facts[-1])][: len(asked)]
        return [self._ask(fact, chunks, chunk_idx, tellers, long) for fact in asked]

    def _ask(
        self,
        fact: Fact,
        chunks: Sequence[Chunk],
        chunk_idx: int,
        tellers: Mapping[Key, Mapping[int, Fact]],
        long: bool,
    ) -> Question:
        rng = self.rng
        if self.chat_share and rng.random() < self.chat_share:
            told = draw_facts(rng, 1, "training", own=rng.random() < 0.5, common=self.common)[0]
            prompt = self._prompt(told.state(rng), long, told.key)
            return Question(chunk_idx, told.key, {}, prompt, told.unknown_answer(), ACKNOWLEDGEMENT)
        near = {chunk_idx, chunk_idx - 1, chunk_idx + 1}  # where an update may be
        answers = {place: other.answer() for place, other in tellers[fact.key].items() if place in near}
        if self.chat_share and long and rng.random() < _TOLD_IN_WINDOW * self.chat_share:
            told = Fact(fact.person, fact.relation, fact.relation.draw_value(rng, "training", self.common))
            prompt = self._prompt_after(told.ask(rng), self._turns(told.key, told), is_needed=True)
            return Question(chunk_idx, told.key, answers, prompt, told.unknown_answer(), told.answer())
        if rng.random() < _UNKNOWN:
            person = draw_name(rng, "training", common=0.0) if rng.random() < 0.3 else fact.person
            told_here = {fact.key for fact in chunks[chunk_idx].facts}
            # Who speaks has told everything somewhere; `_histories` keeps those chunks out.
            elsewhere = tellers if person != USER else told_here
            kinds = [kind for kind in RELATIONS if (person, kind.name) not in {*elsewhere, *told_here}]
            if kinds:
                asked = Fact(person, rng.choice(kinds), "")
                prompt = self._prompt(asked.ask(rng), long, asked.key)
                return Question(chunk_idx, asked.key, {}, prompt, asked.unknown_answer())
        prompt = self._prompt(fact.ask(rng), long, fact.key)
        return Question(chunk_idx, fact.key, answers, prompt, fact.unknown_answer())

    def _prompt(self, question: str, long: bool, key: Key) -> Prompt:
        rng = self.rng
        if not long:
            if rng.random() < 0.7:
                return question_prompt(self.codec, "", question)
            return chat_prompt(self.codec, [Message("user", question)])
        return self._prompt_after(question, self._window(key))

    def _prompt_after(self, question: str, window: str, is_needed: bool = False) -> Prompt:
        """Ask with a window in front, or in a framework's template, which holds the window or (not if needed) none."""
        rng = self.rng
        way = rng.random()
        if way < 0.35:
            return question_prompt(self.codec, window, question)
        if way < 0.55:
            return chat_prompt(self.codec, [Message("user", question)], lead=window)
        human, helper = rng.choice(_LABELS)
        lead = rng.choice(_PREAMBLES) if rng.random() < 0.5 else self._prose_text(rng.randint(10, 70))
        head = rng.choice(("Current conversation:\n", "Conversation so far:\n", ""))
        history = window.rstrip() if rng.random() < 0.4 or is_needed else ""
        text = f"{lead}\n\n{head}{history}\n{human}: {question}\n{helper}:"
        return chat_prompt(self.codec, [Message("user", text)])

    def _window(self, key: Key) -> str:
        """Turns or text that wait in the window and do not hold the answer."""
        if self.rng.random() < 0.4:
            return self._prose_text(self.rng.randint(5, 60))
        return self._turns(key, None)

    def _turns(self, key: Key, told: Fact | None) -> str:
        """Facts in a row or as turns; of `key` nothing but what is `told`."""
        rng = self.rng
        facts = [
            fact
            for fact in draw_facts(rng, rng.randint(1, 4), "training", own=rng.random() < 0.3, common=self.common)
            if fact.key != key
        ]
        if told is not None:
            facts.insert(rng.randint(0, len(facts)), told)
        if rng.random() < 0.5:
            return " ".join(fact.state(rng) for fact in facts)
        human, helper = rng.choice((("User", "Assistant"), ("Human", "AI")))
        has_replies = rng.random() < _REPLIED
        lines = []
        for turn in self._turns_of(facts):
            lines.append(f"{human}: {' '.join(fact.state(rng) for fact in turn)}\n")
            lines += [f"{helper}: {rng.choice(_REPLIES)}\n"] * has_replies
        return "".join(lines)

    def _prose_text(self, num_tokens: int) -> str:
        return self.codec.decode(self.draw_prose(num_tokens)).strip()


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts with their answers, filled up at the end.

    Attributes:
        input_ids: [r, n] int64.
        is_query: [r, n] bool, the tokens that query Θ.
        targets: [r, n] int64, the next token where it counts, −100 elsewhere.
        turns: [r, n] int64, which question of its row a target belongs to.
    """

    input_ids: torch.Tensor
    is_query: torch.Tensor
    targets: torch.Tensor
    turns: torch.Tensor

    def to(self, device: torch.device) -> PromptBatch:
        """Move to a device."""
        return PromptBatch(*(tensor.to(device) for tensor in (self.input_ids, self.is_query, self.targets, self.turns)))


def batch_prompts(codec: TextCodec, rows: Sequence[Sequence[tuple[Prompt, str]]], end_id: int) -> PromptBatch:
    """Lay out prompts with their answers, one or several to a row.

    Args:
        codec: The tokenizer.
        rows: Per row, prompts and their answers.
        end_id: The token that ends an answer.
    """
    ids: list[list[int]] = [[] for _ in rows]
    masks: list[list[bool]] = [[] for _ in rows]
    owners: list[list[int]] = [[] for _ in rows]
    for row, turns in enumerate(rows):
        for number, (prompt, answer) in enumerate(turns):
            tail = [*codec.encode(answer), end_id]
            ids[row] += [*prompt.ids, *tail]
            masks[row] += [*prompt.is_query, *[False] * len(tail)]
            owners[row] += [*[-1] * len(prompt.ids), *[number] * len(tail)]
    width = max(map(len, ids)) - 1
    input_ids = torch.full((len(rows), width), end_id)
    targets, turns_of = torch.full_like(input_ids, -100), torch.full_like(input_ids, -1)
    is_query = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, tokens in enumerate(ids):
        size = len(tokens) - 1
        owner = torch.tensor(owners[row][1:])
        input_ids[row, :size] = torch.tensor(tokens[:-1])
        targets[row, :size] = torch.where(owner >= 0, torch.tensor(tokens[1:]), -100)
        turns_of[row, :size] = owner
        is_query[row, :size] = torch.tensor(masks[row][:-1])
    return PromptBatch(input_ids, is_query, targets, turns_of)


def find_tellers(chunks: Sequence[Chunk]) -> dict[Key, dict[int, Fact]]:
    """Return, for everything that is told, the chunks that tell it."""
    tellers: dict[Key, dict[int, Fact]] = {}
    for place, chunk in enumerate(chunks):
        for fact in chunk.facts:
            tellers.setdefault(fact.key, {})[place] = fact
    return tellers
