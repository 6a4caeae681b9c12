"""`PolicyWorker`: what runs where the policy lives, training and sampling with its weights."""

from collections.abc import Sequence
from typing import Literal, cast

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.data.types import Completion, GenerationRequest
from nemo_rl.distributed.mesh import RankPlace
from nemo_rl.errors import ConfigError
from nemo_rl.generation.hf import HFGenerator
from nemo_rl.metrics import Metrics
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.load import load_causal_lm
from nemo_rl.workers.train import TrainWorker

type PolicyHead = Literal["language", "language_and_value"]


class PolicyWorker(TrainWorker):
    """A training backend and a colocated sampler; a plain class that an executor starts in some process."""

    def __init__(
        self,
        config: PolicyConfig,
        source: str,
        *,
        head: PolicyHead = "language",
        with_reference: bool = False,
        place: RankPlace | None = None,
    ) -> None:
        """Load the model of the `policy` section from `source` (a folder or a hub name).

        With a `place` this is one rank of the model (see `TrainWorker`), which samples with a whole copy of its own.

        Raises:
            ConfigError: the generation backend is not one that shares the policy's process.
        """
        if config.generation.backend != "hf":
            raise ConfigError(
                f"policy.generation.backend={config.generation.backend} cannot run here yet; use backend=hf"
            )
        super().__init__(config, source, head=head, with_reference=with_reference, place=place)
        tokenizer = self._tokenizer
        self._generator = HFGenerator(
            self._sampled_model(source),
            decode=lambda token_ids: cast(str, tokenizer.decode(list(token_ids))),
            max_batch_size=config.generation.max_batch_size,
            autocast=self._backend.precision.autocast,
        )

    def _sampled_model(self, source: str) -> CausalLM:
        """The model that is trained, or a copy of it where each rank holds a part alone."""
        if self._mesh is None:
            assert isinstance(self._backend.model, CausalLM)
            return self._backend.model
        module, _ = load_causal_lm(source, dtype=self._backend.precision.weights, device=self._mesh.device)
        return CausalLM.wrap(module.eval().requires_grad_(False))

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Sample one completion for every request."""
        return self._generator.generate_now(requests)

    def publish(self, version: int) -> None:
        """Let the sampler answer with the current weights, as this version; where they are shared, nothing moves."""
        weights = None if self._mesh is None else self._backend.named_weights()
        self._generator.load_weights(weights, version)

    def generation_metrics(self) -> Metrics:
        """What the sampler counted since the last call."""
        return self._generator.metrics()
