"""Every configuration that comes with the package describes a run, and every CPU recipe runs."""

import math
from pathlib import Path

import pytest

from nemo_rl.algorithms.evaluate import launch_eval
from nemo_rl.algorithms.launch import launch_grpo
from nemo_rl.algorithms.launchers import launch
from nemo_rl.cli import main
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.schema.distillation import TaughtRunConfig
from nemo_rl.config.schema.evaluation import EvalConfig
from nemo_rl.config.schema.registry import RUNS
from nemo_rl.config.schema.sampled import SampledRunConfig
from nemo_rl.config.sources import RECIPES
from tiny_letters import make_letters_model  # pyright: ignore[reportImplicitRelativeImport]
from tiny_run import records  # pyright: ignore[reportImplicitRelativeImport]

FILES = [*sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml")), *sorted(RECIPES.glob("*.yaml"))]
COMMANDS = ("sft", "dpo", "eval", "rm", "ppo", "distillation", "off_policy_distillation")
PREFERENCES = ("dpo", "ipo", "kto", "orpo", "simpo")
FAMILY = [
    *("grpo", "dapo", "drgrpo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo"),
    "grpo_lora",
]


def command_of(stem: str) -> str:
    if stem.startswith(PREFERENCES):
        return "dpo"
    return next((name for name in COMMANDS if stem.startswith(name)), "grpo")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_file_that_comes_with_the_package_plans_a_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command_of(file.stem), "--dry-run", "--config", str(file)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


@pytest.mark.parametrize("name", FAMILY)
def test_a_cpu_recipe_of_the_family_runs(name: str, letters: Path, tmp_path: Path) -> None:
    recipe = f"{name}_arithmetic_smollm2"
    groups = load_config(recipe, (), GRPOConfig).config.grpo.num_generations_per_prompt
    settings = [
        f"policy.model_name={letters}",
        f"checkpointing.checkpoint_dir={tmp_path}",
        "checkpointing.enabled=false",
        "grpo.max_num_steps=2",
        f"grpo.num_prompts_per_step={16 // groups}",
        "policy.train_global_batch_size=8",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.optimizer.kwargs.lr=0.01",
        "data.validation=null",
        "data.test=null",
        "logger.tensorboard_enabled=false",
    ]
    digits = "def reward(completion: str) -> dict[str, float]:\n    share = sum(map(str.isdigit, completion)) / 16\n"
    (tmp_path / "reward.py").write_text(f"{digits}    return {{'correct': share, 'format': share / 2}}\n")
    settings.append(f"env.math={{type: function, path: '{tmp_path / 'reward.py'}:reward'}}")
    launch_grpo(load_config(recipe, settings, GRPOConfig))
    lines = records(tmp_path)
    assert [line["train/optimizer_steps"] for line in lines] == [2, 2]


@pytest.mark.parametrize("name", [*PREFERENCES, "sft", "rm", "off_policy_distillation", "distillation", "ppo"])
def test_a_cpu_recipe_of_every_other_training_command_runs(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe, command = f"{name}_arithmetic_smollm2", command_of(name)
    schema = RUNS[command]
    settings = [
        f"policy.model_name={tiny_llama}",
        f"checkpointing.checkpoint_dir={tmp_path}",
        "checkpointing.enabled=false",
        f"{command}.max_num_steps=2",
        "policy.train_global_batch_size=8",
        "policy.precision=float32",
        "policy.num_threads=1",
        "data.validation.num_samples=8",
        "logger.tensorboard_enabled=false",
    ]
    if issubclass(schema, TaughtRunConfig):
        settings += [f"teacher.model_name={tiny_llama}", "teacher.precision=float32"]
    if issubclass(schema, SampledRunConfig):
        groups = load_config(recipe, (), schema).config.loop.num_generations_per_prompt
        settings += [f"{command}.num_prompts_per_step={16 // groups}", "data.test=null"]
        settings.append("policy.generation.max_new_tokens=4")
    assert launch(load_config(recipe, settings, schema)).step == 2
    losses = [line["train/loss"] for line in records(tmp_path) if "train/loss" in line]
    assert len(losses) == 2 and all(loss is not None and math.isfinite(loss) for loss in losses)


def test_the_cpu_recipe_of_an_evaluation_runs(tiny_llama: Path, tmp_path: Path) -> None:
    settings = [f"generation.model_name={tiny_llama}", "data.num_samples=4", f"eval.save_path={tmp_path}"]
    launch_eval(load_config("eval_arithmetic_smollm2", settings, EvalConfig))
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4


def test_every_cpu_recipe_is_among_those_that_run() -> None:
    run = {*FAMILY, *PREFERENCES, "sft", "rm", "off_policy_distillation", "distillation", "ppo", "eval"}
    assert {file.stem for file in RECIPES.glob("*.yaml")} == {f"{name}_arithmetic_smollm2" for name in run}
