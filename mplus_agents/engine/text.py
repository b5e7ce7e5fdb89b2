"""Text to tokens and back: plain encoding, cutting documents into pieces, and streaming whole characters."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mplus_agents.errors import CheckpointError, InvalidInputError

_REPLACEMENT = "\ufffd"
# A piece is searched in a stretch of text of at first this many characters per token, and at most eight times that.
_CHARS_PER_TOKEN = 8
_MAX_WIDENING = 8


class TextCodec:
    """A tokenizer as the engine uses it: no special tokens are added, and none are read out of a text.

    Args:
        tokenizer: A fast transformers tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Reading special tokens or not is a setting of the tokenizer itself, which every call may change.
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> TextCodec:
        """Load the tokenizer that lies beside a checkpoint.

        Args:
            folder: A folder.

        Raises:
            CheckpointError: There is none, or it is not a fast one.
        """
        if not (Path(folder) / "tokenizer.json").is_file():
            raise CheckpointError(f"no tokenizer in {str(Path(folder))!r}: tokenizer.json is missing")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"no tokenizer in {str(Path(folder))!r} ({reason})") from error
        if not tokenizer.is_fast:
            raise CheckpointError(
                f"the tokenizer in {str(Path(folder))!r} is not a fast one (tokenizer.json is missing)"
            )
        return cls(tokenizer)

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's chat template, if it has one."""
        return cast(str | None, getattr(self.tokenizer, "chat_template", None))

    def fingerprint(self) -> str:
        """Return a digest of everything that decides which tokens a text becomes."""
        content = self.tokenizer.backend_tokenizer.to_str() + (self.chat_template or "")
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens; what looks like a special token is plain text.

        Args:
            text: Any text.
        """
        return cast(list[int], self._tokenize(text)["input_ids"])

    def encode_template(self, text: str) -> list[int]:
        """Return the tokens of a chat template's own text, special tokens read as such.

        Args:
            text: The text.
        """
        with self._lock:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
        return cast(list[int], encoded["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out.

        Args:
            ids: Tokens.
        """
        with self._lock:
            return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def next_piece(self, text: str, start: int, max_tokens: int) -> tuple[str, list[int]]:
        """Cut the next piece off a document: at most `max_tokens` tokens, ending after white space if it can.

        The cut depends on the text from `start` on alone, so that reading can go on from any earlier cut.

        Args:
            text: The document.
            start: Where the piece starts, in characters, before the end.
            max_tokens: Most tokens of the piece.

        Returns:
            The piece and its tokens.
        """
        width = max_tokens * _CHARS_PER_TOKEN
        while True:
            stretch = text[start : start + width]
            offsets = cast(list[tuple[int, int]], self._tokenize(stretch, offsets=True)["offset_mapping"])
            is_enough = len(offsets) > max_tokens or start + width >= len(text)
            if is_enough or width >= max_tokens * _CHARS_PER_TOKEN * _MAX_WIDENING:
                break
            width *= 2
        is_rest = len(offsets) <= max_tokens
        end = len(stretch) if is_rest else _break_before(stretch, max(1, offsets[max_tokens][0]))
        while True:  # a piece alone may fall into a token or two more than it did within the stretch
            ids = self.encode(stretch[:end])
            if len(ids) <= max_tokens or end == 1:
                return stretch[:end], ids
            end = max(1, end - (len(ids) - max_tokens))

    def _tokenize(self, text: str, offsets: bool = False) -> Any:
        with self._lock:
            return self.tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=offsets,
                verbose=False,
            )


def check_text(argument: str, text: object) -> str:
    """Check that a caller's text can be stored.

    Args:
        argument: The argument's name, for the message.
        text: What was given.

    Returns:
        The text.

    Raises:
        InvalidInputError: It is not a string, is empty or only white space, or holds lone surrogates.
    """
    if not isinstance(text, str):
        raise InvalidInputError(argument, text, "a string")
    if not text.strip():
        raise InvalidInputError(argument, text, "a text with at least one character that is not white space")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = text[max(0, error.start - 10) : error.end + 10]
        raise InvalidInputError(argument, where, "Unicode text (there is half a surrogate pair in it)") from error
    return text


def decode_utf8(argument: str, data: bytes) -> str:
    """Decode a caller's bytes.

    Args:
        argument: The argument's name, for the message.
        data: UTF-8.

    Raises:
        InvalidInputError: The bytes are not UTF-8; the message says where.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        bad = data[error.start : error.start + 8]
        raise InvalidInputError(argument, bad, f"UTF-8 (the bytes from offset {error.start} on are not)") from error


class StreamDecoder:
    """Turns tokens into text piece by piece, never half a character, and stops at stop strings.

    Args:
        codec: The tokenizer.
        stop: Strings at which the text ends; they are not part of it.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._codec = codec
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._sent = self._end = 0
        self.is_stopped = False

    @property
    def num_tokens(self) -> int:
        """Tokens taken in."""
        return len(self._ids)

    def push(self, token_id: int) -> str:
        """Take in one token.

        Args:
            token_id: The token.

        Returns:
            The text that is certain now and was not before; may be empty.
        """
        self._ids.append(token_id)
        # A trailing replacement character may be half a character that the next token completes.
        certain = self._codec.decode(self._ids).rstrip(_REPLACEMENT)
        held_back = 0 if self._cut_at_stop(certain) else _overlap(certain, self._stop)
        return self._send(certain, self._end - held_back)

    def finish(self) -> str:
        """Return the text held back so far; the answer ends here."""
        if self.is_stopped:
            return ""
        text = self._codec.decode(self._ids)
        self._cut_at_stop(text)
        return self._send(text, self._end)

    def _cut_at_stop(self, text: str) -> bool:
        """Tell whether a stop string is in the text; the answer ends before the first one."""
        found = [text.find(stop) for stop in self._stop if stop in text]
        self._end, self.is_stopped = min(found, default=len(text)), bool(found)
        return self.is_stopped

    def _send(self, text: str, end: int) -> str:
        start, self._sent = self._sent, max(self._sent, end)
        return text[start : self._sent]


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of `text` could begin a stop string."""
    longest = 0
    for string in stop:
        for size in range(min(len(string) - 1, len(text)), 0, -1):
            if text.endswith(string[:size]):
                longest = max(longest, size)
                break
    return longest


def _break_before(text: str, end: int) -> int:
    """Return a cut at or before `end`, after white space if there is some in the last quarter."""
    for position in range(end, max(end * 3 // 4, 0), -1):
        if text[position - 1].isspace():
            return position
    return end
