"""Policy and critic on one trunk: one pass takes the plain step of both, and the head can learn alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.metrics import scalars
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.value import ActorCriticObjective, ValueHeadObjective, ValueObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from tiny_batches import plain_logprobs, plain_policy_loss, rollout_batch
from tiny_models import embedded_folder, tiny_model

PLAIN = tiny_model("qwen3", tie_word_embeddings=True)
BATCH = rollout_batch(PLAIN)
MASK = BATCH.token_columns["loss_mask"]
HEAD = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
WEIGHT, CLIP = 0.3, 0.2
JOINT = ActorCriticObjective(ClippedPolicyObjective(kl_weight=0.1), ValueObjective(CLIP, WEIGHT))
CUTS = [{}, {"train_mb_tokens": 30}, {"share_prefixes": False}, {"train_mb_tokens": 47, "share_prefixes": False}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


def backend(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PyTorchBackend:
    """One whose value head is not zero, so that the critic's gradient reaches the trunk."""
    PLAIN.save_pretrained(folder)
    settings: dict[str, Any] = {
        "model_name": str(folder),
        "train_global_batch_size": 9,
        "max_total_sequence_length": 64,
        "precision": "float32",
        "max_grad_norm": None,
        "device": "cpu",
        "optimizer": {"name": "torch.optim.SGD", "kwargs": {"lr": 0.1}},
    }
    config = TrainedPolicyConfig.model_validate(settings | changes)
    made = PyTorchBackend(config, str(folder), tokenizer, head="language_and_value")
    made.model.module.get_parameter("value_head.weight").data.copy_(HEAD)
    return made


def plain_values(head: Tensor) -> Tensor:
    """The value before each token by plain Transformers, one sequence at a time: [N], 0 at first tokens."""
    found: list[Tensor] = []
    for tokens in BATCH.token_ids.split(BATCH.lengths.tolist()):
        hidden = PLAIN.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, :-1]
        found += [torch.zeros(1), (hidden @ head.T)[:, 0]]
    return torch.cat(found)


with torch.no_grad():
    OLD = plain_values(HEAD) + 0.3 * torch.randn(len(MASK), generator=torch.Generator().manual_seed(6))
RETURNS = torch.linspace(-2, 2, len(MASK))
GIVEN = BATCH.with_columns(old_values=OLD, returns=RETURNS)


def plain_critic_loss(values: Tensor) -> Tensor:
    bounded = torch.min(torch.max(values, OLD - CLIP), OLD + CLIP)
    return (0.5 * torch.max((values - RETURNS) ** 2, (bounded - RETURNS) ** 2))[MASK].mean()


@pytest.mark.parametrize("changes", CUTS, ids=str)
def test_one_pass_takes_the_plain_step_of_policy_and_critic_however_it_is_cut(
    changes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trained = backend(tmp_path, tokenizer, **changes)
    head = HEAD.clone().requires_grad_()
    critic = plain_critic_loss(plain_values(head))
    loss = plain_policy_loss(plain_logprobs(PLAIN, BATCH), BATCH) + WEIGHT * critic
    names, parameters = zip(*PLAIN.named_parameters(), strict=True)
    *gradients, head_gradient = torch.autograd.grad(loss, [*parameters, head])

    figures = scalars(trained.train(GIVEN, JOINT))
    assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert figures["value_loss"] == pytest.approx(float(critic.detach()), rel=1e-5)
    assert 0 < figures["value_clip_share"] < 1
    found = dict(trained.model.module.named_parameters())
    for name, start, gradient in [*zip(names, parameters, gradients, strict=True)]:
        step = start.detach() - 0.1 * gradient
        assert (found[name] - step).norm() < 1e-5 * step.norm(), name
    torch.testing.assert_close(found["value_head.weight"].detach(), HEAD - 0.1 * head_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", CUTS, ids=str)
def test_the_head_alone_takes_the_plain_step_and_the_trunk_keeps_its_bits(
    changes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Weight decay is one of the ways in which an optimizer moves weights that were given no gradient of zeros."""
    decaying = {"optimizer": {"name": "torch.optim.SGD", "kwargs": {"lr": 0.1, "weight_decay": 0.5}}}
    trained = backend(tmp_path, tokenizer, **changes, **decaying)
    head = HEAD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(plain_critic_loss(plain_values(head)), head)
    trained.train(GIVEN, ValueHeadObjective(CLIP))
    found = dict(trained.model.module.named_parameters())
    for name, start in PLAIN.named_parameters():
        assert torch.equal(found[name], start), name
    step = HEAD - 0.1 * (gradient + 0.5 * HEAD)
    torch.testing.assert_close(found["value_head.weight"].detach(), step, rtol=1e-4, atol=1e-5)


def test_adam_leaves_the_trunk_alone_too_and_goes_on_with_it_afterwards(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    adam = {"optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 0.01}}, "precision": "bfloat16"}
    trained = backend(tmp_path / "model", tokenizer, **adam)
    before = trained.logprobs(BATCH)
    for _ in range(2):
        trained.train(GIVEN, ValueHeadObjective(CLIP))
    assert torch.equal(trained.logprobs(BATCH), before)
    trained.save(tmp_path / "state")
    resumed = backend(tmp_path / "model", tokenizer, **adam)
    resumed.load(tmp_path / "state")
    for one in (trained, resumed):
        one.train(GIVEN, JOINT)
    assert not torch.equal(trained.logprobs(BATCH), before)
    assert torch.equal(trained.logprobs(BATCH), resumed.logprobs(BATCH))
    assert torch.equal(trained.values(BATCH), resumed.values(BATCH))
