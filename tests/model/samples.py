"""Models and texts that the tests of the network share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mplus_agents.config import MemoryRule
from mplus_agents.memory import MemoryDelta, MemoryState
from mplus_agents.model import MPlusModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIXTURE_NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.safetensors"))
BASE_OPTIONS: dict[str, Any] = {
    "tokens_per_injection": 8,
    "max_short_term": 32,
    "num_retrieved": 8,
    "max_long_term": 64,
    "retrieval_dim": 16,
    "chunk_tokens": 32,
    "max_prompt_tokens": 512,
}
_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "llama_with_bias": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


def checkpoint(name: str) -> Path:
    """Return a fixture's checkpoint folder."""
    return FIXTURES / name / "checkpoint"


@cache
def expected(name: str) -> dict[str, torch.Tensor]:
    """Return what the published code computed."""
    return load_file(FIXTURES / name / "expected.safetensors")


@cache
def published(name: str, attention: str = "sdpa", rule: MemoryRule | None = None) -> MPlusModel:
    """Load a fixture once; the tests do not change models."""
    return MPlusModel.from_pretrained(checkpoint(name), device="cpu", attn_implementation=attention, memory_rule=rule)


def save_base(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Make a tiny random decoder and save it."""
    config_class, model_class, values = FAMILIES[family]
    torch.manual_seed(0)
    base: PreTrainedModel = model_class(config_class(**{**_SIZES, **values, **changes}))
    base.train(False)
    for name, parameter in base.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a mistake
            parameter.data += 0.3 * torch.randn_like(parameter)
    base.save_pretrained(folder)
    return base


def tokens(num_tokens: int, seed: int = 0, *, rows: int = 1, vocab_size: int = 200) -> torch.Tensor:
    """Draw token ids, [rows, num_tokens]."""
    return torch.randint(3, vocab_size, (rows, num_tokens), generator=torch.Generator().manual_seed(seed))


def grow(model: MPlusModel, memory: MemoryState, lengths: list[int], seed: int = 0) -> list[MemoryDelta]:
    """Inject texts of the given lengths; return the deltas."""
    deltas = []
    for step, length in enumerate(lengths):
        delta = model.write(tokens(length, 1_000 * seed + step), memory)
        memory.apply(delta)
        deltas.append(delta)
    return deltas


def empty_memory(model: MPlusModel, seed: int = 0) -> MemoryState:
    """Make a memory without the checkpoint's own tokens."""
    return MemoryState(model.config.memory, seed=seed, genesis=None, device=model.device, dtype=model.dtype)
