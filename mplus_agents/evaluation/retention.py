"""Retention: facts, then chunks of prose, then questions; with Θ and without, and with the text in the prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from random import Random
from typing import Any

from mplus_agents.config import LongTermUse
from mplus_agents.engine import Agent, Message
from mplus_agents.engine.answering import answer_all
from mplus_agents.engine.prompts import Prompt, chat_prompt, question_prompt
from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation.contexts import end_prompt
from mplus_agents.evaluation.engines import LoadedModel, load, versions
from mplus_agents.evaluation.report import Result
from mplus_agents.evaluation.scoring import score
from mplus_agents.evaluation.settings import RetentionSettings
from mplus_agents.evaluation.stream import NEAR_CHUNKS, ChunkSizes, Prose, Question, Round, Telling, plan_stream
from mplus_agents.evaluation.tally import Tally
from mplus_agents.evaluation.workers import run_in_workers

_MEMORY_VARIANTS: dict[str, LongTermUse] = {"mplus": "retrieved", "theta_only": "off", "random": "random"}
# A prompt's tail is cut out of this many characters per token, which is more than real prose has.
_CHARS_PER_TOKEN = 16
OnProgress = Callable[[int], None]


@dataclass(slots=True)
class StreamOutcome:
    """What one stream gave.

    Attributes:
        tally: The answers.
        in_theta: By distance, the fact's tokens still in θ when it was asked for.
        written: By distance, the fact's tokens.
        num_restarts: How often the prose began anew at the text's first chunk.
    """

    tally: Tally = field(default_factory=Tally)
    in_theta: Counter[int] = field(default_factory=Counter)
    written: Counter[int] = field(default_factory=Counter)
    num_restarts: int = 0


@dataclass(frozen=True, slots=True)
class _Window:
    """The turns that wait, as `ask` shows them, and as a framework's prompt does."""

    text: str
    history: str


@dataclass(slots=True)
class _Trail:
    """All text of a stream in order, a piece per injection, with tokens, and where each distance's telling begins.

    `place` is the next chunk of the prose.
    """

    place: int
    texts: list[str] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)

    def add(self, text: str, num_tokens: int) -> None:
        self.texts.append(text)
        self.num_tokens.append(num_tokens)


def run_retention(
    settings: RetentionSettings,
    *,
    workers: int = 1,
    on_result: Callable[[Result], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Run the experiment.

    Args:
        settings: What is run.
        workers: Processes that streams are split over.
        on_result: Called with the numbers so far after every stream.
        on_progress: Called with the chunks of prose done since the last call.

    Returns:
        The numbers; with equal settings, device and versions they are the same.

    Raises:
        InvalidInputError: A setting does not fit the model.
        MPlusError: The model cannot be loaded, or the temporary database fails.
    """
    if type(workers) is not int or workers < 1:
        raise InvalidInputError("workers", workers, "a whole number from 1")
    loaded = load(settings.model, settings.device, settings.num_retrieved)
    config = loaded.model.config
    if settings.window_tokens >= config.chunk_tokens:
        allowed = f"less than a chunk ({config.chunk_tokens} tokens): a full one is injected"
        raise InvalidInputError("window_tokens", settings.window_tokens, allowed)
    total = StreamOutcome()
    result = _result(settings, loaded, total, 0)
    outcomes = _run_streams(settings, min(workers, settings.num_streams), on_progress or (lambda num_chunks: None))
    for done, outcome in enumerate(outcomes, start=1):
        total.tally.counts.update(outcome.tally.counts)
        total.in_theta.update(outcome.in_theta)
        total.written.update(outcome.written)
        total.num_restarts += outcome.num_restarts
        result = _result(settings, loaded, total, done)
        if on_result is not None:
            on_result(result)
    return result


def run_stream(settings: RetentionSettings, number: int, on_progress: OnProgress | None = None) -> StreamOutcome:
    """Run one stream: tell, write prose, and ask in every way.

    Args:
        settings: What is run.
        number: The stream, from 0; everything random in it follows from it and the seed.
        on_progress: Called with the chunks of prose done since the last call.
    """
    loaded = load(settings.model, settings.device, settings.num_retrieved)
    prose = _prose(settings)
    first = number * len(prose.chunks) // settings.num_streams
    seeds = Random(f"{settings.seed}/{number}/draws")
    outcome = StreamOutcome(num_restarts=(first + settings.num_prose_chunks) // len(prose.chunks))
    with loaded.open() as mplus:
        agent = mplus.agent("stream", seed=seeds.getrandbits(62))
        trail = _Trail(place=first)
        for plan in rounds_of(settings, number):
            _write(agent, plan, prose, trail, outcome, on_progress or (lambda num_chunks: None))
            _fill_window(agent, plan)
            _ask_memory(agent, plan, settings, seeds.getrandbits(62), outcome.tally)
            window = _Window(agent.window_text, plan.history)
            _ask_context(loaded, plan, settings, trail, window, outcome.tally)
            if agent.window:
                trail.add(window.text, len(loaded.codec.encode(window.text)))
                agent.flush()  # a round begins with an empty window
    return outcome


def rounds_of(settings: RetentionSettings, number: int) -> list[Round]:
    """Return what a stream tells and asks.

    Args:
        settings: What is run.
        number: The stream, from 0.
    """
    loaded = load(settings.model, settings.device, settings.num_retrieved)
    config = loaded.model.config
    sizes = ChunkSizes(loaded.codec, config.chunk_tokens, config.min_chunk_tokens)
    asked = dict.fromkeys(settings.distances, settings.num_questions(number))
    rng = Random(f"{settings.seed}/{number}")
    return plan_stream(rng, sizes, asked, settings.condition, settings.gap, settings.window_tokens)


@lru_cache(maxsize=1)
def _prose(settings: RetentionSettings) -> Prose:
    loaded = load(settings.model, settings.device, settings.num_retrieved)
    return Prose.cut(loaded.codec, settings.read_prose(), loaded.model.config.chunk_tokens)


def _run_streams(settings: RetentionSettings, workers: int, on_progress: OnProgress) -> Iterator[StreamOutcome]:
    if workers == 1:
        for number in range(settings.num_streams):
            yield run_stream(settings, number, on_progress)
        return
    for outcome in run_in_workers(
        workers, ((run_stream, (settings, number)) for number in range(settings.num_streams))
    ):
        yield outcome
        on_progress(settings.num_prose_chunks)


def _write(
    agent: Agent, plan: Round, prose: Prose, trail: _Trail, outcome: StreamOutcome, on_progress: OnProgress
) -> None:
    """Tell a round's facts and read the prose between them; receipts prove the number of injections."""
    injections: dict[int, int] = {}  # of every fact's last telling, with its distance
    for step, num_chunks in plan.prose_after():
        for telling, distance in zip(step.tellings, step.distances, strict=True):
            injection_id = _tell(agent, telling)
            if step.remaining == distance:
                injections[injection_id] = distance
            trail.starts.setdefault(distance, len(trail.texts))
            trail.add(f"\n{telling.text}\n", len(agent.mplus.codec.encode(telling.text)))
        num_injections, place = 0, trail.place
        for number, text in enumerate(prose.documents(place, num_chunks)):
            # Named by its place: a text that comes round again shall be read again.
            receipt = agent.remember(text, source_id=f"prose {place}/{number}", progress=False)
            num_injections += receipt.num_injections + (agent.flush().num_injections if agent.window else 0)
        assert num_injections == num_chunks, f"{num_chunks} chunks of prose made {num_injections} injections"
        for chunk in range(place, place + num_chunks):
            trail.add(prose.chunks[chunk % len(prose.chunks)], prose.num_tokens[chunk % len(prose.chunks)])
        trail.place += num_chunks
        on_progress(num_chunks)
    _count_in_theta(agent, injections, outcome)


def _tell(agent: Agent, telling: Telling) -> int:
    """Tell facts, so that nothing of them waits in the window; return the injection."""
    receipts = [agent.remember(telling.memories(), progress=False)]
    if agent.window:
        receipts.append(agent.flush())
    injection_ids = [injection_id for receipt in receipts for injection_id in receipt.injection_ids]
    assert len(injection_ids) == 1, f"statements made {len(injection_ids)} injections: {telling.text!r}"
    assert agent.window == []
    return injection_ids[0]


def _count_in_theta(agent: Agent, injections: dict[int, int], outcome: StreamOutcome) -> None:
    memory = agent.mplus.model.config.memory
    for distance in injections.values():
        outcome.written[distance] += memory.num_layers * memory.tokens_per_injection
    for layer in range(memory.num_layers):
        for token in agent.tokens(layer):
            if token.place == "short_term" and token.injection_id in injections:
                outcome.in_theta[injections[token.injection_id]] += 1


def _fill_window(agent: Agent, plan: Round) -> None:
    if plan.window:
        receipt = agent.remember(list(plan.window), progress=False)
        assert receipt.num_injections == 0


def _ask_memory(agent: Agent, plan: Round, settings: RetentionSettings, seed: int, tally: Tally) -> None:
    has_long_term = agent.mplus.model.config.memory.has_long_term
    texts = [question.text for question in plan.questions]
    for variant, long_term in _MEMORY_VARIANTS.items():
        if not has_long_term and variant != "theta_only":
            continue
        assert agent.window == list(plan.window)  # empty, unless a full one was asked for
        options: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
            "long_term": long_term,
            "seed": seed,
        }
        if settings.template is None:
            answers = agent.ask_all(texts, **options)
        else:
            prompts = [settings.prompt(text, plan.history) for text in texts]
            turns = [[Message("user", prompt)] for prompt in prompts]
            answers = [generation.text for generation in agent.generate_all(turns, **options)]
        _count(tally, variant, plan.questions, answers)


def _ask_context(
    loaded: LoadedModel,
    plan: Round,
    settings: RetentionSettings,
    trail: _Trail,
    window: _Window,
    tally: Tally,
) -> None:
    """Ask an empty memory with text in the prompt: all since the fact, and the end of the stream as far as it fits."""
    model, codec = loaded.model, loaded.codec
    limit = model.config.max_prompt_tokens - settings.max_new_tokens
    tail_start = _tail_start(trail, limit)
    tail = codec.encode("".join(trail.texts[tail_start:])[-limit * _CHARS_PER_TOKEN :])
    asked: dict[str, list[tuple[Question, Prompt]]] = {"full_context": [], "window": []}
    for question in plan.questions:
        start = trail.starts[question.distance]
        if start >= tail_start:
            prompt = _context_prompt(loaded, settings, window, question, "".join(trail.texts[start:]))
            if len(prompt.ids) <= limit:
                asked["full_context"].append((question, prompt))
        make = partial(_context_prompt, loaded, settings, window, question)
        asked["window"].append((question, end_prompt(codec, tail, limit, make)))
    for variant, pairs in asked.items():
        prompts = [prompt for _, prompt in pairs]
        memory, most = model.initial_memory(), settings.max_new_tokens
        answers = answer_all(model, codec, memory, prompts, most, {}, settings.batch_size)
        _count(tally, variant, [question for question, _ in pairs], [answer.text for answer in answers])


def _tail_start(trail: _Trail, limit: int) -> int:
    """Return the first injection from which on all text may fit a prompt."""
    total, start = 0, len(trail.texts)
    while start and total <= limit:
        start -= 1
        total += trail.num_tokens[start]
    return start


def _context_prompt(
    loaded: LoadedModel, settings: RetentionSettings, window: _Window, question: Question, context: str
) -> Prompt:
    lead = "\n".join(text for text in (context.strip(), window.text) if text)
    if settings.template is None:
        return question_prompt(loaded.codec, lead, question.text)
    turn = Message("user", settings.prompt(question.text, window.history))
    return chat_prompt(loaded.codec, [turn], lead=context.strip())


def _count(tally: Tally, variant: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    for question, answer in zip(questions, answers, strict=True):
        scored = score(answer, question.answer, question.value, question.old_answer)
        tally.add(variant, question.distance, scored)


def _result(settings: RetentionSettings, loaded: LoadedModel, total: StreamOutcome, num_done: int) -> Result:
    points = total.tally.points(has_superseded=settings.condition == "updated")
    asked = {point.distance: point.episodes for point in points if point.variant == "theta_only"}
    prose = _prose(settings)
    name = "the packaged novel" if settings.prose is None else settings.prose
    mean_tokens = sum(prose.num_tokens) / len(prose.chunks)
    notes = [
        f"{name} has {len(prose.chunks):,} chunks of {mean_tokens:.1f} tokens on average; every stream starts at "
        f"another place, and {total.num_restarts:,} times one went on from the end at the beginning",
        "every group of facts is an injection of its own, which is not counted as a chunk of prose; between facts and "
        f"questions up to {NEAR_CHUNKS} chunks later no others are told",
    ]
    if settings.num_prose_chunks > len(prose.chunks):
        notes.append("the prose is too short for the largest distance: within a stream it is read more than once")
    return Result(
        kind="retention",
        seed=settings.seed,
        versions=versions(loaded.model.device),
        weights=loaded.weights,
        model=settings.model,
        settings={**settings.to_dict(), "memory": loaded.model.config.memory.to_dict()},
        is_complete=num_done == settings.num_streams,
        notes=tuple(notes),
        streams=num_done,
        episodes=settings.episodes,
        left_in_theta={
            distance: total.in_theta[distance] / total.written[distance] for distance in sorted(total.written)
        },
        # Where the text fits some prompts only, there is no telling what the others would have given.
        points=tuple(p for p in points if p.variant != "full_context" or p.episodes == asked[p.distance]),
    )
