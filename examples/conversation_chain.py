"""The shortest LangChain conversation with an M+ memory. Run it twice: the second run goes on where the first ended.

    python examples/conversation_chain.py [STORE]

LangChain warns that ConversationChain is its older way; langchain_mplus works with the newer ones too.
`mplus-tiny`, the model in the package, speaks a simple English: its model card says which facts and questions it knows.
"""

from __future__ import annotations

import sys

from langchain_classic.chains import ConversationChain

from langchain_mplus import ChatMPlus, MPlusMemory
from mplus_agents import MPlus

STORE = sys.argv[1] if len(sys.argv) > 1 else "sqlite:///mplus.db"

with MPlus.from_pretrained("mplus-tiny", store=STORE) as mplus:
    agent = mplus.agent("alice")  # opened if it exists, created if not
    chain = ConversationChain(llm=ChatMPlus(agent=agent), memory=MPlusMemory(agent=agent))

    print("AI:", ascii(chain.predict(input="Maya lives in Oslo.")))
    print("AI:", ascii(chain.predict(input="Where does Maya live?")))

    stats = agent.stats()
    print(f"{stats.num_events} entries in the log: {stats.num_injections} injections in memory,", end=" ")
    print(f"{stats.num_waiting_messages} waiting word for word in the window")
