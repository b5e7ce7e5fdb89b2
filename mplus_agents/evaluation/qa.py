"""The paper's knowledge retention: a real context, then distractor contexts, then the question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from mplus_agents.config import LongTermUse
from mplus_agents.engine import Agent
from mplus_agents.engine.answering import answer_all
from mplus_agents.engine.prompts import Prompt, question_prompt
from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation.contexts import end_prompt
from mplus_agents.evaluation.datasets import Dataset, QAExample, load_distractors, load_examples
from mplus_agents.evaluation.engines import LoadedModel, load, versions
from mplus_agents.evaluation.report import Result
from mplus_agents.evaluation.scoring import score_short
from mplus_agents.evaluation.tally import Tally

DEFAULT_STEPS = (0, 1, 2, 5, 10, 20)
_FILLER_WORDS = 8  # at first; twice as many each time they are not enough
_STOP = ["\n"]  # a base model goes on after the answer


@dataclass(frozen=True, slots=True)
class QASettings:
    """What is run.

    Attributes:
        dataset: `squad` or `naturalqa`.
        file: The questions, in the published format.
        distractors: A SQuAD file whose contexts of 300 to 500 tokens come between context and question.
        model: A folder, a hub id, or `mplus-tiny`.
        seed: Seed of everything random.
        episodes: Questions, the first ones of the file that have short answers.
        steps: Numbers of distractors after which the question is asked.
        num_retrieved: K0; as the model was made if None.
        max_new_tokens: Longest answer.
        device: Where to load the model; the first CUDA device if there is one, else the CPU.
    """

    dataset: Dataset
    file: str
    distractors: str
    model: str = "mplus-tiny"
    seed: int = 0
    episodes: int = 100
    steps: tuple[int, ...] = DEFAULT_STEPS
    num_retrieved: int | None = None
    max_new_tokens: int = 16
    device: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("episodes", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InvalidInputError(name, value, f"a whole number from {least}")
        is_list = bool(self.steps) and all(type(step) is int and step >= 0 for step in self.steps)
        if not is_list or len(set(self.steps)) < len(self.steps):
            raise InvalidInputError("steps", self.steps, "different whole numbers from 0, at least one")

    def to_dict(self) -> dict[str, Any]:
        """Return what is worth saving beside the numbers."""
        values = {**asdict(self), "steps": list(self.steps)}
        for name in ("model", "seed", "episodes", "device"):
            del values[name]
        return values


def run_qa(
    settings: QASettings,
    *,
    on_result: Callable[[Result], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Run the experiment; every question has an agent of its own, in a temporary database.

    Args:
        settings: What is run.
        on_result: Called with the numbers so far after every question.
        on_progress: Called with the questions done since the last call, and those to do in all.

    Returns:
        The numbers; answers are compared as the SQuAD evaluation does.

    Raises:
        InvalidInputError: A file cannot be used, or has too few distractors.
        MPlusError: The model cannot be loaded, or the temporary database fails.
    """
    loaded = load(settings.model, settings.device, settings.num_retrieved)
    examples = load_examples(settings.dataset, Path(settings.file), loaded.codec)[: settings.episodes]
    contexts = load_distractors(Path(settings.distractors), loaded.codec)
    most = max(settings.steps) + 1  # one more, to fill up an injection with
    if len(contexts) <= most:
        allowed = f"a file with more than {most} contexts of 300 to 500 tokens"
        raise InvalidInputError("distractors", f"{len(contexts)} contexts", allowed)
    tally = Tally()
    result = _result(settings, loaded, tally, 0, len(examples))
    for number, example in enumerate(examples):
        rng = Random(f"{settings.seed}/{number}")
        distractors = rng.sample([context for context in contexts if context != example.context], most)
        _ask_one(settings, loaded, example, distractors, rng.getrandbits(62), tally)
        result = _result(settings, loaded, tally, number + 1, len(examples))
        if on_result is not None:
            on_result(result)
        if on_progress is not None:
            on_progress(1, len(examples))
    return result


def _ask_one(
    settings: QASettings,
    loaded: LoadedModel,
    example: QAExample,
    distractors: Sequence[str],
    seed: int,
    tally: Tally,
) -> None:
    with loaded.open() as mplus:
        agent = mplus.agent("reader", seed=seed)
        read, filler = 0, _Filler(distractors[-1])
        _read(agent, example.context, filler)
        for step in sorted(settings.steps):
            for distractor in distractors[read:step]:
                _read(agent, distractor, filler)
            read = max(read, step)
            assert agent.window == []
            for variant, answer in _answers(settings, loaded, agent, example, distractors[:step], seed):
                tally.add(variant, step, score_short(answer, example.answers))


class _Filler:
    """Words to fill up injections with, from the first again behind the last."""

    def __init__(self, text: str) -> None:
        self._words = cycle(text.split())
        self._number = 0

    def add_to(self, agent: Agent, num_words: int) -> None:
        """Let an agent remember the next words."""
        text = " ".join(islice(self._words, num_words))
        self._number += 1
        # Named by its number: words that come round again shall be read again.
        agent.remember(f"\n{text}", source_id=f"filler {self._number}", progress=False)


def _read(agent: Agent, text: str, filler: _Filler) -> None:
    """Read a text so that nothing of it waits; a rest too short for an injection is filled up with other text."""
    agent.remember(text, progress=False)
    num_words = _FILLER_WORDS
    while agent.window:
        agent.flush()
        if agent.window:
            filler.add_to(agent, num_words)
            num_words *= 2


def _answers(
    settings: QASettings,
    loaded: LoadedModel,
    agent: Agent,
    example: QAExample,
    distractors: Sequence[str],
    seed: int,
) -> Iterator[tuple[str, str]]:
    model, codec, most = loaded.model, loaded.codec, settings.max_new_tokens
    uses: dict[str, LongTermUse] = {"theta_only": "off"}
    if model.config.memory.has_long_term:
        uses |= {"mplus": "retrieved", "random": "random"}
    for variant, long_term in uses.items():
        answer = agent.ask(example.question, max_new_tokens=most, long_term=long_term, seed=seed, stop=_STOP)
        yield variant, answer
    whole = "\n".join([example.context, *distractors])
    limit = model.config.max_prompt_tokens - most

    def make(context: str) -> Prompt:
        return question_prompt(codec, context, example.question)

    prompts = {"full_context": make(whole), "window": end_prompt(codec, codec.encode(whole), limit, make)}
    for variant, prompt in {**prompts, "no_context": make("")}.items():
        if len(prompt.ids) <= limit:
            memory = model.initial_memory()
            yield variant, answer_all(model, codec, memory, [prompt], most, {"stop": _STOP}, 1)[0].text


def _result(settings: QASettings, loaded: LoadedModel, tally: Tally, num_done: int, num_examples: int) -> Result:
    points = tally.points()
    asked = {point.distance: point.episodes for point in points if point.variant == "theta_only"}
    return Result(
        kind="qa",
        seed=settings.seed,
        versions=versions(loaded.model.device),
        weights=loaded.weights,
        model=settings.model,
        settings={**settings.to_dict(), "memory": loaded.model.config.memory.to_dict()},
        is_complete=num_done == num_examples,
        notes=("answers are compared in lower case, without punctuation and articles",),
        streams=num_done,
        episodes=num_examples,
        # Where the text fits some prompts only, there is no telling what the others would have given.
        points=tuple(p for p in points if p.episodes == asked[p.distance]),
    )
