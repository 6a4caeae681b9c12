"""The plan of a dry run: its token counts by hand, its parameter counts against Transformers'."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_rl.config.load import load_config
from nemo_rl.config.model_shapes import ModelShape, model_shape
from nemo_rl.config.plan import batch_rows, memory_bytes, memory_rows, render_plan
from nemo_rl.config.schema.algorithms import GRPOConfig


def load(*overrides: str) -> GRPOConfig:
    return load_config(None, overrides, GRPOConfig).config


FAMILIES = {
    "llama": {"attention_bias": False},
    "qwen2": {},
    "qwen3": {"head_dim": 48},
    "mistral": {"head_dim": 32},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameter_count_is_that_of_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    config = AutoConfig.for_model(family, tie_word_embeddings=tied, **sizes, **FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shape = model_shape(str(tmp_path))
    assert shape is not None
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_well_known_models_have_their_published_size() -> None:
    published = {
        "embedded:SmolLM2-135M-Instruct": 134_515_008,
        "Qwen/Qwen2.5-1.5B": 1_543_714_304,
        "Qwen/Qwen2.5-7B": 7_615_616_512,
        "Qwen/Qwen3-0.6B": 596_049_920,
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    }
    found = {name: shape.parameters for name in published if (shape := model_shape(name))}
    assert found == published


def test_batch_plan_counts_tokens() -> None:
    config = load(
        "grpo.num_prompts_per_step=4",
        "grpo.num_generations_per_prompt=6",
        "policy.train_global_batch_size=12",
        "policy.max_total_sequence_length=100",
        "policy.generation.max_new_tokens=20",
        "policy.train_mb_tokens=256",
    )
    rows = dict(batch_rows(config))
    assert rows["rollouts per step"].startswith("24 ")
    assert rows["optimizer steps per step"] == "2 (12 rollouts each)"
    assert rows["generated per step"].startswith("at most 480 tokens")
    assert "at most 800 tokens computed, 2,400" in rows["trained per step"]  # 4 x 80 + 24 x 20 against 24 x 100
    assert rows["micro-batches"].startswith("at most 2 ")  # 400 tokens in micro-batches of 256


def test_memory_follows_precision_and_optimizer() -> None:
    shape = ModelShape(8, 1, 8, 2, 1, 4, 10)
    count = shape.parameters
    pure = memory_bytes(load(), shape)
    assert [pure[part] for part in ("weights", "master weights", "gradients", "optimizer moments")] == [
        2 * count,
        4 * count,
        4 * count,
        8 * count,
    ]
    plain = memory_bytes(load("policy.precision=float32", "policy.optimizer.name=torch.optim.SGD"), shape)
    assert plain["weights"] == 4 * count
    assert not {"master weights", "optimizer moments", "reference weights"} & plain.keys()
    with_reference = memory_bytes(load("loss_fn.reference_policy_kl_penalty=0.1"), shape)
    assert with_reference["reference weights"] == with_reference["weights"]


def test_an_unknown_model_has_a_plan_without_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "something_new"}))
    for name in ("someone/Unheard-Of-3B", str(tmp_path)):
        config = load(f"policy.model_name='{name}'")
        assert "size unknown" in dict(memory_rows(config, model_shape(name)))["model"]
        assert "batch plan" in render_plan(config)
