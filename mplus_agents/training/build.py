"""Makes the network that is trained: from scratch, from a transformers decoder, or from an earlier stage."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from mplus_agents.config import AdapterConfig, MemoryConfig, MPlusConfig
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import CheckpointError, ConfigError
from mplus_agents.model.adapters import ADAPTER_NAMES
from mplus_agents.model.families import check_supported, head_dim
from mplus_agents.model.retriever import LayerRetriever
from mplus_agents.training.config import PREVIOUS, BaseDecoder, NewModel, StageConfig, Start, memory_config
from mplus_agents.training.folders import load_network, model_folder
from mplus_agents.training.network import TrainableMPlus
from mplus_agents.training.tokenizer import make_codec

# The six linear layers that carry adapters in the published recipe (o_proj does not).
_ADAPTER_TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def build_network(stage: StageConfig, previous: Path | None = None) -> tuple[TrainableMPlus, TextCodec]:
    """Make a stage's network and tokenizer; what is trained requires a gradient and is in float32.

    Args:
        stage: The stage.
        previous: Output folder of the stage before, for `start: previous`.

    Raises:
        ConfigError: Sizes do not fit, or the decoder is not supported.
        CheckpointError: What to start from is missing or damaged.
    """
    model = stage.model
    torch.manual_seed(stage.seed)
    if model.new is not None:
        codec = make_codec(model.new.tokenizer)
        network = new_network(model.new, new_decoder_config(model.new, len(codec.tokenizer), _special_ids(codec)))
    elif model.base is not None:
        keeps_dtype = stage.precision == "bf16_master" and not model.base.train_base
        network, codec = base_network(model.base, None if keeps_dtype else torch.float32)
    else:
        assert model.start is not None
        network, codec = started_network(model.start, previous)
        if stage.precision != "bf16_master":
            network.float()
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    network.decoder.config._attn_implementation = stage.attention
    network.checkpointing = stage.gradient_checkpointing
    return network.train(), codec


def new_network(model: NewModel, decoder_config: LlamaConfig, device: str = "cpu") -> TrainableMPlus:
    """Make a Llama with a memory; all of it is trained.

    Weights are drawn so that activations keep their size, those that add to the residual stream smaller by the
    square root of twice the layers (as GPT-2 does).

    Args:
        model: Its sizes.
        decoder_config: As `new_decoder_config` makes it.
        device: `meta` for shapes alone.
    """
    config = memory_config(model)
    with torch.device(device):
        decoder = LlamaForCausalLM(decoder_config)
        for name, weight in decoder.named_parameters():
            if weight.ndim == 2:
                std = 0.5 if "embed" in name else weight.shape[1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    std *= (2 * model.num_layers) ** -0.5
                nn.init.normal_(weight, std=std)
        retrievers = new_retrievers(config.memory)
        bos = torch.randn(model.num_layers, 1, model.hidden_size) * 0.5
        positional = torch.randn(1, 1, model.hidden_size) * 0.3
    return TrainableMPlus(config, decoder, retrievers, bos, positional)


def new_decoder_config(model: NewModel, vocab_size: int, special_ids: Mapping[str, Any]) -> LlamaConfig:
    """Return the decoder's configuration of a network from scratch.

    Args:
        model: Its sizes.
        vocab_size: Tokens.
        special_ids: `bos_token_id` and so on.
    """
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters={"rope_theta": model.rope_theta, "rope_type": "default"},
        tie_word_embeddings=False,
        dtype="float32",
        **special_ids,
    )


def new_retrievers(memory: MemoryConfig) -> list[LayerRetriever]:
    """Make the retriever of every layer, or none without Θ.

    Args:
        memory: Shape of the memory.
    """
    num_layers = memory.num_layers if memory.has_long_term else 0
    inner = 2 * memory.retrieval_dim  # as published
    return [LayerRetriever(memory.hidden_size, inner, memory.retrieval_dim) for _ in range(num_layers)]


def base_config(model: BaseDecoder, decoder: PretrainedConfig) -> MPlusConfig:
    """Return the config of a decoder with a memory.

    Args:
        model: What the stage says.
        decoder: The decoder's own configuration.

    Raises:
        ConfigError: The decoder is not supported, or sizes do not fit.
    """
    check_supported(decoder)
    rank = model.adapter_rank
    alpha = model.adapter_alpha or 2.0 * rank
    memory = MemoryConfig(
        num_layers=decoder.num_hidden_layers,
        hidden_size=decoder.hidden_size,
        num_kv_heads=decoder.num_key_value_heads,
        head_dim=head_dim(decoder),
        retrieval_dim=max(16, decoder.hidden_size // 16),  # published: 256 of 4,096
    )
    return model.memory.apply(MPlusConfig(memory, AdapterConfig(rank, alpha, _ADAPTER_TARGETS) if rank else None))


def read_base_config(path: str | PathLike[str]) -> PretrainedConfig:
    """Read a decoder's configuration; no weights.

    Args:
        path: A folder or a hub id.

    Raises:
        ConfigError: It is not a decoder's configuration.
        CheckpointError: There is none.
    """
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(str(path)))
    except OSError as error:
        where = "" if Path(path).is_dir() else "it is no folder here, and no model that the hub gives: "
        raise CheckpointError(f"no decoder at {str(path)!r}: {where}{str(error).splitlines()[0]}") from error
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"{str(path)!r} is not a decoder's configuration: {error}") from error


def base_network(model: BaseDecoder, dtype: torch.dtype | None = None) -> tuple[TrainableMPlus, TextCodec]:
    """Give a transformers decoder a memory.

    Adapters start without effect, every layer's bos row is the bos token's embedding, and the positional embedding is
    0, all as published. The retriever starts at random.

    Args:
        model: What the stage says.
        dtype: Precision of the decoder's weights; their own if None.

    Raises:
        ConfigError: The decoder is not supported.
        CheckpointError: It cannot be loaded.
    """
    decoder_config = read_base_config(model.path)
    config = base_config(model, decoder_config)
    own = dtype or getattr(decoder_config, "dtype", None) or torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.path, dtype=own, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(model.path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"no decoder at {model.path!r}: {str(error).splitlines()[0]}") from error
    decoder, info = loaded
    if info["missing_keys"]:  # transformers fills them with random numbers
        raise CheckpointError("tensors are missing", sorted(info["missing_keys"]))
    return wrap_decoder(decoder, config, model.train_base, model.adapter_dropout), TextCodec(tokenizer)


def wrap_decoder(
    decoder: PreTrainedModel, config: MPlusConfig, train_base: bool, adapter_dropout: float
) -> TrainableMPlus:
    """Put adapters, retriever and the memory's own embeddings around a decoder.

    Args:
        decoder: The decoder; changed in place.
        config: Memory shape and adapters.
        train_base: Whether its own weights are trained.
        adapter_dropout: Dropout in front of the adapters.
    """
    memory = config.memory
    embeddings = cast(torch.Tensor, decoder.get_input_embeddings().weight)
    with torch.device(embeddings.device):
        if embeddings.is_meta:
            bos = torch.empty(memory.num_layers, 1, memory.hidden_size)
        else:
            row = embeddings.detach()[decoder.config.bos_token_id or 0].float()
            bos = row.expand(memory.num_layers, 1, -1).clone()
        positional = torch.zeros(1, 1, memory.hidden_size)
        retrievers = new_retrievers(memory)
    decoder.requires_grad_(train_base)
    inject_adapters(decoder, config.adapters, adapter_dropout)
    _set_trained(decoder, train_base)
    return TrainableMPlus(config, decoder, retrievers, bos, positional)


def inject_adapters(decoder: PreTrainedModel, adapters: AdapterConfig | None, dropout: float) -> None:
    """Put the write and the read adapter into a decoder.

    Args:
        decoder: The decoder; changed in place.
        adapters: Their shape; None for none.
        dropout: Dropout in front of them.
    """
    if adapters is None:
        return
    from peft import LoraConfig, inject_adapter_in_model

    is_meta = next(decoder.parameters()).is_meta
    lora = LoraConfig(
        r=adapters.rank,
        lora_alpha=cast(int, adapters.alpha),  # peft's hint; any number will do
        lora_dropout=dropout,
        target_modules=list(adapters.target_modules),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the second adapter is meant
        for name in ADAPTER_NAMES:
            inject_adapter_in_model(lora, decoder, adapter_name=name, low_cpu_mem_usage=is_meta)


def started_network(start: Start, previous: Path | None) -> tuple[TrainableMPlus, TextCodec]:
    """Load what an earlier stage made.

    Args:
        start: What the stage says.
        previous: Output folder of the stage before.

    Raises:
        ConfigError: There is no stage before, or sizes do not fit.
        CheckpointError: The folder holds no model.
    """
    if start.path == PREVIOUS and previous is None:
        raise ConfigError("model.start.path is 'previous'; allowed for a first stage: the folder of a trained model")
    folder = model_folder(previous if start.path == PREVIOUS and previous is not None else Path(start.path))
    network, codec = load_network(folder, start.adapter_dropout)
    adapt_network(network, start)
    return network, codec


def adapt_network(network: TrainableMPlus, start: Start) -> None:
    """Give a network of an earlier stage the sizes and the trained parts of this one.

    Args:
        network: The network; changed in place.
        start: What the stage says.

    Raises:
        ConfigError: Sizes do not fit.
    """
    before, config = network.config, start.memory.apply(network.config)
    gets_retriever = config.memory.has_long_term and not before.memory.has_long_term
    given, kept = config.memory.retrieval_dim, before.memory.retrieval_dim
    if given != kept and not gets_retriever:
        raise ConfigError(f"model.start.memory.retrieval_dim is {given}; allowed: {kept}, as the stage before had")
    given, kept = config.memory.tokens_per_injection, before.memory.tokens_per_injection
    if given < kept:  # births of the tokens that pools hand on count injections of this size
        raise ConfigError(f"model.start.memory.tokens_per_injection is {given}; allowed: {kept} or more, as before")
    network.config = config
    if gets_retriever:
        with torch.device(network.bos_embedding.device):
            network.retrievers = nn.ModuleList(new_retrievers(config.memory))
    trains_base = config.adapters is None if start.train_base is None else start.train_base
    _set_trained(network.decoder, trains_base)


def _set_trained(decoder: nn.Module, train_base: bool) -> None:
    """Adapters are always trained, both of them: peft freezes the one that is not active."""
    for name, weight in decoder.named_parameters():
        weight.requires_grad_(train_base or ".lora_" in name)


def _special_ids(codec: TextCodec) -> dict[str, int]:
    tokenizer: Any = codec.tokenizer
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    missing = [name for name in names[:2] if getattr(tokenizer, name) is None]
    if missing:
        raise ConfigError(f"the tokenizer of a model from scratch has no {missing[0]}")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
