"""Both rules of ageing, a checkpoint's own memory, and models that an agent does not fit."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mplus_agents import Agent
from mplus_agents.config import MemoryRule
from mplus_agents.engine import writer
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import FingerprintMismatchError
from mplus_agents.model import MPlusModel
from tests.engine.engines import (
    TINY,
    check_accounts,
    engine,
    prose,
    reopened,
    small,
    state_of,
    tiny_codec,
    turn_of,
    with_version,
)
from tests.memory.reference import ReferenceMemory

FIXTURES = Path(__file__).parents[1] / "fixtures"
PUBLISHED = ["mplus", "mplus_small_long_term", "memoryllm"]


@cache
def letters() -> TextCodec:
    """A token per ASCII character, for models with a vocabulary of 211."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\n": 3} | {chr(code): code for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return TextCodec(
        PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
    )


@cache
def published(name: str, rule: MemoryRule | None = None, dtype: str | None = None) -> MPlusModel:
    return MPlusModel.from_pretrained(FIXTURES / name / "checkpoint", "cpu", dtype, memory_rule=rule)


def ascii_prose(num_words: int, seed: int) -> str:
    return prose(num_words, seed).replace("é", "e")


def probe(agent: Agent) -> bytes:
    return agent.logits("Where does Maya live?").contiguous().view(torch.uint8).numpy().tobytes()


def check_ages(agent: Agent) -> None:
    """Replay what the log of commits says was dropped in the plain reference, and compare every token and its age."""
    model, store = agent.mplus.model, agent.mplus.store
    config = model.config.memory
    reference = ReferenceMemory(config, model.genesis.index if model.genesis else None)
    record = store.find_agent(agent.namespace, agent.name)
    assert record is not None
    chain = store.chain(record.head_commit_id)
    assert chain.snapshot is None
    commits, infos = chain.commits, chain.injection_ids
    assert len(commits) == len(infos) == agent.stats().num_injections
    for commit in commits:
        evicted = reference.inject(commit.dropped.tolist())
        for layer, births in enumerate(evicted):
            stored = [birth for birth in commit.evicted[layer].tolist() if birth > torch.iinfo(torch.int64).min]
            assert sorted(stored) == births
    for layer in range(config.num_layers):
        tokens = agent.tokens(layer)
        theta = [(token.birth, token.age) for token in tokens if token.place == "short_term"]
        assert theta == list(zip(reference.theta[layer], reference.theta_ages(layer), strict=True))
        merged = [(token.birth, token.age) for token in tokens if token.place == "long_term"]
        births = [entry.birth for entry in reference.merged(layer)]
        assert merged == list(zip(births, reference.long_term_ages(layer), strict=True))
        staged = [token.birth for token in tokens if token.place == "staged"]
        left = [entry.birth for entry in reference.long_term[layer] if entry.birth not in set(births)]
        assert staged == left
        for token in tokens:
            assert token.layer == layer
            is_own = token.birth < 0
            assert (token.step is None, token.slot is None, token.injection_id is None) == (is_own, is_own, is_own)
            if token.step is not None and token.slot is not None:
                assert token.birth == token.step * config.tokens_per_injection + token.slot
                assert token.injection_id == infos[token.step]
    ages = [token.age for token in agent.tokens() if token.place != "staged"]
    assert agent.stats().oldest_age == max(ages, default=None)
    assert agent.tokens() == [token for layer in range(config.num_layers) for token in agent.tokens(layer)]


@pytest.mark.parametrize("rule", ["released", "paper"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_lives_and_reopens_bit_for_bit(tmp_path: Path, name: str, rule: MemoryRule) -> None:
    model = published(name, rule)
    num_evicted = 0
    with engine(tmp_path / "a.db", model, letters()) as mplus:
        agent = mplus.agent("a")
        untouched = probe(agent)
        for step in range(14):  # the fixture merges every third injection, and tokens last four merges
            receipt = agent.remember(ascii_prose(110, step), source_id=f"{step}")
            num_evicted += receipt.num_evicted
            assert with_version(agent) == reopened(agent)
        check_accounts(agent)
        check_ages(agent)
        assert agent.stats().memory_rule == rule
        assert agent.stats().num_injections >= 14
        assert (num_evicted > 0) == (name != "memoryllm" and rule == "released")
        assert probe(agent) != untouched
        assert agent.ask("Where?", max_new_tokens=4) == agent.ask("Where?", max_new_tokens=4)
        fresh = mplus.agent("b")
        assert probe(fresh) == untouched
        assert fresh.stats().num_injections == 0


def test_the_released_rule_is_another_than_the_papers(tmp_path: Path) -> None:
    states = []
    for rule in ("released", "paper"):
        with engine(tmp_path / f"{rule}.db", published("mplus", rule), letters()) as mplus:
            agent = mplus.agent("a")
            for step in range(8):
                agent.remember(ascii_prose(110, step), source_id=f"{step}")
            states.append(state_of(agent))
    assert states[0].logits != states[1].logits
    assert [token.age for token in states[0].tokens] != [token.age for token in states[1].tokens]


def test_ages_by_the_paper_through_evictions(tmp_path: Path) -> None:
    with engine(tmp_path / "a.db", small()) as mplus:
        agent = mplus.agent("a")
        check_ages(agent)
        for seed in range(5):
            agent.remember(prose(150, seed))
            check_ages(agent)
        assert agent.stats().long_term_tokens == (70,) * 4


def test_snapshots_keep_a_genesis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_SNAPSHOT_EVERY", 2)
    with engine(tmp_path / "a.db", published("mplus"), letters()) as mplus:
        agent = mplus.agent("a")
        for step in range(7):
            agent.remember(ascii_prose(110, step), source_id=f"{step}")
            assert with_version(agent) == reopened(agent)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database with an agent of the published fixture."""
    with engine(tmp_path / "a.db", published("mplus"), letters()) as mplus:
        mplus.agent("a").remember(ascii_prose(110, 0))
    return tmp_path / "a.db"


def refused(path: Path, model: MPlusModel, codec: TextCodec) -> dict[str, tuple[str, str]]:
    with engine(path, model, codec) as mplus:
        with pytest.raises(FingerprintMismatchError, match="agent 'a' was made with ") as caught:
            mplus.agent("a")
        assert [record.name for record in mplus.agents()] == ["a"]
        assert mplus.agent("b").stats().num_injections == 0
        for field in caught.value.fields:
            assert f"{field}: stored " in str(caught.value)
        return caught.value.fields


def test_another_rule_is_refused_by_name(path: Path) -> None:
    fields = refused(path, published("mplus", "paper"), letters())
    assert fields == {"memory.rule": ("released", "paper")}


def test_another_dtype_is_refused_by_name(path: Path) -> None:
    fields = refused(path, published("mplus", None, "bfloat16"), letters())
    assert fields["dtype"] == ("float32", "bfloat16")
    assert set(fields) <= {"dtype", "rope_inv_freq"}


def test_another_tokenizer_is_refused_by_name(path: Path) -> None:
    assert list(refused(path, published("mplus"), tiny_codec())) == ["tokenizer"]


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        ("model.norm.weight", "weights"),
        ("lora_A.", "adapters"),
        ("key_proj", "retriever"),
        ("memory", "genesis"),
        ("ltm.1", "genesis"),
    ],
)
def test_other_weights_are_refused_by_part(path: Path, tmp_path: Path, tensor: str, field: str) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(FIXTURES / "mplus" / "checkpoint", folder)
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if tensor in name)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] += 0.25
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed = MPlusModel.from_pretrained(folder, "cpu")
    assert list(refused(path, changed, letters())) == [field]


def test_a_quite_different_model_is_refused_by_every_field(path: Path) -> None:
    fields = refused(path, MPlusModel.from_pretrained(TINY, "cpu"), tiny_codec())
    assert {
        "decoder.vocab_size",
        "memory.tokens_per_injection",
        "weights",
        "adapters",
        "retriever",
        "genesis",
        "tokenizer",
    } <= set(fields)
    assert json.loads(json.dumps(fields))


def test_a_mismatch_is_also_found_by_an_engine_that_waits(tmp_path: Path) -> None:
    """The name is deleted and made anew with another model while an engine has it open."""
    with (
        engine(tmp_path / "a.db", small()) as one,
        engine(tmp_path / "a.db", MPlusModel.from_pretrained(TINY, "cpu")) as two,
    ):
        one.agent("a").remember(turn_of(30))
        one.agent("a").delete()
        two.agent("a").remember(turn_of(30))
        with pytest.raises(FingerprintMismatchError, match="memory: stored "):
            one.agent("a")
