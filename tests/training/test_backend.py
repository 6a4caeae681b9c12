"""The `pytorch` backend takes the plain optimizer step, whatever the precision, and survives what goes wrong."""

import copy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nemo_rl.config.schema.policy import PolicyConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import BackendError, CheckpointError
from nemo_rl.metrics import Metrics, scalars
from nemo_rl.objectives.logprobs import Reads, TokenOutputs
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.training.pytorch.backend import PyTorchBackend
from nemo_rl.training.pytorch.loading import choose_device
from tiny_batches import plain_logprobs, plain_policy_loss, rollout_batch
from tiny_models import embedded_folder, tiny_model

OBJECTIVE = ClippedPolicyObjective(kl_weight=0.1)
PLAIN = tiny_model("qwen2", tie_word_embeddings=True)
BATCH = rollout_batch(PLAIN, temperature=0.8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_folder())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    PLAIN.save_pretrained(path)
    return path


type Make = partial[PyTorchBackend]


@pytest.fixture
def make(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Make:
    """Make a backend: `make()`, or with changes to the `policy` section."""
    return partial(backend, folder, tokenizer)


def backend(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, with_reference: bool = False, **changes: Any
) -> PyTorchBackend:
    settings: dict[str, Any] = {
        "model_name": str(folder),
        "train_global_batch_size": 9,
        "max_total_sequence_length": 64,
        "precision": "float32",
        "max_grad_norm": None,
        "device": "cpu",
        "optimizer": {"name": "torch.optim.SGD", "kwargs": {"lr": 1.0}},
        "generation": {"backend": "hf", "max_new_tokens": 8, "temperature": 0.8},
    }
    config = PolicyConfig.model_validate(settings | changes)
    return PyTorchBackend(config, str(folder), tokenizer, with_reference=with_reference)


def weights(trained: PyTorchBackend | PreTrainedModel) -> dict[str, Tensor]:
    named = trained.named_weights() if isinstance(trained, PyTorchBackend) else trained.named_parameters()
    return {name: weight.detach().clone() for name, weight in named}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in tensors.values()])


ADAMW = {"optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 0.01}}}


@pytest.mark.parametrize("changes", [{}, {"train_mb_tokens": 30}, {"share_prefixes": False, "logprob_chunk_size": 5}])
def test_training_is_the_plain_loop_on_single_sequences(make: Make, changes: dict[str, Any]) -> None:
    trained = make(**changes)
    plain = copy.deepcopy(PLAIN)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    loss = plain_policy_loss(plain_logprobs(plain, BATCH, temperature=0.8), BATCH)
    loss.backward()
    optimizer.step()
    assert scalars(trained.train(BATCH, OBJECTIVE))["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    expected, start = weights(plain), weights(PLAIN)
    for name, weight in weights(trained).items():
        assert (expected[name] - start[name]).norm() > 1e-2 * start[name].norm(), name
        assert (weight - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def updates(trained: PyTorchBackend) -> Tensor:
    """What one step with learning rate 1 changes, in the float32 weights that the optimizer steps."""
    masters = trained._masters.named
    before = flat(masters).detach().clone()
    trained.train(BATCH, OBJECTIVE)
    return flat(masters).detach() - before


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16_autocast"])
def test_bfloat16_is_close_to_float32_and_micro_batches_hardly_change_it(make: Make, precision: str) -> None:
    exact = updates(make())
    whole = updates(make(precision=precision))
    parts = updates(make(precision=precision, train_mb_tokens=30))
    assert (parts - whole).norm() < 1e-2 * whole.norm()
    assert torch.cosine_similarity(whole, exact, dim=0) > 0.99
    logprobs = make(precision=precision).logprobs(BATCH)
    assert (logprobs - make().logprobs(BATCH)).abs().max() < 0.5
    assert logprobs.dtype == torch.float32


def test_small_steps_add_up_behind_bfloat16_weights(make: Make) -> None:
    trained = make(precision="bfloat16", optimizer={"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-5}})
    start = {name: master.detach().clone() for name, master in trained._masters.named.items()}
    for _ in range(3):
        trained.train(BATCH, OBJECTIVE)
    for name, master in trained._masters.named.items():
        assert (master != start[name]).float().mean() > 0.5, name
        assert torch.equal(weights(trained)[name], master.bfloat16())


def test_gradients_are_clipped_to_the_norm_and_measured_before(make: Make) -> None:
    free = updates(make()).norm().item()
    clipped = make(max_grad_norm=free / 3)
    masters = clipped._masters.named
    before = flat(masters).detach().clone()
    metrics = scalars(clipped.train(BATCH, OBJECTIVE))
    assert (flat(masters).detach() - before).norm().item() == pytest.approx(free / 3, rel=1e-3)
    assert metrics["grad_norm"] == pytest.approx(free, rel=1e-3)


def test_the_schedule_moves_once_a_step(make: Make) -> None:
    warmup = {"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"start_factor": 0.25, "total_iters": 3}}
    trained = make(scheduler=[warmup], train_mb_tokens=30)
    rates = [scalars(trained.train(BATCH, OBJECTIVE))["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_a_schedule_that_is_too_short_says_so(make: Make) -> None:
    short = {"name": "torch.optim.lr_scheduler.OneCycleLR", "kwargs": {"max_lr": 0.1, "total_steps": 2}}
    trained = make(scheduler=[short])
    for _ in range(2):
        trained.train(BATCH, OBJECTIVE)
    with pytest.raises(BackendError, match=r"cannot go on after optimizer step 3: .*make policy\.scheduler as long"):
        trained.train(BATCH, OBJECTIVE)


def test_the_settings_decide_what_is_computed_once(make: Make) -> None:
    # prompts of 9, 15 and 20 tokens (6 of them common), answers of 2, 6 and 11, last token left out
    def computed(**changes: Any) -> float:
        return scalars(make(**changes).train(BATCH, OBJECTIVE))["tokens_computed"]

    branches, copies = 2 * (1 + 5 + 10) + (1 + 10), 2 * (1 + 5 + 10) + (1 + 1 + 10)
    assert computed() == 9 + 15 + 20 + branches
    assert computed(min_shared_prefix=5) == 6 + 3 * 3 + 9 + 14 + branches  # and its own 3 of one are too few
    assert computed(share_prefixes=False) == 3 * (9 + 15 + 20) + copies


def test_each_kind_of_pass_has_its_own_budget_of_tokens(make: Make) -> None:
    def passes(**changes: int) -> tuple[int, int]:
        """Forward passes of a training step and of a pass without gradient."""
        trained, calls = make(**changes), []
        trained.model.trunk.register_forward_hook(lambda *_: calls.append(1))
        trained.train(BATCH, OBJECTIVE)
        in_training = len(calls)
        trained.logprobs(BATCH)
        return in_training, len(calls) - in_training

    assert passes() == (1, 1)
    assert passes(train_mb_tokens=1) == (9, 1)
    assert passes(logprob_mb_tokens=1) == (1, 9)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_reference_keeps_the_starting_weights_and_gives_the_current_ones_back(make: Make, precision: str) -> None:
    trained = make(with_reference=True, precision=precision, **ADAMW)
    start = current = trained.logprobs(BATCH)
    for _ in range(2):
        trained.train(BATCH, OBJECTIVE)
        current, current_weights = trained.logprobs(BATCH), weights(trained)
        with trained.reference():
            assert torch.equal(trained.logprobs(BATCH), start)
        with pytest.raises(KeyboardInterrupt), trained.reference():
            raise KeyboardInterrupt
        assert_equal(weights(trained), current_weights)
        assert torch.equal(trained.logprobs(BATCH), current)
    assert not torch.equal(current, start)
    twin = make(precision=precision, **ADAMW)  # that never looked at a reference
    for _ in range(2):
        twin.train(BATCH, OBJECTIVE)
    assert_equal(weights(twin), weights(trained))


def test_a_reference_that_was_not_kept_is_refused(make: Make) -> None:
    with pytest.raises(BackendError, match="reference_policy_kl_penalty"), make().reference():
        pass


class Failing:
    """An objective that goes wrong in its second micro-batch."""

    reads: ClassVar[Reads] = "logprobs"

    def __init__(self, how: str) -> None:
        self.how = how
        self.calls = 0

    def __call__(self, outputs: TokenOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        self.calls += 1
        loss, metrics = OBJECTIVE(outputs, tokens)
        if self.calls == 2:
            match self.how:
                case "loss":
                    loss = loss * torch.nan
                case "gradient":  # the slope of a square root at 0 is infinite
                    loss = (outputs.policy_logprobs - outputs.policy_logprobs.detach()).sqrt()
                case _:
                    raise ArithmeticError("the objective is broken")
        return loss, metrics


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("loss", BackendError, "the loss is nan"),
        ("gradient", BackendError, "the gradient norm is (nan|inf)"),
        ("exception", ArithmeticError, "broken"),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_failed_step_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(
    make: Make, precision: str, how: str, error: type[Exception], words: str
) -> None:
    trained, fresh = (make(precision=precision, train_mb_tokens=40, **ADAMW) for _ in range(2))
    start = weights(trained)
    failing = Failing(how)
    with pytest.raises(error, match=words):
        trained.train(BATCH, failing)
    assert failing.calls >= 2
    assert_equal(weights(trained), start)
    trained.train(BATCH, OBJECTIVE)
    fresh.train(BATCH, OBJECTIVE)
    assert_equal(weights(trained), weights(fresh))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_training_is_bitwise_the_uninterrupted_one(make: Make, tmp_path: Path, precision: str) -> None:
    decay = {"name": "torch.optim.lr_scheduler.ExponentialLR", "kwargs": {"gamma": 0.5}}
    start = partial(make, precision=precision, scheduler=[decay], with_reference=True, **ADAMW)
    first = start()
    for _ in range(2):
        first.train(BATCH, OBJECTIVE)
    first.save(tmp_path / "policy")
    resumed = start()
    resumed.load(tmp_path / "policy")
    assert torch.equal(resumed.logprobs(BATCH), first.logprobs(BATCH))
    for _ in range(2):
        assert scalars(first.train(BATCH, OBJECTIVE)) == scalars(resumed.train(BATCH, OBJECTIVE))
    assert_equal(weights(resumed), weights(first))
    with first.reference(), resumed.reference():
        assert torch.equal(resumed.logprobs(BATCH), first.logprobs(BATCH))


def test_an_export_is_the_trained_model_for_plain_transformers(make: Make, tmp_path: Path) -> None:
    trained = make(**ADAMW)
    trained.train(BATCH, OBJECTIVE)
    trained.export(tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert_equal(weights(exported), weights(trained))
    mask = BATCH.token_columns["loss_mask"]
    expected = plain_logprobs(exported, BATCH, temperature=0.8)[mask]
    torch.testing.assert_close(trained.logprobs(BATCH)[mask], expected, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template


def test_a_checkpoint_of_another_model_is_refused(make: Make, tmp_path: Path) -> None:
    make(**ADAMW).save(tmp_path / "policy")
    tiny_model("qwen2", hidden_size=40, tie_word_embeddings=True).save_pretrained(tmp_path / "other")
    other = backend(tmp_path / "other", make.args[1], **ADAMW)
    with pytest.raises(CheckpointError, match="of another model"):
        other.load(tmp_path / "policy")


def test_a_backend_describes_itself(make: Make) -> None:
    described = make().describe()
    assert described["parameters"] == sum(parameter.numel() for parameter in PLAIN.parameters())
    assert (described["device"], described["precision"]) == ("cpu", "float32")
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
