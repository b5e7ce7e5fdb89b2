"""Names and shapes of the tensors in a checkpoint, published or our own (both use the same names)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mplus_agents.config import AdapterConfig, MPlusConfig
from mplus_agents.errors import CheckpointError
from mplus_agents.model.adapters import ADAPTER_NAMES

Shape = tuple[int | None, ...]  # None: any size
_BASE_LAYER = ".base_layer."
_OPTIONAL_NAMES = ("initialized",)
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class ExpectedTensors:
    """What a checkpoint must and may hold.

    Attributes:
        required: Shapes by name.
        optional: Shapes of tensors that may be missing.
        parameters: File name of every parameter of the decoder.
    """

    required: dict[str, Shape]
    optional: dict[str, Shape]
    parameters: dict[str, str]

    def check(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint whose tensors are not exactly the expected ones.

        Args:
            found: Shapes by name.

        Raises:
            CheckpointError: Tensors are missing, unexpected, misshaped, or of other adapters; the message names them.
        """
        self._check_adapters(found)
        missing = sorted(set(self.required) - set(found))
        if missing:
            raise CheckpointError("tensors are missing", missing)
        known = {**self.optional, **self.required}
        unexpected = sorted(name for name in found if name not in known and not name.endswith(_IGNORED_SUFFIX))
        if unexpected:
            raise CheckpointError("tensors are unexpected", unexpected)
        wrong = [
            f"{name} {list(found[name])} (expected {['any' if size is None else size for size in known[name]]})"
            for name in sorted(set(found) & set(known))
            if not _fits(found[name], known[name])
        ]
        if wrong:
            raise CheckpointError("tensors are misshaped", wrong)

    def _check_adapters(self, found: Iterable[str]) -> None:
        names = {name.split(".lora_A.")[1].split(".")[0] for name in found if ".lora_A." in name}
        expected = set(ADAPTER_NAMES) if any(".lora_A." in name for name in self.required) else set()
        if names != expected:
            given, wanted = sorted(names) or "no adapters", sorted(expected) or "no adapters"
            raise CheckpointError(f"wrong adapters: found {given}, expected {wanted}", sorted(names ^ expected))


def lora_names(linear: str) -> dict[str, str]:
    """Return the tensor names of both adapters of a linear layer, by the field of `LoraPair` they fill.

    Args:
        linear: The layer's name, `model.layers.0.self_attn.q_proj` for instance.
    """
    write, read = ADAPTER_NAMES
    return {
        "write_down": f"{linear}.lora_A.{write}.weight",
        "write_up": f"{linear}.lora_B.{write}.weight",
        "read_down": f"{linear}.lora_A.{read}.weight",
        "read_up": f"{linear}.lora_B.{read}.weight",
    }


def retriever_prefix(layer: int, part: str) -> str:
    """Return the name in front of a retriever part's tensors.

    Args:
        layer: The layer.
        part: `query_proj`, `key_proj` or `encoder_query_proj`.
    """
    return f"model.layers.{layer}.self_attn.{part}."


def genesis_names(config: MPlusConfig) -> list[str]:
    """Return the names of the tensors of the checkpoint's own memory."""
    if not config.memory.has_long_term:
        return ["memory"]
    fields = ("ltm", "ltm_keys", "ltm_recall_frequencies", "ltm_ages")
    return ["memory", *(f"{field}.{layer}" for field in fields for layer in range(config.memory.num_layers))]


def expected_tensors(decoder: PreTrainedModel, config: MPlusConfig, has_genesis: bool) -> ExpectedTensors:
    """List what a checkpoint must hold.

    Args:
        decoder: The decoder, on the meta device if need be.
        config: What the checkpoint's config says.
        has_genesis: Whether the checkpoint's own memory must be there.
    """
    required: dict[str, Shape] = {}
    optional: dict[str, Shape] = dict.fromkeys(_OPTIONAL_NAMES, ())
    parameters: dict[str, str] = {}
    targets = adapter_linears(decoder, config.adapters)
    is_tying = bool(decoder.config.tie_word_embeddings)
    for name, tensor in decoder.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        file_name = f"{owner}{_BASE_LAYER}{leaf}" if owner in targets else name
        is_tied = name == "lm_head.weight" and is_tying
        (optional if is_tied else required)[file_name] = tuple(tensor.shape)
        parameters[name] = file_name
    for linear, (num_out, num_in) in targets.items():
        assert config.adapters is not None
        names, rank = lora_names(linear), config.adapters.rank
        required.update({names["write_down"]: (rank, num_in), names["read_down"]: (rank, num_in)})
        required.update({names["write_up"]: (num_out, rank), names["read_up"]: (num_out, rank)})
    memory = config.memory
    required["bos_embedding"] = (memory.num_layers, 1, memory.hidden_size)
    required["new_memory_positional_emb"] = (1, 1, memory.hidden_size)
    for layer in range(memory.num_layers if memory.has_long_term else 0):
        for part in ("query_proj", "key_proj", "encoder_query_proj"):
            prefix = retriever_prefix(layer, part)
            target = optional if part == "encoder_query_proj" else required  # not used at inference
            target[f"{prefix}0.weight"] = (None, memory.hidden_size)
            target[f"{prefix}2.weight"] = (memory.retrieval_dim, None)
    if has_genesis:
        required.update(_genesis_shapes(config))
    return ExpectedTensors(required, optional, parameters)


def _genesis_shapes(config: MPlusConfig) -> dict[str, Shape]:
    memory = config.memory
    shapes: dict[str, Shape] = {"memory": (memory.num_layers, memory.max_short_term, memory.hidden_size)}
    for layer in range(memory.num_layers if memory.has_long_term else 0):
        shapes[f"ltm.{layer}"] = (None, memory.hidden_size)
        shapes[f"ltm_keys.{layer}"] = (None, memory.retrieval_dim)
        shapes[f"ltm_recall_frequencies.{layer}"] = (None,)
        shapes[f"ltm_ages.{layer}"] = (None,)
    return shapes


def adapter_linears(decoder: nn.Module, adapters: AdapterConfig | None) -> dict[str, tuple[int, int]]:
    """Return the linear layers that carry adapters, with their output and input widths.

    Args:
        decoder: The decoder.
        adapters: The adapters' shape; none if None.

    Raises:
        CheckpointError: A target names no linear layer of the decoder.
    """
    if adapters is None:
        return {}
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in adapters.target_modules
    }
    unused = sorted(set(adapters.target_modules) - {name.rpartition(".")[2] for name in linears})
    if unused:
        raise CheckpointError("adapter targets that the decoder does not have", unused)
    return linears


def _fits(found: tuple[int, ...], expected: Shape) -> bool:
    return len(found) == len(expected) and all(want in (None, size) for size, want in zip(found, expected, strict=True))
