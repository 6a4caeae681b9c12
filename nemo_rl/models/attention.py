"""The one attention of the library, registered with Transformers' attention interface.

A model runs on a flat stream `[1, S]`; whoever calls it passes an `AttentionPlan` through the forward keyword
`attention_plan`, and every layer's queries, keys and values come here. No dense mask over the stream ever exists:
`TreeAttention` gathers each segment's keys along the segment tree and runs one causal attention per segment: on a GPU
all of them in one variable-length kernel, elsewhere segments of like shape in one call.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from nemo_rl.data.packing import SegmentTree
from nemo_rl.data.transfer import moved
from nemo_rl.errors import ModelError
from nemo_rl.models.varlen import VarlenTree, can_use_varlen

NAME = "nemo_rl"


@dataclass(frozen=True, slots=True)
class Weighting:
    """How a layer turns queries and keys into attention weights.

    Attributes:
        scale: multiplies the products of queries and keys.
        window: above 0, a query sees only the last `window` keys, itself included.
        softcap: scores become `cap * tanh(score / cap)` (Gemma 2, https://arxiv.org/abs/2408.00118).
        sinks: [A], for each head the score of one more key that every query sees and that has no value, so that a head
            can attend to nothing (gpt-oss, https://arxiv.org/abs/2508.10925).
    """

    scale: float
    window: int = 0
    softcap: float | None = None
    sinks: Tensor | None = None


class AttentionPlan(Protocol):
    """Knows which keys each query of the stream sees.

    `attend` takes q [S, A, D] and k, v [S, A_kv, D] (A attention heads of size D) of one layer and returns [S, A, D].
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor: ...


@torch.compiler.disable
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
    s_aux: Tensor | None = None,
    attention_plan: AttentionPlan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Adapt Transformers' call (q [1, A, S, D], k and v [1, A_kv, S, D]) to the plan; returns [1, S, A, D]."""
    if attention_plan is None:
        raise ModelError(
            "this model attends only through an attention plan; call it through nemo_rl.models.causal_lm.CausalLM"
        )
    if attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} makes an attention mask of its own, which attention plans cannot follow; "
            f"choose another model"
        )
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    # under autocast the rotary embedding leaves queries and keys in float32, and values are in the dtype to compute in
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    weighting = Weighting(scale, sliding_window or 0, softcap, s_aux)
    return attention_plan.attend(layer, q, k, v, weighting)[None], None


def use_plans(model: PreTrainedModel) -> bool:
    """Make a Transformers model attend through attention plans, if plain attention is all that mixes its tokens.

    Returns:
        Whether it does now. A model with recurrent, convolutional, chunked or sparse layers, or without Transformers'
        attention interface, stays as it is.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    # Transformers says these three nowhere else
    has_interface = model._supports_attention_backend  # pyright: ignore[reportPrivateUsage]
    uses_interface = model._can_set_attn_implementation()  # pyright: ignore[reportPrivateUsage]
    is_recurrent = model._is_stateful  # pyright: ignore[reportPrivateUsage]
    if is_recurrent or not (has_interface and uses_interface and set(kinds) <= {"full_attention", "sliding_attention"}):
        return False
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
    return True


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

    Where `can_use_varlen` and the formula is a plain one, all segments run in one kernel. Elsewhere segments whose
    lengths agree after rounding up (queries to 8, keys to 16) share a call: a call on a CPU costs as much as some five
    hundred query-key pairs, which is more than the rounding adds.
    """

    def __init__(self, tree: SegmentTree, device: torch.device | str = "cpu") -> None:
        self._tree = tree
        self._device = device
        self._masks: dict[tuple[int, int, int, torch.dtype], list[tuple[slice, int, Tensor]]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """Run the kernel, or the buckets one after the other; see `AttentionPlan`."""
        del layer
        if _is_plain(weighting) and can_use_varlen(q, k, v):
            return self._varlen.attend(q, k, v, scale=weighting.scale, window=weighting.window)
        return self.attend_in_buckets(q, k, v, weighting)

    def attend_in_buckets(self, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """Attend on any device, in any precision and by any formula."""
        outputs = [self._run(number, q, k, v, weighting) for number in range(len(self._buckets))]
        return torch.cat(outputs).index_select(0, self._restore)

    @cached_property
    def _varlen(self) -> VarlenTree:
        return VarlenTree.of(self._tree, self._device)

    @cached_property
    def _buckets(self) -> list[_Bucket]:
        return [bucket for bucket, _ in self._sorted]

    @cached_property
    def _restore(self) -> Tensor:
        """int64 [S], where each position of the stream stands in the outputs of all buckets, one after the other."""
        written = torch.cat([places for _, places in self._sorted])
        filled = torch.nonzero(written >= 0)[:, 0]
        return moved(filled[torch.argsort(written[filled])], self._device)

    @cached_property
    def _sorted(self) -> list[tuple[_Bucket, Tensor]]:
        """The buckets, each with the stream position of every output row, -1 for a rounding row."""
        tree = self._tree
        num_q, num_k = tree.cu_seqlens_q.diff(), tree.cu_seqlens_k.diff()
        buckets: dict[tuple[int, int, bool], list[int]] = {}
        for r, (q, k) in enumerate(zip(num_q.tolist(), num_k.tolist(), strict=True)):
            square = q == k
            buckets.setdefault((-(-q // 16) * 16 if square else -(-q // 8) * 8, -(-k // 16) * 16, square), []).append(r)
        found: list[tuple[_Bucket, Tensor]] = []
        for (wide_q, wide_k, square), members in buckets.items():
            rows = torch.tensor(members)
            queries, real = padded_runs(tree.cu_seqlens_q[rows], num_q[rows], wide_q)
            keys, _ = padded_runs(tree.cu_seqlens_k[rows], num_k[rows], wide_k)
            parts = (queries.flatten(), tree.kv_index[keys.flatten()], num_q[rows], num_k[rows])
            bucket = _Bucket(
                *(moved(part, self._device) for part in parts), shape=(len(members), wide_q, wide_k), square=square
            )
            found.append((bucket, torch.where(real, queries, -1).flatten()))
        return found

    def _run(self, number: int, q: Tensor, k: Tensor, v: Tensor, weighting: Weighting) -> Tensor:
        """Attend for one bucket: [n*Q, A, D], in the bucket's order, rounding rows included."""
        bucket = self._buckets[number]
        n, wide_q, wide_k = bucket.shape
        # [n, A_kv, A/A_kv, Q, D]: the query heads that share a key head become rows of one product
        shared = q.shape[1] // k.shape[1]
        queries = q.index_select(0, bucket.queries).view(n, wide_q, k.shape[1], shared, -1).permute(0, 2, 3, 1, 4)
        keys, values = (x.index_select(0, bucket.keys).unflatten(0, (n, wide_k)).transpose(1, 2) for x in (k, v))
        is_causal = bucket.square and _is_plain(weighting) and not 0 < weighting.window < wide_k
        if is_causal and not as_products(q, wide_k):
            output = F.scaled_dot_product_attention(
                queries.flatten(1, 2), keys, values, is_causal=True, scale=weighting.scale, enable_gqa=shared > 1
            )
        else:
            parts = [
                masked_attention(
                    queries[:, :, :, block].flatten(2, 3), keys[:, :, :seen], values[:, :, :seen], mask, weighting
                ).unflatten(2, (shared, -1))
                for block, seen, mask in self._masked_blocks(number, shared, weighting.window, q.dtype)
            ]
            output = (parts[0] if len(parts) == 1 else torch.cat(parts, 3)).flatten(1, 2)
        return output.transpose(1, 2).flatten(0, 1)

    def _masked_blocks(
        self, number: int, shared: int, window: int, dtype: torch.dtype
    ) -> list[tuple[slice, int, Tensor]]:
        """Blocks of a bucket's queries: which, how many keys they see, mask [n, 1, shared*block, keys].

        A square one is cut, since a block sees no key behind its own end. Kept, as every layer asks for them.
        """
        key = (number, shared, window, dtype)
        if key not in self._masks:
            bucket = self._buckets[number]
            _, wide_q, wide_k = bucket.shape
            device = bucket.queries.device
            # rounding rows see what the last true query sees: a row that saw nothing would be NaN
            offset = torch.minimum(torch.arange(wide_q, device=device), bucket.num_q[:, None] - 1)
            last = (bucket.num_k - bucket.num_q)[:, None, None] + offset[:, :, None]
            mask = additive_mask(last - torch.arange(wide_k, device=device), window, dtype)
            size = _BLOCK if bucket.square else wide_q
            blocks = [slice(start, min(start + size, wide_q)) for start in range(0, wide_q, size)]
            seen = [block.stop if bucket.square else wide_k for block in blocks]
            self._masks[key] = [
                (block, end, mask[:, block, :end].repeat(1, shared, 1)[:, None])
                for block, end in zip(blocks, seen, strict=True)
            ]
        return self._masks[key]


_BLOCK = 128
"""Queries of a causal segment that are multiplied at a time, where no fused kernel runs."""

_FUSED_FROM = 1536
"""Keys from which bfloat16 attention on a CPU is fused: below, two plain products are faster (1.5 to 6 times)."""


def as_products(q: Tensor, num_k: int) -> bool:
    """Whether two plain products are the fastest attention; they keep the probabilities, which limits the length."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and num_k < _FUSED_FROM


def additive_mask(distance: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """Mask by how far each key lies behind its query, int64 of any shape: 0 where it is seen, -inf elsewhere.

    A key in front of its query is hidden, and with a `window` above 0 one that lies `window` or more behind it.
    """
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    return torch.zeros(distance.shape, dtype=dtype, device=distance.device).masked_fill_(hidden, -torch.inf)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weighting: Weighting) -> Tensor:
    """Attend with q [n, A_kv, R, D], k and v [n, A_kv, K, D] and an additive mask [n, 1, 1 or R, K]: [n, A_kv, R, D].

    The R rows of a key head are those of its query heads, head after head.
    """
    if not _is_plain(weighting):
        return _explicit_attention(q, k, v, mask, weighting)
    if as_products(q, k.shape[2]):
        return torch.add(mask, q @ k.transpose(-1, -2), alpha=weighting.scale).softmax(-1) @ v  # sums in float32
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=weighting.scale)


def _is_plain(weighting: Weighting) -> bool:
    """Whether the fused kernels know this formula."""
    return weighting.softcap is None and weighting.sinks is None


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weighting: Weighting) -> Tensor:
    """Do what `masked_attention` does as the formula is written, with float32 scores."""
    scores = (q @ k.transpose(-1, -2)).float() * weighting.scale
    if weighting.softcap is not None:
        scores = weighting.softcap * (scores / weighting.softcap).tanh()
    scores = scores + mask
    if weighting.sinks is None:
        return scores.softmax(-1).to(v.dtype) @ v
    n, heads, rows, _ = scores.shape
    sinks = weighting.sinks.repeat_interleave(heads * rows // len(weighting.sinks)).view(heads, rows, 1)
    scores = torch.cat([scores, sinks.expand(n, -1, -1, -1)], -1)
    return scores.softmax(-1)[..., :-1].to(v.dtype) @ v


def padded_runs(start: Tensor, length: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Give the indices [n, width] of n runs, and which of them are real; past its end a run repeats its first index."""
    offset = torch.arange(width)
    real = offset < length[:, None]
    return start[:, None] + torch.where(real, offset, 0), real
