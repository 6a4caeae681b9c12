"""Loading: inheritance, interpolation, overrides, and errors that name the key, the place and the cure."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.config.load import LoadedConfig, dump_config, load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.registry import COMMANDS
from nemo_rl.config.schema.sources import SourceConfig
from nemo_rl.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"


def load(path: str | Path | None = None, *overrides: str) -> LoadedConfig[GRPOConfig]:
    return load_config(path, overrides, GRPOConfig)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def error_of(path: str | Path | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_loads_and_its_dump_loads_to_the_same(path: Path, tmp_path: Path) -> None:
    kind = next((kind for name, kind in COMMANDS.items() if path.stem.startswith(name)), GRPOConfig)
    config = load_config(path, (), kind).config
    assert load_config(write(tmp_path, "dump.yaml", dump_config(config)), (), kind).config == config


def test_the_default_recipe_is_the_example() -> None:
    assert load().config == load(EXAMPLES / "grpo_arithmetic_smollm2.yaml").config


def test_defaults_are_merged_below_and_later_ones_win(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "defaults: grpo_arithmetic_smollm2\ngrpo: {seed: 1, max_num_steps: 11}\n")
    write(tmp_path, "b.yaml", "grpo: {seed: 2}\n")
    loaded = load(write(tmp_path, "c.yaml", "defaults: [a.yaml, b.yaml]\ngrpo:\n  val_period: 0\n"))
    assert (loaded.config.grpo.seed, loaded.config.grpo.max_num_steps) == (2, 11)
    assert loaded.sources["grpo.seed"] == f"{tmp_path / 'b.yaml'}:1"
    assert loaded.sources["grpo.val_period"] == f"{tmp_path / 'c.yaml'}:3"


def test_a_file_that_names_itself_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "defaults: b.yaml\n")
    write(tmp_path, "b.yaml", "defaults: a.yaml\n")
    assert "names itself" in error_of(path)


def test_interpolation_reaches_written_values_defaults_and_arithmetic() -> None:
    config = load(
        None,
        "grpo.seed=${grpo.val_period}",
        "grpo.num_prompts_per_step=6",
        "data.num_workers='${div:${mul:${policy.train_global_batch_size},${add:1,1}},${max:3,${min:9,4}}}'",
        "policy.tokenizer.name=${policy.model_name}",
        "checkpointing.checkpoint_dir=results/${policy.precision}-${policy.generation.top_p}",
    ).config
    assert config.grpo.seed == 0
    assert config.data.num_workers == 6 * 8 * 2 / 4
    assert config.policy.tokenizer.name == "embedded:SmolLM2-135M-Instruct"
    assert config.checkpointing.checkpoint_dir == "results/auto-1.0"


def test_overrides_set_add_merge_and_remove() -> None:
    config = load(
        None,
        "grpo.seed=7",
        "+grpo.val_at_end=false",
        "++policy.optimizer.kwargs={lr: 1e-4, betas: [0.9, 0.95]}",
        "~grpo.max_num_steps",
        "policy.generation.stop_strings=['a,b']",
    ).config
    assert config.grpo.seed == 7
    assert config.grpo.max_num_steps == GRPOConfig.model_fields["grpo"].default.max_num_steps
    assert config.policy.optimizer.kwargs == {"lr": 1e-4, "weight_decay": 0.0, "betas": [0.9, 0.95]}
    assert config.policy.generation.stop_strings == ("a,b",)


def test_choosing_another_variant_drops_what_only_the_former_knew() -> None:
    config = load(None, "data.train.name=local", "data.train.path=train.jsonl", "policy.generation.backend=vllm").config
    assert config.data.train.model_dump(exclude=set(SourceConfig.model_fields)) == {
        "name": "local",
        "path": "train.jsonl",
        "prompt_key": "prompt",
        "answer_key": "answer",
        "environment": "math",
    }
    assert config.policy.generation.max_new_tokens == load().config.policy.generation.max_new_tokens
    assert "max_batch_size" in error_of(None, "policy.generation.backend=vllm", "policy.generation.max_batch_size=4")


def test_a_float_without_a_point_is_a_number(tmp_path: Path) -> None:
    text = "defaults: grpo_arithmetic_smollm2\npolicy: {optimizer: {kwargs: {lr: 3e-6}}}\n"
    assert load(write(tmp_path, "c.yaml", text)).config.policy.optimizer.kwargs["lr"] == 3e-6


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("grpo: {\n    sed: 3}", "unknown key grpo.sed (FILE:3): did you mean grpo.seed?"),
        ("policy:\n  generation: {temprature: 1.0}", "did you mean policy.generation.temperature?"),
        ("grpo: {temperature: 1.0}", "did you mean policy.generation.temperature?"),
        (
            "env: {math: {timeout: 1.0}}",
            "unknown key env.math.timeout (FILE:2): did you mean env.math.timeout_seconds?",
        ),
        ("qqqqq: 1", "unknown key qqqqq (FILE:2): known here are policy, checkpointing, logger,"),
        ("grpo:\n  seed: abc", "grpo.seed = 'abc' (FILE:3) must be a valid integer"),
        ("grpo: {seed: true}", "grpo.seed = True (FILE:2) must be a valid integer"),
        ("grpo: {seed: 1.0}", "grpo.seed = 1.0 (FILE:2) must be a valid integer"),
        ("policy: {precision: bf16}", "'bfloat16_autocast'; did you mean 'bfloat16'?"),
        (
            "policy: {generation: {backend: vlm}}",
            "policy.generation.backend = 'vlm' (FILE:2) must be one of 'hf', 'vllm'",
        ),
        ("env: {other: {num_workers: 1}}", "env.other.type is missing (FILE:2)"),
        ("data: {train: {mix: {sums: 1}}}", "unknown key data.train.mix.sums (FILE:2): use 'sum_1_1'"),
        ("policy: {optimizer: 3}", "policy.optimizer = 3 (FILE:2) must be a section"),
        ("policy: {scheduler: [{name: x, kwarg: {}}]}", "unknown key policy.scheduler.0.kwarg (FILE:2)"),
        ("grpo: {seed: '${foo.bar}'}", "grpo.seed (FILE:2) cannot be resolved: Interpolation key 'foo.bar' not found"),
        ("grpo: {seed: '${grpo.seed}'}", "grpo.seed (FILE:2) cannot be resolved: Recursive interpolation"),
        ("grpo: {seed: 1}\ngrpo: {seed: 2}", "FILE:3 writes grpo again, after line 2: keep one"),
        ("grpo: ]", "FILE:2 is not valid YAML"),
        (
            "grpo: {num_prompts_per_step: 0}",
            "grpo.num_prompts_per_step = 0 (FILE:2) must be greater than or equal to 1",
        ),
    ],
)
def test_an_error_names_the_key_the_line_and_the_cure(line: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, "bad.yaml", f"defaults: grpo_arithmetic_smollm2\n{line}\n")
    message = error_of(path)
    assert says.replace("FILE", str(path)) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("grpo.sed=3", "unknown key grpo.sed (command line): did you mean grpo.seed?"),
        ("grpo.seed=1,2", "asks for several runs"),
        ("grpo.seed", "does not parse"),
        ("==", "does not parse"),
        ("~policy.model_name", "policy.model_name is missing"),
        ("~grpo.val_at_end", "removes a key that is not written"),
        ("policy.train_global_batch_size=56", "24 prompts x 8 answers = 192 rollouts"),
        ("policy.train_global_batch_size=384", "make it a divisor of 192 and a multiple of 8 (command line)"),
        ("policy.train_global_batch_size=4", "does not divide into equal parts of whole groups"),
        ("grpo.num_generations_per_prompt=1", "leaves no other answer to compare with"),
        ("policy.generation.max_new_tokens=128", "leaves no room for a prompt"),
        ("data.max_input_seq_length=120", "exceeds policy.max_total_sequence_length"),
        ("loss_fn.ratio_clip_c=1.0", "must be greater than 1"),
        ("loss_fn.ratio_clip_min=1.5", "must be less than or equal to 1"),
        ("checkpointing.checkpoint_must_save_by=4h", "must match pattern"),
        ("checkpointing.metric_name=accuracy", "must start with 'train:' or 'val:'"),
        ("data.test.environment=maths", "is not in env: use one of math"),
        ("data.prompt=solve", "'solve' has 0 places '{}' for the problem; give it one"),
        ("data.prompt='{} {}'", "has 2 places '{}'"),
        ("data.train.mix={sum_1_1: 0, sum_2_1: 0, sum_2_2: 0}", "no share above 0"),
        ("policy.scheduler=[{name: a},{name: b}]", "chains 2 schedulers and needs one milestones entry with 1 steps"),
        ("policy.generation.colocated.enabled=false", "set resources.gpus_per_node"),
        ("policy.max_grad_norm=nan", "must be a finite number"),
        ("grpo.seed=", "grpo.seed = '' (command line) must be a valid integer"),
    ],
)
def test_an_impossible_override_is_one_sentence(override: str, says: str) -> None:
    message = error_of(None, override)
    assert says in message
    assert "\n" not in message


def test_an_empty_value_is_not_met_with_an_empty_proposal() -> None:
    assert "did you mean" not in error_of(None, "grpo.seed=")


@pytest.mark.parametrize("prompt", ["cost ${x} {}", "cost \\${x} {}", "C:\\dir\\\\${grpo.seed} {}", "$${a}\\ {}"])
def test_text_that_looks_like_an_interpolation_survives_the_dump(prompt: str, tmp_path: Path) -> None:
    values = load().config.model_dump(mode="json")
    values["data"]["prompt"] = prompt
    config = GRPOConfig.model_validate(values)
    assert load(write(tmp_path, "dump.yaml", dump_config(config))).config == config


def test_text_that_looks_like_a_number_survives_the_dump(tmp_path: Path) -> None:
    values = load().config.model_dump(mode="json")
    values["policy"]["generation"]["stop_strings"] = ["0E0", "1e5", "1.5", "true"]
    config = GRPOConfig.model_validate(values)
    assert load(write(tmp_path, "dump.yaml", dump_config(config))).config == config


def test_a_gpu_that_ray_is_not_asked_for_is_an_error() -> None:
    message = error_of(None, "cluster.executor=ray", "policy.device=cuda")
    assert "policy.device = cuda needs a GPU, and cluster.gpus_per_node = 0 asks Ray for none" in message
    for fine in ("policy.device=auto", "cluster.gpus_per_node=1", "cluster.executor=local"):
        load(None, "cluster.executor=ray", "policy.device=cuda", fine)


def test_validation_without_validation_data_is_an_error() -> None:
    assert "data.validation is not set" in error_of(None, "~data.validation", "grpo.val_period=5")


def test_a_misspelt_section_is_the_only_complaint(tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", "polcy: {}\n")
    assert error_of(path) == f"unknown key polcy ({path}:1): did you mean policy?"


def test_a_missing_file_and_an_unknown_recipe_are_errors(tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "none.yaml")
    assert "grpo_arithmetic_smollm2" in error_of("no_such_recipe")
    assert "must hold a YAML mapping" in error_of(write(tmp_path, "list.yaml", "- 1\n"))


def test_the_wall_clock_limit_is_read_as_seconds() -> None:
    loaded = load(None, "checkpointing.checkpoint_must_save_by='01:02:03:04'")
    assert loaded.config.checkpointing.must_save_by_seconds == 86400 + 2 * 3600 + 3 * 60 + 4


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.integers(1, 64),
    answers=st.integers(2, 16),
    learning_rate=st.floats(1e-9, 1.0),
    stop=st.lists(st.text(st.characters(codec="utf-8") | st.sampled_from("\\${}"), max_size=8), max_size=3),
)
def test_any_valid_configuration_survives_the_dump(
    prompts: int, answers: int, learning_rate: float, stop: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = load().config.model_dump(mode="json")
    base["grpo"] |= {"num_prompts_per_step": prompts, "num_generations_per_prompt": answers}
    base["policy"]["train_global_batch_size"] = prompts * answers
    base["policy"]["optimizer"]["kwargs"]["lr"] = learning_rate
    base["policy"]["generation"]["stop_strings"] = stop
    config = GRPOConfig.model_validate(base)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load(path).config == config
