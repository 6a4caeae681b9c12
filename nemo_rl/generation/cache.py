"""Keys and values of running requests, preallocated, one slot a request; and the two attention plans that use them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl.data.packing import PromptStream
from nemo_rl.models.attention import TreeAttention, Weighting, additive_mask, as_products, masked_attention


class KVCache:
    """Keys and values [layers, slots, A_kv, capacity, D] each, made at the first write, when the shapes are known.

    Slots are added as they come into use, at least as many as there are: most batches never fill all.
    """

    def __init__(self, *, num_layers: int, num_slots: int, capacity: int) -> None:
        self.capacity = capacity
        self._num_layers = num_layers
        self._max_slots = num_slots
        self._num_slots = 0
        self._storage: list[Tensor] = []

    def reserve(self, num_slots: int) -> None:
        """Have at least this many slots."""
        if num_slots <= self._num_slots:
            return
        before, self._num_slots = self._num_slots, min(max(num_slots, 2 * self._num_slots), self._max_slots)
        for i, tensor in enumerate(self._storage):
            self._storage[i] = F.pad(tensor, (0, 0, 0, 0, 0, 0, 0, self._num_slots - before))

    def layer(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, A_kv, capacity, D] of a layer; k, v [*, A_kv, D] give sizes, dtype and device."""
        if not self._storage:
            sizes = (self._num_layers, self._num_slots)
            # zeros: what a mask hides must still be finite
            self._storage = [x.new_zeros((*sizes, x.shape[1], self.capacity, x.shape[2])) for x in (k, v)]
        keys, values = self._storage
        return keys[layer], values[layer]

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of slots to others, all at once: a slot may be in both lists."""
        self.reserve(max(targets) + 1)
        for tensor in self._storage:
            tensor[:, list(targets), :, :length] = tensor[:, list(sources), :, :length]


class PrefillAttention:
    """Attends along the prompts' prefix tree and leaves every prompt's keys and values in its slot."""

    def __init__(
        self, cache: KVCache, prompts: PromptStream, slots: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        """Keep prompt i of the stream in slot `slots[i]`."""
        cache.reserve(max(slots) + 1)
        self._cache = cache
        self._tree = TreeAttention(prompts.tree, device)
        self._source = torch.cat(prompts.where).to(device)
        lengths = torch.tensor([len(where) for where in prompts.where])
        self._slot = torch.repeat_interleave(torch.tensor(slots), lengths).to(device)
        self._position = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """See `nemo_rl.models.attention.AttentionPlan`."""
        for cached, new in zip(self._cache.layer(layer, k, v), (k, v), strict=True):
            cached[self._slot, :, self._position] = new[self._source]
        return self._tree.attend(layer, q, k, v, weighting)


class DecodeAttention:
    """One new token for each of the first n slots; token i stands at position `positions[i]` of slot i."""

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        self._cache = cache
        self._positions = positions
        self._rows = torch.arange(len(positions), device=positions.device)
        self._longest = int(positions.max()) + 1
        self._masks: dict[tuple[int, int], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """See `nemo_rl.models.attention.AttentionPlan`; heads that share keys are queries of one attention."""
        keys, values = self._cache.layer(layer, k, v)
        keys[self._rows, :, self._positions] = k
        values[self._rows, :, self._positions] = v
        n = len(self._rows)
        # products copy a slice of keys first, which costs more than what the mask hides while that is the smaller part
        whole = as_products(q, self._cache.capacity) and 2 * self._longest > self._cache.capacity
        seen = self._cache.capacity if whole else self._longest
        queries = q.unflatten(1, (k.shape[1], -1))
        mask = self._mask(weighting.window, seen, q.dtype)
        return masked_attention(queries, keys[:n, :, :seen], values[:n, :, :seen], mask, weighting).flatten(1, 2)

    def _mask(self, window: int, seen: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [n, 1, 1, seen]; kept, as every layer asks for it."""
        if (window, seen) not in self._masks:
            distance = self._positions[:, None] - torch.arange(seen, device=self._positions.device)
            self._masks[window, seen] = additive_mask(distance, window, dtype)[:, None, None]
        return self._masks[window, seen]
