"""What a stage file says: which model, which recipe on which data, and how to step. An unknown key is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mplus_agents.config import MemoryConfig, MPlusConfig, RetrievalQuery

PREVIOUS = "previous"
Precision = Literal["float32", "bf16_master", "bf16_autocast"]
Prose = Literal["kjv", "jargon", "novel"]


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


Positive = Annotated[int, Field(strict=True, gt=0)]
NotNegative = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]
# YAML 1.1 takes `1e-4`, without a dot, for a string; a number it is all the same.
Number = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=1)]
NotNegativeNumber = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, allow_inf_nan=False)]
_Beta = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, lt=1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$")]
PositiveNumber = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a stage file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MemoryOptions(Section):
    """Sizes of the memory and of the prompts; what is not given keeps its default, or what the start has.

    Attributes:
        retrieval_dim: p; 0 for no retriever and no Θ (MemoryLLM).
        tokens_per_injection: K.
        max_short_term: N.
        num_retrieved: K0.
        max_long_term: M.
        chunk_tokens: Text tokens of a full injection.
        min_chunk_tokens: Fewest text tokens of an injection.
        max_prompt_tokens: Prompt and answer together.
        retrieval_query: Which prompt tokens query Θ.
    """

    retrieval_dim: NotNegative | None = None
    tokens_per_injection: Positive | None = None
    max_short_term: Positive | None = None
    num_retrieved: NotNegative | None = None
    max_long_term: NotNegative | None = None
    chunk_tokens: Positive | None = None
    min_chunk_tokens: Positive | None = None
    max_prompt_tokens: Positive | None = None
    retrieval_query: RetrievalQuery | None = None

    def apply(self, base: MPlusConfig) -> MPlusConfig:
        """Return a config with these options in place of its own.

        Args:
            base: The config to change.

        Raises:
            ConfigError: The sizes do not fit each other.
        """
        given = self.model_dump(exclude_none=True)
        values = base.to_dict()
        memory = {key: value for key, value in given.items() if key in values["memory"]}
        rest = {key: value for key, value in given.items() if key not in memory}
        return MPlusConfig.from_dict({**values, **rest, "memory": {**values["memory"], **memory}})


class TokenizerOptions(Section):
    """A byte-level BPE, trained on sentences of the packaged language and on real prose.

    Attributes:
        vocab_size: Tokens.
        num_samples: Worlds of the language to draw sentences from.
        seed: Seed of the draws.
        prose: Packaged texts.
        prose_chars: Characters of each.
        path: Folder of a tokenizer to take instead.
    """

    vocab_size: Annotated[int, Field(strict=True, ge=258)] = 2048  # 256 bytes and two special tokens
    num_samples: NotNegative = 16_000
    seed: Seed = 5
    prose: tuple[Prose, ...] = ("kjv", "jargon")
    prose_chars: NotNegative = 600_000
    path: str | None = None


class NewModel(Section):
    """A Llama from scratch, without adapters.

    Attributes:
        hidden_size: d.
        intermediate_size: Width of the feed-forward layers.
        num_layers: L.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Width of a head.
        max_position_embeddings: What the decoder's config says.
        rope_theta: Base of RoPE's frequencies.
        memory: Sizes of the memory.
        tokenizer: How to make the tokenizer.
    """

    hidden_size: Positive
    intermediate_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    max_position_embeddings: Positive = 4096
    rope_theta: PositiveNumber = 10_000.0
    memory: MemoryOptions = MemoryOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is no multiple of num_kv_heads ({self.num_kv_heads})")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) is no multiple of num_heads ({self.num_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) is odd; RoPE turns pairs")
        return self


class BaseDecoder(Section):
    """A transformers decoder that gets a memory.

    Attributes:
        path: A folder or a hub id.
        train_base: Whether its own weights are trained too.
        adapter_rank: Rank of the write and of the read adapter; 0 for none.
        adapter_alpha: Their scale; twice the rank if None.
        adapter_dropout: Dropout in front of them.
        memory: Sizes of the memory.
    """

    path: str
    train_base: Flag = False
    adapter_rank: NotNegative = 16
    adapter_alpha: PositiveNumber | None = None
    adapter_dropout: Share = 0.1
    memory: MemoryOptions = MemoryOptions()


class Start(Section):
    """What an earlier stage made.

    Attributes:
        path: Its output folder, or a model folder; `previous` is the stage before in the same run.
        train_base: Whether the decoder's own weights are trained; if None, as they must be: without adapters they are.
        adapter_dropout: Dropout in front of the adapters.
        carry_memory: Whether the memory that the stage before ended with is gone on from, if it is still there.
        memory: Sizes that differ now. A retriever is made anew if there was none.
    """

    path: str = PREVIOUS
    train_base: Flag | None = None
    adapter_dropout: Share = 0.1
    carry_memory: Flag = True
    memory: MemoryOptions = MemoryOptions()


class ModelSection(Section):
    """Where the network comes from: exactly one of these.

    Attributes:
        new: From scratch.
        base: From a transformers decoder.
        start: From an earlier stage.
    """

    new: NewModel | None = None
    base: BaseDecoder | None = None
    start: Start | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if sum(part is not None for part in (self.new, self.base, self.start)) != 1:
            raise ValueError("exactly one of new, base and start")
        return self


class SmallSettings(Section):
    """The small recipe: facts and questions drawn on the fly (see `training.small_stage.SmallStage`).

    Attributes:
        type: `small`.
        kind: What a step is made of.
        num_chunks: Chunks per step.
        num_questions: Questions per step.
        queue_steps: Earlier steps whose tokens stay in the world.
        context_every: Every so many steps reads from the prompt; 0: none.
        most_context_chunks: Most chunks in a prompt of those steps.
        long_prompt_every: Every so many steps has long prompts; 0: none.
        chat_share: Share of turns that need no memory.
        retriever_weight: Weight of the retriever's loss.
        common_from: Share of common names and values at the first step.
        common_to: The same at the last step.
        hard_from: Share of what is hard at the first step.
        hard_to: The same at the last step.
        easy_steps: Steps of `recall` before sentences come in.
        objective: The retriever's objective.
        detach_hidden: Whether the retriever's loss stops at the hidden states.
    """

    type: Literal["small"]
    kind: Literal["repeat", "recall", "context", "write", "theta", "long_term"]
    num_chunks: Positive = 96
    num_questions: Positive = 160
    queue_steps: NotNegative = 0
    context_every: NotNegative = 0
    most_context_chunks: Positive = 8
    long_prompt_every: NotNegative = 0
    chat_share: Share = 0.0
    retriever_weight: NotNegativeNumber = 0.3
    common_from: Share = 0.25
    common_to: Share = 0.25
    hard_from: Share = 1.0
    hard_to: Share = 1.0
    easy_steps: NotNegative = 100
    objective: Literal["bce", "contrastive"] = "contrastive"
    detach_hidden: Flag = True


class DocumentSettings(Section):
    """The paper's recipe on documents (see `training.document_recipe`).

    Attributes:
        type: `document`.
        options: Fields of `DocumentStage`, and `paper_stage`, `memory_dtype` and `long_term_device`.
    """

    type: Literal["document"]
    options: dict[str, Any] = {}


class DataSection(Section):
    """What to train on.

    Attributes:
        prose: Packaged texts of the small recipe.
        sources: Where the document recipe takes its documents: fields of `SourceConfig`, one mapping per source.
    """

    prose: Annotated[tuple[Prose, ...], Field(min_length=1)] = ("kjv", "jargon")
    sources: tuple[dict[str, Any], ...] = ()


class OptimizerSection(Section):
    """The optimizer and its learning rate.

    Attributes:
        kind: `adamw`, or `muon` for the matrices of the layers with AdamW for the rest.
        lr: Peak learning rate.
        retriever_lr: That of the retriever; the same if None.
        betas: Of the two moments.
        weight_decay: Decoupled weight decay, of all weights.
        clip: Largest norm of the gradient; None to leave it.
        warm_up_steps: Steps over which the rate grows from 0.
        schedule: `constant`, or `linear`: falls between two shares of the steps.
        decay_from: Share of the steps after which it falls.
        decay_until: Share of the steps after which it stays.
        final_factor: What is left of it then.
        average_over: The model that is saved has the moving average of the weights over so many steps; 0 for the
            weights of the last one.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: PositiveNumber
    retriever_lr: PositiveNumber | None = None
    betas: tuple[_Beta, _Beta] = (0.9, 0.98)
    weight_decay: NotNegativeNumber = 0.01
    clip: PositiveNumber | None = 1.0
    warm_up_steps: NotNegative = 100
    schedule: Literal["constant", "linear"] = "constant"
    decay_from: Share = 0.0
    decay_until: Share = 1.0
    final_factor: Share = 0.05
    average_over: NotNegative = 0

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.schedule == "linear" and self.decay_from >= self.decay_until:
            raise ValueError(f"decay_from ({self.decay_from}) has to be less than decay_until ({self.decay_until})")
        return self

    def factor(self, step: int, num_steps: int) -> float:
        """Return what a step's learning rate is, as a share of the peak.

        Args:
            step: The step, from 0.
            num_steps: Steps of the stage.
        """
        factor = min(1.0, (step + 1) / self.warm_up_steps) if self.warm_up_steps else 1.0
        start, end = self.decay_from * num_steps, self.decay_until * num_steps
        if self.schedule == "linear" and step >= start:
            factor *= 1 - (1 - self.final_factor) * min(1.0, (step - start) / (end - start))
        return factor


class StopWhen(Section):
    """Ends a stage that has reached its aim.

    Attributes:
        metric: A number that the recipe reports.
        value: What its mean has to reach.
        direction: `above` or `below` it.
        mean_over: Steps of one mean; looked at once every so many steps.
    """

    metric: str
    value: Number
    direction: Literal["above", "below"] = "above"
    mean_over: Positive = 25


class EarlyStop(Section):
    """Ends a stage that does not get better.

    Attributes:
        metric: A number that the recipe reports, or `loss`.
        patience: So many means in a row without a new best one.
        direction: Whether better is `below` or `above`.
        mean_over: Steps of one mean.
    """

    metric: str = "loss"
    patience: Positive
    direction: Literal["above", "below"] = "below"
    mean_over: Positive = 250


class StageConfig(Section):
    """One stage of training.

    Attributes:
        name: What it is called; the file's name if None.
        model: Where the network comes from.
        recipe: What a step computes.
        data: What it is computed on.
        optimizer: How weights move.
        precision: `float32`; `bf16_master`: a bfloat16 working copy with float32 master weights; `bf16_autocast`:
            float32 weights, bfloat16 products, by accelerate.
        attention: transformers' name of the attention, or `grouped` (ours, for bfloat16 on a CPU).
        gradient_checkpointing: Compute layers a second time rather than keep what they computed.
        gradient_accumulation: Losses per step.
        steps: Most steps.
        seed: Seed of everything drawn.
        save_every: Steps between two checkpoints.
        log_every: Steps of one line in the log.
        tensorboard: Whether to write TensorBoard's files too.
        stop_when: Ends the stage early when it has reached its aim.
        early_stop: Ends the stage early when it does not get better.
    """

    name: Name | None = None
    model: ModelSection
    recipe: Annotated[SmallSettings | DocumentSettings, Field(discriminator="type")]
    data: DataSection = DataSection()
    optimizer: OptimizerSection
    precision: Precision = "float32"
    attention: Literal["sdpa", "eager", "grouped"] = "sdpa"
    gradient_checkpointing: Flag = False
    gradient_accumulation: Positive = 1
    steps: Positive
    seed: Seed = 0
    save_every: Positive = 250
    log_every: Positive = 25
    tensorboard: Flag = False
    stop_when: StopWhen | None = None
    early_stop: EarlyStop | None = None


def memory_config(model: NewModel) -> MPlusConfig:
    """Return the config of a network from scratch.

    Args:
        model: Its sizes.

    Raises:
        ConfigError: The sizes do not fit each other.
    """
    shape = (model.num_layers, model.hidden_size, model.num_kv_heads, model.head_dim)
    return model.memory.apply(MPlusConfig(MemoryConfig(*shape, retrieval_dim=max(16, model.hidden_size // 16))))
