"""Keys and values of running requests, preallocated, one slot a request; and the two attention plans that use them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rl.data.packing import PromptStream
from nemo_rl.models.attention import TreeAttention, additive_mask, masked_attention


class KVCache:
    """One tensor [layers, 2, slots, A_kv, capacity, D], made at the first write, when the shapes are known."""

    def __init__(self, *, num_layers: int, num_slots: int, capacity: int) -> None:
        self._shape = (num_layers, num_slots, capacity)
        self._storage: Tensor | None = None

    def layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, A_kv, capacity, D] of a layer; `like` [*, A_kv, D] gives heads, dtype and device."""
        if self._storage is None:
            num_layers, num_slots, capacity = self._shape
            # zeros: what a mask hides must still be finite
            self._storage = like.new_zeros((num_layers, 2, num_slots, like.shape[1], capacity, like.shape[2]))
        return self._storage[layer, 0], self._storage[layer, 1]

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of slots to others, all at once: a slot may be in both lists."""
        if self._storage is not None:
            self._storage[:, :, list(targets), :, :length] = self._storage[:, :, list(sources), :, :length]


class PrefillAttention:
    """Attends along the prompts' prefix tree and leaves every prompt's keys and values in its slot."""

    def __init__(
        self, cache: KVCache, prompts: PromptStream, slots: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        """Keep prompt i of the stream in slot `slots[i]`."""
        self._cache = cache
        self._tree = TreeAttention(prompts.tree, device)
        self._source = torch.cat(prompts.where).to(device)
        lengths = torch.tensor([len(where) for where in prompts.where])
        self._slot = torch.repeat_interleave(torch.tensor(slots), lengths).to(device)
        self._position = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int) -> Tensor:
        """See `nemo_rl.models.attention.AttentionPlan`."""
        for cached, new in zip(self._cache.layer(layer, k), (k, v), strict=True):
            cached[self._slot, :, self._position] = new[self._source]
        return self._tree.attend(layer, q, k, v, scale=scale, window=window)


class DecodeAttention:
    """One new token for each of the first n slots; token i stands at position `positions[i]` of slot i."""

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        self._cache = cache
        self._positions = positions
        self._rows = torch.arange(len(positions), device=positions.device)
        self._longest = int(positions.max()) + 1
        self._distance = positions[:, None] - torch.arange(self._longest, device=positions.device)
        self._masks: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int) -> Tensor:
        """See `nemo_rl.models.attention.AttentionPlan`; heads that share keys are queries of one attention."""
        keys, values = self._cache.layer(layer, k)
        keys[self._rows, :, self._positions] = k
        values[self._rows, :, self._positions] = v
        n = len(self._rows)
        queries = q.unflatten(1, (k.shape[1], -1))
        output = masked_attention(
            queries, keys[:n, :, : self._longest], values[:n, :, : self._longest], self._mask(window, q.dtype), scale
        )
        return output.flatten(1, 2)

    def _mask(self, window: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [n, 1, 1, longest]."""
        if window not in self._masks:
            self._masks[window] = additive_mask(self._distance, window, dtype)[:, None, None]
        return self._masks[window]
