"""The numbers that the docs state are those that were measured and saved, with the weights in the package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mplus_agents.evaluation.engines import load

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
ROWS = {
    "with Θ": "mplus",
    "θ alone (MemoryLLM)": "theta_only",
    "Θ read at random": "random",
    "all text in the prompt, while it fits": "full_context",
    "the end of the text in the prompt": "window",
    "with the long-term memory Θ": "mplus",
    "the same weights, Θ off": "theta_only",
}
PAGES = {
    "docs/evaluation.md": 5,
    "mplus_agents/assets/mplus-tiny/README.md": 5,
    "README.md": 2,
}
CONDITIONS = {"bare", "chain", "chain-window", "value-first", "unknown", "k128", "own", "updated"}


def result(name: str) -> dict[str, Any]:
    """Return a saved result."""
    saved: dict[str, Any] = json.loads((RESULTS / f"mplus-tiny-{name}.json").read_text(encoding="utf-8"))
    return saved


def is_of_other_weights(saved: dict[str, Any], packaged: dict[str, str]) -> bool:
    """Tell whether a result was measured with other weights, or with another θ, than the packaged ones."""
    return any(saved["weights"][key] != packaged[key] for key in ("weights", "memory.max_short_term"))


def cells(line: str) -> list[str]:
    """Return the cells of a Markdown row, without bold."""
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_retention_say_what_was_measured(page: str) -> None:
    saved = {(point["variant"], point["distance"]): point["accuracy"] for point in result("retention")["points"]}
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    heads = [number for number, line in enumerate(lines) if re.match(r"\| chunks .*between \| 0 \|", line)]
    assert len(heads) == 1
    distances = [int(cell.replace(",", "")) for cell in cells(lines[heads[0]])[1:]]
    rows = [cells(line) for line in lines[heads[0] + 2 : heads[0] + 2 + PAGES[page]]]
    for name, *shown in rows:
        measured = [saved.get((ROWS[name], distance)) for distance in distances]
        assert [None if cell == "–" else float(cell) for cell in shown] == measured, name
    assert len({name for name, *_ in rows}) == PAGES[page]


def test_tables_are_those_that_the_command_writes() -> None:
    command = [sys.executable, "benchmarks/result_tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_retention_was_measured_in_full_with_the_packaged_weights() -> None:
    saved = result("retention")
    assert saved["weights"] == load("mplus-tiny").weights
    assert saved["is_complete"]
    assert saved["streams"] >= 50
    assert {point["episodes"] for point in saved["points"]} == {200}


def test_table_of_other_conditions_says_what_was_measured_and_marks_other_weights() -> None:
    packaged = load("mplus-tiny").weights
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    row = r"^\| (.*)\(\[numbers\]\(results/mplus-tiny-([a-z0-9-]+)\.json\)\)( †)? \|(.*)$"
    rows = re.findall(row, text, re.MULTILINE)
    assert {name for _, name, _, _ in rows} == CONDITIONS
    for label, name, mark, numbers in rows:
        saved = result(name)
        field = "superseded" if "the earlier value" in label else "accuracy"
        points = {point["distance"]: point[field] for point in saved["points"] if point["variant"] == "mplus"}
        asked = saved["settings"]["num_retrieved"] or saved["settings"]["memory"]["num_retrieved"]
        measured = [asked, *(points[distance] for distance in (0, 64, 512))]
        assert [float(cell) for cell in cells(numbers)] == measured, name
        assert bool(mark) == is_of_other_weights(saved, packaged), name


def test_table_of_the_retriever_says_what_was_measured() -> None:
    saved: dict[int, list[float]] = {}
    for point in sorted(result("retriever")["points"], key=lambda point: (point["size"], point["layer"])):
        saved.setdefault(point["size"], []).append(point["recall"])
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for size, recalls in saved.items():
        row = next(line for line in text.splitlines() if re.match(rf"\| {size:,} \| \.\d+ \|", line))
        assert [float(cell) for cell in cells(row)[2:]] == pytest.approx(recalls, abs=5e-4)


def test_table_of_corrections_says_what_was_measured() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in re.findall(r"^\| \d+ \| (?:before|while|once) .*$", text, re.MULTILINE)]
    measured = [(point["distance"], point["earlier"], point["later"]) for point in result("corrections")["points"]]
    assert [(int(row[0]), float(row[2]), float(row[3])) for row in rows] == measured
    assert all(sum(map(float, row[2:])) == pytest.approx(1) for row in rows)


def test_numbers_of_a_memory_that_is_not_full_are_those_measured() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    shown = re.search(r"mplus-tiny-fresh\.json\)\)( †)?: (\S+), (\S+), (\S+) right", text)
    assert shown is not None
    saved = result("fresh")
    measured = {point["distance"]: point["accuracy"] for point in saved["points"] if point["variant"] == "mplus"}
    assert {distance: float(number) for distance, number in zip((0, 2, 8), shown.groups()[1:], strict=True)} == measured
    assert bool(shown[1]) == is_of_other_weights(saved, load("mplus-tiny").weights)
