"""Chunks and questions of the small recipe: what they claim to tell is in their text, and answers follow from it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

import mplus_agents
from mplus_agents.engine.text import TextCodec
from mplus_agents.language import USER, relation
from mplus_agents.training.episodes import ACKNOWLEDGEMENT, EpisodeSource, batch_prompts, find_tellers
from mplus_agents.training.small_metrics import exact_answers

_TINY = Path(mplus_agents.__file__).parent / "assets" / "mplus-tiny"
_END = 1


@pytest.fixture(scope="module")
def source() -> EpisodeSource:
    codec = TextCodec.from_pretrained(_TINY)
    return EpisodeSource.load(codec, ["There was a long road to the sea and back again. " * 60], seed=3)


@pytest.mark.parametrize("num_tokens", [24, 64])
def test_chunks_are_full_and_tell_what_they_claim(source: EpisodeSource, num_tokens: int) -> None:
    chunks = source.draw_chunks(200, num_tokens)
    assert {len(chunk.ids) for chunk in chunks} == {num_tokens}
    assert any(not chunk.facts for chunk in chunks)
    told = [(chunk, fact) for chunk in chunks for fact in chunk.facts]
    assert len(told) > 100
    for chunk, fact in told:
        text = source.codec.decode(chunk.ids)
        assert fact.value.lower() in text.lower()
        assert fact.is_own or fact.person in text


def test_a_question_is_answered_by_the_chunks_that_tell_it(source: EpisodeSource) -> None:
    chunks = source.draw_chunks(200, 64)
    tellers = find_tellers(chunks)
    places = [place for place, chunk in enumerate(chunks) if chunk.facts]
    num_unknown = num_own = 0
    for place in places:
        for question in source.draw_questions(chunks, place, tellers, 3):
            person, kind = question.key
            form = relation(kind).own_answer if person == USER else relation(kind).answer
            assert question.unknown == form.format(p=person, v="not known to me")
            if not question.answers:
                num_unknown += 1
                assert question.key not in {fact.key for fact in chunks[place].facts}
                assert person == USER or question.key not in tellers
                num_own += person == USER
                continue
            for holder, answer in question.answers.items():
                facts = {fact.key: fact for fact in chunks[holder].facts}
                assert facts[question.key].answer() == answer
            assert place in question.answers
    assert num_unknown > num_own > 0


def test_a_chunk_tells_all_its_facts_and_several_in_a_turn(source: EpisodeSource) -> None:
    shared, own_in_text = 0, 0
    for chunk in source.draw_chunks(400, 64):
        text = source.codec.decode(chunk.ids)
        assert all(fact.value.lower() in text.lower() for fact in chunk.facts)
        turns = text.count("User: ")
        shared += 0 < turns < len(chunk.facts)
        own_in_text += not turns and any(fact.is_own for fact in chunk.facts)
    assert shared > 0
    assert own_in_text > 0


def test_chat_turns_are_answered_by_the_prompt_itself(source: EpisodeSource) -> None:
    talker = EpisodeSource(source.codec, source.prose, source.starts, Random(5), chat_share=0.1)
    chunks = talker.draw_chunks(100, 64)
    tellers = find_tellers(chunks)
    places = [place for place, chunk in enumerate(chunks) if chunk.facts]
    questions = [talker.draw_questions(chunks, talker.rng.choice(places), tellers, 1, long=True)[0] for _ in range(300)]
    replies = [question for question in questions if question.reply is not None]
    told = [question for question in replies if question.reply != ACKNOWLEDGEMENT]
    assert 0.3 < len(replies) / len(questions) < 1
    assert 0 < len(told) < len(replies)
    assert all(not question.answers for question in replies if question.reply == ACKNOWLEDGEMENT)
    for question in told:
        # memory holds another value
        assert question.chunk in question.answers
        assert question.key in {fact.key for fact in chunks[question.chunk].facts}
        person, kind = question.key
        assert question.reply is not None
        form = relation(kind).own_answer if person == USER else relation(kind).answer
        start, end = form.format(p=person, v="\0").split("\0")
        value = question.reply.removeprefix(start).removesuffix(end)
        assert value.lower() in talker.codec.decode(question.prompt.ids).lower()
    assert all(question.reply is None for question in source.draw_questions(chunks, places[0], tellers, 3))


def test_targets_are_the_answers_one_token_ahead(source: EpisodeSource) -> None:
    chunks = source.draw_chunks(40, 64)
    tellers = find_tellers(chunks)
    places = [place for place, chunk in enumerate(chunks) if len(chunk.facts) > 1]
    rows = [
        [(question.prompt, f"Answer {place}.") for question in source.draw_questions(chunks, place, tellers, 2)]
        for place in places
    ]
    batch = batch_prompts(source.codec, rows, _END)
    for row, turns in enumerate(rows):
        whole = [i for prompt, answer in turns for i in (*prompt.ids, *source.codec.encode(answer), _END)]
        wanted = [i for _, answer in turns for i in (*source.codec.encode(answer), _END)]
        assert batch.input_ids[row, : len(whole) - 1].tolist() == whole[:-1]
        assert batch.targets[row][batch.targets[row] >= 0].tolist() == wanted
        assert int(batch.is_query[row].sum()) == sum(sum(prompt.is_query) for prompt, _ in turns)


def test_an_answer_is_exact_only_if_every_token_is(source: EpisodeSource) -> None:
    chunks = source.draw_chunks(40, 64)
    tellers = find_tellers(chunks)
    place = next(place for place, chunk in enumerate(chunks) if len(chunk.facts) > 1)
    turns = [(question.prompt, "It is so.") for question in source.draw_questions(chunks, place, tellers, 2)]
    batch = batch_prompts(source.codec, [turns, turns[:1]], _END)
    targets = batch.targets[batch.targets >= 0]
    logits = torch.nn.functional.one_hot(targets, len(source.codec.tokenizer)).float()
    assert exact_answers(logits, batch).tolist() == [1.0, 1.0, 1.0]
    second = len(source.codec.encode("It is so.")) + 2  # a token of the second answer
    logits[second] = logits[second].roll(1)
    assert exact_answers(logits, batch).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("hard", "least", "most", "last"), [(1.0, 0.5, 0.8, 0.25), (0.0, 0.3, 0.5, 0.0)])
def test_hard_chunks_end_with_what_they_tell_and_their_last_fact_is_asked_for_more(
    source: EpisodeSource, hard: float, least: float, most: float, last: float
) -> None:
    source.hard = hard
    chunks = [chunk for chunk in source.draw_chunks(600, 64) if chunk.facts]
    ends = []
    for chunk in chunks:
        text, fact = source.codec.decode(chunk.ids), chunk.facts[-1]
        rest = text[text.lower().rindex(fact.value.lower()) :]
        ends.append(not any(word in rest for word in ("There", "long", "road", "sea", "again")))
    assert least < sum(ends) / len(ends) < most  # also full ones, and what a random cut leaves
    tellers = find_tellers(chunks)
    asked = [
        question.key == chunk.facts[-1].key
        for place, chunk in enumerate(chunks)
        if len(chunk.facts) == 4
        for _ in range(20)
        for question in source.draw_questions(chunks, place, tellers, 1)
    ]
    wanted = 0.95 * (last + (1 - last) / 4)  # one in twenty is unknown
    assert sum(asked) / len(asked) == pytest.approx(wanted, abs=0.04)


@pytest.mark.parametrize(("hard", "numbers", "value_first"), [(1.0, 3 / 19, 0.57), (0.0, 1 / 17, 0.39)])
def test_hard_chunks_tell_numbers_and_values_before_their_persons_more_often(
    source: EpisodeSource, hard: float, numbers: float, value_first: float
) -> None:
    source.hard = hard
    chunks = source.draw_chunks(1500, 64)
    facts = [fact for chunk in chunks for fact in chunk.facts]
    assert sum(fact.relation.name == "number" for fact in facts) / len(facts) == pytest.approx(numbers, abs=0.02)
    first = []
    for chunk in chunks:
        text = source.codec.decode(chunk.ids)
        if len(chunk.facts) == 1 and not chunk.facts[0].is_own:
            first.append(text.index(chunk.facts[0].value) < text.index(chunk.facts[0].person))
    assert sum(first) / len(first) == pytest.approx(value_first, abs=0.08)
