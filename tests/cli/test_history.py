"""An agent's past on the command line, and how branches are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mplus_agents.cli.graph import draw_graph
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("parents", "drawing"),
    [
        ({3: 2, 2: 1, 1: None}, ["* 3", "* 2", "* 1"]),
        ({6: 4, 5: 3, 4: 2, 3: 2, 2: 1, 1: None}, ["* 6", "| * 5", "* | 4", "| * 3", "|/", "* 2", "* 1"]),
        (
            {9: 5, 8: 4, 7: 5, 6: None, 5: 1, 4: 1, 1: None},
            ["* 9", "| * 8", "| | * 7", "| | | * 6", "|_|/", "* | 5", "| * 4", "|/", "* 1"],
        ),
        ({4: 1, 3: 1, 2: 1, 1: None}, ["* 4", "| * 3", "| | * 2", "|_|/", "|/", "* 1"]),
        ({5: 1, 4: 1, 3: 2}, ["* 5", "| * 4", "| | * 3"]),  # cut off
    ],
)
def test_branches_are_drawn_where_they_meet(parents: dict[int, int | None], drawing: list[str]) -> None:
    lines = [f"{drawn} {commit_id or ''}".rstrip() for drawn, commit_id in draw_graph(list(parents.items()))]
    assert lines == drawing


def test_a_life_with_a_fork_and_a_tag(mplus: Run, tmp_path: Path) -> None:
    for number, text in enumerate(("Maya lives in Oslo.", "Maya lives in Bergen.")):
        path = tmp_path / f"{number}.txt"
        path.write_text(text * 10, encoding="utf-8")
        mplus("read", str(path), "--agent", "alice", "--source-id", f"[bold]{number}")
        if number == 0:
            tagged = mplus("tag", "before-the-move", "--agent", "alice")
            assert tagged.stderr == "mplus: before-the-move is commit 1 of agent 'alice'\n"
            forked = mplus("fork", "bob", "--agent", "alice")
            assert forked.stderr == "mplus: agent 'bob' begins with what 'alice' remembers\n"
    told = [json.loads(line) for line in mplus("log", "--agent", "alice", "--json").stdout.splitlines()]
    assert [item["commit_id"] for item in told] == list(range(len(told), 0, -1))
    assert (told[-1]["tags"], told[-1]["source_ids"], told[-1]["step"]) == (["before-the-move"], ["[bold]0"], 0)
    assert [item["heads"] for item in told] == [["alice"], []]
    assert told[-1]["text"].startswith("Maya lives in Oslo.")
    shown = mplus("log", "--agent", "alice").stdout
    assert "(before-the-move) [bold]0 Maya lives in Oslo." in shown
    assert len([line for line in shown.splitlines() if line.startswith("*")]) == len(told)
    everyone = mplus("log", "--all").stdout
    assert "(bob, alice:before-the-move)" in everyone
    assert "(alice)" in everyone
    assert len(mplus("log", "--agent", "bob", "--json").stdout.splitlines()) == 1
    assert len(mplus("log", "--agent", "alice", "--limit", "1", "--json").stdout.splitlines()) == 1
    now = mplus("ask", "Where does Maya live?", "--agent", "alice").stdout
    before = mplus("ask", "Where does Maya live?", "--agent", "alice", "--at", "before-the-move").stdout
    assert (before, now) == ("The home of Maya is Oslo.\n", "The home of Maya is Bergen.\n")
    assert mplus("tag", "before-the-move", "--agent", "alice", "--remove").exit_code == 0
    refused = mplus("ask", "Where?", "--agent", "alice", "--at", "before-the-move")
    assert refused.exit_code == 1
    assert "mplus: error: COMMIT is 'before-the-move'; allowed: a commit's id, or a tag" in refused.stderr


def test_what_there_is_not(mplus: Run, book: Path) -> None:
    assert mplus("log").exit_code == 1  # no database
    mplus("read", str(book), "--agent", "alice")
    unknown = mplus("log", "--agent", "nobody")
    assert (unknown.exit_code, "there is no agent 'nobody'" in unknown.stderr) == (1, True)
    for arguments in (("fork", "a/b"), ("tag", "a/b"), ("tag", "7"), ("tag", "x", "--commit", "99")):
        refused = mplus(*arguments, "--agent", "alice")
        assert refused.exit_code == 1
        assert "; allowed: " in refused.stderr


def test_a_copy_of_nobody_makes_no_database(mplus: Run, book: Path, tmp_path: Path) -> None:
    mplus("read", str(book), "--agent", "alice")
    assert mplus("copy", "sqlite:///new.db", "--agent", "nobody").exit_code == 1
    assert not (tmp_path / "new.db").exists()
    refused = mplus("copy", "nosuch://x", "--agent", "alice")
    assert "mplus: error: URL is 'nosuch://x'; allowed: an SQLAlchemy Engine, or a URL" in refused.stderr


def test_a_copy_answers_in_its_own_file(mplus: Run, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("Maya lives in Oslo. The dog of Maya is called Bako.", encoding="utf-8")
    mplus("read", str(path), "--agent", "alice")
    copied = mplus("copy", "sqlite:///alice.db", "--agent", "alice", "--name", "again", "--json")
    assert json.loads(copied.stdout) == {
        "agent": "again",
        "store": "sqlite:///alice.db",
        "num_commits": 0,
        "num_events": 1,
    }
    answer = mplus("ask", "Where does Maya live?", "--agent", "again", "--store", "sqlite:///alice.db")
    assert answer.stdout == "The home of Maya is Oslo.\n"
    again = mplus("copy", "sqlite:///alice.db", "--agent", "alice", "--name", "again")
    assert (again.exit_code, "agent 'again' exists already" in again.stderr) == (1, True)
