"""Every command in this process: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mplus_agents import MPlus, __version__
from mplus_agents.cli import options
from mplus_agents.engine import mplus as engine
from mplus_agents.store import Store
from tests.cli.conftest import Run

STORE = "sqlite:///mplus.db"
_PER_INJECTION, _SHORT_TERM = 32, 832  # K and N of mplus-tiny


def num_injections(name: str = "default") -> int:
    with Store(STORE) as store:
        record = store.find_agent("default", name)
        assert record is not None
        return store.stats(record.id).num_commits


def test_defaults_are_the_engines() -> None:
    assert options.DEFAULT_MODEL == engine.DEFAULT_MODEL
    assert options.DEFAULT_STORE == engine.DEFAULT_STORE
    assert options.DEFAULT_NAMESPACE == engine.DEFAULT_NAMESPACE


def test_version(mplus: Run) -> None:
    result = mplus("--version")
    assert result.exit_code == 0
    assert result.stdout == f"mplus {__version__}\n"


@pytest.mark.parametrize("command", ["chat", "read", "ask", "agents", "stats", "log", "tag", "fork", "copy", "delete"])
def test_help_has_an_example_and_says_what_happens_to_the_memory(mplus: Run, command: str) -> None:
    result = mplus(command, "--help")
    assert result.exit_code == 0
    assert f"mplus {command} " in result.stdout.split("Options")[0].split("Usage:")[1].split("\n", 1)[1]
    assert "memory" in result.stdout or "remember" in result.stdout


def test_no_arguments_show_the_help(mplus: Run) -> None:
    assert "mplus read notes.txt" in mplus().output


def test_read_writes_the_memory_and_says_how_much(mplus: Run, book: Path) -> None:
    result = mplus("read", str(book))
    assert result.exit_code == 0
    assert "tokens in" in result.stdout
    assert "injections" in result.stdout
    assert "agent 'default' is new" in result.stderr
    assert num_injections() > 5


def test_reading_twice_stores_nothing_twice(mplus: Run, book: Path) -> None:
    mplus("read", str(book))
    before = num_injections()
    again = mplus("read", str(book))
    assert again.exit_code == 0
    assert "was read before; nothing of it is stored twice" in again.stdout
    assert "is new" not in again.stderr
    assert num_injections() == before


def test_a_copy_under_another_name_is_the_same_document(mplus: Run, book: Path) -> None:
    mplus("read", str(book))
    copy = book.with_name("copy.txt")
    copy.write_bytes(book.read_bytes())
    assert "was read before" in mplus("read", str(copy)).stdout


def test_no_file_name_reaches_the_database(mplus: Run, book: Path, tmp_path: Path) -> None:
    mplus("read", str(book))
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("mplus.db*"))
    assert b"book.txt" not in stored
    assert str(tmp_path).encode() not in stored


def test_a_named_source_goes_on_when_it_has_grown(mplus: Run, book: Path) -> None:
    mplus("read", str(book), "--source-id", "book")
    before = num_injections()
    book.write_text(book.read_text() * 2)
    result = mplus("read", str(book), "--source-id", "book")
    assert "book went on at character" in result.stdout
    assert num_injections() > before


def test_a_changed_beginning_of_a_named_source_is_an_error(mplus: Run, book: Path) -> None:
    mplus("read", str(book), "--source-id", "book")
    book.write_text("Another " + book.read_text())
    result = mplus("read", str(book), "--source-id", "book")
    assert result.exit_code == 1
    assert result.stderr.startswith("mplus: error: memories is ")


def test_read_takes_standard_input(mplus: Run) -> None:
    result = mplus("read", "-", stdin="Maya lives in Oslo, and her boat is called Tern.")
    assert result.exit_code == 0
    assert result.stdout.startswith("-: ")
    assert "wait verbatim in the window" in result.stdout


def test_read_as_json_is_an_array_of_receipts(mplus: Run, book: Path) -> None:
    result = mplus("read", str(book), "-", "--json", stdin="Maya lives in Oslo.")
    first, second = json.loads(result.stdout)
    assert (first["file"], second["file"]) == (str(book), "-")
    assert first["num_injections"] == len(first["injection_ids"]) > 5
    assert first["num_bytes"] > 0
    assert second["num_injections"] == 0
    assert second["note"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a text file that can be read (No such file or directory)"),
        (b"Oslo \xff\xfe", "a text file in UTF-8 (the bytes from offset 5 on are not)"),
        (b" \n", "a text file that is not empty"),
    ],
)
def test_one_bad_file_of_two_and_nothing_is_read(
    mplus: Run, book: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    bad = tmp_path / "bad.txt"
    if content is not None:
        bad.write_bytes(content)
    result = mplus("read", book.name, bad.name)  # in the folder that both are in: a long path would be shortened
    assert result.exit_code == 1
    assert result.stderr == f"mplus: error: FILE is 'bad.txt'; allowed: {message}\n"
    assert not (tmp_path / "mplus.db").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["read"],
        ["read", "a", "b", "--source-id", "x"],
        ["read", "-", "-"],
        ["ask"],
        ["forget"],
        ["stats", "--nonsense"],
    ],
)
def test_wrong_usage_is_exit_code_2(mplus: Run, arguments: list[str]) -> None:
    assert mplus(*arguments).exit_code == 2


def test_ask_answers_and_writes_nothing(mplus: Run) -> None:
    mplus("read", "-", stdin="Maya lives in Oslo.")
    with Store(STORE) as store:
        before = store.find_agent("default", "default")
    result = mplus("ask", "Where does Maya live?", "--max-new-tokens", "8")
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert "simple English" in result.stderr
    with Store(STORE) as store:
        assert store.find_agent("default", "default") == before


def test_ask_as_json_says_nothing_else(mplus: Run) -> None:
    mplus("read", "-", stdin="Maya lives in Oslo.")
    result = mplus("ask", "Where?", "--max-new-tokens", "8", "--json")
    assert set(json.loads(result.stdout)) == {"question", "answer"}
    assert result.stderr == ""


def test_a_question_that_is_too_long_is_one_line(mplus: Run) -> None:
    mplus("read", "-", stdin="Maya lives in Oslo.")
    result = mplus("ask", "why? " * 3_000)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("mplus: error: prompt (")


@pytest.mark.parametrize("arguments", [["ask", "Where?"], ["stats"], ["delete", "--yes"]])
def test_a_missing_agent_is_an_error_and_is_not_created(mplus: Run, arguments: list[str]) -> None:
    mplus("read", "-", stdin="Maya lives in Oslo.")
    result = mplus(*arguments, "--agent", "bob")
    assert result.exit_code == 1
    assert result.stderr.startswith("mplus: error: there is no agent 'bob' in namespace 'default'")
    with Store(STORE) as store:
        assert [record.name for record in store.list_agents()] == ["default"]


@pytest.mark.parametrize("arguments", [["ask", "Where?"], ["stats"], ["delete", "--yes"], ["agents"]])
def test_a_missing_database_is_an_error_and_is_not_created(mplus: Run, tmp_path: Path, arguments: list[str]) -> None:
    result = mplus(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("mplus: error: there is no database 'mplus.db'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agent", "a/b"], "--agent is 'a/b'; allowed: 1 to 200 printable characters"),
        (["--namespace", ""], "--namespace is ''; allowed: 1 to 200 printable characters"),
        (["--store", "mysql://me:secret@host/db"], "--store is 'mysql://"),
        (["--store", "sqlite:///no/such/folder/m.db"], "the folder of the database does not exist"),
        (["--model", "./nowhere"], "'./nowhere' is neither a folder nor a hub repository"),
        (["--device", "abacus"], "--device is 'abacus'; allowed: a torch device"),
    ],
)
def test_a_bad_option_is_one_line_and_no_secret(mplus: Run, book: Path, arguments: list[str], message: str) -> None:
    result = mplus("read", str(book), *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"mplus: error: {message}")
    assert result.stderr.count("\n") == 1
    assert "secret" not in result.output


def test_options_come_from_the_environment(mplus: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLUS_AGENT", "alice")
    monkeypatch.setenv("MPLUS_STORE", "sqlite:///other.db")
    mplus("read", "-", stdin="Maya lives in Oslo.")
    assert (tmp_path / "other.db").is_file()
    assert [row["name"] for row in json.loads(mplus("agents", "--json").stdout)] == ["alice"]
    monkeypatch.setenv("MPLUS_MODEL", "./nowhere")
    assert "./nowhere" in mplus("stats").stderr


def test_agents_lists_names_by_namespace(mplus: Run) -> None:
    mplus("read", "-", "--agent", "alice", stdin="Maya lives in Oslo.")
    mplus("read", "-", "--agent", "bob", "--namespace", "work", stdin="Maya lives in Oslo.")
    rows = json.loads(mplus("agents", "--json").stdout)
    assert [(row["namespace"], row["name"]) for row in rows] == [("default", "alice"), ("work", "bob")]
    assert {row["num_events"] for row in rows} == {1}
    shown = mplus("agents", "--namespace", "work").stdout
    assert "bob" in shown
    assert "alice" not in shown
    assert "there are no agents" in mplus("agents", "--namespace", "play").stderr


def test_stats_are_the_agents(mplus: Run, book: Path) -> None:
    mplus("read", str(book))
    measured = json.loads(mplus("stats", "--json").stdout)
    assert measured["num_injections"] == num_injections()
    assert measured["short_term_tokens"] == min(_SHORT_TERM, measured["num_injections"] * _PER_INJECTION)
    num_left = max(0, measured["num_injections"] * _PER_INJECTION - _SHORT_TERM)
    assert num_left > 0
    assert measured["long_term_tokens"] == [num_left] * 6
    shown = mplus("stats").stdout
    assert "short-term memory θ" in shown
    assert f"{measured['num_injections']}" in shown


def test_stats_list_every_token(mplus: Run, book: Path) -> None:
    mplus("read", str(book))
    lines = [json.loads(line) for line in mplus("stats", "--tokens", "--json").stdout.splitlines()]
    assert len(lines) == num_injections() * _PER_INJECTION * 6
    assert set(lines[0]) == {"layer", "place", "injection_id", "step", "slot", "birth", "age"}
    assert {line["layer"] for line in lines} == set(range(6))
    table = mplus("stats", "--tokens").stdout.splitlines()
    assert table[0].startswith(f"20 of {len(lines):,} memory tokens")
    assert table[1].split() == ["layer", "place", "injection", "step", "slot", "birth", "age"]
    assert len(table) == 22


def test_chat_from_a_pipe_remembers_and_obeys(mplus: Run) -> None:
    talk = "Maya lives in Oslo and works at the harbour.\n\n/flush\n/stats\n/quit\nnever said\n"
    result = mplus("chat", "--max-new-tokens", "8", stdin=talk)
    assert result.exit_code == 0
    assert "1 injection," in result.stdout
    assert "short-term memory θ" in result.stdout
    with Store(STORE) as store:
        record = store.find_agent("default", "default")
        assert record is not None
        events = store.events(record.id)
    assert [event.kind for event in events] == ["message", "message", "flush"]
    assert events[0].text == "Maya lives in Oslo and works at the harbour."


def test_chat_as_json_is_one_object_per_line(mplus: Run) -> None:
    result = mplus("chat", "--max-new-tokens", "8", "--json", stdin="Hello there\n/stats\n/flush\nAnd again")
    first, stats, flush, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["message"] == "Hello there"
    assert stats["stats"]["num_waiting_messages"] == 2
    assert "note" in flush["flush"]
    assert second["message"] == "And again"
    assert "simple English" not in result.stderr


def test_chat_streams_what_it_remembers(mplus: Run) -> None:
    mplus("chat", "--max-new-tokens", "12", stdin="Hello there")
    with MPlus.from_pretrained(store=STORE, device="cpu") as opened:
        remembered = opened.agent("default", create=False).window[1].content
    again = mplus("chat", "--agent", "twin", "--max-new-tokens", "12", "--json", stdin="Hello there")
    assert json.loads(again.stdout)["answer"] == remembered


def test_chat_refuses_bytes_that_are_no_text(mplus: Run) -> None:
    result = mplus("chat", "--max-new-tokens", "4", stdin=b"Oslo\n\xff\xfe\n")
    assert result.exit_code == 1
    assert "mplus: error: line 2 is b'\\xff\\xfe\\n'; allowed: UTF-8" in result.stderr


def test_delete_asks_first(mplus: Run) -> None:
    mplus("read", "-", stdin="Maya lives in Oslo.")
    refused = mplus("delete", stdin="n\n")
    assert refused.exit_code == 1
    assert "1 log entries" in refused.stderr
    assert "nothing was deleted" in refused.stderr
    assert refused.stdout == ""
    assert mplus("stats").exit_code == 0
    accepted = mplus("delete", stdin="y\n")
    assert accepted.exit_code == 0
    assert accepted.stdout == "deleted agent 'default'\n"
    assert mplus("stats").exit_code == 1


def test_delete_without_asking_as_json(mplus: Run) -> None:
    mplus("read", "-", "--agent", "alice", stdin="Maya lives in Oslo.")
    mplus("read", "-", stdin="Maya lives in Oslo.")
    result = mplus("delete", "--agent", "alice", "--yes", "--json")
    assert json.loads(result.stdout) == {"deleted": True, "namespace": "default", "name": "alice"}
    with Store(STORE) as store:
        assert [record.name for record in store.list_agents()] == ["default"]


def test_delete_needs_no_model(mplus: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    mplus("read", "-", stdin="Maya lives in Oslo.")
    monkeypatch.setenv("MPLUS_MODEL", "./nowhere")
    assert mplus("delete", "--yes").exit_code == 0
