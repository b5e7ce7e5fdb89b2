"""Networks from scratch, from a decoder and from an earlier stage; what is trained is what is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import CheckpointError, ConfigError
from mplus_agents.memory import MemoryState
from mplus_agents.model import MPlusModel
from mplus_agents.model.checkpoint import CheckpointFiles
from mplus_agents.training.build import adapt_network, base_network, build_network, new_network
from mplus_agents.training.config import BaseDecoder, MemoryOptions, NewModel, Start, TokenizerOptions
from mplus_agents.training.folders import load_network, save_network
from mplus_agents.training.network import LayerPrefix, TrainableMPlus
from mplus_agents.training.tokenizer import make_codec
from tests.model.samples import save_base
from tests.training.stages import TINY_MODEL, assert_equal_weights, stage

MEMORY = MemoryOptions(**TINY_MODEL["new"]["memory"])
TINY_ASSET = Path(__file__).parents[2] / "mplus_agents" / "assets" / "mplus-tiny"


class ThetaOnly:
    """A memory of [bos | θ], for one prompt."""

    def __init__(self, network: TrainableMPlus, theta: list[torch.Tensor]) -> None:
        self.num_slots = 1 + theta[0].shape[1]
        self._network, self._theta = network, theta

    def prefix(self, layer_idx: int, layer: nn.Module, normed: torch.Tensor) -> LayerPrefix:
        rows = torch.cat([self._network.bos_embedding[layer_idx][None], self._theta[layer_idx]], dim=1)
        return self._network.project(layer, rows, torch.arange(self.num_slots))


def base_folder(folder: Path, family: str = "llama") -> Path:
    """Make a decoder with a tokenizer beside it."""
    save_base(family, folder)
    codec = make_codec(TokenizerOptions(vocab_size=300, num_samples=5, prose=()))
    tokenizer: Any = codec.tokenizer
    tokenizer.save_pretrained(str(folder))
    return folder


def compare_with_served(network: TrainableMPlus, folder: Path) -> None:
    """Write two chunks and read a prompt, both ways."""
    network.eval()
    served = MPlusModel.from_pretrained(folder, device="cpu", dtype="float32")
    torch.manual_seed(1)
    ids = [torch.randint(3, 290, (1, length)) for length in (20, 3, 9)]  # the second one is shorter than K
    with torch.no_grad():
        first = network.write(ids[0], None)
        second = network.write(ids[1], first)
        theta = [torch.cat(rows, dim=1) for rows in zip(first, second, strict=True)]
        logits = network.logits(network.read(ids[2], ThetaOnly(network, theta)))
    memory: MemoryState = served.initial_memory()
    for chunk, expected in zip(ids[:2], (first, second), strict=True):
        delta = served.write(chunk, memory)
        torch.testing.assert_close(delta.hidden, torch.cat(expected), rtol=0, atol=1e-5)
        memory.apply(delta)
    torch.testing.assert_close(served.read(ids[2], memory).logits, logits, rtol=0, atol=1e-5)


def shake(network: TrainableMPlus) -> None:
    """Give every weight an effect: adapters start without."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn_like(weight))


def test_from_scratch_it_is_served_as_trained(tmp_path: Path) -> None:
    network, codec = build_network(stage())
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in network.parameters())
    save_network(network, codec, tmp_path)
    compare_with_served(network, tmp_path)
    assert TextCodec.from_pretrained(tmp_path).fingerprint() == codec.fingerprint()


@pytest.mark.parametrize("family", ["llama", "qwen2_tied"])
def test_with_adapters_it_is_served_as_trained(tmp_path: Path, family: str) -> None:
    base = base_folder(tmp_path / "base", family)
    network, codec = base_network(BaseDecoder(path=str(base), adapter_rank=3, memory=MEMORY))
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    kinds = (".lora_A.default.", ".lora_B.default.", ".lora_A.decoder_adapter.", ".lora_B.decoder_adapter.")
    assert len([name for name in trained if any(kind in name for kind in kinds)]) == 3 * 6 * 4  # layers, linears, kinds
    rest = {name for name in trained if ".lora_" not in name}
    assert rest == {"bos_embedding", "new_memory_positional_emb"} | {
        f"retrievers.{layer}.{part}_proj.{place}.weight"
        for layer in range(3)
        for part in ("query", "key")
        for place in (0, 2)
    }
    shake(network)
    save_network(network, codec, tmp_path / "saved")
    compare_with_served(network, tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    again, _ = load_network(tmp_path / "saved", adapter_dropout=0.1)
    assert_equal_weights(again.state_dict(), network.state_dict())
    shake(network)
    shake(again)
    assert_equal_weights(again.state_dict(), network.state_dict())  # tied weights stay tied


def test_start_of_a_decoder_is_the_published_one(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    network, _ = base_network(BaseDecoder(path=str(base), adapter_rank=3, memory=MEMORY))
    plain = LlamaForCausalLM.from_pretrained(str(base))
    first = plain.model.embed_tokens.weight[plain.config.bos_token_id]
    assert torch.equal(network.bos_embedding.detach(), first.expand(3, 1, -1))
    assert not network.new_memory_positional_emb.any()
    hidden = torch.randn(2, 5, 64)
    linear, own = plain.model.layers[1].self_attn.q_proj, network.layers[1].get_submodule("self_attn.q_proj")
    assert torch.equal(own(hidden), linear(hidden))  # adapters start without effect


def test_frozen_base_keeps_its_own_precision_and_bits(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    LlamaForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16).save_pretrained(str(base))
    model = {"base": {"path": str(base), "adapter_rank": 2, "memory": MEMORY.model_dump(exclude_none=True)}}
    network, codec = build_network(stage(model=model, precision="bf16_master"))
    kinds = {(weight.requires_grad, weight.dtype) for weight in network.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    save_network(network, codec, tmp_path / "saved")
    before, after = CheckpointFiles(base), CheckpointFiles(tmp_path / "saved")
    for name in before.file_of:
        owner, _, leaf = name.rpartition(".")
        found = name if name in after.file_of else f"{owner}.base_layer.{leaf}"
        assert torch.equal(before.get(name), after.get(found))


def test_retriever_can_come_later_and_other_sizes_cannot_change() -> None:
    config = stage(
        model={"new": {**TINY_MODEL["new"], "memory": {"retrieval_dim": 0, "num_retrieved": 0, "max_long_term": 0}}}
    )
    network, _ = build_network(config)
    assert not len(network.retrievers)
    later = MemoryOptions(retrieval_dim=16, num_retrieved=8, max_long_term=100, max_short_term=512)
    adapt_network(network, Start(memory=later))
    assert len(network.retrievers) == 2
    assert network.config.memory.max_short_term == 512
    with pytest.raises(ConfigError, match=r"tokens_per_injection is 8; allowed: 256 or more"):
        adapt_network(network, Start(memory=MemoryOptions(tokens_per_injection=8)))
    with pytest.raises(ConfigError, match=r"retrieval_dim is 8; allowed: 16"):
        adapt_network(network, Start(memory=MemoryOptions(retrieval_dim=8)))
    adapt_network(network, Start(memory=MemoryOptions(tokens_per_injection=512)))
    assert network.config.memory.tokens_per_injection == 512


def test_no_stage_before() -> None:
    with pytest.raises(ConfigError, match="first stage"):
        build_network(stage(model={"start": {}}))
    with pytest.raises(CheckpointError, match="holds no trained model"):
        build_network(stage(model={"start": {"path": "/nowhere"}}))


def test_first_weights_are_the_prototypes() -> None:
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 2,
        "num_heads": 3,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    decoder = LlamaForCausalLM(config)
    for name, weight in decoder.named_parameters():
        if weight.ndim == 2:
            std = weight.shape[1] ** -0.5
            if "embed" in name:
                std = 0.5
            if "o_proj" in name or "down_proj" in name:
                std *= (2 * 2) ** -0.5
            torch.nn.init.normal_(weight, std=std)
    torch.manual_seed(0)
    network = new_network(NewModel(**sizes, memory=MEMORY), config)
    own = {name.removeprefix("decoder."): weight for name, weight in network.state_dict().items() if "decoder." in name}
    assert_equal_weights(own, decoder.state_dict())


def test_tokenizer_writes_any_text_and_words_are_alike_everywhere() -> None:
    codec = make_codec(TokenizerOptions(vocab_size=500, num_samples=60, prose_chars=4000))
    for text in ("Maya lives in Oslo.\nWhere?", "  two\n\n\nlines ", "Ünï 🙂 \x00", "a\n b"):
        assert codec.decode(codec.encode(text)) == text
    [line_start] = [codec.encode("User:")[:1]]
    assert codec.encode("Hello\nUser:")[-len(codec.encode("User:")) :][:1] == line_start
