"""Reward models and critics: their numbers are those of plain Transformers, however sequences are laid out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nemo_rl.config.schema.policy import TrainedPolicyConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import BackendError, CheckpointError, ModelError
from nemo_rl.metrics import scalars
from nemo_rl.models.load import load_scalar_model
from nemo_rl.models.scalar_model import ScalarModel
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.value import ValueObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.loading import Head
from tiny_batches import rollout_batch
from tiny_models import embedded_folder, tiny_config, tiny_model

POLICY = tiny_model("qwen2", tie_word_embeddings=True)
_ROLLOUTS = rollout_batch(POLICY, temperature=1.0)
RETURNS = torch.linspace(-1, 2, _ROLLOUTS.num_tokens)
BATCH = _ROLLOUTS.with_columns(old_values=torch.zeros_like(RETURNS), returns=RETURNS)
MASK = BATCH.token_columns["loss_mask"]


def scorer_model(family: str = "qwen2") -> PreTrainedModel:
    """A random classifier with one label, whose weights are none of them zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_config(tiny_config(family, num_labels=1)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


def backend(folder: Path, tokenizer: PreTrainedTokenizerBase, head: Head, **changes: Any) -> PyTorchBackend:
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
    return PyTorchBackend(config, str(folder), tokenizer, head=head)


def plain_values(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The value before each loss token, [M], with gradient, one sequence at a time."""
    lengths, mask = batch.lengths.tolist(), batch.token_columns["loss_mask"]
    values: list[Tensor] = []
    for tokens, asked in zip(batch.token_ids.split(lengths), mask.split(lengths), strict=True):
        hidden = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        values.append(model.get_submodule("score")(hidden[asked.nonzero()[:, 0] - 1])[:, 0])
    return torch.cat(values)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
@pytest.mark.parametrize("changes", [{}, {"logprob_mb_tokens": 30}, {"share_prefixes": False}])
def test_values_are_those_of_plain_transformers(
    family: str, changes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = scorer_model(family)
    model.save_pretrained(tmp_path)
    values = backend(tmp_path, tokenizer, "scalar", **changes).values(BATCH)
    assert values.shape == (BATCH.num_tokens,) and not values[~MASK].any()
    torch.testing.assert_close(values[MASK], plain_values(model, BATCH).detach(), rtol=1e-5, atol=1e-5)
    assert values[MASK].std() > 1e-2


def test_a_score_is_the_value_before_a_token_that_is_never_computed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = scorer_model()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(3, 128, (11,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = model(input_ids=tokens[None]).logits[0, 0]
    batch = TokenBatch(
        token_ids=torch.cat([tokens, torch.zeros(1, dtype=torch.int64)]),
        cu_seqlens=torch.tensor([0, 12]),
        group_ids=torch.zeros(1, dtype=torch.int64),
        token_columns={"loss_mask": torch.arange(12) == 11},
    )
    torch.testing.assert_close(backend(tmp_path, tokenizer, "scalar").values(batch)[11], pooled)


@pytest.mark.parametrize("changes", [{}, {"train_mb_tokens": 30}, {"share_prefixes": False}])
def test_a_critic_takes_the_plain_step(
    changes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = scorer_model()
    model.save_pretrained(tmp_path)
    trained = backend(tmp_path, tokenizer, "scalar", **changes)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    loss = 0.5 * (plain_values(model, BATCH) - RETURNS[MASK]).square().mean()
    loss.backward()
    metrics = scalars(trained.train(BATCH, ValueObjective(clip=None)))
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    found = dict(trained.named_weights())
    assert found.keys() == start.keys()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.norm() > 0, name
        step = start[name] - 0.1 * weight.grad
        assert (found[name] - step).norm() < 1e-5 * step.norm(), name


def test_a_missing_score_starts_at_zero_and_what_is_saved_loads_in_transformers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    POLICY.save_pretrained(tmp_path / "policy")
    trained = backend(tmp_path / "policy", tokenizer, "scalar")
    assert not trained.values(BATCH).any()
    trained.train(BATCH, ValueObjective(clip=None))
    values = trained.values(BATCH)
    assert values[MASK].std() > 0
    trained.export(tmp_path / "hf")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert loaded.config.num_labels == 1 and loaded.config.pad_token_id is not None
    torch.testing.assert_close(plain_values(loaded, BATCH).detach(), values[MASK], rtol=1e-5, atol=1e-6)


def test_a_value_head_shares_the_trunk_and_stays_out_of_the_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    POLICY.save_pretrained(tmp_path / "policy")
    joint = backend(tmp_path / "policy", tokenizer, "language_and_value")
    plain = backend(tmp_path / "policy", tokenizer, "language")
    assert torch.equal(joint.logprobs(BATCH), plain.logprobs(BATCH))
    for _ in range(2):  # with a head of zeros the first step does not reach the trunk
        joint.train(BATCH, ValueObjective(clip=None))
    assert joint.values(BATCH)[MASK].std() > 0
    assert not torch.equal(joint.logprobs(BATCH), plain.logprobs(BATCH))
    assert dict(joint.named_weights()).keys() == dict(plain.named_weights()).keys()
    joint.export(tmp_path / "hf")
    assert not [name for name in load_file(tmp_path / "hf" / "model.safetensors") if "value" in name.split(".")[0]]
    exported = backend(tmp_path / "hf", tokenizer, "language")
    torch.testing.assert_close(exported.logprobs(BATCH), joint.logprobs(BATCH))
    joint.save(tmp_path / "state")
    resumed = backend(tmp_path / "policy", tokenizer, "language_and_value")
    resumed.load(tmp_path / "state")
    assert torch.equal(resumed.values(BATCH), joint.values(BATCH))
    with pytest.raises(CheckpointError, match=r"train different weights, the first is value_head\.weight"):
        plain.load(tmp_path / "state")


def test_a_model_without_the_head_that_is_read_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    POLICY.save_pretrained(tmp_path)
    with pytest.raises(BackendError, match=r"reads values, for which Qwen2ForCausalLM has no head"):
        backend(tmp_path, tokenizer, "language").values(BATCH)
    with pytest.raises(BackendError, match=r"reads logprobs, for which Qwen2ForSequenceClassification has no head"):
        backend(tmp_path, tokenizer, "scalar").train(BATCH, ClippedPolicyObjective())


def test_a_classifier_of_several_labels_or_none_is_refused(tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_config(tiny_config("qwen2", num_labels=3)).save_pretrained(tmp_path / "3")
    with pytest.raises(ModelError, match=r"cannot load a model with a score"):
        load_scalar_model(str(tmp_path / "3"), dtype=torch.float32)
    with pytest.raises(ModelError, match=r"MambaForCausalLM has no linear head `score`"):
        ScalarModel.wrap(tiny_model("mamba"))
