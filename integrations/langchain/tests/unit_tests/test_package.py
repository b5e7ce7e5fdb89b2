from __future__ import annotations

import subprocess
import sys
from importlib.resources import files

import langchain_mplus
from langchain_mplus import _agents
from mplus_agents.engine import mplus


def _python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_public_names() -> None:
    assert set(langchain_mplus.__all__) == {"ChatMPlus", "MPlusMemory", "MPLUS_PROMPT"}
    assert all(hasattr(langchain_mplus, name) for name in langchain_mplus.__all__)
    assert (files("langchain_mplus") / "py.typed").is_file()


def test_import_and_construction_load_no_torch() -> None:
    code = "import langchain_mplus as l, sys; l.ChatMPlus(agent_id='a'); l.MPlusMemory(agent_id='a')"
    assert _python(f"{code}; print('torch' in sys.modules)") == "False"


def test_missing_langchain_names_the_extra() -> None:
    code = (
        "import sys; sys.modules.update(langchain_core=None, langchain_classic=None)\n"
        "try: import langchain_mplus\n"
        "except ImportError as error: print(error)"
    )
    assert 'pip install "mplus-agents[langchain]"' in _python(code)


def test_missing_langchain_classic_names_the_extra() -> None:
    code = (
        "import sys; sys.modules.update(langchain_classic=None)\n"
        "try: import langchain_mplus\n"
        "except ImportError as error: print(error)"
    )
    assert 'pip install "mplus-agents[langchain]"' in _python(code)


def test_defaults_are_the_engines() -> None:
    ours = (_agents.DEFAULT_MODEL, _agents.DEFAULT_STORE, _agents.DEFAULT_NAMESPACE)
    assert ours == (mplus.DEFAULT_MODEL, mplus.DEFAULT_STORE, mplus.DEFAULT_NAMESPACE)
