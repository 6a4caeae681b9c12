"""NeMo RL's YAML, v0.3 to v0.5: every key is mapped, or ignored with a reason, or refused with what to use instead."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import create_model

from nemo_rl.cli import main
from nemo_rl.config.load import LoadedConfig, load_config
from nemo_rl.config.migrate import migrate
from nemo_rl.config.nemo.dataset_keys import PROMPTS
from nemo_rl.config.nemo.translate import translate
from nemo_rl.config.schema.algorithms import GroupAdvantages, GRPOConfig, GRPOLoopConfig
from nemo_rl.config.schema.examples import ExampleDataConfig
from nemo_rl.config.sources import Tree, keys_of
from nemo_rl.config.templates import prompt_text, split_template
from nemo_rl.errors import ConfigError

FILES = Path(__file__).parent / "nemo"
EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"


def load(path: str | Path, *overrides: str) -> LoadedConfig[GRPOConfig]:
    return load_config(path, overrides, GRPOConfig)


def error_of(path: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def migrated(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The clean form, and the keys that notes speak of."""
    text, notes = migrate(path)
    return yaml.safe_load(text), [note.split(" ")[0] for note in notes]


def translated(values: dict[str, Any], algorithm: str = "grpo") -> tuple[dict[str, Any], tuple[str, ...]]:
    tree = Tree(values, {key: f"f.yaml:{line}" for line, key in enumerate(keys_of(values), 1)})
    notes = translate(tree, GRPOConfig, algorithm)
    return tree.values, notes


def test_the_flat_form_means_the_same_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no file for the prompt
    loaded = load(FILES / "grpo_v03.yaml")
    config, policy = loaded.config, loaded.config.policy
    assert config.loss_fn.reduction == "token_mean"
    assert config.checkpointing.metric_name == "val:accuracy"
    assert (policy.train_mb_tokens, policy.logprob_mb_tokens) == (4 * 512, 8 * 512)
    assert (policy.max_total_sequence_length, policy.generation.max_new_tokens) == (512 + 512, 512)
    assert policy.generation.vllm_cfg.max_model_len is None
    assert policy.optimizer.kwargs["foreach"] is False
    assert config.data.model_dump(exclude_defaults=True) == {
        "train": {"name": "OpenMathInstruct-2"},
        "split_validation_size": 0.05,
        "prompt": load(EXAMPLES / "grpo_math_1B.yaml").config.data.prompt,
        "max_input_seq_length": 512,
        "too_long": "skip",
    }
    assert config.env["math"].type == "math"
    assert config.logger.wandb.name == "grpo-dev-logger"
    assert loaded.sources["policy.train_mb_tokens"] == f"{FILES / 'grpo_v03.yaml'}:43"
    assert [note.split(" ")[0] for note in loaded.notes] == [
        "grpo.val_batch_size",
        "policy.max_total_sequence_length",
        "logger.monitor_gpus",
    ]


def test_the_form_by_split_means_the_same_here() -> None:
    loaded = load(FILES / "grpo_v05.yaml")
    config, policy = loaded.config, loaded.config.policy
    assert config.loss_fn.reduction == "sequence_mean"
    assert config.loss_fn.kl_output_clamp_value == 1e9
    assert config.grpo.adv_estimator == GroupAdvantages(name="grpo", normalize_rewards=False)
    assert (policy.train_mb_tokens, policy.logprob_mb_tokens) == (2 * 1024, 4 * 1024)
    assert policy.sequence_packing.algorithm == "modified_first_fit_decreasing"
    assert (policy.max_total_sequence_length, policy.generation.max_new_tokens) == (1024, 512)
    assert config.data.train == load(FILES / "grpo_v03.yaml").config.data.train
    assert config.data.split_validation_size == load(FILES / "grpo_v03.yaml").config.data.split_validation_size
    assert [note.split(" ")[0] for note in loaded.notes] == [
        "grpo.normalize_rewards",
        "grpo.val_batch_size",
        "policy.dtensor_cfg.activation_checkpointing",
        "policy.sequence_packing.sequence_length_round",
        "policy.generation.vllm_cfg.enable_vllm_metrics_logger",
        "logger.monitor_gpus",
    ]


@pytest.mark.parametrize("name", ["grpo_v03", "grpo_v05"])
def test_a_run_takes_the_file_and_tells_once_what_it_ignores(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = FILES / f"{name}.yaml"
    assert main(["grpo", "--dry-run", "--config", str(path)]) == 0
    captured = capsys.readouterr()
    notes = captured.err.splitlines()
    assert len(set(notes)) == len(notes) >= 3
    assert all(note.startswith("note: ") for note in notes)
    assert f"note: grpo.val_batch_size ({FILES / 'grpo_v03.yaml'}:14) is ignored: answers are sampled" in captured.err
    assert "1,543,714,304 parameters" in captured.out


@pytest.mark.parametrize("name", ["grpo_v03", "grpo_v05"])
def test_the_migrated_file_describes_the_same_run_without_a_note(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["migrate", str(FILES / f"{name}.yaml")]) == 0
    captured = capsys.readouterr()
    path = tmp_path / "clean.yaml"
    path.write_text(captured.out)
    assert load(path).config == load(FILES / f"{name}.yaml").config
    assert load(path).notes == ()
    assert captured.err.startswith("note: ")


def test_what_is_clean_stays_as_it_is() -> None:
    path = EXAMPLES / "grpo_math_1B.yaml"
    text, notes = migrate(path)
    assert notes == ()
    assert GRPOConfig.model_validate(yaml.safe_load(text)) == load(path).config


def test_dpo_is_translated_with_its_report() -> None:
    clean, noted = migrated(FILES / "dpo.yaml")
    assert clean["dpo"]["max_val_samples"] == 8 * 16
    assert clean["policy"]["train_mb_tokens"] == 2 * 2 * 1024
    assert clean["dpo"]["sft_average_log_probs"] is False
    assert "val_batches" not in clean["dpo"]
    assert clean["checkpointing"]["metric_name"] == "val:loss"
    assert ExampleDataConfig.model_validate(clean["data"]).too_long == "skip"
    assert clean["data"]["train"] == {"name": "HelpSteer3", "split": "train"}
    assert clean["data"]["validation"] == {"name": "HelpSteer3", "split": "validation"}
    assert clean["policy"].keys().isdisjoint({"dtensor_cfg", "megatron_cfg", "dynamic_batching", "sequence_packing"})
    assert noted == [
        "dpo.val_micro_batch_size",
        "policy.dtensor_cfg.env_vars",
        "logger.monitor_gpus",
        "logger.tensorboard.log_dir",
    ]


def test_sft_is_translated_with_its_report() -> None:
    clean, noted = migrated(FILES / "sft.yaml")
    assert clean["policy"]["train_mb_tokens"] == 1024
    assert "{% for message in messages %}" in clean["policy"]["tokenizer"]["chat_template"]
    assert ExampleDataConfig.model_validate(clean["data"]).too_long == "skip"
    assert clean["data"]["train"] == {"name": "squad"}
    assert clean["data"]["validation"] == {"name": "squad", "split": "validation"}
    assert clean["logger"]["wandb"]["name"] == "sft-dev-squad"
    assert noted == [
        "sft.val_micro_batch_size",
        "policy.dtensor_cfg.sequence_parallel",
        "policy.sequence_packing.sequence_length_round",
        "data.add_generation_prompt",
        "logger.tensorboard.log_dir",
    ]


def test_rm_is_translated_with_its_report() -> None:
    clean, noted = migrated(FILES / "rm.yaml")
    assert clean["policy"]["train_mb_tokens"] == 2 * 8192
    assert (clean["rm"]["max_num_steps"], clean["rm"]["max_val_samples"]) == (1_000_000, 1_000_000)
    assert clean["checkpointing"]["save_period"] == 16
    assert "message['content']" in clean["policy"]["tokenizer"]["chat_template"]
    assert ExampleDataConfig.model_validate(clean["data"]).too_long == "skip"
    layout = {"type": "pair", "chosen_key": "better", "rejected_key": "worse"}
    pairs = {"name": "local", "format": layout}
    assert clean["data"]["train"] == {**pairs, "path": "pairs.jsonl"}
    assert clean["data"]["validation"] == {**pairs, "path": "held_out.jsonl"}
    assert noted == ["rm.val_micro_batch_size"]


def test_distillation_follows_merge_keys_and_relative_interpolation() -> None:
    clean, noted = migrated(FILES / "distillation.yaml")
    policy, teacher = clean["policy"], clean["teacher"]
    assert policy["tokenizer"]["name"] == policy["model_name"] == "Qwen/Qwen3-1.7B-Base"
    assert teacher["tokenizer"]["name"] == teacher["model_name"] == "Qwen/Qwen3-4B"
    assert (policy["train_mb_tokens"], policy["logprob_mb_tokens"]) == (8192, 2 * 8192)
    assert teacher["logprob_mb_tokens"] == 2 * 4096
    assert not {"optimizer", "train_global_batch_size", "train_mb_tokens", "generation"} & teacher.keys()
    assert clean["loss_fn"] == {"kl_type": "mixed", "mixed_kl_weight": 0.5, "zero_outside_topk": False}
    assert clean["data"]["train"] == {"name": "DeepScaler", "environment": "math"}
    repeated = clean["data"]["validation"]
    assert (repeated["repeat"], repeated["datasets"][0]["data"]["name"]) == (16, "AIME2024")
    assert clean["logger"]["wandb"]["name"] == "DeepScaler-Qwen/Qwen3-4B-mixed"
    assert len(set(noted)) == len(noted)
    assert {
        "teacher.generation",
        "teacher.optimizer",
        "teacher.dtensor_cfg.cpu_offload",
        "logger.swanlab_enabled",
    } <= set(noted)
    assert "policy.dtensor_cfg.cpu_offload" not in noted


def test_eval_is_translated_with_its_report() -> None:
    clean, noted = migrated(FILES / "eval.yaml")
    assert clean["generation"]["model_name"] == clean["tokenizer"]["name"] == "Qwen/Qwen2.5-Math-1.5B-Instruct"
    assert clean["generation"]["vllm_cfg"]["max_model_len"] == clean["generation"]["max_new_tokens"] == 2048
    assert "top_k" not in clean["generation"]
    assert clean["data"]["dataset_name"] == "aime2024"
    assert clean["env"] == {"math": {"type": "math", "num_workers": 8}}
    assert noted == ["generation.num_prompts_per_step"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("policy.megatron_cfg.enabled=true", "set enabled to false and give policy.optimizer and scheduler"),
        ("grpo.async_grpo.enabled=true", "sampling and training take turns: set enabled to false"),
        ("grpo.batch_multiplier=2", "without dynamic sampling as many prompts are sampled as are trained on"),
        ("grpo.reward_shaping={enabled: true, stop_properly_penalty_coef: 0.5}", "use grpo.overlong_filtering"),
        ("grpo.seq_logprob_error_threshold=2.0", "use loss_fn.correction={type: sequence_mask"),
        ("grpo.max_rollout_turns=5", "grpo.max_rollout_turns = 5 (command line) cannot be translated: a rollout has"),
        ("grpo.adv_estimator={name: opd}", "there are grpo, gdpo, reinforce_plus_plus: choose one of them"),
        ("grpo.adv_estimator={name: gdpo, reward_weights: [1, 2]}", "write reward_weights={NAME: WEIGHT, ...}"),
        ("+loss_fn.positive_example_nll_weight=0.1", "right answers get no loss of their own"),
        ("policy.generation.vllm_cfg.pipeline_parallel_size=2", "tensor_parallel_size alone"),
        ("policy.generation.vllm_kwargs={max_num_seqs: 8}", "takes what vllm_cfg names"),
        ("data.dataset_name=no_such_set", "write data.train={name: hub"),
        ("data.processor=my_processor", "data.train.processor=package.module:name"),
        ("+data.train=[{dataset_name: DeepScaler, repeat: 2}, {dataset_name: squad}]", "neither repeated nor divided"),
        ("+env.code={num_workers: 2}", "{type: function, path: 'module:function'}"),
    ],
)
def test_what_would_be_another_run_is_refused_with_what_to_use(override: str, says: str) -> None:
    message = error_of(FILES / "grpo_v03.yaml", override)
    assert "(command line) cannot be translated: " in message
    assert says in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("policy.dtensor_cfg.tensor_paralel_size=1", "did you mean policy.dtensor_cfg.tensor_parallel_size?"),
        ("policy.generation.vllm_cfg.enforce_eger=true", "did you mean policy.generation.vllm_cfg.enforce_eager?"),
        ("grpo.nonsense=1", "unknown key grpo.nonsense (command line)"),
        ("grpo.sed=1", "did you mean grpo.seed?"),
        ("polcy.seed=1", "unknown key polcy (command line): did you mean policy?"),
    ],
)
def test_a_key_that_nobody_knows_stays_an_error(override: str, says: str) -> None:
    assert says in error_of(FILES / "grpo_v03.yaml", override)


def test_an_unknown_key_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "child.yaml"
    path.write_text(f"defaults: {FILES / 'grpo_v03.yaml'}\npolicy:\n  megatron_cfgs: {{}}\n")
    message = error_of(path)
    assert message == f"unknown key policy.megatron_cfgs ({path}:3): did you mean policy.megatron_cfg?"


def test_the_ranks_of_a_model_are_kept() -> None:
    sizes = {"tensor_parallel_size": 2, "sequence_parallel": "true", "context_parallel_size": 4}
    sizes |= {"expert_parallel_size": 8, "custom_parallel_plan": "plans.py:mine"}
    overrides = [f"+policy.dtensor_cfg.{name}={value}" for name, value in sizes.items()]
    loaded = load(FILES / "grpo_v03.yaml", *overrides, "cluster={gpus_per_node: 8, num_nodes: 2}")
    spread = loaded.config.policy.dtensor_cfg.model_dump(exclude_defaults=True)
    assert spread == {**sizes, "sequence_parallel": True}
    assert (loaded.config.cluster.num_ranks, loaded.config.cluster.ranks_on_a_node) == (16, 8)
    alone = load(FILES / "grpo_v03.yaml", "policy.dtensor_cfg.sequence_parallel=true")
    assert alone.config.policy.dtensor_cfg.sequence_parallel is False
    assert any("sequence_parallel (command line) is ignored: it has a meaning with" in note for note in alone.notes)


def test_a_teacher_is_computed_in_one_process_wherever_nemo_rl_spreads_it(tmp_path: Path) -> None:
    path = tmp_path / "spread.yaml"
    text = (FILES / "distillation.yaml").read_text()
    path.write_text(text.replace("    cpu_offload: True", "    tensor_parallel_size: 4\n    sequence_parallel: true"))
    clean, noted = migrated(path)
    assert "dtensor_cfg" not in clean["teacher"]
    assert {"teacher.dtensor_cfg.tensor_parallel_size", "teacher.dtensor_cfg.sequence_parallel"} <= set(noted)


def test_several_problems_are_told_together() -> None:
    message = error_of(FILES / "grpo_v03.yaml", "policy.megatron_cfg.enabled=true", "grpo.nonsense=1")
    assert "megatron_cfg.enabled = True" in message
    assert "unknown key grpo.nonsense" in message


def test_overrides_may_use_either_name_and_the_new_one_wins() -> None:
    loaded = load(FILES / "grpo_v03.yaml", "policy.train_micro_batch_size=2", "loss_fn.token_level_loss=false")
    assert loaded.config.policy.train_mb_tokens == 2 * 512
    assert loaded.config.loss_fn.reduction == "sequence_mean"
    assert load(FILES / "grpo_v03.yaml", "policy.train_mb_tokens=99").config.policy.train_mb_tokens == 99
    policy = {"train_mb_tokens": 99, "train_micro_batch_size": 2, "max_total_sequence_length": 8}
    assert translated({"policy": policy})[0]["policy"]["train_mb_tokens"] == 99
    local = load(
        FILES / "grpo_v05.yaml", "data.train={name: local, path: a.jsonl}", "data.validation={dataset_name: AIME2024}"
    )
    assert (local.config.data.train.name, local.config.data.train.path) == ("local", "a.jsonl")
    assert local.config.data.validation.name == "AIME2024"


def test_one_old_key_is_enough_and_none_changes_nothing() -> None:
    recipe = "grpo_arithmetic_smollm2"
    total = load(recipe).config.policy.max_total_sequence_length
    config = load(recipe, "policy.train_micro_batch_size=2").config
    assert config == load(recipe, f"policy.train_mb_tokens={2 * total}").config
    assert load(recipe).notes == ()
    assert "must start with 'train:' or 'val:'" in error_of(
        "grpo_arithmetic_smollm2", "checkpointing.metric_name=val_reward"
    )
    assert "unknown key logger.wandb.projct" in error_of("grpo_arithmetic_smollm2", "logger.wandb.projct=x")


def test_another_algorithm_is_sent_to_its_command(tmp_path: Path) -> None:
    assert error_of(FILES / "dpo.yaml") == (
        f"dpo ({FILES / 'dpo.yaml'}:1) is the section of another algorithm: use `nemo-rl dpo`"
    )
    (tmp_path / "other.yaml").write_text("repos: []\n")
    with pytest.raises(ConfigError, match="has no section of an algorithm"):
        migrate(tmp_path / "other.yaml")


def test_a_template_file_of_the_users_stays_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cot.txt").write_text("Think. {}")
    values = {"data": {"prompt_file": "cot.txt", "dataset_name": "DeepScaler"}}
    assert translated(values)[0]["data"]["prompt_file"] == "cot.txt"
    (tmp_path / "cot.txt").unlink()
    (shipped,) = PROMPTS.values()
    assert translated(values)[0]["data"]["prompt"] == shipped
    eval_values = {"data": {"prompt_file": "examples/prompts/cot.txt"}, "generation": {"val_top_k": 1}}
    assert translated(eval_values, "eval")[0]["data"] == {"prompt": shipped}


def test_one_text_stands_for_the_prompt_file_wherever_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shipped,) = PROMPTS.values()
    root = EXAMPLES.parents[1]
    assert (root / "examples" / "prompts" / "cot.txt").read_text() == shipped
    for name in ("grpo_math_1B", "ppo_math_1B"):
        assert yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["data"]["prompt"] == shipped
    before, after = split_template(shipped)
    assert "\\boxed{}" in before and "step by step" in after
    monkeypatch.chdir(root)
    assert prompt_text(load(FILES / "grpo_v03.yaml").config.data.prompt_file, "prompt_file") == shipped
    monkeypatch.chdir(tmp_path)
    assert load(FILES / "grpo_v03.yaml").config.data.prompt == shipped


def test_a_dry_run_reads_the_templates_that_the_run_would_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples" / "prompts").mkdir(parents=True)
    template = tmp_path / "examples" / "prompts" / "cot.txt"
    run = ["grpo", "--dry-run", "--config", str(FILES / "grpo_v03.yaml")]
    template.write_text("Answer inside of \\boxed{{}}:\n{}\n\nStep by step")
    assert main(run) == 0
    template.write_text("{} and {}")
    assert main(run) == 2
    assert "has 2 places '{}' for the problem; give it one" in capsys.readouterr().err
    mixture = "{name: mixture, datasets: [{data: {name: GSM8K, system_prompt_file: gone.txt}}]}"
    assert main(["grpo", "--dry-run", f"data.validation={mixture}"]) == 2
    assert "cannot read data.system_prompt_file = gone.txt" in capsys.readouterr().err
    assert main(["eval", "--dry-run", "data.prompt_file=gone.txt"]) == 2
    assert "cannot read data.prompt_file = gone.txt" in capsys.readouterr().err


def test_a_rule_about_what_is_missing_ends_when_the_schema_has_the_key() -> None:
    class Loop(GRPOLoopConfig):
        seq_logprob_error_threshold: float | None = None

    schema = create_model("Config", __base__=GRPOConfig, grpo=(Loop, Loop()))
    tree = Tree({"grpo": {"seq_logprob_error_threshold": 2.0, "batch_multiplier": 1}})
    assert translate(tree, schema) == ()
    assert tree.values == {"grpo": {"seq_logprob_error_threshold": 2.0}}


@pytest.mark.parametrize(
    ("section", "packing", "noted"),
    [
        ({"enabled": True, "algorithm": "concatenative"}, {"algorithm": "concatenative"}, []),
        (
            {"enabled": True, "algorithm": "first_fit_shuffle"},
            {"algorithm": "first_fit_decreasing"},
            ["policy.sequence_packing.algorithm"],
        ),
        ({"enabled": False, "algorithm": "concatenative"}, None, []),
        ({"algorithm": "concatenative"}, {"algorithm": "concatenative"}, []),  # as it is written here
    ],
)
def test_the_packing_is_that_of_the_file_where_it_packs(
    section: dict[str, Any], packing: dict[str, str] | None, noted: list[str]
) -> None:
    dynamic = {"enabled": False, "algorithm": "anything"}  # the key that makes it an old file
    values, notes = translated({"policy": {"dynamic_batching": dynamic, "sequence_packing": section}})
    assert values == ({} if packing is None else {"policy": {"sequence_packing": packing}})
    assert [note.split(" ")[0] for note in notes] == noted
