"""The retriever's recall, where it is known beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation.retriever import RetrieverSettings, run_retriever
from tests.evaluation.runs import prose_file


def test_who_retrieves_everything_finds_everything(tmp_path: Path) -> None:
    settings = RetrieverSettings(sizes=(96,), questions=2, num_retrieved=200, prose=prose_file(tmp_path), device="cpu")
    result = run_retriever(settings)
    assert {(point.recall, point.found, point.random) for point in result.points} == {(1.0, 1.0, 1.0)}
    assert [point.layer for point in result.points] == list(range(len(result.points)))
    assert {point.size for point in result.points} == {96}


def test_chance_is_the_share_of_the_retrieved_and_runs_repeat(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    settings = RetrieverSettings(
        sizes=(200, 96), questions=2, num_retrieved=20, prose=prose_file(tmp_path), device="cpu"
    )
    result = run_retriever(settings, lambda done, total: steps.append((done, total)))
    assert {(point.size, point.random) for point in result.points} == {
        (96, 20 / 96),
        (200, 20 / 224),
    }  # 7 injections of 32
    assert all(0 <= point.recall <= point.found <= 1 for point in result.points)
    assert len(steps) == steps[0][1]
    assert run_retriever(settings) == result


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InvalidInputError, match="prose is ''"):
        run_retriever(RetrieverSettings(sizes=(64,), questions=1, prose=str(tmp_path / "empty.txt"), device="cpu"))
    with pytest.raises(InvalidInputError, match="sizes is 9999999999; allowed: at most what Θ holds"):
        run_retriever(RetrieverSettings(sizes=(9_999_999_999,), device="cpu"))
    with pytest.raises(InvalidInputError, match="sizes is \\(0,\\); allowed: different whole numbers from 1"):
        RetrieverSettings(sizes=(0,))
    with pytest.raises(InvalidInputError, match="questions is 0"):
        RetrieverSettings(questions=0)
