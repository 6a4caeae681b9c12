"""The one attention of the library, registered with Transformers' attention interface.

A model runs on a flat stream `[1, S]`; whoever calls it passes an `AttentionPlan` through the forward keyword
`attention_plan`, and every layer's queries, keys and values come here. No dense mask over the stream ever exists:
`TreeAttention` gathers each segment's keys along the segment tree and runs one causal attention per segment, segments
of like shape in one call.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from nemo_rl.data.packing import SegmentTree
from nemo_rl.errors import ModelError

NAME = "nemo_rl"


class AttentionPlan(Protocol):
    """Knows which keys each query of the stream sees.

    `attend` takes q [S, A, D] and k, v [S, A_kv, D] (A attention heads of size D) of one layer and returns [S, A, D].
    `window` > 0 lets a query see only the last `window` keys, itself included.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int) -> Tensor: ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attention_plan: AttentionPlan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Adapt Transformers' call (q [1, A, S, D], k and v [1, A_kv, S, D]) to the plan; returns [1, S, A, D]."""
    if attention_plan is None:
        raise ModelError(
            "this model attends only through an attention plan; call it through nemo_rl.models.causal_lm.CausalLM"
        )
    if softcap is not None:
        raise ModelError(
            "attention with soft-capped scores is not supported; choose a model without attn_logit_softcapping"
        )
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    # under autocast the rotary embedding leaves queries and keys in float32, and values are in the dtype to compute in
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_plan.attend(layer, q, k, v, scale=scale, window=sliding_window or 0)[None], None


def use_plans(model: PreTrainedModel) -> None:
    """Make a Transformers model attend through attention plans.

    Raises:
        ModelError: if the model's attention cannot be replaced (it has no attention interface).
    """
    AttentionInterface.register(NAME, _attention)
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} does not support Transformers' attention interface: {error}"
        ) from error


@dataclass(frozen=True, slots=True)
class _Bucket:
    """n segments of similar shape, run as one call with Q query and K key rows each.

    Attributes:
        queries, keys: int64 [n*Q], [n*K], stream positions; rows past a segment's end repeat its first one.
        num_q, num_k: int64 [n], the true lengths.
        shape: (n, Q, K).
        square: every segment sees only itself, causally.
    """

    queries: Tensor
    keys: Tensor
    num_q: Tensor
    num_k: Tensor
    shape: tuple[int, int, int]
    square: bool


class TreeAttention:
    """Attention along a segment tree (see `nemo_rl.data.packing.SegmentTree`), exact for values and gradients.

    Segments whose lengths agree after rounding up (queries to 8, keys to 16) share a call: a call on a CPU costs as
    much as some five hundred query-key pairs, which is more than the rounding adds.
    """

    def __init__(self, tree: SegmentTree, device: torch.device | str = "cpu") -> None:
        num_q, num_k = tree.cu_seqlens_q.diff(), tree.cu_seqlens_k.diff()
        buckets: dict[tuple[int, int, bool], list[int]] = {}
        for r, (q, k) in enumerate(zip(num_q.tolist(), num_k.tolist(), strict=True)):
            square = q == k
            buckets.setdefault((-(-q // 16) * 16 if square else -(-q // 8) * 8, -(-k // 16) * 16, square), []).append(r)
        self._buckets: list[_Bucket] = []
        order: list[Tensor] = []
        for (wide_q, wide_k, square), members in buckets.items():
            rows = torch.tensor(members)
            queries, real = _window(tree.cu_seqlens_q[rows], num_q[rows], wide_q)
            keys, _ = _window(tree.cu_seqlens_k[rows], num_k[rows], wide_k)
            order.append(torch.where(real, queries, -1).flatten())
            parts = (queries.flatten(), tree.kv_index[keys.flatten()], num_q[rows], num_k[rows])
            moved = (part.to(device) for part in parts)
            self._buckets.append(_Bucket(*moved, shape=(len(members), wide_q, wide_k), square=square))
        written = torch.cat(order)
        filled = torch.nonzero(written >= 0)[:, 0]
        self._restore = filled[torch.argsort(written[filled])].to(device)
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int) -> Tensor:
        """Run the buckets one after the other; see `AttentionPlan`."""
        del layer
        outputs = [self._run(number, q, k, v, scale, window) for number in range(len(self._buckets))]
        return torch.cat(outputs).index_select(0, self._restore)

    def _run(self, number: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
        """Attend for one bucket: [n*Q, A, D], in the bucket's order, rounding rows included."""
        bucket = self._buckets[number]
        n, wide_q, wide_k = bucket.shape
        # [n, A_kv, A/A_kv, Q, D]: the query heads that share a key head become rows of one product
        shared = q.shape[1] // k.shape[1]
        queries = q.index_select(0, bucket.queries).view(n, wide_q, k.shape[1], shared, -1).permute(0, 2, 3, 1, 4)
        keys, values = (x.index_select(0, bucket.keys).unflatten(0, (n, wide_k)).transpose(1, 2) for x in (k, v))
        if bucket.square and wide_k > _SMALL and not 0 < window < wide_k:
            output = F.scaled_dot_product_attention(
                queries.flatten(1, 2), keys, values, is_causal=True, scale=scale, enable_gqa=shared > 1
            )
        else:
            mask = self._mask(number, shared, window, q.dtype)
            output = masked_attention(queries.flatten(2, 3), keys, values, mask, scale)
        return output.view(n, k.shape[1] * shared, wide_q, -1).transpose(1, 2).flatten(0, 1)

    def _mask(self, number: int, shared: int, window: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [n, 1, shared*Q, K], causal from the last true key back; kept, as every layer asks for it."""
        key = (number, shared, window, dtype)
        if key not in self._masks:
            bucket = self._buckets[number]
            _, wide_q, wide_k = bucket.shape
            device = bucket.queries.device
            # rounding rows see what the last true query sees: a row that saw nothing would be NaN
            offset = torch.minimum(torch.arange(wide_q, device=device), bucket.num_q[:, None] - 1)
            last = (bucket.num_k - bucket.num_q)[:, None, None] + offset[:, :, None]
            distance = last - torch.arange(wide_k, device=device)
            self._masks[key] = additive_mask(distance, window, dtype).repeat(1, shared, 1)[:, None]
        return self._masks[key]


_SMALL = 192
"""Keys up to which bfloat16 attention on a CPU is faster (3 to 6 times) as two plain products than fused."""


def additive_mask(distance: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """Mask by how far each key lies behind its query, int64 of any shape: 0 where it is seen, -inf elsewhere.

    A key in front of its query is hidden, and with a `window` above 0 one that lies `window` or more behind it.
    """
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    return torch.zeros(distance.shape, dtype=dtype, device=distance.device).masked_fill_(hidden, -torch.inf)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend with q [n, A, Q, D], k and v [n, A, K, D] and an additive mask [n, 1, 1 or Q, K]: [n, A, Q, D]."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[2] <= _SMALL:
        scores = torch.add(mask, q @ k.transpose(-1, -2), alpha=scale)
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _window(start: Tensor, length: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Indices [n, width] of n runs, and which of them are real; past its end a run repeats its first index."""
    offset = torch.arange(width)
    real = offset < length[:, None]
    return start[:, None] + torch.where(real, offset, 0), real
