"""Settings for every test: one thread, so that results repeat bit for bit and forked processes are safe."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
