"""The GRPO loop: what it logs, what moves the weights, and that it learns."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import nemo_rl.algorithms.grpo as loop
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import RolloutError
from nemo_rl.interfaces import Objective
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.logprobs import Reads, TokenOutputs
from tiny_run import (  # pyright: ignore[reportImplicitRelativeImport]
    VOWELS,
    launch,
    overrides,
    records,
    reward_file,
    rollouts,
    saved_tensors,
)

# What every step of reinforcement learning logs.
EVERY_STEP = """
reward/mean reward/std rewards/reward advantages/mean advantages/min advantages/max response_length/mean
response_length/max share_truncated share_no_spread entropy policy_kl clip_share_low clip_share_high ratio_min ratio_max
token_mult_prob_error rollout_kl importance_weight_mean importance_weight_max importance_weight_ess grad_norm
learning_rate tokens loss_tokens tokens_computed tokens_sampled tokens_collected staleness/mean staleness/max loss
policy_loss dropped_groups optimizer_steps reward/min reward/max shaped_reward/mean shaped_reward/min shaped_reward/max
importance_weight_min share_filtered num_skipped packing_fill tokens_computed_per_token
"""
EVERY_STEP_TIMING = """
generate_seconds environment_seconds train_seconds step_seconds tokens_per_second generate_tokens_per_second
train_tokens_per_second
"""
SUMMARY = """
accuracy_before accuracy_after accuracy_base_best_prompt steps seconds_total seconds_by_phase tokens_per_second
peak_memory_bytes peak_memory_bytes_by_phase seed reward_before reward_after
"""
NEEDS_A_JUDGE_OF_RIGHT_AND_WRONG = ["accuracy_before", "accuracy_after", "accuracy_base_best_prompt"]
# Vowels where the sum is odd, else 1 for every answer: some groups are uniform, some are not.
SOMETIMES_UNIFORM = VOWELS.replace("completion: str", "completion: str, ground_truth: str").replace(
    "    return", "    if int(ground_truth) % 2:\n        return 1.0\n    return"
)
PLAIN_SGD = "policy.optimizer={name: torch.optim.SGD, kwargs: {lr: 50.0}}"


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in saved_tensors(folder, step).items() if name.startswith("weights/")}


def test_the_loop_fits_on_a_screen_and_knows_no_hardware() -> None:
    text = Path(loop.__file__).read_text()
    assert len(text.splitlines()) <= 100
    assert not any(word in text for word in ("colocated", "executor", "ray", "cuda"))


def test_a_run_leaves_every_record_it_promises(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "{name: arithmetic, num_samples: 4, environment: function}"
    folder = tmp_path / "run"
    settings = (
        f"data.validation={few}",
        f"data.test={few}",
        "grpo.val_period=2",
        "grpo.val_at_start=true",
        "grpo.val_at_end=true",
        "grpo.report_base_model=true",
        "logger.tensorboard_enabled=true",
        "logger.print_sample_period=2",
        "checkpointing.export_hf=true",
    )
    outcome = launch(overrides(tiny_llama, reward_file(tmp_path), folder, *settings))

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/reward/mean" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    names = [f"train/{name}" for name in EVERY_STEP.split()] + [f"timing/{name}" for name in EVERY_STEP_TIMING.split()]
    for line in steps:
        assert [name for name in names if line.get(name) is None] == []
        assert line["train/staleness/mean"] == 0
    assert [line["step"] for line in lines if "val/reward" in line] == [0, 2, 3]
    assert [line["step"] for line in lines if "before/test/reward" in line] == [0]
    assert [line["after/test/reward"] for line in lines if "after/test/reward" in line] == [outcome.reward_after]

    summary = json.loads((folder / "summary.json").read_text())
    assert [name for name in SUMMARY.split() if name not in summary] == []
    (before,) = (line["before/test/reward"] for line in lines if "before/test/reward" in line)
    assert summary["reward_before"] == before == outcome.reward_before
    assert summary["reward_after"] == outcome.reward_after not in (None, before)
    assert [name for name in SUMMARY.split() if summary[name] is None] == NEEDS_A_JUDGE_OF_RIGHT_AND_WRONG
    assert sum(summary["seconds_by_phase"].values()) <= summary["seconds_total"]

    assert list(rollouts(folder)) == ["step_1.jsonl", "step_2.jsonl", "step_3.jsonl"]
    assert all(text.count("\n") == 12 for text in rollouts(folder).values())
    assert list((folder / "tensorboard").glob("events*"))
    assert (folder / "config.yaml").read_text() == (folder / "step_3" / "config.yaml").read_text()
    assert "step 2/3" in (printed := capsys.readouterr().out) and str(folder / "step_3") in printed

    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    prompt = tokenizer("What is 1 + 1?", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    exported = load_file(folder / "hf" / "model.safetensors")
    for name, tensor in weights(folder, 3).items():
        assert torch.equal(exported[name.removeprefix("weights/")], tensor)


@pytest.mark.parametrize("steps_per_batch", [1, 3])
def test_uniform_groups_change_no_weight_whether_they_are_computed_or_not(
    tiny_llama: Path, tmp_path: Path, steps_per_batch: int
) -> None:
    figures: list[dict[str, float | None]] = []
    for skip in ("true", "false"):
        settings = (
            f"grpo.skip_uniform_groups={skip}",
            "grpo.num_prompts_per_step=6",
            f"policy.train_global_batch_size={24 // steps_per_batch}",
            "grpo.max_num_steps=1",
            PLAIN_SGD,
        )
        launch(overrides(tiny_llama, reward_file(tmp_path, SOMETIMES_UNIFORM), tmp_path / skip, *settings))
        figures.append(records(tmp_path / skip)[0])
    skipped, computed = figures
    assert 0 < (skipped["train/share_no_spread"] or 0) < 1
    assert (skipped["train/loss_tokens"] or 0) < (computed["train/loss_tokens"] or 0)
    if steps_per_batch == 1:
        assert skipped["train/loss"] == pytest.approx(computed["train/loss"], rel=1e-4)
        assert skipped["train/grad_norm"] == pytest.approx(computed["train/grad_norm"], rel=1e-4)

    before = load_file(tiny_llama / "model.safetensors")
    one, other = weights(tmp_path / "true", 1), weights(tmp_path / "false", 1)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)
    moved = max(float((one[f"weights/{name}"] - tensor).abs().max()) for name, tensor in before.items())
    assert moved > 1e-3


def test_a_step_without_any_spread_moves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    always_one = "def reward(completion: str) -> float:\n    return 1.0\n"
    launch(overrides(tiny_llama, reward_file(tmp_path, always_one), tmp_path / "run", "grpo.max_num_steps=2"))
    assert [line["train/optimizer_steps"] for line in records(tmp_path / "run")] == [0, 0]
    before = load_file(tiny_llama / "model.safetensors")
    for name, tensor in weights(tmp_path / "run", 2).items():
        assert torch.equal(tensor, before[name.removeprefix("weights/")])


def test_later_minibatches_compare_with_the_weights_that_sampled(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ("grpo.max_num_steps=2", "policy.train_global_batch_size=4", "policy.optimizer.kwargs.lr=0.03")
    launch(overrides(tiny_llama, reward_file(tmp_path), tmp_path / "run", *settings))
    for line in records(tmp_path / "run"):
        assert line["train/optimizer_steps"] == 3
        assert (line["train/ratio_max"] or 0) > 1.05  # the weights have moved since
        assert (line["train/token_mult_prob_error"] or 0) < 1.0001  # but the old log-probabilities have not


def test_the_kl_term_pulls_towards_the_weights_that_the_run_started_from(tiny_llama: Path, tmp_path: Path) -> None:
    penalty = "loss_fn.reference_policy_kl_penalty=0.1"
    folder = tmp_path / "run"
    launch(overrides(tiny_llama, reward_file(tmp_path), folder, penalty, "grpo.max_num_steps=2"))
    launch(overrides(tiny_llama, reward_file(tmp_path), folder, penalty, "grpo.max_num_steps=3"))
    first, second, third = (line["train/reference_kl"] or 0.0 for line in records(folder))
    assert abs(first) < 1e-9 < 1e-5 < second < third  # the third comes after a resume: the reference is still the start


FAILING = VOWELS.replace("completion: str", "completion: str, ground_truth: str").replace(
    "    return", "    if int(ground_truth) % 3 == 0:\n        {failure}\n    return"
)


@pytest.mark.parametrize("failure", ["raise ValueError('no idea')", "return float('nan')"])
def test_groups_that_cannot_be_judged_are_dropped_whole_and_counted(
    tiny_llama: Path, tmp_path: Path, failure: str
) -> None:
    reward = reward_file(tmp_path, FAILING.format(failure=failure))
    launch(overrides(tiny_llama, reward, tmp_path / "run", "grpo.max_failed_group_share=0.9"))
    lines = records(tmp_path / "run")
    dropped = [int(line["train/dropped_groups"] or 0) for line in lines]
    assert len(lines) == 3 and sum(dropped) > 0
    assert [text.count("\n") for text in rollouts(tmp_path / "run").values()] == [4 * (3 - count) for count in dropped]
    assert [line.get("train/dropped_groups/environment_failure", 0) for line in lines] == dropped


def test_a_judge_that_fails_for_good_stops_the_run_and_leaves_its_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    broken = f"import itertools\n{VOWELS}".replace(
        "    return", "    if next(calls) >= 24:\n        raise OSError('gone')\n    return"
    )
    reward = reward_file(tmp_path, f"{broken}\ncalls = itertools.count()\n")
    folder = tmp_path / "run"
    with pytest.raises(RolloutError, match=r"3 of 3 groups of step 3 failed .* OSError: gone") as error:
        launch(overrides(tiny_llama, reward, folder, "checkpointing.save_period=2"))
    assert error.value.exit_code == 1
    assert [line["step"] for line in records(folder)] == [1, 2]
    assert launch(overrides(tiny_llama, reward_file(tmp_path), folder)).step == 3


class Negated:
    """An objective with the sign of its loss turned round."""

    reads: ClassVar[Reads] = "logprobs"

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.on_policy, self.kl_weight = True, 0.0

    def __call__(self, outputs: TokenOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        loss, metrics = self._objective(outputs, tokens)
        return -loss, metrics


def upper_case_share(tiny_llama: Path, folder: Path) -> float:
    """The mean reward of the last five steps when upper-case letters are rewarded; untrained, it is 0.07."""
    code = VOWELS.replace('letter in "aeiou"', "letter.isupper()")
    settings = (
        "grpo.max_num_steps=36",
        "grpo.num_generations_per_prompt=8",
        "policy.optimizer.kwargs.lr=0.03",
        "checkpointing.enabled=false",
    )
    launch(overrides(tiny_llama, reward_file(folder, code), folder / "run", *settings))
    return sum(line["train/reward/mean"] or 0.0 for line in records(folder / "run")[-5:]) / 5


def test_a_run_learns_what_is_rewarded(tiny_llama: Path, tmp_path: Path) -> None:
    assert upper_case_share(tiny_llama, tmp_path) > 0.3


def test_a_run_with_the_sign_of_the_loss_turned_round_does_not(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loop.grpo_objective

    def wrong(config: GRPOConfig) -> Negated:
        return Negated(right(config))

    monkeypatch.setattr(loop, "grpo_objective", wrong)
    assert upper_case_share(tiny_llama, tmp_path) < 0.15
