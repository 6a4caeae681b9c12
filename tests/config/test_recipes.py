"""Every configuration that comes with the package describes a run, and the GRPO family's CPU recipes run."""

from pathlib import Path

import pytest

from nemo_rl.algorithms.launch import launch_grpo
from nemo_rl.cli import main
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.config.sources import RECIPES
from tiny_letters import make_letters_model  # pyright: ignore[reportImplicitRelativeImport]
from tiny_run import records  # pyright: ignore[reportImplicitRelativeImport]

FILES = [*sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml")), *sorted(RECIPES.glob("*.yaml"))]
COMMANDS = ("sft", "dpo", "eval", "rm", "ppo", "distillation", "off_policy_distillation")
FAMILY = [
    *("dapo", "drgrpo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo"),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_file_that_comes_with_the_package_plans_a_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = next((name for name in COMMANDS if file.stem.startswith(name)), "grpo")
    assert main([command, "--dry-run", "--config", str(file)]) == 0, capsys.readouterr().err
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
