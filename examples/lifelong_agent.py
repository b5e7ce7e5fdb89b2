"""An assistant over three processes: each opens the same agent, adds to its memory, asks it, and checks the books.

    python examples/lifelong_agent.py

Every session is a process of its own and nothing but the database connects them. Checked is that the memory lives on,
grows, and holds everything exactly once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mplus_agents import Store

HANDBOOK = "Rule {n}: whoever leaves the workshop last switches off machine {n} and writes the time into book {n}. "
SESSIONS = (
    ("Maya lives in Oslo.", "The boat of Maya is called Zumeri.", "I live in Lisbon."),
    ("Maya works as a sailor.", "The brother of Maya is called Felix.", "I play the cello."),
    ("Maya lives in Tunis.", "Felix will travel to Quito.", "My dog is called Roku."),
)
QUESTIONS = ("Where does Maya live?", "What is the boat of Maya?", "Where do I live?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--session", type=int, choices=range(len(SESSIONS)), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.session is not None:
        live(options.store, options.session)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{Path(folder) / 'lifelong.db'}"
        for number in range(len(SESSIONS)):
            command = [sys.executable, __file__, "--store", store, "--session", str(number)]
            subprocess.run(command, check=True)
    print("\nthree processes, one memory: every turn is in it or in the window, none twice")


def live(store: str, number: int) -> None:
    """Spend one session with the agent."""
    from mplus_agents import Document, MPlus

    with MPlus.from_pretrained("mplus-tiny", store=store) as mplus:
        agent = mplus.agent("assistant")
        before, window_before = agent.stats(), agent.window
        print(
            f"\nsession {number + 1}: {before.num_injections} injections and {len(window_before)} waiting turns found"
        )

        # The handbook is given in every session, three rules longer each time; only what is new is read.
        rules = "".join(HANDBOOK.format(n=n) for n in range(1, 4 * number + 5))
        receipt = agent.remember(Document(rules, source_id="handbook"))
        print(f"  handbook: {receipt.num_text_tokens} tokens injected; {receipt.note or 'read from the start'}")
        for fact in SESSIONS[number]:
            print(f"  you: {fact}\n  AI:  {shorten(agent.chat(fact, max_new_tokens=16))}")
        for question in QUESTIONS:
            print(f"  ask: {question}\n  AI:  {shorten(agent.ask(question, max_new_tokens=24))}")

        after = agent.stats()
        print(f"  now {after.num_injections} injections, {after.short_term_tokens} tokens per layer in θ,", end=" ")
        print(f"{after.long_term_tokens[0]} in Θ, {after.num_waiting_messages} turns waiting")
        assert after.num_injections > before.num_injections, "the memory did not grow"
        assert after.num_events >= before.num_events + 2 * len(SESSIONS[number]), "the log did not grow"
        check_nothing_twice(mplus.store, agent.namespace, agent.name)


def check_nothing_twice(store: Store, namespace: str, name: str) -> None:
    """Assert that every logged text is either in one injection or in the window, never in both, never twice."""
    record = store.find_agent(namespace, name)
    assert record is not None
    injections = store.injection_infos(store.chain(record.head_commit_id).injection_ids.values())
    injected = [seq for info in injections.values() for seq in info.event_seqs]
    waiting = [event.seq for event in store.window(record.id)]
    logged = [event.seq for event in store.events(record.id) if event.kind != "flush"]
    assert sorted(injected + waiting) == logged, "a text is missing, or is there twice"


def shorten(answer: str, max_chars: int = 60) -> str:
    """Return one printable line of an answer."""
    line = "".join(character if character.isprintable() else "·" for character in answer)
    return line if len(line) <= max_chars else line[:max_chars] + "…"


if __name__ == "__main__":
    main()
