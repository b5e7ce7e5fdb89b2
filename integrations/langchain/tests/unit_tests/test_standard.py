"""LangChain's own tests of a chat model that is not called."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_mplus import ChatMPlus


class TestChatMPlus(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMPlus

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "mplus-tiny"}
