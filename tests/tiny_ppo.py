"""PPO runs that take a second or two: the model, the reward and the sizes of `tiny_run`."""

from pathlib import Path

from nemo_rl.algorithms.launch_ppo import launch_ppo
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.ppo import PPOConfig
from tiny_run import records, reward_file  # pyright: ignore[reportImplicitRelativeImport]


def ppo_overrides(model: Path, reward: str, folder: Path, *more: str) -> list[str]:
    """Three steps of 3 prompts x 4 answers of at most 6 tokens in one thread, saved at the end; `more` goes on top."""
    return [
        f"policy.model_name={model}",
        f"checkpointing.checkpoint_dir={folder}",
        "ppo.max_num_steps=3",
        "ppo.num_prompts_per_step=3",
        "ppo.num_generations_per_prompt=4",
        "policy.generation.max_new_tokens=6",
        "policy.precision=float32",
        "policy.num_threads=1",
        "policy.optimizer={name: torch.optim.AdamW, kwargs: {lr: 0.01, weight_decay: 0.0}}",
        "policy.scheduler=[]",
        "~env.math",
        f"+env.function={{type: function, path: '{reward}'}}",
        "data.train={name: arithmetic, num_samples: 50, environment: function}",
        "data.validation=null",
        "data.test=null",
        "checkpointing.export_hf=false",
        "logger.tensorboard_enabled=false",
        "logger.print_sample_period=0",
        *more,
    ]


def load_ppo(*settings: str) -> PPOConfig:
    return load_config(None, settings, PPOConfig).config


def launch(settings: list[str]) -> Outcome:
    """Run in this process."""
    return launch_ppo(load_config(None, settings, PPOConfig))


def ppo_run(model: Path, folder: Path, *settings: str) -> list[dict[str, float | None]]:
    """Train on 24 prompts with one answer of at most 4 characters each a step, and return the records."""
    more = (
        "ppo.max_num_steps=16",
        "ppo.num_prompts_per_step=24",
        "ppo.num_generations_per_prompt=1",
        "policy.train_global_batch_size=24",
        "policy.generation.max_new_tokens=4",
        "policy.optimizer.kwargs.lr=0.05",
        "checkpointing.enabled=false",
        *settings,
    )
    launch(ppo_overrides(model, reward_file(folder), folder / "run", *more))
    return records(folder / "run")
