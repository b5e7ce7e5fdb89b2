from __future__ import annotations

import pytest

from mplus_agents.cli.output import describe_receipt, format_bytes, printable
from mplus_agents.engine import Receipt


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (1_234_567, "1.2 MB"), (22e9, "22.0 GB"), (4e15, "4,000.0 TB")],
)
def test_bytes_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(int(num_bytes)) == text


def test_a_model_cannot_control_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07c\x9b\ud800 é\n\tΘ") == "a�[2Jb�c�� é\n\tΘ"


def test_receipts_in_words() -> None:
    receipt = Receipt(1, (3,), 120, 16, 0, 0, 41_368, num_waiting_tokens=7)
    assert describe_receipt(receipt) == "120 tokens in 1 injection, 41.4 kB stored; 7 tokens wait in the window"
    nothing = Receipt(0, (), 0, 0, 0, 0, 0, 0, note="nothing was waiting")
    assert describe_receipt(nothing) == "nothing was waiting"
