"""`GenerationWorker`: a model that only samples, without optimizer, gradients or master weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch

from nemo_rl.data.types import Completion, GenerationRequest
from nemo_rl.errors import BackendError
from nemo_rl.generation.hf import HFGenerator
from nemo_rl.metrics import Metrics
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.load import load_causal_lm, load_tokenizer, quiet_libraries
from nemo_rl.models.precision import precision_of
from nemo_rl.training.pytorch.loading import choose_device


class GenerationWorker:
    """A sampler with weights of its own; a plain class that an executor starts in some process."""

    def __init__(
        self,
        source: str,
        *,
        tokenizer: str,
        max_model_len: int,
        max_batch_size: int,
        precision: Literal["auto", "float32", "bfloat16"],
        device: Literal["auto", "cpu", "cuda"] = "auto",
        num_threads: int | None = None,
    ) -> None:
        """Load the model from `source` (a folder or a hub name).

        Args:
            source: what `resolve_model` returned.
            tokenizer: folder or hub name, for stop strings.
            max_model_len: longest sequence in tokens; an answer is cut off where its prompt leaves no more room.
            max_batch_size: answers sampled side by side.
            precision: number format of the weights and of the arithmetic; see `precision_of`.
            device: where the model is put; `auto` is the GPU when there is one.
            num_threads: CPU threads; None is PyTorch's own choice.

        Raises:
            ModelError: the model or the tokenizer cannot be loaded.
            BackendError: the `hf` backend cannot sample from this kind of model.
        """
        quiet_libraries()
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        place = choose_device(device)
        module, _ = load_causal_lm(source, dtype=precision_of(precision, place).weights, device=place)
        words = load_tokenizer(tokenizer)
        self._max_model_len = max_model_len
        self._generator = HFGenerator(
            CausalLM.wrap(module.eval()),
            decode=lambda token_ids: cast(str, words.decode(list(token_ids))),
            max_batch_size=max_batch_size,
        )

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Sample one completion for every request.

        Raises:
            BackendError: a prompt leaves no room for an answer.
        """
        return self._generator.generate_now([self._within_length(request) for request in requests])

    def generation_metrics(self) -> Metrics:
        """What the sampler counted since the last call."""
        return self._generator.metrics()

    def _within_length(self, request: GenerationRequest) -> GenerationRequest:
        room = self._max_model_len - len(request.prompt_ids)
        if room < 1:
            raise BackendError(
                f"a prompt has {len(request.prompt_ids)} tokens and a sequence at most {self._max_model_len}; raise "
                "generation.vllm_cfg.max_model_len"
            )
        if request.sampling.max_new_tokens <= room:
            return request
        return replace(request, sampling=replace(request.sampling, max_new_tokens=room))
