"""Warm-up of the small recipe: copying, recalling and answering from text in the prompt itself, without a memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from mplus_agents.engine.prompts import Prompt
from mplus_agents.language import RELATIONS, Fact, draw_name
from mplus_agents.training.episodes import EpisodeSource, Question, batch_prompts, find_tellers
from mplus_agents.training.network import LayerPrefix, TrainableMPlus
from mplus_agents.training.objectives import answer_loss
from mplus_agents.training.small_metrics import exact_answers

NUM_TURNS = 3  # questions about one chunk in a row
_ASKED_CHUNKS = 4  # of a prompt with several
_NUM_ROWS = 64
_TEXT_WEIGHT = 0.1
_EASY_FORMS = ("{p}", "{p}", "{p} is", "The one of {p} is", "{p} has")


class _Empty:
    """A memory that holds its bos rows only."""

    num_slots = 1

    def __init__(self, network: TrainableMPlus, num_rows: int) -> None:
        self._network = network
        self._num_rows = num_rows

    def prefix(self, layer_idx: int, layer: Any, normed: torch.Tensor) -> LayerPrefix:
        rows = self._network.bos_embedding[layer_idx].expand(self._num_rows, 1, -1)
        return self._network.project(layer, rows, torch.zeros(1, dtype=torch.long, device=rows.device))


class ContextTasks:
    """Losses of the steps that need no memory.

    Args:
        network: The network.
        source: Where episodes come from.
    """

    def __init__(self, network: TrainableMPlus, source: EpisodeSource) -> None:
        self._network = network
        self._source = source
        self._end_id = int(cast(int, network.decoder.config.eos_token_id))

    def repeat(self) -> tuple[torch.Tensor, dict[str, float]]:
        """Copy: random tokens that repeat with a period of 12 to 40."""
        rng, width = self._source.rng, 96
        rows, targets = [], []
        vocab_size = self._network.decoder.config.vocab_size
        for _ in range(_NUM_ROWS):
            period = rng.randint(12, 40)
            tokens = [rng.randrange(2, vocab_size) for _ in range(period)]
            row = (tokens * 9)[: width + 1]
            rows.append(row[:-1])
            targets.append([-100] * (period - 1) + row[period:])
        device = self._network.bos_embedding.device
        target = torch.tensor(targets, device=device)
        hidden = self._network.read(torch.tensor(rows, device=device), _Empty(self._network, len(rows)))
        logits = self._network.logits(hidden[target >= 0])
        wanted = target[target >= 0]
        return answer_loss(logits, wanted), {"copy": (logits.argmax(dim=-1) == wanted).float().mean().item()}

    def recall(self, hardness: float) -> tuple[torch.Tensor, dict[str, float]]:
        """Tell facts, then tell all again in another order: who and what have to be read.

        Easy rows have common names, mostly single tokens, next to their values: so copying what followed a name, which
        repeated tokens have taught, is enough at first, and the way from name to value can grow.

        Args:
            hardness: Share of rows that are sentences.
        """
        rng, source = self._source.rng, self._source
        rows: list[list[tuple[Prompt, str]]] = []
        lengths: list[int] = []
        is_hard_row: list[bool] = []
        for _ in range(_NUM_ROWS):
            is_hard = rng.random() < hardness
            common = source.common if is_hard else 1.0
            facts = self._draw_recalled(common, 7 if is_hard else 5, is_hard)
            form = rng.choice(_EASY_FORMS)
            said = [fact.state(rng) if is_hard else f"{form.format(p=fact.person)} {fact.value}." for fact in facts]
            told = [*source.draw_prose(rng.randint(0, 20)), *source.codec.encode(" ".join(said))]
            turns: list[tuple[Prompt, str]] = []
            for fact in rng.sample(facts, len(facts)):
                start = fact.answer().removesuffix(f"{fact.value}.").rstrip() if is_hard else form.format(p=fact.person)
                ids = [*([] if turns else told), *source.codec.encode(start)]
                turns.append((Prompt(ids, [False] * len(ids), ()), f"{fact.value}."))
            rows.append(turns)
            lengths.append(len(told))
            is_hard_row += [is_hard] * len(turns)
        loss, exact = self._answer_in_context(rows, lengths)
        hard = torch.tensor(is_hard_row)
        kinds = (("recall", hard), ("easy", ~hard))
        return loss, {name: exact[kind].mean().item() for name, kind in kinds if bool(kind.any())}

    def _draw_recalled(self, common: float, most: int, is_hard: bool) -> list[Fact]:
        """Few people and many things, or many people and few things: neither who nor what can be left out."""
        rng = self._source.rng
        people = list(
            dict.fromkeys(draw_name(rng, "training", common) for _ in range(rng.randint(1 if is_hard else 2, 5)))
        )
        num_kinds = rng.choice((1, 2, 4, 7)) if is_hard else 1
        kinds = rng.sample([kind for kind in RELATIONS if is_hard or kind.values], num_kinds)
        pairs = [(person, kind) for person in people for kind in kinds]
        return [
            Fact(person, kind, kind.draw_value(rng, "training", common))
            for person, kind in rng.sample(pairs, min(most, len(pairs)))
        ]

    def context(self, most_chunks: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Answer from chunks that stand in the prompt itself.

        Args:
            most_chunks: Most chunks in a row; one in half of the steps.
        """
        rng, source = self._source.rng, self._source
        num_chunks = rng.choice((1, 1, 1, 2, most_chunks // 2, most_chunks)) if most_chunks > 1 else 1
        new_lines = source.codec.encode("\n\n")[1:]
        rows, lengths = [], []
        for _ in range(max(6, _NUM_ROWS // num_chunks)):
            chunks = source.draw_chunks(num_chunks, rng.randint(24, 64))
            told = [place for place, chunk in enumerate(chunks) if chunk.facts]
            if not told:
                continue
            tellers = find_tellers(chunks)
            # The first one always: what a prompt begins with is read worse than the rest, and it is one of many.
            asked = [told[0], *rng.sample(told[1:], min(_ASKED_CHUNKS, len(told)) - 1)]
            questions = [item for place in asked for item in source.draw_questions(chunks, place, tellers, NUM_TURNS)]
            text = [*(token for chunk in chunks for token in chunk.ids), *new_lines]
            first, *others = [(question.prompt, _latest_answer(question, tellers)) for question in questions]
            with_text = Prompt([*text, *first[0].ids], [False] * len(text) + first[0].is_query, ())
            rows.append([(with_text, first[1]), *others])
            lengths.append(len(text))
        loss, exact = self._answer_in_context(rows, lengths)
        return loss, {"context": exact.mean().item()}

    def _answer_in_context(
        self, rows: list[list[tuple[Prompt, str]]], lengths: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of the answers and, with a small weight, of the text in front; and which answers are exact."""
        batch = batch_prompts(self._source.codec, rows, self._end_id).to(self._network.bos_embedding.device)
        hidden = self._network.read(batch.input_ids, _Empty(self._network, len(rows)))
        is_target = batch.targets >= 0
        logits = self._network.logits(hidden[is_target])
        loss = answer_loss(logits, batch.targets[is_target])
        # the text itself, so that names and words are known
        columns = torch.arange(batch.input_ids.shape[1], device=hidden.device)
        places = columns[None] < torch.tensor(lengths, device=hidden.device)[:, None] - 1
        text_loss = answer_loss(self._network.logits(hidden[places]), batch.input_ids.roll(-1, 1)[places])
        return loss + _TEXT_WEIGHT * text_loss, exact_answers(logits, batch)


def _latest_answer(question: Question, tellers: Mapping[Any, Mapping[int, Fact]]) -> str:
    if question.reply is not None:
        return question.reply
    told = tellers.get(question.key)
    return told[max(told)].answer() if told else question.unknown
