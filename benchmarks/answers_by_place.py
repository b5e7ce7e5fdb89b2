"""Counts wrong answers by the place of a fact in its chunk: thousands of questions in minutes, to compare weights.

    python benchmarks/answers_by_place.py [--model mplus-tiny] [--worlds 4] [--seed 77] [--output FILE.json]
    python benchmarks/answers_by_place.py --template prompt.txt --turns 3    # in a framework's prompt, with a history

A world is made of chunks of an unseen novel and chunks that tell four facts by new names and values, each written after
some chunk of the novel. Every question draws its own past from them, as training does: the fact's chunk at the age that
is asked for, five other chunks of facts anywhere. Such pasts stand for a real agent's, which `mplus eval retention`
measures and which takes an hour. The baseline in the same run is the fact that stands first.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mplus_agents.engine.prompts import Prompt, chat_prompt, question_prompt
from mplus_agents.engine.records import Message
from mplus_agents.evaluation.settings import RetentionSettings
from mplus_agents.language import Fact, draw_facts
from mplus_agents.language.prose import packaged_prose
from mplus_agents.model.checkpoint import CheckpointFiles
from mplus_agents.training.episodes import EpisodeSource, batch_prompts
from mplus_agents.training.folders import load_network
from mplus_agents.training.network import TrainableMPlus
from mplus_agents.training.small_metrics import exact_answers
from mplus_agents.training.world import Histories, WorldMemory, draw_histories, draw_theta

_NUM_PROSE, _NUM_TOLD, _NUM_FACTS, _NUM_OTHERS = 576, 96, 4, 5
_REPLY = "Thank you for telling me."
_WAVE = 64  # chunks that are written together
# chunks after the fact's own, and whether Θ is read
_SETTINGS = ((0, True), (8, True), (32, True), (64, True), (256, True), (512, True), (0, False), (1, False), (2, False))


@dataclass(frozen=True, slots=True)
class World:
    """Memory tokens of the novel and, after them, of the chunks that tell facts.

    Attributes:
        pool: Per layer [p, d].
        told: The facts of every chunk, in the order they are told.
    """

    pool: list[torch.Tensor]
    told: list[list[Fact]]


@dataclass(frozen=True, slots=True)
class Asking:
    """How a question is asked.

    Attributes:
        source: The tokenizer and the randomness.
        template: The prompt around a question, as `mplus eval retention --template` takes it; None: the question alone.
        num_turns: Turns about other people in the template's history.
    """

    source: EpisodeSource
    template: str | None
    num_turns: int

    def prompt(self, fact: Fact) -> Prompt:
        """Write the prompt that asks for a fact.

        Args:
            fact: What is asked for.
        """
        rng, codec = self.source.rng, self.source.codec
        if self.template is None:
            return question_prompt(codec, "", fact.ask(rng))
        others: list[Fact] = []
        while len(others) < self.num_turns:
            others += [other for other in draw_facts(rng, 1, "evaluation") if other.key != fact.key]
        history = "\n".join(f"Human: {other.state(rng)}\nAI: {_REPLY}" for other in others)
        content = RetentionSettings(template=self.template).prompt(fact.ask(rng), history)
        return chat_prompt(codec, [Message("user", content)])


def main() -> None:
    """Ask, count and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="mplus-tiny", help="folder of a trained model, or mplus-tiny")
    parser.add_argument("--worlds", type=int, default=4, help=f"{_NUM_TOLD * _NUM_FACTS} questions each")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--ending", default=r"\n", help="what follows the last fact; an agent ends the line")
    parser.add_argument("--template", help="file with the prompt around a question, {question} and perhaps {history}")
    parser.add_argument("--turns", type=int, default=0, help="turns about other people in the template's history")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    network, codec = load_network(CheckpointFiles.open(options.model).folder)
    network.requires_grad_(False)
    source = EpisodeSource.load(codec, [packaged_prose("novel")], options.seed)
    template = options.template and Path(options.template).read_text(encoding="utf-8")
    asking = Asking(source, template, options.turns)
    wrong: Counter[tuple[int, bool, int]] = Counter()
    for number in tqdm(range(options.worlds), desc="worlds"):
        source.rng = Random(f"{options.seed}:{number}")
        torch.manual_seed(options.seed * 1_000 + number)
        world = write_world(network, source, options.ending.encode().decode("unicode_escape"))
        for age, has_long_term in _SETTINGS:
            wrong.update((age, has_long_term, place) for place in ask(network, asking, world, age, has_long_term))
    num_asked = options.worlds * _NUM_TOLD
    print_table(wrong, num_asked)
    if options.output is not None:
        points = [
            {"distance": age, "variant": _variant(is_long), "place": place, "wrong": wrong[age, is_long, place]}
            for age, is_long in _SETTINGS
            for place in range(_NUM_FACTS)
        ]
        values = {"model": options.model, "seed": options.seed, "ending": options.ending, "questions": num_asked}
        values |= {"template": template, "turns": options.turns}
        options.output.write_text(json.dumps({**values, "points": points}, indent=1) + "\n", encoding="utf-8")


def write_world(network: TrainableMPlus, source: EpisodeSource, ending: str) -> World:
    """Write the chunks of a world.

    Args:
        network: The network.
        source: The novel, the tokenizer and the randomness.
        ending: What stands behind the last fact of a chunk.
    """
    length = network.config.chunk_tokens
    tail, prose = None, []
    for _ in range(_NUM_PROSE // _WAVE):
        tail = network.write(torch.tensor([source.draw_prose(length) for _ in range(_WAVE)]), tail)
        prose.append(tail)
    layers = [torch.cat(rows) for rows in zip(*prose, strict=True)]
    told: list[list[Fact]] = []
    chunks: list[list[int]] = []
    while len(told) < _NUM_TOLD:
        facts = draw_facts(source.rng, _NUM_FACTS, "evaluation")
        ids = source.codec.encode(" ".join(fact.state(source.rng) for fact in facts) + ending)
        if len(ids) <= length and len({fact.key for fact in facts}) == _NUM_FACTS:
            told.append(facts)
            chunks.append(ids)
    for ids in chunks:  # one by one: they differ in length
        before = int(torch.randint(_NUM_PROSE, ()))
        new = network.write(torch.tensor([ids]), [rows[before : before + 1] for rows in layers])
        layers = [torch.cat(rows) for rows in zip(layers, new, strict=True)]
    return World([rows.flatten(0, 1) for rows in layers], told)


def ask(network: TrainableMPlus, asking: Asking, world: World, age: int, has_long_term: bool) -> list[int]:
    """Ask for every fact of a world; return the place in its chunk of each that was answered wrong.

    Args:
        network: The network.
        asking: How it is asked.
        world: What was told.
        age: Chunks written after the fact's own.
        has_long_term: Whether Θ is read, besides θ.
    """
    rng, codec, memory = asking.source.rng, asking.source.codec, network.config.memory
    wrong = []
    for place in range(_NUM_FACTS):
        rows = []
        allowed = torch.zeros(_NUM_TOLD, _NUM_PROSE + _NUM_TOLD, dtype=torch.bool)
        allowed[:, :_NUM_PROSE] = True
        for row, facts in enumerate(world.told):
            fact = facts[place]
            others = [idx for idx, told in enumerate(world.told) if all(other.key != fact.key for other in told)]
            allowed[row, [_NUM_PROSE + idx for idx in [row, *rng.sample(others, _NUM_OTHERS)]]] = True
            rows.append([(asking.prompt(fact), fact.answer())])
        targets = _NUM_PROSE + torch.arange(_NUM_TOLD)
        ages = draw_histories(allowed, targets, torch.full_like(targets, age), torch.full_like(targets, 10**6))
        histories = Histories(ages, torch.full((_NUM_TOLD,), has_long_term))
        batch = batch_prompts(codec, rows, int(network.decoder.config.eos_token_id))
        theta = draw_theta(ages, memory.num_layers, memory)
        num_retrieved = memory.num_retrieved if has_long_term else 0
        reading = WorldMemory(network, world.pool, histories, theta, batch.is_query, num_retrieved)
        hidden = network.read(batch.input_ids, reading)
        exact = exact_answers(network.logits(hidden[batch.targets >= 0]), batch)
        wrong += [place] * int((exact == 0).sum())
    return wrong


def _variant(has_long_term: bool) -> str:
    return "mplus" if has_long_term else "theta_only"


def print_table(wrong: Counter[tuple[int, bool, int]], num_asked: int) -> None:
    """Print the share of wrong answers by place, and the ratio of the last place to the first."""
    places = [f"fact {place + 1}" for place in range(_NUM_FACTS)]
    table = Table("read", "chunks between", *places, "all", "last / first")
    for age, is_long in _SETTINGS:
        counts = [wrong[age, is_long, place] for place in range(_NUM_FACTS)]
        shares = [f"{count / num_asked:.3f}" for count in counts]
        mean = sum(counts) / num_asked / _NUM_FACTS
        ratio = f"{counts[-1] / counts[0]:.1f}" if counts[0] else "–"
        table.add_row(_variant(is_long), str(age), *shares, f"{mean:.4f}", ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
