"""Slots are added when they come into use, keep what they hold, and how much of them is read changes no result."""

import pytest
import torch
from torch import Tensor

from nemo_rl.generation.cache import DecodeAttention, KVCache
from nemo_rl.models.attention import Weighting


def keys_and_values(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """For two heads, keys of 4 and values of 3 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 2, 4, generator=generator).to(dtype),
        torch.randn(count, 2, 3, generator=generator).to(dtype),
    )


def test_slots_grow_by_doubling_up_to_the_most_and_keep_what_they_hold() -> None:
    cache = KVCache(num_layers=3, num_slots=11, capacity=5)
    k, v = keys_and_values(1, 0)
    cache.reserve(3)
    keys, values = cache.layer(2, k, v)
    assert (keys.shape, values.shape) == ((3, 2, 5, 4), (3, 2, 5, 3))
    keys[1], values[1] = 1.0, 2.0
    sizes = []
    for wanted in (2, 4, 9):
        cache.copy([1], [wanted - 1], 5)
        sizes.append(len(cache.layer(0, k, v)[0]))
    assert sizes == [3, 6, 11]
    keys, values = cache.layer(2, k, v)
    held = {1, 3, 8}
    for slot in range(11):
        assert (keys[slot] == float(slot in held)).all() and (values[slot] == 2.0 * (slot in held)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [9, 12, 40])  # the longest slot holds 9 tokens
@pytest.mark.parametrize("window", [0, 3])
def test_a_token_attends_to_its_own_slot_whatever_the_capacity(dtype: torch.dtype, capacity: int, window: int) -> None:
    positions = torch.tensor([5, 0, 8])
    cache = KVCache(num_layers=1, num_slots=4, capacity=capacity)
    cache.reserve(4)
    keys, values = cache.layer(0, *keys_and_values(1, 0, dtype))
    for slot, position in enumerate(positions.tolist()):
        k, v = keys_and_values(position, slot, dtype)
        keys[slot, :, :position], values[slot, :, :position] = k.transpose(0, 1), v.transpose(0, 1)
    q = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(9)).to(dtype)
    k, v = keys_and_values(3, 10, dtype)
    found = DecodeAttention(cache, positions).attend(0, q, k, v, Weighting(0.5, window))
    for slot, position in enumerate(positions.tolist()):
        old_k, old_v = keys_and_values(position, slot, dtype)
        all_k, all_v = torch.cat([old_k, k[slot, None]]).float(), torch.cat([old_v, v[slot, None]]).float()
        seen = slice(max(0, position + 1 - window) if window else 0, None)
        for head in range(4):
            weights = (all_k[seen, head // 2] @ q[slot, head].float() * 0.5).softmax(0)
            expected = weights @ all_v[seen, head // 2]
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(found[slot, head].float(), expected, rtol=0, atol=tolerance)
