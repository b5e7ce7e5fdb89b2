"""Trains the tokenizer of a model from scratch: a byte-level BPE, so that any text can be written."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mplus_agents.engine.text import TextCodec
from mplus_agents.language import draw_facts
from mplus_agents.language.prose import packaged_prose
from mplus_agents.training.config import TokenizerOptions

_BEGIN, _END = "<|begin|>", "<|end|>"
_FACTS_PER_SAMPLE = 4
_OWN_FACTS = 0.2


def make_codec(options: TokenizerOptions) -> TextCodec:
    """Train a tokenizer, or load the one that the options name.

    Args:
        options: How.

    Raises:
        CheckpointError: There is none where they say.
    """
    if options.path is not None:
        return TextCodec.from_pretrained(options.path)
    tokenizer = Tokenizer(models.BPE())
    # A space in front of every line, taken away again by the decoder: a word has the same token wherever it stands.
    line_start = normalizers.Replace(Regex("\n(?=[^\n])"), "\n ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(" "), line_start])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spaces = [decoders.Replace(Regex("\n "), "\n"), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *spaces])
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[_BEGIN, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(options), trainer)
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=_BEGIN, eos_token=_END, pad_token=_END, clean_up_tokenization_spaces=False
    )
    return TextCodec(fast)


def _texts(options: TokenizerOptions) -> Iterator[str]:
    """Sentences of the language as the recipe writes them, then prose."""
    rng = Random(options.seed)
    for _ in range(options.num_samples):
        for fact in draw_facts(rng, _FACTS_PER_SAMPLE, "training", own=rng.random() < _OWN_FACTS):
            told, answer = fact.state(rng), fact.answer()
            yield f"{told}\nUser: {fact.ask(rng)}\nAssistant: {answer}\nQuestion: {fact.ask(rng)}\nAnswer: {answer}\n"
    for name in options.prose:
        yield packaged_prose(name)[: options.prose_chars]
