"""Tiny random networks: the same weights for training and for serving."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mplus_agents.config import AdapterConfig, MemoryConfig, MPlusConfig
from mplus_agents.model import MPlusModel
from mplus_agents.model.adapters import ADAPTER_NAMES
from mplus_agents.model.layout import retriever_prefix
from mplus_agents.model.retriever import LayerRetriever
from mplus_agents.training.network import TrainableMPlus

NUM_LAYERS, NUM_NEW, NUM_SHORT, NUM_RETRIEVED, VOCAB_SIZE = 2, 4, 16, 4, 60


def tiny_config(adapters: bool = True, max_long_term: int = 40) -> MPlusConfig:
    memory = MemoryConfig(
        num_layers=NUM_LAYERS,
        hidden_size=32,
        num_kv_heads=1,
        head_dim=16,
        retrieval_dim=8,
        tokens_per_injection=NUM_NEW,
        max_short_term=NUM_SHORT,
        num_retrieved=NUM_RETRIEVED,
        max_long_term=max_long_term,
    )
    lora = AdapterConfig(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj", "up_proj")) if adapters else None
    return MPlusConfig(memory, lora, chunk_tokens=12, min_chunk_tokens=2, max_prompt_tokens=24)


def tiny_network(adapters: bool = True, seed: int = 0, max_long_term: int = 40) -> TrainableMPlus:
    config = tiny_config(adapters, max_long_term)
    torch.manual_seed(seed)
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            bos_token_id=1,
            eos_token_id=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    )
    if config.adapters is not None:
        from peft import LoraConfig, inject_adapter_in_model

        targets = list(config.adapters.target_modules)
        lora = LoraConfig(r=config.adapters.rank, lora_alpha=4, target_modules=targets, lora_dropout=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there will be several adapters
            for name in ADAPTER_NAMES:
                inject_adapter_in_model(lora, decoder, adapter_name=name)
    retrievers = [LayerRetriever(32, 16, 8) for _ in range(NUM_LAYERS)]
    network = TrainableMPlus(config, decoder, retrievers, torch.randn(NUM_LAYERS, 1, 32), 0.3 * torch.randn(1, 1, 32))
    with torch.no_grad():  # nothing is left at a value that would hide a mistake
        for name, weight in network.named_parameters():
            if "retrievers" in name:
                weight.mul_(4.0)
            elif "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
            elif weight.ndim == 2:
                scale = 0.3 if ".lora_B" in name else 1.0
                weight.copy_(scale * torch.randn_like(weight) * weight.shape[1] ** -0.5)
    for name, weight in network.decoder.named_parameters():
        weight.requires_grad_(not adapters or ".lora_" in name)
    return network


def serve(network: TrainableMPlus, folder: Path) -> MPlusModel:
    """Save a network in our own format and load it as it is served."""
    tensors = {name: tensor.detach() for name, tensor in network.decoder.state_dict().items()}
    tensors["bos_embedding"] = network.bos_embedding.detach()
    tensors["new_memory_positional_emb"] = network.new_memory_positional_emb.detach()
    for layer in range(NUM_LAYERS):
        for name, tensor in network.retriever(layer).state_dict().items():
            part, _, rest = name.partition(".")
            tensors[f"{retriever_prefix(layer, part)}{rest}"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    values = {**network.decoder.config.to_dict(), "mplus": network.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(values))
    return MPlusModel.from_pretrained(folder, device="cpu")


def tokens(num_tokens: int, seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, num_tokens), generator=torch.Generator().manual_seed(seed))


def trained(network: TrainableMPlus) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def gradients(network: TrainableMPlus) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in trained(network).items() if weight.grad is not None}
