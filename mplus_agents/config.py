"""Validated, frozen settings; an unknown key or value is an error, never ignored.

What a checkpoint's own files call these numbers is translated once, in `mplus_agents.model.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from mplus_agents.errors import ConfigError

MemoryRule = Literal["paper", "released"]
RetrievalQuery = Literal["prompt", "last_turn"]
LongTermUse = Literal["retrieved", "random", "off"]
_SIZES = (
    "num_layers",
    "hidden_size",
    "num_kv_heads",
    "head_dim",
    "tokens_per_injection",
    "max_short_term",
    "merge_every",
)
MEMORY_RULES: tuple[str, ...] = get_args(MemoryRule)
LONG_TERM_USES: tuple[str, ...] = get_args(LongTermUse)


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """Shape and rules of one agent's memory.

    Attributes:
        num_layers: Decoder layers; each has its own memory.
        hidden_size: Width d of a hidden state.
        num_kv_heads: Key/value heads h_kv.
        head_dim: Width d_h of one head.
        retrieval_dim: Width p of a retrieval key; 0 means that there is no retriever (MemoryLLM).
        tokens_per_injection: K, the new tokens per layer of one injection (paper 3.1: 256).
        max_short_term: N, the capacity of θ per layer (paper 3.2.3: 10,240).
        num_retrieved: K0, the tokens brought back from Θ per layer, to be read (paper 3.2.3: 2,560); 0: no retriever.
        max_long_term: M, the capacity of Θ per layer under the rule `paper` (paper 3.2.1: 150,000).
        rule: `paper` or `released`, the ageing and eviction rule.
        merge_every: `released` only: injections between two merges of staged tokens.
        initial_recall_count: `released` only: recall count of a token that enters Θ.
        recall_decay: `released` only: what every recall count loses at a merge.
    """

    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    retrieval_dim: int
    tokens_per_injection: int = 256
    max_short_term: int = 10_240
    num_retrieved: int = 2_560
    max_long_term: int = 150_000
    rule: MemoryRule = "paper"
    merge_every: int = 60
    initial_recall_count: float = 10.0
    recall_decay: float = 1.0

    def __post_init__(self) -> None:
        for name in (*_SIZES, "retrieval_dim", "num_retrieved", "max_long_term"):
            _require_whole(name, getattr(self, name))
        for name in ("initial_recall_count", "recall_decay"):
            _require(isinstance(getattr(self, name), (int, float)), name, getattr(self, name), "a number")
        for name in _SIZES:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a positive whole number")
        for name in ("retrieval_dim", "num_retrieved", "max_long_term"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive whole number")
        at_least = f"at least tokens_per_injection ({self.tokens_per_injection})"
        _require(self.max_short_term >= self.tokens_per_injection, "max_short_term", self.max_short_term, at_least)
        _require(self.rule in MEMORY_RULES, "rule", self.rule, " or ".join(MEMORY_RULES))
        _require(self.recall_decay >= 0, "recall_decay", self.recall_decay, "0 or more")
        has_retriever = self.retrieval_dim > 0
        if has_retriever != (self.num_retrieved > 0) or has_retriever != (self.max_long_term > 0):
            raise ConfigError(
                "retrieval_dim, num_retrieved and max_long_term are either all positive (M+) or all 0 (MemoryLLM); "
                f"given: {self.retrieval_dim}, {self.num_retrieved}, {self.max_long_term}"
            )

    @property
    def has_long_term(self) -> bool:
        """Whether there is a Θ (M+) or what leaves θ is gone (MemoryLLM)."""
        return self.retrieval_dim > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from plain values.

        Args:
            values: Field names and values.

        Raises:
            ConfigError: A key is unknown or missing, or a value is not allowed.
        """
        reject_unknown_keys(values, {field.name for field in fields(cls)}, "memory config")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"memory config: {error}") from error


def reject_unknown_keys(values: Mapping[str, Any], known: set[str], what: str) -> None:
    """Raise if `values` has a key outside `known`.

    Args:
        values: The keys and values given.
        known: The allowed keys.
        what: The config's name, for the message.

    Raises:
        ConfigError: A key is unknown; the message lists the known ones.
    """
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{what}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")


def _require_whole(name: str, value: object) -> None:
    _require(type(value) is int, name, value, "a whole number")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The two LoRA adapters, write and read, of one shape (published config: `lora_config`).

    Attributes:
        rank: r.
        alpha: The adapter's output is scaled by alpha / rank.
        target_modules: Names of the linear layers that carry both adapters.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        _require_whole("rank", self.rank)
        _require(isinstance(self.alpha, (int, float)), "alpha", self.alpha, "a number")
        _require(self.rank >= 1, "rank", self.rank, "a positive whole number")
        _require(
            bool(self.target_modules), "target_modules", self.target_modules, "at least one name of a linear layer"
        )

    @property
    def scaling(self) -> float:
        """Factor on B·A."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class MPlusConfig:
    """What an M+ checkpoint says beside its decoder's own configuration.

    Attributes:
        memory: Shape and rules of the memory.
        adapters: The write and read adapters; None if both passes use the plain weights.
        chunk_tokens: Text tokens of a full injection (paper 4.4: 512).
        min_chunk_tokens: The engine never injects fewer (README of the published code: 16).
        max_prompt_tokens: Generation window, prompt and answer together (paper 3.2.4: 2,048).
        rounds_rope: Whether RoPE's frequencies are rounded to bfloat16 when the weights are, as the published ones were
            in training.
        retrieval_query: Which prompt tokens query Θ: all of the `prompt`, as published, or the `last_turn` alone, so
            that a long prompt does not dilute a short question.
    """

    memory: MemoryConfig
    adapters: AdapterConfig | None = None
    chunk_tokens: int = 512
    min_chunk_tokens: int = 16
    max_prompt_tokens: int = 2_048
    rounds_rope: bool = False
    retrieval_query: RetrievalQuery = "last_turn"

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "min_chunk_tokens", "max_prompt_tokens"):
            _require_whole(name, getattr(self, name))
        _require(type(self.rounds_rope) is bool, "rounds_rope", self.rounds_rope, "true or false")
        _require(self.min_chunk_tokens >= 1, "min_chunk_tokens", self.min_chunk_tokens, "a positive whole number")
        at_least = f"at least min_chunk_tokens ({self.min_chunk_tokens})"
        _require(self.chunk_tokens >= self.min_chunk_tokens, "chunk_tokens", self.chunk_tokens, at_least)
        more_than = (
            f"more than chunk_tokens ({self.chunk_tokens}), as the window of waiting turns is part of the prompt"
        )
        _require(self.max_prompt_tokens > self.chunk_tokens, "max_prompt_tokens", self.max_prompt_tokens, more_than)
        queries = get_args(RetrievalQuery)
        _require(self.retrieval_query in queries, "retrieval_query", self.retrieval_query, " or ".join(queries))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from plain values.

        Args:
            values: What `to_dict` returned.

        Raises:
            ConfigError: A key is unknown or missing, or a value is not allowed.
        """
        reject_unknown_keys(values, {field.name for field in fields(cls)}, "mplus config")
        if "memory" not in values:
            raise ConfigError("mplus config: the key 'memory' is missing")
        adapters = values.get("adapters")
        if adapters is not None:
            reject_unknown_keys(adapters, {field.name for field in fields(AdapterConfig)}, "adapter config")
            missing = sorted({field.name for field in fields(AdapterConfig)} - set(adapters))
            if missing:
                raise ConfigError(f"adapter config: the key {missing[0]!r} is missing")
            adapters = AdapterConfig(adapters["rank"], adapters["alpha"], tuple(adapters["target_modules"]))
        rest = {key: value for key, value in values.items() if key not in ("memory", "adapters")}
        return cls(memory=MemoryConfig.from_dict(values["memory"]), adapters=adapters, **rest)
