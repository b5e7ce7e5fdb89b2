"""Questions on real contexts, from files in the formats in which they were published."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import InvalidInputError

Dataset = Literal["squad", "naturalqa"]
DATASETS: tuple[str, ...] = get_args(Dataset)
# Longest answers in tokens, as in the paper's knowledge retention experiments.
MAX_ANSWER_TOKENS: dict[str, int] = {"squad": 3, "naturalqa": 4}
_GZIP = b"\x1f\x8b"  # what such a file begins with
_MIN_DISTRACTOR_TOKENS, _MAX_DISTRACTOR_TOKENS = 300, 500


@dataclass(frozen=True, slots=True)
class QAExample:
    """One question on one context.

    Attributes:
        context: The text that holds the answer.
        question: The question.
        answers: All accepted answers, the first one the reference.
    """

    context: str
    question: str
    answers: tuple[str, ...]


def load_examples(dataset: Dataset, path: Path, codec: TextCodec) -> list[QAExample]:
    """Read the questions whose answer is short, one per context, in the file's order.

    Args:
        dataset: `squad` (versions 1.1 and 2.0) or `naturalqa` (Natural Questions, the simplified JSON Lines).
        path: The file.
        codec: The tokenizer that the answers' tokens are counted with.

    Raises:
        InvalidInputError: The file cannot be read, is in another format, or holds no such question.
    """
    if dataset not in DATASETS:
        raise InvalidInputError("dataset", dataset, ", ".join(DATASETS))
    read: Callable[[Path], Iterator[QAExample]] = _read_squad if dataset == "squad" else _read_natural_questions
    most = MAX_ANSWER_TOKENS[dataset]
    kept: dict[str, QAExample] = {}
    for example in read(path):
        if len(codec.encode(example.answers[0])) <= most:
            kept.setdefault(example.context, example)
    if not kept:
        raise InvalidInputError("file", str(path), f"a file with answers of at most {most} tokens")
    return list(kept.values())


def load_distractors(path: Path, codec: TextCodec) -> list[str]:
    """Read the contexts of 300 to 500 tokens of a SQuAD file, each once.

    Args:
        path: The file, such as SQuAD's training part.
        codec: The tokenizer that tokens are counted with.

    Raises:
        InvalidInputError: The file cannot be read, is in another format, or holds no such context.
    """
    contexts = dict.fromkeys(paragraph["context"] for paragraph in _squad_paragraphs(path, "distractors"))
    sizes = range(_MIN_DISTRACTOR_TOKENS, _MAX_DISTRACTOR_TOKENS + 1)
    kept = [context for context in contexts if len(codec.encode(context)) in sizes]
    if not kept:
        raise InvalidInputError("distractors", str(path), f"a file with contexts of {sizes[0]} to {sizes[-1]} tokens")
    return kept


def _read_squad(path: Path) -> Iterator[QAExample]:
    for paragraph in _squad_paragraphs(path):
        try:
            for entry in paragraph["qas"]:
                answers = tuple(dict.fromkeys(_text(answer["text"]) for answer in entry["answers"]))
                if answers and not entry.get("is_impossible", False):
                    yield QAExample(paragraph["context"], entry["question"].strip(), answers)
        except (KeyError, TypeError, AttributeError) as error:
            raise _wrong_format(path, "SQuAD", error) from error


def _squad_paragraphs(path: Path, argument: str = "file") -> list[dict[str, Any]]:
    content = _parse(path, _read(path, argument), argument)
    try:
        paragraphs = [paragraph for article in content["data"] for paragraph in article["paragraphs"]]
        if not all(isinstance(paragraph["context"], str) for paragraph in paragraphs):
            raise TypeError("a context is no text")
    except (KeyError, TypeError) as error:
        raise _wrong_format(path, "SQuAD", error, argument) from error
    return paragraphs


def _read_natural_questions(path: Path) -> Iterator[QAExample]:
    """Read the long answer of the first annotation as the context, and the short answers in it."""
    for line in _read(path).split("\n"):  # JSON strings may hold other line breaks as they are
        if not line.strip():
            continue
        entry = _parse(path, line)
        try:
            words = _words_of(entry)
            annotation = entry["annotations"][0]
            long = annotation["long_answer"]
            spans = [(short["start_token"], short["end_token"]) for short in annotation["short_answers"]]
            if long["start_token"] < 0 or not spans:
                continue
            context = _plain(words[long["start_token"] : long["end_token"]])
            answers = tuple(dict.fromkeys(_plain(words[start:end]) for start, end in spans))
            question = entry["question_text"].strip()
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise _wrong_format(path, "simplified Natural Questions", error) from error
        yield QAExample(context, f"{question[:1].upper()}{question[1:].rstrip('?')}?", answers)


def _words_of(entry: dict[str, Any]) -> list[str]:
    """Return a document's words, HTML tags among them; spans count in these."""
    if "document_text" not in entry and "document_tokens" in entry:  # the original form
        return [
            f"<{token['token']}>" if token["html_token"] else _text(token["token"])
            for token in entry["document_tokens"]
        ]
    return cast(list[str], entry["document_text"].split(" "))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _plain(words: list[str]) -> str:
    """Join words, those left out that are HTML tags."""
    return " ".join(word for word in words if not (word.startswith("<") and word.endswith(">")))


def _read(path: Path, argument: str = "file") -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if content.startswith(_GZIP) else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8, or a damaged gzip file"
        raise InvalidInputError(argument, str(path), f"a file that can be read ({reason})") from error


def _parse(path: Path, text: str, argument: str = "file") -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInputError(argument, str(path), f"JSON ({error})") from error


def _wrong_format(path: Path, name: str, error: Exception, argument: str = "file") -> InvalidInputError:
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return InvalidInputError(argument, str(path), f"a file in the format of {name} ({reason})")
