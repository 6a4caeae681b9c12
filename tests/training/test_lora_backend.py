"""The `pytorch` backend with adapters: they alone are trained, saved and compared with; any sampler takes them."""

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.errors import CheckpointError
from nemo_rl.generation.hf import HFGenerator
from nemo_rl.metrics import scalars
from nemo_rl.models.causal_lm import CausalLM
from nemo_rl.models.load import load_causal_lm
from nemo_rl.models.quantize import FrozenLinear
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.loading import Head
from tiny_batches import plain_logprobs, plain_policy_loss, rollout_batch
from tiny_models import embedded_folder, tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

OBJECTIVE = ClippedPolicyObjective(kl_weight=0.1)
PLAIN = tiny_model("qwen2", tie_word_embeddings=True)
BATCH = rollout_batch(PLAIN)
MASK = BATCH.token_columns["loss_mask"]
LORA = {"enabled": True, "dim": 4, "alpha": 8}

type Make = partial[PyTorchBackend]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    PLAIN.save_pretrained(path)
    return path


@pytest.fixture
def make(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Make:
    return partial(backend, folder, tokenizer)


def backend(
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: Head = "language",
    with_reference: bool = False,
    lora: dict[str, Any] | None = None,
    **changes: Any,
) -> PyTorchBackend:
    settings: dict[str, Any] = {
        "model_name": str(source),
        "train_global_batch_size": 9,
        "max_total_sequence_length": 64,
        "precision": "float32",
        "device": "cpu",
        "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 0.02}},
        "generation": {"backend": "hf", "max_new_tokens": 8},
        "dtensor_cfg": {"lora_cfg": LORA | (lora or {})},
    }
    config = PolicyConfig.model_validate(settings | changes)
    return PyTorchBackend(config, str(source), tokenizer, head=head, with_reference=with_reference)


def frozen(trained: PyTorchBackend) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trained.model.module.named_parameters() if not p.requires_grad}


def named(trained: PyTorchBackend) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in trained.named_weights()}


def train(trained: PyTorchBackend, steps: int) -> list[float]:
    return [scalars(trained.train(BATCH, OBJECTIVE))["loss"] for _ in range(steps)]


def test_a_step_is_pefts_step(make: Make, tmp_path: Path) -> None:
    """Plain sequences through PEFT's model with plain SGD, from the same adapter."""
    sgd = {"name": "torch.optim.SGD", "kwargs": {"lr": 0.05}}
    trained = make(optimizer=sgd, max_grad_norm=None)
    train(trained, 1)  # B starts at zero, where A has no gradient
    trained.export(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(PLAIN), tmp_path / "adapter", is_trainable=True).eval()
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    loss = plain_policy_loss(plain_logprobs(theirs, BATCH), BATCH)
    loss.backward()
    optimizer.step()
    before = {name: weight.clone() for name, weight in trained.named_adapter_weights()}
    assert train(trained, 1)[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    for name, weight in trained.named_adapter_weights():
        change, right = weight - before[name], expected[name] - before[name]
        assert right.norm() > 1e-5 and (change - right).norm() < 1e-3 * right.norm(), name


@pytest.mark.parametrize("lora", [{}, {"quantize": "nf4"}, {"quantize": "int8"}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16_autocast"])
def test_only_adapters_change_and_they_learn(make: Make, precision: str, lora: dict[str, str]) -> None:
    trained = make(precision=precision, lora=lora, with_reference=True)
    before, start = frozen(trained), trained.logprobs(BATCH)
    losses = train(trained, 8)
    assert losses[-1] < losses[0] - 0.05
    after = frozen(trained)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    held = {p.dtype for p in trained._masters.parameters}
    assert held == {torch.float32}
    assert all(master is p for master, p in zip(trained._masters.parameters, trained._trained(), strict=True))
    assert sum(p.numel() for p in trained._masters.parameters) == trained.describe()["trained_parameters"] < 8_000
    states = trained._optimizer.state_dict()["state"]
    assert len(states) == len(trained._trained()) == 2 * 14
    with trained.reference():
        assert torch.equal(trained.logprobs(BATCH), start)
    assert (trained.logprobs(BATCH) - start).abs().max() > 0.01


def test_the_reference_is_the_base_model_and_no_second_copy_of_it(make: Make) -> None:
    trained = make(with_reference=True)
    base = plain_logprobs(PLAIN, BATCH).detach()
    assert (trained.logprobs(BATCH) - base)[MASK].abs().max() < 1e-5
    with trained.reference():
        assert torch.equal(trained.logprobs(BATCH), trained.logprobs(BATCH))
    assert trained._reference is not None
    assert sum(weight.numel() for weight in trained._reference._kept) == trained.describe()["trained_parameters"]
    at_start = BATCH.with_columns(reference_logprobs=trained.logprobs(BATCH))
    assert scalars(trained.train(at_start, OBJECTIVE))["reference_kl"] == 0.0


@pytest.mark.parametrize("lora", [{}, {"quantize": "nf4"}])
def test_a_run_resumes_bit_for_bit_from_adapters_alone(make: Make, lora: dict[str, str], tmp_path: Path) -> None:
    settings = {"precision": "bfloat16", "lora": lora}
    through, stopped = make(**settings), make(**settings)
    train(through, 2)
    assert train(stopped, 2)
    stopped.save(tmp_path / "policy")
    resumed = make(**settings)
    resumed.load(tmp_path / "policy")
    assert train(resumed, 2) == train(through, 2)
    assert all(torch.equal(a, b) for a, b in zip(resumed._trained(), through._trained(), strict=True))
    saved = dcp.FileSystemReader(tmp_path / "policy" / "weights").read_metadata().state_dict_metadata
    assert {f"base_model.model.{name}" for name in saved} == dict(through.named_adapter_weights()).keys()


def test_dropout_is_resumed_bit_for_bit_and_scoring_has_none(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    through, stopped, resumed = (backend(folder, tokenizer, lora={"dropout": 0.3}) for _ in range(3))
    assert torch.equal(through.logprobs(BATCH), through.logprobs(BATCH))
    train(through, 1)
    train(stopped, 1)
    stopped.save(tmp_path / "policy")
    resumed.load(tmp_path / "policy")
    torch.manual_seed(5)  # whatever others draw
    assert train(resumed, 3) == train(through, 3)
    assert train(backend(folder, tokenizer), 4)[-1] != train(through, 1)[0]


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"alpha": 16}, "LoRA alpha 8, .* this run trains .*LoRA alpha 16"),
        ({"dim": 2}, "train different weights"),
        ({"target_modules": ["q_proj"]}, "train different weights"),
        ({"quantize": "int8"}, "quantized int8"),
        ({"enabled": False}, "is of another model"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused(make: Make, lora: Any, says: str, tmp_path: Path) -> None:
    make().save(tmp_path / "policy")
    with pytest.raises(CheckpointError, match=says):
        make(lora=lora).load(tmp_path / "policy")


def test_a_checkpoint_beside_other_frozen_weights_is_refused(make: Make, tokenizer: Any, tmp_path: Path) -> None:
    make().save(tmp_path / "policy")
    make(precision="bfloat16").load(tmp_path / "policy")  # the same weights, rounded
    other = tiny_model("qwen2", seed=1, tie_word_embeddings=True)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"is of another model: it holds .*base weights"):
        backend(tmp_path / "other", tokenizer).load(tmp_path / "policy")


@pytest.mark.parametrize("lora", [{}, {"quantize": "nf4"}])
def test_an_export_is_the_merged_model_and_the_adapter(make: Make, lora: Any, folder: Path, tmp_path: Path) -> None:
    trained = make(lora=lora)
    train(trained, 3)
    trained.export(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found = plain_logprobs(merged, BATCH).detach()
    assert (found - trained.logprobs(BATCH))[MASK].abs().max() < 1e-4
    assert {name for name, _ in merged.named_parameters()} == named(trained).keys()
    if not lora:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(PLAIN), tmp_path / "adapter").eval()
        assert (plain_logprobs(theirs, BATCH) - found)[MASK].abs().max() < 1e-4
        assert theirs.peft_config["default"].base_model_name_or_path == str(folder)


def test_a_run_starts_from_an_adapter_which_is_its_reference(make: Make, tmp_path: Path) -> None:
    first = make()
    train(first, 3)
    first.export(tmp_path)
    second = make(lora={"restore_from": str(tmp_path / "adapter")}, with_reference=True)
    start = second.logprobs(BATCH)
    assert torch.equal(start, first.logprobs(BATCH))
    train(second, 2)
    with second.reference():
        assert torch.equal(second.logprobs(BATCH), start)
    assert not torch.equal(second.logprobs(BATCH), start)


def test_a_sampler_of_its_own_takes_the_streamed_weights(make: Make, folder: Path) -> None:
    trained = make()
    train(trained, 3)
    module, _ = load_causal_lm(str(folder), dtype=torch.float32)
    sampler = HFGenerator(CausalLM.wrap(module.eval()))
    sampler.load_weights(trained.named_weights(), 1)
    plain = copy.deepcopy(PLAIN)
    plain.load_state_dict(module.state_dict())
    assert (plain_logprobs(plain, BATCH).detach() - trained.logprobs(BATCH))[MASK].abs().max() < 1e-4


def test_a_critic_on_the_trunk_is_trained_and_saved_beside_the_adapters(make: Make, tmp_path: Path) -> None:
    trained = make(head="language_and_value", lora={"target_modules": ["q_proj"]})
    train(trained, 1)
    assert {name for name, p in trained.model.module.named_parameters() if p.requires_grad and "lora" not in name} == {
        "value_head.weight"
    }
    assert not any(name.startswith("value_head") for name, _ in trained.named_adapter_weights())
    trained.model.module.get_parameter("value_head.weight").data.fill_(0.5)
    trained.save(tmp_path / "policy")
    other = make(head="language_and_value", lora={"target_modules": ["q_proj"]})
    other.load(tmp_path / "policy")
    assert torch.equal(other.values(BATCH), trained.values(BATCH)) and trained.values(BATCH).any()


def test_compressed_weights_take_a_fraction_of_the_memory(make: Make) -> None:
    def held(trained: PyTorchBackend) -> int:
        layers = [layer for layer in trained.model.module.modules() if isinstance(layer, FrozenLinear)]
        parts = [part for layer in layers for part in (layer.weight, layer.scales) if part is not None]
        return sum(part.numel() * part.element_size() for part in parts)

    whole = held(make(precision="bfloat16"))
    assert held(make(precision="bfloat16", lora={"quantize": "int8"})) < 0.55 * whole
    assert held(make(precision="bfloat16", lora={"quantize": "nf4"})) < 0.32 * whole  # a scale to 16 or 32 numbers here
