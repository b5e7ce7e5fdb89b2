"""Reading, writing and decoding against a decoder written out by hand, in the cases that the fixtures do not have."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mplus_agents.config import MemoryRule
from mplus_agents.errors import ConfigError, InvalidInputError
from mplus_agents.memory import MemoryDelta, MemoryState, TokenTensors
from mplus_agents.model import MPlusModel
from tests.model.plain_decoder import PlainDecoder
from tests.model.samples import checkpoint, empty_memory, grow, published, tokens

_CLOSE = 2e-4
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
both_rules = pytest.mark.parametrize("rule", ["paper", "released"])


@cache
def plain(name: str, adapter: str = "decoder_adapter") -> PlainDecoder:
    return PlainDecoder(checkpoint(name), adapter)


class Hidden:
    """The hidden states behind a memory, looked up by birth: of the checkpoint, or of what was written."""

    def __init__(self, decoder: PlainDecoder, memory: MemoryState, deltas: list[MemoryDelta], genesis: bool) -> None:
        self._decoder, self._memory, self._deltas = decoder, memory, deltas
        self._has_genesis = genesis

    def token(self, layer: int, birth: int) -> torch.Tensor:
        num_new = self._memory.config.tokens_per_injection
        if birth >= 0:
            return self._deltas[birth // num_new].hidden[layer, birth % num_new]
        assert self._has_genesis
        theta = self._decoder.tensors["memory"]
        if birth >= -theta.shape[1]:
            return theta[layer, birth + theta.shape[1]]
        ages = self._decoder.tensors[f"ltm_ages.{layer}"].tolist()
        oldest_first = sorted(range(len(ages)), key=lambda place: -ages[place])
        return self._decoder.tensors[f"ltm.{layer}"][oldest_first[birth + theta.shape[1] + len(ages)]]

    def theta(self) -> list[torch.Tensor]:
        index = self._memory.index
        births = np.take_along_axis(index.theta_births, index.theta_order, axis=1)
        width = self._memory.config.hidden_size
        return [
            torch.stack([self.token(layer, int(birth)) for birth in row]) if len(row) else torch.empty((0, width))
            for layer, row in enumerate(births)
        ]

    def long_term(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor, int]], list[list[int]]]:
        """Θ oldest first, as the hand-written decoder takes it, and each token's place in the order of entry."""
        log, found, entry_places = self._memory.index.long_term, [], []
        for layer in range(self._memory.config.num_layers):
            rows = log.alive_rows(layer)
            births = log.births[layer, rows - log.base_row].tolist()
            if self._memory.config.rule == "paper":
                order = sorted(range(len(rows)), key=lambda place: births[place])
            else:
                ages = self._memory.index.long_term_ages(layer, rows).tolist()
                latest_first = list(reversed(range(len(rows))))
                order = sorted(latest_first, key=lambda place: -ages[place])
            width = self._memory.config.hidden_size
            hidden = [self.token(layer, births[place]) for place in order]
            stacked = torch.stack(hidden) if hidden else torch.empty((0, width))
            keys = torch.stack([self._key(layer, births[place]) for place in order]) if hidden else torch.empty((0, 12))
            found.append((stacked, keys, self._memory.config.num_retrieved))
            entry_places.append(order)
        return found, entry_places

    def _key(self, layer: int, birth: int) -> torch.Tensor:
        num_theta = self._decoder.tensors["memory"].shape[1]
        if birth >= -num_theta:
            return self._decoder.retrieval_keys(layer, self.token(layer, birth)[None])[0]
        ages = self._decoder.tensors[f"ltm_ages.{layer}"].tolist()
        oldest_first = sorted(range(len(ages)), key=lambda place: -ages[place])
        return self._decoder.tensors[f"ltm_keys.{layer}"][oldest_first[birth + num_theta + len(ages)]]


def check_read(
    model: MPlusModel, memory: MemoryState, hidden: Hidden, decoder: PlainDecoder, mask: list[bool] | None = None
) -> None:
    """Compare a read with the hand-written decoder: logits, retrieved tokens, their order."""
    question = tokens(11, 77)
    long_term, places = hidden.long_term() if memory.config.has_long_term else (None, [])
    logits, chosen = decoder.read(question[0].tolist(), hidden.theta(), long_term, mask)
    output = model.read(question, memory, None if mask is None else torch.tensor([mask]))
    assert float((output.logits[0] - logits).abs().max()) < _CLOSE
    for layer, picked in enumerate(chosen):
        wanted = [places[layer][place] for place in picked] if places else []
        assert output.retrieved[layer].tolist() == wanted


def everything(memory: MemoryState) -> list[torch.Tensor]:
    """Copy all tensors and integers that a memory consists of."""
    tensors = [memory.theta.keys, memory.theta.values, memory.theta.retrieval_keys]
    tensors += [memory.tail_hidden] if memory.tail_hidden is not None else []
    for block in memory.long_term._blocks.values():
        tensors += [block.keys, block.values, block.retrieval_keys, block.alive, block.placement]
    arrays = memory.index.to_arrays()
    return [tensor.clone() for tensor in tensors] + [torch.from_numpy(arrays[name].copy()) for name in sorted(arrays)]


def check_equal(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    assert len(before) == len(after)
    for left, right in zip(before, after, strict=True):
        assert torch.equal(torch.nan_to_num(left), torch.nan_to_num(right))


@pytest.mark.parametrize("name", ["mplus", "memoryllm"])
def test_fused_weights_are_w_plus_s_b_a(name: str) -> None:
    model = published(name)
    reads, writes = plain(name), plain(name, "default")
    state = model.decoder.state_dict()
    generator = torch.Generator().manual_seed(0)
    assert len(model.adapters) == 6 * reads.num_layers
    for linear in model.adapters:
        wanted = reads.weight(f"model.{linear}")
        assert torch.allclose(state[f"model.{linear}.weight"], wanted, atol=1e-6)
        rows = torch.randn((5, wanted.shape[1]), generator=generator)
        written = model.write_decoder.get_submodule(linear)(rows)
        assert torch.allclose(written, rows @ writes.weight(f"model.{linear}").T, atol=1e-4)
        assert not torch.allclose(written, rows @ wanted.T, atol=1e-2)  # the adapters differ
        shared = model.write_decoder.get_submodule(linear).weight
        assert shared.data_ptr() == state[f"model.{linear}.weight"].data_ptr()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["mplus", "memoryllm"])
def test_both_passes_share_every_other_tensor(name: str) -> None:
    model = published(name)
    reads = dict(model.decoder.model.named_parameters())
    for parameter_name, parameter in model.write_decoder.named_parameters():
        if parameter_name.endswith((".up", ".down")):
            continue
        assert parameter is reads[parameter_name]


@both_rules
@pytest.mark.parametrize("name", ["mplus", "mplus_small_long_term"])
def test_reading_and_writing_do_not_change_the_memory(name: str, rule: MemoryRule) -> None:
    model = published(name, "sdpa", rule)
    memory = model.initial_memory()
    for length in (5, 30):
        before = everything(memory)
        model.read(tokens(9), memory)
        model.read(tokens(3), memory, torch.tensor([[False, True, False]]))
        model.generate(tokens(7), memory, max_new_tokens=4)
        delta = model.write(tokens(length), memory)
        check_equal(before, everything(memory))
        memory.apply(delta)


@both_attentions
def test_empty_memory_is_bos_alone(attention: str) -> None:
    model = published("mplus", attention, "paper")
    memory = empty_memory(model)
    check_read(model, memory, Hidden(plain("mplus"), memory, [], False), plain("mplus"))
    assert [rows.tolist() for rows in model.read(tokens(4), memory).retrieved] == [[], [], []]


@both_attentions
@both_rules
@pytest.mark.parametrize("num_injections", [1, 5, 8, 9, 10, 14])
def test_memory_that_started_empty(num_injections: int, rule: MemoryRule, attention: str) -> None:
    # θ holds 8 injections; after 9, Θ holds 8 tokens (fewer than K0 = 16), after 14 it holds 48.
    model = published("mplus", attention, rule)
    memory = empty_memory(model)
    deltas = grow(model, memory, [5, 8, 29, 1, 17, 3, 40, 11, 9, 30, 2, 8, 12, 20][:num_injections])
    assert memory.theta_size == min(64, 8 * num_injections)
    num_merged, num_retrieved = int(memory.long_term_sizes[0]), len(model.read(tokens(11, 77), memory).retrieved[0])
    if rule == "released" and num_merged < 16:
        assert num_retrieved == (16 if num_merged else 0)  # repeated: see the parity tests
        if num_merged or memory.num_staged:
            return
    else:
        assert num_retrieved == min(16, num_merged)
    check_read(model, memory, Hidden(plain("mplus"), memory, deltas, False), plain("mplus"))


@both_attentions
@both_rules
def test_memory_with_genesis(rule: MemoryRule, attention: str) -> None:
    model = published("mplus", attention, rule)
    memory = model.initial_memory(5)
    deltas = grow(model, memory, [5, 8, 29, 1, 17])
    hidden = Hidden(plain("mplus"), memory, deltas, True)
    check_read(model, memory, hidden, plain("mplus"))
    check_read(model, memory, hidden, plain("mplus"), [False] * 8 + [True] * 3)
    check_read(model, memory, hidden, plain("mplus"), [True] + [False] * 10)


def _uneven(folder: Path, sizes: list[int]) -> Path:
    """Copy the M+ fixture with a Θ of another size in every layer."""
    shutil.copytree(checkpoint("mplus"), folder)
    tensors = load_file(folder / "model.safetensors")
    for layer, size in enumerate(sizes):
        for field in ("ltm", "ltm_keys", "ltm_ages", "ltm_recall_frequencies"):
            tensors[f"{field}.{layer}"] = tensors[f"{field}.{layer}"][:size].clone()
    save_file(tensors, folder / "model.safetensors")
    return folder


@both_attentions
@pytest.mark.parametrize("sizes", [[40, 3, 17], [0, 20, 5], [1, 0, 0]])
def test_layers_with_long_terms_of_different_sizes(tmp_path: Path, sizes: list[int], attention: str) -> None:
    folder = _uneven(tmp_path / "uneven", sizes)
    decoder = PlainDecoder(folder, "decoder_adapter")
    model = MPlusModel.from_pretrained(folder, device="cpu", attn_implementation=attention, memory_rule="paper")
    memory = model.initial_memory()
    assert memory.long_term_sizes.tolist() == sizes
    hidden = Hidden(decoder, memory, [], True)
    check_read(model, memory, hidden, decoder)
    # A single query may score many tokens exactly 1.0 in float32, which of them are taken is then anyone's guess.
    check_read(model, memory, hidden, decoder, [False] * 5 + [True] * 6)
    theta, (long_term, _) = hidden.theta(), hidden.long_term()
    answer = model.generate(tokens(6), memory, max_new_tokens=5)[0].tolist()
    assert answer == _greedy_by_hand(decoder, tokens(6)[0].tolist(), theta, long_term, 5)
    one_token = model.read(tokens(1), memory).logits[0]
    assert float((one_token - decoder.read(tokens(1)[0].tolist(), theta, long_term)[0]).abs().max()) < _CLOSE
    # Later injections even the sizes out; the layers' tokens must not get mixed up on the way.
    deltas = grow(model, memory, [9, 3, 20])
    check_read(model, memory, Hidden(decoder, memory, deltas, True), decoder)


def _greedy_by_hand(
    decoder: PlainDecoder, prompt: list[int], theta: list[torch.Tensor], long_term: Any, num_tokens: int
) -> list[int]:
    """Read prompt and answer so far again for each token; only the prompt queries Θ."""
    sequence = list(prompt)
    for _ in range(num_tokens):
        mask = [place < len(prompt) for place in range(len(sequence))]
        logits, _ = decoder.read(sequence, theta, long_term, mask)
        sequence.append(int(logits[-1].argmax()))
        if sequence[-1] == decoder.config["eos_token_id"]:
            break
    return sequence[len(prompt) :]


@both_attentions
@pytest.mark.parametrize("seed", range(3))
def test_greedy_tokens_are_those_of_reading_again(seed: int, attention: str) -> None:
    model, decoder = published("mplus", attention, "paper"), plain("mplus")
    memory = model.initial_memory(seed)
    hidden = Hidden(decoder, memory, grow(model, memory, [9, 20], seed), True)
    prompt = tokens(7 + seed, 50 + seed)
    wanted = _greedy_by_hand(decoder, prompt[0].tolist(), hidden.theta(), hidden.long_term()[0], 8)
    answer = model.generate(prompt, memory, max_new_tokens=8)[0].tolist()
    assert answer == wanted
    again = prompt
    for token in answer:  # the same by our own read
        mask = torch.arange(again.shape[1])[None] < prompt.shape[1]
        assert int(model.read(again, memory, mask).logits[0, -1].argmax()) == token
        again = torch.cat([again, torch.tensor([[token]])], dim=1)


@both_attentions
@pytest.mark.parametrize("num_text", [1, 5, 7, 8, 9, 29])
@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("name", ["mplus", "memoryllm"])
def test_write(name: str, has_tail: bool, num_text: int, attention: str) -> None:
    model, decoder = published(name, attention), plain(name, "default")
    memory = empty_memory(model)
    if has_tail:
        grow(model, memory, [12, 4])
        assert memory.tail_hidden is not None
    text = tokens(num_text, 31)
    delta = model.write(text, memory)
    wanted = decoder.write(text[0].tolist(), None if memory.tail_hidden is None else list(memory.tail_hidden), 8)
    assert delta.hidden.shape == wanted.shape == (3, 8, 64)
    assert float((delta.hidden - wanted).abs().max()) < _CLOSE
    reads = plain(name)
    for layer in range(3):
        normed = reads.norm(wanted[layer], f"model.layers.{layer}.input_layernorm")
        for part, ours in (("k_proj", delta.keys), ("v_proj", delta.values)):
            projected = normed @ reads.weight(f"model.layers.{layer}.self_attn.{part}").T
            assert float((ours[layer].flatten(1) - projected).abs().max()) < _CLOSE
        if name == "mplus":
            assert (
                float((delta.retrieval_keys[layer] - reads.retrieval_keys(layer, wanted[layer])).abs().max()) < _CLOSE
            )


def _crowd(model: MPlusModel) -> list[MemoryState]:
    """Memories that differ in all that can differ: empty, filling, full, with and without Θ and genesis."""
    memories = [empty_memory(model, 0), model.initial_memory(1)]
    for seed, lengths in enumerate([[9], [5, 8, 29], [4] * 9, [6] * 13]):
        memories.append(empty_memory(model, seed))
        grow(model, memories[-1], lengths, seed)
    memories.append(model.initial_memory(7))
    grow(model, memories[-1], [12, 4], 7)
    return memories


@both_attentions
@both_rules
@pytest.mark.parametrize("num_text", [1, 6, 20])
def test_batch_equals_single_calls(rule: MemoryRule, num_text: int, attention: str) -> None:
    model = published("mplus", attention, rule)
    memories = _crowd(model)
    texts = tokens(num_text, 3, rows=len(memories))
    mask = torch.zeros(texts.shape, dtype=torch.bool)
    for row in range(len(memories)):
        mask[row, row % num_text :] = True
    before = [everything(memory) for memory in memories]
    reads, masked = model.read(texts, memories), model.read(texts, memories, mask)
    deltas = model.write(texts, memories)
    answers = model.generate(texts, memories, max_new_tokens=6, query_mask=mask)
    assert len(deltas) == len(reads.retrieved) == len(memories)
    for row, memory in enumerate(memories):
        text = texts[row : row + 1]
        for together, alone in (
            (reads, model.read(text, memory)),
            (masked, model.read(text, memory, mask[row : row + 1])),
        ):
            assert float((together.logits[row] - alone.logits[0]).abs().max()) < 1e-4
            assert [rows.tolist() for rows in together.retrieved[row]] == [rows.tolist() for rows in alone.retrieved]
        delta = model.write(text, memory)
        for name in ("hidden", "keys", "values", "retrieval_keys"):
            assert float((getattr(deltas[row], name) - getattr(delta, name)).abs().max()) < 1e-4
        alone_answer = model.generate(text, memory, max_new_tokens=6, query_mask=mask[row : row + 1])[0].tolist()
        assert answers[row, : len(alone_answer)].tolist() == alone_answer
        assert set(answers[row, len(alone_answer) :].tolist()) <= set(model.eos_token_ids)
        check_equal(before[row], everything(memory))


def test_rows_of_a_batch_do_not_depend_on_each_other() -> None:
    model = published("mplus", "sdpa", "paper")
    memories = _crowd(model)
    texts = tokens(5, 3, rows=len(memories))
    first = model.read(texts, memories).logits
    changed = texts.clone()
    changed[1:] = tokens(5, 4, rows=len(memories) - 1)
    assert torch.equal(model.read(changed, memories).logits[0], first[0])
    reordered = list(range(len(memories)))[::-1]
    back = model.read(texts[reordered], [memories[row] for row in reordered]).logits[reordered]
    assert float((back - first).abs().max()) < 1e-4


def test_query_mask_asks_with_these_tokens_alone() -> None:
    model = published("mplus")
    memory = model.initial_memory()
    text = tokens(20, 1)
    everyone, last = (model.read(text, memory, mask) for mask in (None, torch.arange(20)[None] >= 17))
    assert torch.equal(model.read(text, memory, torch.ones((1, 20), dtype=torch.bool)).logits, everyone.logits)
    assert any(a.tolist() != b.tolist() for a, b in zip(everyone.retrieved, last.retrieved, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"num_beams": 4}, ConfigError, "num_beams"),
        ({"logits_processor": None}, ConfigError, "logits_processor"),
        ({"attention_mask": None}, ConfigError, "attention_mask"),
        ({"max_new_tokens": 0}, InvalidInputError, "max_new_tokens is 0"),
        ({"max_new_tokens": True}, InvalidInputError, "max_new_tokens is True"),
        ({"temperature": 0.0}, InvalidInputError, r"temperature is 0\.0"),
        ({"temperature": float("nan")}, InvalidInputError, "temperature is nan"),
        ({"top_k": 0}, InvalidInputError, "top_k is 0"),
        ({"top_p": 0.0}, InvalidInputError, r"top_p is 0\.0"),
        ({"top_p": 1.5}, InvalidInputError, r"top_p is 1\.5"),
        ({"repetition_penalty": 0.0}, InvalidInputError, r"repetition_penalty is 0\.0"),
    ],
)
def test_generation_options_are_refused_by_name(options: dict[str, Any], error: type[Exception], reason: str) -> None:
    model = published("mplus")
    with pytest.raises(error, match=reason):
        model.generate(tokens(3), model.initial_memory(), **options)


def test_sampling_follows_its_seed() -> None:
    model = published("mplus")
    memory = model.initial_memory()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.3, "top_p": 0.95}
    first = model.generate(tokens(5), memory, seed=1, **options)
    assert torch.equal(first, model.generate(tokens(5), memory, seed=1, **options))
    assert any(not torch.equal(first, model.generate(tokens(5), memory, seed=seed, **options)) for seed in (2, 3, 4))
    greedy = model.generate(tokens(5), memory, max_new_tokens=12)
    assert torch.equal(model.generate(tokens(5), memory, max_new_tokens=12, do_sample=True, top_k=1), greedy)


def test_repetition_penalty_counts_the_prompts_tokens() -> None:
    model = published("mplus")
    memory = model.initial_memory()
    prompt = tokens(5)
    logits = model.read(prompt, memory).logits[0, -1]
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[prompt[0]] = True
    punished = torch.where(seen, torch.where(logits > 0, logits / 50, logits * 50), logits)
    first = model.generate(prompt, memory, max_new_tokens=1, repetition_penalty=50.0)
    assert int(first) == int(punished.argmax())


def test_decoding_stops_at_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = published("mplus")
    memories = [model.initial_memory(), empty_memory(model)]
    prompts = tokens(5, 2, rows=2)
    free = model.generate(prompts, memories, max_new_tokens=10)
    end = int(free[0, 3])
    monkeypatch.setattr(MPlusModel, "eos_token_ids", property(lambda _: [end, 210]))
    alone = model.generate(prompts[:1], memories[0], max_new_tokens=10)
    stop = free[0].tolist().index(end)
    assert alone[0].tolist() == free[0, : stop + 1].tolist()
    together = model.generate(prompts, memories, max_new_tokens=10)
    assert together[0, : stop + 1].tolist() == alone[0].tolist()
    assert set(together[0, stop + 1 :].tolist()) <= {end}


@pytest.mark.parametrize(
    ("input_ids", "reason"),
    [
        (torch.zeros((1, 0), dtype=torch.int64), r"input_ids is .*\[1, 0\]"),
        (torch.zeros((3,), dtype=torch.int64), r"input_ids is .*\[3\]"),
        (torch.zeros((1, 3)), "input_ids is .*float32"),
        (torch.zeros((1, 3), dtype=torch.int32), "input_ids is .*int32"),
        (torch.tensor([[0, 211]]), "input_ids is .*211"),
        (torch.tensor([[0, -1]]), "input_ids is .*0 to 210"),
        (torch.zeros((2, 3), dtype=torch.int64), "memory is .*1 memories"),
    ],
)
def test_inputs_are_checked(input_ids: torch.Tensor, reason: str) -> None:
    model = published("mplus")
    memory = model.initial_memory()
    before = everything(memory)
    for call in (model.read, model.write, model.generate):
        with pytest.raises(InvalidInputError, match=reason):
            call(input_ids, memory)
    check_equal(before, everything(memory))


def test_no_rows_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="input_ids is"):
        published("mplus").read(torch.zeros((0, 3), dtype=torch.int64), [])


def test_memory_of_another_model_is_refused() -> None:
    other = published("memoryllm").initial_memory()
    with pytest.raises(InvalidInputError, match=r"memory is .*another shape"):
        published("mplus").read(tokens(3), other)
    with pytest.raises(InvalidInputError, match=r"memory is .*another shape"):
        published("mplus").read(tokens(3), published("mplus", "sdpa", "paper").initial_memory())


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros((1, 3), dtype=torch.bool),
        torch.ones((1, 2), dtype=torch.bool),
        torch.ones(3, dtype=torch.bool),
        torch.tensor([[1, 0, 1]]),  # as integers it would pick tokens by number
    ],
)
def test_query_mask_is_checked(mask: torch.Tensor) -> None:
    model = published("mplus")
    with pytest.raises(InvalidInputError, match="query_mask is"):
        model.read(tokens(3), model.initial_memory(), mask)


def test_plain_decoder_calls_pass_through_the_hooks() -> None:
    model = published("memoryllm")
    text = tokens(6)
    with torch.no_grad():
        plain_logits = model.decoder(input_ids=text).logits
        again = model.decoder.generate(input_ids=text, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert plain_logits.shape == (1, 6, 211)
    assert again.shape[1] > 6


@both_attentions
def test_gradients_reach_projected_hidden_states(attention: str) -> None:
    model = published("mplus", attention)
    memory = model.initial_memory()
    hidden = plain("mplus").tensors["memory"].clone().requires_grad_()
    keys, values, retrieval_keys = model.project(hidden)
    memory.theta = TokenTensors(keys, values, retrieval_keys)
    logits = model.read(tokens(6), memory).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad.abs().amax(dim=2) > 0).all()  # every token of every layer counts
    # The slope along the gradient, measured by two reads.
    step = 1e-3 / hidden.grad.norm() * hidden.grad
    values_at = []
    with torch.no_grad():
        for sign in (1, -1):
            memory.theta = TokenTensors(*model.project(hidden + sign * step))
            values_at.append(float((model.read(tokens(6), memory).logits * weights).sum()))
    measured = (values_at[0] - values_at[1]) / 2e-3
    assert measured == pytest.approx(float(hidden.grad.norm()), rel=0.05)


def test_fixture_configs_are_what_the_plain_decoder_assumes() -> None:
    for name in ("mplus", "mplus_small_long_term", "memoryllm"):
        config = json.loads((checkpoint(name) / "config.json").read_text(encoding="utf-8"))
        assert (config["hidden_act"], config["attention_bias"], config["mlp_bias"]) == ("silu", False, False)


def test_reading_without_long_term_equals_an_emptied_one() -> None:
    model = published("mplus")
    memory, emptied = model.initial_memory(seed=1), model.initial_memory(seed=1)
    for state in (memory, emptied):
        grow(model, state, [20, 20, 20, 20])
    for layer in range(model.config.memory.num_layers):
        rows = emptied.index.long_term.alive_rows(layer)
        emptied.index.long_term.kill(layer, rows)
        emptied.long_term.forget(layer, rows)
        emptied.index.long_term.sizes[layer] = emptied.num_staged  # nothing merged is left
    ids = torch.tensor([[5, 6, 7, 8]])
    without = model.read(ids, memory, long_term="off")
    assert torch.equal(without.logits, model.read(ids, emptied).logits)
    assert all(len(rows) == 0 for rows in without.retrieved)
    assert float((without.logits - model.read(ids, memory).logits).abs().max()) > 0.01
