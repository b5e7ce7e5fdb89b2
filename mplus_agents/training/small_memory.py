"""Memory in the small recipe: the paper's three stages, with the batch as the world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch

from mplus_agents.engine.prompts import Prompt
from mplus_agents.errors import ConfigError
from mplus_agents.language import Fact, relation
from mplus_agents.training.episodes import Chunk, EpisodeSource, Question, batch_prompts, find_tellers
from mplus_agents.training.network import TrainableMPlus
from mplus_agents.training.objectives import RetrieverLoss, answer_loss
from mplus_agents.training.small_context import NUM_TURNS
from mplus_agents.training.small_metrics import accuracy_by_kind, exact_answers, retriever_recall
from mplus_agents.training.small_stage import SmallStage
from mplus_agents.training.world import Histories, WorldMemory, draw_histories, draw_theta

_SHORTEST_CHUNK = 20  # tokens
_FULL_CHUNKS = 0.6  # share of the steps; the others have shorter ones
_FIRST_WRITES = 0.06  # share of the steps that write into an empty memory
_LEVELS = (1, 2, 4, 8)  # chunks in θ, while writing is learned
_NEXT_LEVEL_AT = 0.65
# How many times K0 is read. More than in use, so that no fact is ever further away than training had it: a long prompt
# adds to the distance, and the oldest facts are the first to suffer (docs/decisions/0002-curriculum.md). Of steps that
# are not hard, each reads K0.
K0_FACTORS = (1, 2, 2, 3, 4, 4)
MEMORY_TURNS = 2  # questions in a row that reads memory: the second one sees what was retrieved for the first
_SOON_AGAIN = 0.5  # of the facts told again after other chunks, how many within four chunks
_LONG_TERM = 0.86  # of the questions of the last stage, how many read Θ; the others read θ alone
_MEAN_AGE = 6.0  # of facts that are asked for while they are young


class MemoryTasks:
    """Losses of the steps that write and read; carries what passes from step to step.

    Args:
        network: The network.
        source: Where episodes come from.
        stage: The stage.
    """

    def __init__(self, network: TrainableMPlus, source: EpisodeSource, stage: SmallStage) -> None:
        self._network, self._source, self._stage = network, source, stage
        memory = network.config.memory
        if network.config.chunk_tokens < 1.5 * _SHORTEST_CHUNK:
            raise ConfigError(
                f"memory.chunk_tokens is {network.config.chunk_tokens}; "
                f"allowed for the small recipe: {int(1.5 * _SHORTEST_CHUNK)} or more"
            )
        least, written = max(K0_FACTORS) * memory.num_retrieved, stage.num_chunks * memory.tokens_per_injection
        if stage.kind == "long_term" and written < least:
            raise ConfigError(
                f"recipe.num_chunks is {stage.num_chunks}, which write {written} memory tokens in a step; "
                f"allowed are numbers that write {least}, which is {max(K0_FACTORS)} times K0, or more"
            )
        self._queue: list[tuple[list[Chunk], torch.Tensor]] = []  # chunks with their tokens [L, c * K, d]
        self._tail: torch.Tensor | None = None  # [L, c, K, d], last step's tokens
        self._level, self._smoothed = 0, 0.0
        self._end_id = int(cast(int, network.decoder.config.eos_token_id))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        return {
            "queue": [([_to_plain(chunk) for chunk in chunks], tokens) for chunks, tokens in self._queue],
            "tail": self._tail,
            "level": [self._level, self._smoothed],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another run was.

        Args:
            state: What `state_dict` returned.
        """
        device = self._network.bos_embedding.device
        per_chunk = self._network.config.memory.tokens_per_injection
        # A stage before may have written fewer tokens per chunk; those cannot lie beside the new ones.
        self._queue = [
            ([_from_plain(chunk) for chunk in chunks], tokens.to(device))
            for chunks, tokens in state["queue"]
            if tokens.shape[1] == len(chunks) * per_chunk
        ]
        tail = state["tail"]
        self._tail = tail.to(device) if tail is not None and tail.shape[2] == per_chunk else None
        self._level, self._smoothed = state["level"]

    def write_only(self) -> tuple[torch.Tensor, dict[str, float]]:
        """Answer from a chunk's own tokens among those of a few others, nothing dropped (paper 3.2.4, stage 1).

        Unlike the paper's, this stage trains the retriever, too: to find the chunk among all of the step.
        """
        stage, rng, memory = self._stage, self._source.rng, self._network.config.memory
        chunks, pool = self._write_world()
        tellers = find_tellers(chunks)
        told = [place for place, chunk in enumerate(chunks[: stage.num_chunks]) if chunk.facts]
        told = rng.sample(told, min(stage.num_questions, len(told)))
        asked = [self._source.draw_questions(chunks, place, tellers, NUM_TURNS) for place in told]
        allowed = torch.ones(len(told), len(chunks), dtype=torch.bool)
        for row, questions in enumerate(asked):  # whoever else tells what is asked about stays outside
            for question in questions:
                for chunk in tellers.get(question.key, ()):
                    allowed[row, chunk] = chunk == told[row]
        full = memory.max_short_term // memory.tokens_per_injection
        sizes = [size for size in _LEVELS if size < full] + [full]
        most = min(self._level, len(sizes) - 1)
        lengths = torch.tensor(sizes)[torch.randint(max(0, most - 2), most + 1, (len(told),))]
        ages = draw_histories(allowed, torch.tensor(told), (torch.rand(len(told)) * lengths).long(), lengths)
        device, per_chunk = pool[0].device, memory.tokens_per_injection
        batch = batch_prompts(self._source.codec, _rows(asked, ages.tolist()), self._end_id).to(device)
        positives = _tells([questions[0] for questions in asked], ages).repeat_interleave(per_chunk, dim=1).to(device)
        others = allowed.repeat_interleave(per_chunk, dim=1).to(device)
        retriever_loss = RetrieverLoss(positives, stage.objective, stage.detach_hidden, others=others)
        theta = draw_theta(ages, memory.num_layers, memory)
        histories = Histories(ages, torch.zeros(len(told), dtype=torch.bool))
        reading = WorldMemory(self._network, pool, histories, theta, batch.is_query, 0, retriever_loss)
        hidden = self._network.read(batch.input_ids, reading)
        logits = self._network.logits(hidden[batch.targets >= 0])
        loss = answer_loss(logits, batch.targets[batch.targets >= 0])
        exact = exact_answers(logits, batch).mean().item()
        self._smoothed += 0.1 * (exact - self._smoothed)
        if self._smoothed > _NEXT_LEVEL_AT and most < len(sizes) - 1:
            self._level, self._smoothed = self._level + 1, 0.0
        # what counts is the last level: `stop_when` must not see the easy ones
        name = "exact" if most == len(sizes) - 1 else f"exact_of_{sizes[most]}"
        found = retriever_loss.total()
        metrics = {name: exact, "answer": loss.item(), "retriever": found.item(), "level": float(self._level)}
        return loss + stage.retriever_weight * found, metrics

    def memory(self, is_long: bool, help_share: float) -> tuple[torch.Tensor, dict[str, float]]:
        """Answer from what dropping left in θ and, in the last stage, from Θ (paper 3.2.4, stages 2 and 3).

        Args:
            is_long: Whether there is much text in front of the questions.
            help_share: Share of questions that get what they need from Θ, however the retriever ranks it.
        """
        stage, rng, memory = self._stage, self._source.rng, self._network.config.memory
        chunks, pool = self._write_world()
        told = [place for place, chunk in enumerate(chunks[: stage.num_chunks]) if chunk.facts]
        num_rows = stage.num_questions // (3 if is_long else 1)
        tellers = find_tellers(chunks)
        most = 1 if is_long else MEMORY_TURNS
        asked = [self._source.draw_questions(chunks, rng.choice(told), tellers, most, is_long) for _ in range(num_rows)]
        histories = self._histories(asked, tellers, len(chunks))
        questions = [row[0] for row in asked]
        ages = histories.ages.tolist()
        holders = [_newest(question, past) for question, past in zip(questions, ages, strict=True)]
        batch = batch_prompts(self._source.codec, _rows(asked, ages), self._end_id).to(pool[0].device)
        theta = draw_theta(histories.ages, memory.num_layers, memory)
        holder = torch.tensor(holders)
        per_chunk = memory.tokens_per_injection
        positives = _tells(questions, histories.ages).repeat_interleave(per_chunk, dim=1)
        retriever_loss = RetrieverLoss(positives.to(pool[0].device), stage.objective, stage.detach_hidden)
        factor = rng.choice(K0_FACTORS) if rng.random() < self._source.hard else 1
        num_retrieved = factor * memory.num_retrieved if stage.kind == "long_term" else 0
        is_helped = torch.rand(len(asked)) < help_share
        reading = WorldMemory(
            self._network,
            pool,
            histories,
            theta,
            batch.is_query,
            num_retrieved,
            retriever_loss,
            positives & is_helped[:, None],
        )
        hidden = self._network.read(batch.input_ids, reading)
        logits = self._network.logits(hidden[batch.targets >= 0])
        loss = answer_loss(logits, batch.targets[batch.targets >= 0])
        exact = exact_answers(logits, batch)[_first_turns(asked)]
        metrics = accuracy_by_kind(exact, questions, holder, histories)
        metrics["answer"] = loss.item()
        metrics["retriever"] = retriever_loss.total().item()
        loss = loss + stage.retriever_weight * retriever_loss.total()
        if num_retrieved == memory.num_retrieved:
            retrieved = [tokens.cpu() for tokens in reading.retrieved]
            metrics |= retriever_recall(retrieved, theta, positives & ~is_helped[:, None], histories)
        return loss, metrics

    def _write_world(self) -> tuple[list[Chunk], list[torch.Tensor]]:
        """Write this step's chunks; return all chunks of the world and per layer its tokens [p, d]."""
        stage, rng = self._stage, self._source.rng
        num_tokens = self._network.config.chunk_tokens
        if stage.kind == "write" and self._level == 0:
            num_tokens = rng.randint(_SHORTEST_CHUNK, num_tokens * 2 // 3)  # what is short is learned first
        elif rng.random() > _FULL_CHUNKS:
            num_tokens = rng.randint(_SHORTEST_CHUNK, num_tokens)
        chunks: list[Chunk] = []
        while not any(chunk.facts for chunk in chunks):  # there has to be something to ask about
            chunks = self._source.draw_chunks(stage.num_chunks, num_tokens)
        tail = None
        if self._tail is not None and rng.random() >= _FIRST_WRITES:
            order = torch.randint(self._tail.shape[1], (stage.num_chunks,))
            tail = list(self._tail[:, order])
        ids = torch.tensor([chunk.ids for chunk in chunks], device=self._network.bos_embedding.device)
        new = self._write(ids, tail)
        pool = [rows.flatten(0, 1) for rows in new]
        world = list(chunks)
        for old, tokens in self._queue:
            world += old
            pool = [torch.cat([rows, tokens[layer]]) for layer, rows in enumerate(pool)]
        kept = torch.stack([rows.detach() for rows in new])
        self._tail = kept
        if stage.queue_steps:
            self._queue = [(chunks, kept.flatten(1, 2)), *self._queue][: stage.queue_steps]
        return world, pool

    def _write(self, ids: torch.Tensor, tail: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """Write every second chunk after the one before, as in use: a correction then sees what it corrects."""
        first = self._network.write(ids[::2], None if tail is None else [rows[::2] for rows in tail])
        order = torch.arange(len(ids))
        order = torch.cat([order[::2], order[1::2]]).argsort()
        second = self._network.write(ids[1::2], [rows[: len(ids) // 2].detach() for rows in first])
        return [torch.cat(rows)[order] for rows in zip(first, second, strict=True)]

    def _histories(self, asked: Sequence[Sequence[Question]], tellers: Any, num_chunks: int) -> Histories:
        stage, memory, num_rows = self._stage, self._network.config.memory, len(asked)
        allowed = torch.ones(num_rows, num_chunks, dtype=torch.bool)
        for row, questions in enumerate(asked):
            for question in questions:
                for chunk in tellers.get(question.key, ()):
                    allowed[row, chunk] &= chunk in question.answers
        firsts = [questions[0] for questions in asked]
        targets = torch.tensor([question.chunk if question.answers else -1 for question in firsts])
        full = memory.max_short_term // memory.tokens_per_injection
        has_long_term = torch.zeros(num_rows, dtype=torch.bool)
        near = (
            torch.rand(num_rows).log() / torch.log(torch.tensor(1 - 1 / _MEAN_AGE))
        ).long()  # geometric, mean about 6
        most = allowed.sum(dim=1)
        few = torch.randint(1, 2 * full, (num_rows,))
        some = torch.randint(1, 129, (num_rows,))
        draw = torch.rand(num_rows)
        lengths = torch.where(draw < 0.1, few, torch.where(draw < 0.25, some, torch.full_like(some, 10**6)))
        lengths = torch.minimum(lengths, most)
        ages = torch.minimum(near, torch.full_like(near, 10 if stage.kind == "theta" else 40))
        if stage.kind == "long_term":
            far = (torch.rand(num_rows) * lengths).long()
            has_long_term = torch.rand(num_rows) < _LONG_TERM
            ages = torch.where(has_long_term & (torch.rand(num_rows) < 0.7), far, ages)
            ages = torch.where(has_long_term, ages, ages.clamp(max=10))
        lengths = torch.minimum(lengths, most)
        ages = torch.minimum(ages, lengths - 1)
        drawn = draw_histories(allowed, targets, ages, lengths)
        for row, questions in enumerate(asked):
            for question in questions:
                for other in question.answers.keys() - {question.chunk}:
                    self._place_other(drawn[row], question.chunk, other)
        return Histories(drawn, has_long_term)

    def _place_other(self, ages: torch.Tensor, chunk: int, other: int) -> None:
        """Put another telling of a fact in its place: right before or after, if one was written after the other.

        Of the others, half stand close. If there is no such place, it stays outside.
        """
        rng, later = self._source.rng, max(chunk, other)
        if ages[chunk] < 0:
            return
        if later % self._stage.num_chunks % 2:
            if not move_beside(ages, chunk, other, 1 if chunk == later else -1):
                ages[other] = -1
        elif rng.random() < _SOON_AGAIN:
            move_beside(ages, chunk, other, rng.choice((-4, -3, -2, 2, 3, 4)))


def move_beside(ages: torch.Tensor, chunk: int, other: int, offset: int) -> bool:
    """Let another chunk change places with the one that is so much older than a chunk; return whether there is one.

    Args:
        ages: [c] int64, −1 for a chunk outside this past; changed in place.
        chunk: The chunk.
        other: The other one.
        offset: Age of that place, less the chunk's age; not 0.
    """
    wanted = int(ages[chunk]) + offset
    there = (ages == wanted).nonzero()
    if wanted < 0 or not len(there):
        return False
    ages[there[0, 0]], ages[other] = int(ages[other]), wanted
    return True


def _tells(questions: Sequence[Question], ages: torch.Tensor) -> torch.Tensor:
    """[r, c] bool, which chunks of a past tell what is asked about, with whatever value."""
    tells = torch.zeros_like(ages, dtype=torch.bool)
    for row, question in enumerate(questions):
        tells[row, list(question.answers)] = True
    return tells & (ages >= 0)


def _to_plain(chunk: Chunk) -> list[Any]:
    return [chunk.ids, [[fact.person, fact.relation.name, fact.value] for fact in chunk.facts]]


def _from_plain(values: Sequence[Any]) -> Chunk:
    ids, facts = values
    return Chunk(ids, [Fact(person, relation(name), value) for person, name, value in facts])


def _rows(asked: Sequence[Sequence[Question]], ages: Sequence[Sequence[int]]) -> list[list[tuple[Prompt, str]]]:
    """Give every question the answer that holds in its past; the first one of a row alone queries Θ."""
    rows = []
    for questions, past in zip(asked, ages, strict=True):
        row: list[tuple[Prompt, str]] = []
        for question in questions:
            holder = _newest(question, past)
            answer = question.reply or (question.answers[holder] if holder >= 0 else question.unknown)
            ids = question.prompt.ids
            row.append((Prompt(ids, [False] * len(ids), ()) if row else question.prompt, answer))
        rows.append(row)
    return rows


def _first_turns(asked: Sequence[Sequence[Question]]) -> list[int]:
    """Return the place of each row's first question among all."""
    return [0, *accumulate(len(questions) for questions in asked)][:-1]


def _newest(question: Question, ages: Sequence[int]) -> int:
    """Return the chunk whose answer holds; −1 if nobody told it."""
    told = [(ages[chunk], chunk) for chunk in question.answers if ages[chunk] >= 0]
    return min(told)[1] if told else -1
