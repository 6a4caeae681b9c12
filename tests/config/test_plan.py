"""The plan of a dry run: its token counts by hand, its parameter counts against Transformers'."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_rl.config.load import load_config
from nemo_rl.config.model_shapes import ModelShape, model_shape
from nemo_rl.config.plan import batch_plan, batch_rows, host_bytes, memory_bytes, memory_rows, render_plan
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.policy import PackingAlgorithm
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.bins import PACKERS
from nemo_rl.data.micro_batches import micro_batches
from nemo_rl.data.packing import build_stream


def load(*overrides: str) -> GRPOConfig:
    return load_config(None, overrides, GRPOConfig).config


SHORT_PROMPT = "data.max_input_seq_length=7"
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
    assert rows["generated per step"].startswith("480 tokens")
    assert rows["trained per step"].startswith("776 tokens computed, 2,400")  # 4 x 80 + 24 x 19 against 24 x 100
    assert rows["micro-batches"] == "2 per optimizer step, of up to 194 tokens"  # 80 + 6 x 19 each


@pytest.mark.parametrize("budget", [100, 150, 200, 233, 400, 500, 1000])
@pytest.mark.parametrize("setting", ["policy.share_prefixes=true", "policy.share_prefixes=false", SHORT_PROMPT])
@pytest.mark.parametrize("algorithm", PACKERS)
def test_the_plan_is_what_the_micro_batches_of_a_step_come_to(
    budget: int, setting: str, algorithm: PackingAlgorithm
) -> None:
    sizes = ("grpo.num_prompts_per_step=6", "grpo.num_generations_per_prompt=5", "policy.train_global_batch_size=15")
    lengths = ("policy.max_total_sequence_length=100", "policy.generation.max_new_tokens=20")
    packing = f"policy.sequence_packing.algorithm={algorithm}"
    config = load(*sizes, *lengths, setting, packing, f"policy.train_mb_tokens={budget}")
    plan, policy, prompt = batch_plan(config), config.policy, config.max_prompt_tokens
    rows = [  # full length, and nothing in common but the prompt
        torch.cat([torch.arange(prompt) + 1000 * group, torch.arange(20) + 100_000 + 100 * (5 * group + answer)])
        for group in range(3)
        for answer in range(5)
    ]
    batch = TokenBatch(
        torch.cat(rows),
        torch.arange(16) * (prompt + 20),
        torch.arange(3).repeat_interleave(5),
        {"loss_mask": (torch.arange(prompt + 20) >= prompt).repeat(15)},
    )
    sharing = {"share_prefixes": policy.share_prefixes, "min_shared": policy.min_shared_prefix}
    parts = list(micro_batches(batch, max_tokens=budget, algorithm=algorithm, **sharing))
    computed = [len(build_stream(part, **sharing).input_ids) for part in parts]
    assert (plan.microbatches, plan.largest, plan.computed) == (len(parts), max(computed), 2 * sum(computed))


def test_memory_follows_precision_and_optimizer() -> None:
    shape = ModelShape(8, 1, 8, 2, 1, 4, 10)
    count = shape.parameters
    chunk = "policy.logprob_chunk_size=256"
    pure = memory_bytes(load("policy.precision=bfloat16", chunk), shape)
    assert [pure[part] for part in ("weights", "master weights", "gradients", "optimizer moments")] == [
        2 * count,
        4 * count,
        4 * count,
        8 * count,
    ]
    plain = memory_bytes(load("policy.precision=float32", "policy.optimizer.name=torch.optim.SGD"), shape)
    assert plain["weights"] == 4 * count
    assert not {"master weights", "optimizer moments", "reference weights"} & plain.keys()
    on_gpu = memory_bytes(load("cluster.gpus_per_node=1", chunk), shape)
    assert on_gpu == pure  # `auto` on a GPU
    assert memory_bytes(load(), shape) == memory_bytes(load("policy.precision=float32"), shape)
    with_reference = memory_bytes(load("loss_fn.reference_policy_kl_penalty=0.1"), shape)
    assert with_reference["reference weights"] == with_reference["weights"]


def test_memory_is_that_of_one_rank_and_the_placement_names_them() -> None:
    shape = ModelShape(8, 1, 8, 2, 1, 4, 10)
    sizes = ("tensor_parallel_size: 2", "context_parallel_size: 2", "data_parallel_replicate_size: 2")
    settings = ("policy.precision=bfloat16", "loss_fn.reference_policy_kl_penalty=0.1", "cluster.gpus_per_node=16")
    settings += ("policy.reference_on_cpu=false",)
    spread = load(*settings, f"policy.dtensor_cfg={{{', '.join(sizes)}}}")
    assert dict(batch_rows(spread))["placement"] == (
        "local executor, 1 x 16 GPU(s), 16 ranks (replicate 2 x context 2 x tensor 2 x shard 2), generation shares them"
    )
    one, part = memory_bytes(load(*settings[:2]), shape), memory_bytes(spread, shape)
    for name in ("gradients", "optimizer moments", "reference weights"):
        assert part[name] == pytest.approx(one[name] / 8, abs=8)  # each replica is divided among 8
    assert part["weights"] == pytest.approx(one["master weights"] / 8, abs=8) and "master weights" not in part
    assert part["activations"] == one["activations"] // 2
    assert part["weights of the sampler"] == one["weights"]
    assert part["KV cache"] < one["KV cache"]


def test_what_saves_memory_counts() -> None:
    shape = ModelShape(8, 4, 8, 2, 1, 4, 10)
    count = shape.parameters
    gpu = ("policy.precision=bfloat16", "cluster.gpus_per_node=1", "loss_fn.reference_policy_kl_penalty=0.1")
    plain = memory_bytes(load(*gpu), shape)
    kinds = ("selective", "true")
    recomputed = [
        memory_bytes(load(*gpu, f"policy.dtensor_cfg.activation_checkpointing={kind}"), shape) for kind in kinds
    ]
    for less, more in pairwise([*reversed(recomputed), plain]):
        assert less["activations"] < more["activations"]
        assert {**less, "activations": 0} == {**more, "activations": 0}
    assert "reference weights" not in plain and host_bytes(load(*gpu), shape) == 2 * count
    on_device = load(*gpu, "policy.reference_on_cpu=false")
    assert memory_bytes(on_device, shape)["reference weights"] == 2 * count and not host_bytes(on_device, shape)

    offloaded = load(*gpu, "policy.dtensor_cfg.cpu_offload=true")
    parts = memory_bytes(offloaded, shape)
    assert parts["weights at work"] == 2 * (count - 2 * shape.layer_parameters)  # two layers of four, and the rest
    assert not parts.keys() & {"weights", "master weights", "gradients", "optimizer moments"}
    assert host_bytes(offloaded, shape) == (4 + 4 + 8 + 2) * count
    assert memory_bytes(load("policy.dtensor_cfg.cpu_offload=true"), shape) == memory_bytes(load(), shape)

    resting = load(*gpu, "policy.offload_optimizer_for_logprob=true")
    assert memory_bytes(resting, shape) == plain
    assert host_bytes(resting, shape) == (4 + 8 + 2) * count
    rows, before = dict(memory_rows(resting, shape)), dict(memory_rows(load(*gpu), shape))
    assert float(rows["sum"].split()[0].replace(",", "")) <= float(before["sum"].split()[0].replace(",", ""))


def test_a_layer_is_what_one_more_of_them_adds() -> None:
    sizes = (896, 24, 4864, 14, 2, 64, 151936)
    one, two = ModelShape(*sizes, tied=False, qkv_bias=True), ModelShape(896, 25, *sizes[2:], tied=False, qkv_bias=True)
    assert one.layer_parameters == two.parameters - one.parameters


def test_adapters_alone_are_trained_in_memory() -> None:
    shape = ModelShape(8, 1, 16, 2, 1, 4, 10)
    linears = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16
    adapters = 3 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 16))
    assert shape.linear_parameters == linears

    def parts(lora: str) -> dict[str, int]:
        reference = "loss_fn.reference_policy_kl_penalty=0.1"
        setting = f"policy.dtensor_cfg.lora_cfg={{enabled: true, dim: 3, {lora}}}"
        return memory_bytes(load("policy.precision=bfloat16", reference, setting), shape)

    whole = parts("alpha: 6")
    assert whole["weights"] == 2 * shape.parameters and "master weights" not in whole
    assert whole["adapters"] == whole["gradients"] == whole["reference weights"] == 4 * adapters
    assert whole["optimizer moments"] == 8 * adapters
    assert parts("target_modules: [q_proj, down_proj]")["gradients"] == 4 * 3 * (16 + 24)
    assert parts("quantize: nf4")["weights"] == 2 * (shape.parameters - linears) + linears // 2
    assert parts("quantize: int8")["weights"] == 2 * (shape.parameters - linears) + linears


def test_an_unknown_model_has_a_plan_without_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "something_new"}))
    for name in ("someone/Unheard-Of-3B", str(tmp_path)):
        config = load(f"policy.model_name='{name}'")
        assert "size unknown" in dict(memory_rows(config, model_shape(name)))["model"]
        assert "batch plan" in render_plan(config)
