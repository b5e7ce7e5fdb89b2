"""The memory that one process carries from step to step: θ and Θ as hidden states, and whose token is whose.

Serving keeps keys and values; training changes the weights that make them, so it keeps what they are made of. The
update is the one of `mplus_agents.memory` under the rule `paper`: per layer K random tokens of θ leave, K new ones are
appended, and Θ gives up its oldest by birth. (The published training code increments ages twice on one path, and evicts
by counts that make Θ a queue by the time of dropping.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mplus_agents.errors import CheckpointError, ConfigError
from mplus_agents.memory.draws import draw_dropped

MakeKeys = Callable[[int, torch.Tensor], torch.Tensor]
NO_OWNER = -1
_REFRESH_ROWS = 16_384
_LONG_TERM = ("long_hidden", "long_keys", "long_births", "long_owners")


@dataclass(frozen=True, slots=True)
class PoolShape:
    """Sizes of a pool.

    Attributes:
        num_layers: L.
        hidden_size: d.
        num_new: K, tokens of one injection.
        max_short_term: N, tokens of θ.
        retrieval_dim: p; 0 without a retriever.
        max_long_term: M, tokens of Θ; 0: what leaves θ is gone (stages 1 and 2).
    """

    num_layers: int
    hidden_size: int
    num_new: int
    max_short_term: int
    retrieval_dim: int = 0
    max_long_term: int = 0

    def __post_init__(self) -> None:
        if self.max_short_term < self.num_new:
            raise ConfigError(f"max_short_term is {self.max_short_term}; allowed: at least {self.num_new}")
        if self.max_long_term and not self.retrieval_dim:
            raise ConfigError("a long-term memory needs a retriever: retrieval_dim is 0")


@dataclass(frozen=True, slots=True)
class PoolChange:
    """What one injection did.

    Attributes:
        dropped: [L, k] births of the tokens that left θ.
        evicted: [L, e] births of the tokens that are gone.
    """

    dropped: torch.Tensor
    evicted: torch.Tensor


class MemoryPool:
    """θ on the device, Θ where it has room; all tensors without gradient.

    θ's tensors are replaced, never changed in place, as a backward pass may still need them. Every token carries the
    number of the document it came from, through every drop, so that its tokens are found wherever they are.

    Args:
        shape: Sizes.
        seed: Seed of the draws of what is dropped.
        rank: Number of this process; each has its own pool and draws.
        device: Where θ, and the keys and bookkeeping of Θ, are.
        dtype: Of hidden states and keys.
        long_term_device: Where the hidden states of Θ are; `device` if None.
    """

    def __init__(
        self,
        shape: PoolShape,
        seed: int = 0,
        rank: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        long_term_device: torch.device | str | None = None,
    ) -> None:
        self.shape = shape
        self.device = torch.device(device)
        self.num_injections = 0
        self.num_documents = 0
        digest = hashlib.blake2b(f"{seed}/{rank}".encode(), digest_size=8).digest()
        self._seed = int.from_bytes(digest, "little")
        self._dtype = dtype
        num_layers = shape.num_layers
        self.theta = [torch.empty(0, shape.hidden_size, device=self.device, dtype=dtype) for _ in range(num_layers)]
        self.theta_births = torch.empty(num_layers, 0, device=self.device, dtype=torch.int64)
        self.theta_owners = self.theta_births
        self._size = 0
        self._long_device = torch.device(long_term_device or device)
        self._long_hidden = torch.empty(num_layers, 0, shape.hidden_size, device=self._long_device, dtype=dtype)
        self._long_keys = torch.empty(num_layers, 0, shape.retrieval_dim, device=self.device, dtype=dtype)
        self._long_births = self.theta_births
        self._long_owners = self.theta_births

    @property
    def theta_size(self) -> int:
        """Tokens in θ, per layer."""
        return self.theta_births.shape[1]

    @property
    def long_term_size(self) -> int:
        """Tokens in Θ, per layer."""
        return self._size

    @property
    def tail(self) -> list[torch.Tensor] | None:
        """Per layer [1, K, d], the newest tokens of θ, for the next write; None if there are none."""
        if not self.theta_size:
            return None
        return [hidden[None, -self.shape.num_new :] for hidden in self.theta]

    @property
    def long_keys(self) -> torch.Tensor:
        """[L, m, p], retrieval keys of Θ."""
        return self._long_keys[:, : self._size]

    @property
    def long_births(self) -> torch.Tensor:
        """[L, m] int64."""
        return self._long_births[:, : self._size]

    @property
    def long_owners(self) -> torch.Tensor:
        """[L, m] int64, the documents that Θ's tokens came from."""
        return self._long_owners[:, : self._size]

    def long_hidden(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Copy rows of Θ to the device, [r, d].

        Args:
            layer: The layer.
            rows: [r] int64.
        """
        return self._long_hidden[layer, rows.to(self._long_device)].to(self.device)

    def new_owner(self) -> int:
        """Return the number of the next document."""
        self.num_documents += 1
        return self.num_documents - 1

    @torch.no_grad()
    def append(
        self,
        new: Sequence[torch.Tensor],
        make_keys: MakeKeys | None = None,
        owner: int = NO_OWNER,
        dropped: torch.Tensor | None = None,
    ) -> PoolChange:
        """Take in the tokens of one injection (paper 3.1, 3.2.1).

        Args:
            new: Per layer [K, d].
            make_keys: Makes the retrieval keys [m, p] of a layer's hidden states [m, d]. Keys of Θ are made when a
                token is dropped, with the weights as they are then. Not needed without Θ.
            owner: The document they came from.
            dropped: [L, k] int64, positions in θ that leave, in place of the random draw.

        Returns:
            What left.
        """
        shape = self.shape
        num_dropped = max(0, self.theta_size + shape.num_new - shape.max_short_term)
        if dropped is None:
            dropped = torch.from_numpy(
                draw_dropped(
                    self._seed,
                    self.num_injections,
                    num_layers=shape.num_layers,
                    theta_size=self.theta_size,
                    num_dropped=num_dropped,
                )
            )
        assert dropped.shape == (shape.num_layers, num_dropped)
        # On the CPU, where finding out how many there are does not wait for the device.
        is_kept = torch.ones(self.theta_births.shape, dtype=torch.bool).scatter_(1, dropped.cpu(), False)
        kept = is_kept.nonzero()[:, 1].view(shape.num_layers, -1).to(self.device)
        dropped = dropped.to(self.device)
        births, owners = (values.gather(1, dropped) for values in (self.theta_births, self.theta_owners))
        evicted = births
        if shape.max_long_term and num_dropped:
            assert make_keys is not None, "Θ needs retrieval keys"
            hidden = torch.stack([rows[places] for rows, places in zip(self.theta, dropped, strict=True)])
            keys = torch.stack([make_keys(layer, rows) for layer, rows in enumerate(hidden)])
            evicted = self._store(hidden, keys, births, owners)
        elif shape.max_long_term:
            evicted = births[:, :0]
        self.theta = [
            torch.cat([rows[places], added.detach().to(self.device, self._dtype)])
            for rows, places, added in zip(self.theta, kept, new, strict=True)
        ]
        first = self.num_injections * shape.num_new
        new_births = torch.arange(first, first + shape.num_new, device=self.device).expand(shape.num_layers, -1)
        self.theta_births = torch.cat([self.theta_births.gather(1, kept), new_births], dim=1)
        new_owners = torch.full_like(new_births, owner)
        self.theta_owners = torch.cat([self.theta_owners.gather(1, kept), new_owners], dim=1)
        self.num_injections += 1
        return PoolChange(births, evicted)

    @torch.no_grad()
    def refresh_keys(self, make_keys: MakeKeys) -> None:
        """Make the keys of Θ anew; the published code leaves them as the retriever made them long ago.

        Args:
            make_keys: As for `append`.
        """
        for layer in range(self.shape.num_layers):
            for start in range(0, self._size, _REFRESH_ROWS):
                rows = slice(start, min(start + _REFRESH_ROWS, self._size))
                hidden = self._long_hidden[layer, rows].to(self.device)
                self._long_keys[layer, rows] = make_keys(layer, hidden).to(self._dtype)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return everything as tensors. Those of Θ are the pool's own: write them out before the next step."""
        return {
            "counts": torch.tensor([self.num_injections, self.num_documents]),
            "theta": torch.stack(self.theta),
            "theta_births": self.theta_births,
            "theta_owners": self.theta_owners,
            **{name: getattr(self, f"_{name}")[:, : self._size] for name in _LONG_TERM},
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state, of the same stage or an earlier one.

        A θ that is larger than this pool's loses the surplus at the next injection, to Θ if there is one. Of a Θ that
        is larger than this pool's the newest tokens are taken over.

        Args:
            state: What `state_dict` returned.

        Raises:
            CheckpointError: It is of a memory of another shape.
        """
        shape = self.shape
        num_kept = min(state["long_births"].shape[1], shape.max_long_term)
        newest = state["long_births"].topk(num_kept, dim=1).indices.sort(dim=1).values
        kept = {name: _rows_of(state[name], newest) for name in _LONG_TERM}
        theta, long_hidden, long_keys = state["theta"], kept["long_hidden"], kept["long_keys"]
        size = long_hidden.shape[1]
        fits = (theta.shape[0], theta.shape[2]) == (shape.num_layers, shape.hidden_size)
        if not fits or (size and long_keys.shape[2] != shape.retrieval_dim):
            found = [list(tensor.shape) for tensor in (theta, long_hidden, long_keys)]
            raise CheckpointError(f"a carried memory of shapes {found} does not fit {shape}")
        self.num_injections, self.num_documents = state["counts"].tolist()
        self.theta = [rows.to(self.device, self._dtype, copy=True) for rows in theta]
        self.theta_births = state["theta_births"].to(self.device, copy=True)
        self.theta_owners = state["theta_owners"].to(self.device, copy=True)
        self._size = 0
        if size:
            self._grow(size)
            for name in _LONG_TERM:
                getattr(self, f"_{name}")[:, :size] = kept[name]
            self._size = size

    def _store(
        self, hidden: torch.Tensor, keys: torch.Tensor, births: torch.Tensor, owners: torch.Tensor
    ) -> torch.Tensor:
        """Put dropped tokens [L, k, ...] into Θ, over the oldest ones where it is full; return evicted births."""
        num_added, old_size = births.shape[1], self._size
        num_evicted = max(0, old_size + num_added - self.shape.max_long_term)
        self._size = old_size + num_added - num_evicted
        self._grow(self._size)
        candidates = torch.cat([self._long_births[:, :old_size], births], dim=1)
        gone_births, gone = candidates.topk(num_evicted, dim=1, largest=False)
        is_gone = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, gone, True)
        for layer in range(self.shape.num_layers):
            stays = (~is_gone[layer, old_size:]).nonzero()[:, 0]  # a token may be the oldest one as it is dropped
            freed = is_gone[layer, :old_size].nonzero()[:, 0]
            slots = torch.cat([freed, torch.arange(old_size, self._size, device=self.device)])
            self._long_births[layer, slots] = births[layer, stays]
            self._long_owners[layer, slots] = owners[layer, stays]
            self._long_keys[layer, slots] = keys[layer, stays].to(self._dtype)
            far = slots.to(self._long_device)
            self._long_hidden[layer, far] = hidden[layer, stays].to(self._long_device)
        return gone_births

    def _grow(self, size: int) -> None:
        """Make room for so many tokens in Θ, twice as much each time."""
        old = self._long_births.shape[1]
        if size <= old:
            return
        capacity = min(self.shape.max_long_term, max(size, 2 * old))
        for name in _LONG_TERM:
            buffer: torch.Tensor = getattr(self, f"_{name}")
            grown = buffer.new_empty((buffer.shape[0], capacity, *buffer.shape[2:]))
            grown[:, :old] = buffer
            setattr(self, f"_{name}", grown)


def _rows_of(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Pick rows by layer: of [L, m, ...] and [L, n] make [L, n, ...]."""
    return torch.stack([rows[chosen.to(rows.device)] for rows, chosen in zip(tensor, places, strict=True)])
