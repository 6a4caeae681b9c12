"""`TeacherWorker`: a model that scores what a student wrote, without optimizer, gradients or master weights."""

from dataclasses import replace

import torch
from torch import Tensor

from nemo_rl.config.schema.policy import ModelConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.load import load_causal_lm, quiet_libraries
from nemo_rl.models.precision import precision_of
from nemo_rl.objectives.logprobs import LogitHead
from nemo_rl.training.pytorch.loading import choose_device
from nemo_rl.training.step import Scorer
from nemo_rl.training.teacher import last_hidden, topk_logprobs


class TeacherWorker:
    """A teacher (see `interfaces.TeacherBackend`); a plain class that an executor starts in some process."""

    def __init__(
        self, config: ModelConfig, source: str, *, temperature: float = 1.0, vocab_size: int | None = None
    ) -> None:
        """Load the model.

        Args:
            config: the teacher's section.
            source: what `resolve_model` returned.
            temperature: divides the logits.
            vocab_size: logits from here on are padding; None takes all for tokens.

        Raises:
            ModelError: it cannot be loaded or is no causal language model.
        """
        quiet_libraries()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        device = choose_device(config.device)
        precision = precision_of(config.precision, device)
        module, _ = load_causal_lm(source, dtype=precision.weights, device=device)
        self._model = CausalLM.wrap(module.eval().requires_grad_(False))
        self._max_tokens, self._vocab_size = config.logprob_mb_tokens, vocab_size
        self._scorer = Scorer(
            self._model,
            temperature=temperature,
            chunk_size=config.head_rows(self._model.vocab_size, on_gpu=device.type == "cuda"),
            share_prefixes=config.share_prefixes,
            min_shared=config.min_shared_prefix,
            packing=config.sequence_packing.algorithm,
            autocast=precision.autocast,
        )

    def topk_logprobs(self, batch: TokenBatch, k: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities float32 [N, k] and token ids int32 [N, k]; 0 where no loss is."""
        return topk_logprobs(self._scorer, batch, k, max_tokens=self._max_tokens, vocab_size=self._vocab_size)

    def last_hidden(self, batch: TokenBatch) -> Tensor:
        """[N, H], what `head` turns into logits; 0 where no loss is."""
        return last_hidden(self._scorer, batch, max_tokens=self._max_tokens)

    def head(self) -> LogitHead:
        """The LM head, on the CPU, to travel to where the logits are needed."""
        head = self._model.logit_head()
        bias = None if head.bias is None else head.bias.detach()
        return replace(head, weight=head.weight.detach(), bias=bias).to("cpu")
