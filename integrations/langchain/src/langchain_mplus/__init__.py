"""M+ as LangChain's chat model and memory: the chat model reads an agent's memory, the memory object writes it.

Importing this loads neither PyTorch nor a model; both come with the first call.
"""

from __future__ import annotations

try:
    from langchain_mplus.chat_models import ChatMPlus
    from langchain_mplus.memory import MPlusMemory
    from langchain_mplus.prompts import MPLUS_PROMPT
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("langchain_classic", "langchain_core"):
        raise
    raise ImportError(
        f'langchain_mplus needs LangChain ({error}); install it with: pip install "mplus-agents[langchain]"'
    ) from error

__all__ = ["MPLUS_PROMPT", "ChatMPlus", "MPlusMemory"]
