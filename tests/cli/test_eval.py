"""`mplus eval`: small runs, saved and compared; what is refused, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mplus_agents.cli import evaluate
from mplus_agents.evaluation import qa, retriever, settings
from tests.cli.conftest import Run
from tests.engine.engines import prose

_SMALL = ("--episodes", "2", "--streams", "1", "--distances", "0,1", "--max-new-tokens", "2", "--prose", "prose.txt")


@pytest.fixture(autouse=True)
def _prose_file(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(prose(1_500), encoding="utf-8")


def read(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_defaults_are_the_experiments() -> None:
    assert tuple(map(int, evaluate.DEFAULT_DISTANCES.split(","))) == settings.DEFAULT_DISTANCES
    assert tuple(map(int, evaluate.DEFAULT_SIZES.split(","))) == retriever.DEFAULT_SIZES
    assert tuple(map(int, evaluate.DEFAULT_STEPS.split(","))) == qa.DEFAULT_STEPS
    assert evaluate.DEFAULT_EPISODES == settings.DEFAULT_EPISODES


@pytest.mark.parametrize("command", ["retention", "retriever", "qa", "compare"])
def test_help_has_an_example(mplus: Run, command: str) -> None:
    result = mplus("eval", command, "--help")
    assert result.exit_code == 0
    assert f"$ mplus eval {command} " in result.stdout


def test_retention_is_saved_drawn_and_compared(mplus: Run) -> None:
    pytest.importorskip("matplotlib")
    result = mplus("eval", "retention", "--seed", "3", *_SMALL, "--output", "a.json", "--figure")
    assert result.exit_code == 0, result.output
    assert "1 streams, 2 episodes per point, seed 3" in result.stdout
    saved = read("a.json")
    assert (saved["seed"], saved["streams"], saved["episodes"], saved["model"]) == (3, 1, 2, "mplus-tiny")
    assert {(point["variant"], point["distance"]) for point in saved["points"]} == {
        (variant, distance)
        for variant in ("mplus", "theta_only", "random", "full_context", "window")
        for distance in (0, 1)
    }
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    printed = mplus("eval", "retention", "--seed", "3", *_SMALL, "--json")
    assert json.loads(printed.stdout) == saved
    Path("b.json").write_bytes(Path("a.json").read_bytes())
    compared = mplus("eval", "compare", "a.json", "b.json", "--figure", "both.png")
    assert compared.exit_code == 0
    labels = compared.stdout.splitlines()[1].split()
    assert labels == ["a"] * 5 + ["b"] * 5
    assert Path("both.png").exists()


def test_a_template_may_be_a_file(mplus: Run) -> None:
    Path("prompt.txt").write_text("Human: {question}\nAI:")
    options = ("--template", "prompt.txt", "--condition", "unknown", "--json")
    result = mplus("eval", "retention", *_SMALL, *options)
    assert result.exit_code == 0, result.output
    used = json.loads(result.stdout)["settings"]
    assert (used["template"], used["condition"]) == ("Human: {question}\nAI:", "unknown")


def test_the_retriever_is_measured(mplus: Run) -> None:
    options = ("--sizes", "640", "--questions", "1", "--prose", "prose.txt", "--output", "r.json")
    result = mplus("eval", "retriever", *options)
    assert result.exit_code == 0, result.output
    assert "tokens in Θ" in result.stdout
    assert {point["size"] for point in read("r.json")["points"]} == {640}
    assert "a result of `mplus eval retention`" in mplus("eval", "compare", "r.json").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retention", "--episodes", "10", "--streams", "20"), "--streams is 20; allowed: a whole number from 1"),
        (("retention", "--distances", "1,x"), "--distances is '1,x'; allowed: whole numbers with commas between"),
        (("retention", "--figure"), "--figure is True; allowed: True together with --output FILE"),
        (("retention", "--output", "x.png", "--figure"), "--output is 'x.png'; allowed: a file for the numbers"),
        (("retention", "--output", "."), "--output is '.'; allowed: a file in a folder that exists"),
        (("retention", "--output", "no/r.json"), "--output is 'no/r.json'; allowed: a file in a folder that exists"),
        (("retention", "--template", "none.txt"), "--template is 'none.txt'; allowed: a text with {question} in it"),
        (("retention", *_SMALL, "--model", "nothing-there"), "nothing-there"),
        (("retriever", "--sizes", "0"), "--sizes is (0,)"),
        (("compare", "none.json"), "a file that can be read"),
        (("qa", "--dataset", "squad", "--file", "none", "--distractors", "none"), "--file is 'none'"),
    ],
)
def test_errors_are_one_line(mplus: Run, arguments: tuple[str, ...], message: str) -> None:
    result = mplus("eval", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert result.stdout == ""
