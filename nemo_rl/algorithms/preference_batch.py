"""The batch of a step of preference training, with the reference log-probabilities that its loss compares with."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.examples import mismatched
from nemo_rl.data.types import Example, Preference
from nemo_rl.objectives.jagged import sequence_sums
from nemo_rl.objectives.preference import kto_reference_kl
from nemo_rl.objectives.weights import loss_weights
from nemo_rl.workers.handles import Policy

_BYTES_BESIDE_THE_VALUES = 256
"""Of one remembered sequence: its key, its place in the table, the headers of its objects."""


class Reference:
    """Log-probabilities under the weights the run started from; those of a sequence are computed once and kept.

    They are known by the sequence itself (its tokens and which of them carry loss), so it does not matter which record
    or which data set brings it again. What is kept takes 4 bytes a loss token and 256 a sequence, up to a limit beyond
    which nothing more is kept and the rest is computed every time. A resumed run begins with nothing kept.

    A log-probability depends in its last digits on what it is computed with: bitwise equal to a computation without
    memory are the values of batches that come again as they were, all others are equal up to rounding.
    """

    def __init__(self, policy: Policy, *, max_bytes: int) -> None:
        """Keep at most `max_bytes`; 0 keeps nothing."""
        self._policy = policy
        self._max_bytes = max_bytes
        self._kept: dict[bytes, bytes] = {}
        self.num_bytes = 0

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """float32 [N]: log-probabilities where `loss_mask` is true, 0 elsewhere; only unknown ones are computed."""
        keys = [_key(batch, index) for index in range(batch.num_sequences)]
        values = {key: self._kept[key] for key in keys if key in self._kept}
        missing = [index for index, key in enumerate(keys) if key not in values]
        if missing:
            part = batch.select(missing)
            bounds, mask = part.cu_seqlens, part.token_columns["loss_mask"]
            fresh = self.computed(part)
            for place, index in enumerate(missing):
                own = slice(int(bounds[place]), int(bounds[place + 1]))
                values[keys[index]] = fresh[own][mask[own]].numpy().tobytes()
                self._keep(keys[index], values[keys[index]])
        column = torch.zeros(batch.num_tokens)
        found = bytearray(b"".join(values[key] for key in keys))
        column[batch.token_columns["loss_mask"]] = torch.frombuffer(found, dtype=torch.float32)
        return column

    def computed(self, batch: TokenBatch) -> Tensor:
        """The same, computed whether known or not and not kept."""
        with self._policy.reference():
            return self._policy.logprobs(batch)

    def _keep(self, key: bytes, values: bytes) -> None:
        size = len(values) + _BYTES_BESIDE_THE_VALUES
        if key not in self._kept and self.num_bytes + size <= self._max_bytes:
            self._kept[key] = values
            self.num_bytes += size


def _key(batch: TokenBatch, index: int) -> bytes:
    """What tells a sequence of a batch from every other one."""
    own = slice(int(batch.cu_seqlens[index]), int(batch.cu_seqlens[index + 1]))
    digest = hashlib.blake2b(batch.token_ids[own].numpy().tobytes(), digest_size=16)
    digest.update(batch.token_columns["loss_mask"][own].numpy().tobytes())
    return digest.digest()


def pair_batch(pairs: Sequence[Preference], reference: Reference | None) -> TokenBatch:
    """Lay pairs side by side as an objective on pairs takes them, compared with the reference if there is one."""
    batch = _weighted(TokenBatch.from_preferences(pairs))
    return batch if reference is None else batch.with_columns(reference_logprobs=reference.logprobs(batch))


def judged_batch(policy: Policy, examples: Sequence[Example], reference: Reference, max_length: int) -> TokenBatch:
    """Lay judged answers side by side as KTO takes them, with the reference point of the whole batch.

    That is measured on every prompt with the answer of the next one, which a shuffled batch hardly ever repeats:
    their reference log-probabilities are computed every time. Neither is longer than `max_length` tokens.

    Raises:
        DataError: there is only one answer.
    """
    batch = _weighted(TokenBatch.from_examples(examples))
    others = TokenBatch.from_examples(mismatched(examples, max_length))
    log_ratios = policy.logprobs(others) - reference.computed(others)
    point = kto_reference_kl(sequence_sums(log_ratios, others.cu_seqlens))
    batch = batch.with_columns(reference_logprobs=reference.logprobs(batch))
    return batch.with_sequence_columns(reference_kl=point.repeat(batch.num_sequences))


def _weighted(batch: TokenBatch) -> TokenBatch:
    """Every sequence weighs the same, so that a loss of pairs is their mean."""
    weights = loss_weights(batch.token_columns["loss_mask"], batch.cu_seqlens, reduction="sequence_mean")
    return batch.with_columns(loss_weights=weights)
