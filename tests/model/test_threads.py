"""One model, several threads: what a thread computes does not depend on what the others do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from mplus_agents.model import MPlusModel
from tests.model.samples import checkpoint, published, tokens

Results = list[torch.Tensor]


def _live(model: MPlusModel, seed: int, num_rounds: int) -> Results:
    """Write and read in turn; return every number that came out."""
    memory = model.initial_memory(seed)
    results: Results = []
    for step in range(num_rounds):
        delta = model.write(tokens(5 + (seed + step) % 20, 100 * seed + step), memory)
        memory.apply(delta)
        question = tokens(1 + (3 * seed + step) % 17, 7_000 + 100 * seed + step)
        results += [delta.hidden, delta.keys, model.read(question, memory).logits]
    return results


def _generate(model: MPlusModel, seed: int, num_rounds: int) -> Results:
    memory = model.initial_memory(seed)
    return [model.generate(tokens(4 + step % 5, seed + step), memory, max_new_tokens=6) for step in range(num_rounds)]


def _sample(model: MPlusModel, seed: int, num_rounds: int) -> Results:
    memory = model.initial_memory(seed)
    return [
        model.generate(tokens(4, seed + step), memory, max_new_tokens=6, do_sample=True, top_k=20, seed=step)
        for step in range(num_rounds)
    ]


def _together(tasks: list[Callable[[], Results]]) -> list[Results]:
    barrier = threading.Barrier(len(tasks))

    def start(task: Callable[[], Results]) -> Results:
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(start, task) for task in tasks]]


def _assert_same(alone: list[Results], together: list[Results]) -> None:
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) > 0
        for left, right in zip(one, other, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("name", ["mplus", "memoryllm"])
def test_two_threads_reading_and_writing_are_bit_for_bit_alone(name: str) -> None:
    model = published(name)
    tasks: list[Callable[[], Results]] = [lambda seed=seed: _live(model, seed, 30) for seed in (1, 2)]  # type: ignore[misc]
    _assert_same([task() for task in tasks], _together(tasks))


def test_four_threads_with_different_work_are_bit_for_bit_alone() -> None:
    model = published("mplus")
    tasks: list[Callable[[], Results]] = [
        lambda: _live(model, 3, 30),
        lambda: _live(model, 4, 30),
        lambda: _generate(model, 5, 20),
        lambda: _sample(model, 6, 20),
    ]
    _assert_same([task() for task in tasks], _together(tasks))


def test_threads_may_share_one_memory_for_reading() -> None:
    model = published("mplus")
    memory = model.initial_memory(0)
    memory.apply(model.write(tokens(20), memory))
    questions = [tokens(9, seed) for seed in range(4)]
    alone = [[model.read(question, memory).logits] * 10 for question in questions]
    tasks: list[Callable[[], Results]] = [
        lambda question=question: [model.read(question, memory).logits for _ in range(10)]  # type: ignore[misc]
        for question in questions
    ]
    _assert_same(alone, _together(tasks))


def test_a_shorter_rope_table_of_another_thread_is_not_taken() -> None:
    # Between making a long table and using it, another thread may put a short one in its place.
    model = MPlusModel.from_pretrained(checkpoint("mplus"), device="cpu")
    short = tuple(part[:4].clone() for part in model.rope_table(4))

    class Meddled(MPlusModel):
        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, short if name == "_rope" else value)

    model.__class__ = Meddled
    cos, sin = model.rope_table(2_000)
    assert cos.shape[0] == sin.shape[0] == 2_000
