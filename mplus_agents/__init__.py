"""Lifelong latent memory for LLM agents: M+ (arXiv 2502.00592) as a backend."""

from __future__ import annotations
