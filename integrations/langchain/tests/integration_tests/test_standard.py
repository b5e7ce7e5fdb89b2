"""LangChain's own tests of a chat model that answers."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests

from langchain_mplus import ChatMPlus

# `stream_events(version="v3")`, which the suite calls, says at every call that it is in beta.
pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")


class TestChatMPlus(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _use_new_database(self, url: str) -> None:
        self.url = url

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatMPlus

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"agent_id": "alice", "model": "mplus-tiny", "store": self.url, "device": "cpu"}
