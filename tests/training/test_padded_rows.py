"""On a pretrained model, packed and prefix-shared training is that of plain Transformers on padded rows."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_rl.data.batch import TokenBatch
from nemo_rl.metrics import Sum, scalars
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.training.step import Scorer, train_step
from tiny_batches import plain_policy_loss, rollout_batch
from tiny_models import embedded_folder


def padded_logprobs(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """All sequences in one call, a padded row each: [N], 0 at first tokens."""
    sequences = batch.token_ids.split(batch.lengths.tolist())
    rows = pad_sequence(list(sequences), batch_first=True)
    mask = torch.arange(rows.shape[1]) < batch.lengths[:, None]
    logprobs = model(input_ids=rows, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1)
    chosen = logprobs.gather(-1, rows[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(len(rows), 1), chosen], 1)[mask]


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()


def test_packed_and_shared_gradients_are_those_of_padded_rows(plain: PreTrainedModel) -> None:
    batch = rollout_batch(plain).select(range(6))
    mask = batch.token_columns["loss_mask"]
    batch = batch.with_columns(loss_weights=mask / mask.sum())
    loss = plain_policy_loss(padded_logprobs(plain, batch), batch)
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    model = CausalLM.wrap(copy.deepcopy(plain))
    computed = set()
    for share_prefixes in (False, True):
        model.module.zero_grad()
        metrics = scalars(
            train_step(
                Scorer(model, share_prefixes=share_prefixes),
                batch,
                ClippedPolicyObjective(kl_weight=0.1),
                max_tokens=80,
                update=lambda: {"updates": Sum(1)},
            )
        )
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        computed.add(metrics["tokens_computed"])
        for (name, parameter), gradient in zip(model.module.named_parameters(), expected, strict=True):
            assert parameter.grad is not None, name
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert len(computed) == 2
