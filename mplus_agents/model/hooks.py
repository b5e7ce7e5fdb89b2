"""The permanent hooks that let an unmodified decoder read and write memory.

They are installed once, when a model is built, and take everything from the call's own cache; a call without one of
our caches passes through untouched. So calls on several threads cannot meet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mplus_agents.model.cache import ReadCache, WriteCache
from mplus_agents.model.families import layer_parts


def install_read_hooks(layers: Iterable[nn.Module]) -> None:
    """Let each layer's attention find the memory in the call's cache.

    Args:
        layers: The decoder layers of the read pass.
    """
    for layer in layers:
        layer_parts(layer)[1].register_forward_pre_hook(_before_read_attention, with_kwargs=True)


def install_write_hooks(layers: Iterable[nn.Module]) -> None:
    """Let each layer start from the memory in the call's cache and leave its new tokens there.

    Args:
        layers: The decoder layers of the write pass.
    """
    for layer in layers:
        layer.register_forward_pre_hook(_before_write_layer, with_kwargs=True)
        layer.register_forward_hook(_after_write_layer, with_kwargs=True)


def _before_read_attention(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, ReadCache):
        return None
    layer_idx = int(attention.layer_idx)  # type: ignore[arg-type]
    mask = cache.before_attention(layer_idx, kwargs["hidden_states"], kwargs.get("attention_mask"))
    return args, {**kwargs, "attention_mask": mask}


def _before_write_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, WriteCache):
        return None
    hidden = cache.before_layer(int(layer_parts(layer)[1].layer_idx), args[0])
    return (hidden, *args[1:]), kwargs


def _after_write_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, WriteCache):
        cache.after_layer(output)
