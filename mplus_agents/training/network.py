"""M+ with gradients: the same write and read as `mplus_agents.model`, composed for training.

Layers are called one by one, so that a checkpoint can be put around each call with everything it needs as its
arguments, and memory is projected by hooks inside a layer's own forward, where FSDP has its weights gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from mplus_agents.config import MPlusConfig
from mplus_agents.model.adapters import READ_ADAPTER, WRITE_ADAPTER
from mplus_agents.model.families import layer_parts, project_key_value
from mplus_agents.model.retriever import LayerRetriever


@dataclass(frozen=True, slots=True)
class LayerPrefix:
    """What a layer's attention sees in front of the tokens it runs on.

    Attributes:
        keys: [b, h_kv, m, d_h], rotated.
        values: [b, h_kv, m, d_h].
        mask: [b, m] bool, False for an empty slot; None if there is none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None = None


class Memory(Protocol):
    """A memory to read from; the network asks it layer by layer."""

    num_slots: int

    def prefix(self, layer_idx: int, layer: nn.Module, normed: torch.Tensor) -> LayerPrefix:
        """Return a layer's slots, bos row first.

        Args:
            layer_idx: The layer.
            layer: The decoder layer, to project with.
            normed: [b, n, d], what attention is about to see, from which Θ is queried.
        """
        ...


class _LayerCall(Cache):
    """The cache of one call of one layer: hands its attention the prefix, and keeps nothing."""

    def __init__(self, make_prefix: Callable[[torch.Tensor], LayerPrefix]) -> None:
        super().__init__(layers=[])
        self.make_prefix = make_prefix
        self.prefix: LayerPrefix | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the prefix in front; transformers calls it once, from the layer's attention."""
        prefix = self.prefix
        assert prefix is not None, "the hook before attention did not run"
        keys = torch.cat([prefix.keys.to(key_states.dtype), key_states], dim=2)
        return keys, torch.cat([prefix.values.to(value_states.dtype), value_states], dim=2)


def _before_attention(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    call = kwargs.get("past_key_values")
    if not isinstance(call, _LayerCall):
        return None
    hidden, mask = kwargs["hidden_states"], kwargs["attention_mask"]
    call.prefix = prefix = call.make_prefix(hidden)
    batch_size, num_queries = hidden.shape[:2]
    seen = mask.new_ones((batch_size, prefix.keys.shape[2])) if prefix.mask is None else prefix.mask
    seen = seen[:, None, None].expand(-1, 1, num_queries, -1)
    mask = torch.cat([seen, mask.expand(batch_size, 1, -1, -1)], dim=3)
    blocked = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device)
    return args, {**kwargs, "attention_mask": blocked.masked_fill_(~mask, torch.finfo(hidden.dtype).min)}


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by plain products, each key/value head shared by its group of queries without a copy.

    For bfloat16 on a CPU, where the backward pass of torch's own kernel costs about twice as much.
    """
    batch_size, num_heads, num_queries, width = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    group = num_heads // num_kv_heads
    scores = (query * scaling).reshape(batch_size, num_kv_heads, group * num_queries, width) @ key.transpose(2, 3)
    scores = scores.view(batch_size, num_kv_heads, group, num_queries, num_keys) + attention_mask[:, :, None]
    weights = scores.softmax(dim=-1).view(batch_size, num_kv_heads, group * num_queries, num_keys)
    output = (weights @ value).view(batch_size, num_heads, num_queries, width)
    return output.transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)


class TrainableMPlus(nn.Module):
    """The weights of an M+ under training, its adapters not fused.

    Args:
        config: Memory shape, adapters and sizes.
        decoder: A transformers causal language model, with peft's adapters injected if `config` names any.
        retrievers: One per layer; empty for MemoryLLM.
        bos_embedding: [L, 1, d].
        new_memory_positional_emb: [1, 1, d].
    """

    def __init__(
        self,
        config: MPlusConfig,
        decoder: PreTrainedModel,
        retrievers: Sequence[LayerRetriever],
        bos_embedding: torch.Tensor,
        new_memory_positional_emb: torch.Tensor,
    ) -> None:
        super().__init__()
        self.config = config
        self.decoder = decoder
        self.retrievers = nn.ModuleList(retrievers)
        self.bos_embedding = nn.Parameter(bos_embedding)
        self.new_memory_positional_emb = nn.Parameter(new_memory_positional_emb)
        self.checkpointing = False
        self._adapters = [_adapter_modules(layer) for layer in self.layers]
        for layer in self.layers:
            layer_parts(layer)[1].register_forward_pre_hook(_before_attention, with_kwargs=True)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return cast(nn.ModuleList, cast(nn.Module, self.decoder.model).layers)

    def retriever(self, layer_idx: int) -> LayerRetriever:
        """Return a layer's retriever."""
        return cast(LayerRetriever, self.retrievers[layer_idx])

    def rope(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return RoPE's cosines and sines, each [b, n, d_h], in float32.

        Args:
            position_ids: [b, n] int64.
        """
        rotary = cast(nn.Module, cast(nn.Module, self.decoder.model).rotary_emb)
        cos, sin = rotary(self.bos_embedding.float(), position_ids)
        return cos, sin

    def write(self, input_ids: torch.Tensor, tail: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
        """Compress chunks into new memory tokens (paper 3.1), with gradients.

        Args:
            input_ids: [b, n] int64.
            tail: Per layer [b, m, d], the newest tokens of θ; None for an empty memory.

        Returns:
            Per layer [b, K, d].
        """
        text = self.decoder.get_input_embeddings()(input_ids)
        batch_size, num_text, width = text.shape
        num_new = self.config.memory.tokens_per_injection
        num_rows = max(0, num_new - num_text)  # memory rows that a short text needs as queries
        new = []
        for layer_idx in range(len(self.layers)):
            if tail is None:
                rows = self.bos_embedding[layer_idx].expand(batch_size, num_rows, width)
            else:
                rows = tail[layer_idx]
            text, new_rows = self._run(self._write_layer, layer_idx, text, rows, num_rows)
            new.append(new_rows)
        return new

    def read(self, input_ids: torch.Tensor, memory: Memory, adapter: str = READ_ADAPTER) -> torch.Tensor:
        """Run prompts over memories (paper 3.2.1), with gradients.

        Args:
            input_ids: [b, n] int64; rows may be filled up at their end, as no token sees a later one.
            memory: One memory per row.
            adapter: Which adapter reads.

        Returns:
            [b, n, d], ready for the head.
        """
        hidden = self.decoder.get_input_embeddings()(input_ids)
        for layer_idx in range(len(self.layers)):
            hidden = self._run(self._read_layer, layer_idx, hidden, memory, adapter)
        return cast(torch.Tensor, cast(nn.Module, cast(nn.Module, self.decoder.model).norm)(hidden))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the head to what `read` returned, [..., d]."""
        head = cast(nn.Module, self.decoder.get_output_embeddings())  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, head(hidden))

    def project(self, layer: nn.Module, hidden: torch.Tensor, positions: torch.Tensor) -> LayerPrefix:
        """Make a prefix of hidden states that all stand at the same positions in every row.

        Args:
            layer: The decoder layer.
            hidden: [b, m, d].
            positions: [m] int64.
        """
        keys, values = project_key_value(layer, hidden)
        cos, sin = self.rope(positions[None])
        return LayerPrefix(rotate(keys, cos, sin).transpose(1, 2), values.transpose(1, 2))

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _write_layer(
        self, layer_idx: int, text: torch.Tensor, tail: torch.Tensor, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        num_new = self.config.memory.tokens_per_injection
        num_tail = tail.shape[1] - num_rows
        hidden = torch.cat([tail[:, num_tail:].to(text.dtype), text], dim=1)
        hidden = torch.cat([hidden[:, :-num_new], hidden[:, -num_new:] + self.new_memory_positional_emb], dim=1)
        bos = self.bos_embedding[layer_idx].expand(len(text), 1, -1)
        rows = torch.cat([bos, tail[:, :num_tail].to(bos.dtype)], dim=1)
        places = torch.arange(rows.shape[1], device=text.device)
        with self._adapter(layer_idx, WRITE_ADAPTER):
            hidden = self._attend(layer, hidden, rows.shape[1], lambda _: self.project(layer, rows, places))
        return hidden[:, num_rows:], hidden[:, -num_new:]

    def _read_layer(self, layer_idx: int, hidden: torch.Tensor, memory: Memory, adapter: str) -> torch.Tensor:
        layer = self.layers[layer_idx]
        with self._adapter(layer_idx, adapter):
            return self._attend(layer, hidden, memory.num_slots, lambda normed: memory.prefix(layer_idx, layer, normed))

    def _attend(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        first_position: int,
        make_prefix: Callable[[torch.Tensor], LayerPrefix],
    ) -> torch.Tensor:
        num_tokens = hidden.shape[1]
        positions = torch.arange(first_position, first_position + num_tokens, device=hidden.device)
        cos, sin = self.rope(positions[None])
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=hidden.device).tril()
        output = layer(
            hidden,
            attention_mask=causal[None, None],
            past_key_values=_LayerCall(make_prefix),
            use_cache=True,
            position_embeddings=(cos.to(hidden.dtype), sin.to(hidden.dtype)),
        )
        return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)

    @contextmanager
    def _adapter(self, layer_idx: int, name: str) -> Iterator[None]:
        """Let one layer run with one adapter; inside the layer call, so that a checkpoint's second run has it too."""
        modules = self._adapters[layer_idx]
        if modules and modules[0].active_adapters != [name]:
            trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
            for module in modules:
                module.set_adapter(name)
            for parameter in trained:  # peft freezes the adapter that is not active, and with it its gradient
                parameter.requires_grad_(True)
        yield


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to keys [b, m, h_kv, d_h] at angles [b or 1, m, d_h]."""
    cos, sin = cos[:, :, None].to(keys.dtype), sin[:, :, None].to(keys.dtype)
    half = keys.shape[-1] // 2
    turned = torch.cat([-keys[..., half:], keys[..., :half]], dim=-1)
    return keys * cos + turned * sin


def _adapter_modules(layer: nn.Module) -> list[Any]:
    return [module for module in layer.modules() if hasattr(module, "lora_A") and hasattr(module, "set_adapter")]
