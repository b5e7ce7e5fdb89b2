"""The network: M+ on an unmodified transformers decoder.

Shapes in docstrings: b batch, n text tokens, m memory tokens, q query rows, L layers, K tokens per injection, d hidden
size, h_kv key/value heads, d_h head width, p retrieval width.
"""

from __future__ import annotations

from mplus_agents.model.decoding import GenerationOptions
from mplus_agents.model.mplus import MPlusModel
from mplus_agents.model.parts import ReadOutput

__all__ = ["GenerationOptions", "MPlusModel", "ReadOutput"]
