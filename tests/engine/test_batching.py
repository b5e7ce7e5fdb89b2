"""What waits, what is injected together, and that the log accounts for all of it."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mplus_agents import Agent, MPlus
from mplus_agents.engine import Document, Message, writer
from mplus_agents.engine.prompts import write_turn
from mplus_agents.model import MPlusModel
from tests.engine.engines import (
    CHUNK,
    MINIMUM,
    TINY,
    check_accounts,
    check_documents,
    count_tokens,
    engine,
    groups_of,
    log_of,
    prose,
    reopened,
    small,
    state_of,
    tiny,
    turn_of,
    waiting_of,
    with_version,
    written_ids,
)


def expected_groups(lengths: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The rule for turns of at most a chunk: events of every injection, and what waits."""
    groups: list[tuple[int, ...]] = []
    waiting: list[int] = []
    total = 0
    for seq, length in enumerate(lengths):
        if total >= MINIMUM and total + length > CHUNK:
            groups.append(tuple(waiting))
            waiting, total = [], 0
        waiting.append(seq)
        total += length
        if total >= CHUNK:
            groups.append(tuple(waiting))
            waiting, total = [], 0
    return groups, waiting


def test_a_short_turn_waits_verbatim(alice: Agent) -> None:
    receipt = alice.remember(Message("user", "Maya lives in Oslo."))
    assert receipt.num_injections == receipt.num_text_tokens == receipt.num_bytes == 0
    assert receipt.num_waiting_tokens == count_tokens("Maya lives in Oslo.", "user")
    assert "wait verbatim" in receipt.note
    assert alice.window == [Message("user", "Maya lives in Oslo.")]
    assert alice.window_text == "User: Maya lives in Oslo.\n"
    assert groups_of(alice) == []


def test_turns_are_injected_whole_when_the_next_does_not_fit(alice: Agent) -> None:
    alice.remember([turn_of(60), turn_of(60, "assistant")])
    assert groups_of(alice) == []
    receipt = alice.remember(turn_of(9))  # 60 + 60 + 9 > 128
    assert (receipt.num_injections, receipt.num_text_tokens, receipt.num_waiting_tokens) == (1, 120, 9)
    assert groups_of(alice) == [(0, 1)]
    assert waiting_of(alice) == [2]


@pytest.mark.parametrize("lengths", [[128], [64, 64], [100, 28], [15, 113]])
def test_a_full_chunk_is_injected_at_once(alice: Agent, lengths: list[int]) -> None:
    receipt = alice.remember([turn_of(length) for length in lengths])
    assert (receipt.num_injections, receipt.num_text_tokens, receipt.num_waiting_tokens) == (1, 128, 0)
    assert alice.window == []


def test_what_is_under_the_minimum_goes_along_with_a_turn_that_does_not_fit(alice: Agent) -> None:
    alice.remember(turn_of(15))
    receipt = alice.remember(turn_of(120))
    assert (receipt.num_injections, receipt.num_text_tokens) == (1, 135)
    assert groups_of(alice) == [(0, 1)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(6, CHUNK), min_size=1, max_size=25), st.data())
def test_turns_follow_the_rule_however_they_are_handed_over(lengths: list[int], data: st.DataObject) -> None:
    turns = [turn_of(length) for length in lengths]
    cuts = data.draw(st.lists(st.integers(0, len(turns)), max_size=4).map(sorted))
    with engine("sqlite://") as mplus:
        agent = mplus.agent("a")
        with written_ids(tiny()) as written:
            for start, end in itertools.pairwise([0, *cuts, len(turns)]):
                if start < end:
                    agent.remember(turns[start:end])
        groups, waiting = expected_groups(lengths)
        assert groups_of(agent) == groups
        assert waiting_of(agent) == waiting
        check_accounts(agent)
        expected = [
            [i for seq in g for i in mplus.codec.encode(write_turn("user", turns[seq].content))] for g in groups
        ]
        assert written == expected


@pytest.mark.parametrize("num_waiting", [0, 8, 15])
@pytest.mark.parametrize("text", [prose(400), "é" * 700, "x" * 129, "\n" * 900, "  \n" * 300 + "x"])
def test_a_turn_longer_than_a_chunk_is_cut_and_nothing_is_lost(alice: Agent, text: str, num_waiting: int) -> None:
    if num_waiting:
        alice.remember(turn_of(num_waiting))
    long = Message("assistant", f"so: {text}.")
    alice.remember(long)
    parts = [event for event in log_of(alice) if event.role == "assistant"]
    assert len(parts) > 1
    assert "".join(part.text or "" for part in parts) == long.content
    lengths = [len(part.text or "") for part in parts]
    assert [part.offset for part in parts] == [0, *itertools.accumulate(lengths)][:-1]
    check_accounts(alice)
    assert with_version(alice) == reopened(alice)


@pytest.mark.parametrize("num_waiting", [0, 15, 16, 60, 112, 113, 127])
@pytest.mark.parametrize("num_words", [1, 12, 40, 300])
def test_a_document_fills_up_what_waits(alice: Agent, num_words: int, num_waiting: int) -> None:
    text = prose(num_words)
    if num_waiting:
        alice.remember(turn_of(num_waiting))
    receipt = alice.remember(Document(text, "book"))
    check_accounts(alice)
    check_documents(alice, {"book": text})
    assert receipt.num_text_tokens + receipt.num_waiting_tokens == sum(event.num_tokens for event in log_of(alice))
    # All pieces but the last are as large as the chunk lets them be, give or take the cut at a blank.
    for group in groups_of(alice)[1:-1]:
        assert sum(log_of(alice)[seq].num_tokens for seq in group) > CHUNK * 3 // 5


def test_a_document_that_ends_with_its_chunk_leaves_nothing_waiting(alice: Agent) -> None:
    text = "a" * CHUNK
    assert count_tokens(text) == CHUNK
    receipt = alice.remember(text)
    assert (receipt.num_injections, receipt.num_waiting_tokens, receipt.note) == (1, 0, "")


def test_flush_injects_what_waits_unless_it_is_under_the_minimum(alice: Agent) -> None:
    assert alice.flush().note == "nothing was waiting"
    alice.remember(turn_of(15))
    before = with_version(alice)
    receipt = alice.flush()
    assert receipt.num_injections == 0
    assert "15 tokens keep waiting" in receipt.note
    assert with_version(alice) == before
    alice.remember(turn_of(6))
    receipt = alice.flush()
    assert (receipt.num_injections, receipt.num_text_tokens, receipt.num_waiting_tokens) == (1, 21, 0)
    assert [event.kind for event in log_of(alice)] == ["message", "message", "flush"]
    assert alice.window == []
    check_accounts(alice)
    assert with_version(alice) == reopened(alice)


def test_a_cleared_window_is_forgotten(alice: Agent) -> None:
    alice.remember([turn_of(20), turn_of(30)])
    assert alice.clear_window() == 2
    assert alice.clear_window() == 0
    assert alice.window == []
    assert alice.flush().note == "nothing was waiting"
    alice.remember([turn_of(100), turn_of(100)])
    check_accounts(alice, cleared=[0, 1])
    assert groups_of(alice) == [(2,)]
    assert with_version(alice) == reopened(alice)


def test_a_chunk_hardly_larger_than_the_minimum_is_filled_all_the_same(tmp_path: Path) -> None:
    model = MPlusModel.from_pretrained(TINY, "cpu")
    model.config = replace(model.config, chunk_tokens=20, min_chunk_tokens=16)
    with engine(tmp_path / "narrow.db", model) as mplus:
        agent = mplus.agent("a")
        for num_tokens in (6, 15, 17, 7):
            agent.remember([turn_of(num_tokens), Document(prose(30, num_tokens), f"{num_tokens}")])
        check_accounts(agent)
        check_documents(agent, {f"{n}": prose(30, n) for n in (6, 15, 17, 7)})


def test_receipts_count_what_the_store_holds(ada: Agent) -> None:
    receipts = [ada.remember(Document(prose(250, seed), f"{seed}")) for seed in range(6)]
    receipts += [ada.remember(turn_of(100)), ada.remember(turn_of(100)), ada.flush()]
    store = ada.mplus.store
    record = store.find_agent("default", "ada")
    assert record is not None
    chain = store.chain(record.head_commit_id)
    infos = store.injection_infos(chain.injection_ids.values())
    ids = [injection_id for receipt in receipts for injection_id in receipt.injection_ids]
    assert ids == list(chain.injection_ids.values())
    for receipt in receipts:
        assert receipt.num_text_tokens == sum(infos[i].num_text_tokens for i in receipt.injection_ids)
        assert receipt.num_memory_tokens == 16 * receipt.num_injections
    stats, stored, config = ada.stats(), store.stats(record.id), ada.mplus.model.config.memory
    assert sum(receipt.num_memory_tokens for receipt in receipts) == 16 * stats.num_injections
    dropped = sum(receipt.num_dropped for receipt in receipts)
    assert dropped == 16 * stats.num_injections - config.max_short_term
    evicted = sum(receipt.num_evicted for receipt in receipts)
    assert evicted == config.num_layers * (dropped - config.max_long_term) > 0
    memory_bytes = stored.page_bytes + stored.retrieval_key_bytes + stored.commit_bytes + stored.snapshot_bytes
    assert sum(receipt.num_bytes for receipt in receipts) == memory_bytes
    assert [receipt.num_waiting_tokens for receipt in receipts[-3:]] == [100, 100, 0]


def fill(agent: Agent) -> None:
    agent.remember(Document(prose(1100), "book"))
    agent.remember([turn_of(90, role) for role in ("user", "assistant", "tool", "system")])
    agent.flush()
    agent.remember([Document(prose(200, 2), "b2"), turn_of(7)])


def test_equal_seeds_and_texts_give_equal_agents_and_other_seeds_do_not(tmp_path: Path) -> None:
    states = {}
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        with engine(tmp_path / f"{name}.db", small()) as mplus:
            agent = mplus.agent("a", seed=seed)
            fill(agent)
            states[name] = state_of(agent)
    assert states["one"] == states["two"]
    assert states["one"].logits != states["other"].logits
    assert states["one"].window == states["other"].window


def test_a_seed_comes_from_the_names_if_none_is_given(tmp_path: Path) -> None:
    seeds = []
    for file in ("a.db", "b.db"):
        with engine(tmp_path / file) as mplus:
            for name, namespace in (("a", "x"), ("b", "x"), ("a", "y")):
                mplus.agent(name, namespace=namespace)
            seeds.append([record.seed for record in mplus.agents()])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3


def test_where_transactions_end_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, versions = [], []
    monkeypatch.setattr(writer, "_SNAPSHOT_EVERY", 5)
    for max_group, max_seconds in ((1, 60.0), (16, 60.0), (1000, 60.0), (1000, 0.0)):
        monkeypatch.setattr(writer, "_MAX_GROUP", max_group)
        monkeypatch.setattr(writer, "_MAX_GROUP_S", max_seconds)
        with engine(tmp_path / f"{max_group}-{max_seconds}.db", small()) as mplus:
            agent = mplus.agent("a")
            fill(agent)
            check_accounts(agent)
            states.append(state_of(agent))
            versions.append(mplus.agents()[0].version)
            assert with_version(agent) == reopened(agent)
    assert all(state == states[0] for state in states)
    assert versions[0] >= versions[3] > versions[1] > versions[2]


@pytest.mark.parametrize("every", [1, 3, 64])
def test_reopening_from_a_snapshot_equals_living_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setattr(writer, "_SNAPSHOT_EVERY", every)
    with engine(tmp_path / "a.db", small()) as mplus:
        agent = mplus.agent("a")
        for seed in range(8):
            agent.remember(prose(90, seed))
            assert with_version(agent) == reopened(agent)
    with engine(tmp_path / "a.db", small()) as mplus, engine("sqlite://", small()) as straight:
        agent = mplus.agent("a")
        agent.remember(prose(300, 99))
        living = straight.agent("a")
        for seed in range(8):
            living.remember(prose(90, seed))
        living.remember(prose(300, 99))
        assert state_of(agent) == state_of(living)


TEXTS = st.one_of(
    st.builds(prose, st.integers(1, 90), st.integers(0, 50)),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=90).filter(lambda text: bool(text.strip())),
    st.integers(1, 400).map(lambda n: "z" * n),
    st.integers(1, 60).map(lambda n: "\n \t" * n + "."),
    st.integers(1, 60).map(lambda n: "👩‍👧 " * n),
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
ACTIONS = st.one_of(
    st.tuples(st.just("turns"), st.lists(st.builds(Message, ROLES, TEXTS), min_size=1, max_size=4)),
    st.tuples(st.just("document"), TEXTS),
    st.tuples(st.just("grow"), TEXTS),
    st.tuples(st.just("flush"), st.none()),
    st.tuples(st.just("reopen"), st.none()),
)


def act(
    agent: Agent, documents: dict[str, str], ends: set[tuple[str, int]], turns: list[Message], kind: str, argument: Any
) -> None:
    if kind == "turns":
        agent.remember(argument)
        turns += argument
    elif kind in ("document", "grow"):
        is_new = kind == "document" or not documents
        source_id = f"d{len(documents)}" if is_new else f"d{len(documents) - 1}"
        documents[source_id] = documents.get(source_id, "") + argument
        agent.remember(documents[source_id], source_id=source_id)
        ends.add((source_id, len(documents[source_id])))
    else:
        agent.flush()


def said(agent: Agent) -> list[Message]:
    """The turns of the log, those put together again that were cut."""
    turns: list[Message] = []
    for event in log_of(agent):
        role: Any = event.role
        if event.kind == "message":
            if event.offset:
                turns[-1] = Message(role, turns[-1].content + (event.text or ""))
            else:
                turns.append(Message(role, event.text or ""))
    return turns


def injected(
    group: list[Any], following: Any, encode: Callable[[str], list[int]], ends: set[tuple[str, int]]
) -> list[int]:
    """The tokens of an injection: a line ends where a document does, unless the document went on when more was said."""
    ids: list[int] = []
    num_said = 0
    for event, after in itertools.pairwise([*group, following]):
        text = event.text or ""
        ids += encode(write_turn(event.role, text))
        num_said += len(encode(write_turn(event.role, text)))
        if event.role is not None or text[-1].isspace():
            continue
        end = (event.source_id, event.offset + len(text))
        goes_on = after is not None and (after.source_id, after.offset) == end
        if event is group[-1] and end in ends and num_said >= small().config.chunk_tokens:
            goes_on = False  # injected at once, before the document grew
        ids += [] if goes_on else encode("\n")
    return ids


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(ACTIONS, min_size=1, max_size=8))
def test_any_history_is_accounted_for_and_reopens_bit_for_bit(actions: list[tuple[str, Any]]) -> None:
    documents: dict[str, str] = {}
    ends: set[tuple[str, int]] = set()
    turns: list[Message] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.db"
        todo = list(actions)
        with written_ids(small()) as written:
            while todo:
                with engine(path, small()) as mplus:
                    agent = mplus.agent("a")
                    while todo:
                        kind, argument = todo.pop(0)
                        if kind == "reopen":
                            break
                        act(agent, documents, ends, turns, kind, argument)
                        assert with_version(agent) == reopened(agent)
        with engine(path, small()) as mplus:
            agent = mplus.agent("a")
            check_accounts(agent)
            check_documents(agent, documents)
            assert said(agent) == turns
            events = {event.seq: event for event in log_of(agent)}
            assert written == [
                injected([events[seq] for seq in group], events.get(group[-1] + 1), mplus.codec.encode, ends)
                for group in groups_of(agent)
            ]


def test_two_documents_in_a_row_do_not_run_together(mplus: MPlus) -> None:
    agent = mplus.agent("a")
    agent.remember("Maya lives in Oslo.")
    agent.remember("Bob lives in Paris. ")
    agent.remember("Ida lives in Rome.")
    expected = "Maya lives in Oslo.\nBob lives in Paris. Ida lives in Rome."
    assert agent.window_text == expected
    again = MPlus(mplus.model, mplus.codec, mplus.store, mplus.name).agent("a")
    assert again.window_text == expected


def test_an_injection_ends_its_last_line_where_the_text_ends(mplus: MPlus) -> None:
    encode = mplus.codec.encode
    told = "Maya lives in Oslo. Bob was born in Rome, and Ida will travel to Bergen."
    with written_ids(mplus.model) as written:
        mplus.agent("a").remember(told)
        mplus.agent("a").flush()
        mplus.agent("b").remember(f"{told}\n")
        mplus.agent("b").flush()
    assert written == [encode(f"{told}\n")] * 2
    end = encode("\n")
    for name, text in {"c": prose(400), "d": "é" * 700}.items():  # the second one is cut within its only line
        with written_ids(mplus.model) as written:
            mplus.agent(name).remember(text)
            mplus.agent(name).flush()
        assert len(written) > 3
        assert [ids[-len(end) :] == end for ids in written] == [False] * (len(written) - 1) + [True]


def test_agents_do_not_meet(mplus: MPlus) -> None:
    one, two = mplus.agent("one", seed=1), mplus.agent("two", seed=1)
    far = mplus.agent("one", namespace="far", seed=1)
    one.remember(prose(300))
    assert two.stats().num_injections == far.stats().num_injections == 0
    two.remember(prose(300))
    far.remember(prose(300, 7))
    assert state_of(one, is_alone=False).logits == state_of(two, is_alone=False).logits
    assert state_of(one, is_alone=False).logits != state_of(far, is_alone=False).logits


def test_a_chunk_hardly_longer_than_a_label_still_takes_every_character(tmp_path: Path) -> None:
    model = copy(small())
    model.config = replace(model.config, chunk_tokens=5, min_chunk_tokens=2)
    said = "The quick brown fox jumps over the lazy dog."
    with engine(tmp_path / "a.db", model) as mplus:
        agent = mplus.agent("a")
        agent.remember(Message("user", said))
        parts = mplus.store.events(mplus.agents()[0].id)
        assert "".join(part.text or "" for part in parts) == said
        assert next(part.offset for part in parts) == 0
