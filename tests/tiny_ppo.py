"""PPO runs that take a second or two: the model, the reward and the sizes of `tiny_run`."""

from pathlib import Path

from nemo_rl.algorithms.launch_ppo import launch_ppo
from nemo_rl.algorithms.outcome import Outcome
from nemo_rl.config.load import load_config
from nemo_rl.config.schema.ppo import PPOConfig

SEPARATE = ("value.kind=separate", "value.optimizer.kwargs.lr=0.02")


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
