"""Which transformers decoders can carry the memory, and how their layers make keys and values.

Everything here is about unmodified transformers modules: no class of theirs is copied or changed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import rotate_half

from mplus_agents.errors import ConfigError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Static frequency tables only: with the others a memory slot's angle would change with the prompt's length.
SUPPORTED_ROPE_TYPES = ("default", "llama3", "linear")


def check_supported(config: PretrainedConfig) -> None:
    """Refuse a decoder whose attention or position scheme was not tested with a memory.

    Args:
        config: The decoder's configuration.

    Raises:
        ConfigError: The model type, sliding-window attention, or the kind of RoPE is not supported.
    """
    allowed = ", ".join(SUPPORTED_MODEL_TYPES)
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(f"model_type is {config.model_type!r}; allowed: {allowed}")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    # A window masks memory slots silently; Qwen declares one but only uses it if told to.
    has_window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if layer_types != {"full_attention"} or has_window:
        window = getattr(config, "sliding_window", None)
        raise ConfigError(f"sliding_window is {window!r}, layer_types {sorted(layer_types)}; allowed: full attention")
    rope = dict(config.rope_parameters or {})
    rope_type = rope.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ConfigError(f"rope_type is {rope_type!r}; allowed: {', '.join(SUPPORTED_ROPE_TYPES)}")
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor is {partial!r}; allowed: 1")


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one attention head.

    Args:
        config: The decoder's configuration.
    """
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_parts(layer: nn.Module) -> tuple[nn.Module, Any]:
    """Return a decoder layer's input norm and attention module.

    Args:
        layer: A decoder layer of a supported family.
    """
    return layer.input_layernorm, layer.self_attn  # type: ignore[return-value]


def project_key_value(layer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the keys and values that a layer's attention would make of hidden states, before RoPE.

    Args:
        layer: A decoder layer.
        hidden: [..., m, d], inputs of the layer.

    Returns:
        Keys and values, each [..., m, h_kv, d_h]; keys after bias and key norm.
    """
    norm, attention = layer_parts(layer)
    normed = norm(hidden)
    shape = (*normed.shape[:-1], attention.k_proj.out_features // attention.head_dim, attention.head_dim)
    keys, values = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape)
    key_norm = getattr(attention, "k_norm", None)
    return (keys if key_norm is None else key_norm(keys)), values


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to keys.

    Args:
        keys: [m, h_kv, d_h].
        cos: [m, d_h].
        sin: [m, d_h].

    Returns:
        [m, h_kv, d_h].
    """
    half_turned = cast(torch.Tensor, rotate_half(keys))  # type: ignore[no-untyped-call]
    return keys * cos[:, None] + half_turned * sin[:, None]
