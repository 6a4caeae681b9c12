"""The requests of one call as they run: what they have in common is computed once, in the prompt and after it.

Running requests form *nodes*. All requests of a node have the same prompt, sampling rule and sampled tokens so far, so
one row of the model's batch and one slot of the cache serve them all. Each draws its next token by its own random
number; those that draw different tokens part, and each branch but the first takes a copy of the slot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_rl.data.packing import prompt_stream
from nemo_rl.data.types import Completion, GenerationRequest, SamplingParams, StopReason
from nemo_rl.generation.cache import DecodeAttention, KVCache, PrefillAttention
from nemo_rl.generation.sampling import Sampler, uniforms
from nemo_rl.models.causal_lm import CausalLM


@dataclass(slots=True)
class Row:
    """A request: which one it is, its random numbers, what it has sampled so far, and once it has ended why."""

    index: int
    request: GenerationRequest
    uniform: list[float]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason = "length"

    def completion(self, version: int) -> Completion:
        """What a finished request is answered with."""
        return Completion(torch.tensor(self.token_ids), torch.tensor(self.logprobs), self.stop_reason, version)


@dataclass(slots=True)
class _Node:
    """Requests that are one so far; its place in the list of nodes is its slot in the cache."""

    rows: list[Row]

    @property
    def sampling(self) -> SamplingParams:
        return self.rows[0].request.sampling

    @property
    def position(self) -> int:
        """Where the newest token stands in the sequence; the cache holds everything before it."""
        return len(self.rows[0].request.prompt_ids) + len(self.rows[0].token_ids) - 1


@dataclass(slots=True)
class Counts:
    """Tokens of a sampler: asked for, and put through the model for it."""

    prompt_tokens: int = 0
    prompt_tokens_computed: int = 0
    sampled_tokens: int = 0
    sampled_tokens_computed: int = 0


class RunningBatch:
    """One call of `generate`: requests wait, run in slots 0..n-1 of the cache, and finish."""

    def __init__(
        self,
        model: CausalLM,
        requests: Sequence[GenerationRequest],
        *,
        max_batch_size: int,
        decode: Callable[[Sequence[int]], str] | None,
        counts: Counts,
    ) -> None:
        self._model = model
        self._decode = decode
        self._counts = counts
        self._device = model.head.weight.device
        self._finished: list[Row] = []
        # the longest budgets start first, so that no long request runs alone at the end
        order = sorted(range(len(requests)), key=lambda i: -requests[i].sampling.max_new_tokens)
        self._waiting = [(i, requests[i]) for i in order]
        self._nodes: list[_Node] = []
        self._num_slots = min(max_batch_size, len(requests))
        self._cache = KVCache(
            num_layers=model.module.config.num_hidden_layers,
            num_slots=self._num_slots,
            capacity=max(len(r.prompt_ids) + r.sampling.max_new_tokens for r in requests),
        )

    def run(self) -> list[Row]:
        """Run all requests to their end: finished rows in the order of the requests."""
        while self._waiting or self._nodes:
            free = self._num_slots - sum(len(node.rows) for node in self._nodes)
            # a prefill is cheap per token only in company: wait for a quarter of the slots
            if self._waiting and free and (not self._nodes or free >= min(len(self._waiting), self._num_slots // 4)):
                self._admit(free)
            else:
                self._step()
        return sorted(self._finished, key=lambda row: row.index)

    def _admit(self, free: int) -> None:
        """Prefill the next requests and sample their first tokens."""
        taken, self._waiting = self._waiting[:free], self._waiting[free:]
        groups: dict[object, list[Row]] = {}
        for index, request in taken:
            rule = request.sampling
            same = (request.prompt_ids.numpy().tobytes(), rule.temperature, rule.top_p, rule.top_k, rule.min_p)
            row = Row(index, request, uniforms(request.seed, rule.max_new_tokens).tolist())
            groups.setdefault(same, []).append(row)
        nodes = [_Node(rows) for rows in groups.values()]
        stream = prompt_stream([node.rows[0].request.prompt_ids for node in nodes])
        first = len(self._nodes)
        plan = PrefillAttention(self._cache, stream, range(first, first + len(nodes)), self._device)
        hidden = self._model.hidden(stream.input_ids.to(self._device), stream.position_ids.to(self._device), plan)
        last = torch.tensor([int(where[-1]) for where in stream.where], device=self._device)
        self._counts.prompt_tokens += sum(len(request.prompt_ids) for _, request in taken)
        self._counts.prompt_tokens_computed += len(stream.input_ids)
        self._nodes += nodes
        self._take(self._model.logits(hidden[last]), nodes)
        self._part()

    def _step(self) -> None:
        """Feed every node its newest token and sample the next ones."""
        positions = torch.tensor([node.position for node in self._nodes], device=self._device)
        newest = torch.tensor([node.rows[0].token_ids[-1] for node in self._nodes], device=self._device)
        hidden = self._model.hidden(newest, positions, DecodeAttention(self._cache, positions))
        self._counts.sampled_tokens_computed += len(self._nodes)
        self._take(self._model.logits(hidden), self._nodes)
        self._part()

    def _take(self, logits: Tensor, nodes: Sequence[_Node]) -> None:
        """Let every row of each node draw from its node's logits [n, V]."""
        widest = max(len(node.rows) for node in nodes)
        draws = [[row.uniform[len(row.token_ids)] for row in node.rows] for node in nodes]
        uniform = torch.tensor([draw + [0.0] * (widest - len(draw)) for draw in draws], device=self._device)
        tokens, logprobs = Sampler([node.sampling for node in nodes], self._device)(logits, uniform)
        for node, drawn, likely in zip(nodes, tokens.tolist(), logprobs.tolist(), strict=True):
            for row, token, logprob in zip(node.rows, drawn, likely, strict=False):
                row.token_ids.append(token)
                row.logprobs.append(logprob)
            self._counts.sampled_tokens += len(node.rows)

    def _part(self) -> None:
        """Finish rows, let rows that drew different tokens part, and close the gaps, so that slots stay contiguous."""
        forks: list[tuple[_Node, int]] = []
        vacant: list[int] = []
        for slot, node in enumerate(self._nodes):
            stays, *leave = self._branches(node) or [[]]
            node.rows = stays
            forks += [(_Node(rows), slot) for rows in leave]
            if not stays:
                vacant.append(slot)
        origin = list(range(len(self._nodes)))  # the slot that holds each node's keys and values now
        for node, source in forks:
            if vacant:
                slot = vacant.pop()
                self._nodes[slot], origin[slot] = node, source
            else:
                self._nodes.append(node)
                origin.append(source)
        for slot in reversed(vacant):  # whatever lies behind the last gap is alive
            last, source = self._nodes.pop(), origin.pop()
            if slot < len(self._nodes):
                self._nodes[slot], origin[slot] = last, source
        moved = [slot for slot, source in enumerate(origin) if slot != source]
        if moved:
            longest = max(self._nodes[slot].position for slot in moved)
            self._cache.copy([origin[slot] for slot in moved], moved, longest)

    def _branches(self, node: _Node) -> list[list[Row]]:
        """Divide the rows that go on by the token they drew."""
        branches: dict[int, list[Row]] = {}
        for row in node.rows:
            reason = self._stop_reason(row)
            if reason is None:
                branches.setdefault(row.token_ids[-1], []).append(row)
            else:
                row.stop_reason = reason
                self._finished.append(row)
        return list(branches.values())

    def _stop_reason(self, row: Row) -> StopReason | None:
        sampling = row.request.sampling
        if row.token_ids[-1] in sampling.stop_token_ids or self._ends_with_stop_string(row):
            return "stop"
        return "length" if len(row.token_ids) >= sampling.max_new_tokens else None

    def _ends_with_stop_string(self, row: Row) -> bool:
        """Whether the newest token completed a stop string: only then is it in the text and was not before."""
        strings = row.request.sampling.stop_strings
        if not strings or self._decode is None:
            return False
        tail = row.token_ids[-(max(len(s.encode()) for s in strings) + 8) :]  # every token spells at least one byte
        text = self._decode(tail)
        return any(string in text for string in strings)
