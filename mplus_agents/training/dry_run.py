"""What a stage will cost, before it is started: weights, bytes and operations. No weights are loaded.

Parameters are counted on the real modules; bytes and operations are estimates from the formulae that stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from mplus_agents.model.families import head_dim
from mplus_agents.training.build import (
    adapt_network,
    base_config,
    new_decoder_config,
    new_network,
    read_base_config,
    wrap_decoder,
)
from mplus_agents.training.config import PREVIOUS, DocumentSettings, StageConfig
from mplus_agents.training.folders import empty_network, model_folder
from mplus_agents.training.network import TrainableMPlus
from mplus_agents.training.small_context import NUM_TURNS
from mplus_agents.training.small_memory import K0_FACTORS, MEMORY_TURNS

# Shapes of the small recipe's steps (training/small.py): rows and tokens of the warm-ups, tokens of a question with its
# answer.
_WARM_UP_ROWS, _WARM_UP_TOKENS, _QUESTION_TOKENS = 64, 96, 32
_FULL_CHUNKS = 0.6  # share of steps with chunks of full length; others are 20 tokens or more
_SHORTEST_CHUNK = 20


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one process needs for a stage.

    Attributes:
        stage: Its name.
        num_steps: Most steps.
        num_parameters: All weights.
        num_trained: Those that are trained.
        tokens_per_step: Tokens written and read by a step; for documents, of the longest ones.
        flops_per_step: Floating-point operations of a step.
        weight_bytes: Weights, with their masters.
        gradient_bytes: Gradients.
        optimizer_bytes: AdamW's moments.
        memory_bytes: Memory tokens that are carried from step to step.
        activation_bytes: What the backward pass of a step's largest part needs.
    """

    stage: str
    num_steps: int
    num_parameters: int
    num_trained: int
    tokens_per_step: int
    flops_per_step: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    memory_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it together."""
        fixed = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return fixed + self.memory_bytes + self.activation_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the total, for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


@dataclass(frozen=True, slots=True)
class _Work:
    """A part of a step.

    Attributes:
        rows: Texts.
        num_tokens: Tokens of each.
        num_slots: Memory tokens in front of each.
        has_gradient: Whether there is a backward pass.
        has_head: Whether tokens are predicted.
        share: How often a step has this part.
    """

    rows: float
    num_tokens: float
    num_slots: float
    has_gradient: bool = True
    has_head: bool = True
    share: float = 1.0


def estimate(stages: Sequence[StageConfig], previous: Path | None = None) -> list[StageCost]:
    """Estimate what stages cost.

    Args:
        stages: In order; a stage may start from the one before.
        previous: Output folder of the stage before the first one.

    Raises:
        ConfigError: Sizes do not fit each other.
        CheckpointError: A decoder's configuration is not to be had.
    """
    costs = []
    network: TrainableMPlus | None = None
    for stage in stages:
        network = _skeleton(stage, network, previous)
        costs.append(_cost(stage, network))
    return costs


def _skeleton(stage: StageConfig, before: TrainableMPlus | None, previous: Path | None) -> TrainableMPlus:
    """Build a stage's network on the meta device."""
    model = stage.model
    if model.new is not None:
        config = new_decoder_config(model.new, model.new.tokenizer.vocab_size, {})
        return new_network(model.new, config, device="meta")
    if model.base is not None:
        decoder_config = read_base_config(model.base.path)
        own = base_config(model.base, decoder_config)
        with torch.device("meta"):
            decoder: Any = AutoModelForCausalLM.from_config(decoder_config)  # type: ignore[no-untyped-call]
        return wrap_decoder(decoder, own, model.base.train_base, model.base.adapter_dropout)
    start = model.start
    assert start is not None
    if start.path == PREVIOUS and before is not None:
        network = before
    else:
        folder = previous if start.path == PREVIOUS and previous is not None else Path(start.path)
        network, _ = empty_network(model_folder(folder))
        network.requires_grad_(True)
    adapt_network(network, start)
    return network


def _cost(stage: StageConfig, network: TrainableMPlus) -> StageCost:
    weights = list(network.parameters())
    total = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    has_masters = stage.precision == "bf16_master"
    work = _document_work(stage, network) if isinstance(stage.recipe, DocumentSettings) else _small_work(stage, network)
    passes = stage.gradient_accumulation
    return StageCost(
        stage=stage.name or "",
        num_steps=stage.steps,
        num_parameters=total,
        num_trained=trained,
        tokens_per_step=round(passes * sum(part.share * part.rows * part.num_tokens for part in work)),
        flops_per_step=passes * sum(part.share * _flops(part, stage, network) for part in work),
        # bfloat16 copies of all weights and float32 masters of the trained ones, or all in float32.
        weight_bytes=2 * total + 4 * trained if has_masters else 4 * total,
        gradient_bytes=(2 + 4) * trained if has_masters else 4 * trained,
        optimizer_bytes=2 * 4 * trained,  # two float32 moments (Loshchilov and Hutter 2019, algorithm 2)
        memory_bytes=_carried_bytes(stage, network),
        activation_bytes=round(max(_activation_bytes(part, stage, network) for part in work if part.has_gradient)),
    )


def _small_work(stage: StageConfig, network: TrainableMPlus) -> list[_Work]:
    recipe = stage.recipe
    assert not isinstance(recipe, DocumentSettings)
    if recipe.kind in ("repeat", "recall", "context"):
        return [_Work(_WARM_UP_ROWS, _WARM_UP_TOKENS, 1)]
    memory, longest = network.config.memory, network.config.chunk_tokens
    length = _FULL_CHUNKS * longest + (1 - _FULL_CHUNKS) * (_SHORTEST_CHUNK + longest) / 2
    times = 1 + (fmean(K0_FACTORS) - 1) * (recipe.hard_from + recipe.hard_to) / 2
    num_read = round(times * memory.num_retrieved) if recipe.kind == "long_term" else 0
    num_slots = 1 + memory.max_short_term + num_read
    num_turns = NUM_TURNS if recipe.kind == "write" else MEMORY_TURNS
    return [
        _Work(recipe.num_chunks, length, 1 + memory.tokens_per_injection, has_head=False),
        _Work(recipe.num_questions, num_turns * _QUESTION_TOKENS, num_slots),
    ]


def _document_work(stage: StageConfig, network: TrainableMPlus) -> list[_Work]:
    """Parts of a step on documents that are as long as the stage can use, by the shares of its tasks."""
    from mplus_agents.training.document_stage import DocumentStage

    settings = stage.recipe
    assert isinstance(settings, DocumentSettings)
    own = ("memory_dtype", "long_term_device")
    options = DocumentStage.from_dict({key: value for key, value in settings.options.items() if key not in own})
    config, memory = network.config, network.config.memory
    num_theta = options.max_short_term or memory.max_short_term
    num_slots = 1 + num_theta + (memory.num_retrieved if options.has_long_term else 0)
    injected = (1 - options.plain_share) * (1 - options.revisit_share)
    many, one = injected * options.multi_share, injected * (1 - options.multi_share)
    chunk = (config.min_chunk_tokens + config.chunk_tokens) / 2  # lengths are drawn evenly
    num_rows = 1 + memory.tokens_per_injection
    return [
        _Work(1, config.max_prompt_tokens, num_slots, share=1 - one),
        _Work(options.most_chunks(stage.steps - 1), chunk, num_rows, False, False, share=many),
        _Work(1, chunk, num_rows, has_head=False, share=one),
        _Work(1, config.max_prompt_tokens, num_rows, share=one),
    ]


def _flops(work: _Work, stage: StageConfig, network: TrainableMPlus) -> float:
    """Operations of a part of a step.

    Forward 2 per weight and token, backward 4 (Kaplan et al. 2020, table 1 and section 2.1): 2 for the gradient of what
    came in and 2 for that of the weight, which a frozen weight does not need. Attention: QK and AV, each 2 per
    query, key and width, masked ones too, as the mask is given. Left out: norms, softmax, the retriever's scores.
    """
    config: Any = network.decoder.config
    table = config.vocab_size * config.hidden_size
    num_weights = sum(weight.numel() for weight in network.decoder.parameters() if weight.ndim == 2)
    # The embedding is looked up, not multiplied; tied, its one table is the head.
    matrix = num_weights - (table if config.tie_word_embeddings else 2 * table)
    num_tokens = work.rows * work.num_tokens
    head = 2 * table * num_tokens if work.has_head else 0
    num_keys = work.num_slots + work.num_tokens
    width = config.num_attention_heads * head_dim(config)
    attention = 4 * config.num_hidden_layers * num_tokens * num_keys * width
    memory_width = 2 * config.num_key_value_heads * head_dim(config)
    projected = 2 * config.num_hidden_layers * work.num_slots * config.hidden_size * memory_width
    forward = 2 * matrix * num_tokens + head + attention + projected
    if not work.has_gradient:
        return float(forward)
    trains_base = cast(Any, network.layers[0]).input_layernorm.weight.requires_grad
    backward = (2 if trains_base else 1) * (forward - attention) + 2 * attention
    again = forward - head if stage.gradient_checkpointing else 0
    return float(forward + backward + again)


def _activation_bytes(work: _Work, stage: StageConfig, network: TrainableMPlus) -> float:
    """Bytes that a part of a step keeps for its backward pass.

    Per token and layer about 8 d + 4 d_ff values: inputs of norms and of the linear layers, queries, keys, values, and
    what the gated unit multiplies (compare Korthikanti et al. 2022, eq. 1: 34 d bytes at two each). With checkpoints, d
    values per layer and one whole layer. Plain attention keeps scores and weights too. Logits are float32, with their
    gradient.
    """
    config: Any = network.decoder.config
    size = 4 if stage.precision == "float32" else 2
    num_tokens = work.rows * work.num_tokens
    num_keys = work.num_slots + work.num_tokens
    layer = size * num_tokens * (8 * config.hidden_size + 4 * config.intermediate_size)
    if stage.attention != "sdpa":
        layer += 2 * size * num_tokens * num_keys * config.num_attention_heads
    layer += size * work.num_slots * 2 * config.num_key_value_heads * head_dim(config)
    num_layers = config.num_hidden_layers
    kept = size * num_tokens * config.hidden_size * num_layers + layer
    logits = 2 * 4 * num_tokens * config.vocab_size if work.has_head else 0
    if not isinstance(stage.recipe, DocumentSettings):
        logits /= 4  # the small recipe makes logits for answers only, about a quarter of the tokens
    return float((kept if stage.gradient_checkpointing else layer * num_layers) + logits)


def _carried_bytes(stage: StageConfig, network: TrainableMPlus) -> int:
    memory, recipe = network.config.memory, stage.recipe
    size = 4 if stage.precision == "float32" else 2
    row = memory.num_layers * memory.hidden_size * size
    if not isinstance(recipe, DocumentSettings):
        carries = recipe.kind in ("write", "theta", "long_term")
        return carries * (1 + recipe.queue_steps) * recipe.num_chunks * memory.tokens_per_injection * row
    from mplus_agents.training.document_stage import DocumentStage

    own = ("memory_dtype", "long_term_device")
    options = DocumentStage.from_dict({key: value for key, value in recipe.options.items() if key not in own})
    theta = (options.max_short_term or memory.max_short_term) * row
    key = memory.num_layers * memory.retrieval_dim * size
    return theta + (memory.max_long_term * (row + key) if options.has_long_term else 0)
