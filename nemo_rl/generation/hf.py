"""Generation in process, on the very weights that are trained.

Every prompt enters the model once, whatever the number of its samples, and what prompts share enters once too. Rows
leave the batch the moment they finish, and waiting requests take their slots.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_rl.data.packing import prompt_stream
from nemo_rl.data.types import Completion, GenerationRequest, StopReason
from nemo_rl.errors import BackendError
from nemo_rl.generation.cache import DecodeAttention, KVCache, PrefillAttention
from nemo_rl.generation.sampling import Sampler, uniforms
from nemo_rl.metrics import Metrics, Sum
from nemo_rl.models.causal_lm import CausalLM


@dataclass(slots=True)
class _Row:
    """A running request: which one it is, its random numbers, and what it has sampled so far."""

    index: int
    request: GenerationRequest
    uniform: list[float]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache once the newest token has been fed."""
        return len(self.request.prompt_ids) + len(self.token_ids)


class HFGenerator:
    """The `hf` generation backend (see `nemo_rl.interfaces.GenerationBackend`).

    Args:
        model: the policy; shared with the training backend when colocated.
        decode: turns token ids into text; needed only for stop strings.
        max_batch_size: requests that run side by side.
        autocast: dtype to compute in when the weights are float32 (as training does), or None.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        decode: Callable[[Sequence[int]], str] | None = None,
        max_batch_size: int = 128,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._decode = decode
        self._max_batch_size = max_batch_size
        self._autocast = autocast
        self._version = 0
        self._counts = {"prompt_tokens": 0, "prompt_tokens_computed": 0, "sampled_tokens": 0}

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Sample a completion for every request, in a thread so that others can go on meanwhile."""
        return await asyncio.to_thread(self.generate_now, requests)

    def generate_now(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Sample a completion for every request; the answers come in the order of the requests.

        Raises:
            BackendError: if a request has stop strings and there is nothing to decode with, or an empty prompt.
        """
        if any(request.sampling.stop_strings for request in requests) and self._decode is None:
            raise BackendError(
                "stop strings need a tokenizer's decode function; give HFGenerator `decode`, or use stop token ids"
            )
        if any(len(request.prompt_ids) == 0 for request in requests):
            raise BackendError(
                "a generation request has an empty prompt; give it at least one token (such as the BOS token)"
            )
        if not requests:
            return []
        device = self._model.head.weight.device
        with torch.inference_mode(), torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            return _Batch(self._model, requests, self._max_batch_size, self._decode, self._version, self._counts).run()

    def load_weights(self, weights: Iterator[tuple[str, Tensor]] | None, version: int) -> None:
        """Answer as `version` from now on; `weights` None means that they are shared and already in place."""
        if weights is not None:
            known = dict(self._model.module.named_parameters())
            with torch.no_grad():
                for name, tensor in weights:
                    known[name].copy_(tensor)
        self._version = version

    def sleep(self) -> None:
        """Do nothing: no memory is held between calls."""

    def wake(self) -> None:
        """Do nothing: no memory is held between calls."""

    def reset_prefix_cache(self) -> None:
        """Do nothing: keys and values live only within one call."""

    def metrics(self) -> Metrics:
        """Tokens sampled, prompt tokens asked for and prompt tokens computed, since the last call."""
        metrics: Metrics = {f"generation/{name}": Sum(count) for name, count in self._counts.items()}
        self._counts.update(dict.fromkeys(self._counts, 0))
        return metrics


class _Batch:
    """One call of `generate`: requests wait, run in slots 0..n-1 of the cache, and finish."""

    def __init__(
        self,
        model: CausalLM,
        requests: Sequence[GenerationRequest],
        max_batch_size: int,
        decode: Callable[[Sequence[int]], str] | None,
        version: int,
        counts: dict[str, int],
    ) -> None:
        self._model = model
        self._decode = decode
        self._version = version
        self._counts = counts
        self._device = model.head.weight.device
        self._completions: dict[int, Completion] = {}
        # the longest budgets start first, so that no long request runs alone at the end
        order = sorted(range(len(requests)), key=lambda i: -requests[i].sampling.max_new_tokens)
        self._waiting = [(i, requests[i]) for i in order]
        self._running: list[_Row] = []
        self._num_slots = min(max_batch_size, len(requests))
        self._sampler: Sampler | None = None
        self._cache = KVCache(
            num_layers=model.module.config.num_hidden_layers,
            num_slots=self._num_slots,
            capacity=max(len(r.prompt_ids) + r.sampling.max_new_tokens for r in requests),
        )

    def run(self) -> list[Completion]:
        while self._waiting or self._running:
            free = self._num_slots - len(self._running)
            # a prefill is cheap per token only in company: wait for a quarter of the slots
            if self._waiting and free and (not self._running or free >= min(len(self._waiting), self._num_slots // 4)):
                self._admit(free)
            else:
                self._step()
        return [self._completions[i] for i in range(len(self._completions))]

    def _admit(self, free: int) -> None:
        """Prefill the next requests into free slots and sample their first tokens."""
        taken, self._waiting = self._waiting[:free], self._waiting[free:]
        first = len(self._running)
        rows = [_Row(i, r, uniforms(r.seed, r.sampling.max_new_tokens).tolist()) for i, r in taken]
        number: dict[bytes, int] = {}
        prompt_of = [number.setdefault(r.request.prompt_ids.numpy().tobytes(), len(number)) for r in rows]
        unique = [rows[prompt_of.index(p)].request.prompt_ids for p in range(len(number))]
        stream = prompt_stream(unique)
        plan = PrefillAttention(self._cache, stream, range(first, first + len(rows)), prompt_of)
        hidden = self._model.hidden(stream.input_ids.to(self._device), stream.position_ids.to(self._device), plan)
        last = torch.tensor([int(where[-1]) for where in stream.where], device=self._device)
        logits = self._model.logits(hidden[last])[torch.tensor(prompt_of, device=self._device)]
        self._counts["prompt_tokens"] += sum(len(row.request.prompt_ids) for row in rows)
        self._counts["prompt_tokens_computed"] += len(stream.input_ids)
        self._running += rows
        self._sampler = None
        self._take(logits, rows, Sampler([row.request.sampling for row in rows], self._device))
        self._retire()

    def _step(self) -> None:
        """Feed every running row its newest token and sample the next one."""
        positions = torch.tensor([row.length - 1 for row in self._running], device=self._device)
        newest = torch.tensor([row.token_ids[-1] for row in self._running], device=self._device)
        hidden = self._model.hidden(newest, positions, DecodeAttention(self._cache, positions))
        if self._sampler is None:
            self._sampler = Sampler([row.request.sampling for row in self._running], self._device)
        self._take(self._model.logits(hidden), self._running, self._sampler)
        self._retire()

    def _take(self, logits: Tensor, rows: Sequence[_Row], sampler: Sampler) -> None:
        uniform = torch.tensor([row.uniform[len(row.token_ids)] for row in rows], device=self._device)
        tokens, logprobs = sampler(logits, uniform)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
        self._counts["sampled_tokens"] += len(rows)

    def _retire(self) -> None:
        """Finish rows and let the last running row take each freed slot, so that running rows stay contiguous."""
        for slot in reversed(range(len(self._running))):
            row = self._running[slot]
            reason = self._stop_reason(row)
            if reason is None:
                continue
            self._completions[row.index] = Completion(
                token_ids=torch.tensor(row.token_ids),
                logprobs=torch.tensor(row.logprobs),
                stop_reason=reason,
                policy_version=self._version,
            )
            last = self._running.pop()
            self._sampler = None
            if last is not row:
                self._running[slot] = last
                self._cache.move(len(self._running), slot, last.length)

    def _stop_reason(self, row: _Row) -> StopReason | None:
        sampling = row.request.sampling
        if row.token_ids[-1] in sampling.stop_token_ids or self._ends_with_stop_string(row):
            return "stop"
        return "length" if len(row.token_ids) >= sampling.max_new_tokens else None

    def _ends_with_stop_string(self, row: _Row) -> bool:
        """Whether the newest token completed a stop string: only then is it in the text and was not before."""
        strings = row.request.sampling.stop_strings
        if not strings or self._decode is None:
            return False
        tail = row.token_ids[-(max(len(s.encode()) for s in strings) + 8) :]  # every token spells at least one byte
        text = self._decode(tail)
        return any(string in text for string in strings)
