"""Loads a checkpoint shard by shard: everything is checked from the headers, then each tensor goes to its place."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar, cast

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from mplus_agents.config import MEMORY_RULES, MemoryRule, MPlusConfig
from mplus_agents.errors import CheckpointError, ConfigError, InvalidInputError
from mplus_agents.memory import Genesis, GenesisIndex, TokenTensors
from mplus_agents.memory.types import FloatArray, IntArray
from mplus_agents.model.adapters import LoraPair
from mplus_agents.model.checkpoint import CheckpointFiles, translate_config
from mplus_agents.model.families import check_supported
from mplus_agents.model.fingerprint import Fingerprint, architecture
from mplus_agents.model.layout import ExpectedTensors, expected_tensors, genesis_names, lora_names, retriever_prefix
from mplus_agents.model.mplus import MPlusModel
from mplus_agents.model.parts import ModelParts
from mplus_agents.model.retriever import LayerRetriever

M = TypeVar("M", bound=MPlusModel)

_ATTENTION = ("sdpa", "eager", "flash_attention_2")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Checked arguments of a load.

    Attributes:
        device: Where to load.
        dtype: What to load as; the checkpoint's own if None.
        attention: transformers' name of the attention implementation.
        memory_rule: The rule in place of the checkpoint's default.
        rope_inv_freq: Precision that RoPE's frequencies are rounded to; by the checkpoint if None.
    """

    device: torch.device
    dtype: torch.dtype | None
    attention: str
    memory_rule: MemoryRule | None
    rope_inv_freq: torch.dtype | None

    @classmethod
    def resolve(
        cls,
        device: str | torch.device | None,
        dtype: torch.dtype | str | None,
        attention: str,
        memory_rule: str | None,
        rope_inv_freq: torch.dtype | str | None,
    ) -> LoadOptions:
        """Check arguments as callers give them.

        Raises:
            InvalidInputError: One of them is not allowed; the message names it.
        """
        if attention not in _ATTENTION:
            raise InvalidInputError("attn_implementation", attention, ", ".join(_ATTENTION))
        if memory_rule is not None and memory_rule not in MEMORY_RULES:
            raise InvalidInputError("memory_rule", memory_rule, f"{' or '.join(MEMORY_RULES)}, or None")
        try:
            resolved = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise InvalidInputError("device", device, "a torch device, such as 'cpu' or 'cuda'") from error
        if resolved.type == "cuda" and not torch.cuda.is_available():
            raise InvalidInputError("device", device, "'cpu': this PyTorch sees no CUDA device")
        rule = cast(MemoryRule | None, memory_rule)
        return cls(resolved, _dtype("dtype", dtype), attention, rule, _dtype("rope_inv_freq", rope_inv_freq))


def load_model(cls: type[M], path_or_hub_id: str | PathLike[str], options: LoadOptions) -> M:
    """Load a checkpoint of a published layout or of our own format.

    Args:
        cls: The class to make.
        path_or_hub_id: A folder or a hub id.
        options: How to load.

    Raises:
        CheckpointError: The checkpoint's tensors are not the expected ones.
        ConfigError: A configuration value is not supported.
    """
    files = CheckpointFiles.open(path_or_hub_id)
    shapes = files.shapes()
    decoder_config = read_decoder_config(files)
    # Without the tensor the config's word serves, so that the tensor is what is reported as missing.
    told = (files.config.get("selector_hidden_dim", 0) if files.layout == "mplus" else 0,)
    key_shape = shapes.get(f"{retriever_prefix(0, 'key_proj')}2.weight", told)
    config = translate_config(files, decoder_config, key_shape[0], options.memory_rule)
    decoder = build_decoder(decoder_config, options, device="meta")
    has_genesis = files.layout != "own" or "memory" in shapes
    expected = expected_tensors(decoder, config, has_genesis)
    expected.check(shapes)
    _check_genesis_sizes(shapes, config, has_genesis)
    dtype = options.dtype or _stored_dtype(files, expected)
    with torch.no_grad():
        return _fill(cls, files, config, decoder, _Target(options.device, dtype, options.rope_inv_freq), has_genesis)


def read_decoder_config(files: CheckpointFiles) -> PretrainedConfig:
    """Read and check the decoder's own configuration.

    Args:
        files: The checkpoint.

    Raises:
        ConfigError: The decoder is not supported, or transformers does not accept its configuration.
    """
    try:
        config = AutoConfig.from_pretrained(str(files.folder))
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise ConfigError(f"config.json is not a decoder's configuration: {error}") from error
    check_supported(config)
    return cast(PretrainedConfig, config)


def build_decoder(config: PretrainedConfig, options: LoadOptions, device: str) -> PreTrainedModel:
    """Build the decoder without weights.

    Args:
        config: Its configuration.
        options: How to load.
        device: `meta`, or a real device for random weights.

    Raises:
        InvalidInputError: The attention implementation is not installed.
    """
    try:
        with torch.device(device):
            decoder = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=options.attention
            )
    except ValueError as error:
        raise ConfigError(f"config.json is not a decoder's configuration: {error}") from error
    except ImportError as error:
        raise InvalidInputError("attn_implementation", options.attention, f"an installed one ({error})") from error
    return cast(PreTrainedModel, decoder)


def describe_model(
    decoder: PreTrainedModel, config: MPlusConfig, dtype: torch.dtype, rope: torch.dtype
) -> dict[str, str]:
    """Return the fields of a model's fingerprint that are not digests of tensors."""
    return {
        **architecture(decoder.config),
        **{f"memory.{key}": str(value) for key, value in sorted(config.memory.to_dict().items())},
        "dtype": str(dtype).removeprefix("torch."),
        "rope_inv_freq": str(rope).removeprefix("torch."),
    }


def finish_rotary(decoder: PreTrainedModel, device: torch.device, precision: torch.dtype) -> None:
    """Make RoPE's frequencies, which no checkpoint stores, rounded to a precision.

    Args:
        decoder: The decoder.
        device: Where to put them.
        precision: The precision to round to; float32 leaves them as they are.
    """
    inner = cast(Any, decoder.model)
    rotary = type(inner.rotary_emb)(config=decoder.config)
    rotary.to(device)
    for name in ("inv_freq", "original_inv_freq"):
        if hasattr(rotary, name):
            getattr(rotary, name).copy_(getattr(rotary, name).to(precision).float())
    inner.rotary_emb = rotary


@dataclass(frozen=True, slots=True)
class _Target:
    device: torch.device
    dtype: torch.dtype
    rope_inv_freq: torch.dtype | None

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor out of its memory-mapped file to where it will live."""
        moved = tensor.to(self.device, self.dtype)
        return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


def _fill(
    cls: type[M],
    files: CheckpointFiles,
    config: MPlusConfig,
    decoder: PreTrainedModel,
    target: _Target,
    has_genesis: bool,
) -> M:
    fingerprint = Fingerprint()
    expected = expected_tensors(decoder, config, has_genesis)
    pairs = _load_adapters(files, decoder, config, target, fingerprint)
    genesis = set(genesis_names(config)) if has_genesis else set()
    rest: dict[str, torch.Tensor] = {}
    parameter_of = {file_name: name for name, file_name in expected.parameters.items()}
    for file_name in files.files:
        weights: dict[str, torch.Tensor] = {}
        with files.reader(file_name) as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if ".lora_" in name or name in genesis or name.endswith("rotary_emb.inv_freq"):
                    continue
                stored = handle.get_tensor(name)
                fingerprint.add(name, stored)
                placed = target.place(stored)
                if name in parameter_of:
                    owner = parameter_of[name].rpartition(".")[0]
                    fuse = owner in pairs and name.endswith(".weight")
                    weights[parameter_of[name]] = pairs[owner].fuse_read(placed) if fuse else placed
                else:
                    rest[name] = placed
        decoder.load_state_dict(weights, strict=False, assign=True)
    if decoder.config.tie_word_embeddings:
        decoder.tie_weights()
    decoder.requires_grad_(False)
    _load_generation_config(files, decoder)
    is_rounded = config.rounds_rope and target.dtype == torch.bfloat16
    precision = target.rope_inv_freq or (torch.bfloat16 if is_rounded else torch.float32)
    finish_rotary(decoder, target.device, precision)
    parts = ModelParts(
        decoder,
        {name.removeprefix("model."): pair for name, pair in pairs.items()},
        _build_retrievers(rest, config),
        rest["bos_embedding"],
        rest["new_memory_positional_emb"],
        describe_model(decoder, config, target.dtype, precision),
    )
    model = cls(config, parts, source=str(files.folder))
    if has_genesis and not _is_uninitialized(rest):
        model.genesis = _load_genesis(files, model, target, fingerprint)
    else:
        for name in genesis:  # not used, but part of the files that `save_pretrained` compares
            fingerprint.add(name, files.get(name))
    model.fingerprint.update(fingerprint.digests())
    return model


def _load_adapters(
    files: CheckpointFiles, decoder: nn.Module, config: MPlusConfig, target: _Target, fingerprint: Fingerprint
) -> dict[str, LoraPair]:
    """Load the adapters first: they are small, and every base weight is fused as it arrives."""
    if config.adapters is None:
        return {}
    pairs = {}
    linears = sorted({name.split(".lora_A.")[0] for name in files.file_of if ".lora_A." in name})
    for linear in linears:
        tensors = {}
        for field, name in lora_names(linear).items():
            stored = files.get(name)
            fingerprint.add(name, stored)
            tensors[field] = stored.to(target.device, torch.float32, copy=True)
        pairs[linear] = LoraPair(**tensors, scaling=config.adapters.scaling)
    return pairs


def _build_retrievers(tensors: dict[str, torch.Tensor], config: MPlusConfig) -> list[LayerRetriever]:
    retrievers = []
    for layer in range(config.memory.num_layers if config.memory.has_long_term else 0):
        state = {
            f"{part}.{leaf}": tensors[f"{retriever_prefix(layer, part)}{leaf}"]
            for part in ("query_proj", "key_proj")
            for leaf in ("0.weight", "2.weight")
        }
        inner = len(state["key_proj.0.weight"])
        with torch.device("meta"):
            retriever = LayerRetriever(config.memory.hidden_size, inner, config.memory.retrieval_dim)
        retriever.load_state_dict(state, assign=True)
        retrievers.append(retriever.requires_grad_(False))
    return retrievers


def _load_genesis(files: CheckpointFiles, model: MPlusModel, target: _Target, fingerprint: Fingerprint) -> Genesis:
    """Project the checkpoint's own memory layer by layer; its hidden states are not kept, but for the newest K."""
    config = model.config.memory
    stored = files.get("memory")
    fingerprint.add("memory", stored)
    theta = _empty_tokens(model, target, stored.shape[1])
    for layer in range(config.num_layers):
        _put(theta, layer, model.project_layer(layer, target.place(stored[layer])))
    tail = target.place(stored[:, -config.tokens_per_injection :])
    ages, counts, long_term = _load_long_term(files, model, target, fingerprint)
    index = GenesisIndex(config.max_short_term, tuple(ages), tuple(counts))
    return Genesis(index, theta, long_term, tail)


def _load_long_term(
    files: CheckpointFiles, model: MPlusModel, target: _Target, fingerprint: Fingerprint
) -> tuple[list[IntArray], list[FloatArray], TokenTensors]:
    """Load a checkpoint's own Θ: per layer its ages, its recall counts, and its tokens as reading needs them."""
    config = model.config.memory
    ages: list[IntArray] = [np.empty(0, dtype=np.int64)] * config.num_layers
    counts: list[FloatArray] = [np.empty(0, dtype=np.float32)] * config.num_layers
    if not config.has_long_term:
        return ages, counts, _empty_tokens(model, target, 0)
    named = {name: files.get(name) for name in genesis_names(model.config) if name.startswith("ltm_")}
    for name, tensor in named.items():
        fingerprint.add(name, tensor)
    layers = range(config.num_layers)
    ages = [named[f"ltm_ages.{layer}"].round().long().numpy() for layer in layers]
    counts = [named[f"ltm_recall_frequencies.{layer}"].float().numpy() for layer in layers]
    long_term = _empty_tokens(model, target, max(map(len, ages)))  # filled in place: no second copy
    for layer in layers:
        hidden = files.get(f"ltm.{layer}")
        fingerprint.add(f"ltm.{layer}", hidden)
        keys, values, _ = model.project_layer(layer, target.place(hidden))
        _put(long_term, layer, (keys, values, target.place(named[f"ltm_keys.{layer}"])))
    return ages, counts, long_term


def _empty_tokens(model: MPlusModel, target: _Target, num_rows: int) -> TokenTensors:
    """Make room for tokens of every layer; rows that a layer does not fill stay 0."""
    config = model.config.memory
    heads = (config.num_layers, num_rows, *model.head_shape)
    keys, values, retrieval_keys = (
        torch.zeros(shape, device=target.device, dtype=target.dtype)
        for shape in (heads, heads, (config.num_layers, num_rows, config.retrieval_dim))
    )
    return TokenTensors(keys, values, retrieval_keys)


def _put(tokens: TokenTensors, layer: int, parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    for whole, part in zip((tokens.keys, tokens.values, tokens.retrieval_keys), parts, strict=True):
        whole[layer, : len(part)] = part


def _check_genesis_sizes(shapes: dict[str, tuple[int, ...]], config: MPlusConfig, has_genesis: bool) -> None:
    if not (has_genesis and config.memory.has_long_term):
        return
    for layer in range(config.memory.num_layers):
        names = [f"{field}.{layer}" for field in ("ltm", "ltm_keys", "ltm_recall_frequencies", "ltm_ages")]
        if len({shapes[name][0] for name in names}) != 1:
            raise CheckpointError("tensors are misshaped: different numbers of tokens", names)


def _load_generation_config(files: CheckpointFiles, decoder: PreTrainedModel) -> None:
    if (files.folder / "generation_config.json").is_file():
        decoder.generation_config = GenerationConfig.from_pretrained(str(files.folder))


def _is_uninitialized(rest: dict[str, torch.Tensor]) -> bool:
    """Tell whether a MemoryLLM checkpoint says that its pool was never written to; then θ starts empty."""
    flag = rest.get("initialized")
    return flag is not None and not bool(flag.any())


def _stored_dtype(files: CheckpointFiles, expected: ExpectedTensors) -> torch.dtype:
    name = expected.parameters["model.embed_tokens.weight"]
    with files.reader(files.file_of[name]) as handle:
        code = str(handle.get_slice(name).get_dtype())
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(code, torch.float32)


def _dtype(argument: str, value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None or value in _DTYPES.values():
        return cast(torch.dtype | None, value)
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise InvalidInputError(argument, value, f"{', '.join(_DTYPES)}, or None")
    return _DTYPES[name]
