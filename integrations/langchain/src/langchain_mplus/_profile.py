"""What LangChain's model profile says about an M+ model, as far as it is known without loading one."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from langchain_core.language_models import ModelProfile

_DEFAULT_NEW_TOKENS = 128


def profile_of(name: str, max_prompt_tokens: int | None, max_new_tokens: int | None) -> ModelProfile:
    """Describe a model.

    Args:
        name: The model.
        max_prompt_tokens: Tokens of prompt and answer together; left out if None.
        max_new_tokens: Most tokens of an answer; the engine's default if None.
    """
    profile = ModelProfile(
        name=name,
        text_inputs=True,
        text_outputs=True,
        image_inputs=False,
        audio_inputs=False,
        video_inputs=False,
        pdf_inputs=False,
        tool_calling=False,
        structured_output=False,
    )
    if max_prompt_tokens is not None:
        profile["max_output_tokens"] = max_new_tokens or _DEFAULT_NEW_TOKENS
        profile["max_input_tokens"] = max(1, max_prompt_tokens - profile["max_output_tokens"])
    return profile


def read_prompt_limit(model: str) -> int | None:
    """Read a model's generation window from its `config.json`; None if it is not at hand or not of our own format.

    Args:
        model: A folder, a hub id, or a model that the package brings along.
    """
    built_in = files("mplus_agents") / "assets" / model / "config.json"
    path = built_in if built_in.is_file() else Path(model) / "config.json"
    try:
        limit = json.loads(path.read_text(encoding="utf-8"))["mplus"]["max_prompt_tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return limit if isinstance(limit, int) else None
