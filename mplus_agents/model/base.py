"""Turns a plain transformers decoder into an untrained M+."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mplus_agents.config import AdapterConfig, MemoryConfig, MPlusConfig, reject_unknown_keys
from mplus_agents.errors import CheckpointError, ConfigError
from mplus_agents.model.adapters import LoraPair
from mplus_agents.model.families import check_supported, head_dim
from mplus_agents.model.fingerprint import Fingerprint
from mplus_agents.model.layout import adapter_linears, expected_tensors, lora_names, retriever_prefix
from mplus_agents.model.loading import LoadOptions, describe_model
from mplus_agents.model.mplus import MPlusModel
from mplus_agents.model.parts import ModelParts
from mplus_agents.model.retriever import LayerRetriever

M = TypeVar("M", bound=MPlusModel)

# The six linear layers that carry adapters in the published recipe (o_proj does not).
_ADAPTER_TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_OWN_OPTIONS = ("adapter_rank", "adapter_alpha", "chunk_tokens", "min_chunk_tokens", "max_prompt_tokens")
_DERIVED = ("num_layers", "hidden_size", "num_kv_heads", "head_dim")


def load_base(
    cls: type[M],
    path_or_hub_id: str | PathLike[str],
    options: LoadOptions,
    seed: int,
    memory_options: Mapping[str, Any],
) -> M:
    """Load a decoder by transformers and give it an untrained memory.

    Args:
        cls: The class to make.
        path_or_hub_id: A folder or a hub id.
        options: How to load.
        seed: Seed of the new weights.
        memory_options: Fields of the configs that differ from their defaults.

    Raises:
        ConfigError: The decoder is not supported, or an option is unknown or not allowed.
        CheckpointError: The decoder cannot be found or loaded.
    """
    known = {field.name for field in fields(MemoryConfig)} - set(_DERIVED)
    reject_unknown_keys(memory_options, known | set(_OWN_OPTIONS), "from_base")
    try:
        decoder_config = _decoder_config(path_or_hub_id)
        check_supported(decoder_config)
        config = _config(decoder_config, memory_options)
        dtype = options.dtype or getattr(decoder_config, "dtype", None) or torch.float32
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path_or_hub_id,
            dtype=dtype,
            attn_implementation=options.attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"no decoder at {str(path_or_hub_id)!r}: {str(error).splitlines()[0]}") from error
    decoder, info = loaded
    if info["missing_keys"]:  # transformers fills them with random numbers
        raise CheckpointError("tensors are missing", sorted(info["missing_keys"]))
    cast(nn.Module, decoder).to(options.device).requires_grad_(False)
    with torch.no_grad():
        # Out of the memory-mapped file: its odd alignment would make matrix products round differently.
        for parameter in decoder.parameters():
            parameter.data = parameter.data.clone()
        model = _build(cls, decoder, config, seed)
    folder = Path(path_or_hub_id)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path_or_hub_id), allow_patterns=["tokenizer*", "*.jinja"]))
    model.base_folder = folder
    return model


def state_tensors(model: MPlusModel) -> dict[str, torch.Tensor]:
    """Return a model's tensors under the names a checkpoint gives them; its read adapter must not have been fused.

    Args:
        model: The model.
    """
    return _named_tensors(
        model.decoder,
        model.config,
        dict(model.adapters),
        [cast(LayerRetriever, retriever) for retriever in model.retrievers],
        {"bos_embedding": model.bos_embedding, "new_memory_positional_emb": model.new_memory_positional_emb},
    )


def _decoder_config(path_or_hub_id: str | PathLike[str]) -> Any:
    try:
        return AutoConfig.from_pretrained(path_or_hub_id)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"{str(path_or_hub_id)!r} is not a decoder's configuration: {error}") from error


def _config(decoder: Any, options: Mapping[str, Any]) -> MPlusConfig:
    rank = options.get("adapter_rank", 16)
    adapters = AdapterConfig(rank, options.get("adapter_alpha", 2.0 * rank), _ADAPTER_TARGETS) if rank else None
    sizes = {key: options[key] for key in ("chunk_tokens", "min_chunk_tokens", "max_prompt_tokens") if key in options}
    memory = {key: value for key, value in options.items() if key not in _OWN_OPTIONS}
    # Published: p = 256 at d = 4,096.
    memory.setdefault("retrieval_dim", max(16, decoder.hidden_size // 16))
    return MPlusConfig(
        memory=MemoryConfig(
            num_layers=decoder.num_hidden_layers,
            hidden_size=decoder.hidden_size,
            num_kv_heads=decoder.num_key_value_heads,
            head_dim=head_dim(decoder),
            **memory,
        ),
        adapters=adapters,
        **sizes,
    )


def _build(cls: type[M], decoder: PreTrainedModel, config: MPlusConfig, seed: int) -> M:
    generator = torch.Generator().manual_seed(seed)
    embeddings = cast(nn.Module, decoder.model).embed_tokens.weight  # type: ignore[union-attr]
    like = cast(torch.Tensor, embeddings)
    memory = config.memory

    def normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).to(like.device, like.dtype)

    pairs = {}
    for name, (num_out, num_in) in adapter_linears(decoder, config.adapters).items():
        assert config.adapters is not None
        rank = config.adapters.rank
        down = [normal((rank, num_in), num_in**-0.5) for _ in range(2)]
        up = [like.new_zeros((num_out, rank)) for _ in range(2)]
        pairs[name] = LoraPair(down[0], up[0], down[1], up[1], config.adapters.scaling)
    inner = 2 * memory.retrieval_dim
    retrievers = []
    for _ in range(memory.num_layers if memory.has_long_term else 0):
        retriever = LayerRetriever(memory.hidden_size, inner, memory.retrieval_dim).to(like.device, like.dtype)
        for parameter in retriever.parameters():
            parameter.copy_(normal(tuple(parameter.shape), parameter.shape[1] ** -0.5))
        retrievers.append(retriever.requires_grad_(False))
    # Published start: every layer's bos row is the bos token's embedding, the positional embedding is 0.
    bos_id = decoder.config.bos_token_id or 0
    own = {
        "bos_embedding": like[bos_id].expand(memory.num_layers, 1, -1).clone(),
        "new_memory_positional_emb": like.new_zeros((1, 1, memory.hidden_size)),
    }
    fingerprint = Fingerprint()
    for name, tensor in _named_tensors(decoder, config, pairs, retrievers, own).items():
        fingerprint.add(name, tensor)
    described = describe_model(decoder, config, like.dtype, torch.float32)
    return cls(
        config,
        ModelParts(
            decoder,
            {name.removeprefix("model."): pair for name, pair in pairs.items()},
            retrievers,
            own["bos_embedding"],
            own["new_memory_positional_emb"],
            {**described, **fingerprint.digests()},
        ),
    )


def _named_tensors(
    decoder: PreTrainedModel,
    config: MPlusConfig,
    pairs: Mapping[str, LoraPair],
    retrievers: list[LayerRetriever],
    own: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    expected = expected_tensors(decoder, config, has_genesis=False)
    state = decoder.state_dict()
    tensors = {file: state[name] for name, file in expected.parameters.items() if file in expected.required}
    for name, pair in pairs.items():
        linear = name if name.startswith("model.") else f"model.{name}"
        tensors.update({file: getattr(pair, field) for field, file in lora_names(linear).items()})
    for layer, retriever in enumerate(retrievers):
        for leaf, tensor in retriever.state_dict().items():
            part, _, rest = leaf.partition(".")
            tensors[f"{retriever_prefix(layer, part)}{rest}"] = tensor
    return {**tensors, **own}
