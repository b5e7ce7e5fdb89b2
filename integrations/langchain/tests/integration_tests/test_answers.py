"""What the trained model answers through a ConversationChain with its default prompt."""

from __future__ import annotations

from pathlib import Path

from integrations.langchain.tests.chains import conversation
from langchain_mplus import ChatMPlus, MPlusMemory
from mplus_agents import Document, MPlus
from mplus_agents.language.prose import packaged_prose

_TOLD = (
    "I live in Oslo.",
    "The sister of Theo is called Lavika.",
    "My boat is called Zumeri.",
    "Maya works as a sailor.",
    "I play the cello.",
    "The dog of Maya is called Bako.",
)
_ASKED = {
    "Where do I live?": "Your home is Oslo.",
    "Who is the sister of Theo?": "The sister of Theo is Lavika.",
    "What is my boat?": "Your boat is Zumeri.",
    "What does Maya work as?": "The job of Maya is sailor.",
    "Which instrument do I play?": "Your instrument is cello.",
    "What is the name of the dog of Maya?": "The dog of Maya is Bako.",
}


def test_facts_of_a_conversation_are_answered_after_a_long_text(tmp_path: Path) -> None:
    with MPlus.from_pretrained("mplus-tiny", store=f"sqlite:///{tmp_path / 'mplus.db'}", device="cpu") as mplus:
        alice = mplus.agent("alice")
        chain = conversation(ChatMPlus(agent=alice), MPlusMemory(agent=alice))
        replies = [chain.invoke({"input": told})["response"] for told in _TOLD]
        assert replies == ["I see."] * len(_TOLD)
        alice.remember(Document(packaged_prose("novel")[:40_000], "novel"))
        alice.flush()
        num_right = 0
        for question, answer in _ASKED.items():
            result = chain.invoke({"input": question})
            assert not any(told in result["history"] for told in _TOLD)  # nothing but the memory knows
            num_right += result["response"] == answer
        assert num_right >= len(_ASKED) - 1  # the model gets some answers wrong: docs/evaluation.md
