"""A trained network as a folder in the package's own format, which `MPlusModel.from_pretrained` serves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mplus_agents.config import MPlusConfig
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import CheckpointError
from mplus_agents.model.checkpoint import CONFIG_KEY, CheckpointFiles
from mplus_agents.model.layout import expected_tensors, retriever_prefix
from mplus_agents.model.loading import finish_rotary, read_decoder_config
from mplus_agents.model.retriever import LayerRetriever
from mplus_agents.model.saving import write_config
from mplus_agents.training.network import TrainableMPlus

_MODEL = "model"


def model_folder(path: Path) -> Path:
    """Return the folder of the model in a stage's output, or the path itself if that is one.

    Args:
        path: Output folder or model folder.

    Raises:
        CheckpointError: There is neither.
    """
    for folder in (path / _MODEL, path):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{str(path)!r} holds no trained model (config.json is missing): has its stage ended?")


def file_tensors(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give a network's weights the names that checkpoints use.

    Args:
        weights: By their names in `TrainableMPlus`.
    """
    tensors = {}
    for name, weight in weights.items():
        part, _, rest = name.partition(".")
        if part == "decoder":
            name = rest
        elif part == "retrievers":
            layer, projection, leaf = rest.split(".", 2)
            name = f"{retriever_prefix(int(layer), projection)}{leaf}"
        tensors[name] = weight.detach()
    return tensors


def save_network(
    network: TrainableMPlus, codec: TextCodec, folder: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a network and its tokenizer.

    Args:
        network: The network.
        codec: The tokenizer.
        folder: An empty folder.
        weights: All weights by name, if they are not those of the module: float32 masters, or gathered shards.
    """
    decoder = network.decoder
    tensors = file_tensors(network.state_dict() if weights is None else weights)
    if decoder.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder)
    if isinstance(decoder.generation_config, GenerationConfig):
        decoder.generation_config.save_pretrained(str(folder))
    cast(Any, codec.tokenizer).save_pretrained(str(folder))
    # The config last: without it the folder is no checkpoint.
    write_config(folder, decoder.config, network.config)


def load_network(folder: Path, adapter_dropout: float = 0.0) -> tuple[TrainableMPlus, TextCodec]:
    """Load what `save_network` wrote, to be trained on.

    Args:
        folder: The folder.
        adapter_dropout: Dropout in front of the adapters.

    Raises:
        CheckpointError: Tensors are missing, unexpected or misshaped, or there is no tokenizer.
        ConfigError: A configuration value is not supported.
    """
    network, files = empty_network(folder, adapter_dropout)
    decoder = network.decoder
    stored = {}
    for name in files.files:
        with files.reader(name) as handle:
            # Out of the memory-mapped file, whose odd alignment would make matrix products round differently.
            stored.update({key: handle.get_tensor(key).clone() for key in handle.keys()})  # noqa: SIM118
    is_tied = bool(decoder.config.tie_word_embeddings)
    weights = {}
    for name in network.state_dict():
        [file_name] = file_tensors({name: torch.empty(0)})
        if not (is_tied and file_name == "lm_head.weight"):
            weights[name] = stored[file_name]
    network.load_state_dict(weights, strict=not is_tied, assign=True)
    if is_tied:
        decoder.tie_weights()
    finish_rotary(decoder, torch.device("cpu"), torch.float32)
    network.requires_grad_(True)
    return network, TextCodec.from_pretrained(folder)


def empty_network(folder: Path, adapter_dropout: float = 0.0) -> tuple[TrainableMPlus, CheckpointFiles]:
    """Build what a folder holds on the meta device, without its weights.

    Args:
        folder: The folder.
        adapter_dropout: Dropout in front of the adapters.

    Raises:
        CheckpointError: Tensors are missing, unexpected or misshaped.
        ConfigError: A configuration value is not supported.
    """
    files = CheckpointFiles(folder)
    shapes = files.shapes()
    if files.layout != "own" or "memory" in shapes:
        raise CheckpointError(f"{str(folder)!r} is a published checkpoint; training goes on from our own format only")
    config = MPlusConfig.from_dict(files.config[CONFIG_KEY])
    decoder = _empty_decoder(files, config, adapter_dropout, shapes)
    retrievers = _empty_retrievers(config, shapes)
    with torch.device("meta"):
        bos = torch.empty(config.memory.num_layers, 1, config.memory.hidden_size)
        positional = torch.empty(1, 1, config.memory.hidden_size)
    return TrainableMPlus(config, decoder, retrievers, bos, positional), files


def _empty_decoder(
    files: CheckpointFiles, config: MPlusConfig, adapter_dropout: float, shapes: Mapping[str, tuple[int, ...]]
) -> PreTrainedModel:
    from mplus_agents.training.build import inject_adapters

    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            read_decoder_config(files), attn_implementation="sdpa"
        )
    expected_tensors(decoder, config, has_genesis=False).check(dict(shapes))
    inject_adapters(decoder, config.adapters, adapter_dropout)
    return cast(PreTrainedModel, decoder)


def _empty_retrievers(config: MPlusConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[LayerRetriever]:
    memory = config.memory
    with torch.device("meta"):
        return [
            LayerRetriever(
                memory.hidden_size, shapes[f"{retriever_prefix(layer, 'key_proj')}0.weight"][0], memory.retrieval_dim
            )
            for layer in range(memory.num_layers if memory.has_long_term else 0)
        ]
