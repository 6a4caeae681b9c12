"""Generation in process, on the very weights that are trained.

Every prompt enters the model once, whatever the number of its samples, and what prompts share enters once too. Rows
leave the batch the moment they finish, and waiting requests take their slots.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from nemo_rl.data.types import Completion, GenerationRequest
from nemo_rl.errors import BackendError
from nemo_rl.generation.batch import Counts, RunningBatch
from nemo_rl.metrics import Metrics, Sum
from nemo_rl.models.causal_lm import CausalLM


class HFGenerator:
    """The `hf` generation backend (see `nemo_rl.interfaces.GenerationBackend`).

    Args:
        model: the policy; shared with the training backend when colocated.
        decode: turns token ids into text; needed only for stop strings.
        max_batch_size: requests that run side by side.
        autocast: dtype to compute in when the weights are float32 (as training does), or None.

    Raises:
        BackendError: the model does not attend through attention plans, where keys and values are kept.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        decode: Callable[[Sequence[int]], str] | None = None,
        max_batch_size: int = 128,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not model.takes_plans:
            raise BackendError(
                f"{type(model.module).__name__} does not mix tokens by plain attention alone, and the hf backend keeps "
                "nothing but keys and values; use policy.generation.backend=vllm"
            )
        self._model = model
        self._decode = decode
        self._max_batch_size = max_batch_size
        self._autocast = autocast
        self._version = 0
        self._counts = Counts()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Sample a completion for every request, in a thread so that others can go on meanwhile."""
        return await asyncio.to_thread(self.generate_now, requests)

    def generate_now(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Sample a completion for every request; the answers come in the order of the requests.

        Raises:
            BackendError: if a request has an empty prompt or budget, or stop strings and there is no `decode`.
        """
        if any(request.sampling.stop_strings for request in requests) and self._decode is None:
            raise BackendError(
                "stop strings need a tokenizer's decode function; give HFGenerator `decode`, or use stop token ids"
            )
        if any(len(request.prompt_ids) == 0 for request in requests):
            raise BackendError(
                "a generation request has an empty prompt; give it at least one token (such as the BOS token)"
            )
        if any(request.sampling.max_new_tokens < 1 for request in requests):
            raise BackendError("a generation request asks for no token; set its max_new_tokens to at least 1")
        if not requests:
            return []
        device = self._model.head.weight.device
        with torch.inference_mode(), torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            batch = RunningBatch(
                self._model,
                requests,
                max_batch_size=self._max_batch_size,
                decode=self._decode,
                counts=self._counts,
            )
            rows = batch.run()
        return [row.completion(self._version) for row in rows]  # tensors made in inference mode could not be trained on

    def load_weights(self, weights: Iterator[tuple[str, Tensor]] | None, version: int) -> None:
        """Answer as `version` from now on; `weights` None means that they are shared and already in place.

        Raises:
            BackendError: the model has no weight of that name.
        """
        known = dict(self._model.module.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in weights or ():
                if name not in known:
                    raise BackendError(f"the sampler's model has no weight {name!r}; send it those of the same model")
                known[name].copy_(tensor)
        self._version = version

    def sleep(self) -> None:
        """Do nothing: no memory is held between calls."""

    def wake(self) -> None:
        """Do nothing: no memory is held between calls."""

    def reset_prefix_cache(self) -> None:
        """Do nothing: keys and values live only within one call."""

    def metrics(self) -> Metrics:
        """Count since the last call: tokens asked for (`prompt_tokens`, `sampled_tokens`) and `_computed` for them."""
        counts, self._counts = self._counts, Counts()
        return {f"generation/{name}": Sum(count) for name, count in asdict(counts).items()}
