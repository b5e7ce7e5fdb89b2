"""What callers get wrong: a defined result or an error that names the argument, and nothing has changed."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mplus_agents import Agent, MPlus
from mplus_agents.engine import Document, Message
from mplus_agents.errors import AgentNotFoundError, ConfigError, InvalidInputError, MPlusError, PromptTooLongError
from tests.engine.engines import (
    check_accounts,
    check_documents,
    count_tokens,
    engine,
    log_of,
    prose,
    reopened,
    tiny,
    turn_of,
    with_version,
    written_ids,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent with some memory and a window, which no test here may change."""
    with engine(tmp_path_factory.mktemp("shared") / "a.db") as mplus:
        agent = mplus.agent("shared")
        agent.remember([Document(prose(300), "book"), Message("user", "Maya lives in Oslo.")])
        yield agent


def check_refused(agent: Agent, call: Callable[[Agent], object], kind: type[BaseException], match: str) -> None:
    before = with_version(agent)
    with pytest.raises(kind, match=match):
        call(agent)
    assert with_version(agent) == before == reopened(agent)


BAD_MEMORIES: dict[str, tuple[Any, str]] = {
    "empty": ("", r"^memories is ''.* not white space"),
    "white space": (" \n\t\u3000", r"^memories is .* not white space"),
    "empty bytes": (b"", r"^memories is ''"),
    "invalid UTF-8": (b"abc\xff\xfe", r"^memories is .*UTF-8 \(the bytes from offset 3"),
    "cut UTF-8": ("é".encode()[:1], r"^memories is .*UTF-8 \(the bytes from offset 0"),
    "UTF-16": ("text".encode("utf-16"), r"^memories is .*UTF-8"),
    "lone surrogate": ("abc\ud83d", r"^memories is .*half a surrogate pair"),
    "None": (None, r"^memories is None"),
    "number": (17, r"^memories is 17"),
    "empty list": ([], r"^memories is \[\].*at least one"),
    "empty tuple": ((), r"^memories is \(\).*at least one"),
    "nested list": ([["text"]], r"^memories\[0\] is \['text'\]"),
    "list with None": (["text", None], r"^memories\[1\] is None"),
    "list with an empty text": (["text", " "], r"^memories\[1\] is ' '"),
    "generator of numbers": ((number for number in (1, 2)), r"^memories\[0\] is 1"),
    "memoryview": (memoryview(b"text"), r"^memories\[0\] is 116"),
    "unknown role": (Message("robot", "text"), r"^memories\.role is 'robot'; allowed: system, user, assistant, tool"),  # type: ignore[arg-type]
    "role of wrong type": (Message(["user"], "text"), r"^memories\.role is \['user'\]"),  # type: ignore[arg-type]
    "empty turn": (Message("user", ""), r"^memories\.content is ''"),
    "turn of wrong type": (Message("user", 5), r"^memories\.content is 5"),  # type: ignore[arg-type]
    "turn with a lone surrogate": (Message("user", "\udc00"), r"^memories\.content is .*surrogate"),
    "extra key": (
        {"role": "user", "content": "hi", "name": "x"},
        r"^memories is \['content', 'name', 'role'\].*exactly",
    ),
    "missing key": ({"role": "user"}, r"^memories is \['role'\].*exactly"),
    "empty mapping": ({}, r"^memories is \[\].*exactly"),
    "content parts": ({"role": "user", "content": [{"type": "text"}]}, r"^memories\.content is \[\{"),
    "list with a bad turn": (["text", {"role": "x", "content": "y"}], r"^memories\[1\]\.role is 'x'"),
    "document of wrong type": (Document(5), r"^memories is 5"),  # type: ignore[arg-type]
    "document without text": (Document("  ", "id"), r"^memories is '  '"),
    "document with empty id": (Document("text", ""), r"^source_id is ''"),
    "document with a long id": (Document("text", "x" * 1001), r"^source_id is "),
    "document with an id of wrong type": (Document("text", 7), r"^source_id is 7"),  # type: ignore[arg-type]
    "missing file": (Path("/nowhere/at/all"), r"^memories is '/nowhere/at/all'.*No such file"),
    "directory": (Path("/tmp"), r"^memories is '/tmp'.*directory"),
    "path with NUL": (Path("a\0b"), r"^memories is .*"),
}


@pytest.mark.parametrize("kind", BAD_MEMORIES)
def test_what_cannot_be_remembered_is_named(shared: Agent, kind: str) -> None:
    memories, match = BAD_MEMORIES[kind]
    check_refused(shared, lambda agent: agent.remember(memories), InvalidInputError, match)


@pytest.mark.parametrize(
    "memories",
    [Message("user", "hi"), {"role": "user", "content": "hi"}, ["a", "b"], iter(["a"])],
    ids=["message", "dict", "list", "iterator"],
)
def test_a_source_id_is_for_a_single_document(shared: Agent, memories: object) -> None:
    check_refused(shared, lambda agent: agent.remember(memories, source_id="x"), InvalidInputError, "^source_id is 'x'")


@pytest.mark.parametrize("source_id", ["", " ", 5, "\ud800", "é" * 501], ids=lambda source_id: ascii(source_id)[:20])
def test_source_ids_that_are_not_allowed_are_named(shared: Agent, source_id: Any) -> None:
    check_refused(
        shared, lambda agent: agent.remember("some text", source_id=source_id), InvalidInputError, "^source_id is "
    )


def test_an_id_that_cannot_be_stored_is_found_before_anything_is(shared: Agent) -> None:
    memories = [Document(prose(300, 8), "fine"), Document("text", "x" * 1001)]
    check_refused(shared, lambda agent: agent.remember(memories), InvalidInputError, "^source_id")


def test_an_empty_iterator_stores_nothing_and_says_so(alice: Agent) -> None:
    before = with_version(alice)
    receipt = alice.remember(iter(()))
    assert (receipt.num_injections, receipt.note) == (0, "nothing was given")
    assert with_version(alice) == before


class TestFiles:
    def test_files_are_read_as_documents(self, alice: Agent, tmp_path: Path) -> None:
        text = "Maya's résumé 🙂\r\n" * 30
        path = tmp_path / "a.txt"
        path.write_bytes(text.encode())
        alice.remember(path, source_id="path")
        with path.open("rb") as file:
            alice.remember(file, source_id="binary")
        with path.open(encoding="utf-8", newline="") as file:
            alice.remember(file, source_id="text")
        alice.remember([Document(text, "plain"), path])
        alice.remember(io.BytesIO(text.encode()), source_id="bytes")
        check_documents(alice, dict.fromkeys(("path", "binary", "text", "plain", "bytes"), text))

    def test_a_file_read_already_is_empty(self, shared: Agent, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("some text")
        with path.open() as file:
            file.read()
            check_refused(shared, lambda agent: agent.remember(file), InvalidInputError, "^memories is ''")

    def test_a_closed_file_is_refused(self, shared: Agent, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("some text")
        file = path.open()
        file.close()
        check_refused(shared, lambda agent: agent.remember(file), InvalidInputError, "^memories is .*closed")

    def test_a_file_open_for_writing_is_refused(self, shared: Agent, tmp_path: Path) -> None:
        with (tmp_path / "a.txt").open("w") as file:
            check_refused(shared, lambda agent: agent.remember(file), InvalidInputError, "^memories is .*not readable")

    def test_a_file_in_another_encoding_is_refused(self, shared: Agent, tmp_path: Path) -> None:
        path = tmp_path / "latin.txt"
        path.write_bytes("Maya's résumé".encode("latin-1"))
        with path.open(encoding="utf-8") as file:
            check_refused(shared, lambda agent: agent.remember(file), InvalidInputError, r"^memories is .*utf-8 text")
        check_refused(shared, lambda agent: agent.remember(path), InvalidInputError, r"^memories is .*UTF-8")

    def test_something_with_a_strange_read_is_refused(self, shared: Agent) -> None:
        class Strange:
            def read(self) -> int:
                return 5

        check_refused(shared, lambda agent: agent.remember(Strange()), InvalidInputError, "^memories is 5")


@pytest.mark.parametrize(
    "text",
    [
        "🙂",
        "👩‍👧‍👦",
        "a",
        "\x00",
        "a\x00b\x1b[31m\x07\x7f\u0085",
        "\ufeffbom",
        "\u202eright to left",
        "\ufffd",
        "e\u0301" * 20,
    ],
)
def test_strange_characters_come_back_as_they_were(alice: Agent, text: str) -> None:
    alice.remember(Message("user", text))
    alice.remember(text, source_id="doc")
    assert [item.content for item in alice.window] == [text, text]
    assert [event.text for event in log_of(alice)] == [text, text]
    assert text in alice.window_text
    alice.ask(text, max_new_tokens=1)
    alice.remember(prose(200))
    check_accounts(alice)
    assert with_version(alice) == reopened(alice)


@pytest.mark.parametrize("special", ["<|end|>", "<|begin|>", "a<|begin|>b<|end|>c"])
def test_special_tokens_in_a_text_are_plain_text(alice: Agent, special: str) -> None:
    special_ids = set(alice.mplus.codec.tokenizer.all_special_ids)
    text = f"{special} " * 40
    with written_ids(tiny()) as written:
        alice.remember(Message("user", text))
        alice.remember(text)
        alice.flush()
    assert written
    assert all(special_ids.isdisjoint(ids) for ids in written)
    assert "".join(event.text or "" for event in log_of(alice) if event.kind == "piece") == text
    assert "<|end|>" in alice.mplus.codec.decode(alice.mplus.codec.encode("<|end|>"))


def spend(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds and MB of growth that a call takes."""
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    call()
    return time.perf_counter() - start, (process.memory_info().rss - before) / 2**20


@pytest.mark.parametrize(
    ("num_bytes", "max_s", "max_mb"),
    [
        (2_000_000, 60.0, 900.0),
        pytest.param(50_000_000, 1500.0, 3000.0, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_a_very_long_line_takes_bounded_time_and_memory(
    alice: Agent, num_bytes: int, max_s: float, max_mb: float
) -> None:
    line = "=" * num_bytes
    seconds, megabytes = spend(lambda: alice.remember(line, source_id="line"))
    assert seconds < max_s
    assert megabytes < max_mb
    check_documents(alice, {"line": line})
    seconds, _ = spend(lambda: alice.remember(line, source_id="line"))
    assert seconds < 5.0


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[MPlusError], str]] = {
    "negative": ({"max_new_tokens": -1}, InvalidInputError, "^max_new_tokens is -1"),
    "zero": ({"max_new_tokens": 0}, InvalidInputError, "^max_new_tokens is 0"),
    "bool": ({"max_new_tokens": True}, InvalidInputError, "^max_new_tokens is True"),
    "float": ({"max_new_tokens": 5.0}, InvalidInputError, r"^max_new_tokens is 5\.0"),
    "string": ({"max_new_tokens": "5"}, InvalidInputError, "^max_new_tokens is '5'"),
    "huge": ({"max_new_tokens": 10**30}, PromptTooLongError, "max_new_tokens"),
    "more than fits": ({"max_new_tokens": 1024}, PromptTooLongError, r"max_new_tokens \(1,024\).*window of 1,024"),
    "unknown option": ({"max_tokens": 5}, ConfigError, "max_tokens.*known keys: .*max_new_tokens"),
    "option of transformers": ({"num_beams": 4}, ConfigError, "num_beams"),
    "stop of bytes": ({"stop": b"x"}, InvalidInputError, "^stop is b'x'"),
    "stop of numbers": ({"stop": [1]}, InvalidInputError, r"^stop is \[1\]"),
    "stop that is empty": ({"stop": ""}, InvalidInputError, "^stop is ''"),
    "stop with an empty string": ({"stop": ["a", ""]}, InvalidInputError, "^stop is "),
    "stop of wrong type": ({"stop": 5}, InvalidInputError, "^stop is 5"),
    "temperature of zero": ({"temperature": 0}, InvalidInputError, "^temperature is 0"),
    "temperature nan": ({"temperature": float("nan")}, InvalidInputError, "^temperature is nan"),
    "top_p": ({"top_p": 1.5}, InvalidInputError, "^top_p is 1.5"),
    "top_k": ({"top_k": 0}, InvalidInputError, "^top_k is 0"),
    "repetition_penalty": ({"repetition_penalty": -1.0}, InvalidInputError, "^repetition_penalty"),
}

ANSWERS: dict[str, Callable[..., object]] = {
    "ask": lambda agent, **options: agent.ask("Where?", **options),
    "chat": lambda agent, **options: agent.chat("Where?", **options),
    "stream": lambda agent, **options: list(agent.stream("Where?", **options)),
    "generate": lambda agent, **options: agent.generate([Message("user", "Where?")], **options),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_options_that_are_not_allowed_are_named(shared: Agent, kind: str, answer: str) -> None:
    options, error, match = BAD_OPTIONS[kind]
    check_refused(shared, lambda agent: ANSWERS[answer](agent, **options), error, match)


BAD_TYPES: list[dict[str, Any]] = [
    {"temperature": "hot"},
    {"top_k": "a"},
    {"top_k": 2.5, "do_sample": True},
    {"top_p": "a"},
    {"repetition_penalty": None},
    {"seed": "x", "do_sample": True},
    {"seed": 2**70, "do_sample": True},
]


@pytest.mark.parametrize("options", BAD_TYPES, ids=str)
def test_options_of_a_wrong_type_are_named(shared: Agent, options: dict[str, Any]) -> None:
    check_refused(
        shared, lambda agent: agent.ask("Where?", **options), InvalidInputError, f"^{next(iter(options))} is "
    )


BAD_TURNS: dict[str, tuple[Any, str]] = {
    "empty": ("", r"^message\.content is ''"),
    "white space": ("  \n", r"^message\.content is "),
    "surrogate": ("\ud800", r"^message\.content is .*surrogate"),
    "bytes": (b"hello", r"^message is b'hello'"),
    "number": (5, r"^message is 5"),
    "None": (None, r"^message is None"),
    "list": ([Message("user", "x")], r"^message is \["),
    "unknown role": (Message("robot", "x"), r"^message\.role is 'robot'"),  # type: ignore[arg-type]
    "extra key": ({"role": "user", "content": "x", "y": 1}, r"^message is .*exactly the keys"),
}


@pytest.mark.parametrize("kind", BAD_TURNS)
def test_turns_that_are_none_are_named(shared: Agent, kind: str) -> None:
    turn, match = BAD_TURNS[kind]
    check_refused(shared, lambda agent: agent.chat(turn), InvalidInputError, match)
    check_refused(shared, lambda agent: agent.stream(turn), InvalidInputError, match)


@pytest.mark.parametrize("question", ["", " ", "\ud800", b"what?", 5, None, ["what?"], Message("user", "what?")])
def test_questions_that_are_none_are_named(shared: Agent, question: Any) -> None:
    check_refused(shared, lambda agent: agent.ask(question), InvalidInputError, "^question is ")
    check_refused(shared, lambda agent: agent.logits(question), InvalidInputError, "^text is ")


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "^messages is "),
        ("hello", "^messages"),
        (None, "^messages is None"),
        (Message("user", "x"), "^messages is "),
        ({"role": "user", "content": "x"}, "^messages is "),
        (["hello", ""], r"^messages\[1\].content is ''"),
        (["hello", 5], r"^messages\[1\] is 5"),
        ([Message("robot", "x")], r"^messages\[0\]\.role is 'robot'"),  # type: ignore[arg-type]
        ([Message("user", "x"), Message("user", "\ud800")], r"^messages\[1\]\.content is .*surrogate"),
        ([Message("user", "x"), Message("user", 5)], r"^messages\[1\]\.content is 5"),  # type: ignore[arg-type]
    ],
)
def test_conversations_that_are_none_are_named(shared: Agent, messages: Any, match: str) -> None:
    check_refused(shared, lambda agent: agent.generate(messages, max_new_tokens=1), InvalidInputError, match)
    check_refused(shared, lambda agent: agent.begin_generation(messages, max_new_tokens=1), InvalidInputError, match)


def test_a_turn_without_text_may_stand_in_a_conversation(shared: Agent) -> None:
    """A model that called a tool said nothing."""
    turns = [Message("user", "Where?"), Message("assistant", ""), Message("tool", "Oslo")]
    assert shared.generate(turns, max_new_tokens=2).num_new_tokens <= 2


def test_a_prompt_longer_than_the_generation_window_is_refused(shared: Agent) -> None:
    for text in (prose(1200), "a" * 1024):
        for call in (
            lambda agent, text=text: agent.ask(text),
            lambda agent, text=text: agent.chat(text),
            lambda agent, text=text: agent.generate([Message("user", text)]),
        ):
            check_refused(shared, call, PromptTooLongError, r"prompt \([\d,]+ tokens\).*remember\(\)")


def test_a_prompt_may_be_as_long_as_the_window_lets_it(mplus: MPlus) -> None:
    agent = mplus.agent("a")
    limit = mplus.model.config.max_prompt_tokens
    overhead = agent.generate([turn_of(100)], max_new_tokens=1).num_prompt_tokens - 100
    answer = agent.generate([turn_of(limit - overhead - 1)])
    assert (answer.num_prompt_tokens, answer.num_new_tokens) in {(limit - 1, 1), (limit - 1, 0)}
    with pytest.raises(PromptTooLongError, match="exceed the generation window"):
        agent.generate([turn_of(limit - overhead)])
    with pytest.raises(PromptTooLongError, match="exceed the generation window"):
        agent.generate([turn_of(limit - overhead - 1)], max_new_tokens=2)
    assert count_tokens("a" * 9) == 9


BAD_NAMES: list[Any] = [
    "",
    " a",
    "a ",
    "a/b",
    "/",
    "a" * 201,
    "a" * 10_000,
    "a\nb",
    "a\x00",
    "\ud800",
    "a\u200bb",
    5,
    None,
    b"a",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:20])
def test_names_that_are_not_allowed_are_named(mplus: MPlus, name: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^name is .*1 to 200 printable characters without '/'"):
        mplus.agent(name)
    with pytest.raises(InvalidInputError, match=r"^namespace is .*1 to 200 printable characters without '/'"):
        mplus.agent("a", namespace=name)
    if name is not None:
        with pytest.raises(InvalidInputError, match=r"^namespace is "):
            mplus.agents(name)
    assert mplus.agents() == []


@pytest.mark.parametrize(
    "name", ["🙂", "é" * 200, "𝒳" * 200, "a b", "a\\b", "..", "a:b", "用户", "'; DROP TABLE mplus_agent"]
)
def test_names_that_are_allowed_are_kept(mplus: MPlus, name: str) -> None:
    mplus.agent(name, namespace=name).remember("Maya lives in Oslo.")
    assert [(record.namespace, record.name) for record in mplus.agents(name)] == [(name, name)]
    with engine(mplus.store.url) as other:
        assert other.agent(name, namespace=name, create=False).window[0].content == "Maya lives in Oslo."


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "5", True])
def test_seeds_that_are_not_allowed_are_named(mplus: MPlus, seed: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^seed is "):
        mplus.agent("a", seed=seed)
    assert mplus.agents() == []


def test_an_agent_that_is_not_there_is_not_made_unasked(mplus: MPlus) -> None:
    with pytest.raises(AgentNotFoundError, match="no agent 'nobody' in namespace 'default'"):
        mplus.agent("nobody", create=False)
    assert mplus.agents() == []


@pytest.mark.parametrize("layer", [-1, 4, 99, "0", 1.0, True])
def test_layers_that_are_not_there_are_named(shared: Agent, layer: Any) -> None:
    check_refused(shared, lambda agent: agent.tokens(layer), InvalidInputError, "^layer is ")


def test_options_of_from_pretrained_are_checked(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    for options in ({"device": "nowhere"}, {"dtype": "int8"}, {"memory_rule": "mine"}, {"attn_implementation": "x"}):
        with pytest.raises(InvalidInputError, match=f"^{next(iter(options))} is "):
            MPlus.from_pretrained("mplus-tiny", store=url, **options)  # type: ignore[arg-type]
    with pytest.raises(MPlusError, match="folder of the database does not exist"):
        MPlus.from_pretrained("mplus-tiny", store="sqlite:////nowhere/at/all.db", device="cpu")
    with pytest.raises(InvalidInputError, match="URL"):
        MPlus.from_pretrained("mplus-tiny", store="nonsense", device="cpu")
    assert list(tmp_path.iterdir()) == []
