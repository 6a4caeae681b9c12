"""Whole runs with adapters: SFT, DPO and GRPO learn with them, and what they leave behind is base plus adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_rl.algorithms.launchers import launch
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.registry import RUNS
from tiny_letters import late_reward, make_letters_model  # pyright: ignore[reportImplicitRelativeImport]
from tiny_ppo import ppo_run  # pyright: ignore[reportImplicitRelativeImport]
from tiny_run import assert_same_run, overrides, records, reward_file, saved_tensors  # pyright: ignore[reportImplicitRelativeImport]

LORA = "policy.dtensor_cfg.lora_cfg={enabled: true, dim: 8, alpha: 16}"
RATE = "policy.optimizer.kwargs.lr=0.05"


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of single characters with weights so large that its frozen head can tell them apart."""
    folder = make_letters_model(tmp_path_factory.mktemp("letters"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(30)
    model.save_pretrained(folder)
    return folder


TEMPLATE = (
    "{% for message in messages %}{{ '+' if message.role == 'user' else '-' }}{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}-{% endif %}"
)


def answers(folder: Path, kind: str) -> str:
    """A file that asks for the letter after the prompt's; a wrong answer is the letter before."""
    rows: list[dict[str, str]] = []
    for letter in "bcdefghijklm":
        right, wrong = chr(ord(letter) + 1), chr(ord(letter) - 1)
        named = {"completion": right} if kind == "sft" else {"chosen": right, "rejected": wrong}
        rows.append({"prompt": letter, **named})
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{{name: local, path: '{path}'}}"


def train(model: Path, folder: Path, kind: str, *settings: str) -> list[dict[str, float]]:
    """Twenty steps of all twelve records; the validation before and after."""
    data = answers(folder, kind)
    (folder / "chat.jinja").write_text(TEMPLATE)
    given = [
        f"policy.model_name={model}",
        f"checkpointing.checkpoint_dir={folder / 'run'}",
        "checkpointing.save_period=20",
        f"policy.tokenizer.chat_template='{folder / 'chat.jinja'}'",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.train_global_batch_size=12",
        "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.05, weight_decay: 0.0}}",
        "policy.scheduler=[]",
        f"data.train={data}",
        f"data.validation={data}",
        f"{kind}.max_num_steps=20",
        f"{kind}.val_at_start=true",
        f"{kind}.val_at_end=true",
        "logger.tensorboard_enabled=false",
        LORA,
        *settings,
    ]
    launch(load_config(None, given, RUNS[kind]))
    lines = [line for line in records(folder / "run") if "val/loss" in line]
    return [{name: float(value or 0) for name, value in line.items()} for line in lines]


def assert_base_plus_adapter(exported: Path, base: Path) -> None:
    """What was exported is, bit for bit, the base where no adapter stands, and the base plus the adapter elsewhere."""
    adapter = load_file(exported / "adapter" / "adapter_model.safetensors")
    weights = dict(AutoModelForCausalLM.from_pretrained(exported).named_parameters())
    start = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    assert weights.keys() == start.keys()
    changed = 0
    for name, weight in weights.items():
        own = f"base_model.model.{name.removesuffix('.weight')}"
        expected: Any = start[name]
        if f"{own}.lora_A.weight" in adapter:
            changed += 1
            expected = expected + adapter[f"{own}.lora_B.weight"] @ adapter[f"{own}.lora_A.weight"] * 2.0
            assert (expected - start[name]).abs().max() > 1e-3
        assert torch.equal(weight, expected), name
    assert changed == len(adapter) // 2 >= 7


def test_sft_learns(letters: Path, tmp_path: Path) -> None:
    before, after = train(letters, tmp_path, "sft")
    assert before["val/token_probability"] < 0.05 < 0.5 < after["val/token_probability"]
    assert_base_plus_adapter(tmp_path / "run" / "hf", letters)


def test_sft_with_dropout_and_weights_in_4_bits_learns(letters: Path, tmp_path: Path) -> None:
    lora = "policy.dtensor_cfg.lora_cfg={enabled: true, dim: 8, alpha: 16, dropout: 0.1, quantize: nf4}"
    before, after = train(letters, tmp_path, "sft", lora)
    assert before["val/token_probability"] < 0.05 < 0.3 < after["val/token_probability"]


def test_dpo_learns_and_starts_at_its_reference(letters: Path, tmp_path: Path) -> None:
    before, after = train(letters, tmp_path, "dpo")
    assert before["val/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert before["val/accuracy"] == 0.5 and after["val/accuracy"] > 0.9
    assert_base_plus_adapter(tmp_path / "run" / "hf", letters)


def grpo(model: Path, folder: Path, steps: int, *settings: str) -> None:
    code = "def reward(completion: str) -> float:\n    return sum(map(str.isdigit, completion)) / 4\n"
    more = (
        f"grpo.max_num_steps={steps}",
        "grpo.num_generations_per_prompt=8",
        "policy.generation.max_new_tokens=4",
        "loss_fn.reference_policy_kl_penalty=0.01",
        RATE,
        LORA,
        *settings,
    )
    launch(load_config(None, overrides(model, reward_file(folder.parent, code), folder, *more), GRPOConfig))


def test_grpo_learns_and_starts_at_its_reference(letters: Path, tmp_path: Path) -> None:
    grpo(letters, tmp_path / "run", 20, "checkpointing.export_hf=true")
    lines = records(tmp_path / "run")
    rewards = [line["train/reward/mean"] or 0.0 for line in lines]
    assert rewards[0] < 0.25 and sum(rewards[-3:]) / 3 > 0.6
    kl = [line["train/reference_kl"] or 0.0 for line in lines]
    assert abs(kl[0]) < 1e-9 < 1e-3 < kl[-1]
    assert all((line["train/token_mult_prob_error"] or 0) < 1.0001 for line in lines)  # sampled with the adapter
    assert_base_plus_adapter(tmp_path / "run" / "hf", letters)


def test_grpo_learns_with_weights_in_4_bits(letters: Path, tmp_path: Path) -> None:
    grpo(letters, tmp_path / "run", 20, f"{LORA[:-1]}, quantize: nf4}}")
    lines = records(tmp_path / "run")
    assert (lines[0]["train/reward/mean"] or 0.0) < 0.25 and (lines[-1]["train/reward/mean"] or 0.0) > 0.5
    assert all((line["train/token_mult_prob_error"] or 0) < 1.0001 for line in lines)


def test_grpo_resumes_to_the_same_bits(letters: Path, tmp_path: Path) -> None:
    grpo(letters, tmp_path / "whole", 3)
    for steps in (1, 3):
        grpo(letters, tmp_path / "halves", steps)
    # all records of both, and 14 adapter matrices with two moments each
    assert_same_run(tmp_path / "whole", tmp_path / "halves", 3)


def test_a_reward_model_learns_with_a_whole_head(letters: Path, tmp_path: Path) -> None:
    before, after = train(letters, tmp_path, "rm")
    assert before["val/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert after["val/loss"] < 0.5 and after["val/accuracy"] > 0.7
    assert "base_model.model.score.weight" in load_file(
        tmp_path / "run" / "hf" / "adapter" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_ppo_learns_with_adapters_on_policy_and_critic(kind: str, letters: Path, tmp_path: Path) -> None:
    settings = (f"value={{kind: {kind}}}", LORA, "checkpointing.enabled=true", "policy.optimizer.kwargs.lr=0.03")
    lines = ppo_run(letters, tmp_path, *settings)
    assert (lines[0]["train/reward/mean"] or 0.0) < 0.05 and late_reward(lines) > 0.2
    for part in ("policy", "value") if kind == "separate" else ("policy",):
        saved = saved_tensors(tmp_path / "run", len(lines), part=part)
        heads = {name for name in saved if name.startswith("weights/") and ".lora_" not in name}
        assert len(heads) == (part == "value" or kind == "shared")


def test_two_ranks_sample_with_the_adapters_that_they_share(letters: Path, tmp_path: Path) -> None:
    grpo(letters, tmp_path / "run", 4, "cluster.ranks_per_node=2", "grpo.num_prompts_per_step=4")
    lines = records(tmp_path / "run")
    assert all((line["train/token_mult_prob_error"] or 0) < 1.0001 for line in lines)
    assert abs(lines[0]["train/reference_kl"] or 0.0) < 1e-6 < 1e-3 < (lines[-1]["train/reference_kl"] or 0.0)
    assert len(saved_tensors(tmp_path / "run", 4)) == 14 * (1 + 3)
