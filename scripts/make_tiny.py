"""Makes mplus-tiny, the small model in the package: a tokenizer, and random weights from a fixed seed.

Run from the repository root: `python scripts/make_tiny.py`. The files are committed, because a random stream may differ
between PyTorch releases and an agent's memory belongs to exactly one set of weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mplus_agents.config import MemoryConfig, MPlusConfig
from mplus_agents.model.layout import retriever_prefix
from mplus_agents.model.retriever import LayerRetriever

TARGET = Path("mplus_agents/assets/mplus-tiny")
SEED = 0
BOS, END = "<|begin|>", "<|end|>"
NUM_TOKENS = 1024
HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 128, 4, 4, 2, 32

MEMORY = MemoryConfig(
    num_layers=NUM_LAYERS,
    hidden_size=HIDDEN_SIZE,
    num_kv_heads=NUM_KV_HEADS,
    head_dim=HEAD_DIM,
    retrieval_dim=32,
    tokens_per_injection=16,
    max_short_term=256,
    num_retrieved=64,
    max_long_term=50_000,
)
CONFIG = MPlusConfig(MEMORY, chunk_tokens=128, min_chunk_tokens=16, max_prompt_tokens=1024)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on Python's own language reference; every byte is a token, so any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=[BOS, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def make_weights(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Draw every weight with unit gain, so that activations, and with them the effect of memory, keep their size."""
    torch.manual_seed(SEED)
    decoder = LlamaForCausalLM(config)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    tensors = dict(decoder.state_dict())
    for layer in range(NUM_LAYERS):
        retriever = LayerRetriever(HIDDEN_SIZE, 2 * MEMORY.retrieval_dim, MEMORY.retrieval_dim)
        for name, tensor in retriever.state_dict().items():
            part, _, leaf = name.partition(".")
            tensors[f"{retriever_prefix(layer, part)}{leaf}"] = torch.randn(tensor.shape) * tensor.shape[1] ** -0.5
    tensors["bos_embedding"] = torch.randn(NUM_LAYERS, 1, HIDDEN_SIZE)
    tensors["new_memory_positional_emb"] = torch.randn(1, 1, HIDDEN_SIZE) * 0.5
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def main() -> None:
    """Write the folder anew."""
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(str(TARGET))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=352,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    save_file(make_weights(config), TARGET / "model.safetensors", metadata={"format": "pt"})
    values = {**config.to_dict(), "architectures": ["MPlusModel"], "mplus": CONFIG.to_dict()}
    (TARGET / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
