"""The progress bar of a long read."""

from __future__ import annotations

import sys
from typing import Any, Self

from tqdm.auto import tqdm

# Documents longer than this many characters get a progress bar by default.
_LONG_TEXT_CHARS = 20_000


class ProgressBar:
    """A bar over characters that shows tokens per second.

    Args:
        show: Show it; if None, for long texts when standard error is a terminal.
    """

    def __init__(self, show: bool | None) -> None:
        self._show = show
        self._bar: tqdm[Any] | None = None
        self._num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def expect(self, num_chars: int) -> None:
        """Announce a document.

        Args:
            num_chars: Its length.
        """
        is_shown = self._show if self._show is not None else num_chars >= _LONG_TEXT_CHARS and sys.stderr.isatty()
        if not is_shown:
            return
        if self._bar is None:
            self._bar = tqdm(total=0, unit="char", unit_scale=True, desc="reading")
        self._bar.total = (self._bar.total or 0) + num_chars
        self._bar.refresh()

    def advance(self, num_chars: int, num_tokens: int) -> None:
        """Report progress.

        Args:
            num_chars: Characters done.
            num_tokens: Tokens injected for them.
        """
        if self._bar is None:
            return
        self._num_tokens += num_tokens
        elapsed = self._bar.format_dict["elapsed"] or 1e-9
        self._bar.set_postfix_str(f"{self._num_tokens / elapsed:,.0f} tokens/s", refresh=False)
        self._bar.update(num_chars)
