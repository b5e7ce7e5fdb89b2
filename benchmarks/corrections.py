"""Counts which value wins when a fact is corrected: while the correction waits in the window, and once it is injected.

    python benchmarks/corrections.py [--model mplus-tiny] [--questions 100] [--distances 0,8,64] [--output FILE.json]

One agent goes through it all. A person's facts are told and injected, chunks of an unseen novel are read, then the user
says a new value, and something about another person, in a turn that is shorter than a chunk and waits. The question is
asked, the turn injected, and the question asked again. The baseline in the same run: the same question before it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mplus_agents.engine import Agent, Message
from mplus_agents.evaluation.engines import load, versions
from mplus_agents.evaluation.scoring import does_contain
from mplus_agents.evaluation.stream import Prose
from mplus_agents.language import Fact, draw_facts
from mplus_agents.language.prose import packaged_prose

_MOMENTS = ("before", "in the window", "injected")
_FILL = 40  # chunks of prose before the first fact, so that θ is full


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="mplus-tiny", help="folder of a trained model, or mplus-tiny")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--distances", default="0,8,64", help="chunks of prose between the fact and its correction")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    distances = [int(distance) for distance in options.distances.split(",")]
    loaded = load(options.model)
    prose = Prose.cut(loaded.codec, packaged_prose("novel"), loaded.model.config.chunk_tokens)
    table = Table("chunks between", "asked", "earlier value", "later value", "neither")
    points = []
    with loaded.open() as mplus:
        agent, rng = mplus.agent("corrections", seed=options.seed), Random(options.seed)
        used: set[tuple[str, str]] = set()
        place = read(agent, prose, 0, _FILL)
        for distance in distances:
            counts: Counter[tuple[str, str]] = Counter()
            for _ in tqdm(range(options.questions), desc=f"{distance} chunks"):
                fact, others = draw(rng, used)
                agent.remember(" ".join(item.state(rng) for item in [fact, *others]))
                agent.flush()
                place = read(agent, prose, place, distance)
                counts.update(correct(agent, fact, rng, used))
            for moment in _MOMENTS:
                shares = [counts[moment, value] / options.questions for value in ("earlier", "later", "neither")]
                table.add_row(f"{distance}", moment, *(f"{share:.2f}" for share in shares))
                points.append({"distance": distance, "asked": moment, "earlier": shares[0], "later": shares[1]})
    Console().print(table)
    if options.output is not None:
        settings = {"seed": options.seed, "questions": options.questions, "model": options.model}
        values = {
            "settings": settings,
            "versions": versions(loaded.model.device),
            "weights": loaded.weights,
            "points": points,
        }
        options.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def draw(rng: Random, used: set[tuple[str, str]], num_facts: int = 3) -> tuple[Fact, list[Fact]]:
    """Draw a fact and others that are told with it, none of which was told before.

    Args:
        rng: Where randomness comes from.
        used: What was told; grows.
        num_facts: How many.
    """
    while True:
        facts = draw_facts(rng, num_facts, "evaluation")
        if not used & {fact.key for fact in facts}:
            used |= {fact.key for fact in facts}
            return facts[0], facts[1:]


def read(agent: Agent, prose: Prose, place: int, num_chunks: int) -> int:
    """Let the agent read chunks of prose; return the place behind them.

    Args:
        agent: The agent.
        prose: The prose.
        place: The first chunk.
        num_chunks: How many.
    """
    for number, text in enumerate(prose.documents(place, num_chunks)):
        agent.remember(text, source_id=f"prose {place}/{number}", progress=False)
        agent.flush()
    return place + num_chunks


def correct(agent: Agent, fact: Fact, rng: Random, used: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Correct a fact, and ask for it before, between and after; return which value came when.

    Args:
        agent: An agent that was told the fact.
        fact: The fact.
        rng: Where the new value comes from.
        used: What was told; grows.
    """
    value = fact.value
    while value == fact.value:
        value = fact.relation.draw_value(rng, "evaluation", 0.0)
    later = Fact(fact.person, fact.relation, value)
    sentences = [later.state(rng), draw(rng, used, 1)[0].state(rng)]
    said = " ".join(rng.sample(sentences, 2))
    question = fact.ask(rng)
    answers = [agent.ask(question)]
    agent.remember([Message("user", said)])
    assert agent.window
    answers.append(agent.ask(question))
    agent.flush()
    assert not agent.window
    answers.append(agent.ask(question))
    return [(moment, which(answer, fact, later)) for moment, answer in zip(_MOMENTS, answers, strict=True)]


def which(answer: str, earlier: Fact, later: Fact) -> str:
    """Return which of two values an answer holds: "earlier", "later" or "neither".

    Args:
        answer: The answer.
        earlier: The fact as it was told first.
        later: The fact as it was told last.
    """
    if does_contain(answer, later.value):
        return "later"
    return "earlier" if does_contain(answer, earlier.value) else "neither"


if __name__ == "__main__":
    main()
