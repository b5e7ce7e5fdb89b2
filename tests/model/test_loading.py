"""Loading and saving: published and own layouts, plain decoders, and what is refused, by name."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from mplus_agents.errors import CheckpointError, ConfigError, InvalidInputError
from mplus_agents.memory import TokenTensors
from mplus_agents.model import MPlusModel
from tests.model.plain_decoder import inverse_frequencies
from tests.model.samples import (
    BASE_OPTIONS,
    FAMILIES,
    FIXTURE_NAMES,
    checkpoint,
    expected,
    grow,
    published,
    save_base,
    tokens,
)

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
_QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def edited(
    folder: Path,
    name: str = "mplus",
    tensors: Callable[[Tensors], object] | None = None,
    config: Callable[[Config], object] | None = None,
) -> Path:
    """Copy a fixture's checkpoint and change its tensors or its config."""
    shutil.copytree(checkpoint(name), folder)
    if tensors:
        loaded = load_file(folder / "model.safetensors")
        tensors(loaded)
        save_file(loaded, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        edit_json(folder / "config.json", config)
    return folder


def edit_json(path: Path, change: Callable[[Config], object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def shard(folder: Path, num_shards: int = 3) -> Path:
    """Split a checkpoint's only file; neighbouring tensors go to different shards."""
    loaded = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(num_shards):
        file_name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        part = {
            name: tensor for place, (name, tensor) in enumerate(sorted(loaded.items())) if place % num_shards == number
        }
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def load(folder: Path, **options: Any) -> MPlusModel:
    return MPlusModel.from_pretrained(folder, device="cpu", **options)


def assert_same_model(one: MPlusModel, other: MPlusModel) -> None:
    """Two models hold the same tensors and compute the same numbers, bit for bit."""
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert one.config == other.config
    assert one.fingerprint == other.fingerprint
    memories = one.initial_memory(), other.initial_memory()
    for step in range(10):
        assert torch.equal(
            *(model.read(tokens(7, step), m).logits for model, m in zip((one, other), memories, strict=True))
        )
        deltas = [model.write(tokens(6 + step, step), m) for model, m in zip((one, other), memories, strict=True)]
        assert torch.equal(deltas[0].hidden, deltas[1].hidden)
        for memory, delta in zip(memories, deltas, strict=True):
            memory.apply(delta)


# Files


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_sharded_equals_unsharded(tmp_path: Path, name: str) -> None:
    assert_same_model(published(name), load(shard(edited(tmp_path / "sharded", name))))


def test_missing_shard(tmp_path: Path) -> None:
    folder = shard(edited(tmp_path / "sharded"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors"):
        load(folder)


def test_tensor_named_by_the_index_is_not_in_its_shard(tmp_path: Path) -> None:
    folder = shard(edited(tmp_path / "sharded"))
    edit_json(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update(gone="model-00001-of-00003.safetensors"),
    )
    with pytest.raises(CheckpointError, match="named by the index are missing: gone"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_broken_index(tmp_path: Path, content: str) -> None:
    folder = shard(edited(tmp_path / "sharded"))
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(folder)


@pytest.mark.parametrize("length", [0, 4, 300, 500_000])
def test_truncated_file(tmp_path: Path, length: int) -> None:
    folder = edited(tmp_path / "broken")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(folder)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = edited(tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"\.bin"):
        load(folder)


def test_no_such_folder() -> None:
    with pytest.raises(CheckpointError, match="/no/such/folder"):
        MPlusModel.from_pretrained("/no/such/folder", device="cpu")


def test_hub_out_of_reach() -> None:
    with pytest.raises(CheckpointError, match=r"mplus-agents-tests/no-such-model.*neither a folder nor a hub"):
        MPlusModel.from_pretrained("mplus-agents-tests/no-such-model", device="cpu")


def test_folder_without_config(tmp_path: Path) -> None:
    folder = edited(tmp_path / "bare")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load(folder)


def test_plain_decoder_is_no_checkpoint(tmp_path: Path) -> None:
    save_base("llama", tmp_path)
    with pytest.raises(CheckpointError, match="from_base"):
        load(tmp_path)


# Tensors


def _drop(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def _cut(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("mplus", "model.layers.2.mlp.up_proj.base_layer.weight"),
        ("mplus", "model.layers.1.input_layernorm.weight"),
        ("mplus", "model.embed_tokens.weight"),
        ("mplus", "lm_head.weight"),
        ("mplus", "bos_embedding"),
        ("mplus", "new_memory_positional_emb"),
        ("mplus", "memory"),
        ("mplus", "ltm.1"),
        ("mplus", "ltm_keys.0"),
        ("mplus", "ltm_ages.2"),
        ("mplus", "ltm_recall_frequencies.0"),
        ("mplus", "model.layers.0.self_attn.key_proj.2.weight"),
        ("mplus", "model.layers.2.self_attn.query_proj.0.weight"),
        ("mplus", f"{_QUERY}.lora_A.default.weight"),
        ("mplus", f"{_QUERY}.lora_B.decoder_adapter.weight"),
        ("memoryllm", "memory"),
        ("memoryllm", "model.norm.weight"),
    ],
)
def test_missing_tensor(tmp_path: Path, name: str, missing: str) -> None:
    folder = edited(tmp_path / "edited", name, _drop(missing))
    with pytest.raises(CheckpointError, match=f"missing: {missing}$") as caught:
        load(folder)
    assert caught.value.names == (missing,)


@pytest.mark.parametrize("name", ["mplus", "memoryllm"])
@pytest.mark.parametrize("extra", ["model.layers.3.input_layernorm.weight", "surprise", "ltm.3", f"{_QUERY}.weight"])
def test_unexpected_tensor(tmp_path: Path, name: str, extra: str) -> None:
    folder = edited(tmp_path / "edited", name, lambda tensors: tensors.update({extra: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=f"unexpected: {extra}$"):
        load(folder)


def test_memoryllm_with_a_retriever_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.key_proj.2.weight"
    folder = edited(tmp_path / "edited", "memoryllm", lambda tensors: tensors.update({name: torch.zeros(12, 24)}))
    with pytest.raises((CheckpointError, ConfigError)):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.base_layer.weight",
        "memory",
        "bos_embedding",
        "lm_head.weight",
        f"{_QUERY}.lora_A.default.weight",
        "model.layers.1.self_attn.query_proj.2.weight",
    ],
)
def test_misshaped_tensor(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"misshaped: {name} \["):
        load(edited(tmp_path / "edited", "mplus", _cut(name)))


@pytest.mark.parametrize("field", ["ltm", "ltm_keys", "ltm_ages", "ltm_recall_frequencies"])
def test_long_term_of_unequal_lengths(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=r"different numbers of tokens: ltm\.1"):
        load(edited(tmp_path / "edited", "mplus", _cut(f"{field}.1")))


# Adapters


def _without(adapter: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if f".{adapter}." in name]


@pytest.mark.parametrize("adapter", ["default", "decoder_adapter"])
def test_one_adapter_missing(tmp_path: Path, adapter: str) -> None:
    with pytest.raises(CheckpointError, match=f"wrong adapters: found .*: {adapter}$"):
        load(edited(tmp_path / "edited", "mplus", _without(adapter)))


def test_both_adapters_missing(tmp_path: Path) -> None:
    def strip(tensors: Tensors) -> None:
        _without("default")(tensors)
        _without("decoder_adapter")(tensors)

    with pytest.raises(CheckpointError, match="found no adapters"):
        load(edited(tmp_path / "edited", "mplus", strip))


def test_third_adapter(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        for part in ("lora_A", "lora_B"):
            tensors[f"{_QUERY}.{part}.third.weight"] = tensors[f"{_QUERY}.{part}.default.weight"].clone()

    with pytest.raises(CheckpointError, match=r"wrong adapters: .*third"):
        load(edited(tmp_path / "edited", "mplus", add))


def test_adapters_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected no adapters"):
        load(edited(tmp_path / "edited", "mplus", config=lambda config: config.pop("lora_config")))


def test_adapter_target_that_the_decoder_does_not_have(tmp_path: Path) -> None:
    folder = edited(
        tmp_path / "edited", config=lambda config: config["lora_config"]["target_modules"].append("qkv_proj")
    )
    with pytest.raises(CheckpointError, match=r"adapter targets .*: qkv_proj"):
        load(folder)


def test_adapter_on_another_layer_than_the_config_says(tmp_path: Path) -> None:
    folder = edited(tmp_path / "edited", config=lambda config: config["lora_config"]["target_modules"].append("o_proj"))
    with pytest.raises(CheckpointError, match=r"missing: .*o_proj\.base_layer"):
        load(folder)


def test_adapter_of_another_rank(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"misshaped: .*lora_A"):
        load(edited(tmp_path / "edited", config=lambda config: config["lora_config"].update(r=5)))


# Configs


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("add_bos_embedding", False),
        ("drop_memory_per_layer", "sometimes"),
        ("add_decoder_lora", False),
        ("add_decoder_lora", None),
        ("add_selector", False),
        ("update_ltm_mode", "decoupled"),
        ("num_selector_layers", 3),
        ("selector_layers", [1]),
        ("maintain_memory_keys", True),
        ("selector_hidden_dim", 13),
        ("num_tokens", 0),
        ("num_tokens", "8"),
        ("num_tokens", 8.5),
        ("num_tokens", None),
        ("num_blocks", -1),
        ("num_ltm_blocks", True),
        ("update_ltm_frequency", 0),
        ("update_ltm_frequency", None),
        ("initial_rf_when_moving_stm_to_ltm", "4"),
        ("decay_frequency", None),
    ],
)
def test_published_value_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    ours = {"num_tokens": "num_tokens|tokens_per_injection", "update_ltm_frequency": "update_ltm_frequency|merge_every"}
    with pytest.raises(ConfigError, match=ours.get(key, key)):
        load(edited(tmp_path / "edited", config=lambda config: config.update({key: value})))


def test_negative_decay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recall_decay"):
        load(edited(tmp_path / "edited", config=lambda config: config.update(decay_frequency=-1)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("use_rslora", True),
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("some_new_option", 1),
        ("target_modules", "all-linear"),
        ("target_modules", []),
        ("r", None),
        ("r", 0),
        ("lora_alpha", "8"),
    ],
)
def test_lora_value_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    name = {"r": "r is|rank is"}.get(key, key)
    with pytest.raises(ConfigError, match=name):
        load(edited(tmp_path / "edited", config=lambda config: config["lora_config"].update({key: value})))


def test_model_type_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gpt2"):
        load(edited(tmp_path / "edited", config=lambda config: config.update(model_type="gpt2")))
    with pytest.raises(ConfigError, match="model_type is 'mistral'"):
        load(edited(tmp_path / "other", config=lambda config: config.update(model_type="mistral", sliding_window=None)))
    with pytest.raises(ConfigError, match="not a decoder's configuration"):
        load(edited(tmp_path / "none", config=lambda config: config.pop("model_type")))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("attn_implementation", "flex_attention"),
        ("memory_rule", "newest"),
        ("dtype", "int8"),
        ("rope_inv_freq", "float64"),
        ("device", "abacus"),
    ],
)
def test_argument_is_refused_by_name(argument: str, value: str) -> None:
    arguments: dict[str, Any] = {"device": "cpu", argument: value}
    with pytest.raises(InvalidInputError, match=f"{argument} is '{value}'"):
        MPlusModel.from_pretrained(checkpoint("mplus"), **arguments)


# How it is loaded


def test_bfloat16_loads_and_reads() -> None:
    model = load(checkpoint("mplus"), dtype="bfloat16", rope_inv_freq="float32")
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    memory = model.initial_memory()
    assert memory.theta.keys.dtype == torch.bfloat16
    grow(model, memory, [5, 20])
    logits = model.read(expected("mplus")["read.0.input_ids"], model.initial_memory()).logits.float()
    # Steps of 2**-8 relative, three layers: far below the 0.70 that zeroing Θ makes.
    assert float((logits - expected("mplus")["read.0.logits"]).abs().mean()) < 0.2
    assert model.generate(tokens(5), memory, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("name", ["mplus", "memoryllm"])
@pytest.mark.parametrize(
    ("dtype", "chosen", "rounded"),
    [
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("float32", torch.bfloat16, torch.bfloat16),
    ],
)
def test_rope_frequencies(name: str, dtype: str, chosen: Any, rounded: torch.dtype) -> None:
    model = load(checkpoint(name), dtype=dtype, rope_inv_freq=chosen)
    config = json.loads((checkpoint(name) / "config.json").read_text(encoding="utf-8"))
    wanted = inverse_frequencies(config)
    for decoder in (model.decoder.model, model.write_decoder):
        ours: torch.Tensor = decoder.rotary_emb.inv_freq  # type: ignore[union-attr, assignment]
        assert ours.dtype == torch.float32
        assert torch.equal(ours, ours.to(rounded).float())
        assert torch.allclose(ours.double(), wanted, rtol=1e-6 if rounded == torch.float32 else 2**-8, atol=0)
    assert (rounded == torch.float32) == bool((ours != ours.bfloat16().float()).any())
    cos, sin = model.rope_table(300)
    angles = torch.arange(300)[:, None] * ours[None]
    assert torch.allclose(cos.float(), angles.cos().repeat(1, 2), atol=5e-3 if dtype == "bfloat16" else 1e-4)
    assert torch.allclose(sin.float(), angles.sin().repeat(1, 2), atol=5e-3 if dtype == "bfloat16" else 1e-4)
    assert model.fingerprint["rope_inv_freq"] == str(rounded).removeprefix("torch.")


def test_memory_rule() -> None:
    assert published("mplus").config.memory.rule == "released"
    assert published("mplus", "sdpa", "paper").config.memory.rule == "paper"
    ages = published("mplus", "sdpa", "paper").initial_memory().theta_ages()
    assert ages.tolist() == [list(range(63, -1, -1))] * 3
    assert published("mplus").initial_memory().theta_ages().unique().tolist() == [0]


def test_memoryllm_that_was_never_written_to_starts_empty(tmp_path: Path) -> None:
    folder = edited(tmp_path / "edited", "memoryllm", lambda tensors: tensors["initialized"].zero_())
    model = load(folder)
    assert model.genesis is None
    memory = model.initial_memory()
    assert memory.theta_size == 0
    grow(model, memory, [5, 20])
    assert memory.theta_size == 16
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").initial_memory().theta_size == 0


def test_rotary_buffers_in_a_file_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = edited(tmp_path / "edited", "mplus", lambda tensors: tensors.update({name: torch.ones(8)}))
    assert_same_model(published("mplus"), load(folder))


@pytest.mark.parametrize("keeps_head", [True, False])
def test_tied_embeddings(tmp_path: Path, keeps_head: bool) -> None:
    def tie(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not keeps_head:
            tensors.pop("lm_head.weight")

    model = load(edited(tmp_path / "tied", "mplus", tie, lambda config: config.update(tie_word_embeddings=True)))
    untied = load(
        edited(
            tmp_path / "untied", "mplus", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
        )
    )
    assert model.decoder.lm_head.weight is model.decoder.model.embed_tokens.weight
    logits = [each.read(tokens(6), each.initial_memory()).logits for each in (model, untied)]
    assert torch.equal(*logits)


# Saving


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_published_to_own_and_back(tmp_path: Path, name: str) -> None:
    model = published(name)
    model.save_pretrained(tmp_path / "own")
    saved = load(tmp_path / "own")
    assert_same_model(model, saved)
    written, original = (
        load_file(tmp_path / "own" / "model.safetensors"),
        load_file(checkpoint(name) / "model.safetensors"),
    )
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)
    config = json.loads((tmp_path / "own" / "config.json").read_text(encoding="utf-8"))
    assert config["mplus"]["memory"]["rule"] == "released"
    saved.save_pretrained(tmp_path / "again")
    assert_same_model(saved, load(tmp_path / "again"))


def test_sharded_and_overridden_rule_survive_saving(tmp_path: Path) -> None:
    model = load(shard(edited(tmp_path / "sharded")), memory_rule="paper")
    model.save_pretrained(tmp_path / "own")
    assert_same_model(model, load(tmp_path / "own"))
    assert load(tmp_path / "own", memory_rule="released").config.memory.rule == "released"


def test_save_refuses_when_the_source_is_gone(tmp_path: Path) -> None:
    model = load(edited(tmp_path / "edited"))
    shutil.rmtree(tmp_path / "edited")
    with pytest.raises(CheckpointError, match="files they came from are gone"):
        model.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.norm.weight", "weights"),
        (f"{_QUERY}.lora_A.default.weight", "adapters"),
        ("model.layers.0.self_attn.key_proj.0.weight", "retriever"),
        ("ltm_ages.0", "genesis"),
    ],
)
def test_save_refuses_when_the_source_has_changed(tmp_path: Path, name: str, part: str) -> None:
    model = load(edited(tmp_path / "edited"))
    tensors = load_file(tmp_path / "edited" / "model.safetensors")
    tensors[name].flatten()[-1] += 1
    save_file(tensors, tmp_path / "edited" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"have changed since they were loaded: {part}$"):
        model.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_save_refuses_a_folder_with_a_checkpoint(tmp_path: Path) -> None:
    folder = edited(tmp_path / "edited")
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        load(folder).save_pretrained(folder)


def _own(folder: Path, change: Callable[[Config], object]) -> Path:
    published("mplus").save_pretrained(folder)
    edit_json(folder / "config.json", change)
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: config["mplus"].update(surprise=1), "surprise"),
        (lambda config: config["mplus"]["memory"].update(surprise=1), "surprise"),
        (lambda config: config["mplus"]["memory"].update(rule="newest"), "rule is 'newest'"),
        (lambda config: config["mplus"]["memory"].pop("head_dim"), "head_dim"),
        (lambda config: config["mplus"].pop("memory"), "memory"),
        (lambda config: config["mplus"]["adapters"].update(surprise=1), "surprise"),
        (lambda config: config["mplus"].update(chunk_tokens=4), "chunk_tokens is 4"),
        (lambda config: config["mplus"].update(max_prompt_tokens=100), "max_prompt_tokens is 100"),
    ],
)
def test_own_config_is_checked(tmp_path: Path, change: Callable[[Config], object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(_own(tmp_path / "own", change))


def test_own_config_that_does_not_fit_the_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"misshaped: memory \[3, 64, 64\]"):
        load(_own(tmp_path / "own", lambda config: config["mplus"]["memory"].update(max_short_term=72)))


# Plain decoders


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_speaks_as_before_and_sees_all_its_memory(tmp_path: Path, family: str, attention: str) -> None:
    base = save_base(family, tmp_path / "base")
    model = MPlusModel.from_base(tmp_path / "base", device="cpu", attn_implementation=attention, **BASE_OPTIONS)
    memory = model.initial_memory()
    text = tokens(9, 5)
    bos = torch.full((1, 1), base.config.bos_token_id)
    # Only the first layer's bos row is what the decoder itself would have there, so compare a decoder of one layer.
    one = save_base(family, tmp_path / "one_layer", num_hidden_layers=1)
    single = MPlusModel.from_base(tmp_path / "one_layer", device="cpu", attn_implementation=attention, **BASE_OPTIONS)
    with torch.no_grad():
        wanted = one(input_ids=torch.cat([bos, text], dim=1)).logits[:, 1:]
    assert float((single.read(text, single.initial_memory()).logits - wanted).abs().max()) < 1e-4

    grow(model, memory, [20, 3, 8, 30, 12, 9, 40, 8, 5, 17])
    assert memory.long_term_sizes.tolist() == [48] * 3
    before = model.read(text, memory)
    theta = memory.theta
    for layer in range(3):
        oldest = memory.index.theta_order[layer, 0]
        memory.theta = TokenTensors(theta.keys, theta.values.clone(), theta.retrieval_keys)
        memory.theta.values[layer, oldest] += 5
        moved = model.read(text, memory).logits
        assert float((moved - before.logits)[0, 0].abs().max()) > 1e-3  # the first prompt token sees it,
        assert float((moved - before.logits)[0, -1].abs().max()) > 1e-3  # and so does the last
    memory.theta = theta
    layer, oldest_row = 1, int(memory.retrieve(1, _queries(model, memory, text))[0])
    log = memory.index.long_term
    block = memory.long_term._blocks[log.block_of(oldest_row)]
    block.values[layer, oldest_row - log.block_start(log.block_of(oldest_row))] += 5
    after = model.read(text, memory)
    assert after.retrieved[1].tolist() == before.retrieved[1].tolist()
    assert float((after.logits - before.logits)[0, 0].abs().max()) > 1e-3


def _queries(model: MPlusModel, memory: Any, text: torch.Tensor) -> torch.Tensor:
    """Overhear the queries of layer 1 in a read."""
    heard: list[torch.Tensor] = []
    handle = model.retrievers[1].query_proj.register_forward_hook(lambda *args: heard.append(args[2]))  # type: ignore[union-attr]
    model.read(text, memory)
    handle.remove()
    return heard[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_base_saves_and_loads(tmp_path: Path, family: str) -> None:
    save_base(family, tmp_path / "base")
    model = MPlusModel.from_base(tmp_path / "base", device="cpu", **BASE_OPTIONS)
    shutil.rmtree(tmp_path / "base")  # nothing of it is needed any more
    model.save_pretrained(tmp_path / "own")
    assert_same_model(model, load(tmp_path / "own"))
    load(tmp_path / "own").save_pretrained(tmp_path / "again")
    assert_same_model(model, load(tmp_path / "again"))


def test_base_seed_decides_the_new_weights(tmp_path: Path) -> None:
    save_base("llama", tmp_path)
    models = [MPlusModel.from_base(tmp_path, device="cpu", seed=seed, **BASE_OPTIONS) for seed in (0, 0, 1)]
    assert_same_model(models[0], models[1])
    assert models[0].fingerprint["retriever"] != models[2].fingerprint["retriever"]
    assert models[0].fingerprint["weights"] == models[2].fingerprint["weights"]


def test_base_as_memoryllm_and_without_adapters(tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base")
    options = {**BASE_OPTIONS, "retrieval_dim": 0, "num_retrieved": 0, "max_long_term": 0, "adapter_rank": 0}
    model = MPlusModel.from_base(tmp_path / "base", device="cpu", **options)
    assert model.config.adapters is None
    memory = model.initial_memory()
    grow(model, memory, [9, 3, 20, 8, 6])
    assert memory.theta_size == 32
    model.save_pretrained(tmp_path / "own")
    assert_same_model(model, load(tmp_path / "own"))


_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 128}, "sliding_window is 128"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}, "sliding_window is 128"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, "sliding_window is 64"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic'",
        ),
        ("llama", {"rope_parameters": _YARN}, "rope_type is 'yarn'"),
        ("llama", {"rope_parameters": _LONG}, "rope_type is 'longrope'"),
    ],
)
def test_unsupported_attention_and_positions(tmp_path: Path, family: str, changes: Config, reason: str) -> None:
    save_base(family, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    edit_json(
        tmp_path / "config.json",
        lambda values: values.update({**changes, "layer_types": None} if "qwen" in family else changes),
    )
    assert config.model_type == FAMILIES[family][0].model_type
    with pytest.raises(ConfigError, match=reason):
        MPlusModel.from_base(tmp_path, device="cpu", **BASE_OPTIONS)


def test_unsupported_family(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model_type is 'gpt2'"):
        MPlusModel.from_base(tmp_path, device="cpu", **BASE_OPTIONS)


def test_base_with_a_missing_tensor(tmp_path: Path) -> None:
    save_base("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing: {name}$"):
        MPlusModel.from_base(tmp_path, device="cpu", **BASE_OPTIONS)


def test_base_must_not_be_a_checkpoint_of_ours() -> None:
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0"):
        MPlusModel.from_base(checkpoint("mplus"), device="cpu", **BASE_OPTIONS)


def test_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="/no/such/base"):
        MPlusModel.from_base("/no/such/base", device="cpu", **BASE_OPTIONS)
    save_base("llama", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="no decoder at"):
        MPlusModel.from_base(tmp_path, device="cpu", **BASE_OPTIONS)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no decoder at .*model\.safetensors"):
        MPlusModel.from_base(tmp_path, device="cpu", **BASE_OPTIONS)


@pytest.mark.parametrize("option", ["surprise", "hidden_size", "num_layers"])
def test_unknown_base_option(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"from_base: unknown key '{option}'"):
        MPlusModel.from_base(tmp_path, device="cpu", **{**BASE_OPTIONS, option: 3})


# Host memory

_MEASURE = """
import sys, threading, time
import psutil
from mplus_agents.model import MPlusModel
MPlusModel.from_pretrained(sys.argv[2], device="cpu")  # imports and first allocations
process, peak, done = psutil.Process(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)
before = process.memory_info().rss
thread = threading.Thread(target=watch); thread.start()
model = MPlusModel.from_pretrained(sys.argv[1], device="cpu")
done = True; thread.join()
print(peak - before, sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()))
"""


@pytest.mark.slow
def test_host_peak_is_the_model_and_one_shard(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "vocab_size": 20_000,
        "head_dim": 128,
    }
    save_base("llama", tmp_path / "base", **sizes)
    model = MPlusModel.from_base(tmp_path / "base", device="cpu", **BASE_OPTIONS)
    folder = tmp_path / "own"
    model.save_pretrained(folder)
    shard(folder, 8)
    shard_bytes = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", _MEASURE, str(folder), str(checkpoint("memoryllm"))]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    growth, model_bytes = (int(number) for number in output.split()[-2:])
    assert model_bytes > 150e6
    # Slack: the checksum's 8 MB of factors, 8 MB of products and a copy of one tensor where it is not aligned
    # (41 MB, the embeddings), plus 16 MB for the allocator. A second copy of the model would be far above it.
    slack = 8e6 + 8e6 + math.ceil(20_000 * 512 * 4) + 16e6
    assert growth <= model_bytes + shard_bytes + slack
    assert model_bytes + shard_bytes + slack < 2 * model_bytes


def test_own_format_remembers_how_the_published_weights_were_used(tmp_path: Path) -> None:
    load(checkpoint("mplus"), dtype="bfloat16").save_pretrained(tmp_path / "own")
    assert load(tmp_path / "own", dtype="bfloat16").fingerprint["rope_inv_freq"] == "bfloat16"
    assert load(tmp_path / "own", dtype="float32").fingerprint["rope_inv_freq"] == "float32"
    assert load(tmp_path / "own").config == load(checkpoint("mplus")).config


def test_a_saved_base_brings_its_tokenizer_along(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(Path(MPlusModel.from_pretrained("mplus-tiny", "cpu").source or ""), base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    del config["mplus"]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(base / "model.safetensors")
    own = ("query_proj", "key_proj", "bos_embedding", "new_memory_positional_emb")
    plain = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in own)}
    save_file(plain, base / "model.safetensors", metadata={"format": "pt"})
    MPlusModel.from_base(base, "cpu", **BASE_OPTIONS).save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "tokenizer.json").read_bytes()
    assert saved == (base / "tokenizer.json").read_bytes()
    assert load(tmp_path / "saved").config.memory.tokens_per_injection == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", None),
        ("rope_scaling", 5),
        ("num_attention_heads", 5),
        ("torch_dtype", "int8"),
        ("lora_config", []),
        ("num_tokens", math.nan),
        ("num_tokens", math.inf),
        ("drop_memory_per_layer", False),
    ],
)
def test_values_that_no_library_accepts_are_errors_of_ours(tmp_path: Path, key: str, value: Any) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint("mplus"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json|lora_config"):
        load(folder)
