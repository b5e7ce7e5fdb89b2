"""What `make demo` shows: an agent reads a book and talks, the process ends, and another process has its memory.

    python examples/demo.py [--store sqlite:///demo.db] [--quick]

Process 1 holds a LangChain conversation and reads the Python language reference, which every Python brings along.
Process 2 opens the agent from the database, asks for the facts, with the long-term memory Θ and without it, and proves
that the memory is the same, bit for bit. The model is mplus-tiny, which speaks a simple English.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import torch

    from mplus_agents import Agent, MPlus

AGENT = "demo"
PROBE = "Maya lives in Oslo. A class definition defines a class object, and a for statement iterates over"
FACTS = (
    "I live in Oslo.",
    "My boat is called Zumeri.",
    "The sister of Theo is called Lavika.",
    "Theo works as a baker.",
    "I will travel to Bogota.",
)
QUESTIONS = {  # with the answer that is right
    "Where do I live?": "Your home is Oslo.",
    "What is my boat?": "Your boat is Zumeri.",
    "Who is the sister of Theo?": "The sister of Theo is Lavika.",
    "What does Theo work as?": "The job of Theo is baker.",
    "Where will I travel?": "Your next journey is Bogota.",
}
QUICK_CHARS = 40_000
MAX_CHARS = 60  # of an answer in the table

console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="database to use; one in a temporary folder if not given")
    parser.add_argument("--quick", action="store_true", help=f"read only {QUICK_CHARS:,} characters")
    parser.add_argument("--process", type=int, choices=(1, 2), help=argparse.SUPPRESS)
    parser.add_argument("--saved", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process == 1:
        return talk_and_read(options.store, Path(options.saved), QUICK_CHARS if options.quick else None)
    if options.process == 2:
        return remember_and_prove(options.store, Path(options.saved))
    started = time.monotonic()
    console.print("[bold]mplus-agents: a memory that outlives the process[/]")
    with tempfile.TemporaryDirectory(prefix="mplus-demo-") as folder:
        store = options.store or f"sqlite:///{Path(folder) / 'demo.db'}"
        command = [sys.executable, __file__, "--store", store, "--saved", str(Path(folder) / "logits.npy")]
        command += ["--quick"] if options.quick else []
        for process in ("1", "2"):
            status = subprocess.run([*command, "--process", process], check=False).returncode
            if status:
                console.print(f"[bold red]process {process} failed (exit code {status})[/]")
                return 1
    console.print(f"\n[bold green]All proofs hold.[/] {time.monotonic() - started:.0f} seconds altogether.")
    return 0


def talk_and_read(store: str, saved: Path, max_chars: int | None) -> int:
    """Process 1: tell the agent some facts, let it read, keep the logits of a probe, and end."""
    console.rule(f"[bold]Process 1[/] (pid {os.getpid()}): talk and read", align="left")
    with load(store) as mplus:
        agent = mplus.agent(AGENT)
        converse(agent)
        book = language_reference()[:max_chars]
        console.print(
            f"\nIt reads the Python language reference (pydoc_data.topics), {len(book.encode()):,} bytes:",
            soft_wrap=True,
        )
        started = time.monotonic()
        receipt = agent.remember(book)
        seconds = time.monotonic() - started
        stats = agent.stats()
        rows = {
            "text read": f"{receipt.num_text_tokens:,} tokens in {receipt.num_injections:,} injections",
            "speed": f"{receipt.num_text_tokens / seconds:,.0f} tokens per second, {seconds:.1f} s",
            "memory tokens written": f"{receipt.num_memory_tokens:,} in each of {len(stats.long_term_tokens)} layers",
            "short-term memory θ": f"{stats.short_term_tokens:,} of {stats.short_term_capacity:,} tokens per layer",
            "long-term memory Θ": f"{max(stats.long_term_tokens):,} of {stats.long_term_capacity:,} tokens per layer",
            "evicted from Θ for good": f"{receipt.num_evicted:,}",
            "waiting in the window": f"{stats.num_waiting_tokens} tokens, word for word",
            "in the database": f"{sum(stats.stored_bytes.values()) / 1e6:,.1f} MB",
            "note": receipt.note,
        }
        print_rows(rows)
        logits = probe(agent)
        np.save(saved, logits.numpy())
        console.print(f"Logits of a probe text with this memory: {digest(logits)}. The process ends.")
    return 0


def converse(agent: Agent) -> None:
    """Tell the agent facts through LangChain."""
    from langchain_classic.chains import ConversationChain

    from langchain_mplus import ChatMPlus, MPlusMemory

    console.print("A LangChain ConversationChain tells the agent some facts:")
    with warnings.catch_warnings():
        # LangChain calls its own chain outdated; it is shown because it is what many programs have.
        warnings.filterwarnings("ignore", message=".*ConversationChain.*")
        chain = ConversationChain(llm=ChatMPlus(agent=agent), memory=MPlusMemory(agent=agent))
        for fact in FACTS:
            say("you", fact)
            say("agent", chain.predict(input=fact))


def remember_and_prove(store: str, saved: Path) -> int:
    """Process 2: open the agent, ask it, and compare its memory with the one that process 1 had."""
    console.print()
    console.rule(f"[bold]Process 2[/] (pid {os.getpid()}): remember", align="left")
    with load(store) as mplus:
        started = time.monotonic()
        agent = mplus.agent(AGENT, create=False)
        stats = agent.stats()
        seconds = time.monotonic() - started
        console.print(
            f"Memory of {stats.num_injections:,} injections opened in [bold]{seconds:.2f} s[/] from the database, "
            "without a write pass.",
            soft_wrap=True,
        )
        question_and_compare(agent)
        return prove(mplus, agent, saved)


def question_and_compare(agent: Agent) -> None:
    """Ask for what was told before the book was read, with the long-term memory Θ and without it."""
    table = Table("question", "answer from memory", "the same with Θ off", box=None, pad_edge=False, header_style="dim")
    num_right = [0, 0]
    for question, expected in QUESTIONS.items():
        answers = [agent.ask(question, max_new_tokens=24, long_term=way).strip() for way in ("retrieved", "off")]
        num_right = [count + (answer == expected) for count, answer in zip(num_right, answers, strict=True)]
        table.add_row(question, *(mark(answer, answer == expected) for answer in answers))
    console.print(table)
    console.print(f"{num_right[0]} of {len(QUESTIONS)} answers from memory are right, {num_right[1]} with Θ off.")


def mark(answer: str, is_right: bool) -> Text:
    """Return an answer, green if it is right and red if not."""
    return Text(shorten(answer, MAX_CHARS), style="green" if is_right else "red")


def prove(mplus: MPlus, agent: Agent, saved: Path) -> int:
    """Compare the logits of the probe; 0 if every comparison is as it should be."""
    import torch

    before, now = torch.from_numpy(np.load(saved)), probe(agent)
    fresh, without_long_term = logits_of_fresh_agent(mplus), agent.logits(PROBE, long_term="off").float().cpu()
    checks = [
        ("as in process 1, bit for bit", now, before, torch.equal(now, before)),
        ("unlike a fresh agent's", now, fresh, differ(now, fresh)),
        ("unlike the same memory without Θ", now, without_long_term, differ(now, without_long_term)),
    ]
    console.print("\nLogits of the probe text with the restored memory:", digest(now))
    table = Table("they are", "compared with", "max |difference|", "", box=None, pad_edge=False, header_style="dim")
    for claim, mine, other, holds in checks:
        verdict = "[green]holds[/]" if holds else "[bold red]FAILS[/]"
        table.add_row(claim, digest(other), f"{float((mine - other).abs().max()):.3g}", verdict)
    console.print(table)
    return 0 if all(holds for *_, holds in checks) else 1


def differ(mine: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether logits differ by far more than rounding does."""
    return float((mine - other).abs().max()) > 0.01


def logits_of_fresh_agent(mplus: MPlus) -> torch.Tensor:
    """Probe an agent that remembers nothing, in a database that is gone afterwards."""
    from mplus_agents import MPlus, Store

    with Store("sqlite://") as store:
        return probe(MPlus(mplus.model, mplus.codec, store, mplus.name).agent(AGENT))


def load(store: str) -> MPlus:
    """Load the model and open the store."""
    started = time.monotonic()
    import torch

    from mplus_agents import MPlus

    torch.set_num_threads(1)  # more gain little on so small a model, and lose much on a busy machine
    mplus = MPlus.from_pretrained("mplus-tiny", store=store)
    console.print(
        f"mplus-tiny loaded on {mplus.model.device} in {time.monotonic() - started:.1f} s, PyTorch included; "
        f"memory in {mplus.store.url}",
        soft_wrap=True,
    )
    return mplus


def language_reference() -> str:
    """Return the texts of Python's own help topics, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def probe(agent: Agent) -> torch.Tensor:
    """Return the logits of the probe text with an agent's memory, [n, vocab], on the CPU."""
    return agent.logits(PROBE).float().cpu()


def digest(logits: torch.Tensor) -> str:
    """Return a short hash of every bit of the logits."""
    return hashlib.blake2b(logits.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def say(who: str, text: str, max_chars: int = 68) -> None:
    """Print a turn in one line."""
    console.print(Text(f"  {who:>5}: ", style="dim").append(shorten(text, max_chars), style="not dim"), soft_wrap=True)


def shorten(text: str, max_chars: int) -> str:
    """Return one printable line of a text."""
    line = "".join(character if character.isprintable() else "·" for character in text)
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def print_rows(rows: dict[str, str]) -> None:
    """Print names and values; empty values are left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in rows.items():
        if value:
            table.add_row(f"[dim]{name}[/]", value)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
