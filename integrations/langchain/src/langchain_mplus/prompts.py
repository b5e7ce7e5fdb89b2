"""A prompt for `ConversationChain` that leaves the talking to the memory."""

from __future__ import annotations

from langchain_core.prompts import ChatPromptTemplate

# The chain's own prompt is one long turn. Here the new one stands alone, so that it alone queries the long-term memory.
MPLUS_PROMPT: ChatPromptTemplate = ChatPromptTemplate.from_messages([("system", "{history}"), ("human", "{input}")])
