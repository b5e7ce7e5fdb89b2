"""Results as files, tables and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation.report import (
    Point,
    Result,
    RetrieverPoint,
    RetrieverResult,
    comparison_table,
    differences,
    load_comparable,
    load_result,
    result_table,
    retriever_table,
    save_result,
)


def result(**changes: Any) -> Result:
    shares = {"accuracy": 0.5, "episodes": 4, "contains": 0.75, "unknown": 0.25}
    values: dict[str, Any] = {
        "kind": "retention",
        "seed": 1,
        "versions": {"torch": "2"},
        "weights": {"weights": "abc"},
        "model": "mplus-tiny",
        "settings": {"condition": "plain"},
        "streams": 2,
        "episodes": 4,
        "left_in_theta": {0: 1.0, 512: 0.0},
        "points": [
            Point(variant="mplus", distance=0, **shares),
            Point(variant="mplus", distance=512, **{**shares, "accuracy": 0.25}, superseded=0.5),
            Point(variant="theta_only", distance=0, **{**shares, "contains": 0.5}),
        ],
    }
    return Result(**{**values, **changes})


def retriever_result() -> RetrieverResult:
    points = [
        RetrieverPoint(size=size, layer=layer, recall=0.5, found=0.75, random=0.1, questions=8)
        for size in (100, 1_000)
        for layer in (0, 1)
    ]
    common = {"seed": 1, "versions": {}, "weights": {}, "model": "m", "settings": {}}
    return RetrieverResult(kind="retriever", num_retrieved=10, memories=3, points=tuple(points), **common)


def shown(table: Table) -> list[list[str]]:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return [line.split() for line in captured.get().splitlines()]


@pytest.mark.parametrize("saved", [result(), retriever_result()])
def test_a_result_is_read_as_it_was_saved(saved: Result | RetrieverResult, tmp_path: Path) -> None:
    save_result(saved, tmp_path / "r.json")
    assert load_result(tmp_path / "r.json") == saved
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_points_have_the_promised_fields(tmp_path: Path) -> None:
    save_result(result(), tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert {"seed", "versions", "weights", "model", "settings", "streams", "episodes"} <= set(content)
    for point in content["points"]:
        types = {name: type(point[name]) for name in ("variant", "distance", "accuracy", "episodes", "contains")}
        assert types == {"variant": str, "distance": int, "accuracy": float, "episodes": int, "contains": float}
        assert "superseded" in point or point["distance"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "JSON that `mplus eval` has written"),
        (b"[]", "JSON that `mplus eval` has written"),
        (b"{}", "kind: Field required|seed: Field required"),
        (b"\xff", "JSON that `mplus eval` has written"),
    ],
)
def test_what_is_no_result_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(InvalidInputError, match=message):
        load_result(tmp_path / "r.json")


@pytest.mark.parametrize("change", [{"accuracy": 1.5}, {"distance": -1}, {"episodes": 0}, {"f1": 0.5}])
def test_a_wrong_point_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    content = json.loads(result().model_dump_json())
    content["points"][0].update(change)
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInputError, match=f"points.0.{next(iter(change))}"):
        load_result(tmp_path / "r.json")


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="a file that can be read \\(No such file"):
        load_result(tmp_path / "none.json")
    with pytest.raises(InvalidInputError, match=r"output is .*; allowed: a file that can be written"):
        save_result(result(), tmp_path / "no" / "r.json")


def test_a_table_has_a_row_per_distance() -> None:
    rows = shown(result_table(result()))
    assert ["chunks", "mplus", "theta_only"] in rows
    assert ["0", "0.500", "(0.750)", "0.500"] in rows
    assert ["512", "0.250", "(0.750,", "old", "0.500)", "–"] in rows


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    for name in ("old", "new"):
        save_result(result(seed=len(name)), tmp_path / f"{name}.json")
    results = load_comparable([tmp_path / "old.json", tmp_path / "new.json"])
    assert [label for label, _ in results] == ["old", "new"]
    rows = shown(comparison_table(results))
    assert ["0", "0.500", "(0.750)", "0.500", "0.500", "(0.750)", "0.500"] in rows


def test_what_differs_is_said(tmp_path: Path) -> None:
    runs = [("old", result()), ("new", result(seed=9, settings={"condition": "unknown"}, is_complete=False))]
    assert differences(runs) == [
        "new is not complete",
        f"the runs differ in seed: {result().seed} in old, 9 in new",
        "the runs differ in condition: 'plain' in old, 'unknown' in new",
    ]
    assert differences(runs[:1] * 2) == []
    changes: list[dict[str, Any]] = [{"streams": 25}, {"episodes": 9}, {"weights": {"weights": "other"}}]
    changes += [{"settings": {**result().settings, name: 7}} for name in ("gap", "max_new_tokens")]
    for change in changes:
        [found] = differences([("old", result()), ("new", result(**change))])
        assert found.startswith(f"the runs differ in {list(change.get('settings', change))[-1]}: ")


def test_labels_are_no_markup() -> None:
    assert "run[old]" in " ".join(" ".join(row) for row in shown(comparison_table([("run[old]", result())])))


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    save_result(result(), tmp_path / "a.json")
    save_result(result(kind="qa"), tmp_path / "b.json")
    save_result(retriever_result(), tmp_path / "c.json")
    with pytest.raises(InvalidInputError, match="results of one kind"):
        load_comparable([tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(InvalidInputError, match="a result of `mplus eval retention` or `mplus eval qa`"):
        load_comparable([tmp_path / "c.json"])


def test_the_retrievers_table_has_a_row_per_size() -> None:
    assert ["1,000", "0.500", "0.500", "0.500", "0.100", "8"] in shown(retriever_table(retriever_result()))


def test_figures_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from mplus_agents.evaluation.figures import draw_retention, draw_retriever

    draw_retention([("a", result()), ("b", result())], tmp_path / "a.png")
    draw_retriever(retriever_result(), tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))
    with pytest.raises(InvalidInputError, match=r"figure is .*; allowed: a picture file"):
        draw_retention([("a", result())], tmp_path / "a.txt2")


def test_without_matplotlib_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mplus_agents.evaluation.figures import check_figures

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidInputError, match=r'pip install "mplus-agents\[eval\]"'):
        check_figures()
