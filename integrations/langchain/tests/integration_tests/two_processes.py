"""What each of the two processes of `test_two_processes.py` does: `python two_processes.py tell|go-on FOLDER CHARS`.

The first tells an agent facts through a chain and lets it read a book. The second opens the agent on the same database.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import sys
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from integrations.langchain.tests.chains import Log, conversation, turn_and_check
from langchain_mplus import ChatMPlus, MPlusMemory
from mplus_agents import Agent, Document, MPlus
from mplus_agents.model import MPlusModel

PROBE = "Where does Maya live, and what is her dog called?"
_FACTS = [
    "My name is Maya, and I live in Oslo, in the yellow house beside the harbour.",
    "I have a dog called Ferry, who is brown, fears the snow, and sleeps under the kitchen table.",
    "I am allergic to walnuts, so never put any into the cake that you help me with on Sundays.",
    "My sister Ines plays the cello and comes to see us on the first weekend of every month.",
    "The key of the cellar hangs behind the blue clock; the pump down there needs oil in autumn.",
]
_BOOK = Path(__file__).parents[4].parent / "shared" / "data" / "jack-sheppard.txt"


def book(num_chars: int) -> str:
    """The text that `MPLUS_TEST_BOOK` names, a novel if it is at hand, or the standard library's help texts."""
    path = Path(os.environ.get("MPLUS_TEST_BOOK", _BOOK))
    if path.is_file():
        return path.read_text(encoding="utf-8")[:num_chars]
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))[:num_chars]


def open_engine(folder: Path) -> MPlus:
    return MPlus.from_pretrained("mplus-tiny", store=f"sqlite:///{folder / 'mplus.db'}", device="cpu")


def talk(agent: Agent, texts: list[str]) -> list[str]:
    """Say these things, one turn each, to a chain with the default prompt; every turn is checked."""
    chain = conversation(ChatMPlus(agent=agent), MPlusMemory(agent=agent))
    return [turn_and_check(chain, agent, text) for text in texts]


def tell(folder: Path, num_chars: int) -> dict[str, Any]:
    with open_engine(folder) as mplus:
        alice = mplus.agent("alice")
        talk(alice, _FACTS)
        receipt = alice.remember(Document(book(num_chars), "book"), progress=False)
        talk(alice, ["That was a long book. What do you remember of it?", "And where do I live, by the way?"])
        save_file({"logits": alice.logits(PROBE)}, folder / "logits.safetensors")
        log, stats = Log.of(alice), alice.stats()
        return {
            "num_book_injections": receipt.num_injections,
            "num_injections": stats.num_injections,
            "long_term_tokens": stats.long_term_tokens,
            "history": log.history,
            "num_events": len(log.events),
        }


def go_on(folder: Path, num_chars: int) -> dict[str, Any]:
    writes = _count_writes()
    with open_engine(folder) as mplus:
        alice = mplus.agent("alice", create=False)
        logits = alice.logits(PROBE)
        history = MPlusMemory(agent=alice).load_memory_variables({})["history"]
        log, stats = Log.of(alice), alice.stats()
        zeroed, fresh = _without_long_term(folder), mplus.agent("fresh").logits(PROBE)
        num_writes_before = len(writes)
        talk(alice, ["I am back. Do you still know my dog?", f"{_FACTS[0]} {_FACTS[1]}", f"{_FACTS[2]} {_FACTS[3]}"])
        num_injections_after, num_writes_after = alice.stats().num_injections, len(writes)
    told = load_file(folder / "logits.safetensors")["logits"]
    return {
        "is_equal_to_first_process": torch.equal(logits, told),
        "num_writes_before": num_writes_before,
        "num_writes_after": num_writes_after,
        "differs_from_fresh": _difference(logits, fresh),
        "differs_without_long_term": _difference(logits, zeroed),
        "history": history,
        "num_events": len(log.events),
        "num_injections": stats.num_injections,
        "num_injections_after": num_injections_after,
        "long_term_tokens": stats.long_term_tokens,
    }


def _without_long_term(folder: Path) -> torch.Tensor:
    """The probe's logits with the same θ and the same rows of Θ retrieved, their values all zero."""
    with open_engine(folder) as mplus:
        alice = mplus.agent("alice", create=False)
        alice.logits(PROBE)
        assert alice._state._resident is not None
        for block in alice._state._resident.memory.long_term._blocks.values():
            block.values.zero_()
        return alice.logits(PROBE)


def _count_writes() -> list[int]:
    """Count the model's write passes from now on."""
    writes: list[int] = []
    write = MPlusModel.write

    @wraps(write)
    def counted(self: MPlusModel, *args: Any, **kwargs: Any) -> Any:
        writes.append(1)
        return write(self, *args, **kwargs)

    MPlusModel.write = counted  # type: ignore[method-assign]
    return writes


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums depend on how they are split
    report = {"tell": tell, "go-on": go_on}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps({**report, "pid": os.getpid()}))
