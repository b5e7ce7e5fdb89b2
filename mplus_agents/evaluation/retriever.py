"""The retriever's recall: how many of a fact's tokens are among the K0 read, of so many in Θ (paper, Figure 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from mplus_agents.engine.prompts import question_prompt
from mplus_agents.engine.text import check_text
from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation.engines import LoadedModel, load, versions
from mplus_agents.evaluation.report import RetrieverPoint, RetrieverResult
from mplus_agents.evaluation.settings import RetentionSettings
from mplus_agents.evaluation.stream import ChunkSizes, Question, Telling, plan_stream
from mplus_agents.memory import MemoryState

DEFAULT_SIZES = (1_000, 10_000, 100_000)
_FACTS_SHARE = 10  # of so many injections, one tells facts


@dataclass(frozen=True, slots=True)
class RetrieverSettings:
    """What is run.

    Attributes:
        model: A folder, a hub id, or `mplus-tiny`.
        seed: Seed of everything random.
        questions: Questions per size.
        sizes: Tokens in Θ, per layer.
        num_retrieved: K0; as the model was made if None.
        prose: A text file to fill Θ from; None: the novel in the package, which training never saw.
        device: Where to load the model; the first CUDA device if there is one, else the CPU.
    """

    model: str = "mplus-tiny"
    seed: int = 0
    questions: int = 200
    sizes: tuple[int, ...] = DEFAULT_SIZES
    num_retrieved: int | None = None
    prose: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("questions", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InvalidInputError(name, value, f"a whole number from {least}")
        is_list = bool(self.sizes) and all(type(size) is int and size > 0 for size in self.sizes)
        if not is_list or len(set(self.sizes)) < len(self.sizes):
            raise InvalidInputError("sizes", self.sizes, "different whole numbers from 1, at least one")


@dataclass(slots=True)
class _Found:
    """Sums over questions, [L] each."""

    recall: np.ndarray
    found: np.ndarray
    random: float = 0.0
    questions: int = 0


@dataclass(frozen=True, slots=True)
class _Life:
    """How a memory comes to hold as much as wanted.

    Attributes:
        num_injections: Injections in all.
        num_places: Injections, from the first, at which facts may be told; what is told later is mostly in θ still.
        num_facts: Injections that tell facts.
    """

    num_injections: int
    num_places: int
    num_facts: int

    @classmethod
    def of(cls, loaded: LoadedModel, size: int, questions: int) -> _Life:
        """Plan a memory for so many tokens in Θ."""
        memory = loaded.model.config.memory
        num_injections = -(-(memory.max_short_term + size) // memory.tokens_per_injection)
        in_theta = min(2 * memory.max_short_term // memory.tokens_per_injection, num_injections // 2)
        num_places = num_injections - in_theta
        return cls(num_injections, num_places, min(questions, max(1, num_places // _FACTS_SHARE)))


def run_retriever(
    settings: RetrieverSettings, on_progress: Callable[[int, int], None] | None = None
) -> RetrieverResult:
    """Run the experiment: fill Θ with prose and facts by real writes, one after another, and ask for the facts.

    Args:
        settings: What is run.
        on_progress: Called with the injections done since the last call, and those to do in all.

    Returns:
        The numbers; with equal settings, device and versions they are the same.

    Raises:
        InvalidInputError: The model has no Θ, or a size exceeds its capacity.
    """
    loaded = load(settings.model, settings.device, settings.num_retrieved)
    memory = loaded.model.config.memory
    if not memory.has_long_term:
        raise InvalidInputError("model", settings.model, "a model with a long-term memory Θ")
    if memory.rule == "paper" and max(settings.sizes) > memory.max_long_term:
        raise InvalidInputError("sizes", max(settings.sizes), f"at most what Θ holds, {memory.max_long_term}")
    lives = {size: _Life.of(loaded, size, settings.questions) for size in sorted(settings.sizes)}
    counts = {size: -(-settings.questions // life.num_facts) for size, life in lives.items()}
    total = sum(counts[size] * life.num_injections for size, life in lives.items())
    prose = loaded.codec.encode(check_text("prose", RetentionSettings(prose=settings.prose).read_prose()))
    points: list[RetrieverPoint] = []
    for size, life in lives.items():
        found = _Found(np.zeros(memory.num_layers), np.zeros(memory.num_layers))
        for number in range(counts[size]):
            rng = Random(f"{settings.seed}/{size}/{number}")
            num_facts = min(life.num_facts, settings.questions - number * life.num_facts)
            told = _plan_facts(loaded, rng, life, num_facts)
            filled = _fill(loaded, rng, life, told, prose, lambda: on_progress(1, total) if on_progress else None)
            for step, (_, question) in told.items():
                _look(loaded, filled, step, question, found)
        points += _points(loaded, size, found)
    return RetrieverResult(
        kind="retriever",
        seed=settings.seed,
        versions=versions(loaded.model.device),
        weights=loaded.weights,
        model=settings.model,
        settings={"sizes": list(settings.sizes), "prose": settings.prose, "memory": memory.to_dict()},
        num_retrieved=memory.num_retrieved,
        memories=sum(counts.values()),
        points=tuple(points),
    )


def _plan_facts(loaded: LoadedModel, rng: Random, life: _Life, num_facts: int) -> dict[int, tuple[Telling, Question]]:
    """Draw what is told and asked, by the injection that tells it."""
    config = loaded.model.config
    sizes = ChunkSizes(loaded.codec, config.chunk_tokens, config.min_chunk_tokens)
    rounds = plan_stream(rng, sizes, dict.fromkeys(range(num_facts), 1))
    asked = [(item, question) for item in rounds for question in item.questions]
    places = sorted(rng.sample(range(life.num_places), num_facts))
    told = {}
    for place, (item, question) in zip(places, asked, strict=True):
        step = next(step for step in item.steps if step.remaining == question.distance)
        telling = next(telling for telling in step.tellings if question.value in telling.text)
        told[place] = telling, question
    return told


def _fill(
    loaded: LoadedModel,
    rng: Random,
    life: _Life,
    told: dict[int, tuple[Telling, Question]],
    prose: list[int],
    on_injection: Callable[[], None],
) -> MemoryState:
    model = loaded.model
    memory = MemoryState(
        model.config.memory, seed=rng.getrandbits(62), genesis=None, device=model.device, dtype=model.dtype
    )
    chunk, place = model.config.chunk_tokens, rng.randrange(len(prose))
    for step in range(life.num_injections):
        if step in told:
            ids = loaded.codec.encode(f"{told[step][0].text.rstrip()}\n")  # as an agent ends its injections
        else:
            ids = [prose[(place + offset) % len(prose)] for offset in range(chunk)]
            place += chunk
        memory.apply(model.write(torch.tensor([ids], device=model.device), memory))
        on_injection()
    return memory


def _look(loaded: LoadedModel, memory: MemoryState, step: int, question: Question, found: _Found) -> None:
    """Ask, and see which of the fact's tokens in Θ are among the retrieved."""
    model = loaded.model
    prompt = question_prompt(loaded.codec, "", question.text)
    is_query = torch.tensor([prompt.is_query]) if model.config.retrieval_query == "last_turn" else None
    with torch.no_grad():
        retrieved = model.read(torch.tensor([prompt.ids]), memory, query_mask=is_query).retrieved
    shares = np.zeros(memory.config.num_layers)
    for layer, places in enumerate(retrieved):
        rows = memory.index.long_term.alive_rows(layer)
        steps = memory.index.long_term.births[layer, rows - memory.index.long_term.base_row]
        is_fact = steps // memory.config.tokens_per_injection == step
        if not is_fact.any():
            return  # all of it is in θ, in this layer: there is nothing to find
        shares[layer] = is_fact[places.numpy()].sum() / is_fact.sum()
    found.recall += shares
    found.found += shares > 0
    found.random += min(1.0, memory.config.num_retrieved / len(memory.index.long_term.alive_rows(0)))
    found.questions += 1


def _points(loaded: LoadedModel, size: int, found: _Found) -> list[RetrieverPoint]:
    memory = loaded.model.config.memory
    if not found.questions:
        raise InvalidInputError("sizes", size, "sizes at which facts have left θ")
    return [
        RetrieverPoint(
            size=size,
            layer=layer,
            recall=float(found.recall[layer]) / found.questions,
            found=float(found.found[layer]) / found.questions,
            random=found.random / found.questions,
            questions=found.questions,
        )
        for layer in range(memory.num_layers)
    ]
