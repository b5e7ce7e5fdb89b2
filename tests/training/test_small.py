"""Steps of the small recipe: every kind has a loss with gradients, on each device."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mplus_agents.engine.prompts import Prompt
from mplus_agents.errors import ConfigError
from mplus_agents.language import Fact
from mplus_agents.training import small_memory
from mplus_agents.training.build import build_network
from mplus_agents.training.episodes import ACKNOWLEDGEMENT, Chunk, EpisodeSource, Question, find_tellers
from mplus_agents.training.network import TrainableMPlus
from mplus_agents.training.objectives import RetrieverLoss
from mplus_agents.training.small import SmallRecipe
from mplus_agents.training.small_memory import _first_turns, _rows, _tells, move_beside
from mplus_agents.training.small_stage import SmallStage, StepKind
from mplus_agents.training.world import WorldMemory
from tests.training.stages import stage

_PROSE = "There was a long road to the sea and back again. " * 60
_KINDS: tuple[StepKind, ...] = ("repeat", "recall", "context", "write", "theta", "long_term")
_AGES = torch.tensor([[4, 0, 3, 1], [0, 1, 2, 3], [0, 2, 1, -1]])
_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def small_recipe(kind: StepKind, device: str, num_chunks: int) -> tuple[TrainableMPlus, SmallRecipe]:
    network, codec = build_network(stage())
    network.to(device)
    options = SmallStage(kind, 4, num_chunks, 6, queue_steps=2, long_prompt_every=2, chat_share=0.2)
    return network, SmallRecipe(network, EpisodeSource.load(codec, [_PROSE], seed=1), options)


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("kind", _KINDS)
def test_steps_of_every_kind_train_what_they_use(kind: StepKind, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    network, recipe = small_recipe(kind, device, num_chunks=8)
    for step in range(4):
        loss, metrics = recipe.loss(step)
        loss.backward()
        assert loss.isfinite()
        assert metrics
    moved = {
        name for name, weight in network.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0
    }
    writes = kind in ("write", "theta", "long_term")
    assert "decoder.lm_head.weight" in moved
    assert ("new_memory_positional_emb" in moved) == writes
    assert any(name.startswith("retrievers.") for name in moved) == writes


def test_while_writing_the_retriever_tells_the_chunk_from_all_that_do_not_tell_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, recipe = small_recipe("write", "cpu", num_chunks=8)
    drawn: list[list[Chunk]] = []
    losses: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Recording(RetrieverLoss):
        def __init__(self, positives: torch.Tensor, *args: Any, **settings: Any) -> None:
            losses.append((positives, settings["others"]))
            super().__init__(positives, *args, **settings)

    def find(chunks: list[Chunk]) -> dict[tuple[str, str], dict[int, Fact]]:
        drawn.append(chunks)
        return find_tellers(chunks)

    monkeypatch.setattr(small_memory, "RetrieverLoss", Recording)
    monkeypatch.setattr(small_memory, "find_tellers", find)
    loss, metrics = recipe._memory.write_only()
    assert loss.item() == pytest.approx(metrics["answer"] + 0.3 * metrics["retriever"])
    assert metrics["retriever"] > 0
    (chunks,), ((positives, others),) = drawn, losses
    per_chunk = network.config.memory.tokens_per_injection
    tellers = find_tellers(chunks)
    assert positives.shape == others.shape == (len(positives), 8 * per_chunk)
    for wanted, allowed in zip(positives.view(-1, 8, per_chunk), others.view(-1, 8, per_chunk), strict=True):
        assert [row.unique().numel() for row in (*wanted, *allowed)] == [1] * 16  # whole chunks
        asked = wanted[:, 0].nonzero()[:, 0].tolist()
        if asked:  # not if what nobody told is asked about
            left_out = {place for place in range(8) if not allowed[place, 0]}
            assert left_out <= {place for fact in chunks[asked[0]].facts for place in tellers[fact.key]} - {*asked}
            assert len(asked) == 1


def test_one_to_four_times_k0_is_read_and_k0_where_nothing_is_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    network, recipe = small_recipe("long_term", "cpu", num_chunks=8)
    read: list[int] = []

    class Recording(WorldMemory):
        def __init__(self, *args: Any) -> None:
            read.append(args[5])
            super().__init__(*args)

    monkeypatch.setattr(small_memory, "WorldMemory", Recording)
    for _ in range(40):
        recipe._memory.memory(is_long=False, help_share=0.0)
    num_retrieved = network.config.memory.num_retrieved
    assert set(read) == {num_retrieved, 2 * num_retrieved, 3 * num_retrieved, 4 * num_retrieved}
    read.clear()
    recipe._source.hard = 0.0
    for _ in range(10):
        recipe._memory.memory(is_long=False, help_share=0.0)
    assert set(read) == {num_retrieved}


def test_shares_go_in_a_line_from_the_first_step_to_the_last() -> None:
    network, codec = build_network(stage())
    source = EpisodeSource.load(codec, [_PROSE], seed=1)
    options = SmallStage("repeat", 4, common_from=0.8, common_to=0.4, hard_from=0.2, hard_to=1.0)
    recipe = SmallRecipe(network, source, options)
    drawn = []
    for step in range(4):
        recipe.loss(step)
        drawn.append((source.common, source.hard))
    assert drawn == [pytest.approx(shares) for shares in ((0.8, 0.2), (0.7, 0.4), (0.6, 0.6), (0.5, 0.8))]


def test_a_fact_told_after_text_in_the_prompt_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    _, recipe = small_recipe("long_term", "cpu", num_chunks=8)
    recipe._source.chat_share = 1.0  # every turn tells something now
    answers: list[str] = []

    def collect(rows: list[list[tuple[Prompt, str]]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        answers.extend(answer for row in rows for _, answer in row)
        return torch.zeros(()), torch.ones(1)

    monkeypatch.setattr(recipe._context, "_answer_in_context", collect)
    recipe._context.context(2)
    assert set(answers) == {ACKNOWLEDGEMENT}


def test_what_a_prompt_begins_with_is_always_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    _, recipe = small_recipe("context", "cpu", num_chunks=8)
    real, asked = EpisodeSource.draw_questions, []

    def draw(source: EpisodeSource, chunks: list[Chunk], chunk_idx: int, *args: Any) -> list[Question]:
        asked.append((id(chunks), chunk_idx, [place for place, chunk in enumerate(chunks) if chunk.facts]))
        kept.append(chunks)  # so that no two have one id
        return real(source, chunks, chunk_idx, *args)

    kept: list[list[Chunk]] = []
    monkeypatch.setattr(EpisodeSource, "draw_questions", draw)
    for _ in range(24):
        recipe._context.context(8)
    rows: dict[int, list[int]] = {}
    told = {name: places for name, _, places in asked}
    for name, chunk_idx, _ in asked:
        rows.setdefault(name, []).append(chunk_idx)
    assert max(map(len, told.values())) > 4  # more than are asked about
    for name, places in told.items():
        assert rows[name][0] == places[0]
        assert len(set(rows[name])) == len(rows[name]) == min(4, len(places))


def test_what_the_window_corrects_is_in_the_past_too() -> None:
    _, recipe = small_recipe("long_term", "cpu", num_chunks=30)
    source = recipe._source
    source.chat_share = 0.1
    chunks = source.draw_chunks(30, 40)
    tellers = find_tellers(chunks)
    told = [place for place, chunk in enumerate(chunks) if chunk.facts]
    asked = [source.draw_questions(chunks, source.rng.choice(told), tellers, 1, long=True) for _ in range(100)]
    ages = recipe._memory._histories(asked, tellers, len(chunks)).ages
    corrected = [row for row, [question] in enumerate(asked) if question.reply not in (None, ACKNOWLEDGEMENT)]
    assert len(corrected) > 20
    assert all(ages[row, asked[row][0].chunk] >= 0 for row in corrected)


@pytest.mark.parametrize("num_chunks", [6, 7])
def test_every_second_chunk_is_written_after_the_one_before(num_chunks: int) -> None:
    network, recipe = small_recipe("theta", "cpu", num_chunks=num_chunks)
    assert isinstance(network, TrainableMPlus)
    ids = torch.randint(5, 50, (num_chunks, 40))
    tail = [torch.randn(num_chunks, 4, network.bos_embedding.shape[-1]) for _ in network.layers]
    for before in (tail, None):
        new = recipe._memory._write(ids, before)
        for place in range(num_chunks):
            one = slice(place, place + 1)
            seen = [rows[place - 1 : place] for rows in new] if place % 2 else before and [rows[one] for rows in before]
            for rows, expected in zip(new, network.write(ids[one], seen), strict=True):
                torch.testing.assert_close(rows[one], expected, atol=1e-5, rtol=1e-4)


def test_fewer_tokens_in_a_step_than_are_retrieved_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_chunks is 2, which write 8 memory tokens .* numbers that write 32"):
        small_recipe("long_term", "cpu", num_chunks=2)


def test_the_first_question_of_a_row_alone_queries_and_each_gets_the_answer_that_holds_in_its_past() -> None:
    def question(chunk: int, answers: dict[int, str], reply: str | None = None) -> Question:
        return Question(
            chunk, ("Maya", "home"), answers, Prompt([5, 6, 7], [False, True, True], ()), "Never told.", reply
        )

    twice = question(0, {0: "Oslo.", 1: "Rome."})
    asked = [
        [twice, question(2, {2: "Lima."})],
        [twice],
        [question(2, {}, "I see."), question(2, {2: "Lima."}), question(2, {})],
    ]
    rows = _rows(asked, [[4, 7, 0], [4, 3, 9], [0, 1, -1]])  # injections since each chunk's own
    assert [[answer for _, answer in row] for row in rows] == [
        ["Oslo.", "Lima."],
        ["Rome."],
        ["I see.", "Never told.", "Never told."],
    ]
    for row in rows:
        assert [any(prompt.is_query) for prompt, _ in row] == [True, *[False] * (len(row) - 1)]
        assert all(prompt.ids == [5, 6, 7] for prompt, _ in row)
    assert _first_turns(asked) == [0, 2, 3]


@given(st.randoms(use_true_random=False), st.integers(2, 30), st.integers(0, 5), st.sampled_from([-3, -1, 1, 2]))
def test_a_chunk_moves_beside_another_and_all_else_keeps_its_order(
    rng: Random, num_chunks: int, num_outside: int, offset: int
) -> None:
    places = rng.sample(range(num_chunks), num_chunks)
    ages = torch.tensor([age if age < num_chunks - num_outside else -1 for age in places])
    inside = [chunk for chunk in range(num_chunks) if ages[chunk] >= 0]
    if not inside:
        return
    chunk = rng.choice(inside)
    other = rng.choice([item for item in range(num_chunks) if item != chunk])
    before = ages.clone()
    has_moved = move_beside(ages, chunk, other, offset)
    assert sorted(ages.tolist()) == sorted(before.tolist())
    assert has_moved == (int(before[chunk]) + offset in [age for age in before.tolist() if age >= 0])
    assert ages[other] == (before[chunk] + offset if has_moved else before[other])
    moved = set((ages != before).nonzero()[:, 0].tolist())
    assert chunk not in moved
    assert moved <= {other, *(before == before[chunk] + offset).nonzero()[:, 0].tolist()}


def test_what_was_written_after_another_telling_is_right_after_it_and_holds() -> None:
    _, recipe = small_recipe("long_term", "cpu", num_chunks=40)
    source, in_order, others = recipe._source, 0, 0
    for _ in range(10):
        chunks = source.draw_chunks(40, 60)
        tellers = find_tellers(chunks)
        told = [place for place, chunk in enumerate(chunks) if chunk.facts]
        asked = [source.draw_questions(chunks, source.rng.choice(told), tellers, 2) for _ in range(60)]
        histories = recipe._memory._histories(asked, tellers, len(chunks)).ages.tolist()
        for questions, ages, row in zip(asked, histories, _rows(asked, histories), strict=True):
            for question, (_, answer) in zip(questions, row, strict=True):
                pairs = [(at, at + 1) for at in question.answers if at + 1 in question.answers]
                for earlier, later in pairs:
                    if min(ages[earlier], ages[later]) < 0:
                        continue
                    if later % 2 == 0:
                        others += 1
                        continue
                    in_order += 1
                    assert ages[earlier] == ages[later] + 1
                    if len(question.answers) == 2:
                        assert answer == question.answers[later]
    assert min(in_order, others) > 10


def test_all_tellings_in_the_past_are_wanted_of_the_retriever() -> None:
    def question(answers: dict[int, str]) -> Question:
        return Question(0, ("Maya", "home"), answers, Prompt([5], [True], ()), "Never told.")

    tells = _tells([question({0: "Oslo.", 2: "Rome."}), question({}), question({1: "Lima.", 3: "Bern."})], _AGES)
    assert tells.tolist() == [[True, False, True, False], [False] * 4, [False, True, False, False]]


@pytest.mark.parametrize(("kind", "step"), [("long_term", 10), ("long_term", 11), ("theta", 3)])
def test_a_step_after_going_on_is_the_step_it_would_have_been(kind: StepKind, step: int) -> None:
    options = SmallStage(kind, 40, 8, 6, queue_steps=2, context_every=10, long_prompt_every=3, chat_share=0.5)
    network, codec = build_network(stage())
    for seed in range(4):
        first = SmallRecipe(network, EpisodeSource.load(codec, [_PROSE], seed=seed), options)
        torch.manual_seed(seed)
        for number in range(step - 2, step):
            first.loss(number)
        state, generator = first.state_dict(), torch.get_rng_state()
        expected = [first.loss(number)[0].item() for number in range(step, step + 3)]
        again = SmallRecipe(network, EpisodeSource.load(codec, [_PROSE], seed=99), options)
        again.load_state_dict(state)
        torch.set_rng_state(generator)
        assert [again.loss(number)[0].item() for number in range(step, step + 3)] == expected
