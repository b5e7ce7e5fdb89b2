"""The real prose that the package brings along, to train on and to be evaluated between."""

from __future__ import annotations

import gzip
from importlib.resources import files


def packaged_prose(name: str) -> str:
    """Return one of the public-domain texts in the package.

    Args:
        name: `kjv` or `jargon` (training), or `novel` (evaluation).
    """
    return gzip.decompress((files("mplus_agents") / "assets" / "prose" / f"{name}.txt.gz").read_bytes()).decode()
